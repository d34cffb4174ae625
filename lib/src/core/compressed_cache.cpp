// A key-value cache that compresses what leaves its window (docs/cache.md).
#include "lexico/compressed_cache.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

#include "check.h"
#include "core/compressed_cache_impl.h"
#include "core/half.h"
#include "core/size_of.h"

namespace lexico {

using detail::CacheCoder;
using detail::CacheLayer;
using detail::size_of;
using detail::throw_invalid;

namespace {

constexpr std::int64_t kMostPositions = std::int64_t{1} << 24;
constexpr std::int64_t kPieceVectors = 8192;  // gathered and encoded at a time
constexpr std::int64_t kAdaptiveBlock = 64;   // tokens

void check_range(const char* what, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high)
    throw_invalid("cache: ", what, " is ", value, ", must be in [", low, ", ", high, "]");
}

template <typename Do>
auto with_memory(const char* doing, Do&& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
  } catch (const std::length_error&) {  // of a vector
  }
  throw ResourceError(std::string("cache: no memory to ") + doing);
}

bool all_finite(const float* x, std::int64_t count) {
  // The sum of products with 0 is NaN if any is not finite.
  float sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += 0.0f * x[i];
  return sum == 0;
}

std::string place(int layer, Kind kind) {
  return "cache: layer " + std::to_string(layer) + ", " + name_of(kind) + ": ";
}

}  // namespace

// ---- parts -------------------------------------------------------------------------------------

namespace detail {

void ExactCoder::store(const float* from,
                       int count,
                       std::uint8_t* to,
                       std::int64_t& saturated) const {
  if (type_ == ExactNumbers::kFloat32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof *from);
    return;
  }
  const bool half = type_ == ExactNumbers::kFloat16;
  const std::uint16_t infinity = half ? 0x7c00 : 0x7f80;
  for (int i = 0; i < count; ++i) {
    std::uint16_t number = 0;
    if (half) {
      number = half_from_float(from[i]);
    } else {
      const std::uint32_t bits = std::bit_cast<std::uint32_t>(from[i]);
      number = static_cast<std::uint16_t>(
          std::isnan(from[i]) ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    }
    if ((number & 0x7fff) == infinity && std::isfinite(from[i])) {
      --number;  // the largest finite one
      ++saturated;
    }
    std::memcpy(to + 2 * i, &number, sizeof number);
  }
}

void ExactCoder::load(const std::uint8_t* from, int count, float* to) const {
  if (type_ == ExactNumbers::kFloat32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof *to);
    return;
  }
  for (int i = 0; i < count; ++i) {
    std::uint16_t number;
    std::memcpy(&number, from + 2 * i, sizeof number);
    to[i] = type_ == ExactNumbers::kFloat16
                ? float_from_half(number)
                : std::bit_cast<float>(static_cast<std::uint32_t>(number) << 16);
  }
}

int CacheCoder::record_bytes() const {
  return dictionary->format.bytes_per_vector(dictionary->num_atoms + more_atoms, dictionary->dim);
}

void CacheCoder::use(const std::vector<float>& own_rows) {
  const int dim = dictionary->dim;
  if (own_encoder != nullptr && own_rows.empty() && num_atoms_ == dictionary->num_atoms) return;
  num_atoms_ = dictionary->num_atoms + static_cast<int>(own_rows.size()) / dim;
  std::copy(own_rows.begin(), own_rows.end(), atoms + size_of(dictionary->num_atoms, dim));
  if (codec)
    codec->use_atoms(atoms, num_atoms_);
  else
    encoder->set_atoms(atoms, 1, num_atoms_, dim);
}

void CacheCoder::encode(const float* z, std::int64_t rows, std::uint8_t* records, int first_head) {
  if (codec) {
    codec->encode(z, rows, records, first_head);
    return;
  }
  encoder->encode(z, rows, codes_);
  const std::size_t row = size_of(dictionary->format.max_atoms) * 4;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::size_t at = size_of(i, dictionary->format.max_atoms);
    std::memcpy(records + size_of(i) * 2 * row, codes_.indices.data() + at, row);
    std::memcpy(records + (size_of(i) * 2 + 1) * row, codes_.weights.data() + at, row);
  }
}

void CacheCoder::decode(const std::uint8_t* records,
                        std::int64_t rows,
                        float* z,
                        int first_head) const {
  if (codec) {
    codec->decode(records, rows, z, first_head);
    return;
  }
  const int slots = dictionary->format.max_atoms, dim = dictionary->dim;
  for (std::int64_t i = 0; i < rows; ++i) {
    float* to = z + i * dim;
    std::fill_n(to, dim, 0.0f);
    for (int k = 0; k < slots; ++k) {
      std::int32_t index;
      float weight;
      std::memcpy(&index, records + size_of(2 * i * slots + k) * 4, sizeof index);
      std::memcpy(&weight, records + size_of((2 * i + 1) * slots + k) * 4, sizeof weight);
      if (index < 0 || index >= num_atoms_ || !std::isfinite(weight)) continue;
      const float* atom = atoms + size_of(index, dim);
      for (int d = 0; d < dim; ++d) to[d] += weight * atom[d];
    }
  }
}

