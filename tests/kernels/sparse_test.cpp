// The contract of kernels/sparse/sparse.h against plain double-precision sums.
#include "kernels/sparse/sparse.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kernels/pursuit/pursuit.h"
#include "kernels/sparse_cases.h"

namespace lexico::kernels {
namespace {

using Case = SparseCase;

struct Uses {
  std::vector<std::int32_t> offsets, slots;
  explicit Uses(const SparseProblem& p)
      : offsets(static_cast<std::size_t>(p.num_dictionaries * (p.num_atoms + 1))),
        slots(static_cast<std::size_t>(p.num_dictionaries * p.num_signals * p.max_atoms)) {
    EXPECT_TRUE(cpu::atom_uses(p, view()).ok());
  }
  AtomUses view() { return {offsets.data(), slots.data()}; }
};

/// At every instruction set level of this CPU.
class Sparse : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_TRUE(cpu::set_pursuit_level(GetParam().c_str()).ok()); }
  void TearDown() override { ASSERT_TRUE(cpu::set_pursuit_level(nullptr).ok()); }
};

TEST_P(Sparse, ResidualIsSignalMinusDecodedCode) {
  const Case c;
  std::vector<float> residual(c.signals.size()), x_norms(static_cast<std::size_t>(c.P * c.B)),
      r_norms(x_norms.size());
  ASSERT_TRUE(cpu::sparse_residual(
                  c.problem(0), c.signals.data(), residual.data(), x_norms.data(), r_norms.data())
                  .ok());
  for (std::int64_t row = 0; row < c.P * c.B; ++row) {
    double x2 = 0, r2 = 0;
    for (int d = 0; d < c.m; ++d) {
      double x = c.signals[static_cast<std::size_t>(row * c.m + d)];
      x2 += x * x;
      for (int k = 0; k < c.s; ++k) {
        const std::size_t slot = static_cast<std::size_t>(row * c.s + k);
        if (c.indices[slot] >= 0)
          x -= static_cast<double>(c.weights[slot]) *
               c.atoms[static_cast<std::size_t>((row / c.B * c.N + c.indices[slot]) * c.m + d)];
      }
      r2 += x * x;
      ASSERT_NEAR(residual[static_cast<std::size_t>(row * c.m + d)], x, 1e-5);
    }
    ASSERT_NEAR(x_norms[static_cast<std::size_t>(row)], std::sqrt(x2), 1e-4);
    ASSERT_NEAR(r_norms[static_cast<std::size_t>(row)], std::sqrt(r2), 1e-4);
  }
}

TEST_P(Sparse, GradientSumsWeightedResidualsAndDoesNotDependOnThreads) {
  const Case c;
  std::vector<double> want(c.atoms.size());
  for (int p = 0; p < c.P; ++p)
    for (int n = 0; n < c.N; ++n)
      for (std::int64_t b = 0; b < c.B; ++b)
        for (int d = 0; d < c.m; ++d)
          want[static_cast<std::size_t>((p * c.N + n) * c.m + d)] +=
              -2.0 * c.weight(p, b, n) *
              c.signals[static_cast<std::size_t>((p * c.B + b) * c.m + d)];
  std::vector<float> one(c.atoms.size(), 99.0f), two(c.atoms.size(), -99.0f);
  Uses uses(c.problem(1));
  ASSERT_TRUE(
      cpu::sparse_gradient(c.problem(1), uses.view(), c.signals.data(), -2.0f, one.data()).ok());
  ASSERT_TRUE(
      cpu::sparse_gradient(c.problem(2), uses.view(), c.signals.data(), -2.0f, two.data()).ok());
  EXPECT_EQ(one, two);
  for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(one[i], want[i], 1e-4);
}

TEST_P(Sparse, CoOccurrenceSumsForgetAndDoNotDependOnThreads) {
  const Case c;
  const float keep = 0.75f;
  const auto NN = static_cast<std::size_t>(c.P * c.N * c.N);
  std::vector<float> A[2], B[2];
  for (int t : {0, 1}) {
    A[t].assign(NN, 2.0f);
    B[t].assign(c.atoms.size(), -4.0f);
    Uses uses(c.problem(t + 1));
    ASSERT_TRUE(
        cpu::add_co_occurrence(
            c.problem(t + 1), uses.view(), c.signals.data(), keep, {A[t].data(), B[t].data()})
            .ok());
  }
  EXPECT_EQ(A[0], A[1]);
  EXPECT_EQ(B[0], B[1]);
  for (int p = 0; p < c.P; ++p)
    for (int n = 0; n < c.N; ++n) {
      for (int k = 0; k < c.N; ++k) {
        double a = 1.5;
        for (std::int64_t b = 0; b < c.B; ++b) a += c.weight(p, b, n) * c.weight(p, b, k);
        ASSERT_NEAR(A[0][static_cast<std::size_t>((p * c.N + n) * c.N + k)], a, 1e-4);
      }
      for (int d = 0; d < c.m; ++d) {
        double sum = -3;
        for (std::int64_t b = 0; b < c.B; ++b)
          sum += c.weight(p, b, n) * c.signals[static_cast<std::size_t>((p * c.B + b) * c.m + d)];
        ASSERT_NEAR(B[0][static_cast<std::size_t>((p * c.N + n) * c.m + d)], sum, 1e-4);
      }
    }
}

