// Compresses the keys and values of a prompt, attends over them, and says how far both are from
// the vectors as given. Uses nothing but an installed lexico.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lexico/compressed_cache.h"
#include "lexico/dictionary.h"
#include "lexico/error.h"
#include "lexico/files.h"

namespace {

constexpr const char* kUsage =
    "usage: lexico_consumer DICTIONARIES KV_HEADS TOKENS [VECTORS]\n\n"
    "  DICTIONARIES  dictionary.safetensors, or a run folder of lexico-train\n"
    "  KV_HEADS      of each layer\n"
    "  TOKENS        of the prompt\n"
    "  VECTORS       float32 [layers, keys and values, tokens, kv_heads, head_dim], keys after\n"
    "                RoPE; none: random ones, which no dictionary codes well\n";

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

std::int64_t count_from(const char* name, std::string_view text) {
  std::int64_t count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  if (error != std::errc() || end != text.data() + text.size() || count < 1 || count > 1 << 24)
    throw lexico::InvalidArgument(std::string(name) + " is '" + std::string(text) +
                                  "', must be in [1, 2^24]");
  return count;
}

std::vector<float> normals(std::size_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& number : x) number = normal(random);
  return x;
}

std::vector<float> vectors_of(const std::string& path, std::size_t count) {
  const std::string bytes = lexico::read_file(path);
  if (bytes.size() != count * sizeof(float))
    throw lexico::IoError(path + ": has " + std::to_string(bytes.size()) + " bytes, must be " +
                          std::to_string(count * sizeof(float)));
  std::vector<float> x(count);
  std::memcpy(x.data(), bytes.data(), bytes.size());
  return x;
}

/// Softmax attention of one query over dense keys and values [tokens, kv_heads, dim] of one head.
std::vector<double> dense_attention(const float* query,
                                    const float* keys,
                                    const float* values,
                                    std::int64_t tokens,
                                    std::int64_t stride,
                                    int dim) {
  std::vector<double> scores(size(tokens)), out(size(dim));
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (int i = 0; i < dim; ++i) scores[size(t)] += double{query[i]} * keys[t * stride + i];
    scores[size(t)] /= std::sqrt(double(dim));
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const double weight = std::exp(scores[size(t)] - top);
    sum += weight;
    for (int i = 0; i < dim; ++i) out[size(i)] += weight * values[t * stride + i];
  }
  for (double& number : out) number /= sum;
  return out;
}

/// |a - b| / |b|, summed over all calls.
struct RelativeError {
  double difference = 0, norm = 0;
  void add(double a, double b) {
    difference += (a - b) * (a - b);
    norm += b * b;
  }
  double value() const { return norm > 0 ? std::sqrt(difference / norm) : 0.0; }
};

void run(int argc, char** argv) {
  lexico::DictionarySet set = lexico::read_dictionaries(argv[1]);
  const int heads = static_cast<int>(count_from("KV_HEADS", argv[2]));
  const std::int64_t tokens = count_from("TOKENS", argv[3]);
  const int layers = set.layers().back() + 1, dim = set.dictionaries.front().dim;
  const std::int64_t per_kind = tokens * heads * dim;
  const std::vector<float> vectors = argc > 4 ? vectors_of(argv[4], size(2 * layers * per_kind))
                                              : normals(size(2 * layers * per_kind), 1);
  const std::vector<float> queries = normals(size(heads * dim), 2);

  lexico::CacheShape shape;
  shape.layers = layers;
  shape.kv_heads = heads;
  shape.head_dim = dim;
  lexico::CacheOptions options;
  options.recent_window = 16;
  lexico::CompressedCache cache(std::move(set), shape, options);
  const int sequence = cache.add_sequence();

  RelativeError of_vectors, of_attention;
  std::vector<float> out(queries.size()), keys_back(size(per_kind)), values_back(size(per_kind));
  for (int layer = 0; layer < layers; ++layer) {
    const float* keys = &vectors[size(2 * layer * per_kind)];
    const float* values = keys + per_kind;
    cache.append(layer, {sequence}, tokens, keys, values);
    cache.attend(layer, {sequence}, queries.data(), out.data());

    cache.reconstruct(layer, sequence, 0, tokens, keys_back.data(), values_back.data());
    for (std::int64_t i = 0; i < per_kind; ++i) {
      of_vectors.add(keys_back[size(i)], keys[i]);
      of_vectors.add(values_back[size(i)], values[i]);
    }
    for (int h = 0; h < heads; ++h) {
      const std::vector<double> want = dense_attention(
          &queries[size(h * dim)], keys + h * dim, values + h * dim, tokens, heads * dim, dim);
      for (int i = 0; i < dim; ++i) of_attention.add(out[size(h * dim + i)], want[size(i)]);
    }
  }
  std::printf("tokens          %lld, of which coded %lld\n",
              static_cast<long long>(tokens),
              static_cast<long long>(cache.coded_tokens(sequence, 0)));
  std::printf("bytes           %zu, as 16-bit numbers %lld\n",
              cache.bytes(),
              static_cast<long long>(4 * layers * per_kind));
  std::printf("vector error    %.4f\n", of_vectors.value());
  std::printf("attention error %.4f\n", of_attention.value());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || argc > 5) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  try {
    run(argc, argv);
    return 0;
  } catch (const lexico::InvalidArgument& error) {
    std::fprintf(stderr, "lexico_consumer: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "lexico_consumer: %s\n", error.what());
    return 3;
  }
}