void CacheLayer::truncate_coded(std::int64_t tokens) {
  for (CodedVectors& vectors : coded) vectors.truncate(std::min(tokens, vectors.tokens()));
  while (!kept.empty() && kept.back().coded_index >= tokens) kept.pop_back();
  for (std::size_t kind = 0; kind < 2; ++kind) {
    for (std::size_t d = 0; d < joined[kind].size(); ++d) {
      std::vector<std::int64_t>& of = joined[kind][d];
      while (!of.empty() && of.back() >= tokens) of.pop_back();
      coded[kind].drop_atoms(static_cast<int>(of.size()), static_cast<int>(d));
    }
  }
}

}  // namespace detail

// ---- setting up --------------------------------------------------------------------------------

CompressedCache::Impl::Impl(DictionarySet dictionaries,
                            const CacheShape& the_shape,
                            const CacheOptions& the_options)
    : shape(the_shape), options(the_options), set(std::move(dictionaries)), exact(options.exact) {
  check_range("layers", shape.layers, 1, 1 << 16);
  check_range("kv_heads", shape.kv_heads, 1, 1 << 16);
  check_range("group", shape.group, 1, 1 << 16);
  check_range("head_dim", shape.head_dim, 1, 1 << 16);
  check_range("max_positions", shape.max_positions, 0, kMostPositions);
  if (shape.max_positions == 0) shape.max_positions = kMostPositions;
  check_range("recent_window", options.recent_window, 0, kMostPositions);
  check_range("compress_chunk", options.compress_chunk, 1, kMostPositions);
  check_range("sink_tokens", options.sink_tokens, 0, kMostPositions);
  check_range("threads", options.threads, 0, 1 << 16);
  if (!(options.adaptive_threshold >= 0))
    throw_invalid("cache: adaptive_threshold is ", options.adaptive_threshold, ", must be >= 0");
  check_range("adaptive_atoms", options.adaptive_atoms, 0, 1 << 16);
  if (options.adaptive_threshold == 0) options.adaptive_atoms = 0;
  ring = std::int64_t{options.recent_window} + options.compress_chunk - 1;

  for (const auto* of : {&options.layer_keys, &options.layer_values}) {
    if (!of->empty() && (of->begin()->first < 0 || of->rbegin()->first >= shape.layers))
      throw_invalid("cache: options name layer ",
                    of->begin()->first < 0 ? of->begin()->first : of->rbegin()->first,
                    ", the model has ",
                    shape.layers);
  }
  for (const Dictionary& d : set.dictionaries) {
    if (d.layer < 0 || d.layer >= shape.layers)
      throw_invalid("cache: a dictionary is of layer ", d.layer, ", the model has ", shape.layers);
    if (d.head >= shape.kv_heads)
      throw_invalid(place(d.layer, d.kind),
                    "a dictionary is of KV head ",
                    d.head,
                    ", the model has ",
                    shape.kv_heads);
    if (d.dim != shape.head_dim)
      throw_invalid(place(d.layer, d.kind),
                    "the dictionary has dim ",
                    d.dim,
                    ", the model head_dim ",
                    shape.head_dim);
  }
  if (set.key_stage == KeyStage::kPreRope) {
    const auto text = set.metadata.find("rope");
    if (text == set.metadata.end())
      throw_invalid("cache: dictionaries of keys before RoPE have no metadata 'rope'");
    rope = Rope::parse(text->second, "rope of the dictionaries: ", shape.head_dim, shape.layers);
    rotates = rope.rotates();
  }
  if (options.device != "cpu") {
    device = detail::device_of(options.device);
    exact_pool = std::make_shared<detail::DevicePool>(exact_bytes());
    kept_pool = std::make_shared<detail::DevicePool>(2 * size_of(shape.kv_heads) * number_row());
  }
  layers.resize(size_of(shape.layers));
  for (int layer = 0; layer < shape.layers; ++layer) make_layer(layer);
}

Encoder* CompressedCache::Impl::encoder_for(int max_atoms, float tolerance, CacheCoder& coder) {
  if (max_atoms == 0) return nullptr;
  std::unique_ptr<Encoder>& encoder =
      device < 0 ? encoders[{max_atoms, tolerance}] : coder.own_encoder;
  if (encoder) return encoder.get();
  encoder = std::make_unique<Encoder>(
      EncodeOptions{max_atoms, tolerance, options.selection, options.threads, options.device});
  if (device >= 0) {
    if (first_encoder == nullptr) first_encoder = encoder.get();
    encoder->share_scratch(*first_encoder);
  }
  return encoder.get();
}

