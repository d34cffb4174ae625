// Attention on codes on the device: the cases of attention_test.cpp against dense attention in
// double, and what only the device promises.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "kernels/attention_cases.h"
#include "support/device_memory.h"
#include "support/runtime_faults.h"

namespace lexico::kernels {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

class AttentionCuda : public test::DeviceTest {
 protected:
  struct OnDevice {
    AttentionProblem problem;
    KeyRotation rotation;
    cuda::AttentionBounds bounds;
    void* workspace = nullptr;
  };
  struct Result {
    std::vector<float> out, log_sums;
  };

  // A deep copy, and the bounds that fit it.
  void put(const AttentionProblem& host, OnDevice& on) {
    AttentionProblem& p = on.problem;
    p = host;
    ASSERT_TRUE(cuda::attention_device(&on.bounds).ok());
    p.keys = put_space(host, host.keys, on.bounds.key_components);
    p.values = put_space(host, host.values, on.bounds.value_components);
    on.bounds.key_block_bytes = block_bytes(*host.keys.layout);
    on.bounds.value_block_bytes = block_bytes(*host.values.layout);
    on.bounds.key_weights = host.keys.layout->weights;
    on.bounds.value_weights = host.values.layout->weights;
    if (host.rotation != nullptr) {
      on.rotation = *host.rotation;
      on.rotation.inverse_frequencies =
          upload(host.rotation->inverse_frequencies, size(host.rotation->rotary_dim / 2));
      p.rotation = &on.rotation;
    }
    std::vector<AttentionSequence> sequences;
    for (int b = 0; b < host.batch; ++b) {
      AttentionSequence s = host.sequences[b];
      on.bounds.coded_tokens = std::max(on.bounds.coded_tokens, s.coded_tokens);
      on.bounds.key_extra = std::max(on.bounds.key_extra, s.keys.num_extra);
      on.bounds.value_extra = std::max(on.bounds.value_extra, s.values.num_extra);
      put_run(host, *host.keys.layout, s.coded_tokens, s.keys);
      std::vector<const std::uint8_t*> tiles;
      for (int j = 0; j < s.values.num_tiles; ++j)
        tiles.push_back(upload(pack_tile(tile_source(host, s, j))));
      put_run(host, *host.values.layout, s.coded_tokens, s.values);
      s.values.tiles = upload(tiles);
      std::vector<ExactRun> runs(s.exact, s.exact + s.num_exact);
      for (ExactRun& run : runs) {
        const std::size_t count = size(host.kv_heads * run.head_stride);
        if (host.exact_type == ExactType::kFloat32) {
          run.keys = upload(static_cast<const float*>(run.keys), count);
          run.values = upload(static_cast<const float*>(run.values), count);
        } else {
          run.keys = upload(static_cast<const std::uint16_t*>(run.keys), count);
          run.values = upload(static_cast<const std::uint16_t*>(run.values), count);
        }
      }
      s.exact = upload(runs);
      s.left_out = upload(s.left_out, size(s.num_left_out));
      sequences.push_back(s);
    }
    p.sequences = upload(sequences);
    const std::size_t heads = size(std::int64_t{host.batch} * host.kv_heads * host.group);
    p.queries = upload(host.queries, heads * size(host.dim));
    p.out = upload(std::vector<float>(heads * size(host.dim), NAN));
    p.log_sums = upload(std::vector<float>(heads, NAN));
    reserve(on);
  }
  void reserve(OnDevice& on) {
    // NaN, as the emulated device's fresh memory is: nobody may rely on what is there.
    on.workspace = upload(
        std::vector<unsigned char>(cuda::attention_workspace_bytes(on.problem, on.bounds), 0xff));
  }

  Result run(const OnDevice& on) {
    EXPECT_TRUE(cuda::attention(on.problem, on.bounds, on.workspace, nullptr).ok());
    const std::size_t heads =
        size(std::int64_t{on.problem.batch} * on.problem.kv_heads * on.problem.group);
    return {download(on.problem.out, heads * size(on.problem.dim)),
            download(on.problem.log_sums, heads)};
  }
  Result run(const AttentionCase& c) {
    OnDevice on;
    put(c.problem, on);
    Result result = run(on);
    release_all();
    return result;
  }

  void expect_as_dense(const AttentionSetting& setting, double bound = 1e-5) {
    const AttentionCase c(setting);
    std::vector<double> sums;
    const std::vector<double> dense = c.dense(&sums);
    const Result result = run(c);
    EXPECT_LE(worst_error(result.out, dense, setting.dim), bound);
    for (std::size_t i = 0; i < sums.size(); ++i) {
      if (std::isinf(sums[i])) {
        EXPECT_EQ(static_cast<double>(result.log_sums[i]), sums[i]);
      } else {
        EXPECT_NEAR(
            static_cast<double>(result.log_sums[i]), sums[i], bound * (1 + std::fabs(sums[i])));
      }
    }
  }

