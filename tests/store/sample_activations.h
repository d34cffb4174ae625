#pragma once

#include <cmath>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "lexico/activations.h"

namespace lexico::test {

/// A small run: 2 layers, 3 KV heads, dimension 20 (no multiple of 8), vectors that tell where they
/// are from.
inline ActivationInfo sample_info(std::int64_t num_tokens) {
  ActivationInfo info;
  info.model = "toy/model";
  info.model_sha256 = std::string(64, 'a');
  info.corpora = {"wiki", "códe"};
  info.corpus_documents = {3, 4};
  info.num_layers = 2, info.kv_heads = 3, info.head_dim = 20;
  info.num_tokens = num_tokens;
  info.seed = 0xfedcba9876543210u;
  info.sequence_length = 10;
  info.bos = "always";
  info.version = "0.1.0";
  info.command_line = "lexico-extract --model toy.pt";
  info.plan_hash = "plan";
  return info;
}

inline float sample_value(
    int layer, Kind kind, std::int64_t token, std::int64_t head, std::int64_t component) {
  return static_cast<float>(
      std::sin(static_cast<double>(token * 131 + head * 17 + component + layer * 1009) +
               (kind == Kind::kKeys ? 0.0 : 0.5)));
}

struct SampleBatch {
  std::vector<float> keys, values;
  std::vector<std::int32_t> ids, documents;
  ActivationBatch view;

  SampleBatch(const ActivationInfo& info,
              std::int64_t first_token,
              std::int64_t batch,
              std::int64_t length) {
    const std::int64_t tokens = batch * length;
    keys.resize(static_cast<std::size_t>(info.num_layers * tokens * info.kv_heads * info.head_dim));
    values.resize(keys.size());
    std::size_t at = 0;
    for (int layer = 0; layer < info.num_layers; ++layer)
      for (std::int64_t b = 0; b < batch; ++b)
        for (std::int64_t h = 0; h < info.kv_heads; ++h)
          for (std::int64_t t = 0; t < length; ++t)
            for (std::int64_t i = 0; i < info.head_dim; ++i, ++at) {
              const std::int64_t token = first_token + b * length + t;
              keys[at] = sample_value(layer, Kind::kKeys, token, h, i);
              values[at] = sample_value(layer, Kind::kValues, token, h, i);
            }
    for (std::int64_t i = 0; i < tokens; ++i) {
      ids.push_back(static_cast<std::int32_t>(1000 + first_token + i));
      documents.push_back(static_cast<std::int32_t>((first_token + i) / 7));
    }
    view = {batch, length, keys.data(), values.data(), ids.data(), documents.data()};
  }
};

/// Writes sequences of 10 tokens, two at a time, and the rest as one shorter sequence.
inline void write_sample(const std::string& path,
                         const ActivationInfo& info,
                         std::int64_t first_token = 0,
                         const float* moments = nullptr) {
  ActivationWriter writer(path, info);
  for (std::int64_t done = 0; done < info.num_tokens;) {
    const std::int64_t left = info.num_tokens - done;
    const std::int64_t batch = left >= 20 ? 2 : 1, length = left >= 10 ? 10 : left;
    writer.append(SampleBatch(info, first_token + done, batch, length).view);
    done += batch * length;
  }
  writer.finish(moments);
}

inline std::string bytes_of(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

}  // namespace lexico::test
