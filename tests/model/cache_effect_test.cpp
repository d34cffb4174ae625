// The contract of lexico/cache_effect.h, and of LanguageModel::step which it stands on.
#include "lexico/cache_effect.h"

#include <gtest/gtest.h>
#include <torch/script.h>
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "lexico/error.h"
#include "lexico/language_model.h"
#include "lexico/vector_coder.h"
#include "support/message_of.h"
#include "support/temporary_folder.h"

namespace lexico {
namespace {

using Sequence = std::vector<std::int32_t>;

// A transformer of 2 layers, 2 heads and head_dim 4 with attention over the past; weights are
// sines.
constexpr const char* kToy = R"(
def table(self, rows: int, columns: int, seed: float) -> Tensor:
    return torch.sin(torch.arange(rows * columns).float() * 12.9898 * seed + seed).reshape([rows, columns])

def step(self, input_ids: Tensor, past_keys: Tensor, past_values: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    b = input_ids.shape[0]
    t = input_ids.shape[1]
    p = past_keys.shape[3]
    positions = torch.arange(p, p + t)
    x = self.table(11, 8, 1.0)[input_ids] + 0.3 * torch.sin(positions[:, None].float() * torch.arange(1, 9).float())
    future = torch.arange(p + t)[None, :] > positions[:, None]
    keys = []
    values = []
    for layer in range(2):
        q = (x @ self.table(8, 8, layer + 1.1)).reshape([b, t, 2, 4]).transpose(1, 2)
        k = (x @ self.table(8, 8, layer + 1.2)).reshape([b, t, 2, 4]).transpose(1, 2)
        v = (x @ self.table(8, 8, layer + 1.3)).reshape([b, t, 2, 4]).transpose(1, 2)
        scores = (q @ torch.cat([past_keys[layer], k], 2).transpose(2, 3)).masked_fill(future, -1e30)
        mixed = torch.softmax(scores, 3) @ torch.cat([past_values[layer], v], 2)
        x = x + 0.5 * mixed.transpose(1, 2).reshape([b, t, 8])
        keys.append(k)
        values.append(v)
    return self.finish(x @ self.table(8, 11, 3.7), input_ids), torch.stack(keys), torch.stack(values)

def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tuple[Tensor, Tensor]:
    empty = torch.zeros([2, input_ids.shape[0], 2, 0, 4])
    logits, keys, values = self.step(input_ids, empty, empty)
    return keys, values
)";
constexpr const char* kPlain = R"(
def finish(self, logits: Tensor, input_ids: Tensor) -> Tensor:
    return logits
)";

class CacheEffectTest : public ::testing::Test {
 protected:
  test::TemporaryFolder folder_;

  /// @param finish  the method that makes logits of logits and ids.
  LanguageModel make(const std::string& finish = kPlain,
                     const std::string& methods = R"(["forward", "step"])") {
    torch::jit::Module module("toy");
    module.define(finish + kToy);
    const std::string json =
        R"({"contract": "lexico-model 1", "model": "toy", "dtype": "float32", "layers": 2,
            "heads": 2, "kv_heads": 2, "head_dim": 4, "vocab": 11, "max_positions": 64,
            "bos_id": 0, "tokenizer_sha256": null, "rope": {"kind": "none"}, "methods": )" +
        methods + "}";
    const std::string path = folder_.file("toy.pt");
    module.save(path, {{"lexico.json", json}});
    return {path, "cpu", 1};
  }
};

#define EXPECT_HAS(text, part) EXPECT_PRED2(contains, text, part)
bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

Sequence sequence(int length, int seed) {
  Sequence ids = {0};
  for (int i = 1; i < length; ++i) ids.push_back((seed + i * (i + seed)) % 11);
  return ids;
}

std::vector<Sequence> some_sequences() {
  return {sequence(9, 1),
          sequence(30, 2),
          sequence(1, 0),
          sequence(9, 3),
          sequence(30, 4),
          sequence(30, 5),
          {},
          sequence(2, 6),
          sequence(17, 7)};
}

