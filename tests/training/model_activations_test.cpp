// The contract of lexico/model_activations.h: what a dump would hold.
#include "lexico/model_activations.h"

#include <gtest/gtest.h>
#include <torch/script.h>

#include <algorithm>

#include "lexico/activation_sampler.h"
#include "lexico/error.h"
#include "lexico/language_model.h"
#include "support/message_of.h"
#include "support/temporary_folder.h"

namespace lexico {
namespace {

// Like none of its neighbours, dependent on everything around it: another batch would be seen.
constexpr const char* kToy = R"(
def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tuple[Tensor, Tensor]:
    n, t = input_ids.shape[0], input_ids.shape[1]
    place = torch.arange(2 * n * 2 * t * 4).reshape([2, n, 2, t, 4]).float()
    keys = torch.sin(place + 0.1 * input_ids[None, :, None, :, None].float() + float(n))
    return keys, torch.log(2.0 + place) + input_ids.float().mean()
)";
constexpr const char* kJson = R"({"contract": "lexico-model 1", "model": "toy", "dtype": "float32",
    "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 4, "vocab": 100, "max_positions": 64,
    "bos_id": null, "add_bos": false, "tokenizer_sha256": null, "methods": ["forward"],
    "rope": {"kind": "default", "layout": "half", "rotary_dim": 4,
             "inverse_frequencies": [1.0, 0.01], "attention_scaling": 1.0}})";
constexpr int kLayers = 2, kHeads = 2, kDim = 4, kBatch = 3;

struct Case {
  bool half;
  KeyStage stored;
};

class ModelActivationsTest : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    torch::jit::Module module("toy");
    module.define(kToy);
    torch::jit::ExtraFilesMap extra{{"lexico.json", kJson}};
    module.save(folder_.file("toy.pt"), extra);
    model_ = std::make_unique<LanguageModel>(folder_.file("toy.pt"), "cpu", 1);
    // Two texts, whose last sequences are shorter.
    std::vector<std::int64_t> lengths(100, 64);
    lengths[40] = 17;
    lengths[99] = 5;
    BatchRule rule(kBatch);
    std::int64_t token = 0;
    for (std::int64_t length : lengths) {
      if (rule.starts_batch(length)) batches_.push_back({token, 0, length});
      ++batches_.back().size;
      token += length;
    }
    info_.model = "toy";
    info_.corpora = {"toy"};
    info_.corpus_documents = {1};
    info_.key_stage = GetParam().stored;
    info_.half = GetParam().half;
    info_.rope = model_->info().rope.to_json();
    info_.num_layers = kLayers;
    info_.kv_heads = kHeads;
    info_.head_dim = kDim;
    info_.num_tokens = token;
    info_.sequence_length = 64;
    info_.batch_sequences = kBatch;
    write_dump();
    reader_ = std::make_unique<ActivationReader>(folder_.file("a.h5"));
    rows_ = std::make_unique<ModelActivations>(
        *model_,
        info_,
        std::vector<std::string>{"toy.pt", "a.txt"},
        batches_,
        [this](std::size_t batch, std::int32_t* out) { ids_of(batch, out); });
  }

  void ids_of(std::size_t batch, std::int32_t* out) const {
    for (std::int64_t i = 0; i < batches_[batch].size * batches_[batch].length; ++i)
      out[i] = static_cast<std::int32_t>((batches_[batch].first_token + i) * 7 % 100);
  }

  void write_dump() {
    ActivationWriter writer(folder_.file("a.h5"), info_);
    CacheBatch cache;
    for (std::size_t i = 0; i < batches_.size(); ++i) {
      const auto [first, size, length] = batches_[i];
      std::vector<std::int32_t> ids(static_cast<std::size_t>(size * length));
      ids_of(i, ids.data());
      model_->forward(ids.data(), size, length, false, cache);
      std::vector<std::int32_t> positions;
      for (std::int64_t row = 0; row < size * kHeads * length; ++row)
        positions.push_back(static_cast<std::int32_t>(row % length));
      const auto rows = static_cast<std::int64_t>(positions.size());
      for (int layer = 0; layer < kLayers && info_.key_stage == KeyStage::kPreRope; ++layer)
        model_->info().rope.undo(
            layer, cache.keys.data() + layer * rows * kDim, kDim, positions.data(), rows);
      writer.append({size, length, cache.keys.data(), cache.values.data(), ids.data(), ids.data()});
    }
    writer.finish();
  }

  test::TemporaryFolder folder_;
  std::unique_ptr<LanguageModel> model_;
  std::vector<ModelActivations::Batch> batches_;
  ActivationInfo info_;
  std::unique_ptr<ActivationReader> reader_;
  std::unique_ptr<ModelActivations> rows_;
};

