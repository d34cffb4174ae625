#pragma once
#include <cstddef>
#include <cstdint>

namespace lexico::detail {

/// How many elements an array of these lengths has. Lengths are not negative.
inline std::size_t size_of(std::int64_t a, std::int64_t b = 1, std::int64_t c = 1) {
  return static_cast<std::size_t>(a * b * c);
}

}  // namespace lexico::detail
