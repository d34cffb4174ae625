// The contract of lexico/activation_sampler.h.
#include "lexico/activation_sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "lexico/activations.h"
#include "lexico/error.h"
#include "support/message_of.h"
#include "support/temporary_folder.h"

namespace lexico {
namespace {

constexpr int kLayers = 2, kHeads = 2, kDim = 4;

/// A file whose vectors say where they stand: (row / 1000, row % 1000, layer, kind).
void write_numbered(const std::string& path,
                    std::int64_t tokens,
                    bool half,
                    const std::string& rope = {}) {
  ActivationInfo info;
  info.model = "numbers";
  info.corpora = {"numbers"};
  info.corpus_documents = {1};
  info.half = half;
  info.rope = rope;
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
  // Two of the four datasets: half of what a pool of all layers may take, but two chunks at least.
  const std::size_t row_bytes = 2 * kDim * (GetParam() ? 2 : 4);
  EXPECT_EQ(sampler(1, 1000).pool_bytes(), 2 * 2048 * row_bytes);
  EXPECT_EQ(sampler(1, 100'000'000).pool_bytes(), kUsed * row_bytes);  // no more than there is
}

TEST_P(Sampler, WhatDoesNotFitTheFileIsRefused) {
  EXPECT_THROW(ActivationSampler(*reader_, {{2, Kind::kKeys}}, 10, 0, 1000), InvalidArgument);
  EXPECT_THROW(ActivationSampler(*reader_, {{0, Kind::kKeys}}, 10001, 0, 1000), InvalidArgument);
  EXPECT_THROW(ActivationSampler(*reader_, {{0, Kind::kKeys}}, 0, 0, 1000), InvalidArgument);
  EXPECT_THROW(ActivationSampler(*reader_, {}, 10, 0, 1000), InvalidArgument);
}

TEST_P(Sampler, HeadsGetTheirRowsOfTheSameTokens) {
  std::vector<TrainTarget> targets;
  for (int head : {0, 1}) targets.push_back({1, Kind::kKeys, head});
  targets.push_back({0, Kind::kValues, 1});
  ActivationSampler s(*reader_, targets, kUsed, 1, 100'000);
  std::vector<float> batch(3 * kUsed / 2 * kDim);
  s.next(kUsed / 2, batch.data());
  std::vector<std::int64_t> rows[3];
  for (int t = 0; t < 3; ++t) rows[t] = rows_of(batch.data() + t * kUsed / 2 * kDim, kUsed / 2);
  EXPECT_EQ(std::set(rows[0].begin(), rows[0].end()).size(), static_cast<std::size_t>(kUsed / 2));
  EXPECT_EQ(rows[1], rows[2]);
  for (std::size_t i = 0; i < rows[0].size(); ++i) {
    ASSERT_EQ(rows[0][i] % kHeads, 0);
    ASSERT_EQ(rows[1][i], rows[0][i] + 1);
  }
  s.seek(4321);
  std::vector<float> one(3 * kDim);
  s.next(1, one.data());
  EXPECT_EQ(rows_of(one.data(), 1)[0], rows[0][4321]);
  EXPECT_THROW(ActivationSampler(*reader_, {{0, Kind::kKeys, 2}}, kUsed, 1, 1000), InvalidArgument);
  EXPECT_THROW(ActivationSampler(*reader_, {{0, Kind::kKeys, 0}, {0, Kind::kKeys}}, kUsed, 1, 1000),
               InvalidArgument);
}

TEST_P(Sampler, GroupsOfLayersTakeTurns) {
  ActivationSampler s(*reader_, {{0, Kind::kKeys, -1, {1}}}, kUsed, 1, 100'000);
  std::vector<float> batch(2 * kUsed * kDim);
  s.next(2 * kUsed, batch.data());
  std::set<std::pair<std::int64_t, float>> met;  // row and layer
  for (std::int64_t i = 0; i < 2 * kUsed; ++i)
    met.insert(
        {rows_of(batch.data() + i * kDim, 1)[0], batch[static_cast<std::size_t>(i * kDim + 2)]});
  // Orders differ from epoch to epoch: about half the rows come from both layers.
  EXPECT_GT(met.size(), static_cast<std::size_t>(kUsed * 4 / 3));
  double second = 0;
  for (std::int64_t i = 0; i < kUsed; ++i) second += batch[static_cast<std::size_t>(i * kDim + 2)];
  EXPECT_NEAR(second / kUsed, 0.5, 0.01);
}

TEST_P(Sampler, FramesAreFittedAndAppliedAlikeEveryTime) {
  const std::vector<TrainTarget> targets = {{1, Kind::kKeys}, {0, Kind::kValues}};
  const auto make = [&] { return ActivationSampler(*reader_, targets, kUsed, 1, 400'000); };
  ActivationSampler plain = make(), framed = make(), again = make();
  TrainConfig config;
  EXPECT_TRUE(plain.fit_frame(config).changes_nothing());  // auto
  config.mean = "head";
  config.scale = "unit";
  const TrainingFrame frame = framed.fit_frame(config);
  const Transform transform = frame.of(1, Kind::kKeys);
  EXPECT_EQ(transform.mean, again.fit_frame(config).of(1, Kind::kKeys).mean);
  EXPECT_TRUE(transform.unit_scale);
  // Of the numbers that say where a row stands.
  EXPECT_NEAR(transform.mean[0], 4, 0.5);
  EXPECT_NEAR(transform.mean[1], 499, 25);
  EXPECT_EQ(transform.mean[2], 1.0f);
  const Transform second = frame.of(1, Kind::kKeys, 1);
  EXPECT_EQ(second.heads, 1);
  EXPECT_EQ(second.mean, std::vector<float>(transform.mean.begin() + kDim, transform.mean.end()));
  EXPECT_TRUE(frame.of(0, Kind::kKeys).is_identity());

  std::vector<float> a(2 * 50 * kDim), b(a.size());
  plain.seek(100);
  framed.seek(100);
  plain.next(50, a.data());
  framed.next(50, b.data());
  for (std::size_t i = 0; i < 100; ++i) {
    const float *x = a.data() + i * kDim, *z = b.data() + i * kDim;
    const Kind kind = i < 50 ? Kind::kKeys : Kind::kValues;
    const int layer = i < 50 ? 1 : 0, row = static_cast<int>(rows_of(x, 1)[0]);
    std::vector<float> want(x, x + kDim);
    frame.of(layer, kind).forward(want.data(), 1, kDim, row % kHeads);
    double energy = 0;
    for (float value : want) energy += static_cast<double>(value) * value;
    for (int d = 0; d < kDim; ++d)
      EXPECT_NEAR(z[d], want[static_cast<std::size_t>(d)] / std::sqrt(energy), 1e-5) << i;
  }
}

TEST_P(Sampler, FramesThatTheDataCannotGiveAreRefused) {
  TrainConfig config;
  config.metric = "queries";
  const auto message = [&](Kind kind) {
    return test::message_of<InvalidArgument>([&] {
      ActivationSampler(*reader_, {{1, kind}}, kUsed, 1, 1000).fit_frame(config);
    });
  };
  EXPECT_NE(message(Kind::kKeys).find("needs pre_rope keys"), std::string::npos);
  config.metric = "none";
  config.position_offsets = 100;
  EXPECT_NE(message(Kind::kKeys).find("need the model's rotation"), std::string::npos);
  ActivationSampler values(*reader_, {{0, Kind::kValues}}, kUsed, 1, 1000);
  EXPECT_TRUE(values.fit_frame(config).changes_nothing());
}

TEST_P(Sampler, WhatARunTakesDecidesWhatIsLoadedAndTakingMoreIsNoError) {
  const auto make = [&](std::int64_t vectors) {
    return ActivationSampler(*reader_, {{1, Kind::kKeys}}, kUsed, 1, 1'000'000, vectors);
  };
  EXPECT_EQ(make(0).rows_to_load(), 0);
  EXPECT_EQ(make(2000).rows_to_load(), 2048);
  EXPECT_EQ(make(3 * kUsed).rows_to_load(), kUsed);  // held in memory from the first epoch on
  ActivationSampler s = make(1000);
  std::vector<float> batch(2 * kUsed * kDim);
  s.next(2 * kUsed, batch.data());
  for (int epoch : {0, 1}) {
    const auto rows = rows_of(batch.data() + epoch * kUsed * kDim, kUsed);
    EXPECT_EQ(std::set(rows.begin(), rows.end()).size(), static_cast<std::size_t>(kUsed));
  }
}

TEST(TrainingFrame, PositionOffsetsTurnKeysAndKeepTheirLength) {
  const test::TemporaryFolder folder;
  Rope rope;
  rope.kind = "default";
  rope.rotary_dim = kDim;
  rope.inverse_frequencies = {1.0, 0.01};
  write_numbered(folder.file("a.h5"), 500, false, rope.to_json());
  ActivationReader reader(folder.file("a.h5"));
  TrainConfig config;
  config.position_offsets = 1000;
  const std::vector<TrainTarget> targets = {{1, Kind::kKeys}, {1, Kind::kValues}};
  ActivationSampler moved(reader, targets, 1000, 1, 1 << 20),
      still(reader, targets, 1000, 1, 1 << 20);
  moved.fit_frame(config);
  std::vector<float> a(2 * 1000 * kDim), b(a.size());
  moved.next(1000, a.data());
  still.next(1000, b.data());
  int turned = 0;
  for (std::size_t i = 0; i < 1000; ++i) {
    const float *x = a.data() + i * kDim, *y = b.data() + i * kDim;
    for (int pair : {0, 1})  // "half": dims i and i + 2
      ASSERT_NEAR(std::hypot(x[pair], x[pair + 2]), std::hypot(y[pair], y[pair + 2]), 1e-2);
    turned += std::abs(x[1] - y[1]) > 1e-3f;
  }
  EXPECT_GT(turned, 900);
  EXPECT_TRUE(std::equal(a.begin() + 1000 * kDim, a.end(), b.begin() + 1000 * kDim));  // values
}

INSTANTIATE_TEST_SUITE_P(Storage, Sampler, ::testing::Bool(), [](const auto& test) {
  return test.param ? "half" : "full";
});

}  // namespace
}  // namespace lexico
