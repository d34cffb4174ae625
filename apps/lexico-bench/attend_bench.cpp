// Random layers for timing attention on codes.
#include "lexico-bench/attend_bench.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>
#include <utility>

#include "lexico-bench/rounds.h"
#include "lexico/attention.h"
#include "lexico/device_array.h"

namespace lexico::apps {

std::vector<float> normals(std::size_t count, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& v : x) v = normal(random);
  return x;
}

Dictionary random_dictionary(const AttendBench& b,
                             Kind kind,
                             int sparsity,
                             std::mt19937_64& random) {
  Dictionary d;
  d.kind = kind;
  d.num_atoms = b.num_atoms;
  d.dim = b.dim;
  d.atoms =
      normals(static_cast<std::size_t>(b.num_atoms) * static_cast<std::size_t>(b.dim), random);
  normalize_atoms(d.atoms, d.num_atoms, d.dim);
  d.format.coding = coding_from(b.format);
  d.format.max_atoms = sparsity;
  if (d.format.coding != CodeFormat::Coding::kPacked) return d;
  d.format.weight_bits = 5;
  d.format.scale_bits = 8;
  d.format.scale_low = -4;
  d.format.scale_step = 1.0f / 16;
  for (int k = 0; k < sparsity; ++k)
    for (int i = 0; i < 32; ++i)
      d.format.weight_levels.push_back(static_cast<float>(i - 16) / 32.0f);
  return d;
}

Rope usual_rope(int dim) {
  Rope rope;
  rope.kind = "default";
  rope.rotary_dim = dim / 2 * 2;
  for (int i = 0; i < dim / 2; ++i)
    rope.inverse_frequencies.push_back(std::pow(10000.0, -2.0 * i / dim));
  return rope;
}

namespace {

// Any bytes are codes; scales and weights stay of the size of real ones.
void append_random(CodedVectors& to,
                   const Dictionary& d,
                   std::int64_t tokens,
                   int heads,
                   std::mt19937_64& random) {
  const std::int64_t bytes = d.format.bytes_per_vector(d.num_atoms, d.dim);
  constexpr std::int64_t kPiece = 4096;
  std::vector<std::uint8_t> codes(
      static_cast<std::size_t>(std::min(kPiece, tokens) * heads * bytes));
  const bool packed = d.format.coding == CodeFormat::Coding::kPacked;
  const std::size_t s = static_cast<std::size_t>(d.format.max_atoms);
  for (std::int64_t first = 0; first < tokens; first += kPiece) {
    for (std::uint8_t& byte : codes) byte = static_cast<std::uint8_t>(random() >> 11);
    for (std::size_t at = 0; at < codes.size(); at += static_cast<std::size_t>(bytes)) {
      if (packed) {
        codes[at] = static_cast<std::uint8_t>(48 + codes[at] % 32);  // scales around 1
        continue;
      }
      codes[at] = static_cast<std::uint8_t>(s & 255),
      codes[at + 1] = static_cast<std::uint8_t>(s >> 8);
      for (std::size_t k = 0; k < s; ++k) {
        std::uint8_t* index = &codes[at + 2 + 2 * k];
        const int atom = (index[0] | index[1] << 8) % d.num_atoms;
        index[0] = static_cast<std::uint8_t>(atom & 255);
        index[1] = static_cast<std::uint8_t>(atom >> 8);
        codes[at + 2 + 2 * s + k] &= 0xb7;  // below 2
      }
    }
    to.append(codes.data(), std::min(kPiece, tokens - first));
  }
}

// On the host, or on a GPU.
class Numbers {
 public:
  Numbers(std::vector<float> values, const std::string& device) {
    if (device == "cpu") {
      host_ = std::move(values);
      return;
    }
    device_.emplace(device, values.size());
    device_->write(values.data());
  }
  float* data() { return device_ ? device_->data() : host_.data(); }
  void wait() const {
    if (device_) device_->wait();
  }

 private:
  std::vector<float> host_;
  std::optional<DeviceArray> device_;
};

struct Layer {
  Dictionary keys, values;
  std::unique_ptr<LayerAttention> attention;
  std::vector<CodedVectors> coded;  // keys, values of each sequence
  std::optional<Numbers> window;
  std::vector<LayerAttention::Sequence> sequences;
};

}  // namespace

