// Times the filling of a compressed cache.
#include "lexico-bench/cache_bench.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "lexico-bench/rounds.h"
#include "lexico/compressed_cache.h"
#include "lexico/rope.h"

namespace lexico::apps {
namespace {

int layers_for(const AttendBench& b) {
  const double bytes = 8.0 * b.num_atoms * b.dim;  // of two dictionaries
  return static_cast<int>(std::clamp(std::ceil(kBeyondCaches / bytes), 1.0, 32.0));
}

CompressedCache make_cache(const AttendBench& b, int sparsity, int chunk) {
  std::mt19937_64 random(b.seed + 2);
  CacheShape shape;
  shape.layers = layers_for(b);
  shape.kv_heads = b.kv_heads;
  shape.group = b.group;
  shape.head_dim = b.dim;
  DictionarySet set;
  set.key_stage = b.key_stage;
  set.metadata["rope"] = usual_rope(b.dim).to_json();
  for (int layer = 0; layer < shape.layers; ++layer) {
    for (const Kind kind : kBothKinds) {
      set.dictionaries.push_back(random_dictionary(b, kind, sparsity, random));
      set.dictionaries.back().layer = layer;
    }
  }
  CacheOptions options;
  options.recent_window = b.window;
  options.compress_chunk = chunk;
  options.selection = b.selection;
  options.threads = b.threads;
  options.device = b.device;
  return CompressedCache(std::move(set), shape, options);
}

}  // namespace

struct CacheCase::Impl {
  AttendBench bench;
  int chunk;
  CompressedCache cache;
  std::mt19937_64 random;
  std::vector<float> keys, values;  // [tokens, kv_heads, dim], the same for all sequences
  int next_layer = 0;
  bool stepping = false;

  Impl(const AttendBench& b, int sparsity, int compress_chunk)
      : bench(b),
        chunk(compress_chunk),
        cache(make_cache(b, sparsity, compress_chunk)),
        random(b.seed + 3) {}

  void need(std::int64_t tokens) {
    const std::size_t count = static_cast<std::size_t>(tokens * bench.kv_heads * bench.dim);
    if (keys.size() >= count) return;
    keys = normals(count, random);
    values = normals(count, random);
  }

  void start() {
    cache.clear();
    for (int i = 0; i < bench.batch; ++i) cache.add_sequence();
    next_layer = 0;
  }

  void append(std::int64_t first, std::int64_t tokens) {
    std::vector<NewTokens> added(static_cast<std::size_t>(bench.batch));
    const std::int64_t offset = first * bench.kv_heads * bench.dim;
    for (int i = 0; i < bench.batch; ++i) {
      NewTokens& of_one = added[static_cast<std::size_t>(i)];
      of_one.sequence = i;
      of_one.tokens = tokens;
      of_one.keys = keys.data() + offset;
      of_one.values = values.data() + offset;
    }
    cache.append(next_layer, added);
  }
};

CacheCase::CacheCase(const AttendBench& bench, int sparsity, int compress_chunk)
    : impl_(std::make_unique<Impl>(bench, sparsity, compress_chunk)) {}
CacheCase::~CacheCase() = default;
CacheCase::CacheCase(CacheCase&&) noexcept = default;

double CacheCase::prompt_ms(std::int64_t tokens, double least_ms, bool processor) {
  Impl& impl = *impl_;
  impl.need(tokens);
  impl.stepping = false;
  impl.start();
  return ms_per_call(least_ms, processor, [&] {
    if (impl.next_layer == impl.cache.shape().layers) impl.start();
    impl.append(0, tokens);
    ++impl.next_layer;
  });
}

double CacheCase::step_ms(double least_ms, bool processor) {
  Impl& impl = *impl_;
  const int layers = impl.cache.shape().layers;
  if (!impl.stepping) {
    impl.need(std::max(impl.bench.window + impl.chunk - 1, impl.chunk));
    impl.start();
    for (; impl.next_layer < layers; ++impl.next_layer)
      impl.append(0, impl.bench.window + impl.chunk - 1);  // the next one compresses
    impl.stepping = true;
  }
  // A call is the steps from one compression to the next.
  const double ms = ms_per_call(least_ms, processor, [&] {
    impl.next_layer = (impl.next_layer + 1) % layers;
    for (int step = 0; step < impl.chunk; ++step) impl.append(step, 1);
  });
  return ms / impl.chunk;
}

std::int64_t CacheCase::coded_tokens(std::int64_t prompt) const {
  const std::int64_t beyond = prompt - impl_->bench.window;
  return beyond >= impl_->chunk ? beyond : 0;
}

}  // namespace lexico::apps