void leave(int, Kind, const std::int32_t*, std::int64_t, float*) {}

/// Steps of 1/4, of 1/2 for keys; shifted with layer and position, so that all arguments count.
void coarsen(int layer, Kind kind, const std::int32_t* positions, std::int64_t tokens, float* v) {
  const float step = kind == Kind::kKeys ? 0.5f : 0.25f;
  for (std::int64_t t = 0; t < tokens; ++t)
    for (int i = 0; i < 8; ++i, ++v)
      *v = step * std::round(*v / step) +
           0.01f * static_cast<float>(layer + 1) * static_cast<float>(positions[t] % 5);
}

std::vector<double> log_softmax(const float* logits) {
  double sum = 0;
  for (int i = 0; i < 11; ++i) sum += std::exp(static_cast<double>(logits[i]));
  std::vector<double> out;
  for (int i = 0; i < 11; ++i) out.push_back(static_cast<double>(logits[i]) - std::log(sum));
  return out;
}

/// The same numbers by plain loops: one sequence at a time, the full cache in one step.
CacheEffect plainly(LanguageModel& model,
                    const std::vector<Sequence>& sequences,
                    const CacheSetting& setting) {
  CacheEffect effect;
  std::vector<double> divergences;
  const int window = setting.recent_window;
  const int chunk = setting.chunk > 0 ? setting.chunk : window > 0 ? window : 32;
  for (const Sequence& ids : sequences) {
    const int length = static_cast<int>(ids.size());
    if (length < 2) continue;
    StepResult full, step;
    model.step(ids.data(), 1, length, {}, full);
    std::vector<std::vector<float>> held[2];  // [kind][token]: [layer, head, d]
    int done = 0;                             // tokens that had their turn
    for (int start = 0; start < length; start += chunk) {
      const int count = std::min(chunk, length - start);
      for (; done < start - window; ++done)
        if (done >= setting.sink_tokens)
          for (int layer : {0, 1})
            for (Kind kind : kBothKinds)
              setting.approximate(
                  layer,
                  kind,
                  &done,
                  1,
                  held[static_cast<int>(kind)][static_cast<std::size_t>(done)].data() + layer * 8);
      CacheBatch past;
      past.batch = 1;
      past.length = start;
      for (int kind : {0, 1})
        for (std::size_t row = 0; row < 4; ++row)  // layer, head
          for (const std::vector<float>& token : held[kind])
            (kind == 0 ? past.keys : past.values)
                .insert((kind == 0 ? past.keys : past.values).end(),
                        token.begin() + static_cast<std::ptrdiff_t>(row * 4),
                        token.begin() + static_cast<std::ptrdiff_t>(row * 4 + 4));
      model.step(ids.data() + start, 1, count, past, step);
      for (int t = 0; t < count; ++t) {
        for (int kind : {0, 1}) {
          const std::vector<float>& from = kind == 0 ? step.cache.keys : step.cache.values;
          std::vector<float> token;
          for (int row = 0; row < 4; ++row)
            token.insert(token.end(),
                         from.begin() + (row * count + t) * 4,
                         from.begin() + (row * count + t) * 4 + 4);
          held[kind].push_back(token);
        }
        if (start + t + 1 == length) continue;
        const auto p = log_softmax(full.logits.data() + (start + t) * 11);
        const auto q = log_softmax(step.logits.data() + t * 11);
        const auto target = static_cast<std::size_t>(ids[static_cast<std::size_t>(start + t + 1)]);
        effect.full_nll -= p[target];
        effect.compressed_nll -= q[target];
        double divergence = 0;
        for (std::size_t i = 0; i < 11; ++i) divergence += std::exp(p[i]) * (p[i] - q[i]);
        divergences.push_back(divergence);
        effect.mean_kl += divergence;
      }
    }
  }
  const auto tokens = static_cast<double>(divergences.size());
  effect.tokens = static_cast<std::int64_t>(divergences.size());
  effect.full_nll /= tokens;
  effect.compressed_nll /= tokens;
  effect.mean_kl /= tokens;
  std::sort(divergences.begin(), divergences.end());
  const double place = 0.99 * (tokens - 1);
  const auto below = static_cast<std::size_t>(place);
  effect.p99_kl = divergences[below] + (place - static_cast<double>(below)) *
                                           (divergences[below + 1] - divergences[below]);
  return effect;
}

