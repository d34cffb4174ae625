// Values sorted by atom: what a tile holds is what its pages do, and it is as long as was said.
#include "kernels/attention/value_tiles.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "kernels/attention_cases.h"

namespace lexico::kernels {
namespace {

using Entry = std::tuple<int, int, std::uint32_t>;  // atom, token, code

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

// What a tile of this source must hold of a head, from the fields of its blocks, sorted.
std::vector<Entry> expected(const ValueTileSource& source, int head, std::vector<int>* scales) {
  const CodeLayout& layout = source.layout[head * source.layout_stride];
  std::vector<std::uint32_t> atoms(size(layout.slots)), weights(size(layout.slots));
  std::vector<Entry> entries;
  for (int t = 0; t < source.tile_tokens; ++t) {
    const std::int64_t token = source.first_token + t, blocks = source.page_tokens / kBlockTokens;
    CodedFields fields{atoms.data(), weights.data(), 0, nullptr};
    read_fields(
        layout,
        source.pages[token / source.page_tokens] +
            size(head * blocks + token % source.page_tokens / kBlockTokens) * block_bytes(layout),
        static_cast<int>(token % kBlockTokens),
        fields);
    scales->push_back(static_cast<int>(fields.scale));
    for (int k = 0; k < layout.slots; ++k) {
      const std::uint32_t weight = weights[size(k)];
      const bool levels = layout.weights == CodedWeights::kLevels;
      const std::uint32_t code =
          levels ? static_cast<std::uint32_t>(k) << layout.weight_bits | weight : weight;
      if (levels ? layout.levels[code] == 0 : (weight & 0x7f) == 0) continue;
      entries.emplace_back(static_cast<int>(atoms[size(k)]), t, code);
    }
  }
  std::sort(entries.begin(), entries.end());
  return entries;
}

void expect_round_trip(const AttentionSetting& setting) {
  const AttentionCase c(setting);
  const AttentionSequence& sequence = c.problem.sequences[0];
  for (int j = 0; j < sequence.values.num_tiles; ++j) {
    const ValueTileSource source = tile_source(c.problem, sequence, j);
    ASSERT_TRUE(value_tiles_fit(*source.layout, source.tile_tokens, source.num_atoms));
    const std::vector<std::uint8_t> tile = pack_tile(source);
    EXPECT_EQ(tile.size() % 16, 0u);
    // All of its bytes are written, none behind them.
    std::vector<std::uint8_t> other(tile.size() + 16, 0x5a);
    std::vector<std::uint32_t> workspace(2 * size(source.num_atoms), 0xffffffff);
    EXPECT_EQ(value_tile_workspace_bytes(source.num_atoms), 4 * workspace.size());
    pack_value_tile(source, workspace.data(), other.data());
    EXPECT_TRUE(std::equal(tile.begin(), tile.end(), other.begin()));
    EXPECT_EQ(std::count(other.end() - 16, other.end(), 0x5a), 16);

    for (int h = 0; h < source.kv_heads; ++h) {
      const CodeLayout& layout = source.layout[h * source.layout_stride];
      std::vector<int> scales;
      const std::vector<Entry> want = expected(source, h, &scales);
      std::vector<ValueTileEntry> entries(want.size());
      ASSERT_EQ(read_value_tile(layout, source.tile_tokens, tile.data(), h, nullptr),
                static_cast<std::int64_t>(want.size()));
      read_value_tile(layout, source.tile_tokens, tile.data(), h, entries.data());
      std::vector<Entry> got;
      for (const ValueTileEntry& e : entries) got.emplace_back(e.atom, e.token, e.code);
      std::sort(got.begin(), got.end());
      EXPECT_EQ(got, want);

      ValueTileHead head;
      std::memcpy(&head, &tile[sizeof head * size(h)], sizeof head);
      EXPECT_EQ(head.offset % 16, 0u);
      EXPECT_EQ(static_cast<int>(head.num_atoms), want.empty() ? 0 : std::get<0>(want.back()) + 1);
      if (layout.scale_bits > 0) {
        EXPECT_TRUE(std::equal(scales.begin(), scales.end(), &tile[head.offset]));
      }
      // The size that the header states, and no step too many.
      std::map<int, int> rows;
      for (const Entry& e : want) ++rows[std::get<0>(e)];
      int long_rows = 0, long_entries = 0, shorter = 0;
      for (const auto& [atom, count] : rows) {
        if (count > kLongRow)
          ++long_rows, long_entries += count;
        else
          ++shorter;
      }
      EXPECT_EQ(static_cast<int>(head.num_long), long_rows);
      EXPECT_EQ(static_cast<int>(head.num_bundles), long_rows + (shorter + 31) / 32);
      const std::size_t end =
          h + 1 < source.kv_heads
              ? reinterpret_cast<const ValueTileHead*>(tile.data())[h + 1].offset
              : tile.size();
      const std::size_t before = (layout.scale_bits > 0 ? size(source.tile_tokens) : 0) +
                                 (4 * (size(head.num_bundles) + 1) + 15) / 16 * 16 +
                                 64 * size(head.num_bundles);
      const std::size_t steps = (end - head.offset - before) / 96;
      EXPECT_EQ(head.offset + before + 96 * steps, end);
      EXPECT_LE(steps, want.size() / 32 + kLongRow + size(long_rows));
      EXPECT_GE(32 * steps, want.size());
    }
  }
}

AttentionSetting tiles(const std::function<void(AttentionSetting&)>& change) {
  return with([&](auto& s) {
    s.weights = CodedWeights::kLevels, s.scale_bits = 6, s.dim = 4, s.group = 1;
    s.tile_tokens = 256, s.coded = {700};
    change(s);
  });
}

TEST(ValueTiles, HoldWhatPagesDo) {
  expect_round_trip(tiles([](auto&) {}));
  for (const int tokens :
       {64, 192, 640}) {  // more and less than a page, and no whole number of them
    SCOPED_TRACE(tokens);
    expect_round_trip(tiles([&](auto& s) { s.tile_tokens = tokens, s.coded = {2000}; }));
    expect_round_trip(tiles([&](auto& s) {
      s.tile_tokens = tokens, s.weights = CodedWeights::kE4m3, s.scale_bits = 0, s.coded = {650};
    }));
  }
  for (int bits = 1; bits <= 8; ++bits)
    expect_round_trip(tiles([&](auto& s) { s.weight_bits = s.scale_bits = bits; }));
  for (const int atoms : {1, 2, 31, 33, 5000, 65535})
    expect_round_trip(tiles([&](auto& s) { s.num_atoms = atoms; }));
}

TEST(ValueTiles, RowsOfAnyLength) {
  for (const int hot : {5, 30, 90, 100})
    for (const int slots : {1, 9})
      expect_round_trip(tiles([&](auto& s) { s.hot = hot, s.slots = slots, s.num_atoms = 900; }));
  expect_round_trip(tiles([](auto& s) {
    s.tile_tokens = 8192, s.coded = {8192}, s.kv_heads = 1, s.hot = 10, s.num_atoms = 700;
  }));
}

TEST(ValueTiles, WeightsOfZeroHaveNoEntry) {
  expect_round_trip(tiles([](auto& s) { s.unused = true, s.weight_bits = 1; }));
  AttentionCase c(tiles([](auto& s) { s.coded = {256}; }));
  CodeLayout layout = *c.problem.values.layout;
  const std::vector<float> zeros(size(layout.slots << layout.weight_bits), -0.0f);
  layout.levels = zeros.data();
  c.problem.values.layout = &layout;
  const ValueTileSource source = tile_source(c.problem, c.problem.sequences[0], 0);
  const std::vector<std::uint8_t> tile = pack_tile(source);
  for (int h = 0; h < source.kv_heads; ++h)
    EXPECT_EQ(read_value_tile(layout, source.tile_tokens, tile.data(), h, nullptr), 0);
  EXPECT_EQ(tile.size(), size(source.kv_heads) * (16 + 256 + 16));
}

TEST(ValueTiles, OwnAtomsAndLayoutsOfHeads) {
  expect_round_trip(tiles([](auto& s) { s.extra = 20, s.head_extra = true; }));
  AttentionCase c(tiles([](auto&) {}));
  std::vector<CodeLayout> layouts(size(c.s.kv_heads), *c.problem.values.layout);
  std::vector<float> levels(layouts[0].levels,
                            layouts[0].levels + (layouts[0].slots << layouts[0].weight_bits));
  std::fill_n(levels.begin(), 40, 0.0f);  // the second head has fewer entries
  layouts[1].levels = levels.data();
  c.problem.values.layout = layouts.data(), c.problem.values.layout_stride = 1;
  const ValueTileSource source = tile_source(c.problem, c.problem.sequences[0], 1);
  const std::vector<std::uint8_t> tile = pack_tile(source);
  std::vector<std::int64_t> counts;
  for (int h = 0; h < 2; ++h) {
    std::vector<int> scales;
    counts.push_back(
        read_value_tile(layouts[size(h)], source.tile_tokens, tile.data(), h, nullptr));
    EXPECT_EQ(counts.back(), static_cast<std::int64_t>(expected(source, h, &scales).size()));
  }
  EXPECT_LT(counts[1], counts[0]);
}

// How often eight lanes that are served together wait for the worst bank of theirs, on average over
// groups of eight numbers; one number is read for all at once.
double waits(const std::vector<std::vector<int>>& eights) {
  double sum = 0;
  for (const std::vector<int>& numbers : eights) {
    std::map<int, std::set<int>> of_bank;
    for (const int n : numbers) of_bank[n % 8].insert(n);
    std::size_t worst = 0;
    for (const auto& [bank, its] : of_bank) worst = std::max(worst, its.size());
    sum += static_cast<double>(worst);
  }
  return sum / static_cast<double>(eights.size());
}

TEST(ValueTiles, LanesMeetInFewBanks) {
  // As dealt by chance eight tokens, or atoms, wait 2.6 times.
  const AttentionCase c(tiles([](auto& s) {
    s.tile_tokens = 2048, s.coded = {2048}, s.kv_heads = 1, s.num_atoms = 1024, s.slots = 8;
  }));
  const ValueTileSource source = tile_source(c.problem, c.problem.sequences[0], 0);
  const std::vector<std::uint8_t> tile = pack_tile(source);
  const auto& head = reinterpret_cast<const ValueTileHead&>(tile[0]);
  const std::uint8_t* const after_scales = &tile[head.offset + 2048];
  const auto* const starts = reinterpret_cast<const std::uint32_t*>(after_scales);
  const std::size_t start_bytes = (4 * (size(head.num_bundles) + 1) + 15) / 16 * 16;
  const auto* const atoms = reinterpret_cast<const std::uint16_t*>(after_scales + start_bytes);
  const std::uint8_t* const steps = after_scales + start_bytes + 64 * size(head.num_bundles);
  std::vector<std::vector<int>> of_tokens, of_atoms;
  for (std::uint32_t b = 0; b + 1 < head.num_bundles; ++b) {
    ASSERT_GE(starts[b + 1] - starts[b], 8u);
    for (int lane = 0; lane < 32; lane += 8) {
      of_atoms.emplace_back(atoms + 32 * b + lane, atoms + 32 * b + lane + 8);
      for (int step = 0; step < 8; ++step) {
        of_tokens.emplace_back();
        for (int i = lane; i < lane + 8; ++i) {  // the first chunk: [32, 8] words
          std::uint16_t word;
          std::memcpy(&word, steps + 96 * starts[b] + 2 * (8 * i + step), sizeof word);
          of_tokens.back().push_back(word & 0x1fff);
        }
      }
    }
  }
  EXPECT_LT(waits(of_tokens), 1.8);
  EXPECT_LT(waits(of_atoms), 2.2);
}

TEST(ValueTiles, WhatFits) {
  CodeLayout layout;
  layout.slots = 32, layout.index_bits = 12;
  EXPECT_FALSE(value_tiles_fit(layout, 4096, 4096));  // float weights
  layout.weights = CodedWeights::kE4m3;
  EXPECT_TRUE(value_tiles_fit(layout, 4096, 4096));
  EXPECT_TRUE(value_tiles_fit(layout, 8192, 65535));
  EXPECT_TRUE(value_tiles_fit(layout, 64, 0));
  EXPECT_FALSE(value_tiles_fit(layout, 4096, 65536));
  for (const int tokens : {-64, 0, 32, 100, 8256})
    EXPECT_FALSE(value_tiles_fit(layout, tokens, 4096)) << tokens;
  layout.weights = CodedWeights::kLevels;
  for (const auto& [slots, bits, fits] :
       {std::tuple{32, 5, true}, {63, 5, true}, {64, 5, false}, {32, 6, false}, {7, 8, true}}) {
    layout.slots = slots, layout.weight_bits = bits;
    EXPECT_EQ(value_tiles_fit(layout, 4096, 4096), fits) << slots << " " << bits;
  }
  layout.slots = 0;
  EXPECT_FALSE(value_tiles_fit(layout, 4096, 4096));
  layout.slots = 8, layout.weight_bits = 5;
  std::vector<std::int32_t> bits(64, 0);
  layout.components = 64, layout.component_bits = bits.data();
  EXPECT_TRUE(value_tiles_fit(layout, 4096, 4096));
  bits[63] = 1;
  EXPECT_FALSE(value_tiles_fit(layout, 4096, 4096));
}

}  // namespace
}  // namespace lexico::kernels
