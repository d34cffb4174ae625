#pragma once

#include <cstddef>
#include <cstdint>

// IEEE half precision, rounded to nearest even, with the CPU's own instructions where it has them.
namespace lexico::store {

/// @returns whether every result is finite.
bool to_half(const float* from, std::size_t count, std::uint16_t* to);
void to_float(const std::uint16_t* from, std::size_t count, float* to);

/// The first in portable code, which the fast one must agree with; core/half.h has the second.
std::uint16_t to_half(float value);

}  // namespace lexico::store