 private:
  CodedSpace put_space(const AttentionProblem& p, const CodedSpace& host, int& most_components) {
    CodedSpace space = host;
    const std::int64_t dim = p.dim, square = dim * dim;
    std::vector<CodeLayout> layouts;
    for (int h = 0; h < (host.layout_stride != 0 ? p.kv_heads : 1); ++h) {
      CodeLayout layout = host.layout[h];
      if (layout.weights == CodedWeights::kLevels)
        layout.levels = upload(layout.levels, size(layout.slots) << layout.weight_bits);
      if (layout.scale_bits > 0) layout.scales = upload(layout.scales, 1u << layout.scale_bits);
      int components = 0;
      std::size_t levels = 0;
      for (int i = 0; i < layout.components; ++i) {
        const int bits = layout.component_bits[i];
        if (bits == 0) continue;
        ++components;
        levels += 1u << (bits + (layout.trellis.high != 0 ? 1 : 0));
      }
      most_components = std::max(most_components, components);
      layout.component_bits = upload(layout.component_bits, size(layout.components));
      layout.component_levels = upload(layout.component_levels, levels);
      layouts.push_back(layout);
    }
    space.layout = upload(layouts);
    const std::int64_t dictionaries = host.atoms_stride == 0 ? 1 : p.kv_heads;
    const std::size_t atoms = size(dictionaries * host.num_atoms * dim);
    space.atoms = upload(host.atoms, atoms);
    if (host.half_atoms != nullptr) space.half_atoms = upload(host.half_atoms, atoms);
    if (layouts[0].components > 0) space.axes = upload(host.axes, size(p.kv_heads * square));
    if (host.mean != nullptr) space.mean = upload(host.mean, size(p.kv_heads * dim));
    if (host.back_map != nullptr) space.back_map = upload(host.back_map, size(p.kv_heads * square));
    return space;
  }
  void put_run(const AttentionProblem& p,
               const CodeLayout& layout,
               std::int64_t tokens,
               CodedRun& run) {
    std::vector<const std::uint8_t*> pages;
    const std::size_t bytes =
        size(p.kv_heads * (p.page_tokens / kBlockTokens)) * block_bytes(layout) + kPageSlack;
    const std::int64_t in_tiles = std::int64_t{run.num_tiles} * p.value_tile_tokens;
    for (std::int64_t first = 0; first < tokens; first += p.page_tokens) {
      const bool needed = std::min(tokens, first + p.page_tokens) > in_tiles;
      pages.push_back(needed ? upload(run.pages[first / p.page_tokens], bytes) : nullptr);
    }
    run.pages = upload(pages);
    const std::int64_t extra = std::int64_t{run.num_extra} * p.dim;
    run.extra_atoms = upload(run.extra_atoms,
                             size(run.extra_stride == 0 ? extra : p.kv_heads * run.extra_stride));
  }
};

TEST_F(AttentionCuda, AgreesWithDenseAttention) { expect_as_dense({}); }

TEST_F(AttentionCuda, EveryGroupSize) {
  for (int group = 1; group <= 9; ++group) {
    SCOPED_TRACE(group);
    expect_as_dense(with([&](auto& s) { s.group = group, s.kv_heads = 3; }));
    expect_as_dense(with([&](auto& s) { s.group = group, s.rotary_dim = 64; }));
  }
}

TEST_F(AttentionCuda, EveryHeadDim) {
  for (const int dim : {4, 32, 40, 64, 72, 80, 96, 100, 128, 192, 256}) {
    SCOPED_TRACE(dim);
    expect_as_dense(with([&](auto& s) { s.dim = dim; }));
    expect_as_dense(
        with([&](auto& s) { s.dim = dim, s.rotary_dim = dim / 8 * 8 == 0 ? 4 : dim / 8 * 8; }));
  }
}

TEST_F(AttentionCuda, EveryLength) {
  for (const std::int64_t coded : {0, 1, 31, 63, 64, 65, 129, 511, 512, 513, 1025, 9000}) {
    SCOPED_TRACE(coded);
    expect_as_dense(with([&](auto& s) { s.coded = {coded}, s.num_atoms = 37; }));
    expect_as_dense(with([&](auto& s) {
      s.coded = {coded}, s.exact = {}, s.rotary_dim = 32, s.dim = 32, s.num_atoms = 200;
    }));
  }
}

TEST_F(AttentionCuda, ExactTokensAlone) {
  expect_as_dense(with([](auto& s) { s.coded = {0}, s.exact = {1}; }));
  expect_as_dense(with([](auto& s) { s.coded = {0}, s.exact = {4, 0, 300}; }));
  expect_as_dense(with([](auto& s) { s.coded = {0}, s.exact = {0}; }));
}

TEST_F(AttentionCuda, NoTokensGiveZeros) {
  const Result result = run(AttentionCase(
      with([](auto& s) { s.coded = {0}, s.exact = {}, s.means = true, s.maps = true; })));
  for (const float x : result.out) EXPECT_EQ(x, 0.0f);
  for (const float x : result.log_sums) EXPECT_EQ(x, -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(cuda::attention({}, {}, nullptr, nullptr).ok());
}

TEST_F(AttentionCuda, SequencesOfDifferentLengths) {
  for (const int rotary : {0, 64}) {
    expect_as_dense(with([&](auto& s) {
      s.batch = 5, s.coded = {0, 700, 64, 3000}, s.rotary_dim = rotary;
    }));
  }
}

TEST_F(AttentionCuda, EveryIndexWidth) {
  // 5000 and 70000: tables, then sums too, that shared memory has no room for.
  for (const int atoms : {1, 2, 3, 5, 9, 33, 100, 257, 1000, 1024, 1500, 4096, 11000, 70000}) {
    SCOPED_TRACE(atoms);
    expect_as_dense(with([&](auto& s) {
      s.num_atoms = atoms, s.dim = 32, s.coded = {150}, s.kv_heads = atoms > 10000 ? 1 : 2;
    }));
  }
}

TEST_F(AttentionCuda, EveryWeightFormat) {
  for (const int rotary : {0, 64}) {
    expect_as_dense(with([&](auto& s) { s.weights = CodedWeights::kE4m3, s.rotary_dim = rotary; }));
    for (int bits = 1; bits <= 8; ++bits) {
      SCOPED_TRACE(bits);
      expect_as_dense(with([&](auto& s) {
        s.weights = CodedWeights::kLevels, s.weight_bits = bits, s.scale_bits = bits;
        s.rotary_dim = rotary;
      }));
    }
  }
}

TEST_F(AttentionCuda, EveryE4m3ByteMeansItsNumber) {
  // Token t has atom t, which is axis t, and all scores are 0: the output is the weights' mean.
  AttentionCase c(with([](auto& s) {
    s.weights = CodedWeights::kE4m3, s.coded = {256}, s.exact = {}, s.slots = 1, s.dim = 256;
    s.num_atoms = 256, s.kv_heads = 1, s.group = 1, s.page_tokens = 256;
  }));
  std::vector<float> axes(256 * 256, 0.0f);
  const CodeLayout& layout = *c.problem.values.layout;
  const std::size_t bytes = block_bytes(layout);
  std::vector<std::uint8_t> keys(4 * bytes + kPageSlack), values(keys.size());
  const auto weight_of = [](std::uint32_t t) { return (t & 0x7f) == 0x7f ? 0 : t; };
  for (std::uint32_t t = 0; t < 256; ++t) {
    axes[t * 257] = 1;
    std::uint32_t weight = weight_of(t), none = 0;
    write_fields(
        layout, &values[t / 64 * bytes], static_cast<int>(t % 64), {&t, &weight, 0, nullptr});
    write_fields(layout, &keys[t / 64 * bytes], static_cast<int>(t % 64), {&t, &none, 0, nullptr});
  }
  const std::uint8_t *key_pages[] = {keys.data()}, *value_pages[] = {values.data()};
  AttentionSequence sequence = *c.problem.sequences;
  sequence.keys.pages = key_pages;
  sequence.values.pages = value_pages;
  c.problem.sequences = &sequence;
  c.problem.values.atoms = axes.data();
  const std::vector<float> out = run(c).out;
  for (std::uint32_t t = 0; t < 256; ++t) {
    const float want = e4m3_value(weight_of(t));
    EXPECT_NEAR(out[t] * 256, want, 1e-4f + 1e-6f * std::fabs(want)) << t;
  }
}

TEST_F(AttentionCuda, ResidualCode) {
  for (const int rotary : {0, 64}) {
    for (const bool relative : {false, true}) {
      for (const int group : {3, 8}) {
        expect_as_dense(with([&](auto& s) {
          s.residual = true, s.relative = relative, s.group = group, s.rotary_dim = rotary;
          s.weights = CodedWeights::kLevels, s.scale_bits = 8, s.extra = 3, s.coded = {133};
        }));
      }
      expect_as_dense(with([&](auto& s) {
        s.residual = s.trellis = true, s.relative = relative, s.rotary_dim = rotary;
        s.weights = CodedWeights::kLevels, s.scale_bits = 4;
      }));
    }
  }
}

TEST_F(AttentionCuda, NeighbouringDimsRotate) {
  for (const int rotary : {4, 20, 64}) {
    expect_as_dense(with(
        [&](auto& s) { s.rotary_dim = rotary, s.interleaved = true, s.attention_scaling = 1.3f; }));
  }
}

TEST_F(AttentionCuda, FarPositionsTurnByTheAngleOfTheModels) {
  for (const std::int64_t position : {0, 32767, 131071, 1000003}) {
    SCOPED_TRACE(position);
    expect_as_dense(with([&](auto& s) {
      s.rotary_dim = 128, s.dim = 128, s.first_position = position, s.coded = {700};
      s.exact = {}, s.attention_scaling = 1.2f;
    }));
  }
}

TEST_F(AttentionCuda, AtomsOfOneSequence) {
  for (const int rotary : {0, 64}) {
    expect_as_dense(with([&](auto& s) {
      s.extra = 13, s.batch = 3, s.coded = {100, 90}, s.rotary_dim = rotary, s.head_atoms = true;
    }));
    expect_as_dense(with([&](auto& s) {
      s.extra = 9, s.head_extra = true, s.rotary_dim = rotary, s.batch = 2, s.group = 6;
    }));
  }
}

TEST_F(AttentionCuda, TokensLeftOutDoNotCount) {
  std::vector<std::int64_t> block, most;
  for (std::int64_t t = 0; t < 1500; ++t) {
    if (t >= 64 && t < 1100) block.push_back(t);
    if (t != 1300) most.push_back(t);
  }
  for (const int rotary : {0, 64}) {
    for (const auto& left_out : {std::vector<std::int64_t>{0}, {3, 63, 64, 1025}, block, most}) {
      SCOPED_TRACE(testing::Message() << left_out.size() << " of tokens, rotary " << rotary);
      for (const int exact : {0, 5}) {
        expect_as_dense(with([&](auto& s) {
          s.coded = {1500, 300}, s.batch = 2, s.exact = {exact}, s.left_out = left_out;
          s.rotary_dim = rotary, s.group = 5, s.means = true;
        }));
      }
    }
  }
}

TEST_F(AttentionCuda, AllWeightsZero) {
  AttentionCase c(with([](auto& s) { s.weights = CodedWeights::kLevels, s.exact = {}; }));
  std::vector<float> zeros(size(c.s.slots << c.s.weight_bits), 0.0f);
  CodeLayout layout = *c.problem.values.layout;
  layout.levels = zeros.data();
  c.problem.keys.layout = c.problem.values.layout = &layout;
  const Result result = run(c);
  for (const float x : result.out) EXPECT_EQ(x, 0.0f);
  for (const float x : result.log_sums) EXPECT_NEAR(x, std::log(300.0f), 1e-5f);
}

TEST_F(AttentionCuda, NoSlots) {
  expect_as_dense(with([](auto& s) { s.slots = 0, s.residual = true; }));
  expect_as_dense(with([](auto& s) { s.slots = 0, s.means = true; }));
}

TEST_F(AttentionCuda, MoreSlotsThanAWarpHasLanes) {
  for (const int rotary : {0, 64})
    expect_as_dense(with([&](auto& s) { s.slots = 40, s.rotary_dim = rotary, s.dim = 160; }));
}

TEST_F(AttentionCuda, MeansMapsAndDictionariesOfHeads) {
  for (const int rotary : {0, 64}) {
    for (int what = 1; what < 8; ++what) {
      SCOPED_TRACE(what);
      expect_as_dense(with([&](auto& s) {
        s.rotary_dim = rotary, s.kv_heads = 3, s.batch = 2, s.coded = {130, 70};
        s.means = (what & 1) != 0, s.maps = (what & 2) != 0, s.head_atoms = (what & 4) != 0;
      }));
    }
  }
}

TEST_F(AttentionCuda, HowManyProcessorsThereAreDoesNotMatter) {
  // One: no ranges, and several groups share what they read of D_v.
  for (const bool head_atoms : {false, true}) {
    const AttentionCase c(with([&](auto& s) {
      s.batch = 3, s.coded = {0, 700, 100}, s.group = 6, s.head_atoms = head_atoms;
      s.residual = true, s.extra = 3, s.num_atoms = 200;
    }));
    const std::vector<double> dense = c.dense();
    OnDevice on;
    put(c.problem, on);
    for (const int processors : {1, 1000}) {
      on.bounds.multiprocessors = processors;
      reserve(on);
      EXPECT_LE(worst_error(run(on).out, dense, c.s.dim), 1e-5);
    }
  }
}

TEST_F(AttentionCuda, MoreRangesAndPartsThanAWarpHasLanes) {
  for (const int tile : {0, 512}) {
    // Only the last ones have tokens that count.
    AttentionCase c(with([&](auto& s) {
      s.coded = {17500}, s.kv_heads = s.group = 1, s.dim = 4, s.num_atoms = 50, s.slots = 2;
      s.weights = CodedWeights::kE4m3, s.tile_tokens = tile, s.exact = {3};
      for (std::int64_t t = 0; t < 17408; ++t) s.left_out.push_back(t);
    }));
    OnDevice on;
    put(c.problem, on);
    on.bounds.multiprocessors = 1000;
    reserve(on);
    std::vector<double> sums;
    EXPECT_LE(worst_error(run(on).out, c.dense(&sums), c.s.dim), 1e-5);
    EXPECT_NEAR(static_cast<double>(run(on).log_sums[0]), sums[0], 1e-5 * std::fabs(sums[0]));
  }
}

TEST_F(AttentionCuda, KeysRebuiltFromHalfFloats) {
  for (const int dim : {64, 72, 128}) {
    AttentionCase c(with([&](auto& s) {
      s.rotary_dim = 64, s.dim = dim, s.extra = 5, s.head_atoms = true, s.means = true;
    }));
    // Atoms that half floats hold exactly, so that nothing is lost.
    std::vector<std::uint16_t> half;
    std::vector<float> atoms;
    const std::size_t count = size(std::int64_t{c.s.kv_heads} * c.s.num_atoms * dim);
    for (std::size_t i = 0; i < count; ++i) {
      half.push_back(
          static_cast<std::uint16_t>(0x2c00 + i * 7919 % 0x800 + (i % 3 == 0 ? 0x8000 : 0)));
      const int exponent = half.back() >> 10 & 31, mantissa = half.back() & 1023;
      const float x = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
      atoms.push_back(i % 3 == 0 ? -x : x);
    }
    c.problem.keys.atoms = atoms.data();
    const std::vector<float> whole = run(c).out;
    c.problem.keys.half_atoms = half.data();
    EXPECT_EQ(run(c).out, whole);
  }
}

TEST_F(AttentionCuda, HalfTablesLoseLittle) {
  AttentionCase c(with([](auto& s) { s.coded = {900}, s.extra = 4, s.residual = true; }));
  const std::vector<double> dense = c.dense();
  OnDevice on;
  put(c.problem, on);
  on.bounds.half_tables = true;
  const double error = worst_error(run(on).out, dense, c.s.dim);
  EXPECT_LE(error, 2e-3);
  EXPECT_GT(error, 1e-5);  // it was used
}

TEST_F(AttentionCuda, ExactTokensIn16Bits) {
  for (const ExactType type : {ExactType::kFloat16, ExactType::kBFloat16})
    expect_as_dense(with([&](auto& s) { s.exact_type = type, s.coded = {50}; }));
}

TEST_F(AttentionCuda, LargeScores) {
  for (const int rotary : {0, 64})
    expect_as_dense(with([&](auto& s) { s.query_size = 1000, s.rotary_dim = rotary; }), 3e-3);
  for (const float x : run(AttentionCase(with([](auto& s) { s.query_size = 1e20f; }))).out)
    EXPECT_TRUE(std::isfinite(x));
}

TEST_F(AttentionCuda, WeightsOfAnySize) {
  // Sums are integers inside: their unit follows the weights.
  for (const float factor : {1e-30f, 1e-3f, 1e4f, 1e30f}) {
    AttentionCase c(
        with([&](auto& s) { s.weights = CodedWeights::kLevels, s.exact = {}, s.coded = {700}; }));
    std::vector<float> levels(c.problem.values.layout->levels,
                              c.problem.values.layout->levels + (c.s.slots << c.s.weight_bits));
    CodeLayout layout = *c.problem.values.layout;
    for (float& x : levels) x *= factor;
    layout.levels = levels.data();
    std::vector<double> dense = c.dense();
    for (double& x : dense) x *= static_cast<double>(factor);
    c.problem.values.layout = &layout;
    EXPECT_LE(worst_error(run(c).out, dense, c.s.dim), 1e-5) << factor;
  }
}

TEST_F(AttentionCuda, NanStaysInItsHead) {
  for (const int rotary : {0, 64}) {
    AttentionCase c(with([&](auto& s) { s.rotary_dim = rotary, s.coded = {1200}; }));
    const std::vector<float> good = run(c).out;
    const std::size_t head = 5, dim = size(c.s.dim);
    c.queries[head * dim + 3] = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> bad = run(c).out;
    for (std::size_t i = 0; i < bad.size(); ++i) {
      if (i / dim == head) {
        EXPECT_TRUE(std::isnan(bad[i])) << i;
      } else {
        EXPECT_EQ(bad[i], good[i]) << i;
      }
    }
  }
}

TEST_F(AttentionCuda, NanAndInfInAWeightAreSeen) {
  for (const float value : {NAN, INFINITY}) {
    AttentionCase c(with([](auto& s) { s.exact = {}, s.slots = 2, s.kv_heads = 1; }));
    float levels[] = {value, 1, 2, 3};
    std::uint32_t atoms[] = {0, 1}, weights[2] = {};
    std::memcpy(&weights[0], &levels[0], sizeof(float));
    const CodedFields fields{atoms, weights, 0, nullptr};
    const std::uint8_t* page = c.problem.sequences[0].values.pages[0];
    write_fields(*c.problem.values.layout, const_cast<std::uint8_t*>(page), 7, fields);
    for (const float x : run(c).out) EXPECT_FALSE(std::isfinite(x));
  }
}

// A setting that tiles take.
AttentionSetting in_tiles(int tile_tokens, const std::function<void(AttentionSetting&)>& change) {
  return with([&](auto& s) {
    s.weights = CodedWeights::kLevels, s.scale_bits = 6, s.dim = 32, s.tile_tokens = tile_tokens;
    s.coded = {3 * tile_tokens + 5};
    change(s);
  });
}

TEST_F(AttentionCuda, ValuesInTiles) {
  for (const int tile : {64, 128, 192, 512, 2048}) {
    for (const std::int64_t coded :
         {tile - 1, tile, tile + 1, 3 * tile - 1, 3 * tile, 3 * tile + 1}) {
      SCOPED_TRACE(testing::Message() << coded << " tokens in tiles of " << tile);
      expect_as_dense(in_tiles(tile, [&](auto& s) { s.coded = {coded}, s.num_atoms = 300; }));
      expect_as_dense(in_tiles(tile, [&](auto& s) {
        s.coded = {coded}, s.weights = CodedWeights::kE4m3, s.scale_bits = 0, s.page_tokens = 512;
      }));
    }
  }
  // The largest tile, rows of every length, and one that is as long as the tile.
  expect_as_dense(in_tiles(8192, [](auto& s) {
    s.coded = {8192}, s.kv_heads = 1, s.dim = 8, s.hot = 20, s.num_atoms = 600;
  }));
}

TEST_F(AttentionCuda, TilesOfEveryCode) {
  for (const int rotary : {0, 32}) {
    for (int bits = 1; bits <= 8; ++bits) {
      SCOPED_TRACE(bits);
      expect_as_dense(in_tiles(128, [&](auto& s) {
        s.weight_bits = bits, s.scale_bits = bits - 1, s.rotary_dim = rotary;
      }));
    }
    expect_as_dense(
        in_tiles(128, [&](auto& s) { s.slots = 1, s.weight_bits = 1, s.rotary_dim = rotary; }));
    expect_as_dense(in_tiles(128, [&](auto& s) { s.slots = 63, s.coded = {300}; }));  // 2016 codes
  }
}

TEST_F(AttentionCuda, TilesOfEveryGroup) {
  for (int group = 1; group <= 9; ++group) {
    SCOPED_TRACE(group);
    expect_as_dense(in_tiles(256, [&](auto& s) {
      s.group = group, s.kv_heads = 3, s.means = true, s.maps = true, s.head_atoms = group % 2 == 0;
    }));
  }
}

TEST_F(AttentionCuda, TilesWithAtomsThatManyOrNoTokensUse) {
  for (const int hot : {0, 3, 40, 100}) {
    for (const int atoms : {8, 300, 5000, 20000}) {  // 20000: sums have no room in shared memory
      SCOPED_TRACE(testing::Message() << atoms << " atoms, " << hot << " % of slots one of them");
      expect_as_dense(in_tiles(512, [&](auto& s) {
        s.hot = hot, s.num_atoms = atoms, s.kv_heads = atoms > 10000 ? 1 : 2;
      }));
    }
  }
}

TEST_F(AttentionCuda, TilesWithUnusedSlots) {
  expect_as_dense(in_tiles(256, [](auto& s) { s.unused = true, s.weight_bits = 1; }));
  // And with nothing else: no head of the tile has a row.
  AttentionCase c(in_tiles(64, [](auto& s) { s.coded = {128}, s.exact = {}; }));
  std::vector<float> zeros(size(c.s.slots << c.s.weight_bits), 0.0f);
  CodeLayout layout = *c.problem.values.layout;
  layout.levels = zeros.data();
  c.problem.values.layout = &layout;
  for (const float x : run(c).out) EXPECT_EQ(x, 0.0f);
}

TEST_F(AttentionCuda, TilesWithAtomsOfOneSequence) {
  for (const bool head_extra : {false, true}) {
    expect_as_dense(in_tiles(128, [&](auto& s) {
      s.extra = 13, s.head_extra = head_extra, s.batch = 2, s.coded = {400, 128};
    }));
  }
}

TEST_F(AttentionCuda, SequencesWithAndWithoutTiles) {
  expect_as_dense(in_tiles(128, [](auto& s) {
    s.batch = 6, s.coded = {900, 128, 500, 900, 60, 0}, s.tiles = {-1, 1, 0, 2, 0, 0};
  }));
}

TEST_F(AttentionCuda, TokensLeftOutOfTiles) {
  std::vector<std::int64_t> whole_tile, most;
  for (std::int64_t t = 0; t < 1000; ++t) {
    if (t < 256) whole_tile.push_back(t);
    if (t != 700) most.push_back(t);
  }
  for (const auto& left_out : {std::vector<std::int64_t>{0, 255, 256, 990}, whole_tile, most}) {
    for (const int exact : {0, 5}) {
      for (const bool halfs : {false, true}) {
        SCOPED_TRACE(testing::Message() << left_out.size() << " of tokens, halfs " << halfs);
        const AttentionCase c(in_tiles(256, [&](auto& s) {
          s.coded = {1000}, s.left_out = left_out, s.exact = {exact}, s.rotary_dim = 16;
        }));
        OnDevice on;
        put(c.problem, on);
        on.bounds.half_tables = halfs;
        EXPECT_LE(worst_error(run(on).out, c.dense(), c.s.dim), halfs ? 2e-3 : 1e-5);
      }
    }
  }
}

TEST_F(AttentionCuda, TilesOnAnyNumberOfProcessors) {
  const AttentionCase c(in_tiles(512, [](auto& s) {
    s.batch = 2, s.coded = {2900, 512}, s.num_atoms = 2000, s.hot = 30;
  }));
  const std::vector<double> dense = c.dense();
  OnDevice on;
  put(c.problem, on);
  for (const int processors : {1, 2, 3, 7, 12, 1000}) {
    SCOPED_TRACE(processors);
    on.bounds.multiprocessors = processors;
    reserve(on);
    EXPECT_LE(worst_error(run(on).out, dense, c.s.dim), 1e-5);
  }
}

TEST_F(AttentionCuda, HalfFloatsForTilesLoseLittle) {
  // Keys before RoPE have no table, so what is lost is lost in tiles. Scales and scores of any
  // size: a half holds 2^-24 to 2^16.
  for (const float factor : {1e-20f, 1.0f, 1e20f}) {
    for (const float query_size : {1.0f, 30.0f}) {
      AttentionCase c(in_tiles(512, [&](auto& s) {
        s.rotary_dim = 16, s.exact = {}, s.coded = {1600}, s.query_size = query_size;
      }));
      std::vector<float> scales(c.problem.values.layout->scales,
                                c.problem.values.layout->scales + 64);
      CodeLayout layout = *c.problem.values.layout;
      for (float& x : scales) x *= factor;
      layout.scales = scales.data();
      std::vector<double> dense = c.dense();
      for (double& x : dense) x *= static_cast<double>(factor);
      c.problem.values.layout = &layout;
      OnDevice on;
      put(c.problem, on);
      EXPECT_LE(worst_error(run(on).out, dense, c.s.dim), query_size > 1 ? 1e-4 : 1e-5);
      on.bounds.half_tables = true;
      EXPECT_LE(worst_error(run(on).out, dense, c.s.dim), 2e-3);
      EXPECT_GT(worst_error(run(on).out, dense, c.s.dim), 1e-5);  // they were used
      on.bounds.half_tables = false;
      on.bounds.shared_bytes = 40 << 10;  // room for these alone
      reserve(on);
      EXPECT_LE(worst_error(run(on).out, dense, c.s.dim), 2e-3);
    }
  }
}

TEST_F(AttentionCuda, NanInTiles) {
  for (const bool halfs : {false, true}) {
    AttentionCase c(in_tiles(256, [](auto& s) { s.exact = {}, s.rotary_dim = 16; }));
    OnDevice on;
    const auto result = [&] {
      put(c.problem, on);
      on.bounds.half_tables = halfs;
      std::vector<float> out = run(on).out;
      release_all();
      return out;
    };
    const std::vector<float> good = result();
    const std::size_t head = 5, dim = size(c.s.dim);
    c.queries[head * dim + 3] = std::numeric_limits<float>::quiet_NaN();
    c.problem.queries = c.queries.data();
    const std::vector<float> bad = result();
    for (std::size_t i = 0; i < bad.size(); ++i) {
      if (i / dim == head) {
        EXPECT_TRUE(std::isnan(bad[i])) << i;
      } else {
        EXPECT_EQ(bad[i], good[i]) << i;
      }
    }
    c.queries[head * dim + 3] = 1;
    for (const float value : {NAN, INFINITY}) {  // of levels, then of scales
      CodeLayout layout = *c.problem.values.layout;
      std::vector<float> levels(layout.levels, layout.levels + (c.s.slots << c.s.weight_bits));
      std::vector<float> scales(layout.scales, layout.scales + 64);
      levels[3] = value;
      layout.levels = levels.data();
      const CodeLayout* const before = c.problem.values.layout;
      c.problem.values.layout = &layout;
      for (const float x : result()) EXPECT_FALSE(std::isfinite(x));
      levels[3] = 1;
      scales[5] = value;
      layout.scales = scales.data();
      for (const float x : result()) EXPECT_FALSE(std::isfinite(x));
      c.problem.values.layout = before;
    }
  }
}

TEST_F(AttentionCuda, OrderAndCompanyDoNotMatterToTiles) {
  for (const bool halfs : {false, true}) {
    AttentionCase c(in_tiles(256, [](auto& s) {
      s.batch = 2, s.coded = {2000, 333}, s.hot = 25, s.num_atoms = 500, s.slots = 9;
    }));
    const auto result = [&] {
      OnDevice on;
      put(c.problem, on);
      on.bounds.half_tables = halfs;
      reserve(on);
      std::vector<float> out = run(on).out;
      release_all();
      return out;
    };
    std::vector<float> first;
    test::in_several_orders([&] {
      const std::vector<float> now = result();
      if (!first.empty()) {
        EXPECT_EQ(now, first);
      }
      first = now;
    });
    c.problem.batch = c.s.batch = 1;
    const std::vector<float> alone = result();
    for (std::size_t i = 0; i < alone.size(); ++i) EXPECT_EQ(alone[i], first[i]);
  }
}

TEST_F(AttentionCuda, TilesBeyondTheBoundsAreNan) {
  AttentionCase c(in_tiles(128, [](auto& s) { s.extra = 3, s.coded = {300}; }));
  OnDevice on;
  put(c.problem, on);
  const auto sequence = download(on.problem.sequences, 1)[0];
  const auto is_nan = [&](const std::function<void(AttentionSequence&)>& change) {
    AttentionSequence wrong = sequence;
    change(wrong);
    on.problem.sequences = upload(std::vector<AttentionSequence>{wrong});
    const Result result = run(on);
    for (const float x : result.out) EXPECT_TRUE(std::isnan(x));
    for (const float x : result.log_sums) EXPECT_TRUE(std::isnan(x));
  };
  is_nan([](auto& s) { s.coded_tokens = 255; });  // two tiles are more
  is_nan([](auto& s) { s.values.num_tiles = -1; });
  is_nan([](auto& s) { s.values.num_extra = 2; });  // the tiles have three
  on.problem.value_tile_tokens = 0;
  is_nan([](auto&) {});
  // 2048 codes: one too many.
  for (const float x : run(AttentionCase(in_tiles(64, [](auto& s) { s.slots = 64; }))).out)
    EXPECT_TRUE(std::isnan(x));
}

TEST_F(AttentionCuda, OrderAndCompanyDoNotMatter) {
  for (const int rotary : {0, 64}) {
    AttentionCase c(with([&](auto& s) {
      s.rotary_dim = rotary / 2, s.batch = 2, s.coded = {1100, 333}, s.kv_heads = 2;
      s.residual = true, s.num_atoms = 300, s.dim = 32;
    }));
    std::vector<float> first;
    test::in_several_orders([&] {
      const std::vector<float> now = run(c).out;
      if (!first.empty()) {
        EXPECT_EQ(now, first);
      }
      first = now;
    });
    c.problem.batch = c.s.batch = 1;
    const std::vector<float> alone = run(c).out;
    for (std::size_t i = 0; i < alone.size(); ++i) EXPECT_EQ(alone[i], first[i]);
  }
}

TEST_F(AttentionCuda, BoundsAreNoPartOfTheResultAndBeyondThemIsNaN) {
  for (const int rotary : {0, 64}) {
    AttentionCase c(with([&](auto& s) { s.rotary_dim = rotary, s.coded = {1000}, s.extra = 2; }));
    OnDevice on;
    put(c.problem, on);
    const Result tight = run(on);
    on.bounds.coded_tokens = 5000;
    on.bounds.key_extra = on.bounds.value_extra = 7;
    reserve(on);
    const Result wide = run(on);
    EXPECT_EQ(wide.out, tight.out);
    EXPECT_EQ(wide.log_sums, tight.log_sums);
    const cuda::AttentionBounds good = on.bounds;
    const std::vector<std::function<void(cuda::AttentionBounds&)>> wrongs = {
        [](auto& b) { b.coded_tokens = 999; },
        [](auto& b) { b.value_extra = 1; },
        [](auto& b) { b.key_weights = CodedWeights::kE4m3; },
        [](auto& b) { b.value_block_bytes += 8; },
        [](auto& b) { b.key_block_bytes = 8; },  // less than is read of a block
        [](auto& b) { b.value_block_bytes = 8; },
    };
    for (const auto& wrong : wrongs) {
      on.bounds = good;
      wrong(on.bounds);
      for (const float x : run(on).out) EXPECT_TRUE(std::isnan(x));
    }
  }
}

TEST_F(AttentionCuda, WhatCannotBeRunIsSaid) {
  AttentionCase c(AttentionSetting{});
  OnDevice on;
  put(c.problem, on);
  const auto refused = [&](const std::function<void(OnDevice&)>& change, const char* word) {
    OnDevice bad = on;
    change(bad);
    const Status status = cuda::attention(bad.problem, bad.bounds, bad.workspace, nullptr);
    EXPECT_FALSE(status.ok());
    EXPECT_NE(std::string(status.what).find(word), std::string::npos) << status.what;
  };
  refused([](auto& o) { o.problem.dim = 66; }, "dim");
  refused([](auto& o) { o.problem.page_tokens = 65; }, "page_tokens");
  refused([](auto& o) { o.bounds.multiprocessors = 0; }, "attention_device");
  refused([](auto& o) { o.bounds.shared_bytes = 20 << 10; }, "shared memory");
  refused([](auto& o) { o.bounds.coded_tokens = std::int64_t{1} << 31; }, "coded tokens");
  const auto no_tiles = [&](const std::function<void(OnDevice&)>& change, const char* word) {
    refused(
        [&](auto& o) {
          o.problem.value_tile_tokens = 8192;
          o.bounds.value_weights = CodedWeights::kE4m3;
          change(o);
        },
        word);
  };
  for (const int tokens : {-64, 65, 8256})
    no_tiles([&](auto& o) { o.problem.value_tile_tokens = tokens; }, "value_tile_tokens");
  no_tiles([](auto& o) { o.bounds.value_weights = CodedWeights::kFloat32; }, "float weights");
  no_tiles([](auto& o) { o.bounds.value_components = 1; }, "components");
  no_tiles([](auto& o) { o.bounds.value_extra = 65536; }, "atoms");
  no_tiles([](auto& o) { o.bounds.shared_bytes = 60 << 10; }, "tiles of so many tokens");
}

TEST_F(AttentionCuda, EveryFailingCallIsReported) {
  for (const int rotary : {0, 64}) {
    AttentionCase c(with([&](auto& s) {
      s.rotary_dim = rotary, s.num_atoms = 4096, s.dim = 64, s.coded = {100}, s.kv_heads = 1;
    }));
    OnDevice on;
    put(c.problem, on);
    int count = 1;
    for (int fail_at = -1; fail_at < count; ++fail_at) {
      SCOPED_TRACE(fail_at);
      test::RuntimeFaults faults(fail_at);
      const Status status = cuda::attention(on.problem, on.bounds, on.workspace, nullptr);
      EXPECT_EQ(status.ok(), fail_at < 0);
      if (fail_at < 0) count = faults.calls();
    }
    EXPECT_GE(count, 6);
    wait();
    for (int fail_at = 0; fail_at < 4; ++fail_at) {
      test::RuntimeFaults faults(fail_at);
      cuda::AttentionBounds bounds;
      EXPECT_FALSE(cuda::attention_device(&bounds).ok());
    }
  }
}

}  // namespace
}  // namespace lexico::kernels
