// The contract of attention on codes, on every instruction set level this machine has, against
// dense attention in double on the vectors that the codes stand for.
#include "kernels/attention/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <sstream>
#include <string>

#include "kernels/attention_cases.h"
#include "kernels/pursuit/pursuit.h"

namespace lexico::kernels {
namespace {

std::vector<std::string> levels() {
  std::vector<std::string> all;
  std::istringstream names(cpu::pursuit_levels());
  for (std::string name; std::getline(names, name, '|');) {
    if (name == "generic" || name == "avx2" || name == "avx512") all.push_back(name);
  }
  return all;
}

class Attention : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_TRUE(cpu::set_pursuit_level(GetParam().c_str()).ok()); }
  void TearDown() override { ASSERT_TRUE(cpu::set_pursuit_level(nullptr).ok()); }
};
INSTANTIATE_TEST_SUITE_P(Levels, Attention, testing::ValuesIn(levels()), [](const auto& test) {
  return test.param;
});

void expect_as_dense(const AttentionSetting& setting, double bound = 1e-5) {
  AttentionCase c(setting);
  std::vector<double> sums;
  std::vector<float> log_sums;
  const std::vector<double> dense = c.dense(&sums);
  EXPECT_LE(worst_error(c.run(2, &log_sums), dense, setting.dim), bound);
  for (std::size_t i = 0; i < sums.size(); ++i) {
    if (std::isinf(sums[i]))
      EXPECT_EQ(static_cast<double>(log_sums[i]), sums[i]);
    else
      EXPECT_NEAR(static_cast<double>(log_sums[i]), sums[i], 1e-5 * (1 + std::fabs(sums[i])));
  }
}

TEST_P(Attention, AgreesWithDenseAttention) { expect_as_dense({}); }

TEST_P(Attention, EveryGroupSize) {
  for (int group = 1; group <= 9; ++group) {
    SCOPED_TRACE(group);
    expect_as_dense(with([&](auto& s) { s.group = group, s.kv_heads = 3; }));
    expect_as_dense(with([&](auto& s) { s.group = group, s.rotary_dim = 64; }));
  }
}

TEST_P(Attention, EveryHeadDim) {
  for (const int dim : {4, 32, 40, 64, 72, 80, 96, 100, 128, 192, 256}) {
    SCOPED_TRACE(dim);
    expect_as_dense(with([&](auto& s) { s.dim = dim; }));
    expect_as_dense(
        with([&](auto& s) { s.dim = dim, s.rotary_dim = dim / 8 * 8 == 0 ? 4 : dim / 8 * 8; }));
  }
}

TEST_P(Attention, EveryLength) {
  for (const std::int64_t coded :
       {0, 1, 15, 16, 17, 63, 64, 65, 127, 129, 1023, 1024, 1025, 2049, 4097, 6500}) {
    SCOPED_TRACE(coded);
    expect_as_dense(with([&](auto& s) { s.coded = {coded}, s.num_atoms = 37; }));
    expect_as_dense(with([&](auto& s) {
      s.coded = {coded}, s.exact = {}, s.rotary_dim = 32, s.dim = 32, s.num_atoms = 200;
    }));
  }
}

TEST_P(Attention, ExactTokensAlone) {
  expect_as_dense(with([](auto& s) { s.coded = {0}, s.exact = {1}; }));
  expect_as_dense(with([](auto& s) { s.coded = {0}, s.exact = {4, 0, 1500}; }));
  expect_as_dense(with([](auto& s) { s.coded = {0}, s.exact = {0}; }));
}

TEST_P(Attention, NoTokensGiveZeros) {
  AttentionCase c(
      with([](auto& s) { s.coded = {0}, s.exact = {}, s.means = true, s.maps = true; }));
  std::vector<float> log_sums;
  for (const float x : c.run(1, &log_sums)) EXPECT_EQ(x, 0.0f);
  for (const float x : log_sums) EXPECT_EQ(x, -std::numeric_limits<float>::infinity());
  AttentionProblem nothing;
  EXPECT_TRUE(cpu::attention(nothing, nullptr).ok());
}

TEST_P(Attention, SequencesOfDifferentLengths) {
  for (const int rotary : {0, 64}) {
    expect_as_dense(with([&](auto& s) {
      s.batch = 5, s.coded = {0, 700, 64, 3000}, s.rotary_dim = rotary;
    }));
  }
}