// {window, sinks, chunk}: the usual ones; token by token; no window; a window nothing leaves;
// chunks that fit neither window nor length; more sinks than tokens.
std::vector<CacheSetting> all_kinds_of_settings(const ApproximateVectors& approximate) {
  return {{approximate, 4, 0, 0},
          {approximate, 4, 2, 1},
          {approximate, 0, 0, 1},
          {approximate, 0, 3, 0},
          {approximate, 100, 0, 0},
          {approximate, 3, 0, 7},
          {approximate, 5, 1, 4},
          {approximate, 5, 100, 4}};
}

TEST_F(CacheEffectTest, ExactVectorsChangeNothing) {
  LanguageModel model = make();
  for (const CacheEffect& effect :
       measure_cache_effect(model, some_sequences(), all_kinds_of_settings(leave))) {
    EXPECT_EQ(effect.tokens, 8 + 29 + 8 + 29 + 29 + 1 + 16);
    EXPECT_NEAR(effect.mean_kl, 0, 1e-9);
    EXPECT_NEAR(effect.p99_kl, 0, 1e-9);
    EXPECT_NEAR(effect.nll_increase(), 0, 1e-9);
    EXPECT_GT(effect.full_perplexity(), 2);
  }
}

TEST_F(CacheEffectTest, AgreesWithPlainLoopsHoweverTheWorkIsSplit) {
  LanguageModel model = make();
  const auto settings = all_kinds_of_settings(coarsen);
  std::vector<CacheEffect> want;
  for (const CacheSetting& setting : settings)
    want.push_back(plainly(model, some_sequences(), setting));
  EXPECT_GT(want[2].mean_kl, 1e-3);
  EXPECT_GT(want[2].mean_kl, 1.5 * want[1].mean_kl);  // no window: worse
  CacheEffectOptions tight, two, roomy;
  tight.memory_bytes = 1;
  two.sequences_at_once = 2;
  for (const CacheEffectOptions& options : {tight, two, roomy}) {
    const auto got = measure_cache_effect(model, some_sequences(), settings, options);
    ASSERT_EQ(got.size(), want.size());
    for (std::size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].tokens, want[i].tokens) << i;
      EXPECT_NEAR(got[i].full_nll, want[i].full_nll, 1e-6) << i;
      EXPECT_NEAR(got[i].compressed_nll, want[i].compressed_nll, 1e-5) << i;
      EXPECT_NEAR(got[i].mean_kl, want[i].mean_kl, 1e-5) << i;
      EXPECT_NEAR(got[i].p99_kl, want[i].p99_kl, 1e-4) << i;
      EXPECT_DOUBLE_EQ(got[i].compressed_perplexity(), std::exp(got[i].compressed_nll));
    }
  }
}

