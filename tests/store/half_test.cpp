#include "store/half.h"

#include <gtest/gtest.h>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "core/half.h"

namespace lexico::store {
namespace {

using detail::float_from_half;

std::vector<float> to_float_all(const std::vector<std::uint16_t>& bits) {
  std::vector<float> values(bits.size());
  to_float(bits.data(), bits.size(), values.data());
  return values;
}

TEST(Half, EveryHalfSurvivesFloatAndBack) {
  std::vector<std::uint16_t> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  const std::vector<float> values = to_float_all(all);
  std::vector<std::uint16_t> back(all.size());
  EXPECT_FALSE(to_half(values.data(), values.size(), back.data()));
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (std::isnan(values[i])) {
      EXPECT_TRUE(std::isnan(float_from_half(back[i])));
      continue;
    }
    ASSERT_EQ(back[i], all[i]);
    ASSERT_EQ(to_half(values[i]), all[i]);
    ASSERT_EQ(std::bit_cast<std::uint32_t>(float_from_half(all[i])),
              std::bit_cast<std::uint32_t>(values[i]));
  }
}

TEST(Half, RoundsToNearestEvenAsTheDoubleBetweenTwoHalvesSays) {
  for (std::uint16_t low = 0; low < 0x7bff; ++low) {
    const double a = float_from_half(low), b = float_from_half(static_cast<std::uint16_t>(low + 1));
    const auto middle = static_cast<float>((a + b) / 2);  // exact: one more bit than a half has
    const std::uint16_t even = low % 2 == 0 ? low : static_cast<std::uint16_t>(low + 1);
    const float below = std::nextafter(middle, 0.0f), above = std::nextafter(middle, 1e9f);
    for (auto [value, want] :
         {std::pair{middle, even}, {below, low}, {above, static_cast<std::uint16_t>(low + 1)}}) {
      std::uint16_t wide[9];
      const float nine[9] = {value, value, value, value, value, value, value, value, value};
      EXPECT_TRUE(to_half(nine, 9, wide));
      ASSERT_EQ(wide[0], want) << value;
      ASSERT_EQ(wide[8], want) << value;  // the tail is converted by other code
      ASSERT_EQ(to_half(-value), want | 0x8000) << value;
    }
  }
}

TEST(Half, TellsWhatCannotBeStored) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (float bad : {65520.0f, -65520.0f, 1e30f, infinity, -infinity, std::nanf("")})
    for (std::size_t at = 0; at < 20; ++at) {
      std::vector<float> values(20, 1.0f);
      values[at] = bad;
      std::vector<std::uint16_t> bits(20);
      EXPECT_FALSE(to_half(values.data(), values.size(), bits.data())) << bad << " at " << at;
    }
  const std::vector<float> most(20, 65519.996f);
  std::vector<std::uint16_t> bits(20);
  EXPECT_TRUE(to_half(most.data(), most.size(), bits.data()));
  EXPECT_EQ(float_from_half(bits[0]), 65504.0f);
}

}  // namespace
}  // namespace lexico::store
