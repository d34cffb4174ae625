// Plain loops over codes: what they decode to, and where the atoms should move.
#include <omp.h>

#include <algorithm>

#include "kernels/sparse/sparse.h"

namespace lexico::kernels::cpu {
namespace {

int thread_count(const SparseProblem& p) {
  return p.threads > 0 ? p.threads : omp_get_max_threads();
}

/// Atoms are shared out in this many ranges, so that one dictionary also keeps several threads
/// busy.
constexpr int kAtomRanges = 8;

void add_scaled(float* to, const float* from, float weight, int dim) {
  for (int d = 0; d < dim; ++d) to[d] += weight * from[d];
}

void add_gradient(const SparseProblem& p,
                  int dictionary,
                  int first_atom,
                  int last_atom,
                  const float* residual,
                  float scale,
                  float* gradient) {
  const std::int64_t slots = p.num_signals * p.max_atoms;
  const std::int32_t* indices = p.indices + dictionary * slots;
  const float* weights = p.weights + dictionary * slots;
  const float* rows = residual + dictionary * p.num_signals * p.dim;
  float* out = gradient + static_cast<std::int64_t>(dictionary) * p.num_atoms * p.dim;
  std::fill(out + static_cast<std::int64_t>(first_atom) * p.dim,
            out + static_cast<std::int64_t>(last_atom) * p.dim,
            0.0f);
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    const int atom = indices[slot];
    if (atom < first_atom || atom >= last_atom) continue;
    add_scaled(out + static_cast<std::int64_t>(atom) * p.dim,
               rows + slot / p.max_atoms * p.dim,
               scale * weights[slot],
               p.dim);
  }
}

}  // namespace

Status sparse_residual(const SparseProblem& p, const float* signals, float* residual) {
  const std::int64_t rows = p.num_dictionaries * p.num_signals;
#pragma omp parallel for schedule(static) num_threads(thread_count(p))
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* atoms = p.atoms + row / p.num_signals * p.num_atoms * p.dim;
    float* r = residual + row * p.dim;
    std::copy_n(signals + row * p.dim, p.dim, r);
    for (std::int64_t slot = row * p.max_atoms;
         slot < (row + 1) * p.max_atoms && p.indices[slot] >= 0;
         ++slot)
      add_scaled(
          r, atoms + static_cast<std::int64_t>(p.indices[slot]) * p.dim, -p.weights[slot], p.dim);
  }
  return {};
}

Status sparse_gradient(const SparseProblem& p,
                       const float* residual,
                       float scale,
                       float* gradient) {
#pragma omp parallel for schedule(dynamic) num_threads(thread_count(p))
  for (int task = 0; task < p.num_dictionaries * kAtomRanges; ++task) {
    const int range = task % kAtomRanges;
    const auto bound = [&](int r) {
      return static_cast<int>(static_cast<std::int64_t>(p.num_atoms) * r / kAtomRanges);
    };
    add_gradient(p, task / kAtomRanges, bound(range), bound(range + 1), residual, scale, gradient);
  }
  return {};
}

}  // namespace lexico::kernels::cpu