TEST_F(CacheEffectTest, EveryTokenThatLeavesTheWindowIsApproximatedOnce) {
  LanguageModel model = make();
  std::map<std::pair<int, Kind>, std::vector<std::int32_t>> seen;
  const CacheSetting setting{
      [&](int layer, Kind kind, const std::int32_t* positions, std::int64_t tokens, float* v) {
        auto& list = seen[{layer, kind}];
        list.insert(list.end(), positions, positions + tokens);
        for (std::int64_t i = 0; i < tokens * 8; ++i) {
          EXPECT_NE(v[i], 7.5f);  // it was not here before
          v[i] = 7.5f;
        }
      },
      6,
      2,
      5};
  measure_cache_effect(model, {sequence(30, 1)}, {setting});
  // The last chunk starts at 25 and sees tokens before 25 - 6 compressed, but for the sinks 0
  // and 1.
  std::vector<std::int32_t> want;
  for (std::int32_t position = 2; position < 19; ++position) want.push_back(position);
  EXPECT_EQ(seen.size(), 4u);
  for (const auto& [where, positions] : seen) EXPECT_EQ(positions, want);

  seen.clear();  // side by side the sequences follow each other
  measure_cache_effect(model, {sequence(12, 1), sequence(12, 2)}, {setting});
  EXPECT_EQ((seen[{1, Kind::kValues}]), (std::vector<std::int32_t>{2, 3, 2, 3}));
}

/// Random atoms for both layers of the toy, in the published format with two atoms a vector.
DictionarySet toy_dictionaries() {
  DictionarySet set;
  for (int layer : {0, 1})
    for (Kind kind : kBothKinds) {
      Dictionary d{layer, kind, 12, 4, {}};
      for (int i = 0; i < 48; ++i)
        d.atoms.push_back(std::sin(static_cast<float>(i * (7 * layer + 3)) +
                                   (kind == Kind::kKeys ? 0.5f : 1.5f)));
      normalize_atoms(d.atoms, 12, 4);
      d.format.coding = CodeFormat::Coding::kFp8Int16;
      d.format.max_atoms = 2;
      set.dictionaries.push_back(d);
    }
  return set;
}

CacheShape toy_shape() {
  CacheShape shape;
  shape.layers = 2;
  shape.kv_heads = 2;
  shape.head_dim = 4;
  shape.max_positions = 64;
  return shape;
}

CompressedCache toy_cache(int window, int sinks, int compress_chunk, float threshold = 0) {
  CacheOptions options;
  options.recent_window = window;
  options.sink_tokens = sinks;
  options.compress_chunk = compress_chunk;
  options.page_tokens = 64;
  options.adaptive_threshold = threshold;
  return {toy_dictionaries(), toy_shape(), options};
}

TEST_F(CacheEffectTest, ACompressedCacheDoesWhatItsCoderDoesAndSaysItsBytes) {
  LanguageModel model = make();
  std::map<std::pair<int, Kind>, std::shared_ptr<VectorCoder>> coders;
  for (const Dictionary& d : toy_dictionaries().dictionaries)
    coders[{d.layer, d.kind}] = dictionary_coder(d);
  const ApproximateVectors code =
      [&](int layer, Kind kind, const std::int32_t*, std::int64_t tokens, float* v) {
        coders[{layer, kind}]->reconstruct(v, 2 * tokens, v);
      };
  std::vector<CacheSetting> plain, compressed;
  std::vector<std::size_t> bytes;
  // {window, sinks, chunk, compress_chunk}; with chunks of 1 and 29 the last token comes alone.
  for (const auto& [window, sinks, chunk, compress_chunk] :
       std::vector<std::array<int, 4>>{{4, 0, 4, 1},
                                       {4, 2, 1, 1},
                                       {0, 0, 1, 1},
                                       {0, 3, 29, 1},
                                       {5, 1, 4, 1},
                                       {4, 1, 1, 3},
                                       {3, 0, 7, 12},
                                       {100, 0, 8, 1}}) {
    plain.push_back({code, window, sinks, chunk, compress_chunk, true});
    CacheSetting setting;
    setting.chunk = chunk;
    setting.compressed = [=] { return toy_cache(window, sinks, compress_chunk); };
    compressed.push_back(setting);
    bytes.push_back(0);
    const CompressedCache cache = toy_cache(window, sinks, compress_chunk);
    for (const Sequence& ids : some_sequences())
      if (ids.size() > 1) bytes.back() += cache.bytes_for(static_cast<std::int64_t>(ids.size()));
  }
  CacheEffectOptions two, tight;
  two.sequences_at_once = 2;
  tight.memory_bytes = 1;
  for (const CacheEffectOptions& options : {CacheEffectOptions{}, two, tight}) {
    const auto want = measure_cache_effect(model, some_sequences(), plain, options);
    const auto got = measure_cache_effect(model, some_sequences(), compressed, options);
    EXPECT_GT(want[2].mean_kl, 1e-3);
    for (std::size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].tokens, want[i].tokens) << i;
      EXPECT_NEAR(got[i].full_nll, want[i].full_nll, 1e-9) << i;
      EXPECT_NEAR(got[i].compressed_nll, want[i].compressed_nll, 1e-7) << i;
      EXPECT_NEAR(got[i].mean_kl, want[i].mean_kl, 1e-7) << i;
      EXPECT_NEAR(got[i].p99_kl, want[i].p99_kl, 1e-6) << i;
      if (i < 5 || i == 7) {
        EXPECT_EQ(got[i].bytes, bytes[i]) << i;
      }
      EXPECT_LE(got[i].bytes, bytes[i]) << i;  // tokens came piece by piece
      EXPECT_EQ(got[i].own_atoms, 0);
      EXPECT_EQ(want[i].bytes, 0u);
    }
  }
}

