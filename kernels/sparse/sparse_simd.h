#pragma once
// Loops over codes and atoms, compiled once per instruction set level. Internal linkage only.
#include "kernels/pursuit/simd.h"
#include "kernels/sparse/sparse_level.h"

namespace lexico::kernels::cpu {
namespace {

inline void add_scaled(float* to, const float* from, float weight, int dim) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes)
    store(to + d, load(to + d) + splat(weight) * load(from + d));
  for (; d < dim; ++d) to[d] += weight * from[d];
}

inline void scale_by(float* to, float factor, int dim) {
  for (int d = 0; d < dim; ++d) to[d] *= factor;
}

inline float dot(const float* a, const float* b, int dim) {
  Vec total{};
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) total += load(a + d) * load(b + d);
  float rest = sum(total);
  for (; d < dim; ++d) rest += a[d] * b[d];
  return rest;
}

inline float norm(const float* v, int dim) { return __builtin_sqrtf(dot(v, v, dim)); }

/// A row of zeros, or one with a NaN, stays.
inline void normalize_row(float* v, int dim) {
  const float length = norm(v, dim);
  if (length > 0) scale_by(v, 1.0f / length, dim);
}

inline void residual_rows(const SparseProblem& p,
                          int dictionary,
                          std::int64_t first,
                          std::int64_t last,
                          const float* signals,
                          float* residual,
                          float* signal_norms,
                          float* residual_norms) {
  const float* atoms = p.atoms + static_cast<std::int64_t>(dictionary) * p.num_atoms * p.dim;
  for (std::int64_t b = first; b < last; ++b) {
    const std::int64_t row = dictionary * p.num_signals + b;
    const float* x = signals + row * p.dim;
    float* r = residual + row * p.dim;
    for (int d = 0; d < p.dim; ++d) r[d] = x[d];
    const std::int32_t* index = p.indices + row * p.max_atoms;
    const float* weight = p.weights + row * p.max_atoms;
    for (int k = 0; k < p.max_atoms && index[k] >= 0; ++k)
      add_scaled(r, atoms + static_cast<std::int64_t>(index[k]) * p.dim, -weight[k], p.dim);
    signal_norms[row] = norm(x, p.dim);
    residual_norms[row] = norm(r, p.dim);
  }
}

inline void gradient_rows(const SparseProblem& p,
                          const AtomUses& uses,
                          int dictionary,
                          int first,
                          int last,
                          const float* residual,
                          float scale,
                          float* gradient) {
  const std::int64_t num_slots = p.num_signals * p.max_atoms;
  const std::int32_t* offsets =
      uses.offsets + static_cast<std::int64_t>(dictionary) * (p.num_atoms + 1);
  const std::int32_t* slots = uses.slots + dictionary * num_slots;
  const float* weights = p.weights + dictionary * num_slots;
  const float* rows = residual + dictionary * p.num_signals * p.dim;
  for (int n = first; n < last; ++n) {
    float* out = gradient + (static_cast<std::int64_t>(dictionary) * p.num_atoms + n) * p.dim;
    for (int d = 0; d < p.dim; ++d) out[d] = 0;
    for (std::int32_t i = offsets[n]; i < offsets[n + 1]; ++i) {
      const std::int32_t slot = slots[i];
      add_scaled(out,
                 rows + static_cast<std::int64_t>(slot / p.max_atoms) * p.dim,
                 scale * weights[slot],
                 p.dim);
    }
  }
}

inline void adam_rows(const AdamStep& step, int dictionary, int first_atom, int last_atom) {
  const float scale = step.scales[dictionary];
  if (scale == 0) return;
  const double t = static_cast<double>(step.step);
  const float keep1 = static_cast<float>(step.beta1), keep2 = static_cast<float>(step.beta2);
  const float add1 = static_cast<float>(1 - step.beta1), add2 = static_cast<float>(1 - step.beta2);
  const float debias2 = static_cast<float>(1 / (1 - __builtin_pow(step.beta2, t)));
  const float rate = static_cast<float>(step.rate / (1 - __builtin_pow(step.beta1, t)));
  const float epsilon = static_cast<float>(step.epsilon);
  const int dim = step.dim;
  for (int n = first_atom; n < last_atom; ++n) {
    const std::int64_t at = (static_cast<std::int64_t>(dictionary) * step.num_atoms + n) * dim;
    const float* g = step.gradient + at;
    float *d = step.atoms + at, *m1 = step.first + at, *m2 = step.second + at;
    if (step.normalize_first) normalize_row(d, dim);
    const float along = dot(g, d, dim);
    for (int i = 0; i < dim; ++i) {
      const float tangent = scale * (g[i] - along * d[i]);
      m1[i] = keep1 * m1[i] + add1 * tangent;
      m2[i] = keep2 * m2[i] + add2 * tangent * tangent;
      d[i] -= rate * m1[i] / (__builtin_sqrtf(m2[i] * debias2) + epsilon);
    }
    if (!step.normalize_first) normalize_row(d, dim);
  }
}

