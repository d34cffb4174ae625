#include "lexico/evaluation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "lexico/error.h"

namespace lexico {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> gaussian(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

/// Solves the normal equations of the chosen atoms in double by Gaussian elimination.
std::vector<double> least_squares(const Dictionary& d,
                                  const std::vector<int>& chosen,
                                  const float* x) {
  const std::size_t n = chosen.size();
  std::vector<std::vector<double>> system(n, std::vector<double>(n + 1));
  for (std::size_t i = 0; i < n; ++i) {
    const float* a = &d.atoms[static_cast<std::size_t>(chosen[i] * d.dim)];
    for (std::size_t j = 0; j < n; ++j)
      for (int k = 0; k < d.dim; ++k)
        system[i][j] +=
            static_cast<double>(a[k]) * d.atoms[static_cast<std::size_t>(chosen[j] * d.dim + k)];
    for (int k = 0; k < d.dim; ++k) system[i][n] += static_cast<double>(a[k]) * x[k];
  }
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t r = 0; r < n; ++r) {
      if (r == i) continue;
      const double factor = system[r][i] / system[i][i];
      for (std::size_t c = i; c <= n; ++c) system[r][c] -= factor * system[i][c];
    }
  std::vector<double> weights(n);
  for (std::size_t i = 0; i < n; ++i) weights[i] = system[i][n] / system[i][i];
  return weights;
}

/// |x - D y| after s atoms, by textbook orthogonal matching pursuit in double.
double slow_residual(const Dictionary& d, const float* x, int s) {
  std::vector<double> residual(x, x + d.dim);
  std::vector<int> chosen;
  for (int step = 0; step < s; ++step) {
    int best = -1;
    double most = -1;
    for (int n = 0; n < d.num_atoms; ++n) {
      double dot = 0;
      for (int k = 0; k < d.dim; ++k)
        dot += residual[static_cast<std::size_t>(k)] *
               d.atoms[static_cast<std::size_t>(n * d.dim + k)];
      if (std::abs(dot) > most && std::find(chosen.begin(), chosen.end(), n) == chosen.end())
        most = std::abs(dot), best = n;
    }
    chosen.push_back(best);
    const std::vector<double> weights = least_squares(d, chosen, x);
    for (int k = 0; k < d.dim; ++k) {
      double sum = x[k];
      for (std::size_t i = 0; i < chosen.size(); ++i)
        sum -= weights[i] * d.atoms[static_cast<std::size_t>(chosen[i] * d.dim + k)];
      residual[static_cast<std::size_t>(k)] = sum;
    }
  }
  double square = 0;
  for (const double r : residual) square += r * r;
  return std::sqrt(square);
}

double length(const float* x, int dim) {
  double square = 0;
  for (int k = 0; k < dim; ++k) square += static_cast<double>(x[k]) * x[k];
  return std::sqrt(square);
}

double interpolated(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  const double place = q * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (values[above] - values[below]) * (place - static_cast<double>(below));
}

TEST(Evaluation, AgreesWithTextbookPursuitInDouble) {
  constexpr int kDim = 16, kAtoms = 48, kVectors = 203;
  const Dictionary dictionary = random_dictionary(0, Kind::kKeys, kAtoms, kDim, 7);
  const std::vector<float> x = gaussian(kVectors * kDim, 1);
  const std::vector<int> sparsities{1, 4, 7};
  const auto summaries = evaluate(dictionary, x.data(), kVectors, sparsities);
  ASSERT_EQ(summaries.size(), sparsities.size());
  for (std::size_t i = 0; i < sparsities.size(); ++i) {
    std::vector<double> errors;
    double sum = 0;
    for (int v = 0; v < kVectors; ++v) {
      const float* vector = &x[static_cast<std::size_t>(v * kDim)];
      errors.push_back(slow_residual(dictionary, vector, sparsities[i]) /
                       (length(vector, kDim) + 1e-8));
      sum += errors.back();
    }
    EXPECT_EQ(summaries[i].sparsity, sparsities[i]);
    EXPECT_EQ(summaries[i].vectors, kVectors);
    EXPECT_NEAR(summaries[i].mean, sum / kVectors, 1e-5);
    EXPECT_NEAR(summaries[i].median, interpolated(errors, 0.5), 1e-5);
    EXPECT_NEAR(summaries[i].p99, interpolated(errors, 0.99), 1e-5);
    EXPECT_DOUBLE_EQ(summaries[i].mean_atoms, sparsities[i]);
  }
}

TEST(Evaluation, SmallerSparsitiesComeFromTheSamePursuit) {
  const Dictionary dictionary = random_dictionary(0, Kind::kKeys, 64, 16, 7);
  const std::vector<float> x = gaussian(300 * 16, 2);
  for (const char* selection : {"omp", "ols", "ols-8"}) {
    EncodeOptions options;
    options.selection = Selection::from(selection);
    const auto together = evaluate(dictionary, x.data(), 300, {2, 5, 9}, options);
    for (const auto& summary : together) {
      const auto alone = evaluate(dictionary, x.data(), 300, {summary.sparsity}, options);
      EXPECT_NEAR(alone[0].mean, summary.mean, 1e-6) << selection;
      EXPECT_NEAR(alone[0].p99, summary.p99, 1e-6) << selection;
    }
  }
}

TEST(Evaluation, NotFiniteVectorsAreCountedApart) {
  const Dictionary dictionary = random_dictionary(0, Kind::kKeys, 32, 8, 7);
  std::vector<float> x = gaussian(10 * 8, 3);
  const auto clean = evaluate(dictionary, x.data() + 16, 8, {4});
  x[3] = kNan;
  x[8 + 5] = std::numeric_limits<float>::infinity();
  Evaluator evaluator({4}, {});
  RelativeErrors errors({4});
  evaluator.use(dictionary);
  evaluator.measure(x.data(), 10, errors);
  EXPECT_EQ(errors.num_not_finite(), 2);
  EXPECT_EQ(errors.num_vectors(), 8);
  EXPECT_EQ(errors.summarize()[0].mean, clean[0].mean);
}

TEST(Evaluation, NoVectorsGiveNanAndNoFailure) {
  const Dictionary dictionary = random_dictionary(0, Kind::kKeys, 32, 8, 7);
  const auto summaries = evaluate(dictionary, nullptr, 0, {4});
  EXPECT_EQ(summaries[0].vectors, 0);
  EXPECT_TRUE(std::isnan(summaries[0].mean));
  EXPECT_TRUE(std::isnan(summaries[0].median));
}

TEST(Evaluation, ZeroAndExactlySparseVectorsHaveNoError) {
  const Dictionary dictionary = random_dictionary(0, Kind::kKeys, 32, 8, 7);
  std::vector<float> x(3 * 8, 0.0f);  // the first stays zero
  for (std::size_t k = 0; k < 8; ++k) {
    x[8 + k] = 3 * dictionary.atoms[5 * 8 + k];
    x[16 + k] = dictionary.atoms[5 * 8 + k];
  }
  const auto summaries = evaluate(dictionary, x.data(), 3, {1, 4});
  for (const auto& summary : summaries) {
    EXPECT_LT(summary.p99, 1e-5);
    EXPECT_EQ(summary.vectors, 3);
    EXPECT_LT(summary.mean_atoms, 4);  // a zero vector takes none
  }
}

TEST(Evaluation, AToleranceStopsEarlyAndIsSeenInTheAtoms) {
  const Dictionary dictionary = random_dictionary(0, Kind::kKeys, 128, 16, 7);
  const std::vector<float> x = gaussian(200 * 16, 4);
  EncodeOptions options;
  options.relative_tolerance = 0.3f;
  const auto summaries = evaluate(dictionary, x.data(), 200, {2, 12}, options);
  EXPECT_LT(summaries[1].mean_atoms, 11);
  EXPECT_LE(summaries[1].p99, 0.3 + 1e-5);
  EXPECT_GT(summaries[1].mean, 0.05);
}

TEST(Evaluation, BatchesOfAStreamAddUp) {
  const Dictionary keys = random_dictionary(0, Kind::kKeys, 32, 8, 7);
  const Dictionary values = random_dictionary(0, Kind::kValues, 32, 8, 7);
  EXPECT_NE(keys.atoms, values.atoms);
  const std::vector<float> x = gaussian(20000 * 8, 5);  // more than one pursuit batch
  Evaluator evaluator({3}, {});
  RelativeErrors split({3});
  evaluator.use(keys);
  evaluator.measure(x.data(), 7, split);
  evaluator.measure(x.data() + 7 * 8, 19993, split);
  const auto whole = evaluate(keys, x.data(), 20000, {3});
  EXPECT_EQ(split.summarize()[0].mean, whole[0].mean);
  EXPECT_EQ(split.summarize()[0].p99, whole[0].p99);
}

TEST(Evaluation, RandomAtomsAreUnitAndReproducible) {
  const Dictionary a = random_dictionary(3, Kind::kValues, 64, 32, 11);
  EXPECT_EQ(a.layer, 3);
  EXPECT_EQ(a.atoms, random_dictionary(3, Kind::kValues, 64, 32, 11).atoms);
  EXPECT_NE(a.atoms, random_dictionary(3, Kind::kValues, 64, 32, 12).atoms);
  EXPECT_NE(a.atoms, random_dictionary(2, Kind::kValues, 64, 32, 11).atoms);
  double sum = 0;
  for (int n = 0; n < 64; ++n)
    EXPECT_NEAR(length(&a.atoms[static_cast<std::size_t>(n * 32)], 32), 1, 1e-6);
  for (const float value : a.atoms) sum += value;
  EXPECT_LT(std::abs(sum / (64 * 32)), 0.02);
}

TEST(Evaluation, SampleAtomsSkipWhatCannotBeNormalised) {
  const std::vector<float> x{0, 0, 3, 4, kNan, 1, 0, -2, 1, 1};
  const Dictionary d = sample_dictionary(0, Kind::kKeys, 2, 2, x.data(), 5);
  EXPECT_EQ(d.atoms, (std::vector<float>{0.6f, 0.8f, 0, -1}));
  try {
    sample_dictionary(0, Kind::kKeys, 4, 2, x.data(), 5);
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("3 usable vectors, need 4"), std::string::npos)
        << error.what();
  }
}

TEST(Evaluation, BadSparsitiesAreNamed) {
  const Dictionary dictionary = random_dictionary(0, Kind::kKeys, 32, 8, 7);
  EXPECT_THROW(evaluate(dictionary, nullptr, 0, {}), InvalidArgument);
  EXPECT_THROW(evaluate(dictionary, nullptr, 0, {0, 2}), InvalidArgument);
  EXPECT_THROW(evaluate(dictionary, nullptr, 0, {4, 2}), InvalidArgument);
  EXPECT_THROW(evaluate(dictionary, nullptr, 0, {4, 4}), InvalidArgument);
  EXPECT_THROW(evaluate(dictionary, nullptr, 0, {9}), InvalidArgument);  // more than dim
}

TEST(Evaluation, PublishedFormatBytes) {
  EXPECT_EQ(published_bytes(8), 26);
  EXPECT_EQ(fp16_bytes(128), 256);
}

}  // namespace
}  // namespace lexico