void CompressedCache::Impl::make_layer(int layer) {
  Layer& to = layers[size_of(layer)];
  std::vector<const Dictionary*> used[2];
  for (const Kind kind : kBothKinds) {
    const std::string where = place(layer, kind);
    const auto& own_coding = kind == Kind::kKeys ? options.layer_keys : options.layer_values;
    const auto of_layer = own_coding.find(layer);
    const CacheCoding& coding = of_layer != own_coding.end() ? of_layer->second
                                : kind == Kind::kKeys        ? options.keys
                                                             : options.values;
    const std::size_t k = static_cast<std::size_t>(kind);
    const Dictionary* all = set.find(layer, kind);
    for (int h = 0; h < (all != nullptr ? 1 : shape.kv_heads); ++h) {
      const Dictionary* found = all != nullptr ? all : set.find(layer, kind, h);
      if (found == nullptr && h == 0) throw_invalid(where, "there is no dictionary");
      if (found == nullptr) throw_invalid(where, "there is no dictionary of KV head ", h);
      Dictionary& d = set.dictionaries[static_cast<std::size_t>(found - set.dictionaries.data())];
      if (all == nullptr && !d.transform.is_identity() && d.transform.heads != 1)
        throw_invalid(where,
                      "the dictionary of one KV head has a transform of ",
                      d.transform.heads,
                      " heads");
      CodeFormat& format = d.format;
      const bool packed = format.coding == CodeFormat::Coding::kPacked;
      if (coding.max_atoms < 0 || (packed && coding.max_atoms > format.max_atoms))
        throw_invalid(where,
                      "max_atoms is ",
                      coding.max_atoms,
                      packed ? ", the packed format has at most " : ", must be >= 0; it has ",
                      format.max_atoms);
      if (coding.max_atoms > 0) format.max_atoms = coding.max_atoms;
      if (packed) format.weight_levels.resize(size_of(format.max_atoms) << format.weight_bits);
      if (format.max_atoms == 0 && (!packed || options.adaptive_atoms > 0))
        throw_invalid(where, "max_atoms is 0, must be >= 1; name it in the options");
      try {
        CacheCoder& coder = to.coders[k].emplace_back();
        coder.dictionary = &d;
        coder.more_atoms = options.adaptive_atoms;
        coder.encoder = encoder_for(format.max_atoms, coding.relative_tolerance, coder);
        format.validate(d.num_atoms, d.dim);
        if (format.coding != CodeFormat::Coding::kExact) {
          if (coder.encoder != nullptr)
            coder.codec.emplace(d, *coder.encoder, options.adaptive_atoms);
          else
            coder.codec.emplace(d);
        }
      } catch (const InvalidArgument& error) {
        throw InvalidArgument(where + error.what());
      }
      used[k].push_back(&d);
    }
  }
  // Own atoms go behind the dictionary's while a sequence is encoded.
  for (auto& coders : to.coders) {
    for (CacheCoder& coder : coders) {
      std::vector<float>& atoms = coder.dictionary->atoms;
      atoms.resize(size_of(coder.dictionary->num_atoms + options.adaptive_atoms, shape.head_dim));
      coder.atoms = atoms.data();
    }
  }
  AttentionOptions a;
  a.kv_heads = shape.kv_heads;
  a.group = shape.group;
  a.softmax_scale = options.softmax_scale;
  a.page_tokens = options.page_tokens;
  a.half_keys = options.half_keys;
  a.exact = options.exact;
  a.own_atoms = options.adaptive_atoms;
  a.threads = options.threads;
  a.device = options.device;
  a.half_tables = options.half_tables;
  a.value_tile_tokens = options.value_tile_tokens;
  try {
    to.attention = std::make_unique<LayerAttention>(used[0], used[1], a, set.key_stage, rope);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument("cache: layer " + std::to_string(layer) + ": " + error.what());
  }
}

CompressedCache::CompressedCache(DictionarySet dictionaries,
                                 const CacheShape& shape,
                                 const CacheOptions& options)
    : impl_(with_memory("set up", [&] {
        return std::make_unique<Impl>(std::move(dictionaries), shape, options);
      })) {}
CompressedCache::~CompressedCache() = default;
CompressedCache::CompressedCache(CompressedCache&&) noexcept = default;
CompressedCache& CompressedCache::operator=(CompressedCache&&) noexcept = default;

const CacheShape& CompressedCache::shape() const { return impl_->shape; }
const CacheOptions& CompressedCache::options() const { return impl_->options; }
const CacheCounts& CompressedCache::counts() const { return impl_->counts; }

// ---- sequences ---------------------------------------------------------------------------------

void CompressedCache::Impl::check_layer(int layer) const {
  if (layer < 0 || layer >= shape.layers)
    throw_invalid("cache: layer is ", layer, ", must be in [0, ", shape.layers, ")");
}

CompressedCache::Impl::Sequence& CompressedCache::Impl::sequence(int number) const {
  if (number < 0 || size_of(number) >= sequences.size() || !sequences[size_of(number)])
    throw_invalid("cache: there is no sequence ", number);
  return *sequences[size_of(number)];
}

CacheLayer CompressedCache::Impl::empty_layer(int layer) const {
  const Layer& of = layers[size_of(layer)];
  CacheLayer empty{{of.attention->coded_keys(), of.attention->coded_values()}, {}, 0, 0, 0, {}, {}};
  empty.exact =
      detail::MirroredBytes(2 * size_of(shape.kv_heads), size_of(exact_slots()) * number_row());
  for (std::size_t kind = 0; kind < 2; ++kind) empty.joined[kind].resize(of.coders[kind].size());
  return empty;
}

std::unique_ptr<CompressedCache::Impl::Sequence> CompressedCache::Impl::new_sequence() const {
  auto made = std::make_unique<Sequence>();
  made->reserve(size_of(shape.layers));
  for (int layer = 0; layer < shape.layers; ++layer) made->push_back(empty_layer(layer));
  return made;
}

void CompressedCache::Impl::check_room(std::size_t more) const {
  if (options.max_bytes == 0) return;
  std::size_t sum = more;
  for (const auto& s : sequences) sum += s ? bytes_of(*s) : 0;
  if (sum > options.max_bytes)
    throw ResourceError("cache: " + std::to_string(sum) +
                        " bytes are more than max_bytes = " + std::to_string(options.max_bytes));
}

