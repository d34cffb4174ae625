#include "lexico/encoder.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "lexico/error.h"
#include "support/message_of.h"

namespace lexico {
namespace {

std::vector<float> random_rows(int rows, int dim, unsigned seed, bool unit) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(rows) * static_cast<std::size_t>(dim));
  for (float& x : values) x = normal(random);
  for (int n = 0; unit && n < rows; ++n) {
    float* row = values.data() + n * dim;
    float norm2 = 0;
    for (int k = 0; k < dim; ++k) norm2 += row[k] * row[k];
    for (int k = 0; k < dim; ++k) row[k] /= std::sqrt(norm2);
  }
  return values;
}

Encoder encoder(int max_atoms, const std::string& selection = "omp", int threads = 2) {
  EncodeOptions options;
  options.max_atoms = max_atoms;
  options.selection = Selection::from(selection);
  options.threads = threads;
  return Encoder(options);
}

TEST(Selection, NamesRoundTrip) {
  for (const char* name : {"omp", "ols", "ols-4", "ols-16", "ols-64"})
    EXPECT_EQ(Selection::from(name).name(), name);
}

TEST(Selection, AnythingElseIsNamedInTheError) {
  for (const char* text :
       {"", "OMP", "ols-", "ols-3", "ols-65", "ols-16x", "ols--8", "ols-99999999999", "mp"}) {
    const std::string message = test::message_of<InvalidArgument>([&] { Selection::from(text); });
    EXPECT_NE(message.find("'" + std::string(text) + "'"), std::string::npos) << message;
    EXPECT_NE(message.find("ols-N"), std::string::npos) << message;
  }
}

TEST(Encoder, WhatCannotWorkIsRefusedWithItsBound) {
  EXPECT_NE(test::message_of<InvalidArgument>([] { encoder(0); }).find("max_atoms is 0"),
            std::string::npos);
  EncodeOptions options;
  options.relative_tolerance = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(test::message_of<InvalidArgument>([&] { Encoder{options}; }).find("relative_tolerance"),
            std::string::npos);
  options.relative_tolerance = 0;
  options.threads = -1;
  EXPECT_NE(test::message_of<InvalidArgument>([&] { Encoder{options}; }).find("threads is -1"),
            std::string::npos);

  const std::vector<float> atoms = random_rows(16, 32, 1, true);
  Encoder nine = encoder(17);
  EXPECT_NE(test::message_of<InvalidArgument>([&] {
              nine.set_atoms(atoms.data(), 1, 16, 32);
            }).find("[1, 16]"),
            std::string::npos);
  EXPECT_NE(test::message_of<InvalidArgument>([&] {
              nine.set_atoms(atoms.data(), 1, 32, 16);
            }).find("[1, 16]"),
            std::string::npos);
  EXPECT_NE(test::message_of<InvalidArgument>([&] {
              nine.set_atoms(atoms.data(), 0, 16, 32);
            }).find("num_dictionaries is 0"),
            std::string::npos);
  SparseCodes codes;
  EXPECT_NE(test::message_of<InvalidArgument>([&] {
              nine.encode(atoms.data(), 1, codes);
            }).find("set_atoms"),
            std::string::npos);
}

TEST(Encoder, WritesEverySlotOfEveryDictionary) {
  const std::vector<float> atoms = random_rows(3 * 64, 32, 1, true),
                           signals = random_rows(3 * 10, 32, 2, false);
  Encoder e = encoder(5);
  e.set_atoms(atoms.data(), 3, 64, 32);
  SparseCodes codes;
  e.encode(signals.data(), 10, codes);
  EXPECT_EQ(codes.num_dictionaries, 3);
  EXPECT_EQ(codes.num_signals, 10);
  EXPECT_EQ(codes.max_atoms, 5);
  EXPECT_EQ(codes.indices.size(), 3u * 10 * 5);
  EXPECT_EQ(codes.weights.size(), 3u * 10 * 5);
  EXPECT_EQ(codes.counts.size(), 30u);
  EXPECT_EQ(codes.residual_norms.size(), 30u);
  EXPECT_TRUE(codes.curve.empty());
  for (const std::int32_t count : codes.counts) EXPECT_EQ(count, 5);
  e.encode(signals.data(), 10, codes, true);
  ASSERT_EQ(codes.curve.size(), 3u * 10 * 5);
  for (std::size_t b = 0; b < 30; ++b) EXPECT_EQ(codes.curve[b * 5 + 4], codes.residual_norms[b]);
  e.encode(signals.data(), 0, codes);
  EXPECT_TRUE(codes.indices.empty());
  EXPECT_EQ(codes.num_signals, 0);
}

