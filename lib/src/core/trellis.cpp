// Trellis-coded quantization.
#include "core/trellis.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>

namespace lexico::detail {
namespace {

// Parity-check polynomials h0 and h1 of Ungerboeck's codes for amplitude modulation: with one input
// u, c1 = h0 u and c0 = h1 u fulfil h1 c1 + h0 c0 = 0.
struct Code {
  int states;
  std::uint32_t high, low;
};
constexpr Code kCodes[] = {{4, 05, 02},
                           {8, 013, 04},
                           {16, 023, 04},
                           {32, 045, 010},
                           {64, 0103, 024},
                           {128, 0235, 0126},
                           {256, 0515, 0362}};

}  // namespace

bool Trellis::has(int states) {
  return std::any_of(
      std::begin(kCodes), std::end(kCodes), [&](const Code& c) { return c.states == states; });
}

Trellis::Trellis(int states)
    : states_(states), register_mask_(static_cast<std::uint32_t>(2 * states - 1)) {
  for (const Code& code : kCodes)
    if (code.states == states) {
      high_mask_ = code.high;
      low_mask_ = code.low;
    }
  // A new state holds the newest log2(states) bits; what falls out tells its predecessors apart.
  for (int state = 0; state < states; ++state)
    for (int oldest = 0; oldest < 2; ++oldest)
      quarter_of_[oldest][static_cast<std::size_t>(state)] =
          static_cast<std::uint8_t>(quarter(static_cast<std::uint32_t>(state + oldest * states)));
}

void Trellis::encode(const std::vector<Number>& numbers,
                     std::uint32_t* codes,
                     Scratch& scratch) const {
  const auto states = static_cast<std::size_t>(states_);
  scratch.from.resize(numbers.size() * states);
  scratch.level.resize(numbers.size());
  std::array<float, 256> costs, next;
  costs.fill(INFINITY);
  costs[0] = 0;
  for (std::size_t t = 0; t < numbers.size(); ++t) {
    const Number& number = numbers[t];
    const int num_levels = 2 << number.bits;
    const auto at = static_cast<int>(
        std::lower_bound(number.levels, number.levels + num_levels, number.value) - number.levels);
    float error[4];
    for (int q = 0; q < 4; ++q) {  // of the quarter's levels, the one below and the one above
      int below = at - 1 - ((at - 1 - q) & 3), above = below + 4;
      if (below < 0) below = above;
      if (above >= num_levels) above = below;
      const float b = number.value - number.levels[below], a = number.levels[above] - number.value;
      const bool up = a * a < b * b;
      scratch.level[t][static_cast<std::size_t>(q)] = static_cast<std::int16_t>(up ? above : below);
      error[q] = up ? a * a : b * b;
    }
    std::uint8_t* const from = scratch.from.data() + t * states;
    for (std::size_t state = 0; state < states; ++state) {
      const std::size_t young = state >> 1, old = young + states / 2;
      const float a = costs[young] + error[quarter_of_[0][state]];
      const float b = costs[old] + error[quarter_of_[1][state]];
      from[state] = b < a;
      next[state] = std::min(a, b);
    }
    std::copy_n(next.begin(), states, costs.begin());
  }
  auto state = static_cast<std::size_t>(std::min_element(costs.begin(), costs.begin() + states_) -
                                        costs.begin());
  for (std::size_t t = numbers.size(); t-- > 0;) {
    const std::size_t oldest = scratch.from[t * states + state];
    const auto level = static_cast<std::uint32_t>(scratch.level[t][quarter_of_[oldest][state]]);
    codes[t] = (level >> 2) << 1 | static_cast<std::uint32_t>(state & 1);
    state = (state >> 1) + oldest * (states / 2);
  }
}

}  // namespace lexico::detail