int CompressedCache::Impl::add(std::unique_ptr<Sequence> made) {
  check_room(bytes_of(*made));
  std::size_t number = 0;
  while (number < sequences.size() && sequences[number]) ++number;
  if (number == sequences.size()) sequences.emplace_back();
  sequences[number] = std::move(made);
  return static_cast<int>(number);
}

int CompressedCache::add_sequence() {
  return with_memory("add a sequence", [&] { return impl_->add(impl_->new_sequence()); });
}

int CompressedCache::fork(int sequence) {
  return with_memory("fork a sequence", [&] {
    return impl_->add(std::make_unique<Impl::Sequence>(impl_->sequence(sequence)));
  });
}

void CompressedCache::remove(int sequence) {
  impl_->sequence(sequence);
  impl_->sequences[size_of(sequence)].reset();
}

void CompressedCache::clear() { impl_->sequences.clear(); }

bool CompressedCache::has(int sequence) const {
  return sequence >= 0 && size_of(sequence) < impl_->sequences.size() &&
         impl_->sequences[size_of(sequence)] != nullptr;
}

std::int64_t CompressedCache::tokens(int sequence, int layer) const {
  impl_->check_layer(layer);
  return impl_->sequence(sequence)[size_of(layer)].tokens();
}

std::int64_t CompressedCache::tokens(int sequence) const {
  const auto& layers = impl_->sequence(sequence);
  std::int64_t least = layers.front().tokens();
  for (const CacheLayer& layer : layers) least = std::min(least, layer.tokens());
  return least;
}

std::int64_t CompressedCache::coded_tokens(int sequence, int layer) const {
  impl_->check_layer(layer);
  return impl_->sequence(sequence)[size_of(layer)].num_coded();
}

void CompressedCache::truncate(int sequence, std::int64_t tokens) {
  auto& layers = impl_->sequence(sequence);
  const std::int64_t most = this->tokens(sequence);
  if (tokens < 0 || tokens > most)
    throw_invalid("cache: tokens to keep are ", tokens, ", must be in [0, ", most, "]");
  for (CacheLayer& layer : layers) {
    const std::int64_t coded = std::clamp<std::int64_t>(tokens - layer.sinks, 0, layer.num_coded());
    layer.ring_count =
        std::clamp<std::int64_t>(tokens - layer.sinks - layer.num_coded(), 0, layer.ring_count);
    layer.truncate_coded(coded);
    layer.sinks = std::min(layer.sinks, tokens);
  }
}

// ---- adding tokens -----------------------------------------------------------------------------

// A new token's vectors of head h go to keys + h * head_bytes and values + h * head_bytes.
void CompressedCache::Impl::store_new(const NewTokens& source,
                                      std::int64_t token,
                                      std::uint8_t* keys,
                                      std::uint8_t* values,
                                      std::size_t head_bytes,
                                      std::int64_t& saturated) const {
  const std::int64_t head = source.head_stride != 0 ? source.head_stride : shape.head_dim;
  const std::int64_t row = source.token_stride != 0 ? source.token_stride
                                                    : std::int64_t{shape.kv_heads} * shape.head_dim;
  for (int h = 0; h < shape.kv_heads; ++h) {
    const std::int64_t at = token * row + h * head;
    exact.store(source.keys + at, shape.head_dim, keys + size_of(h) * head_bytes, saturated);
    exact.store(source.values + at, shape.head_dim, values + size_of(h) * head_bytes, saturated);
  }
}

// Vectors [tokens, heads, dim] of what is due, as exact tokens have them.
void CompressedCache::Impl::gather(Due& due,
                                   int kind,
                                   std::int64_t first,
                                   std::int64_t tokens,
                                   Heads heads,
                                   float* to,
                                   Pending& pending) const {
  const int dim = shape.head_dim;
  const NewTokens& source = *due.source;
  const std::int64_t head = source.head_stride != 0 ? source.head_stride : dim;
  const std::int64_t row =
      source.token_stride != 0 ? source.token_stride : std::int64_t{shape.kv_heads} * dim;
  const float* fresh = kind == 0 ? source.keys : source.values;
  std::vector<std::uint8_t> numbers(number_row());
  for (std::int64_t t = first; t < first + tokens; ++t) {
    for (int h = heads.first; h < heads.first + heads.count; ++h, to += dim) {
      if (t < due.from_ring) {
        exact.load(due.state->exact.data() + exact_at(kind, h, ring_slot(*due.state, t)), dim, to);
      } else {
        const std::int64_t token = due.first_new + t - due.from_ring;
        exact.store(fresh + token * row + h * head, dim, numbers.data(), pending.exact_saturated);
        exact.load(numbers.data(), dim, to);
      }
      if (!all_finite(to, dim)) due.not_finite[size_of(t)] = 1;
    }
  }
}

void CompressedCache::Impl::rotate_back(int layer,
                                        const Due& due,
                                        std::int64_t first,
                                        std::int64_t tokens,
                                        Heads heads,
                                        float* x) const {
  std::vector<std::int32_t> positions(size_of(tokens, heads.count));
  for (std::size_t i = 0; i < positions.size(); ++i)
    positions[i] = static_cast<std::int32_t>(options.sink_tokens + due.state->num_coded() + first +
                                             static_cast<std::int64_t>(i) / heads.count);
  rope.undo(layer, x, shape.head_dim, positions.data(), tokens * heads.count);
}

