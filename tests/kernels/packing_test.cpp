// The contract of kernels/packing/packing.h.
#include "kernels/packing/packing.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace lexico::kernels {
namespace {

// E4M3 by its definition.
double value_of(int code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

std::uint8_t code_of(float value) {
  std::uint8_t code = 0;
  cpu::e4m3_from_floats(&value, 1, &code);
  return code;
}

// The nearest of all codes; between two, the one with an even mantissa.
int nearest_code(double value) {
  int best = 0;
  double least = INFINITY;
  for (int code = 0; code < 0x7f; ++code) {
    const double off = std::fabs(std::fabs(value) - value_of(code));
    if (off < least || (off == least && code % 2 == 0)) {
      least = off;
      best = code;
    }
  }
  return best | (std::signbit(value) ? 0x80 : 0);
}

TEST(E4m3, AllCodesDecodeByDefinitionAndComeBack) {
  for (int code = 0; code < 256; ++code) {
    const auto byte = static_cast<std::uint8_t>(code);
    float value = 0;
    cpu::floats_from_e4m3(&byte, 1, &value);
    if ((code & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(value));
      continue;
    }
    EXPECT_EQ(static_cast<double>(value), value_of(code)) << code;
    EXPECT_EQ(std::signbit(value), code >= 0x80);
    EXPECT_EQ(code_of(value), code);
  }
}

TEST(E4m3, EveryFloat16IsRoundedToTheNearestEvenAndSaturates) {
  for (int half = 0; half < 1 << 16; ++half) {
    const int exponent = (half >> 10) & 31, mantissa = half & 1023;
    if (exponent == 31) continue;
    double value =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (half >= 1 << 15) value = -value;
    ASSERT_EQ(code_of(static_cast<float>(value)), nearest_code(value)) << value;
  }
}

TEST(E4m3, FloatsBesideEveryTieAreRoundedAway) {
  for (int code = 0; code < 0x7e; ++code) {
    const auto tie = static_cast<float>(0.5 * (value_of(code) + value_of(code + 1)));
    EXPECT_EQ(code_of(tie), code % 2 == 0 ? code : code + 1);
    EXPECT_EQ(code_of(std::nextafter(tie, 0.0f)), code);
    EXPECT_EQ(code_of(std::nextafter(tie, 500.0f)), code + 1);
    EXPECT_EQ(code_of(-tie), code_of(tie) | 0x80);
  }
}

TEST(E4m3, NothingBecomesNan) {
  EXPECT_EQ(code_of(std::numeric_limits<float>::infinity()), 0x7e);
  EXPECT_EQ(code_of(-1e30f), 0xfe);
  EXPECT_EQ(code_of(448.0f), 0x7e);
  EXPECT_EQ(code_of(464.0f), 0x7e);
  EXPECT_EQ(code_of(std::numeric_limits<float>::quiet_NaN()), 0);
  EXPECT_EQ(code_of(std::numeric_limits<float>::denorm_min()), 0);
}

TEST(Packing, EveryWidthComesBackAndLeavesItsNeighboursAlone) {
  std::mt19937 random(1);
  for (int width = 0; width <= RecordLayout::kMaxWidth; ++width)
    for (int num_fields : {0, 1, 2, 3, 7, 8, 9, 16, 33, 70, 1100})
      for (std::int64_t rows : {0, 1, 2, 5, 40}) {
        const std::vector<std::uint8_t> widths(static_cast<std::size_t>(num_fields),
                                               static_cast<std::uint8_t>(width));
        RecordLayout layout;
        layout.num_fields = num_fields;
        layout.record_bytes = (num_fields * width + 7) / 8;
        layout.widths = widths.data();
        const auto count = static_cast<std::size_t>(num_fields * rows);
        std::vector<std::uint32_t> fields(count), back(count, 77);
        for (auto& f : fields) f = static_cast<std::uint32_t>(random()) & ((1u << width) - 1);
        // Exactly as large as the records: a sanitizer sees any byte beyond.
        std::vector<std::uint8_t> records(static_cast<std::size_t>(layout.record_bytes * rows),
                                          0xff);
        ASSERT_TRUE(cpu::pack_fields(layout, fields.data(), rows, records.data()).ok());
        ASSERT_TRUE(cpu::unpack_fields(layout, records.data(), rows, back.data()).ok());
        ASSERT_EQ(fields, back) << width << " bits, " << num_fields << " fields, " << rows
                                << " rows";
      }
}

TEST(Packing, MixedWidthsLieWhereTheHeaderSays) {
  std::mt19937 random(2);
  const std::vector<std::uint8_t> widths = {8, 10, 10, 0, 3, 24, 1, 5, 7, 23, 2};
  RecordLayout layout;
  layout.num_fields = static_cast<int>(widths.size());
  layout.record_bytes = 14;  // 93 bits and some to spare
  layout.widths = widths.data();
  std::vector<std::uint32_t> fields(widths.size() * 9);
  for (auto& f : fields) f = static_cast<std::uint32_t>(random());  // high bits are dropped
  std::vector<std::uint8_t> records(14 * 9, 0xff);
  ASSERT_TRUE(cpu::pack_fields(layout, fields.data(), 9, records.data()).ok());
  for (std::size_t row = 0; row < 9; ++row) {
    std::size_t bit = 0;
    for (std::size_t f = 0; f < widths.size(); ++f)
      for (int b = 0; b < widths[f]; ++b, ++bit)
        ASSERT_EQ(records[row * 14 + bit / 8] >> (bit % 8) & 1,
                  fields[row * widths.size() + f] >> b & 1);
    for (; bit < 14 * 8; ++bit) ASSERT_EQ(records[row * 14 + bit / 8] >> (bit % 8) & 1, 0);
  }
}

TEST(Packing, AStepOfTwoLeavesEveryOtherRowAsItIs) {
  const std::vector<std::uint8_t> widths = {12, 4};
  RecordLayout layout{2, 2, widths.data(), 2};
  const std::vector<std::uint32_t> fields = {1, 2, 9, 9, 3, 4};
  std::vector<std::uint8_t> records(6, 0xaa);
  ASSERT_TRUE(cpu::pack_fields(layout, fields.data(), 2, records.data()).ok());
  EXPECT_EQ(records[2], 0xaa);
  EXPECT_EQ(records[3], 0xaa);
  std::vector<std::uint32_t> back(6, 5);
  ASSERT_TRUE(cpu::unpack_fields(layout, records.data(), 2, back.data()).ok());
  EXPECT_EQ(back, (std::vector<std::uint32_t>{1, 2, 5, 5, 3, 4}));
}

TEST(Packing, WidthsAndRecordsOutOfBoundsAreRefused) {
  std::vector<std::uint8_t> widths = {25};
  std::uint32_t field = 0;
  std::uint8_t record[8] = {};
  EXPECT_FALSE(cpu::pack_fields({1, 8, widths.data()}, &field, 1, record).ok());
  EXPECT_FALSE(cpu::unpack_fields({1, 8, widths.data()}, record, 1, &field).ok());
  widths = {9};
  EXPECT_FALSE(cpu::pack_fields({1, 1, widths.data()}, &field, 1, record).ok());
  EXPECT_FALSE(cpu::unpack_fields({1, 1, widths.data()}, record, 1, &field).ok());
}

}  // namespace
}  // namespace lexico::kernels
