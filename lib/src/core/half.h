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

}  // namespace lexico::detail