TEST_P(Sparse, DescentIsThatOfOneAtomAfterTheOther) {
  Case c;
  c.N = 150;  // several blocks, the last one not full
  std::mt19937 rng(6);
  std::normal_distribution<float> normal;
  c.atoms.resize(static_cast<std::size_t>(c.P * c.N * c.m));
  for (float& v : c.atoms) v = normal(rng);
  for (std::int32_t& i : c.indices)
    if (i >= 0) i = static_cast<int>(rng() % 149u);  // atom 149 is in no code
  std::vector<float> A(static_cast<std::size_t>(c.P * c.N * c.N)), B(c.atoms.size());
  Uses uses(c.problem(1));
  const CoOccurrence sums{A.data(), B.data()};
  ASSERT_TRUE(cpu::add_co_occurrence(c.problem(1), uses.view(), c.signals.data(), 0.0f, sums).ok());

  std::vector<double> want(c.atoms.begin(), c.atoms.end());
  for (int p = 0; p < c.P; ++p)
    for (int n = 0; n < c.N; ++n) {
      const float* a = A.data() + static_cast<std::ptrdiff_t>(p * c.N + n) * c.N;
      if (a[n] == 0) continue;
      std::vector<double> u(static_cast<std::size_t>(c.m));
      double norm2 = 0;
      for (int d = 0; d < c.m; ++d) {
        double& v = u[static_cast<std::size_t>(d)];
        v = B[static_cast<std::size_t>((p * c.N + n) * c.m + d)];
        for (int k = 0; k < c.N; ++k)
          if (k != n) v -= a[k] * want[static_cast<std::size_t>((p * c.N + k) * c.m + d)];
        norm2 += v * v;
      }
      for (int d = 0; d < c.m; ++d)
        want[static_cast<std::size_t>((p * c.N + n) * c.m + d)] =
            u[static_cast<std::size_t>(d)] / std::sqrt(norm2);
    }

  std::vector<float> scratch(static_cast<std::size_t>(c.P * cpu::kDescentBlock * c.m));
  std::vector<float> results[3];
  for (int t : {0, 1, 2}) {
    results[t] = c.atoms;
    const int threads = t == 2 ? 7 : t + 1;
    ASSERT_TRUE(
        cpu::descend_atoms(c.P, c.N, c.m, threads, sums, scratch.data(), results[t].data()).ok());
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
  for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(results[0][i], want[i], 2e-3) << i;
}

TEST_P(Sparse, AdamMovesAlongTheTangentAndKeepsUnitLength) {
  for (bool normalize_first : {false, true}) {
    const Case c;
    const std::vector<float> scales = {0.5f, 0.0f, 2.0f};
    std::vector<float> atoms = c.atoms, gradient(atoms.size());
    std::mt19937 rng(9);
    std::normal_distribution<float> normal;
    for (float& v : gradient) v = normal(rng);
    std::vector<float> first(atoms.size(), 0.25f), second(atoms.size(), 0.5f);
    ASSERT_TRUE(cpu::adam_step({c.P,
                                c.N,
                                c.m,
                                2,
                                0.01,
                                0.9,
                                0.999,
                                1e-8,
                                3,
                                normalize_first,
                                scales.data(),
                                gradient.data(),
                                atoms.data(),
                                first.data(),
                                second.data()})
                    .ok());
    for (int row = 0; row < c.P * c.N; ++row) {
      const auto at = static_cast<std::size_t>(row * c.m);
      const double scale = static_cast<double>(scales[static_cast<std::size_t>(row / c.N)]);
      double length = 0, along = 0, moved_length = 0;
      for (std::size_t d = 0; d < 20; ++d) length += std::pow(c.atoms[at + d], 2);
      length = normalize_first ? std::sqrt(length) : 1;
      for (std::size_t d = 0; d < 20; ++d)
        along += static_cast<double>(gradient[at + d]) * c.atoms[at + d] / length;
      double m1[20], m2[20], moved[20];
      for (std::size_t d = 0; d < 20; ++d) {
        const double x = c.atoms[at + d] / length;
        const double g = scale * (gradient[at + d] - along * x);
        m1[d] = 0.9 * 0.25 + 0.1 * g;
        m2[d] = 0.999 * 0.5 + 0.001 * g * g;
        moved[d] = x - 0.01 * (m1[d] / (1 - std::pow(0.9, 3))) /
                           (std::sqrt(m2[d] / (1 - std::pow(0.999, 3))) + 1e-8);
        moved_length += moved[d] * moved[d];
      }
      moved_length = normalize_first ? 1 : std::sqrt(moved_length);
      for (std::size_t d = 0; d < 20; ++d) {
        const bool stays = scale == 0;
        ASSERT_NEAR(atoms[at + d], stays ? c.atoms[at + d] : moved[d] / moved_length, 1e-5);
        ASSERT_NEAR(first[at + d], stays ? 0.25 : m1[d], 1e-5);
        ASSERT_NEAR(second[at + d], stays ? 0.5 : m2[d], 1e-5);
      }
    }
  }
}

TEST_P(Sparse, NoSignalsGiveAZeroGradient) {
  Case c;
  c.B = 0;
  Uses uses(c.problem(0));
  std::vector<float> gradient(c.atoms.size(), 7.0f);
  ASSERT_TRUE(cpu::sparse_gradient(c.problem(0), uses.view(), nullptr, 1.0f, gradient.data()).ok());
  EXPECT_EQ(gradient, std::vector<float>(gradient.size(), 0.0f));
  EXPECT_TRUE(cpu::sparse_residual(c.problem(0), nullptr, nullptr, nullptr, nullptr).ok());
}

std::vector<std::string> levels() {
  std::vector<std::string> names(1);
  for (const char* c = cpu::pursuit_levels(); *c != 0; ++c) {
    if (*c == '|')
      names.emplace_back();
    else
      names.back() += *c;
  }
  return names;
}

INSTANTIATE_TEST_SUITE_P(Levels, Sparse, ::testing::ValuesIn(levels()), [](const auto& test) {
  return test.param;
});

}  // namespace
}  // namespace lexico::kernels
