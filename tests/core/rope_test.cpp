#include <gtest/gtest.h>
#include <cmath>
#include <random>
#include <vector>

#include "lexico/error.h"
#include "lexico/rope.h"

namespace lexico {
namespace {

constexpr int kDim = 12;

/// RoPE as transformers applies it, in double: pairs (a, b) become (a cos - b sin, b cos + a sin).
void rotate(const Rope& rope,
            const std::vector<double>& frequencies,
            float* vector,
            std::int32_t position) {
  const bool interleaved = rope.layout == "interleaved";
  const std::size_t pairs = frequencies.size();
  for (std::size_t i = 0; i < pairs; ++i) {
    float& a = vector[interleaved ? 2 * i : i];
    float& b = vector[interleaved ? 2 * i + 1 : i + pairs];
    const double c = std::cos(position * frequencies[i]) * rope.attention_scaling;
    const double s = std::sin(position * frequencies[i]) * rope.attention_scaling;
    const double x = a, y = b;
    a = static_cast<float>(x * c - y * s);
    b = static_cast<float>(y * c + x * s);
  }
}

Rope rotary(const char* layout, int rotary_dim, double scaling) {
  Rope rope;
  rope.kind = "default";
  rope.layout = layout;
  rope.rotary_dim = rotary_dim;
  rope.attention_scaling = scaling;
  for (int i = 0; i < rotary_dim / 2; ++i)
    rope.inverse_frequencies.push_back(std::pow(10.0, -0.5 * i));
  return rope;
}

std::vector<float> random_rows(std::int64_t rows, int dim) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(rows * dim));
  for (float& value : values) value = normal(random);
  return values;
}

void expect_undone(const Rope& rope, int layer, const std::vector<std::int32_t>& positions) {
  const auto rows = static_cast<std::int64_t>(positions.size());
  const std::vector<float> want = random_rows(rows, kDim);
  std::vector<float> vectors = want;
  const auto& frequencies = rope.layer_inverse_frequencies.empty()
                                ? rope.inverse_frequencies
                                : rope.layer_inverse_frequencies[static_cast<std::size_t>(layer)];
  for (std::size_t i = 0; i < positions.size(); ++i)
    rotate(rope, frequencies, vectors.data() + i * static_cast<std::size_t>(kDim), positions[i]);
  rope.undo(layer, vectors.data(), kDim, positions.data(), rows);
  for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(vectors[i], want[i], 2e-4) << i;
}

TEST(UndoRope, GivesBackWhatWasRotatedInBothLayoutsPartlyRotatedAndScaled) {
  for (const char* layout : {"half", "interleaved"})
    for (int rotary_dim : {2, 6, 12})
      for (double scaling : {1.0, 1.3})
        expect_undone(rotary(layout, rotary_dim, scaling), 1, {0, 1, 2, 3, 3, 0, 100, 17});
}

TEST(UndoRope, FewRowsFarApartNeedNoTable) {
  expect_undone(rotary("half", 12, 1.0), 0, {5, 1000, 200});
  std::vector<float> nothing;
  rotary("half", 12, 1.0).undo(0, nothing.data(), kDim, nullptr, 0);
}

TEST(UndoRope, LayersMayHaveFrequenciesOfTheirOwn) {
  Rope rope = rotary("half", 4, 1.0);
  rope.inverse_frequencies.clear();
  rope.layer_inverse_frequencies = {{1.0, 0.5}, {0.3, 0.01}};
  for (int layer : {0, 1}) expect_undone(rope, layer, {0, 7, 30});
}

TEST(UndoRope, WithoutRopeNothingHappens) {
  Rope rope = rotary("half", 0, 1.0);
  rope.kind = "none";
  std::vector<float> vectors = random_rows(3, 12);
  const std::vector<float> before = vectors;
  const std::int32_t positions[] = {0, 1, 2};
  rope.undo(0, vectors.data(), kDim, positions, 3);
  EXPECT_EQ(vectors, before);
}

TEST(ApplyRope, RotatesAsTheModelDoes) {
  for (const char* layout : {"half", "interleaved"}) {
    const Rope rope = rotary(layout, 6, 1.3);
    const std::vector<std::int32_t> positions = {0, 1, 17, 16000};
    std::vector<float> vectors = random_rows(4, kDim), want = vectors;
    for (std::size_t i = 0; i < positions.size(); ++i)
      rotate(rope, rope.inverse_frequencies, want.data() + i * kDim, positions[i]);
    rope.apply(0, vectors.data(), kDim, positions.data(), 4);
    for (std::size_t i = 0; i < want.size(); ++i)
      ASSERT_NEAR(vectors[i], want[i], i < 3 * kDim ? 1e-5 : 5e-3) << i;  // far out: float32 angles
    rope.undo(0, vectors.data(), kDim, positions.data(), 4);
    const std::vector<float> before = random_rows(4, kDim);
    for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(vectors[i], before[i], 1e-5) << i;
  }
}

TEST(RopeText, IsReadBackAsItWas) {
  Rope rope = rotary("interleaved", 6, 1.3);
  for (int own = 0; own < 2; ++own) {
    const Rope back = Rope::parse(rope.to_json(), "", kDim, 0);
    EXPECT_EQ(back.layout, rope.layout);
    EXPECT_EQ(back.rotary_dim, 6);
    EXPECT_EQ(back.attention_scaling, 1.3);
    EXPECT_EQ(back.inverse_frequencies, rope.inverse_frequencies);
    EXPECT_EQ(back.layer_inverse_frequencies, rope.layer_inverse_frequencies);
    rope.inverse_frequencies.clear();
    rope.layer_inverse_frequencies = {{1.0, 0.5, 0.1}, {0.3, 0.01, 1e-5}};
  }
  EXPECT_FALSE(Rope::parse(Rope().to_json(), "", kDim, 2).rotates());
  EXPECT_THROW(Rope::parse("{", "", kDim, 0), IoError);
  EXPECT_THROW(Rope::parse(rope.to_json(), "", kDim, 3), IoError);  // two lists
  EXPECT_THROW(Rope::parse(rope.to_json(), "", 4, 2), IoError);     // rotary_dim 6
}

TEST(UndoRope, RefusesALayerThatIsNotThere) {
  float vector[kDim] = {};
  const std::int32_t position = 0;
  Rope rope = rotary("half", 4, 1.0);
  EXPECT_THROW(rope.undo(-1, vector, kDim, &position, 1), InvalidArgument);
  rope.layer_inverse_frequencies = {{1.0, 0.5}, {0.3, 0.01}};
  EXPECT_THROW(rope.undo(2, vector, kDim, &position, 1), InvalidArgument);
}

}  // namespace
}  // namespace lexico