TEST_P(Attention, EveryIndexWidth) {
  for (const int atoms : {1, 2, 3, 5, 9, 33, 100, 257, 1000, 1024, 1500, 4096, 5000, 70000}) {
    SCOPED_TRACE(atoms);
    expect_as_dense(with([&](auto& s) { s.num_atoms = atoms, s.dim = 32, s.coded = {150}; }));
  }
}

TEST_P(Attention, EveryWeightFormat) {
  expect_as_dense(with([](auto& s) { s.weights = CodedWeights::kE4m3; }));
  for (int bits = 1; bits <= 8; ++bits) {
    SCOPED_TRACE(bits);
    for (const int rotary : {0, 64}) {
      expect_as_dense(with([&](auto& s) {
        s.weights = CodedWeights::kLevels, s.weight_bits = bits, s.scale_bits = bits;
        s.rotary_dim = rotary;
      }));
    }
  }
}

TEST_P(Attention, TrellisCodedComponents) {
  for (const int rotary : {0, 64}) {
    for (const bool relative : {false, true}) {
      expect_as_dense(with([&](auto& s) {
        s.residual = s.trellis = true, s.relative = relative, s.rotary_dim = rotary;
        s.weights = CodedWeights::kLevels, s.scale_bits = 4;
      }));
    }
  }
}

TEST_P(Attention, NeighbouringDimsRotate) {
  for (const int rotary : {4, 20, 64}) {
    expect_as_dense(with(
        [&](auto& s) { s.rotary_dim = rotary, s.interleaved = true, s.attention_scaling = 1.3f; }));
  }
}

TEST_P(Attention, ExtraAtomsOfEachHead) {
  for (const int rotary : {0, 64}) {
    expect_as_dense(with([&](auto& s) {
      s.extra = 9, s.head_extra = true, s.rotary_dim = rotary, s.batch = 2, s.group = 6;
    }));
  }
}

TEST_P(Attention, TokensLeftOutDoNotCount) {
  std::vector<std::int64_t> block, most;
  for (std::int64_t t = 0; t < 5000; ++t) {
    if (t >= 64 && t < 1200) block.push_back(t);
    if (t != 4500) most.push_back(t);
  }
  for (const int rotary : {0, 64}) {
    for (const auto& left_out : {std::vector<std::int64_t>{0}, {3, 63, 64, 1025}, block, most}) {
      SCOPED_TRACE(testing::Message() << left_out.size() << " of tokens, rotary " << rotary);
      for (const int exact : {0, 5}) {
        expect_as_dense(with([&](auto& s) {
          s.coded = {5000, 300}, s.batch = 2, s.exact = {exact}, s.left_out = left_out;
          s.rotary_dim = rotary, s.group = 5, s.means = true;
        }));
      }
    }
  }
}

TEST_P(Attention, EveryE4m3ByteMeansItsNumber) {
  // One token and one slot: the value is the weight times the atom.
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    if ((byte & 0x7f) == 0x7f) continue;
    AttentionCase c(with([](auto& s) {
      s.weights = CodedWeights::kE4m3, s.coded = {1}, s.exact = {}, s.slots = 1, s.dim = 4;
      s.num_atoms = 1, s.kv_heads = 1, s.group = 1;
    }));
    std::uint32_t atom = 0;
    const CodedFields fields{&atom, &byte, 0, nullptr};
    std::vector<std::uint8_t> page(block_bytes(*c.problem.values.layout) + kPageSlack);
    write_fields(*c.problem.values.layout, page.data(), 0, fields);
    const std::uint8_t* pages[] = {page.data()};
    AttentionSequence sequence = *c.problem.sequences;
    sequence.values.pages = pages;
    c.problem.page_tokens = kBlockTokens;
    c.problem.sequences = &sequence;
    EXPECT_EQ(c.run()[0], e4m3_value(byte) * c.problem.values.atoms[0]) << byte;
  }
}

TEST_P(Attention, AllWeightsZero) {
  AttentionCase c(with([](auto& s) { s.weights = CodedWeights::kLevels, s.exact = {}; }));
  std::vector<float> zeros(static_cast<std::size_t>(c.s.slots << c.s.weight_bits), 0.0f);
  CodeLayout layout = *c.problem.values.layout;
  layout.levels = zeros.data();
  c.problem.keys.layout = c.problem.values.layout = &layout;
  std::vector<float> log_sums;
  for (const float x : c.run(1, &log_sums)) EXPECT_EQ(x, 0.0f);
  for (const float x : log_sums) EXPECT_NEAR(x, std::log(300.0f), 1e-5f);
}

