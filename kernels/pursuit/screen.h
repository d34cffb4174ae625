#pragma once
// What the screens share: a screen knows the correlations of all atoms to within a known error, at
// whatever precision is fast; the pick is settled on fp32 atoms (pursuit_simd.h). Three of
// them, with the same functions: screen_fp32.h for any CPU, screen_vnni.h for those with int16 dot
// products, screen_amx.h for those with tiles.
#include "kernels/pursuit/level.h"
#include "kernels/pursuit/simd.h"

namespace lexico::kernels::cpu {
namespace {

constexpr float kUlp = 5.9604645e-8f;  // 2^-24: relative rounding error of one fp32 operation
// |P_perp d|^2 / |d|^2 an atom must keep to be taken: its weight would be noise otherwise (1e-5:
// 0.2 degrees off the span).
constexpr float kIndependent = 1e-5f;
// Screens keep the best value of each group of atoms: one lane of a chunk of this many vectors.
constexpr int kChunkVectors = 16;
constexpr int kChunkAtoms = kChunkVectors * kLanes;
constexpr int kChunkBits = kLanes == 16 ? 8 : kLanes == 8 ? 7 : 6;
static_assert(1 << kChunkBits == kChunkAtoms);

inline std::size_t size(int count) { return static_cast<std::size_t>(count); }
inline float magnitude(float x) { return __builtin_fabsf(x); }
inline int num_chunks(const PursuitShape& shape) {
  return (shape.padded_atoms + kChunkAtoms - 1) / kChunkAtoms;
}

inline float dot(const float* a, const float* b, int n) {
  Vec s0{}, s1{};
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + kLanes) * load(b + i + kLanes);
  }
  for (; i < n; i += kLanes) s0 += load(a + i) * load(b + i);
  return sum(s0 + s1);
}

// Upper bounds of (d.r)^2 / |P_perp d|^2, to a relative 4e-4; 0 for atoms in the span.
inline Vec vector_bound(Vec p, Vec n, float error_p, float error_n) {
  const Vec wide = abs(p) + error_p, least = splat(0.5f * kIndependent);
  const Vec value = wide * wide * rough_reciprocal(max(n - error_n, least));
  return n + error_n < kIndependent ? Vec{} : value;
}

// For correlations that are made anew for every pick, so that what is wrong with them does not add
// up: a screen that has these may leave a part of them out.
struct FreshCorrelations {
  float* const* best;  // out: of each signal, the largest |p| of each group
  float* left_out;     // out: of each signal, what it leaves out of any p at most
};

// One update of a signal's correlations from a Gram row: q = D u_k = (G_j - sum_i R_ik q_i) / nu,
// then p -= a q, and n -= q^2 for OLS.
struct GramStep {
  const void* gram_row;  // of the atom just taken
  void* rows;            // q of the atoms so far; the new one is added if it is to be kept
  int k;                 // how many there are
  const float* column;   // R_0k .. R_k-1,k
  float inverse_nu, amplitude;
  float* correlations;  // p [padded_atoms]
  float* spread;        // n [padded_atoms]
  float error_p, error_n;
  float* group_best;  // out: of |p|, or of the OLS bound
};

}  // namespace
}  // namespace lexico::kernels::cpu
