#include "half.h"

#include <bit>
#include <cmath>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/half.h"

namespace lexico::store {

std::uint16_t to_half(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                        // subnormal: units of 2^-24
    const float units = std::bit_cast<float>(magnitude) * 16777216.0f;
    return sign | static_cast<std::uint16_t>(std::lrintf(units));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return sign | static_cast<std::uint16_t>((rounded - 0x38000000u) >> 13);
}

namespace {

bool to_half_plain(const float* from, std::size_t count, std::uint16_t* to) {
  bool finite = true;
  for (std::size_t i = 0; i < count; ++i) {
    to[i] = to_half(from[i]);
    finite &= (to[i] & 0x7c00u) != 0x7c00u;
  }
  return finite;
}

void to_float_plain(const std::uint16_t* from, std::size_t count, float* to) {
  for (std::size_t i = 0; i < count; ++i) to[i] = detail::float_from_half(from[i]);
}

#if defined(__x86_64__)
// The instructions are asked for at run time: the library is built for any x86-64.
bool has_f16c() {
  static const bool has =
      __builtin_cpu_supports("avx2");  // those have F16C, which Clang cannot ask for
  return has;
}

__attribute__((target("avx2,f16c"))) bool to_half_f16c(const float* from,
                                                       std::size_t count,
                                                       std::uint16_t* to) {
  const __m128i exponent = _mm_set1_epi16(0x7c00);
  __m128i bad = _mm_setzero_si128();
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half =
        _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    bad = _mm_or_si128(bad, _mm_cmpeq_epi16(_mm_and_si128(half, exponent), exponent));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  const bool tail_finite = to_half_plain(from + i, count - i, to + i);
  return _mm_testz_si128(bad, bad) != 0 && tail_finite;
}

__attribute__((target("avx2,f16c"))) void to_float_f16c(const std::uint16_t* from,
                                                        std::size_t count,
                                                        float* to) {
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  to_float_plain(from + i, count - i, to + i);
}
#endif

}  // namespace

bool to_half(const float* from, std::size_t count, std::uint16_t* to) {
#if defined(__x86_64__)
  if (has_f16c()) return to_half_f16c(from, count, to);
#endif
  return to_half_plain(from, count, to);
}

void to_float(const std::uint16_t* from, std::size_t count, float* to) {
#if defined(__x86_64__)
  if (has_f16c()) return to_float_f16c(from, count, to);
#endif
  to_float_plain(from, count, to);
}

}  // namespace lexico::store
