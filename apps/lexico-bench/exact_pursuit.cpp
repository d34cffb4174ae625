// Matching pursuit by its definition, in double (docs/encoder.md, "accuracy").
#include "lexico-bench/exact_pursuit.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace lexico::apps {
namespace {

template <typename A, typename B>
double dot(const A* a, const B* b, int n) {
  double sum = 0;
  for (int k = 0; k < n; ++k) sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  return sum;
}

}  // namespace

ExactCode exact_pursuit(
    const float* atoms, int num_atoms, int dim, const float* signal, const EncodeOptions& options) {
  // Below this share of |d|^2 outside the span the encoder takes an atom to be in it, too.
  constexpr double kIndependent = 1e-5, kResidualFloor = 1e-6;
  const auto row = [&](int n) { return atoms + static_cast<std::ptrdiff_t>(n) * dim; };
  const bool ols = options.selection.rule == Selection::Rule::kOls;
  const int candidates = options.selection.candidates_among(num_atoms);
  const std::size_t count = static_cast<std::size_t>(num_atoms);
  std::vector<double> residual(signal, signal + dim), correlation(count), outside(count);
  std::vector<std::vector<double>> basis;
  std::vector<int> order(count);
  std::vector<bool> taken(count, false), candidate(count, !ols || candidates == 0);
  for (int n = 0; n < num_atoms; ++n)
    outside[static_cast<std::size_t>(n)] = dot(row(n), row(n), dim);
  const double size = std::sqrt(dot(signal, signal, dim));
  ExactCode code;
  code.residual_norm = size;
  while (static_cast<int>(code.atoms.size()) < options.max_atoms &&
         code.residual_norm > kResidualFloor * size &&
         code.residual_norm > double{options.relative_tolerance} * size) {
    for (std::size_t n = 0; n < count; ++n)
      correlation[n] = std::fabs(dot(row(static_cast<int>(n)), residual.data(), dim));
    std::iota(order.begin(), order.end(), 0);
    if (ols && candidates > 0) {
      // Those taken already do not count among the largest.
      const std::size_t largest =
          std::min(count, static_cast<std::size_t>(candidates) + code.atoms.size());
      std::partial_sort(order.begin(),
                        order.begin() + static_cast<std::ptrdiff_t>(largest),
                        order.end(),
                        [&](int a, int b) {
                          const double x = correlation[static_cast<std::size_t>(a)],
                                       y = correlation[static_cast<std::size_t>(b)];
                          return x > y || (x == y && a < b);
                        });
      int left = candidates;
      for (std::size_t i = 0; i < largest && left > 0; ++i) {
        const std::size_t n = static_cast<std::size_t>(order[i]);
        if (taken[n]) continue;
        candidate[n] = true;  // and remains one
        --left;
      }
    }
    int pick = -1;
    double best = 0;
    for (std::size_t n = 0; n < count; ++n) {
      if (!candidate[n] || taken[n] || outside[n] <= kIndependent) continue;
      const double score = ols ? correlation[n] * correlation[n] / outside[n] : correlation[n];
      if (score > best) {
        best = score;
        pick = static_cast<int>(n);
      }
    }
    if (pick < 0) break;
    std::vector<double> u(row(pick), row(pick) + dim);
    for (int twice = 0; twice < 2; ++twice) {
      for (const std::vector<double>& other : basis) {
        const double c = dot(u.data(), other.data(), dim);
        for (std::size_t k = 0; k < u.size(); ++k) u[k] -= c * other[k];
      }
    }
    const double length = std::sqrt(dot(u.data(), u.data(), dim));
    for (double& x : u) x /= length;
    const double amplitude = dot(u.data(), residual.data(), dim);
    for (std::size_t k = 0; k < u.size(); ++k) residual[k] -= amplitude * u[k];
    // outside[n] is |P_perp d_n|^2, which OLS divides by and OMP needs only to refuse atoms in the
    // span.
    for (std::size_t n = 0; n < count && ols; ++n) {
      const double q = dot(row(static_cast<int>(n)), u.data(), dim);
      outside[n] -= q * q;
    }
    taken[static_cast<std::size_t>(pick)] = true;
    basis.push_back(std::move(u));
    code.atoms.push_back(pick);
    code.residual_norm = std::sqrt(dot(residual.data(), residual.data(), dim));
  }
  return code;
}

}  // namespace lexico::apps