TEST_F(CacheEffectTest, AnAdaptiveCacheIsCloserAndTakesItsOwnAtoms) {
  LanguageModel model = make();
  CacheSetting fixed, adaptive;
  fixed.compressed = [] { return toy_cache(2, 0, 1); };
  adaptive.compressed = [] { return toy_cache(2, 0, 1, 0.3f); };
  fixed.chunk = adaptive.chunk = 4;
  const auto effects = measure_cache_effect(model, {sequence(40, 2)}, {fixed, adaptive});
  EXPECT_LT(effects[1].mean_kl, effects[0].mean_kl);
  EXPECT_GT(effects[1].own_atoms, 0);
  EXPECT_GT(effects[1].bytes, effects[0].bytes);
}

TEST_F(CacheEffectTest, ACacheOfAnotherShapeIsNamed) {
  LanguageModel model = make();
  CacheSetting setting;
  setting.compressed = [] {
    CacheShape shape = toy_shape();
    shape.kv_heads = 3;
    return CompressedCache(toy_dictionaries(), shape, {});
  };
  EXPECT_HAS(test::message_of<InvalidArgument>(
                 [&] { measure_cache_effect(model, {sequence(5, 1)}, {setting}); }),
             "a cache of 2 layers, 3 KV heads and head_dim 4, the model has 2, 2 and 4");
  setting.approximate = leave;
  EXPECT_HAS(test::message_of<InvalidArgument>(
                 [&] { measure_cache_effect(model, {sequence(5, 1)}, {setting}); }),
             "setting 0: both approximate and compressed");
}

TEST_F(CacheEffectTest, WithNothingToMeasureThereIsNoNumber) {
  LanguageModel model = make();
  for (const auto& sequences : {std::vector<Sequence>{}, {{}, {3}}}) {
    const auto effects = measure_cache_effect(model, sequences, {{leave}});
    ASSERT_EQ(effects.size(), 1u);
    EXPECT_EQ(effects[0].tokens, 0);
    EXPECT_TRUE(std::isnan(effects[0].mean_kl));
    EXPECT_TRUE(std::isnan(effects[0].p99_kl));
    EXPECT_TRUE(std::isnan(effects[0].full_perplexity()));
  }
  EXPECT_TRUE(measure_cache_effect(model, {sequence(5, 1)}, {}).empty());
}

TEST_F(CacheEffectTest, AModelWithoutStepIsRefusedWithAdvice) {
  LanguageModel model = make(kPlain, R"(["forward"])");
  EXPECT_FALSE(model.info().has_step);
  const std::string message =
      test::message_of<IoError>([&] { measure_cache_effect(model, {sequence(5, 1)}, {{leave}}); });
  EXPECT_HAS(message, "toy.pt: the model has no method 'step'");
  EXPECT_HAS(message, "tools/export_model.py");
  EXPECT_HAS(test::message_of<IoError>([&] { make(kPlain, R"(["forward", "queries"])"); }),
             "'queries', but the model has none");
}

