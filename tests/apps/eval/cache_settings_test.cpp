// Which caches lexico-eval measures: their bytes, lists and budgets.
#include "lexico-eval/cache_settings.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "lexico/error.h"
#include "lexico/fit_codes.h"
#include "support/message_of.h"

namespace lexico::apps {
namespace {

constexpr int kLayers = 2, kHeads = 2, kDim = 16;

ModelInfo model() {
  ModelInfo info;
  info.layers = kLayers;
  info.heads = 2 * kHeads;
  info.kv_heads = kHeads;
  info.head_dim = kDim;
  info.max_positions = 4096;
  return info;
}

std::vector<float> numbers(std::size_t count, float seed) {
  std::vector<float> all(count);
  for (std::size_t i = 0; i < count; ++i)
    all[i] = std::sin(static_cast<float>(i) * 12.9898f + seed) * std::cos(static_cast<float>(i));
  return all;
}

/// @param per_head  a dictionary for each KV head in the last layer.
Contender contender(CodeFormat::Coding coding, int num_atoms = 40, bool per_head = false) {
  Contender made;
  made.coder.name = "d";
  made.coder.num_atoms = num_atoms;
  for (int layer = 0; layer < kLayers; ++layer)
    for (const Kind kind : kBothKinds)
      for (int head = 0; head < (per_head && layer + 1 == kLayers ? kHeads : 1); ++head) {
        Dictionary d{layer, kind, num_atoms, kDim, {}};
        d.head = per_head && layer + 1 == kLayers ? head : Dictionary::kAllHeads;
        d.atoms = numbers(static_cast<std::size_t>(num_atoms) * kDim,
                          static_cast<float>(7 * layer + 3 * head) + (kind == Kind::kKeys ? 0 : 1));
        normalize_atoms(d.atoms, num_atoms, kDim);
        if (coding == CodeFormat::Coding::kPacked) {
          CodeFitOptions fit;
          fit.max_atoms = 3;
          fit.residual_bits = layer == 0 ? 12 : 0;
          const std::vector<float> vectors = numbers(600 * kDim, 5);
          d.format = fit_codes(d, vectors.data(), 600, d.head < 0 ? kHeads : 1, fit);
        } else {
          d.format.coding = coding;
          d.format.max_atoms = coding == CodeFormat::Coding::kExact ? 0 : 4;
        }
        made.set.dictionaries.push_back(std::move(d));
      }
  return made;
}

/// What rates.cpp makes of a contender: its own packed format, and the published one at `atoms`.
std::vector<RateCoder> coders_of(const Contender& of, const std::vector<int>& atoms) {
  std::vector<RateCoder> coders;
  for (const Dictionary& d : of.set.dictionaries) {
    const auto add = [&](const std::string& name, const CodeFormat& format, const char* coding) {
      Dictionary coded = d;
      coded.format = format;
      coders.push_back({name,
                        d.layer,
                        d.kind,
                        of.set.key_stage,
                        d.head,
                        dictionary_coder(coded),
                        &d,
                        std::make_shared<const CodeFormat>(format),
                        coding});
    };
    if (d.format.coding == CodeFormat::Coding::kPacked) add("d", d.format, "file");
    for (const int s : atoms) {
      CodeFormat published;
      published.coding = CodeFormat::Coding::kFp8Int16;
      published.max_atoms = s;
      add("d, fp8-int16", published, "fp8-int16");
    }
  }
  for (int layer = 0; layer < kLayers; ++layer)
    for (const Kind kind : kBothKinds)
      for (const int bits : {2, 3, 4})
        coders.push_back({"min/max",
                          layer,
                          kind,
                          of.set.key_stage,
                          Dictionary::kAllHeads,
                          min_max_coder(kDim, bits)});
  return coders;
}

const std::vector<TextLengths> kTexts{{"text", {300, 300, 120}}, {"other", {200}}};

TEST(CacheSettings, BytesAreThoseOfTheCache) {
  for (const auto coding : {CodeFormat::Coding::kFp8Int16, CodeFormat::Coding::kPacked})
    for (const bool per_head : {false, true})
      for (const double threshold : {0.0, 0.5}) {
        const Contender of = contender(coding, 40, per_head);
        EvalConfig config;
        config.recent_window = {0, 7, 64};
        config.sink_tokens = {0, 5};
        config.adaptive_threshold = {threshold};
        config.adaptive_atoms = 30;  // 40 + 30 atoms: indices of one bit more
        config.compress_chunk = 3;
        std::vector<std::string> notes;
        const std::vector<CacheSettings> all =
            listed_settings(config, coders_of(of, {2, 8}), model(), kTexts, notes);
        int dictionaries = 0;
        for (const CacheSettings& one : all) {
          if (!one.by_dictionaries()) continue;
          ++dictionaries;
          const CompressedCache cache = make_cache(one, model(), {});
          for (const std::int64_t tokens : {0, 1, 60, 66, 67, 72, 128, 1000})
            EXPECT_EQ(cache_bytes(one, model(), tokens), cache.bytes_for(tokens))
                << one.coder << " " << exact_part(one) << " " << tokens;
        }
        EXPECT_EQ(dictionaries, 6 * (coding == CodeFormat::Coding::kPacked ? 3 : 2));
      }
}

TEST(CacheSettings, AListHasEveryCombinationAndARotationAtEqualBits) {
  const Contender of = contender(CodeFormat::Coding::kExact, 64);
  EvalConfig config;
  config.recent_window = {8, 32};
  config.sink_tokens = {0, 4};
  config.adaptive_threshold = {0, 0.3};
  std::vector<std::string> notes;
  const auto all = listed_settings(config, coders_of(of, {2, 4}), model(), kTexts, notes);
  std::map<std::string, int> lines;
  std::set<double> dictionary_bits, rotation_bits;
  for (const CacheSettings& one : all) {
    ++lines[one.coder + (one.adaptive_threshold > 0 ? "+" : "")];
    if (one.adaptive_threshold > 0) continue;
    if (one.by_dictionaries()) dictionary_bits.insert(one.mean_bits(Kind::kKeys, model()));
    if (one.coder == "rotation + Lloyd-Max")
      rotation_bits.insert(one.mean_bits(Kind::kKeys, model()));
  }
  EXPECT_EQ(lines,
            (std::map<std::string, int>{{"d, fp8-int16", 8},
                                        {"d, fp8-int16+", 8},
                                        {"min/max", 12},
                                        {"rotation + Lloyd-Max", 8}}));
  EXPECT_EQ(dictionary_bits, (std::set<double>{28, 56}));
  EXPECT_EQ(rotation_bits, dictionary_bits);
  EXPECT_TRUE(notes.empty());
  config.adaptive_threshold = {0};
  config.coding = {"file"};  // what such a dictionary has not
  for (const CacheSettings& one :
       listed_settings(config, coders_of(of, {2}), model(), kTexts, notes))
    EXPECT_EQ(one.coder, "min/max");
}

TEST(CacheSettings, WindowsThatLeaveNothingAndCodersThatCannotAdaptAreNamed) {
  const Contender of = contender(CodeFormat::Coding::kExact);
  EvalConfig config;
  std::vector<std::string> notes;
  const auto refused = [&](std::vector<int> windows, std::vector<double> thresholds, bool all) {
    config.recent_window = std::move(windows);
    config.adaptive_threshold = std::move(thresholds);
    std::vector<RateCoder> coders = coders_of(of, {2});
    if (!all) std::erase_if(coders, [](const RateCoder& c) { return c.dictionary != nullptr; });
    return test::message_of<InvalidArgument>(
        [&] { listed_settings(config, coders, model(), kTexts, notes); });
  };
  EXPECT_EQ(refused({200}, {0}, true),
            "recent_window is 200, but the longest sequence of other has 200 tokens: nothing would "
            "be compressed");
  EXPECT_NE(refused({8}, {0.3}, false).find("adaptive_threshold: no dictionary"),
            std::string::npos);
  config.sink_tokens = {250};
  EXPECT_NE(refused({60}, {0}, true).find("recent_window is 60 and sink_tokens 250"),
            std::string::npos);
}

std::vector<CacheSettings> sweep(double budget,
                                 const std::vector<Contender>& contenders,
                                 std::vector<std::string>& notes,
                                 std::vector<int> windows = {}) {
  EvalConfig config;
  config.budget = {budget};
  config.recent_window = std::move(windows);
  return budget_settings(
      config, contenders, coders_of(contenders.front(), {4}), model(), kTexts, notes);
}

TEST(CacheSettings, EveryPointOfASweepIsWithinTheBudgetAndFillsIt) {
  for (const auto coding : {CodeFormat::Coding::kExact, CodeFormat::Coding::kPacked}) {
    const std::vector<Contender> of{contender(coding, 64, true)};
    std::vector<std::string> notes;
    for (const double budget : {0.25, 0.4, 0.6}) {
      const auto points = sweep(budget, of, notes);
      std::set<int> windows;
      std::set<std::string> splits;
      double fullest = 0;
      EXPECT_LE(points.size(), 8u * (2 * 5 + 2));
      for (const CacheSettings& point : points) {
        EXPECT_FALSE(point.split.empty());
        windows.insert(point.recent_window);
        if (point.by_dictionaries()) splits.insert(point.split);
        for (const TextLengths& text : kTexts) {
          const double share =
              static_cast<double>(cache_bytes(point, model(), text)) / full_bytes(model(), text);
          EXPECT_LE(share, budget) << point.coder << " " << point.split;
          fullest = std::max(fullest, share);
        }
      }
      EXPECT_GT(fullest, 0.9 * budget);
      EXPECT_GT(windows.size(), 2u);
      EXPECT_GT(splits.size(), 1u);
    }
    for (const CacheSettings& point : sweep(0.5, of, notes, {16, 32}))
      EXPECT_TRUE(point.recent_window == 16 || point.recent_window == 32);
  }
}

TEST(CacheSettings, ABudgetTooSmallNamesTheLeast) {
  const std::vector<Contender> of{contender(CodeFormat::Coding::kExact, 64)};
  std::vector<std::string> notes;
  const std::string message = test::message_of<InvalidArgument>([&] { sweep(0.01, of, notes); });
  const std::string before = "budget is 0.01, too small: the least possible is ";
  ASSERT_TRUE(message.starts_with(before)) << message;
  const double least = std::stod(message.substr(before.size()));
  EXPECT_FALSE(sweep(least, of, notes).empty());
  EXPECT_THROW(sweep(least - 2e-4, of, notes), InvalidArgument);
}

}  // namespace
}  // namespace lexico::apps
