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

/// One bit for each lane below zero.
inline unsigned mask_negative(VecInt v) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)v);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)v));
#elif defined(__SSE2__)
  return static_cast<unsigned>(_mm_movemask_ps((__m128)v));
#else
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= v[i] < 0 ? 1u << i : 0u;
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

/// The sums of four vectors; each is added up in the same order whatever the other three are.
inline void sum4(Vec a, Vec b, Vec c, Vec d, float* to) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b),
                                  _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d),
                                  _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 lanes =
      _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves =
      _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#elif defined(__AVX2__)
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b),
                                  _mm256_unpackhi_ps((__m256)a, (__m256)b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d),
                                  _mm256_unpackhi_ps((__m256)c, (__m256)d));
  const __m256 lanes =
      _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
#else
  to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
#endif
}

/// v[0], v[stride], ... v[(count - 1) * stride], then zeros.
inline Vec load_strided(const float* v, int stride, int count) {
#if defined(__AVX512F__)
  const __m512i index =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(stride));
  const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
  return (Vec)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, index, v, 4);
#else
  Vec values{};
  for (int i = 0; i < count; ++i) values[i] = v[i * stride];
  return values;
#endif
}

inline VecInt load_int(const std::int32_t* from) {
  VecInt v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline void store_int(std::int32_t* to, VecInt v) { __builtin_memcpy(to, &v, sizeof v); }

/// v[index[0]], v[index[1]], ...
inline Vec load_at(const float* v, VecInt index) {
#if defined(__AVX512F__)
  return (Vec)_mm512_i32gather_ps((__m512i)index, v, 4);
#else
  Vec values;
  for (int i = 0; i < kLanes; ++i) values[i] = v[index[i]];
  return values;
#endif
}

inline VecInt load_int_at(const std::int32_t* v, VecInt index) {
#if defined(__AVX512F__)
  return (VecInt)_mm512_i32gather_epi32((__m512i)index, v, 4);
#else
  VecInt values;
  for (int i = 0; i < kLanes; ++i) values[i] = v[index[i]];
  return values;
#endif
}

/// Writes the lanes of the mask one after another, and other values after them, a vector in all.
/// @returns how many are in the mask.
#if defined(__AVX512F__)
inline int pack_lanes(std::int32_t* to, unsigned mask, VecInt v) {
  store_int(to, (VecInt)_mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), (__m512i)v));
  return __builtin_popcount(mask);
}
inline int pack_lanes(float* to, unsigned mask, Vec v) {
  store(to, (Vec)_mm512_maskz_compress_ps(static_cast<__mmask16>(mask), (__m512)v));
  return __builtin_popcount(mask);
}
#else
template <typename Number, typename Lanes>
int pack_lanes(Number* to, unsigned mask, Lanes v) {
  int count = 0;
  for (; mask != 0; mask &= mask - 1) to[count++] = v[__builtin_ctz(mask)];
  return count;
}
#endif

/// 0, 1, 2, ...
inline VecInt lane_numbers() {
  VecInt v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

/// Lists those of v[0..count) of magnitude >= least whose bit in `without` is not set; count is a
/// multiple of 64, at most kMostListed. Reads `without` in pieces of 256 bits. Writes up to a
/// vector beyond those listed.
constexpr int kMostListed = 8192;
inline int list_reaching(
    const float* v, int count, float least, const std::uint64_t* without, std::int32_t* indices) {
  int listed = 0;
#if defined(__AVX512BW__)
  // First the vectors that have any, then the lanes of those: few branches, which would be foreseen
  // wrong.
  std::uint16_t masks[kMostListed / 16 + 16];
  std::int32_t vectors[kMostListed / 16 + 16];
#pragma GCC unroll 4
  for (unsigned i = 0; i < static_cast<unsigned>(count); i += 16) {
    masks[i / 16] = static_cast<std::uint16_t>(
        _mm512_cmp_ps_mask((__m512)abs(load(v + i)), (__m512)splat(least), _CMP_GE_OQ));
  }
  const VecInt lanes = lane_numbers();
  int with_any = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(masks + count / 16), __m256i{});
  for (int first = 0; first < count / 16; first += 16) {
    const auto read = [](const void* from) {
      return _mm256_loadu_si256(static_cast<const __m256i*>(from));
    };
    const __m256i left = _mm256_andnot_si256(read(without + first / 4), read(masks + first));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(masks + first), left);
    with_any += pack_lanes(vectors + with_any, _mm256_test_epi16_mask(left, left), lanes + first);
  }
  for (int i = 0; i < with_any; ++i) {
    listed += pack_lanes(indices + listed, masks[vectors[i]], lanes + vectors[i] * 16);
  }