TEST(Encoder, BudgetsArePerSignal) {
  const std::vector<float> atoms = random_rows(64, 32, 1, true),
                           signals = random_rows(4, 32, 2, false);
  Encoder e = encoder(5);
  e.set_atoms(atoms.data(), 1, 64, 32);
  SparseCodes codes;
  const std::vector<std::int32_t> budgets = {0, 2, 5, 4};
  e.encode(signals.data(), 4, codes, false, budgets.data());
  EXPECT_EQ(codes.counts, budgets);
}

TEST(Encoder, ChangedAtomsAreUsedAfterSetAtoms) {
  std::vector<float> atoms = random_rows(64, 32, 1, true);
  const std::vector<float> signals = random_rows(600, 32, 2, false);
  Encoder e = encoder(4), fresh = encoder(4);
  e.set_atoms(atoms.data(), 1, 64, 32);
  SparseCodes first, changed, want;
  for (int i = 0; i < 3; ++i) e.encode(signals.data(), 600, first);
  atoms = random_rows(64, 32, 9, true);
  e.set_atoms(atoms.data(), 1, 64, 32);
  e.encode(signals.data(), 600, changed);
  fresh.set_atoms(atoms.data(), 1, 64, 32);
  fresh.encode(signals.data(), 600, want);
  EXPECT_EQ(changed.indices, want.indices);
  EXPECT_EQ(changed.weights, want.weights);
  EXPECT_NE(changed.indices, first.indices);
}

TEST(Encoder, ManySmallCallsGiveWhatOneLargeCallGives) {
  const std::vector<float> atoms = random_rows(300, 64, 1, true),
                           signals = random_rows(1500, 64, 2, false);
  for (const char* selection : {"omp", "ols", "ols-4"}) {
    Encoder one = encoder(8, selection), many = encoder(8, selection, 1);
    one.set_atoms(atoms.data(), 1, 300, 64);
    many.set_atoms(atoms.data(), 1, 300, 64);
    SparseCodes whole, part;
    one.encode(signals.data(), 1500, whole);
    for (std::size_t begin = 0; begin < 1500;
         begin += 30) {  // the form changes on the way: a Gram matrix comes to pay
      many.encode(signals.data() + begin * 64, 30, part);
      for (std::size_t i = 0; i < 30 * 8; ++i) {
        ASSERT_EQ(part.indices[i], whole.indices[begin * 8 + i]) << selection;
        ASSERT_EQ(part.weights[i], whole.weights[begin * 8 + i]) << selection;
      }
    }
  }
}

TEST(Encoder, LexicoCpuIsRefusedByNameUnlessThisCpuHasIt) {
  setenv("LEXICO_CPU", "quantum", 1);
  const std::string message = test::message_of<InvalidArgument>([] { encoder(4); });
  unsetenv("LEXICO_CPU");
  EXPECT_NE(message.find("LEXICO_CPU is 'quantum'"), std::string::npos) << message;
  EXPECT_NE(message.find("generic"), std::string::npos) << message;
}

TEST(Encoder, LevelMayChangeBetweenCalls) {
  const std::vector<float> atoms = random_rows(256, 40, 1, true),
                           signals = random_rows(900, 40, 2, false);
  Encoder e = encoder(6);
  e.set_atoms(atoms.data(), 1, 256, 40);
  SparseCodes before, after;
  e.encode(signals.data(), 900, before);
  for (const std::string& level : cpu_levels()) {  // what e prepared was for another level
    setenv("LEXICO_CPU", level.c_str(), 1);
    (void)encoder(6);
    EXPECT_EQ(cpu_level(), level);
    e.encode(signals.data(), 900, after);
    EXPECT_EQ(after.indices, before.indices) << level;
  }
  unsetenv("LEXICO_CPU");
}

