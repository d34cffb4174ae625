#pragma once

#include <bit>
#include <cstdint>

namespace lexico::detail {

/// IEEE half bits to float, exact; written without branches so that loops over it vectorize.
inline float float_from_half(std::uint16_t half) {
  const std::uint32_t bits = (half & 0x7fffu) << 13;
  const float magnitude =
      std::bit_cast<float>(bits) * 0x1p112f;  // moves the exponent; subnormals come out right
  const std::uint32_t special =
      (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // Inf and NaN keep theirs
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | special |
                              ((half & 0x8000u) << 16));
}

/// Float to IEEE half bits, rounded to nearest even; beyond 65520 is Inf, NaN stays NaN.
inline std::uint16_t half_from_float(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // below 2^-14: multiples of 2^-24, the spacing of floats at 0.5
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded >> 13) - ((127u - 15u) << 10)));
}

}  // namespace lexico::detail
