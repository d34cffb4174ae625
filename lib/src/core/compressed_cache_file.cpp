// Sequences of a compressed cache in files: "lexico-cache 1" (docs/cache.md).
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <nlohmann/json.hpp>
#include <string_view>

#include "check.h"
#include "core/compressed_cache_impl.h"
#include "core/half.h"
#include "core/json_fields.h"
#include "core/size_of.h"
#include "lexico/files.h"

namespace lexico {

using detail::CacheLayer;
using detail::JsonFields;
using detail::size_of;
using Json = nlohmann::json;

namespace {

constexpr std::string_view kMagic = "lexico-cache 1\n";

// CRC-64 with the reflected ECMA-182 polynomial (as in xz), 8 bytes at a time.
class Checksum {
 public:
  void add(const void* data, std::size_t bytes) {
    const auto* at = static_cast<const std::uint8_t*>(data);
    const auto& table = tables();
    for (; bytes >= 8; bytes -= 8, at += 8) {
      std::uint64_t word = 0;
      for (int i = 0; i < 8; ++i) word |= std::uint64_t{at[i]} << 8 * i;
      word ^= sum_;
      sum_ = 0;
      for (std::size_t i = 0; i < 8; ++i) sum_ ^= table[7 - i][word >> 8 * i & 0xff];
    }
    for (; bytes > 0; --bytes, ++at) sum_ = table[0][(sum_ ^ *at) & 0xff] ^ sum_ >> 8;
  }
  template <typename T>
  void add(const std::vector<T>& values) {
    const std::uint64_t count = values.size();
    add(&count, sizeof count);
    add(values.data(), values.size() * sizeof(T));
  }
  template <typename T>
  void add_value(const T& value) {
    add(&value, sizeof value);
  }
  std::uint64_t value() const { return ~sum_; }