// Records [tokens of all due, kv_heads, record_bytes].
void CompressedCache::Impl::encode(int layer,
                                   int kind,
                                   std::vector<Due>& all_due,
                                   std::vector<std::uint8_t>& records,
                                   Pending& pending) {
  auto& coders = layers[size_of(layer)].coders[size_of(kind)];
  const int dim = shape.head_dim, kv_heads = shape.kv_heads;
  const std::size_t record = size_of(coders.front().record_bytes());
  std::int64_t total = 0;
  for (const Due& due : all_due) total += due.tokens();
  records.resize(size_of(total, kv_heads) * record);
  for (int d = 0; d < static_cast<int>(coders.size()); ++d) {
    CacheCoder& coder = coders[size_of(d)];
    const Heads heads = heads_of(layer, kind, d);
    const std::int64_t before = coder.codec ? coder.codec->counts().saturated : 0;
    const std::int64_t piece = options.adaptive_atoms > 0
                                   ? kAdaptiveBlock
                                   : std::max<std::int64_t>(1, kPieceVectors / heads.count);
    std::vector<float> x(size_of(std::min(piece, total), heads.count, dim));
    std::vector<std::uint8_t> of_heads(size_of(std::min(piece, total), heads.count) * record);
    std::int64_t done = 0, filled = 0;  // tokens
    const auto put_records = [&] {
      for (std::int64_t t = 0; t < filled; ++t)
        std::memcpy(records.data() + size_of((done + t) * kv_heads + heads.first) * record,
                    of_heads.data() + size_of(t, heads.count) * record,
                    size_of(heads.count) * record);
      done += filled;
      filled = 0;
    };
    const auto encode_filled = [&] {
      coder.dictionary->transform.forward(x.data(), filled * heads.count, dim);
      coder.encode(x.data(), filled * heads.count, of_heads.data(), 0);
      put_records();
    };
    if (options.adaptive_atoms == 0) coder.use({});
    for (Due& due : all_due) {
      if (options.adaptive_atoms > 0) coder.use(due.state->coded[size_of(kind)].own_atom_rows(d));
      for (std::int64_t first = 0; first < due.tokens();) {
        const std::int64_t count = std::min(piece - filled, due.tokens() - first);
        float* to = x.data() + filled * heads.count * dim;
        gather(due, kind, first, count, heads, to, pending);
        if (kind == 0 && rotates) rotate_back(layer, due, first, count, heads, to);
        filled += count;
        if (options.adaptive_atoms > 0) {
          encode_adaptively(layer, kind, d, due, first, count, x.data(), of_heads.data(), pending);
          put_records();
        } else if (filled == piece) {
          encode_filled();
        }
        first += count;
      }
    }
    if (filled > 0) encode_filled();
    if (coder.codec) pending.saturated += coder.codec->counts().saturated - before;
  }
}

// A block of one sequence, whose atoms are in use: all vectors at once; then those over the
// threshold in order, with the atoms that joined before them, each joining if that does not help.
void CompressedCache::Impl::encode_adaptively(int layer,
                                              int kind,
                                              int dictionary,
                                              Due& due,
                                              std::int64_t first,
                                              std::int64_t tokens,
                                              const float* x,
                                              std::uint8_t* records,
                                              Pending& pending) {
  CacheCoder& coder = layers[size_of(layer)].coders[size_of(kind)][size_of(dictionary)];
  const Transform& transform = coder.dictionary->transform;
  CodedVectors& own = due.state->coded[size_of(kind)];
  const int dim = shape.head_dim;
  const int heads = heads_of(layer, kind, dictionary).count;
  const std::int64_t rows = tokens * heads;
  const std::size_t record = size_of(coder.record_bytes());
  std::vector<float> z(x, x + rows * dim), back(size_of(rows, dim));
  transform.forward(z.data(), rows, dim);
  const auto code = [&](std::int64_t row, std::int64_t count) {
    const int head = static_cast<int>(row % heads);
    coder.encode(z.data() + row * dim, count, records + size_of(row) * record, head);
    coder.decode(records + size_of(row) * record, count, back.data() + row * dim, head);
    transform.backward(back.data() + row * dim, count, dim, head);
  };
  const auto is_far = [&](std::int64_t row) {
    double error = 0, norm = 0;
    for (std::int64_t i = row * dim; i < (row + 1) * dim; ++i) {
      const double value = static_cast<double>(x[i]);
      const double off = value - static_cast<double>(back[size_of(i)]);
      error += off * off, norm += value * value;
    }
    return std::sqrt(error) > static_cast<double>(options.adaptive_threshold) * std::sqrt(norm) &&
           norm > 0;
  };
  code(0, rows);
  bool joined = false;
  for (std::int64_t row = 0; row < rows; ++row) {
    if (!all_finite(x + row * dim, dim) || !is_far(row)) continue;
    if (joined) code(row, 1);
    if (own.own_atoms(dictionary) >= options.adaptive_atoms || (joined && !is_far(row))) continue;
    double norm = 0;
    for (std::int64_t i = row * dim; i < (row + 1) * dim; ++i)
      norm += static_cast<double>(z[size_of(i)]) * static_cast<double>(z[size_of(i)]);
    if (!(norm > 0)) continue;
    std::vector<float> direction(z.begin() + row * dim, z.begin() + (row + 1) * dim);
    for (float& value : direction)
      value = static_cast<float>(static_cast<double>(value) / std::sqrt(norm));
    own.add_atom(direction.data(), dictionary);
    due.state->joined[size_of(kind)][size_of(dictionary)].push_back(due.state->num_coded() + first +
                                                                    row / heads);
    ++pending.own_atoms;
    joined = true;
    coder.use(own.own_atom_rows(dictionary));
    code(row, 1);
  }
}

