// E4M3 by integer arithmetic on float bits, without branches so that the loops vectorize.
#include <bit>

#include "kernels/packing/packing.h"

namespace lexico::kernels::cpu {
namespace {

constexpr std::uint32_t kMagnitude = 0x7fffffffu;
constexpr std::uint32_t kNanCode = 0x7fu;

std::uint8_t e4m3_from_float(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & kMagnitude;
  // Normal: round the 23-bit mantissa to 3 bits, ties to even, and move the exponent's bias.
  const std::uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  const std::uint32_t normal = (rounded >> 20) - ((127u - 7u) << 3);
  // Below 2^-6 codes are multiples of 2^-9, the spacing of floats at 2^14: the addition rounds.
  const float shifted = std::bit_cast<float>(magnitude) + 0x1p14f;
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(0x1p14f);
  std::uint32_t code = magnitude < std::bit_cast<std::uint32_t>(0x1p-6f) ? subnormal : normal;
  code = magnitude >= std::bit_cast<std::uint32_t>(448.0f) ? 0x7eu : code;
  code |= (bits >> 24) & 0x80u;
  return static_cast<std::uint8_t>(magnitude > 0x7f800000u ? 0u : code);
}

float float_from_e4m3(std::uint8_t code) {
  const std::uint32_t magnitude = code & 0x7fu;
  // As float bits the exponent is 120 too small, which the multiplication mends, subnormals
  // included.
  const float value = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80u) << 24;
  const std::uint32_t nan = magnitude == kNanCode ? 0x7fc00000u : 0u;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) | sign | nan);
}

}  // namespace

void e4m3_from_floats(const float* values, std::int64_t count, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < count; ++i) codes[i] = e4m3_from_float(values[i]);
}

void floats_from_e4m3(const std::uint8_t* codes, std::int64_t count, float* values) {
  for (std::int64_t i = 0; i < count; ++i) values[i] = float_from_e4m3(codes[i]);
}

}  // namespace lexico::kernels::cpu
