#include <gtest/gtest.h>
#include <cmath>
#include <random>
#include <vector>

#include "lexico/error.h"
#include "lexico/language_model.h"

namespace lexico {
namespace {

/// RoPE as transformers applies it, in double: pairs (a, b) become (a cos - b sin, b cos + a sin).
void rotate(const ModelInfo& info,
            const std::vector<double>& frequencies,
            float* vector,
            std::int32_t position) {
  const bool interleaved = info.rope_layout == "interleaved";
  const std::size_t pairs = frequencies.size();
  for (std::size_t i = 0; i < pairs; ++i) {
    float& a = vector[interleaved ? 2 * i : i];
    float& b = vector[interleaved ? 2 * i + 1 : i + pairs];
    const double c = std::cos(position * frequencies[i]) * info.attention_scaling;
    const double s = std::sin(position * frequencies[i]) * info.attention_scaling;
    const double x = a, y = b;
    a = static_cast<float>(x * c - y * s);
    b = static_cast<float>(y * c + x * s);
  }
}

ModelInfo rotary(const char* layout, int rotary_dim, double scaling) {
  ModelInfo info;
  info.layers = 2;
  info.head_dim = 12;
  info.rope_kind = "default";
  info.rope_layout = layout;
  info.rotary_dim = rotary_dim;
  info.attention_scaling = scaling;
  for (int i = 0; i < rotary_dim / 2; ++i)
    info.inverse_frequencies.push_back(std::pow(10.0, -0.5 * i));
  return info;
}

std::vector<float> random_rows(std::int64_t rows, int dim) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(rows * dim));
  for (float& value : values) value = normal(random);
  return values;
}

void expect_undone(const ModelInfo& info, int layer, const std::vector<std::int32_t>& positions) {
  const auto rows = static_cast<std::int64_t>(positions.size());
  const std::vector<float> want = random_rows(rows, info.head_dim);
  std::vector<float> vectors = want;
  const auto& frequencies = info.layer_inverse_frequencies.empty()
                                ? info.inverse_frequencies
                                : info.layer_inverse_frequencies[static_cast<std::size_t>(layer)];
  for (std::size_t i = 0; i < positions.size(); ++i)
    rotate(info,
           frequencies,
           vectors.data() + i * static_cast<std::size_t>(info.head_dim),
           positions[i]);
  undo_rope(info, layer, vectors.data(), positions.data(), rows);
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
  undo_rope(rotary("half", 12, 1.0), 0, nothing.data(), nullptr, 0);
}

TEST(UndoRope, LayersMayHaveFrequenciesOfTheirOwn) {
  ModelInfo info = rotary("half", 4, 1.0);
  info.inverse_frequencies.clear();
  info.layer_inverse_frequencies = {{1.0, 0.5}, {0.3, 0.01}};
  for (int layer : {0, 1}) expect_undone(info, layer, {0, 7, 30});
}

TEST(UndoRope, WithoutRopeNothingHappens) {
  ModelInfo info = rotary("half", 0, 1.0);
  info.rope_kind = "none";
  std::vector<float> vectors = random_rows(3, 12);
  const std::vector<float> before = vectors;
  const std::int32_t positions[] = {0, 1, 2};
  undo_rope(info, 0, vectors.data(), positions, 3);
  EXPECT_EQ(vectors, before);
}

TEST(UndoRope, RefusesALayerThatIsNotThere) {
  float vector[12] = {};
  const std::int32_t position = 0;
  for (int layer : {-1, 2})
    EXPECT_THROW(undo_rope(rotary("half", 4, 1.0), layer, vector, &position, 1), InvalidArgument);
}

}  // namespace
}  // namespace lexico