// Codes and kept tokens of what is due; on failure the caller takes back what was added.
void CompressedCache::Impl::add_codes(const std::vector<Due>& all_due,
                                      const std::array<std::vector<std::uint8_t>, 2>& records,
                                      std::int64_t& not_finite) {
  std::int64_t done = 0;
  for (const Due& due : all_due) {
    CacheLayer& state = *due.state;
    const std::int64_t first = state.num_coded();
    for (std::int64_t t = 0; t < due.tokens(); ++t) {
      if (due.not_finite[size_of(t)] == 0) continue;
      auto numbers =
          std::make_shared<detail::MirroredBytes>(2 * size_of(shape.kv_heads), number_row());
      std::uint8_t* keys = numbers->data();
      std::uint8_t* values = keys + size_of(shape.kv_heads) * number_row();
      std::int64_t counted = 0;  // when it was gathered
      if (t >= due.from_ring) {
        store_new(
            *due.source, due.first_new + t - due.from_ring, keys, values, number_row(), counted);
      } else {
        for (int h = 0; h < shape.kv_heads; ++h) {
          const std::int64_t slot = ring_slot(state, t);
          std::memcpy(keys + size_of(h) * number_row(),
                      state.exact.data() + exact_at(0, h, slot),
                      number_row());
          std::memcpy(values + size_of(h) * number_row(),
                      state.exact.data() + exact_at(1, h, slot),
                      number_row());
        }
      }
      state.kept.push_back({first + t, std::move(numbers)});
      ++not_finite;
    }
    for (std::size_t kind = 0; kind < 2; ++kind) {
      CodedVectors& coded = state.coded[kind];
      const std::size_t row = size_of(shape.kv_heads, coded.record_bytes());
      coded.append(records[kind].data() + size_of(done) * row, due.tokens());
    }
    done += due.tokens();
  }
}

void CompressedCache::Impl::append(int layer, const std::vector<NewTokens>& batch) {
  check_layer(layer);
  struct Plan {
    const NewTokens* source;
    CacheLayer* state;
    std::int64_t to_sinks, from_ring, from_new;
  };
  std::vector<Plan> plans;
  std::vector<Due> all_due;
  std::vector<std::int64_t> coded_before;
  std::vector<char> named(sequences.size());
  for (const NewTokens& source : batch) {
    CacheLayer& state = sequence(source.sequence)[size_of(layer)];
    const auto refuse = [&](const auto&... what) {
      throw_invalid("cache: layer ", layer, ", sequence ", source.sequence, ": ", what...);
    };
    if (named[size_of(source.sequence)]++ != 0) refuse("named twice");
    if (source.tokens < 0) refuse("tokens are ", source.tokens, ", must be >= 0");
    if (source.tokens == 0) continue;
    if (source.keys == nullptr || source.values == nullptr)
      refuse(source.keys == nullptr ? "keys" : "values", " is null");
    if (source.tokens > shape.max_positions - state.tokens())
      refuse(source.tokens,
             " tokens after ",
             state.tokens(),
             " are beyond max_positions = ",
             shape.max_positions);
    Plan plan{&source, &state, 0, 0, 0};
    plan.to_sinks = std::min(options.sink_tokens - state.sinks, source.tokens);
    const std::int64_t waiting = state.ring_count + source.tokens - plan.to_sinks;
    if (waiting > ring) {
      const std::int64_t count = waiting - options.recent_window;
      plan.from_ring = std::min(count, state.ring_count);
      plan.from_new = count - plan.from_ring;
      Due due{&source, &state, plan.from_ring, plan.from_new, plan.to_sinks, {}};
      due.not_finite.resize(size_of(count));
      all_due.push_back(std::move(due));
      coded_before.push_back(state.num_coded());
    }
    plans.push_back(plan);
  }

  Pending pending;
  std::int64_t not_finite = 0;
  if (!all_due.empty()) {
    try {
      std::array<std::vector<std::uint8_t>, 2> records;
      std::size_t more = 0;
      for (const Due& due : all_due) {
        for (const CodedVectors& coded : due.state->coded)
          more += coded.bytes_for(coded.tokens() + due.tokens()) - coded.bytes_for(coded.tokens());
      }
      check_room(more);
      for (int kind = 0; kind < 2; ++kind)
        encode(layer, kind, all_due, records[size_of(kind)], pending);
      add_codes(all_due, records, not_finite);
      check_room(0);
    } catch (...) {
      for (std::size_t i = 0; i < all_due.size(); ++i)
        all_due[i].state->truncate_coded(coded_before[i]);
      throw;
    }
  }
  // Nothing below can fail.
  for (const Due& due : all_due) counts.coded_vectors += 2 * due.tokens() * shape.kv_heads;
  const std::size_t head_bytes = size_of(exact_slots()) * number_row();
  for (const Plan& plan : plans) {
    CacheLayer& state = *plan.state;
    const auto store = [&](std::int64_t token, std::int64_t slot) {
      std::uint8_t* keys = state.exact.data() + exact_at(0, 0, slot);
      std::uint8_t* values = state.exact.data() + exact_at(1, 0, slot);
      store_new(*plan.source, token, keys, values, head_bytes, pending.exact_saturated);
      state.exact.touch(size_of(slot) * number_row(), size_of(slot + 1) * number_row());
    };
    for (std::int64_t t = 0; t < plan.to_sinks; ++t) store(t, state.sinks++);
    if (plan.from_ring > 0) state.ring_start = (state.ring_start + plan.from_ring) % ring;
    state.ring_count -= plan.from_ring;
    for (std::int64_t t = plan.to_sinks + plan.from_new; t < plan.source->tokens; ++t)
      store(t, ring_slot(state, state.ring_count++));
  }
  counts.saturated += pending.saturated;
  counts.own_atoms += pending.own_atoms;
  counts.exact_saturated += pending.exact_saturated;
  counts.not_finite += not_finite;
}