inline void co_occurrence_rows(const SparseProblem& p,
                               const AtomUses& uses,
                               int dictionary,
                               int first,
                               int last,
                               const float* signals,
                               float keep,
                               const CoOccurrence& sums) {
  const std::int64_t num_slots = p.num_signals * p.max_atoms;
  const std::int32_t* offsets =
      uses.offsets + static_cast<std::int64_t>(dictionary) * (p.num_atoms + 1);
  const std::int32_t* slots = uses.slots + dictionary * num_slots;
  const std::int32_t* indices = p.indices + dictionary * num_slots;
  const float* weights = p.weights + dictionary * num_slots;
  const float* rows = signals + dictionary * p.num_signals * p.dim;
  for (int n = first; n < last; ++n) {
    const std::int64_t row = static_cast<std::int64_t>(dictionary) * p.num_atoms + n;
    float* a = sums.codes + row * p.num_atoms;
    float* b = sums.signals + row * p.dim;
    scale_by(a, keep, p.num_atoms);
    scale_by(b, keep, p.dim);
    for (std::int32_t i = offsets[n]; i < offsets[n + 1]; ++i) {
      const std::int32_t slot = slots[i], signal = slot / p.max_atoms;
      const std::int32_t* index = indices + static_cast<std::int64_t>(signal) * p.max_atoms;
      const float* weight = weights + static_cast<std::int64_t>(signal) * p.max_atoms;
      for (int k = 0; k < p.max_atoms && index[k] >= 0; ++k)
        a[index[k]] += weights[slot] * weight[k];
      add_scaled(b, rows + static_cast<std::int64_t>(signal) * p.dim, weights[slot], p.dim);
    }
  }
}

constexpr int kTileRows = 4, kTileVecs = kLanes == 16 ? 4 : 2;

/// kRows x kVecs registers of B - A D.
template <int kRows, int kVecs>
inline void misfit_tile(
    int num_atoms, int dim, const float* A, const float* B, const float* atoms, float* out) {
  Vec total[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) total[r][v] = load(B + r * dim + v * kLanes);
  for (int k = 0; k < num_atoms; ++k) {
    Vec atom[kVecs];
    for (int v = 0; v < kVecs; ++v)
      atom[v] = load(atoms + static_cast<std::int64_t>(k) * dim + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = splat(A[static_cast<std::int64_t>(r) * num_atoms + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) total[r][v] -= weight * atom[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(out + r * dim + v * kLanes, total[r][v]);
}

template <int kRows>
inline void misfit_strip(
    int num_atoms, int dim, const float* A, const float* B, const float* atoms, float* out) {
  int d = 0;
  for (; d + kTileVecs * kLanes <= dim; d += kTileVecs * kLanes)
    misfit_tile<kRows, kTileVecs>(num_atoms, dim, A, B + d, atoms + d, out + d);
  for (; d + kLanes <= dim; d += kLanes)
    misfit_tile<kRows, 1>(num_atoms, dim, A, B + d, atoms + d, out + d);
  for (; d < dim; ++d)
    for (int r = 0; r < kRows; ++r) {
      float total = B[r * dim + d];
      for (int k = 0; k < num_atoms; ++k)
        total -= A[static_cast<std::int64_t>(r) * num_atoms + k] *
                 atoms[static_cast<std::int64_t>(k) * dim + d];
      out[r * dim + d] = total;
    }
}

inline void misfit_rows(int rows,
                        int num_atoms,
                        int dim,
                        const float* A,
                        const float* B,
                        const float* atoms,
                        float* out) {
  int r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    misfit_strip<kTileRows>(num_atoms,
                            dim,
                            A + static_cast<std::int64_t>(r) * num_atoms,
                            B + r * dim,
                            atoms,
                            out + r * dim);
  for (; r < rows; ++r)
    misfit_strip<1>(num_atoms,
                    dim,
                    A + static_cast<std::int64_t>(r) * num_atoms,
                    B + r * dim,
                    atoms,
                    out + r * dim);
}

inline void descend_rows(
    int rows, int num_atoms, int dim, const float* A, int first, float* misfit, float* atoms) {
  for (int j = 0; j < rows; ++j) {
    const float* a = A + static_cast<std::int64_t>(j) * num_atoms + first;
    if (!(a[j] > 0)) continue;
    float *d = atoms + j * dim, *g = misfit + j * dim;
    // g becomes b_j - sum over k != j of A_jk d_k, then the move of d_j.
    add_scaled(g, d, a[j], dim);
    const float length = norm(g, dim);
    if (!(length > 0)) continue;
    for (int i = 0; i < dim; ++i) {
      const float moved = g[i] / length;
      g[i] = moved - d[i];
      d[i] = moved;
    }
    for (int k = j + 1; k < rows; ++k) {  // A is symmetric: column j of its rows is a
      if (a[k] != 0) add_scaled(misfit + k * dim, g, -a[k], dim);
    }
  }
}

}  // namespace
}  // namespace lexico::kernels::cpu

#define LEXICO_SPARSE_LEVEL(name) \
  { name, residual_rows, gradient_rows, adam_rows, co_occurrence_rows, misfit_rows, descend_rows }
