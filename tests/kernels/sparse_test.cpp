// The contract of kernels/sparse/sparse.h against plain double-precision sums.
#include "kernels/sparse/sparse.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace lexico::kernels {
namespace {

struct Case {
  int P = 3, N = 37, m = 20, s = 5;
  std::int64_t B = 41;
  std::vector<float> atoms, signals, weights;
  std::vector<std::int32_t> indices;

  Case() {
    std::mt19937 rng(5);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& v, std::int64_t size) {
      v.resize(static_cast<std::size_t>(size));
      for (float& x : v) x = normal(rng);
    };
    fill(atoms, std::int64_t{P} * N * m);
    fill(signals, P * B * m);
    fill(weights, P * B * s);
    indices.resize(weights.size());
    for (std::size_t row = 0; row < indices.size() / static_cast<std::size_t>(s); ++row) {
      const int count =
          static_cast<int>(rng() % static_cast<unsigned>(s + 1));  // 0..s slots in use
      for (int k = 0; k < s; ++k) {
        const std::size_t slot = row * static_cast<std::size_t>(s) + static_cast<std::size_t>(k);
        indices[slot] = k < count ? static_cast<int>(rng() % static_cast<unsigned>(N)) : -1;
        if (k >= count) weights[slot] = 0;
      }
    }
  }
  SparseProblem problem(int threads) const {
    return {P, B, N, m, s, threads, atoms.data(), indices.data(), weights.data()};
  }
};

TEST(Sparse, ResidualIsSignalMinusDecodedCode) {
  const Case c;
  std::vector<float> residual(c.signals.size());
  ASSERT_TRUE(cpu::sparse_residual(c.problem(0), c.signals.data(), residual.data()).ok());
  for (std::int64_t row = 0; row < c.P * c.B; ++row)
    for (int d = 0; d < c.m; ++d) {
      double x = c.signals[static_cast<std::size_t>(row * c.m + d)];
      for (int k = 0; k < c.s; ++k) {
        const std::size_t slot = static_cast<std::size_t>(row * c.s + k);
        if (c.indices[slot] >= 0)
          x -= static_cast<double>(c.weights[slot]) *
               c.atoms[static_cast<std::size_t>((row / c.B * c.N + c.indices[slot]) * c.m + d)];
      }
      ASSERT_NEAR(residual[static_cast<std::size_t>(row * c.m + d)], x, 1e-5);
    }
}

TEST(Sparse, GradientSumsWeightedResidualsAndDoesNotDependOnThreads) {
  const Case c;
  std::vector<double> want(c.atoms.size());
  for (std::int64_t row = 0; row < c.P * c.B; ++row)
    for (int k = 0; k < c.s; ++k) {
      const std::size_t slot = static_cast<std::size_t>(row * c.s + k);
      if (c.indices[slot] < 0) continue;
      for (int d = 0; d < c.m; ++d)
        want[static_cast<std::size_t>((row / c.B * c.N + c.indices[slot]) * c.m + d)] +=
            -2.0 * c.weights[slot] * c.signals[static_cast<std::size_t>(row * c.m + d)];
    }
  std::vector<float> one(c.atoms.size(), 99.0f), two(c.atoms.size(), -99.0f);
  ASSERT_TRUE(cpu::sparse_gradient(c.problem(1), c.signals.data(), -2.0f, one.data()).ok());
  ASSERT_TRUE(cpu::sparse_gradient(c.problem(2), c.signals.data(), -2.0f, two.data()).ok());
  EXPECT_EQ(one, two);
  for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(one[i], want[i], 1e-4);
}

TEST(Sparse, NoSignalsGiveAZeroGradient) {
  Case c;
  c.B = 0;
  std::vector<float> gradient(c.atoms.size(), 7.0f);
  ASSERT_TRUE(cpu::sparse_gradient(c.problem(0), nullptr, 1.0f, gradient.data()).ok());
  EXPECT_EQ(gradient, std::vector<float>(gradient.size(), 0.0f));
  EXPECT_TRUE(cpu::sparse_residual(c.problem(0), nullptr, nullptr).ok());
}

}  // namespace
}  // namespace lexico::kernels