 private:
  using Tables = std::array<std::array<std::uint64_t, 256>, 8>;
  static const Tables& tables() {
    static const Tables made = [] {
      Tables t{};
      for (std::size_t byte = 0; byte < 256; ++byte) {
        std::uint64_t sum = byte;
        for (int i = 0; i < 8; ++i)
          sum = (sum & 1) != 0 ? sum >> 1 ^ 0xc96c5795d7870f42u : sum >> 1;
        t[0][byte] = sum;
      }
      for (std::size_t k = 1; k < 8; ++k)
        for (std::size_t byte = 0; byte < 256; ++byte)
          t[k][byte] = t[0][t[k - 1][byte] & 0xff] ^ t[k - 1][byte] >> 8;
      return t;
    }();
    return made;
  }
  std::uint64_t sum_ = ~std::uint64_t{0};
};

// Of all that codes mean: atoms, transforms, formats, rotation.
std::string fingerprint(const DictionarySet& set, const Rope& rope) {
  Checksum sum;
  for (const Dictionary& d : set.dictionaries) {
    for (const int number : {d.layer, static_cast<int>(d.kind), d.num_atoms, d.dim, d.head})
      sum.add_value(number);
    sum.add(d.atoms.data(), size_of(std::int64_t{d.num_atoms} * d.dim) * sizeof(float));
    sum.add(d.transform.mean);
    sum.add(d.transform.back_map);
    const CodeFormat& f = d.format;
    const ResidualCode& r = f.residual;
    for (const int number : {static_cast<int>(f.coding),
                             f.max_atoms,
                             f.weight_bits,
                             f.scale_bits,
                             r.groups,
                             r.states,
                             r.relative ? 1 : 0})
      sum.add_value(number);
    sum.add_value(f.scale_low);
    sum.add_value(f.scale_step);
    sum.add(f.weight_levels);
    sum.add(r.mean);
    sum.add(r.axes);
    sum.add(r.bits);
    sum.add(r.levels);
  }
  const std::string text = std::string(name_of(set.key_stage)) + rope.to_json();
  sum.add(text.data(), text.size());
  char hex[17];
  std::snprintf(hex, sizeof hex, "%016llx", static_cast<unsigned long long>(sum.value()));
  return hex;
}

template <typename T>
void put(std::string& to, const T* values, std::size_t count) {
  to.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

const char* name_of(ExactNumbers type) {
  return type == ExactNumbers::kFloat32   ? "float32"
         : type == ExactNumbers::kFloat16 ? "float16"
                                          : "bfloat16";
}

// What a file must share with the cache that reads it.
Json settings(const CacheShape& shape,
              const CacheOptions& options,
              const DictionarySet& set,
              const Rope& rope) {
  return {{"layers", shape.layers},
          {"kv_heads", shape.kv_heads},
          {"head_dim", shape.head_dim},
          {"recent_window", options.recent_window},
          {"compress_chunk", options.compress_chunk},
          {"sink_tokens", options.sink_tokens},
          {"exact", name_of(options.exact)},
          {"adaptive_atoms", options.adaptive_atoms},
          {"dictionaries", fingerprint(set, rope)}};
}

// What is left of a file's bytes, read in order.
class Reader {
 public:
  Reader(std::string_view bytes, std::string path) : bytes_(bytes), path_(std::move(path)) {}
  const std::uint8_t* take(std::size_t count, std::size_t size = 1) {
    if (size != 0 && count > bytes_.size() / size) refuse("ends before its codes do");
    const char* at = bytes_.data();
    bytes_.remove_prefix(count * size);
    return reinterpret_cast<const std::uint8_t*>(at);
  }
  std::size_t left() const { return bytes_.size(); }
  [[noreturn]] void refuse(const std::string& what) const { throw IoError(path_ + ": " + what); }

 private:
  std::string_view bytes_;
  std::string path_;
};

std::uint64_t checksum_of(std::string_view bytes) {
  Checksum sum;
  sum.add(bytes.data(), bytes.size());
  return sum.value();
}

}  // namespace

void CompressedCache::save(int sequence, const std::string& path) const {
  Impl& impl = *impl_;
  const Impl::Sequence& layers = impl.sequence(sequence);
  std::string file;
  try {
    Json header{{"settings", settings(impl.shape, impl.options, impl.set, impl.rope)}};
    for (const CacheLayer& state : layers) {
      Json own = Json::array(), kept = Json::array();
      for (const auto& joined : state.joined) {
        Json counts = Json::array();
        for (const auto& of : joined) counts.push_back(of.size());
        own.push_back(counts);
      }
      for (const detail::KeptToken& token : state.kept) kept.push_back(token.coded_index);
      header["layers"].push_back({{"sinks", state.sinks},
                                  {"coded", state.num_coded()},
                                  {"recent", state.ring_count},
                                  {"kept", kept},
                                  {"own_atoms", own}});
    }
    const std::string text = header.dump();
    file.append(kMagic);
    const std::uint64_t length = text.size();
    put(file, &length, 1);
    file.append(text);
    std::vector<std::uint8_t> records;
    for (const CacheLayer& state : layers) {
      for (std::size_t kind = 0; kind < 2; ++kind) {
        for (std::size_t d = 0; d < state.joined[kind].size(); ++d) {
          const std::vector<std::int64_t>& joined = state.joined[kind][d];
          put(file, joined.data(), joined.size());
          for (const float x : state.coded[kind].own_atom_rows(static_cast<int>(d))) {
            const std::uint16_t half = detail::half_from_float(x);
            put(file, &half, 1);
          }
        }
      }
      for (const CodedVectors& coded : state.coded) {
        records.resize(size_of(coded.tokens() * impl.shape.kv_heads * coded.record_bytes()));
        coded.read(0, coded.tokens(), records.data());
        put(file, records.data(), records.size());
      }
      const auto put_exact = [&](std::int64_t slot) {
        for (int kind = 0; kind < 2; ++kind)
          for (int h = 0; h < impl.shape.kv_heads; ++h)
            put(file, state.exact.data() + impl.exact_at(kind, h, slot), impl.number_row());
      };
      for (std::int64_t t = 0; t < state.sinks; ++t) put_exact(t);
      for (std::int64_t t = 0; t < state.ring_count; ++t) put_exact(impl.ring_slot(state, t));
      for (const detail::KeptToken& token : state.kept)
        put(file, token.numbers->data(), token.numbers->size());
    }
    const std::uint64_t sum = checksum_of(file);
    put(file, &sum, 1);
  } catch (const std::bad_alloc&) {
    throw ResourceError(path + ": no memory to write a sequence");
  }
  write_file(path, file);
}

int CompressedCache::load(const std::string& path) {
  Impl& impl = *impl_;
  try {
    const std::string file = read_file(path);
    Reader reader(file, path);
    if (file.size() < kMagic.size() + 16 || !file.starts_with(kMagic.substr(0, 13)))
      reader.refuse("is no sequence of a compressed cache (lexico-cache)");
    std::uint64_t sum, length;
    std::memcpy(&sum, file.data() + file.size() - sizeof sum, sizeof sum);
    if (sum != checksum_of(std::string_view(file).substr(0, file.size() - sizeof sum)))
      reader.refuse("is damaged: its checksum is another");
    if (!file.starts_with(kMagic))
      reader.refuse("is of another version than " + std::string(kMagic.substr(0, 14)));
    reader.take(kMagic.size());
    std::memcpy(&length, reader.take(sizeof length), sizeof length);
    const auto* text = reinterpret_cast<const char*>(reader.take(length));
    Json header;
    try {
      header = Json::parse(std::string_view(text, length));
    } catch (const Json::exception& error) {
      reader.refuse(error.what());
    }
    const Json wanted = settings(impl.shape, impl.options, impl.set, impl.rope);
    if (!header.is_object()) reader.refuse("its header is no object");
    const JsonFields fields(header, path + ": ");
    const Json& found = fields.required("settings");
    for (const auto& [key, value] : wanted.items()) {
      const auto at = found.find(key);
      if (at == found.end() || *at != value)
        reader.refuse("was saved with " + key + " = " +
                      (at == found.end() ? std::string("(nothing)") : at->dump()) +
                      ", the cache has " + value.dump());
    }
    const Json& states = fields.required("layers");
    if (!states.is_array() || states.size() != impl.layers.size())
      fields.refuse("layers", "a list of " + std::to_string(impl.layers.size()));

    std::unique_ptr<Impl::Sequence> made = impl.new_sequence();
    for (std::size_t l = 0; l < made->size(); ++l) {
      CacheLayer& state = (*made)[l];
      const JsonFields of(states[l], path + ": layer " + std::to_string(l) + ": ");
      const std::int64_t sinks = of.integer("sinks", 0), coded = of.integer("coded", 0),
                         recent = of.integer("recent", 0);
      const bool fits = sinks <= impl.options.sink_tokens && recent <= impl.ring &&
                        (sinks == impl.options.sink_tokens || coded + recent == 0) &&
                        sinks + coded + recent <= impl.shape.max_positions;
      if (!fits) of.refuse("coded", "a number of tokens that fits the window and the model");
      const Json& own = of.required("own_atoms");
      if (!own.is_array() || own.size() != 2) of.refuse("own_atoms", "two lists");
      for (std::size_t kind = 0; kind < 2; ++kind) {
        auto& all_joined = state.joined[kind];
        if (!own[kind].is_array() || own[kind].size() != all_joined.size())
          of.refuse("own_atoms", "lists of a number for each dictionary");
        for (std::size_t d = 0; d < all_joined.size(); ++d) {
          if (!own[kind][d].is_number_unsigned() ||
              own[kind][d].get<std::uint64_t>() >
                  static_cast<std::uint64_t>(impl.options.adaptive_atoms))
            of.refuse("own_atoms",
                      "at most adaptive_atoms = " + std::to_string(impl.options.adaptive_atoms));
          const auto count = own[kind][d].get<std::size_t>();
          const std::size_t dim = size_of(impl.shape.head_dim);
          std::vector<std::int64_t> joined(count);
          std::memcpy(joined.data(), reader.take(count, 8), count * 8);
          std::int64_t least = 0;
          for (const std::int64_t token : joined) {
            if (token < least || token >= coded) reader.refuse("an own atom is of no coded token");
            least = token;
          }
          const std::uint8_t* halfs = reader.take(count * dim, 2);
          std::vector<float> atom(dim);
          for (std::size_t n = 0; n < count; ++n) {
            for (std::size_t i = 0; i < dim; ++i) {
              std::uint16_t half;
              std::memcpy(&half, halfs + (n * dim + i) * 2, sizeof half);
              atom[i] = detail::float_from_half(half);
              if (!std::isfinite(atom[i])) reader.refuse("an own atom is not finite");
            }
            state.coded[kind].add_atom(atom.data(), static_cast<int>(d));
          }
          all_joined[d] = std::move(joined);
        }
      }
      for (CodedVectors& vectors : state.coded)
        vectors.append(
            reader.take(size_of(coded), size_of(impl.shape.kv_heads * vectors.record_bytes())),
            coded);
      const std::size_t token_bytes = 2 * size_of(impl.shape.kv_heads) * impl.number_row();
      const std::uint8_t* from = reader.take(size_of(sinks + recent), token_bytes);
      for (std::int64_t t = 0; t < sinks + recent; ++t) {
        const std::int64_t slot = t < sinks ? t : impl.ring_slot(state, t - sinks);
        for (int kind = 0; kind < 2; ++kind)
          for (int h = 0; h < impl.shape.kv_heads; ++h, from += impl.number_row())
            std::memcpy(state.exact.data() + impl.exact_at(kind, h, slot), from, impl.number_row());
      }
      state.sinks = sinks;
      state.ring_count = recent;
      const Json& kept = of.required("kept");
      if (!kept.is_array()) of.refuse("kept", "a list");
      std::int64_t least = 0;
      for (const Json& index : kept) {
        if (!index.is_number_integer() || index.get<std::int64_t>() < least ||
            index.get<std::int64_t>() >= coded)
          of.refuse("kept", "ascending coded tokens");
        auto numbers = std::make_shared<detail::MirroredBytes>(2 * size_of(impl.shape.kv_heads),
                                                               impl.number_row());
        std::memcpy(numbers->data(), reader.take(token_bytes), token_bytes);
        state.kept.push_back({index.get<std::int64_t>(), std::move(numbers)});
        least = state.kept.back().coded_index + 1;
      }
    }
    if (reader.left() != sizeof sum) reader.refuse("is longer than its codes");
    return impl.add(std::move(made));
  } catch (const std::bad_alloc&) {
    throw ResourceError(path + ": no memory to read a sequence");
  } catch (const Json::exception& error) {
    throw IoError(path + ": " + error.what());
  }
}

}  // namespace lexico
