#include "lexico/transform.h"

#include <gtest/gtest.h>
#include <cmath>
#include <limits>
#include <random>

#include "lexico/error.h"

namespace lexico {
namespace {

constexpr int kDim = 5, kHeads = 3;

std::vector<float> random_rows(int rows, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(rows * kDim));
  for (float& value : values) value = normal(random);
  return values;
}

/// C_h = A_h A_h^T of each head.
std::vector<float> random_metric() {
  const std::vector<float> a = random_rows(kHeads * kDim, 9);
  std::vector<float> c(a.size());
  for (int h = 0; h < kHeads; ++h)
    for (int i = 0; i < kDim; ++i)
      for (int j = 0; j < kDim; ++j)
        for (int k = 0; k < kDim; ++k)
          c[static_cast<std::size_t>((h * kDim + i) * kDim + j)] +=
              a[static_cast<std::size_t>((h * kDim + i) * kDim + k)] *
              a[static_cast<std::size_t>((h * kDim + j) * kDim + k)];
  return c;
}

TEST(Transform, TakesTheMeanOfEachHeadAwayAndPutsItBack) {
  const std::vector<float> x = random_rows(10, 1);
  Transform transform;
  EXPECT_TRUE(transform.is_identity());
  transform.heads = kHeads;
  transform.mean = random_rows(kHeads, 2);
  std::vector<float> z = x;
  transform.forward(z.data(), 10, kDim);
  for (int row = 0; row < 10; ++row)
    for (int d = 0; d < kDim; ++d) {
      const auto at = static_cast<std::size_t>(row * kDim + d),
                 mean = static_cast<std::size_t>(row % kHeads * kDim + d);
      EXPECT_FLOAT_EQ(z[at], x[at] - transform.mean[mean]);
    }
  transform.backward(z.data(), 10, kDim);
  for (std::size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(z[i], x[i], 1e-6);
}

TEST(Transform, ABatchMayBeginAtAnyHead) {
  Transform transform;
  set_metric(transform, random_metric(), kHeads, kDim, 0.2);
  transform.mean = random_rows(kHeads, 2);
  const std::vector<float> x = random_rows(10, 1);
  std::vector<float> whole = x, parts = x;
  transform.forward(whole.data(), 10, kDim);
  transform.forward(parts.data(), 1, kDim);
  transform.forward(parts.data() + kDim, 7, kDim, 1);
  transform.forward(parts.data() + 8 * kDim, 2, kDim, 8 % kHeads);
  EXPECT_EQ(whole, parts);
}

TEST(Transform, LengthsInTheFrameOfAMetricAreThoseOfTheMetric) {
  const std::vector<float> metric = random_metric();
  const double share = 0.2;
  Transform transform;
  set_metric(transform, metric, kHeads, kDim, share);
  const std::vector<float> x = random_rows(kHeads, 3);
  std::vector<float> z = x;
  transform.forward(z.data(), kHeads, kDim);
  for (int h = 0; h < kHeads; ++h) {
    double trace = 0, want = 0, got = 0, plain = 0;
    for (int i = 0; i < kDim; ++i) {
      trace += metric[static_cast<std::size_t>((h * kDim + i) * kDim + i)];
      const double xi = x[static_cast<std::size_t>(h * kDim + i)],
                   zi = z[static_cast<std::size_t>(h * kDim + i)];
      got += zi * zi;
      plain += xi * xi;
      for (int j = 0; j < kDim; ++j)
        want += xi * metric[static_cast<std::size_t>((h * kDim + i) * kDim + j)] *
                x[static_cast<std::size_t>(h * kDim + j)];
    }
    EXPECT_NEAR(got, want * kDim / trace + share * plain, 1e-4 * got);
  }
  transform.backward(z.data(), kHeads, kDim);
  for (std::size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(z[i], x[i], 1e-5);
}

TEST(SetMetric, RefusesWhatIsNoMetric) {
  Transform transform;
  std::vector<float> metric = random_metric();
  EXPECT_THROW(set_metric(transform, metric, kHeads, kDim, 0), InvalidArgument);
  EXPECT_THROW(set_metric(transform, metric, kHeads + 1, kDim, 1), InvalidArgument);
  metric[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(set_metric(transform, metric, kHeads, kDim, 1), InvalidArgument);
  EXPECT_THROW(set_metric(transform, std::vector<float>(metric.size()), kHeads, kDim, 1),
               InvalidArgument);
  EXPECT_TRUE(transform.is_identity());
}

TEST(HeadMeans, LeaveOutWhatIsNotFinite) {
  std::vector<float> x = random_rows(7, 4);
  x[static_cast<std::size_t>(3 * kDim)] = std::numeric_limits<float>::infinity();  // head 0
  const std::vector<float> means = head_means(x.data(), 7, kDim, kHeads);
  for (std::size_t d = 0; d < kDim; ++d) {
    EXPECT_NEAR(means[d], (x[d] + x[6 * kDim + d]) / 2, 1e-6);
    EXPECT_NEAR(means[kDim + d], (x[kDim + d] + x[4 * kDim + d]) / 2, 1e-6);
  }
  EXPECT_EQ(head_means(x.data(), 0, kDim, 2), std::vector<float>(2 * kDim));
}

}  // namespace
}  // namespace lexico