void CompressedCache::append(int layer, const std::vector<NewTokens>& batch) {
  with_memory("append tokens", [&] { impl_->append(layer, batch); });
}

void CompressedCache::append(int layer,
                             const std::vector<int>& sequences,
                             std::int64_t tokens,
                             const float* keys,
                             const float* values) {
  with_memory("append tokens", [&] {
    std::vector<NewTokens> batch;
    const std::int64_t stride = tokens * shape().kv_heads * shape().head_dim;
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      const std::int64_t at = static_cast<std::int64_t>(i) * stride;
      batch.push_back({sequences[i], tokens, keys + at, values + at, 0, 0});
    }
    impl_->append(layer, batch);
  });
}

// ---- reading -----------------------------------------------------------------------------------

// `uploads`: nullptr for the CPU.
std::vector<ExactTokens> CompressedCache::Impl::exact_runs(CacheLayer& state,
                                                           detail::Uploads* uploads) const {
  const std::uint8_t* const base =
      uploads == nullptr ? state.exact.data() : state.exact.on_device(exact_pool, *uploads);
  std::vector<ExactTokens> runs;
  const auto add = [&](std::int64_t slot, std::int64_t tokens) {
    if (tokens > 0)
      runs.push_back({base + exact_at(0, 0, slot),
                      base + exact_at(1, 0, slot),
                      exact_slots() * shape.head_dim,
                      static_cast<int>(tokens)});
  };
  add(0, state.sinks);
  const std::int64_t to_end = std::min(state.ring_count, ring - state.ring_start);
  add(options.sink_tokens + state.ring_start, to_end);
  add(options.sink_tokens, state.ring_count - to_end);
  for (const detail::KeptToken& token : state.kept) {
    const std::uint8_t* const numbers =
        uploads == nullptr ? token.numbers->data() : token.numbers->on_device(kept_pool, *uploads);
    runs.push_back({numbers, numbers + size_of(shape.kv_heads) * number_row(), shape.head_dim, 1});
  }
  return runs;
}

void CompressedCache::attend(int layer,
                             const std::vector<int>& sequences,
                             const float* queries,
                             float* out,
                             float* log_sums,
                             void* stream) {
  Impl& impl = *impl_;
  impl.check_layer(layer);
  with_memory("attend", [&] {
    std::optional<detail::UseDevice> use;
    std::optional<detail::Uploads::Session> session;
    detail::Uploads* uploads = nullptr;
    if (impl.device >= 0) {
      use.emplace(impl.device);
      uploads = &detail::device_scratch(impl.scratch).uploads;
      session.emplace(*uploads, static_cast<kernels::Stream>(stream));
    }
    std::vector<LayerAttention::Sequence> all;
    for (const int number : sequences) {
      CacheLayer& state = impl.sequence(number)[size_of(layer)];
      LayerAttention::Sequence s;
      s.keys = &state.coded[0];
      s.values = &state.coded[1];
      s.first_position = impl.options.sink_tokens;
      s.exact = impl.exact_runs(state, uploads);
      for (const detail::KeptToken& token : state.kept) s.left_out.push_back(token.coded_index);
      all.push_back(std::move(s));
    }
    impl.layers[size_of(layer)].attention->attend(
        all, queries, out, impl.scratch, log_sums, stream);
  });
}

