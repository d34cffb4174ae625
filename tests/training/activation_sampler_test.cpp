// The contract of lexico/activation_sampler.h.
#include "lexico/activation_sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "lexico/activations.h"
#include "lexico/error.h"
#include "support/temporary_folder.h"

namespace lexico {
namespace {

constexpr int kLayers = 2, kHeads = 2, kDim = 4;

/// A file whose vectors say where they stand: (row / 1000, row % 1000, layer, kind).
void write_numbered(const std::string& path, std::int64_t tokens, bool half) {
  ActivationInfo info;
  info.model = "numbers";
  info.corpora = {"numbers"};
  info.corpus_documents = {1};
  info.half = half;
  info.num_layers = kLayers;
  info.kv_heads = kHeads;
  info.head_dim = kDim;
  info.num_tokens = tokens;
  info.sequence_length = static_cast<int>(tokens);
  std::vector<float> vectors[2];
  for (Kind kind : kBothKinds)
    for (int layer = 0; layer < kLayers; ++layer)
      for (int head = 0; head < kHeads; ++head)
        for (std::int64_t token = 0; token < tokens; ++token) {
          const std::int64_t row = token * kHeads + head;
          for (float v : {static_cast<float>(row / 1000),
                          static_cast<float>(row % 1000),
                          static_cast<float>(layer),
                          static_cast<float>(static_cast<int>(kind))})
            vectors[static_cast<int>(kind)].push_back(v);
        }
  std::vector<std::int32_t> zeros(static_cast<std::size_t>(tokens));
  ActivationWriter writer(path, info);
  writer.append({1, tokens, vectors[0].data(), vectors[1].data(), zeros.data(), zeros.data()});
  writer.finish();
}

std::vector<std::int64_t> rows_of(const float* batch, std::int64_t count) {
  std::vector<std::int64_t> rows;
  for (std::int64_t i = 0; i < count; ++i)
    rows.push_back(static_cast<std::int64_t>(batch[i * kDim]) * 1000 +
                   static_cast<std::int64_t>(batch[i * kDim + 1]));
  return rows;
}

class Sampler : public ::testing::TestWithParam<bool> {
 protected:
  static constexpr std::int64_t kTokens = 5000, kUsed = 9000;  // rows in the file: 10,000
  void SetUp() override {
    write_numbered(folder_.file("a.h5"), kTokens, GetParam());
    reader_ = std::make_unique<ActivationReader>(folder_.file("a.h5"));
  }
  ActivationSampler sampler(std::uint64_t seed = 1, std::size_t pool_bytes = 100'000) {
    return {*reader_, {{1, Kind::kKeys}, {0, Kind::kValues}}, kUsed, seed, pool_bytes};
  }
  test::TemporaryFolder folder_;
  std::unique_ptr<ActivationReader> reader_;
};

TEST_P(Sampler, EveryEpochGivesEveryRowInUseOnceAndInAnotherOrder) {
  ActivationSampler s = sampler();
  std::vector<float> batch(static_cast<std::size_t>(2 * kUsed * kDim));
  std::vector<std::int64_t> first, second;
  for (std::vector<std::int64_t>* epoch : {&first, &second}) {
    s.next(kUsed, batch.data());
    *epoch = rows_of(batch.data(), kUsed);
    const std::set<std::int64_t> distinct(epoch->begin(), epoch->end());
    EXPECT_EQ(distinct.size(), static_cast<std::size_t>(kUsed));
    EXPECT_EQ(*distinct.rbegin(), kUsed - 1);
  }
  EXPECT_NE(first, second);
  EXPECT_FALSE(std::is_sorted(first.begin(), first.begin() + 50));
}

TEST_P(Sampler, AllTargetsGetTheSameRowsFromTheirOwnDatasets) {
  ActivationSampler s = sampler();
  std::vector<float> batch(2 * 300 * kDim);
  s.next(300, batch.data());
  EXPECT_EQ(rows_of(batch.data(), 300), rows_of(batch.data() + 300 * kDim, 300));
  for (std::size_t i = 0; i < 300; ++i) {
    EXPECT_EQ(batch[i * kDim + 2], 1.0f);          // layer 1
    EXPECT_EQ(batch[i * kDim + 3], 0.0f);          // keys
    EXPECT_EQ(batch[(300 + i) * kDim + 2], 0.0f);  // layer 0
    EXPECT_EQ(batch[(300 + i) * kDim + 3], 1.0f);  // values
  }
}

TEST_P(Sampler, BatchSplitAndSeekDoNotChangeTheOrder) {
  ActivationSampler whole = sampler(), split = sampler();
  std::vector<float> a(2 * 12000 * kDim);
  whole.next(12000, a.data());
  const std::vector<std::int64_t> rows = rows_of(a.data(), 12000);
  for (std::int64_t start : {std::int64_t{0},
                             std::int64_t{1},
                             std::int64_t{2048},
                             std::int64_t{8999},
                             std::int64_t{9000},
                             std::int64_t{11000}}) {
    split.seek(start);
    std::vector<float> b(2 * 700 * kDim);
    std::vector<std::int64_t> got;
    for (int part = 0; part < 2; ++part) {
      split.next(350, b.data());
      const std::vector<std::int64_t> some = rows_of(b.data(), 350);
      got.insert(got.end(), some.begin(), some.end());
    }
    for (std::int64_t i = 0; i < 700 && start + i < 12000; ++i)
      ASSERT_EQ(got[static_cast<std::size_t>(i)], rows[static_cast<std::size_t>(start + i)])
          << start << " + " << i;
  }
}

TEST_P(Sampler, SeedDecidesTheOrderAndMemoryIsBounded) {
  ActivationSampler a = sampler(1), b = sampler(2);
  std::vector<float> x(2 * 100 * kDim), y(x.size());
  a.next(100, x.data());
  b.next(100, y.data());
  EXPECT_NE(x, y);
  EXPECT_LE(sampler(1, 100'000).pool_bytes(), 131'072u);  // at least one chunk
  EXPECT_GT(sampler(1, 1 << 30).pool_bytes(), 100'000u);
}

TEST_P(Sampler, WhatDoesNotFitTheFileIsRefused) {
  EXPECT_THROW(ActivationSampler(*reader_, {{2, Kind::kKeys}}, 10, 0, 1000), InvalidArgument);
  EXPECT_THROW(ActivationSampler(*reader_, {{0, Kind::kKeys}}, 10001, 0, 1000), InvalidArgument);
  EXPECT_THROW(ActivationSampler(*reader_, {{0, Kind::kKeys}}, 0, 0, 1000), InvalidArgument);
  EXPECT_THROW(ActivationSampler(*reader_, {}, 10, 0, 1000), InvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(Storage, Sampler, ::testing::Bool(), [](const auto& test) {
  return test.param ? "half" : "full";
});

}  // namespace
}  // namespace lexico
