// Attention over codes from dictionaries and Codec's bytes, against dense attention in double on
// what Codec decodes.
#include "lexico/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "core/attention_layers.h"
#include "lexico/error.h"

namespace lexico {
namespace {

// |ours - dense| / |dense| of the worst head.
double worst_error(const Layer& layer, std::int64_t coded, int exact, bool half = false) {
  AttentionOptions options;
  options.kv_heads = kHeads;
  options.group = kGroup;
  options.page_tokens = 128;
  options.half_keys = half;
  LayerAttention attention({&layer.keys}, {&layer.values}, options, layer.stage, layer.rope);
  LayerAttention::Sequence sequence;
  CodedVectors stores[] = {attention.coded_keys(), attention.coded_values()};
  const std::int64_t first_position = 5;
  std::vector<float> vectors[2], exact_vectors[2];
  for (const Kind kind : kBothKinds) {
    const std::size_t k = static_cast<std::size_t>(kind);
    const Dictionary& d = kind == Kind::kKeys ? layer.keys : layer.values;
    std::vector<float>& x = vectors[k];
    x = normals(static_cast<std::size_t>(coded * kHeads * kDim), 40 + static_cast<unsigned>(k));
    Codec codec(d);
    std::vector<std::uint8_t> bytes(
        static_cast<std::size_t>(coded * kHeads * codec.bytes_per_vector()));
    codec.encode(x.data(), coded * kHeads, bytes.data());
    const std::int64_t some = coded / 3;  // in two pieces
    stores[k].append(bytes.data(), some);
    stores[k].append(bytes.data() + some * kHeads * codec.bytes_per_vector(), coded - some);
    codec.decode(bytes.data(), coded * kHeads, x.data());
    d.transform.backward(x.data(), coded * kHeads, kDim);
    if (kind == Kind::kKeys && layer.stage == KeyStage::kPreRope) {
      std::vector<std::int32_t> positions;
      for (std::int64_t i = 0; i < coded * kHeads; ++i)
        positions.push_back(static_cast<std::int32_t>(first_position + i / kHeads));
      layer.rope.apply(0, x.data(), kDim, positions.data(), coded * kHeads);
    }
    exact_vectors[k] =
        normals(static_cast<std::size_t>(exact * kHeads * kDim), 50 + static_cast<unsigned>(k));
  }
  sequence.keys = &stores[0];
  sequence.values = &stores[1];
  sequence.first_position = first_position;
  sequence.exact = {
      {exact_vectors[0].data(), exact_vectors[1].data(), std::int64_t{exact} * kDim, exact}};
  const std::vector<float> queries = normals(kHeads * kGroup * kDim, 60);
  std::vector<float> out(queries.size());
  AttentionScratch scratch;
  attention.attend({sequence}, queries.data(), out.data(), scratch);

  double worst = 0;
  for (int head = 0; head < kHeads * kGroup; ++head) {
    const int h = head / kGroup;
    const float* q = &queries[static_cast<std::size_t>(head * kDim)];
    std::vector<double> sum(kDim, 0.0);
    double total = 0;
    for (std::int64_t t = 0; t < coded + exact; ++t) {
      const bool is_coded = t < coded;
      const auto row = [&](std::size_t k) {
        return is_coded
                   ? &vectors[k][static_cast<std::size_t>((t * kHeads + h) * kDim)]
                   : &exact_vectors[k][static_cast<std::size_t>((h * exact + t - coded) * kDim)];
      };
      double score = 0;
      for (int i = 0; i < kDim; ++i)
        score += static_cast<double>(q[i]) * static_cast<double>(row(0)[i]);
      const double weight = std::exp(score / std::sqrt(double{kDim}));
      total += weight;
      for (std::size_t i = 0; i < kDim; ++i) sum[i] += weight * static_cast<double>(row(1)[i]);
    }
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < kDim; ++i) {
      const double want = sum[i] / total;
      const double off = static_cast<double>(out[static_cast<std::size_t>(head * kDim) + i]) - want;
      error += off * off, norm += want * want;
    }
    worst = std::max(worst, std::sqrt(error / norm));
  }
  return worst;
}

TEST(LayerAttention, AgreesWithDenseAttentionOnDecodedVectors) {
  for (const auto coding : {CodeFormat::Coding::kFp8Int16, CodeFormat::Coding::kPacked}) {
    for (const KeyStage stage : {KeyStage::kPostRope, KeyStage::kPreRope}) {
      for (const bool transform : {false, true}) {
        for (const int groups : {0, 1, kHeads}) {
          if (groups > 0 && coding != CodeFormat::Coding::kPacked) continue;
          SCOPED_TRACE(testing::Message()
                       << "coding " << static_cast<int>(coding) << ' ' << name_of(stage)
                       << " transform " << transform << " groups " << groups);
          Layer layer{dictionary(Kind::kKeys, coding, transform, groups),
                      dictionary(Kind::kValues, coding, transform, groups),
                      a_rope(),
                      stage};
          EXPECT_LE(worst_error(layer, 300, 10), 1e-5);
          if (stage == KeyStage::kPreRope) {
            EXPECT_LE(worst_error(layer, 300, 10, true), 1e-3);
          }
        }
      }
    }
  }
}

TEST(LayerAttention, CodesTakeTheBytesOfTheirFormat) {
  Dictionary d = dictionary(Kind::kKeys, CodeFormat::Coding::kPacked, false, 1);
  AttentionOptions options;
  options.kv_heads = kHeads;
  LayerAttention attention({&d}, {&d}, options);
  CodedVectors keys = attention.coded_keys();
  const int bytes = d.format.bytes_per_vector(kAtoms, kDim);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(4096 * kHeads * bytes));
  keys.append(codes.data(), 4096);
  const double promised = 4096.0 * kHeads * d.format.bits_per_vector(kAtoms, kDim) / 8;
  EXPECT_LE(static_cast<double>(keys.bytes()), promised * 1.01);
}