struct AttendCase::Impl {
  std::int64_t context;
  int sparsity;
  std::vector<std::unique_ptr<Layer>> layers;
  std::optional<Numbers> queries, out;
  AttentionScratch scratch;
  std::size_t next = 0;
};

AttendCase::AttendCase(const AttendBench& b, std::int64_t context, int sparsity)
    : impl_(std::make_unique<Impl>()) {
  impl_->context = context;
  impl_->sparsity = sparsity;
  std::mt19937_64 random(b.seed + 1);
  AttentionOptions options;
  options.kv_heads = b.kv_heads;
  options.group = b.group;
  options.threads = b.threads;
  options.device = b.device;
  options.value_tile_tokens = b.value_tile_tokens;
  options.half_tables = b.half_tables;
  const std::int64_t coded = std::max<std::int64_t>(0, context - b.window);
  const int window = static_cast<int>(context - coded);
  int layers = 1;
  for (int i = 0; i < layers; ++i) {
    auto layer = std::make_unique<Layer>();
    layer->keys = random_dictionary(b, Kind::kKeys, sparsity, random);
    layer->values = random_dictionary(b, Kind::kValues, sparsity, random);
    layer->attention = std::make_unique<LayerAttention>(
        std::vector<const Dictionary*>{&layer->keys},
        std::vector<const Dictionary*>{&layer->values},
        options,
        b.key_stage,
        b.key_stage == KeyStage::kPreRope ? usual_rope(b.dim) : Rope{});
    layer->window.emplace(
        normals(static_cast<std::size_t>(2 * b.kv_heads * window * b.dim), random), b.device);
    for (int n = 0; n < b.batch; ++n) {
      layer->coded.push_back(layer->attention->coded_keys());
      append_random(layer->coded.back(), layer->keys, coded, b.kv_heads, random);
      layer->coded.push_back(layer->attention->coded_values());
      append_random(layer->coded.back(), layer->values, coded, b.kv_heads, random);
    }
    const float* exact = layer->window->data();
    for (std::size_t n = 0; n < layer->coded.size(); n += 2)
      layer->sequences.push_back({&layer->coded[n],
                                  &layer->coded[n + 1],
                                  0,
                                  {{exact,
                                    exact + std::ptrdiff_t{b.kv_heads} * window * b.dim,
                                    std::int64_t{window} * b.dim,
                                    window}}});
    impl_->layers.push_back(std::move(layer));
    if (i == 0) {
      const double bytes = static_cast<double>(coded_bytes()) + 8.0 * b.num_atoms * b.dim;
      layers = static_cast<int>(std::clamp(std::ceil(kBeyondCaches / bytes), 1.0, 32.0));
    }
  }
  const auto numbers = static_cast<std::size_t>(b.batch * b.kv_heads * b.group * b.dim);
  impl_->queries.emplace(normals(numbers, random), b.device);
  impl_->out.emplace(std::vector<float>(numbers), b.device);
  for (int i = 0; i < layers; ++i) time(0, false);  // warm
}

AttendCase::~AttendCase() = default;
AttendCase::AttendCase(AttendCase&&) noexcept = default;

double AttendCase::time(double least_ms, bool processor) {
  Impl& impl = *impl_;
  return ms_per_call(least_ms, processor, [&] {
    const Layer& layer = *impl.layers[impl.next++ % impl.layers.size()];
    layer.attention->attend(layer.sequences, impl.queries->data(), impl.out->data(), impl.scratch);
    impl.out->wait();
  });
}

std::int64_t AttendCase::context() const { return impl_->context; }
int AttendCase::sparsity() const { return impl_->sparsity; }
int AttendCase::layers() const { return static_cast<int>(impl_->layers.size()); }
std::size_t AttendCase::coded_bytes() const {
  std::size_t bytes = 0;
  for (const CodedVectors& coded : impl_->layers.front()->coded) bytes += coded.bytes();
  return bytes;
}
std::size_t AttendCase::workspace_bytes() const { return impl_->scratch.bytes(); }

}  // namespace lexico::apps
