#pragma once
// What every path of the CUDA pursuit does alike with one signal: scale it, stop, score, write.
#include "kernels/common/warp.cuh"
#include "kernels/pursuit/pursuit_device.h"

namespace lexico::kernels::cuda {

// A signal is scaled by a power of two, so that its largest element is in [1, 2).
struct Scale {
  int exponent;  // of the signal
  bool finite, zero;
};

// `top`: the largest |x| of the signal, as bits.
__device__ inline Scale scale_of(unsigned top) {
  Scale s{0, top < 0x7f800000u, top == 0};
  if (s.finite && !s.zero) s.exponent = ilogbf(__uint_as_float(top));
  return s;
}

// In two steps: the factor may be no float.
__device__ inline float scaled(float x, int exponent) {
  const int half = exponent / 2;
  return ldexpf(ldexpf(x, -half), half - exponent);
}

__device__ inline float unscaled(float x, int exponent) {
  constexpr float kMax = 3.402823466e38f;
  return fminf(fmaxf(ldexpf(x, exponent), -kMax), kMax);
}

__device__ inline bool wants_more(
    int count, int limit, float residual_norm, float norm, float relative_tolerance) {
  return count < limit && residual_norm > relative_tolerance * norm &&
         residual_norm > kResidualFloor * norm;
}

// (d.r)^2 / |P_perp d|^2; 0 for atoms in the span.
__device__ inline float ols_score(float p, float n, float norm2) {
  return n > kIndependent * norm2 && n > 0 ? p * p / n : 0.0f;
}

// Larger keys are better scores (>= 0), and of equal ones lower atoms.
__device__ inline unsigned long long key_of(float score, int atom) {
  return static_cast<unsigned long long>(__float_as_uint(score)) << 32 |
         (0xffffffffu - static_cast<unsigned>(atom));
}
__device__ inline float score_of(unsigned long long key) {
  return __uint_as_float(static_cast<unsigned>(key >> 32));
}
__device__ inline int atom_of(unsigned long long key) {
  return static_cast<int>(0xffffffffu - static_cast<unsigned>(key));
}
__device__ inline unsigned long long warp_best(unsigned long long key) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const unsigned long long other = __shfl_xor_sync(kWholeWarp, key, step);
    key = other > key ? other : key;
  }
  return key;
}

// Writes -1, 0 (or NaN for the curve) into the slots from `count` on. By a warp.
__device__ inline void clear_slots(const PursuitProblem& p, std::int64_t signal, int count) {
  for (int k = count + lane_id(); k < p.max_atoms; k += kWarpSize) {
    p.indices[signal * p.max_atoms + k] = -1;
    p.weights[signal * p.max_atoms + k] = 0;
  }
}
// The curve from pick `from` on.
__device__ inline void write_curve(const PursuitProblem& p,
                                   std::int64_t signal,
                                   int from,
                                   float value) {
  if (p.curve == nullptr) return;
  for (int k = from + lane_id(); k < p.max_atoms; k += kWarpSize)
    p.curve[signal * p.max_atoms + k] = value;
}

}  // namespace lexico::kernels::cuda