TEST_F(CacheEffectTest, ANanOfTheCallbackIsNamedByItsPlace) {
  LanguageModel model = make();
  const auto refused = [&](int at_layer, Kind at_kind, float what) {
    const CacheSetting setting{[=](int layer,
                                   Kind kind,
                                   const std::int32_t* positions,
                                   std::int64_t tokens,
                                   float* vectors) {
                                 for (std::int64_t t = 0; t < tokens; ++t)
                                   if (layer == at_layer && kind == at_kind && positions[t] == 13)
                                     vectors[t * 8 + 6] = what;
                               },
                               4};
    return test::message_of<InvalidArgument>([&] {
      measure_cache_effect(model, {sequence(9, 1), sequence(30, 2), sequence(30, 3)}, {setting});
    });
  };
  for (float what :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
    EXPECT_EQ(refused(1, Kind::kValues, what),
              "approximate wrote a NaN or Inf in the values of layer 1, position 13 of sequence 1, "
              "KV head 1, component 2");
  EXPECT_HAS(refused(0, Kind::kKeys, NAN), "keys of layer 0, position 13");
}

TEST_F(CacheEffectTest, ANanOfTheModelIsTheModels) {
  LanguageModel model = make(R"(
def finish(self, logits: Tensor, input_ids: Tensor) -> Tensor:
    return torch.log(0.0 * logits - 1.0)
)");
  EXPECT_HAS(
      test::message_of<IoError>([&] { measure_cache_effect(model, {sequence(5, 1)}, {{leave}}); }),
      "toy.pt: the model's logits hold a NaN, read with the full cache");
  LanguageModel narrow = make(R"(
def finish(self, logits: Tensor, input_ids: Tensor) -> Tensor:
    return logits[:, :, 1:]
)");
  EXPECT_HAS(
      test::message_of<IoError>([&] { measure_cache_effect(narrow, {sequence(5, 1)}, {{leave}}); }),
      "logits have shape [1, 5, 10], its lexico.json promises [1, 5, 11]");
}

TEST_F(CacheEffectTest, TokensTheModelRulesOutAddNothing) {
  LanguageModel model = make(R"(
def finish(self, logits: Tensor, input_ids: Tensor) -> Tensor:
    return torch.cat([logits[:, :, :10], torch.log(0.0 * logits[:, :, 10:])], 2)
)");
  std::vector<Sequence> sequences;
  for (int seed : {1, 2, 3}) {
    sequences.push_back(sequence(20, seed));
    for (std::int32_t& id : sequences.back()) id %= 10;
  }
  const auto effects = measure_cache_effect(model, sequences, {{coarsen, 2}});
  EXPECT_GT(effects[0].mean_kl, 0);
  EXPECT_TRUE(std::isfinite(effects[0].p99_kl));
}

TEST_F(CacheEffectTest, SettingsAndIdsOutOfBoundsAreNamed) {
  LanguageModel model = make();
  const auto refused = [&](const Sequence& ids, const CacheSetting& setting) {
    return test::message_of<InvalidArgument>([&] {
      measure_cache_effect(model, {sequence(5, 1), ids}, {{leave}, setting});
    });
  };
  EXPECT_HAS(refused({1, 2, 11}, {leave}),
             "token id 11 of sequence 1, position 2: must be in [0, 11)");
  EXPECT_HAS(refused({-1}, {leave}), "token id -1 of sequence 1");
  EXPECT_HAS(refused(Sequence(65, 1), {leave}), "length is 65, the model's max_positions is 64");
  EXPECT_HAS(refused({1, 2}, {leave, -1}), "setting 1: recent_window is -1, must be at least 0");
  EXPECT_HAS(refused({1, 2}, {leave, 1, -2}), "setting 1: sink_tokens is -2");
  EXPECT_HAS(refused({1, 2}, {leave, 1, 1, -3}), "setting 1: chunk is -3");
  EXPECT_HAS(refused({1, 2}, {leave, 1, 1, 1, 0}), "setting 1: compress_chunk is 0");
  EXPECT_HAS(refused({1, 2}, {}), "setting 1: approximate is empty");
}

TEST_F(CacheEffectTest, ProgressRisesToOneAndCanEndIt) {
  LanguageModel model = make();
  std::vector<double> parts;
  CacheEffectOptions options;
  options.memory_bytes = 1;
  options.on_progress = [&](double part) {
    parts.push_back(part);
    return true;
  };
  measure_cache_effect(model, some_sequences(), all_kinds_of_settings(leave), options);
  EXPECT_TRUE(std::is_sorted(parts.begin(), parts.end()));
  EXPECT_EQ(std::set<double>(parts.begin(), parts.end()).size(), parts.size());
  EXPECT_NEAR(parts.back(), 1.0, 1e-12);
  options.on_progress = [](double part) { return part < 0.5; };
  EXPECT_THROW(measure_cache_effect(model, some_sequences(), all_kinds_of_settings(leave), options),
               Interrupted);
}

TEST_F(CacheEffectTest, WhatTheCallbackThrowsPassesThrough) {
  LanguageModel model = make();
  const CacheSetting setting{
      [](int, Kind, const std::int32_t*, std::int64_t, float*) { throw std::out_of_range("mine"); },
      2};
  EXPECT_EQ(test::message_of<std::out_of_range>(
                [&] { measure_cache_effect(model, {sequence(9, 1)}, {setting}); }),
            "mine");
}

TEST_F(CacheEffectTest, StepAfterAPastGivesWhatOnePassGives) {
  LanguageModel model = make();
  const Sequence ids = sequence(12, 3);
  StepResult whole, first, second;
  CacheBatch cache;
  model.step(ids.data(), 2, 6, {}, whole);  // 2 sequences of 6
  model.forward(ids.data(), 2, 6, false, cache);
  EXPECT_EQ(whole.cache.keys, cache.keys);
  EXPECT_EQ(whole.cache.values, cache.values);
  EXPECT_EQ(whole.cache.length, 6);
  EXPECT_EQ(whole.logits.size(), 2u * 6 * 11);
  const Sequence head = {ids[0], ids[1], ids[2], ids[3], ids[6], ids[7], ids[8], ids[9]};
  const Sequence tail = {ids[4], ids[5], ids[10], ids[11]};
  model.step(head.data(), 2, 4, {}, first);
  model.step(tail.data(), 2, 2, first.cache, second);
  for (std::size_t i = 0; i < 2 * 2 * 11; ++i)
    EXPECT_NEAR(second.logits[i], whole.logits[i + (i / 22 + 1) * 44], 1e-5) << i;
}

TEST_F(CacheEffectTest, StepRefusesAPastOfAnotherShape) {
  LanguageModel model = make();
  const Sequence ids(64, 1);
  StepResult out;
  model.step(ids.data(), 1, 60, {}, out);
  const CacheBatch past = out.cache;
  const auto refused = [&](std::int64_t batch, std::int64_t length, const CacheBatch& with) {
    return test::message_of<InvalidArgument>(
        [&] { model.step(ids.data(), batch, length, with, out); });
  };
  EXPECT_HAS(refused(1, 5, past), "a past of 60 and 5 new tokens: the model's max_positions is 64");
  EXPECT_HAS(refused(2, 2, past), "the past's keys are 960 numbers of 1 sequences, must be 1920");
  CacheBatch half = past;
  half.values.resize(10);
  EXPECT_HAS(refused(1, 1, half), "the past's values are 10 numbers");
  model.step(ids.data(), 1, 4, past, out);  // up to the last position
}

}  // namespace
}  // namespace lexico