TEST(Encoder, WorkspaceIsStatedAndReused) {
  const std::vector<float> atoms = random_rows(2 * 512, 64, 1, true);
  Encoder e = encoder(8);
  e.set_atoms(atoms.data(), 2, 512, 64);
  // A Gram matrix of 512 x 512 for each dictionary at most, and little beside it.
  EXPECT_GT(e.workspace_bytes(100000), 0u);
  EXPECT_LT(e.workspace_bytes(100000), std::size_t{2} * 512 * 512 * 4 + (std::size_t{4} << 20));
  EXPECT_LE(e.workspace_bytes(1), e.workspace_bytes(100000));
}

TEST(Encoder, OlsLeavesLessThanOmp) {
  // Atoms around one centre: what one atom misses depends on the ones already chosen.
  std::vector<float> atoms = random_rows(300, 32, 1, true);
  for (std::size_t n = 1; n < 300; ++n) {
    float norm2 = 0;
    for (std::size_t k = 0; k < 32; ++k) {
      atoms[n * 32 + k] = atoms[k] + 0.7f * atoms[n * 32 + k];
      norm2 += atoms[n * 32 + k] * atoms[n * 32 + k];
    }
    for (std::size_t k = 0; k < 32; ++k) atoms[n * 32 + k] /= std::sqrt(norm2);
  }
  const std::vector<float> signals = random_rows(300, 32, 2, false);
  const auto error = [&](const char* selection) {
    Encoder e = encoder(8, selection);
    e.set_atoms(atoms.data(), 1, 300, 32);
    SparseCodes codes;
    e.encode(signals.data(), 300, codes);
    double sum = 0;
    for (const float r : codes.residual_norms) sum += r;
    return sum;
  };
  const double omp = error("omp"), some = error("ols-4"), ols = error("ols");
  EXPECT_LT(ols, omp);
  EXPECT_LT(some, omp);
  EXPECT_LT(ols, some * 1.01);
}

TEST(Encoder, CandidatesAreAllAtomsWhereThoseAreFew) {
  const Selection of16 = Selection::from("ols-16"), all = Selection::from("ols");
  EXPECT_EQ(of16.candidates_among(1024), 0);
  EXPECT_EQ(of16.candidates_among(1025), 16);
  EXPECT_EQ(Selection::from("ols-64").candidates_among(65536), 64);
  EXPECT_EQ(all.candidates_among(65536), 0);
  // In every batch: what a signal gets does not depend on the form that pursuit takes.
  const std::vector<float> atoms = random_rows(300, 32, 1, true);
  const std::vector<float> signals = random_rows(400, 32, 2, false);
  const auto codes_of = [&](const char* selection, int num_atoms, std::int64_t count) {
    Encoder e = encoder(8, selection);
    e.set_atoms(atoms.data(), 1, num_atoms, 32);
    SparseCodes codes;
    e.encode(signals.data(), count, codes);
    codes.indices.resize(8);
    return codes.indices;
  };
  for (const std::int64_t count : {1, 7, 400}) {
    EXPECT_EQ(codes_of("ols-4", 256, count), codes_of("ols", 256, 400)) << count;
    EXPECT_EQ(codes_of("ols-4", 300, count), codes_of("ols-4", 300, 400)) << count;
  }
}

TEST(Encoder, LargeDictionaryStaysUnderAGibibyte) {
  const std::vector<float> atoms = random_rows(65536, 8, 1, true);
  for (const char* selection : {"omp", "ols", "ols-16"}) {
    EncodeOptions options;
    options.max_atoms = 8;
    options.selection = Selection::from(selection);
    options.threads = 2;
    Encoder e(options);
    e.set_atoms(atoms.data(), 1, 65536, 8);
    EXPECT_LT(e.workspace_bytes(1 << 20), std::size_t{1} << 30) << selection;
    EXPECT_LE(e.workspace_bytes(1), e.workspace_bytes(1 << 20));
  }
}

}  // namespace
}  // namespace lexico