// Coded tokens [first, first + tokens) as [tokens, kv_heads, dim], keys after RoPE.
void CompressedCache::Impl::decode_coded(int layer,
                                         const CacheLayer& state,
                                         int kind,
                                         std::int64_t first,
                                         std::int64_t tokens,
                                         float* out) {
  if (tokens <= 0) return;
  auto& coders = layers[size_of(layer)].coders[size_of(kind)];
  const CodedVectors& coded = state.coded[size_of(kind)];
  const int dim = shape.head_dim;
  const std::size_t record = size_of(coded.record_bytes());
  std::vector<std::uint8_t> records(size_of(tokens, shape.kv_heads) * record);
  coded.read(first, tokens, records.data());
  for (int d = 0; d < static_cast<int>(coders.size()); ++d) {
    CacheCoder& coder = coders[size_of(d)];
    coder.use(coded.own_atom_rows(d));
    const Heads heads = heads_of(layer, kind, d);
    if (heads.count == shape.kv_heads) {
      coder.decode(records.data(), tokens * heads.count, out, 0);
      coder.dictionary->transform.backward(out, tokens * heads.count, dim);
      continue;
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t row = t * shape.kv_heads + heads.first;
      coder.decode(records.data() + size_of(row) * record, 1, out + row * dim, 0);
      coder.dictionary->transform.backward(out + row * dim, 1, dim);
    }
  }
  if (kind == 0 && rotates) {
    std::vector<std::int32_t> positions(size_of(tokens, shape.kv_heads));
    for (std::size_t i = 0; i < positions.size(); ++i)
      positions[i] = static_cast<std::int32_t>(options.sink_tokens + first +
                                               static_cast<std::int64_t>(i) / shape.kv_heads);
    rope.apply(layer, out, dim, positions.data(), tokens * shape.kv_heads);
  }
}

void CompressedCache::Impl::load_exact(const CacheLayer& state,
                                       int kind,
                                       std::int64_t slot,
                                       float* out) const {
  for (int h = 0; h < shape.kv_heads; ++h)
    exact.load(state.exact.data() + exact_at(kind, h, slot),
               shape.head_dim,
               out + std::ptrdiff_t{h} * shape.head_dim);
}

void CompressedCache::reconstruct(int layer,
                                  int sequence,
                                  std::int64_t first,
                                  std::int64_t tokens,
                                  float* keys,
                                  float* values) const {
  Impl& impl = *impl_;
  impl.check_layer(layer);
  const CacheLayer& state = impl.sequence(sequence)[size_of(layer)];
  if (first < 0 || tokens < 0 || first > state.tokens() - tokens)
    throw_invalid("cache: tokens ", first, " to ", first + tokens, " of ", state.tokens());
  const std::int64_t row = std::int64_t{impl.shape.kv_heads} * impl.shape.head_dim;
  const std::int64_t last = first + tokens, coded_end = state.sinks + state.num_coded();
  with_memory("reconstruct", [&] {
    for (int kind = 0; kind < 2; ++kind) {
      float* out = kind == 0 ? keys : values;
      for (std::int64_t t = first; t < std::min(last, state.sinks); ++t)
        impl.load_exact(state, kind, t, out + (t - first) * row);
      const std::int64_t from = std::clamp(first, state.sinks, coded_end);
      const std::int64_t to = std::clamp(last, state.sinks, coded_end);
      impl.decode_coded(
          layer, state, kind, from - state.sinks, to - from, out + (from - first) * row);
      for (const detail::KeptToken& token : state.kept) {
        const std::int64_t t = state.sinks + token.coded_index;
        if (t >= from && t < to)
          impl.exact.load(
              token.numbers->data() + size_of(kind * impl.shape.kv_heads) * impl.number_row(),
              static_cast<int>(row),
              out + (t - first) * row);
      }
      for (std::int64_t t = std::max(first, coded_end); t < last; ++t)
        impl.load_exact(state, kind, impl.ring_slot(state, t - coded_end), out + (t - first) * row);
    }
  });
}

// ---- bytes -------------------------------------------------------------------------------------

std::size_t CompressedCache::Impl::bytes_of(const Sequence& of) const {
  std::size_t sum = 0;
  for (const CacheLayer& layer : of) {
    sum += layer.coded[0].bytes() + layer.coded[1].bytes() + layer.exact.size();
    for (const detail::KeptToken& token : layer.kept) sum += token.numbers->size();
  }
  return sum;
}

std::size_t CompressedCache::bytes(int sequence) const {
  return impl_->bytes_of(impl_->sequence(sequence));
}

std::size_t CompressedCache::bytes() const {
  return with_memory("count bytes", [&] {
    std::size_t sum = 0, shared = 0;
    std::vector<std::pair<const void*, std::size_t>> pages;
    const auto add = [&](const void* address, std::size_t bytes) {
      pages.emplace_back(address, bytes);
      shared += bytes;
    };
    for (const auto& s : impl_->sequences) {
      if (!s) continue;
      sum += impl_->bytes_of(*s);
      for (const CacheLayer& layer : *s) {
        for (const CodedVectors& coded : layer.coded) coded.for_each_page(add);
        for (const detail::KeptToken& token : layer.kept)
          add(token.numbers.get(), token.numbers->size());
      }
    }
    std::sort(pages.begin(), pages.end());
    pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
    for (const auto& page : pages) shared -= page.second;
    return sum - shared;
  });
}

std::size_t CompressedCache::bytes_for(std::int64_t tokens) const {
  const Impl& impl = *impl_;
  const std::int64_t waiting = std::max<std::int64_t>(0, tokens - impl.options.sink_tokens);
  const std::int64_t coded = waiting > impl.ring ? waiting - impl.options.recent_window : 0;
  std::size_t sum = 0;
  for (const Impl::Layer& layer : impl.layers) {
    sum += impl.exact_bytes() + layer.attention->coded_keys().bytes_for(coded) +
           layer.attention->coded_values().bytes_for(coded);
    for (const auto& coders : layer.coders)
      sum += coders.size() * size_of(impl.options.adaptive_atoms, impl.shape.head_dim) * 2;
  }
  return sum;
}

}  // namespace lexico