TEST_P(Attention, NoSlots) {
  expect_as_dense(with([](auto& s) { s.slots = 0, s.residual = true; }));
  expect_as_dense(with([](auto& s) { s.slots = 0, s.means = true; }));
}

TEST_P(Attention, MeansMapsAndDictionariesOfHeads) {
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

TEST_P(Attention, AtomsOfOneSequence) {
  for (const int rotary : {0, 64}) {
    expect_as_dense(with([&](auto& s) {
      s.extra = 13, s.batch = 3, s.coded = {100, 90}, s.rotary_dim = rotary, s.head_atoms = true;
    }));
  }
}

TEST_P(Attention, ResidualCode) {
  for (const int rotary : {0, 64}) {
    for (const bool relative : {false, true}) {
      for (const int group : {3, 8}) {
        expect_as_dense(with([&](auto& s) {
          s.residual = true, s.relative = relative, s.group = group, s.rotary_dim = rotary;
          s.weights = CodedWeights::kLevels, s.scale_bits = 8, s.extra = 3, s.coded = {333};
        }));
      }
    }
  }
}

TEST_P(Attention, KeysRebuiltFromHalfFloats) {
  for (const int dim : {64, 72, 128}) {
    AttentionCase c(with([&](auto& s) {
      s.rotary_dim = 64, s.dim = dim, s.extra = 5, s.head_atoms = true, s.means = true;
    }));
    // Atoms that half floats hold exactly, so that nothing is lost.
    std::vector<std::uint16_t> half;
    std::vector<float> atoms;
    const std::size_t count = static_cast<std::size_t>(c.s.kv_heads * c.s.num_atoms * dim);
    for (std::size_t i = 0; i < count; ++i) {
      half.push_back(
          static_cast<std::uint16_t>(0x2c00 + i * 7919 % 0x800 + (i % 3 == 0 ? 0x8000 : 0)));
      const int exponent = half.back() >> 10 & 31, mantissa = half.back() & 1023;
      const float x = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
      atoms.push_back(i % 3 == 0 ? -x : x);
    }
    c.problem.keys.atoms = atoms.data();
    const std::vector<float> whole = c.run();
    c.problem.keys.half_atoms = half.data();
    EXPECT_EQ(c.run(), whole);
  }
}

TEST_P(Attention, ExactTokensIn16Bits) {
  for (const ExactType type : {ExactType::kFloat16, ExactType::kBFloat16})
    expect_as_dense(with([&](auto& s) { s.exact_type = type, s.coded = {50}; }));
}

TEST_P(Attention, FarPositionsTurnByTheAngleOfTheModels) {
  for (const std::int64_t position : {0, 1000, 32767, 131071, 1000003}) {
    SCOPED_TRACE(position);
    expect_as_dense(with([&](auto& s) {
      s.rotary_dim = 128, s.dim = 128, s.first_position = position, s.coded = {2100};
      s.exact = {}, s.attention_scaling = 1.2f;
    }));
  }
}

TEST_P(Attention, LargeScores) {
  // Scores of some thousands: the softmax is nearly a choice, and e^score would overflow. What a
  // score loses by rounding grows with it.
  for (const int rotary : {0, 64})
    expect_as_dense(with([&](auto& s) { s.query_size = 1000, s.rotary_dim = rotary; }), 3e-3);
  AttentionCase c(with([](auto& s) { s.query_size = 1e20f; }));
  for (const float x : c.run()) EXPECT_TRUE(std::isfinite(x));
}

TEST_P(Attention, NanStaysInItsHead) {
  for (const int rotary : {0, 64}) {
    AttentionCase c(with([&](auto& s) { s.rotary_dim = rotary, s.coded = {2500}; }));
    const std::vector<float> good = c.run();
    const std::size_t head = 5, dim = static_cast<std::size_t>(c.s.dim);
    c.queries[head * dim + 3] = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> bad = c.run();
    for (std::size_t i = 0; i < bad.size(); ++i) {
      if (i / dim == head)
        EXPECT_TRUE(std::isnan(bad[i])) << i;
      else
        EXPECT_EQ(bad[i], good[i]) << i;
    }
  }
}

TEST_P(Attention, ThreadsAndCompanyDoNotMatter) {
  for (const int rotary : {0, 64}) {
    AttentionCase c(with([&](auto& s) {
      s.rotary_dim = rotary, s.batch = 2, s.coded = {5000, 333}, s.kv_heads = 3, s.num_atoms = 300;
    }));
    const std::vector<float> one = c.run(1);
    for (int threads = 2; threads <= 4; ++threads) EXPECT_EQ(c.run(threads), one);
    c.problem.batch = 1;
    c.s.batch = 1;
    const std::vector<float> alone = c.run(2);
    for (std::size_t i = 0; i < one.size() / 2; ++i) EXPECT_EQ(alone[i], one[i]);
  }
}

TEST_P(Attention, NothingIsReadBehindAPage) {
  // Tokens that are not there have random bytes (AttentionCase), and pages end kPageSlack behind
  // their last block; the sanitizers see the rest.
  expect_as_dense(with([](auto& s) { s.page_tokens = 64, s.slots = 1, s.coded = {64 * 5}; }));
  expect_as_dense(with([](auto& s) {
    s.page_tokens = 64, s.coded = {64 * 5}, s.weights = CodedWeights::kLevels, s.weight_bits = 2;
    s.slots = 1, s.num_atoms = 3;
  }));
}

TEST(CodedBlock, FieldsComeBackAndTakeTheirBitsExactly) {
  AttentionCase c(with([](auto& s) {
    s.residual = true, s.weights = CodedWeights::kLevels, s.scale_bits = 7, s.num_atoms = 1000;
  }));
  const CodeLayout& layout = *c.problem.keys.layout;
  int bits = layout.slots * (10 + 5) + 7;
  for (int k = 0; k < layout.components; ++k) bits += layout.component_bits[k];
  EXPECT_EQ(coded_bits(layout), bits);
  EXPECT_EQ(block_bytes(layout), static_cast<std::size_t>(bits * kBlockTokens / 8));
  std::mt19937 random(3);
  std::vector<std::uint8_t> block(block_bytes(layout), 0xff);
  const auto draw = [&](int width) {
    return static_cast<std::uint32_t>(random() & ((1u << width) - 1));
  };
  struct Vector {
    std::vector<std::uint32_t> atoms, weights, components;
    std::uint32_t scale;
  };
  std::vector<Vector> written;
  for (int t = 0; t < kBlockTokens; ++t) {
    Vector v;
    for (int k = 0; k < layout.slots; ++k)
      v.atoms.push_back(draw(10)), v.weights.push_back(draw(5));
    v.scale = draw(7);
    for (int k = 0; k < layout.components; ++k)
      v.components.push_back(draw(layout.component_bits[k]));
    write_fields(
        layout, block.data(), t, {v.atoms.data(), v.weights.data(), v.scale, v.components.data()});
    written.push_back(v);
  }
  for (int t = 0; t < kBlockTokens; ++t) {
    Vector v = written[0];
    CodedFields fields{v.atoms.data(), v.weights.data(), 0, v.components.data()};
    for (auto& x : v.components) x = 0;
    read_fields(layout, block.data(), t, fields);
    const Vector& w = written[static_cast<std::size_t>(t)];
    EXPECT_EQ(v.atoms, w.atoms);
    EXPECT_EQ(v.weights, w.weights);
    EXPECT_EQ(fields.scale, w.scale);
    EXPECT_EQ(v.components, w.components);
  }
}

TEST(AttentionOnTheCpu, TakesNoValueTiles) {
  AttentionCase c(with([](auto& s) {
    s.weights = CodedWeights::kE4m3, s.batch = 2, s.tile_tokens = 64, s.tiles = {0, 1};
  }));
  std::vector<float> out(c.queries.size(), 7.0f);
  c.problem.out = out.data();
  std::vector<char> workspace(cpu::attention_workspace_bytes(c.problem));
  const Status status = cpu::attention(c.problem, workspace.data());
  EXPECT_NE(status.code, 0);
  EXPECT_NE(std::string(status.what).find("tiles"), std::string::npos) << status.what;
  for (const float x : out) EXPECT_EQ(x, 7.0f);
  // Without any sequence that has one they are no matter.
  c.s.tiles = {0};
  AttentionCase none(c.s);
  EXPECT_LE(worst_error(none.run(), none.dense(), none.s.dim), 1e-5);
}

}  // namespace
}  // namespace lexico::kernels
