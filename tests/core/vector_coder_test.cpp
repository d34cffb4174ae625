// The contract of lexico/vector_coder.h.
#include "lexico/vector_coder.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/half.h"
#include "core/random.h"
#include "lexico/error.h"
#include "lexico/evaluation.h"

namespace lexico {
namespace {

constexpr int kDim = 32, kHeads = 2;
constexpr std::int64_t kRows = 6000;

// Two heads with means and strong axes of their own.
std::vector<float> sample() {
  detail::Random random({1});
  std::vector<float> mix(static_cast<std::size_t>(kHeads * kDim * kDim));
  for (float& v : mix) v = static_cast<float>(random.normal());
  std::vector<float> x(static_cast<std::size_t>(kRows * kDim));
  for (std::int64_t r = 0; r < kRows; ++r) {
    const float* own = mix.data() + (r % kHeads) * kDim * kDim;
    for (int a = 0; a < kDim; ++a) {
      const auto amplitude = static_cast<float>(random.normal() * std::exp2(-0.25 * a));
      for (int d = 0; d < kDim; ++d)
        x[static_cast<std::size_t>(r * kDim + d)] += amplitude * own[a * kDim + d];
    }
    for (int d = 0; d < kDim; ++d)
      x[static_cast<std::size_t>(r * kDim + d)] += static_cast<float>(3 * (r % kHeads)) * own[d];
  }
  return x;
}

TEST(VectorCoders, ErrLessWithMoreBitsAndRankAsTheyShould) {
  const std::vector<float> x = sample();
  double pca_before = 2, rotation_before = 2;
  for (int bits : {32, 64, 96, 128, 160}) {
    const auto pca = pca_coder(x.data(), kRows, kDim, kHeads, bits, 0, 1);
    const auto trellis = pca_coder(x.data(), kRows, kDim, kHeads, bits, 8, 1);
    const auto rotation = rotation_coder(kDim, bits, 1);
    EXPECT_EQ(pca->bits_per_vector(), bits);
    EXPECT_EQ(rotation->bits_per_vector(), bits);
    const double p = coder_error(*pca, x.data(), kRows, kDim);
    const double t = coder_error(*trellis, x.data(), kRows, kDim);
    const double r = coder_error(*rotation, x.data(), kRows, kDim);
    EXPECT_LT(p, pca_before);
    EXPECT_LT(r, rotation_before);
    EXPECT_LT(p, 0.7 * r);  // energy in few axes
    EXPECT_LT(t, p);
    pca_before = p;
    rotation_before = r;
  }
}

TEST(VectorCoders, RotationErrsAsTheoryHasIt) {
  // sqrt of the Lloyd-Max distortion of a Gaussian: .3634, .1175, .03454, .009497; components of a
  // rotated vector are nearly Gaussian.
  const std::vector<float> x = sample();
  const double want[] = {0.3634, 0.1175, 0.03454, 0.009497};
  for (int b = 1; b <= 4; ++b) {
    const auto coder = rotation_coder(kDim, 16 + b * kDim, 3);
    EXPECT_NEAR(coder_error(*coder, x.data(), kRows, kDim),
                std::sqrt(want[b - 1]),
                0.06 * std::sqrt(want[b - 1]))
        << b;
  }
  EXPECT_THROW(rotation_coder(kDim, 16, 1), InvalidArgument);
  EXPECT_THROW(rotation_coder(kDim, 16 + 8 * kDim + 1, 1), InvalidArgument);
}

TEST(VectorCoders, MinMaxStaysWithinHalfAStep) {
  const std::vector<float> x = sample();
  for (int bits : {2, 3, 4}) {
    const auto coder = min_max_coder(kDim, bits);
    EXPECT_EQ(coder->bits_per_vector(), 32 + kDim * bits);
    std::vector<float> back(x.size());
    coder->reconstruct(x.data(), kRows, back.data());
    for (std::int64_t r = 0; r < kRows; ++r) {
      const float* row = x.data() + r * kDim;
      const auto [low, high] = std::minmax_element(row, row + kDim);
      // Half a step, and what rounding zero and step to half precision adds.
      const float bound = 0.5f * (*high - *low) / static_cast<float>((1 << bits) - 1) * 1.02f +
                          0.002f * std::fabs(*low);
      for (int d = 0; d < kDim; ++d)
        ASSERT_LE(std::fabs(row[d] - back[static_cast<std::size_t>(r * kDim + d)]), bound);
    }
  }
  EXPECT_THROW(min_max_coder(kDim, 0), InvalidArgument);
}

TEST(VectorCoders, DictionaryCodersGoThroughTheTransform) {
  const std::vector<float> x = sample();
  Dictionary d = random_dictionary(0, Kind::kKeys, 64, kDim, 1);
  d.transform.heads = kHeads;
  d.transform.mean = head_means(x.data(), kRows, kDim, kHeads);
  d.format.max_atoms = kDim;  // spans everything
  EXPECT_LT(coder_error(*dictionary_coder(d), x.data(), kRows, kDim), 1e-4);
  d.format.max_atoms = 4;
  d.format.coding = CodeFormat::Coding::kFp8Int16;
  const auto published = dictionary_coder(d);
  EXPECT_EQ(published->name(), "fp8-int16");
  EXPECT_EQ(published->bits_per_vector(), 8 * (3 * 4 + 2));
  std::vector<float> z = x;
  d.transform.forward(z.data(), kRows, kDim);
  EXPECT_NEAR(coder_error(*published, x.data(), kRows, kDim), code_error(d, z.data(), kRows), 1e-6);
}

TEST(VectorCoders, ZeroAndNanVectorsHarmNobody) {
  std::vector<float> x = sample();
  std::vector<std::unique_ptr<VectorCoder>> coders;
  coders.push_back(pca_coder(x.data(), kRows, kDim, kHeads, 64, 0, 1));
  coders.push_back(rotation_coder(kDim, 64, 1));
  coders.push_back(min_max_coder(kDim, 2));
  Dictionary d = random_dictionary(0, Kind::kKeys, 64, kDim, 1);
  d.format.coding = CodeFormat::Coding::kFp8Int16;
  d.format.max_atoms = 4;
  coders.push_back(dictionary_coder(d));
  std::vector<float> damaged = x;
  for (int c = 0; c < kDim; ++c) damaged[static_cast<std::size_t>(2 * kDim + c)] = 0;
  damaged[4 * kDim] = std::numeric_limits<float>::quiet_NaN();
  for (const auto& coder : coders) {
    std::vector<float> want(x.size()), got(x.size());
    coder->reconstruct(x.data(), kRows, want.data());
    coder->reconstruct(damaged.data(), kRows, got.data());
    for (std::int64_t r : {0, 1, 3, 5, 6})
      for (int c = 0; c < kDim; ++c)
        EXPECT_EQ(got[static_cast<std::size_t>(r * kDim + c)],
                  want[static_cast<std::size_t>(r * kDim + c)])
            << coder->name();
    EXPECT_TRUE(std::isfinite(coder_error(*coder, damaged.data(), kRows, kDim))) << coder->name();
  }
}

TEST(Half, FloatsComeBackAndRoundToNearestEven) {
  for (int half = 0; half < 1 << 16; ++half) {
    if ((half & 0x7c00) == 0x7c00) continue;
    const auto bits = static_cast<std::uint16_t>(half);
    ASSERT_EQ(detail::half_from_float(detail::float_from_half(bits)), bits);
    if ((half & 0x7fff) == 0x7bff) continue;
    const float tie = 0.5f * (detail::float_from_half(bits) +
                              detail::float_from_half(static_cast<std::uint16_t>(half + 1)));
    ASSERT_EQ(detail::half_from_float(tie), half % 2 == 0 ? half : half + 1);
  }
  EXPECT_EQ(detail::half_from_float(65519.0f), 0x7bff);
  EXPECT_EQ(detail::half_from_float(65520.0f), 0x7c00);
  EXPECT_EQ(detail::half_from_float(-1e9f), 0xfc00);
}

}  // namespace
}  // namespace lexico