#else
  for (int first = 0; first < count; first += 64) {
    std::uint64_t mask = 0;
#pragma GCC unroll 16
    for (int i = 0; i < 64; i += kLanes)
      mask |= static_cast<std::uint64_t>(mask_ge(abs(load(v + first + i)), splat(least))) << i;
    mask &= ~without[first / 64];
    // Seldom are there more than three, so these are written whether they are there or not: a
    // branch on their number would be foreseen wrong.
    constexpr int kBlind = 3;
    const int found = __builtin_popcountll(mask);
    std::int32_t* const to = indices + listed;
    const auto list = [&](int place) {
      to[place] = first + __builtin_ctzll(mask | std::uint64_t{1} << 63);
      mask &= mask - 1;
    };
#pragma GCC unroll 3
    for (int i = 0; i < kBlind; ++i) list(i);
    for (int i = kBlind; i < found; ++i) list(i);
    listed += found;
  }
#endif
  return listed;
}

/// One more in each lane with a > b.
inline VecInt count_if_larger(VecInt count, Vec a, Vec b) {
#if defined(__AVX512F__)
  const __mmask16 larger = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
  return (VecInt)_mm512_mask_add_epi32(
      (__m512i)count, larger, (__m512i)count, _mm512_set1_epi32(1));
#else
  return count - (a > b);
#endif
}

/// The value of rank `wanted` among `count` values, no fewer than that, followed by a vector of
/// negative ones.
inline float value_of_rank(const float* values, int count, int wanted) {
  const Vec none = splat(-3e38f);
  Vec most = none;  // of the values of lower rank, negated
  for (int first = 0; first < count; first += 2 * kLanes) {
    const Vec v = load(values + first),
              w = first + kLanes < count ? load(values + first + kLanes) : none;
    VecInt larger{}, larger_than_w{};
    for (int i = 0; i < count; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec value = splat(values[i + j]);
        larger = count_if_larger(larger, value, v);
        larger_than_w = count_if_larger(larger_than_w, value, w);
      }
    }
    most = max(most, larger < wanted ? -v : none);
    most = max(most, larger_than_w < wanted ? -w : none);
  }
  return -largest(most);
}

#if defined(__AVX512F__)
/// A value that 16 of 64 values reach, but hardly less than the largest such: of both halves of the
/// 64 the one of rank 8, by a sorting network on ever fewer lanes.
inline float value_reached_by_16(const float* values) {
  struct Sort {
    void operator()(__m512& a, __m512& b) const {
      const __m512 top = _mm512_max_ps(a, b);
      b = _mm512_min_ps(a, b), a = top;
    }
    void operator()(__m256& a, __m256& b) const {
      const __m256 top = _mm256_max_ps(a, b);
      b = _mm256_min_ps(a, b), a = top;
    }
    void operator()(__m128& a, __m128& b) const {
      const __m128 top = _mm_max_ps(a, b);
      b = _mm_min_ps(a, b), a = top;
    }
  };
  const Sort sort;
  // Orders n vectors whose lanes rise and fall.
  const auto merge = [&](auto* v, int n) {
    for (int step = n / 2; step > 0; step /= 2) {
      for (int i = 0; i < n; ++i) {
        if ((i & step) == 0) sort(v[i], v[i + step]);
      }
    }
  };
  __m512 v[4];
  for (int i = 0; i < 4; ++i) v[i] = (__m512)load(values + i * 16);
  sort(v[0], v[1]);
  sort(v[2], v[3]);
  sort(v[0], v[2]);
  sort(v[1], v[3]);
  sort(v[1], v[2]);
  __m256 eight[8];
  for (int i = 0; i < 4; ++i) {
    eight[i] = _mm512_castps512_ps256(v[i]);
    eight[7 - i] = _mm512_extractf32x8_ps(v[i], 1);
  }
  merge(eight, 8);
  __m128 best[8];
  for (int i = 0; i < 8; ++i)
    best[i] = _mm_max_ps(_mm256_castps256_ps128(eight[i]), _mm256_extractf128_ps(eight[7 - i], 1));
  merge(best, 8);
  __m128 last = _mm_max_ps(best[0], _mm_movehl_ps(best[7], best[7]));
  for (int i = 1; i < 8; ++i)
    last = _mm_min_ps(last, _mm_max_ps(best[i], _mm_movehl_ps(best[7 - i], best[7 - i])));
  return _mm_cvtss_f32(_mm_min_ps(last, _mm_movehdup_ps(last)));
}
#endif

/// The larger magnitude of each lane.
inline Vec max_magnitude(Vec so_far, Vec v) {
#if defined(__AVX512DQ__)
  return (Vec)_mm512_range_ps((__m512)so_far, (__m512)v, 0x0b);
#else
  return max(so_far, abs(v));
#endif
}

}  // namespace
}  // namespace lexico::kernels::cpu