TEST_P(ModelActivationsTest, RowsAreThoseOfADumpBitForBitInBothStages) {
  EXPECT_EQ(rows_->num_rows(), reader_->num_rows());
  EXPECT_EQ(rows_->batch_starts(), reader_->batch_starts());
  for (KeyStage stage : {KeyStage::kPostRope, KeyStage::kPreRope}) {
    rows_->set_key_stage(stage);
    reader_->set_key_stage(stage);
    for (int layer = 0; layer < kLayers; ++layer)
      for (Kind kind : kBothKinds)
        for (const auto& [first, count] : {std::pair<std::int64_t, std::int64_t>{0, 9000},
                                           {5, 1},
                                           {381, 4001},
                                           {reader_->num_rows() - 13, 13},
                                           {100, 0}}) {
          const auto numbers = static_cast<std::size_t>(count * kDim);
          std::vector<float> a(numbers), b(numbers);
          rows_->read(layer, kind, first, count, a.data());
          reader_->read(layer, kind, first, count, b.data());
          ASSERT_EQ(a, b) << layer << name_of(kind) << first;
          if (!info_.half) continue;
          std::vector<std::uint16_t> x(numbers), y(numbers);
          rows_->read_half(layer, kind, first, count, x.data());
          reader_->read_half(layer, kind, first, count, y.data());
          ASSERT_EQ(x, y) << layer << name_of(kind) << first;
        }
  }
}

TEST_P(ModelActivationsTest, TheSamplerGivesTheSameVectorsAndAsksForEachTokenOnce) {
  const std::int64_t used = 12'000, tokens = used / kHeads;
  std::int64_t last = 0;  // tokens of the batch that the last one used is in
  for (const auto& batch : batches_)
    if (batch.first_token < tokens) last = batch.first_token + batch.size * batch.length;
  const std::vector<TrainTarget> targets = {{0, Kind::kKeys}, {1, Kind::kKeys}, {1, Kind::kValues}};
  for (std::size_t pool_bytes : {std::size_t{60'000}, std::size_t{10'000'000}}) {
    ActivationSampler a(*rows_, targets, used, 1, pool_bytes),
        b(*reader_, targets, used, 1, pool_bytes);
    TrainConfig config;
    config.mean = "head";
    EXPECT_EQ(a.fit_frame(config).of(1, Kind::kKeys).mean,
              b.fit_frame(config).of(1, Kind::kKeys).mean);
    std::vector<float> x(static_cast<std::size_t>(3 * used * kDim)), y(x.size());
    a.seek(0);
    const std::int64_t before = rows_->tokens_run();
    for (int epoch = 0; epoch < 2; ++epoch) {
      a.next(used, x.data());
      b.next(used, y.data());
      ASSERT_EQ(x, y);
    }
    a.pause();
    // All is in memory: means were taken of every row, so that each was there already. Else each is
    // met once in an epoch, the one that is loaded ahead included.
    const std::int64_t most = pool_bytes > 1'000'000 ? 0 : 3 * last;
    EXPECT_LE(rows_->tokens_run() - before, most);
  }
}

TEST_P(ModelActivationsTest, HeldRowsAreComputedOnceAndStayThoseOfTheDump) {
  rows_->hold({{1000, 300}, {5000, 900}}, {{0, Kind::kKeys}, {1, Kind::kValues}});
  std::vector<float> a(900 * kDim), b(a.size());
  const auto check = [&](int layer, Kind kind, std::int64_t first, std::int64_t count) {
    rows_->read(layer, kind, first, count, a.data());
    reader_->read(layer, kind, first, count, b.data());
    EXPECT_EQ(a, b);
  };
  check(0, Kind::kKeys, 1000, 300);
  check(0, Kind::kKeys, 5000, 900);
  const std::int64_t run = rows_->tokens_run();
  check(1, Kind::kValues, 5000, 900);
  check(1, Kind::kValues, 1000, 300);
  check(0, Kind::kKeys, 5100, 200);
  EXPECT_EQ(rows_->tokens_run(), run);
  check(1, Kind::kKeys, 1000, 300);  // not held
  EXPECT_GT(rows_->tokens_run(), run);
}

TEST_P(ModelActivationsTest, WhatIsNotThereIsRefused) {
  float out[kDim];
  EXPECT_THROW(rows_->read(2, Kind::kKeys, 0, 1, out), InvalidArgument);
  EXPECT_THROW(rows_->read(0, Kind::kKeys, rows_->num_rows(), 1, out), InvalidArgument);
  EXPECT_TRUE(rows_->query_second_moment(0).empty());
}

INSTANTIATE_TEST_SUITE_P(Stored,
                         ModelActivationsTest,
                         ::testing::Values(Case{true, KeyStage::kPostRope},
                                           Case{true, KeyStage::kPreRope},
                                           Case{false, KeyStage::kPostRope}),
                         [](const auto& test) {
                           return std::string(test.param.half ? "half_" : "full_") +
                                  name_of(test.param.stored);
                         });

}  // namespace
}  // namespace lexico
