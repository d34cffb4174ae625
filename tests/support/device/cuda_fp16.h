#pragma once
// Stands in for CUDA's fp16 header: conversions, rounded to nearest even, and pairs.
#include <bit>
#include <cstdint>

#include "cuda_runtime.h"

namespace emulated {

inline float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16, body = h & 0x7fff;
  if (body >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (body & 0x3ff) << 13);
  // As a float of which only the exponent is off by 112: that mends subnormals, too.
  return std::bit_cast<float>(
      sign | std::bit_cast<std::uint32_t>(std::bit_cast<float>(body << 13) * 0x1p112f));
}

inline std::uint16_t float_to_half(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x), body = bits & 0x7fffffff;
  const std::uint32_t sign = bits >> 16 & 0x8000;
  if (body > 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7fff);
  if (body >= 0x477ff000) return static_cast<std::uint16_t>(sign | 0x7c00);  // 65520 and more
  if (body < 0x38800000) {  // subnormal: the sum rounds it to a multiple of 2^-24
    const float sum = std::bit_cast<float>(body) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(sum) - 0x3f000000));
  }
  const std::uint32_t rounded = body + 0xfff + (body >> 13 & 1);
  return static_cast<std::uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

}  // namespace emulated

struct __half {
  std::uint16_t bits;
  __half() = default;
  __half(float x) : bits(emulated::float_to_half(x)) {}
  operator float() const { return emulated::half_to_float(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __float2half(float x) { return {x}; }
inline __half __float2half_rn(float x) { return {x}; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline float __low2float(__half2 h) { return h.x; }
inline float __high2float(__half2 h) { return h.y; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half h;
  h.bits = bits;
  return h;
}