TEST(LayerAttention, CopiesOfCodesGoTheirOwnWay) {
  Layer layer{dictionary(Kind::kKeys, CodeFormat::Coding::kPacked, false, 0),
              dictionary(Kind::kValues, CodeFormat::Coding::kPacked, false, 0),
              {}};
  AttentionOptions options;
  options.kv_heads = kHeads;
  options.group = kGroup;
  LayerAttention attention({&layer.keys}, {&layer.values}, options);
  CodedVectors keys = attention.coded_keys(), values = attention.coded_values();
  std::mt19937 random(7);
  std::vector<std::uint8_t> codes(
      static_cast<std::size_t>(100 * kHeads * layer.keys.format.bytes_per_vector(kAtoms, kDim)));
  const auto add = [&](CodedVectors& to, std::int64_t tokens) {
    for (std::uint8_t& byte : codes) byte = static_cast<std::uint8_t>(random());
    to.append(codes.data(), tokens);
  };
  add(keys, 100), add(values, 100);
  const std::vector<float> queries = normals(kHeads * kGroup * kDim, 60);
  const auto attend = [&](const CodedVectors& k, const CodedVectors& v) {
    std::vector<float> out(queries.size());
    AttentionScratch scratch;
    attention.attend({{&k, &v, 0, {}}}, queries.data(), out.data(), scratch);
    return out;
  };
  const std::vector<float> before = attend(keys, values);
  CodedVectors other_keys = keys, other_values = values;
  add(other_keys, 50), add(other_values, 50);
  EXPECT_EQ(attend(keys, values), before);
  EXPECT_NE(attend(other_keys, other_values), before);
  other_keys.truncate(100), other_values.truncate(100);
  EXPECT_EQ(attend(other_keys, other_values), before);
  for (const float x : before) EXPECT_TRUE(std::isfinite(x));  // whatever the bytes
  EXPECT_THROW(other_keys.truncate(101), InvalidArgument);
  EXPECT_THROW(other_keys.truncate(-1), InvalidArgument);
  other_keys.truncate(99);
  EXPECT_THROW(attend(other_keys, other_values), InvalidArgument);
}

TEST(LayerAttention, WhatDoesNotFitIsNamed) {
  const Dictionary good = dictionary(Kind::kKeys, CodeFormat::Coding::kPacked, false, 0);
  AttentionOptions options;
  options.kv_heads = kHeads;
  const auto message = [&](const Dictionary& keys, const AttentionOptions& with, const Rope& rope) {
    try {
      LayerAttention attention({&keys}, {&good}, with, KeyStage::kPreRope, rope);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message(good, options, a_rope()), "");
  Dictionary exact = good;
  exact.format = {};
  EXPECT_NE(message(exact, options, {}).find("exact and max_atoms 0"), std::string::npos);
  AttentionOptions odd = options;
  odd.page_tokens = 100;
  EXPECT_NE(message(good, odd, {}).find("page_tokens is 100"), std::string::npos);
  odd = options;
  odd.kv_heads = 0;
  EXPECT_NE(message(good, odd, {}).find("kv_heads is 0"), std::string::npos);
  Rope other = a_rope();
  other.layout = "other";
  EXPECT_NE(message(good, options, other).find("layout is 'other'"), std::string::npos);
  odd = options;
  odd.own_atoms = -1;
  EXPECT_NE(message(good, odd, {}).find("own_atoms is -1"), std::string::npos);
  EXPECT_THROW(LayerAttention({&good, &good, &good}, {&good}, options), InvalidArgument);
  EXPECT_THROW(LayerAttention({}, {&good}, options), InvalidArgument);
}

}  // namespace
}  // namespace lexico
