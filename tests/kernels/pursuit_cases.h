#pragma once
// Made-up problems of pursuit, their codes, and a slow reference in double; what holds for any
// codes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "kernels/pursuit/pursuit.h"

namespace lexico::kernels {

struct Rule {
  const char* name;
  PursuitRule rule;
  int candidates;
};
struct Case {
  int dictionaries = 1, atoms = 0, dim = 0;
  std::vector<float> rows, signals;
  std::int64_t num_signals() const {
    return static_cast<std::int64_t>(signals.size()) / dim / dictionaries;
  }
  const float* row(int n) const { return rows.data() + static_cast<std::size_t>(n * dim); }
  const float* signal(std::int64_t b) const { return signals.data() + b * dim; }
  void append(const std::vector<float>& signal) {
    signals.insert(signals.end(), signal.begin(), signal.end());
  }
};

// Its sizes and options; no memory.
inline PursuitProblem problem_of(const Case& c, int max_atoms, const Rule& rule, float tolerance) {
  PursuitProblem p;
  p.num_dictionaries = c.dictionaries;
  p.num_signals = c.num_signals();
  p.num_atoms = c.atoms;
  p.dim = c.dim;
  p.max_atoms = max_atoms;
  p.rule = rule.rule;
  p.candidates = rule.candidates;
  p.relative_tolerance = tolerance;
  return p;
}

struct Codes {
  int max_atoms = 0;
  std::vector<std::int32_t> indices, counts;
  std::vector<float> weights, residual_norms, curve;
  bool operator==(const Codes&) const = default;
  std::vector<std::int32_t> picks(std::int64_t b) const {
    const auto first = indices.begin() + b * max_atoms;
    return {first, first + counts[static_cast<std::size_t>(b)]};
  }
};

inline void normalize(float* row, int dim) {
  double norm2 = 0;
  for (int k = 0; k < dim; ++k) norm2 += double{row[k]} * row[k];
  for (int k = 0; k < dim; ++k) row[k] = static_cast<float>(row[k] / std::sqrt(norm2));
}

// Random unit atoms; signals are sums of a few of them plus noise.
inline Case isotropic(
    int atoms, int dim, std::int64_t signals, unsigned seed, int dictionaries = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Case c{dictionaries, atoms, dim, {}, {}};
  c.rows.resize(static_cast<std::size_t>(dictionaries * atoms * dim));
  for (float& x : c.rows) x = normal(random);
  for (int n = 0; n < dictionaries * atoms; ++n) normalize(c.rows.data() + n * dim, dim);
  for (int p = 0; p < dictionaries; ++p) {
    for (std::int64_t b = 0; b < signals; ++b) {
      std::vector<float> x(static_cast<std::size_t>(dim));
      for (float& value : x) value = 0.1f * normal(random);
      for (int i = 0; i < 6; ++i) {
        const float weight = normal(random);
        const int n = p * atoms + static_cast<int>(random() % static_cast<unsigned>(atoms));
        for (int k = 0; k < dim; ++k) x[static_cast<std::size_t>(k)] += weight * c.row(n)[k];
      }
      c.append(x);
    }
  }
  return c;
}

// Atoms around a few centres: neighbours have correlations near 1.
inline Case coherent(int atoms, int dim, std::int64_t signals, unsigned seed) {
  Case c = isotropic(atoms, dim, signals, seed);
  std::mt19937 random(seed + 1);
  std::normal_distribution<float> normal;
  for (int n = 8; n < atoms; ++n) {
    for (int k = 0; k < dim; ++k) {
      c.rows[static_cast<std::size_t>(n * dim + k)] = c.row(n % 8)[k] + 0.05f * normal(random);
    }
    normalize(c.rows.data() + n * dim, dim);
  }
  return c;
}

struct Reference {
  std::vector<int> picks;
  std::vector<double> weights;
  double residual_norm = 0;
};

// The definition, in double: orthogonalise every atom against the chosen ones for each pick.
inline Reference reference(const Case& c, const float* signal, int max_atoms, const Rule& rule) {
  const int m = c.dim;
  std::vector<double> r(signal, signal + m);
  std::vector<std::vector<double>> basis, triangle;
  std::vector<double> a;
  std::set<int> candidates;
  Reference result;
  const auto dot = [m](const auto* x, const auto* y) {
    double s = 0;
    for (int k = 0; k < m; ++k) s += double{x[k]} * y[k];
    return s;
  };
  for (int k = 0; k < max_atoms; ++k) {
    std::vector<std::pair<double, int>> by_correlation;
    for (int n = 0; n < c.atoms; ++n) {
      if (std::find(result.picks.begin(), result.picks.end(), n) == result.picks.end()) {
        double s = 0;
        for (int e = 0; e < m; ++e) s += c.row(n)[e] * r[static_cast<std::size_t>(e)];
        by_correlation.push_back({-std::abs(s), n});
      }
    }
    std::sort(by_correlation.begin(), by_correlation.end());
    if (by_correlation.empty()) break;
    int pick = by_correlation[0].second;
    if (rule.rule == PursuitRule::kOls) {
      const std::size_t among =
          rule.candidates > 0 ? std::min<std::size_t>(static_cast<std::size_t>(rule.candidates),
                                                      by_correlation.size())
                              : by_correlation.size();
      for (std::size_t i = 0; i < among; ++i) candidates.insert(by_correlation[i].second);
      double best = -1;
      for (const auto& [minus_correlation, n] : by_correlation) {
        if (!candidates.contains(n)) continue;
        const float* d = c.row(n);
        double n2 = dot(d, d);
        for (const auto& u : basis) {
          double s = 0;
          for (int e = 0; e < m; ++e) s += d[e] * u[static_cast<std::size_t>(e)];
          n2 -= s * s;
        }
        const double score = minus_correlation * minus_correlation / n2;
        if (n2 > 1e-5 && score > best) {
          best = score;
          pick = n;
        }
      }
    }
    std::vector<double> u(c.row(pick), c.row(pick) + m), column(basis.size());
    for (int twice = 0; twice < 2; ++twice) {
      for (std::size_t i = 0; i < basis.size(); ++i) {
        const double s = dot(u.data(), basis[i].data());
        column[i] += s;
        for (int e = 0; e < m; ++e)
          u[static_cast<std::size_t>(e)] -= s * basis[i][static_cast<std::size_t>(e)];
      }
    }
    const double nu = std::sqrt(dot(u.data(), u.data()));
    for (double& x : u) x /= nu;
    const double amplitude = dot(u.data(), r.data());
    for (int e = 0; e < m; ++e)
      r[static_cast<std::size_t>(e)] -= amplitude * u[static_cast<std::size_t>(e)];
    column.push_back(nu);
    basis.push_back(u);
    triangle.push_back(column);
    a.push_back(amplitude);
    result.picks.push_back(pick);
  }
  result.weights = a;
  for (std::size_t k = a.size(); k-- > 0;) {
    result.weights[k] /= triangle[k][k];
    for (std::size_t i = 0; i < k; ++i) result.weights[i] -= triangle[k][i] * result.weights[k];
  }
  result.residual_norm = std::sqrt(dot(r.data(), r.data()));
  return result;
}

// |x - D w|, with what was written out.
inline double true_residual(const Case& c, const Codes& codes, std::int64_t b) {
  std::vector<double> r(c.signal(b), c.signal(b) + c.dim);
  for (int k = 0; k < codes.counts[static_cast<std::size_t>(b)]; ++k) {
    const std::size_t slot = static_cast<std::size_t>(b * codes.max_atoms + k);
    for (int e = 0; e < c.dim; ++e) {
      r[static_cast<std::size_t>(e)] -= double{codes.weights[slot]} * c.row(codes.indices[slot])[e];
    }
  }
  double norm2 = 0;
  for (double x : r) norm2 += x * x;
  return std::sqrt(norm2);
}

inline double norm(const float* x, int dim) {
  double norm2 = 0;
  for (int k = 0; k < dim; ++k) norm2 += double{x[k]} * x[k];
  return std::sqrt(norm2);
}

// What holds for any input: slots in order, no atom twice, finite, |r| as reported and never
// growing.
inline void expect_sound(const Case& c, const Codes& codes) {
  for (std::int64_t b = 0; b < c.num_signals(); ++b) {
    const std::size_t first = static_cast<std::size_t>(b * codes.max_atoms);
    const int count = codes.counts[static_cast<std::size_t>(b)];
    ASSERT_GE(count, 0);
    ASSERT_LE(count, codes.max_atoms);
    std::vector<std::int32_t> picks = codes.picks(b);
    std::sort(picks.begin(), picks.end());
    EXPECT_EQ(std::adjacent_find(picks.begin(), picks.end()), picks.end()) << "signal " << b;
    for (int k = 0; k < codes.max_atoms; ++k) {
      const std::size_t slot = first + static_cast<std::size_t>(k);
      if (k < count) {
        EXPECT_GE(codes.indices[slot], 0);
        EXPECT_LT(codes.indices[slot], c.atoms);
        EXPECT_TRUE(std::isfinite(codes.weights[slot]));
      } else {
        EXPECT_EQ(codes.indices[slot], -1);
        EXPECT_EQ(codes.weights[slot], 0);
      }
      if (k > 0) {
        EXPECT_FALSE(codes.curve[slot] > codes.curve[slot - 1]);
      }
    }
    const double size = norm(c.signal(b), c.dim);
    if (!std::isfinite(size)) continue;
    const float last = codes.curve[first + static_cast<std::size_t>(codes.max_atoms) - 1];
    EXPECT_EQ(last, codes.residual_norms[static_cast<std::size_t>(b)]);
    EXPECT_LE(codes.residual_norms[static_cast<std::size_t>(b)], size * (1 + 1e-6));
    EXPECT_NEAR(codes.residual_norms[static_cast<std::size_t>(b)],
                true_residual(c, codes, b),
                5e-5 * size + 1e-44)
        << "signal " << b;
  }
}

}  // namespace lexico::kernels
