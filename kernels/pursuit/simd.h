#pragma once
// A vector of floats as wide as the translation unit's target has, on GCC/Clang vector extensions:
// one source for every level. Only internal linkage here (see level.h), so everything is in an
// unnamed namespace.
#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lexico::kernels::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t VecInt __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
inline void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }
inline Vec splat(float x) { return x - Vec{}; }
inline Vec abs(Vec v) { return (Vec)((VecInt)v & 0x7fffffff); }

inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

/// One bit for each lane with a >= b.
inline unsigned mask_ge(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)));
#elif defined(__SSE2__)
  return static_cast<unsigned>(_mm_movemask_ps(_mm_cmpge_ps((__m128)a, (__m128)b)));
#else
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= a[i] >= b[i] ? 1u << i : 0u;
  return mask;
#endif
}

/// 1 / v to a relative 4e-4 or better (v > 0, normal).
inline Vec rough_reciprocal(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_rcp14_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_rcp_ps((__m256)v);
#elif defined(__SSE2__)
  return (Vec)_mm_rcp_ps((__m128)v);
#else
  return 1.0f / v;
#endif
}

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s[kLanes];
  __builtin_memcpy(s, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  }
  return s[0];
#endif
}

inline float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float s[kLanes];
  __builtin_memcpy(s, &v, sizeof v);
  float best = s[0];
  for (int i = 1; i < kLanes; ++i) best = s[i] > best ? s[i] : best;
  return best;
#endif
}

}  // namespace
}  // namespace lexico::kernels::cpu
