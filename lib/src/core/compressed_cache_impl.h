#pragma once
// What a compressed cache is made of; shared by compressed_cache.cpp and compressed_cache_file.cpp.

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/attention_impl.h"
#include "lexico/compressed_cache.h"

namespace lexico {

namespace detail {

/// Numbers of exact tokens, as memory has them.
class ExactCoder {
 public:
  explicit ExactCoder(ExactNumbers type) : type_(type) {}
  std::size_t bytes() const { return type_ == ExactNumbers::kFloat32 ? 4 : 2; }
  /// Rounds; counts numbers that were finite and lie beyond the largest one, which they become.
  void store(const float* from, int count, std::uint8_t* to, std::int64_t& saturated) const;
  void load(const std::uint8_t* from, int count, float* to) const;

 private:
  ExactNumbers type_;
};

/// A dictionary and what encodes with it.
struct CacheCoder {
  Dictionary* dictionary = nullptr;
  float* atoms = nullptr;  ///< the dictionary's, with room for own atoms behind
  int more_atoms = 0;
  Encoder* encoder = nullptr;            ///< shared; none if there are no slots
  std::unique_ptr<Encoder> own_encoder;  ///< on a GPU, where it keeps its atoms
  std::optional<Codec> codec;            ///< none: the format is exact

  int record_bytes() const;
  /// Must come before encode or decode, with the atoms of the sequence.
  void use(const std::vector<float>& own_rows);
  void encode(const float* z, std::int64_t rows, std::uint8_t* records, int first_head);
  void decode(const std::uint8_t* records, std::int64_t rows, float* z, int first_head) const;

 private:
  int num_atoms_ = 0;  // in use; 0: none yet
  SparseCodes codes_;
};

/// A token with a NaN or Inf.
struct KeptToken {
  std::int64_t coded_index = 0;
  std::shared_ptr<MirroredBytes> numbers;  ///< [keys and values, kv_heads, dim]; stays as it is
};

/// One layer of one sequence: sinks, then coded tokens, then those in the ring.
struct CacheLayer {
  std::array<CodedVectors, 2> coded;  ///< keys, values
  MirroredBytes exact;                ///< [keys and values, kv_heads, sink_tokens + ring, dim]
  std::int64_t sinks = 0, ring_start = 0, ring_count = 0;
  std::vector<KeptToken> kept;
  /// Coded index of the token that brought each own atom: of each dictionary.
  std::array<std::vector<std::vector<std::int64_t>>, 2> joined;

  std::int64_t num_coded() const { return coded[0].tokens(); }
  std::int64_t tokens() const { return sinks + num_coded() + ring_count; }
  /// Drops coded tokens from `tokens` on, with all that came with them. Does not throw.
  void truncate_coded(std::int64_t tokens);
};

}  // namespace detail

struct CompressedCache::Impl {
  CacheShape shape;
  CacheOptions options;
  DictionarySet set;
  Rope rope;
  bool rotates = false;
  CacheCounts counts;
  detail::ExactCoder exact{ExactNumbers::kFloat16};
  std::int64_t ring = 0;  // tokens
  AttentionScratch scratch;
  int device = -1;                                            // -1: the CPU
  std::shared_ptr<detail::DevicePool> exact_pool, kept_pool;  // on the device

  struct Layer {
    std::array<std::vector<detail::CacheCoder>, 2> coders;  // one, or one for each KV head
    std::unique_ptr<LayerAttention> attention;
  };
  std::vector<Layer> layers;
  // By max_atoms and tolerance; on a GPU each dictionary has its own, with the scratch of the
  // first.
  std::map<std::pair<int, float>, std::unique_ptr<Encoder>> encoders;
  const Encoder* first_encoder = nullptr;

  using Sequence = std::vector<detail::CacheLayer>;
  std::vector<std::unique_ptr<Sequence>> sequences;  // nullptr: removed

  // Tokens that one append compresses in a sequence: the oldest of the ring, then new ones.
  struct Due {
    const NewTokens* source = nullptr;
    detail::CacheLayer* state = nullptr;
    std::int64_t from_ring = 0, from_new = 0, first_new = 0;
    std::vector<char> not_finite;  // of each token
    std::int64_t tokens() const { return from_ring + from_new; }
  };
  struct Pending {  // what an append counts once it has succeeded
    std::int64_t exact_saturated = 0, saturated = 0, own_atoms = 0;
  };

  Impl(DictionarySet dictionaries, const CacheShape& shape, const CacheOptions& options);
  void make_layer(int layer);
  Encoder* encoder_for(int max_atoms, float tolerance, detail::CacheCoder& coder);

  void check_layer(int layer) const;
  Sequence& sequence(int number) const;
  int add(std::unique_ptr<Sequence> made);
  void check_room(std::size_t more) const;  // against max_bytes
  std::unique_ptr<Sequence> new_sequence() const;
  std::size_t number_row() const {  // bytes of a vector
    return static_cast<std::size_t>(shape.head_dim) * exact.bytes();
  }
  std::int64_t exact_slots() const { return options.sink_tokens + ring; }
  std::size_t exact_at(int kind, int head, std::int64_t slot) const {
    return static_cast<std::size_t>((kind * shape.kv_heads + head) * exact_slots() + slot) *
           number_row();
  }
  std::int64_t ring_slot(const detail::CacheLayer& state, std::int64_t index) const {
    return options.sink_tokens + (state.ring_start + index) % ring;
  }
  // Heads that one dictionary codes: all, or one.
  struct Heads {
    int first = 0, count = 0;
  };
  Heads heads_of(int layer, int kind, int dictionary) const {
    const bool own =
        layers[static_cast<std::size_t>(layer)].coders[static_cast<std::size_t>(kind)].size() > 1;
    return own ? Heads{dictionary, 1} : Heads{0, shape.kv_heads};
  }

  void append(int layer, const std::vector<NewTokens>& batch);
  void store_new(const NewTokens& source,
                 std::int64_t token,
                 std::uint8_t* keys,
                 std::uint8_t* values,
                 std::size_t head_bytes,
                 std::int64_t& saturated) const;
  void gather(Due& due,
              int kind,
              std::int64_t first,
              std::int64_t tokens,
              Heads heads,
              float* to,
              Pending& pending) const;
  void rotate_back(int layer,
                   const Due& due,
                   std::int64_t first,
                   std::int64_t tokens,
                   Heads heads,
                   float* x) const;
  void encode(int layer,
              int kind,
              std::vector<Due>& due,
              std::vector<std::uint8_t>& records,
              Pending& pending);
  void encode_adaptively(int layer,
                         int kind,
                         int dictionary,
                         Due& due,
                         std::int64_t first,
                         std::int64_t tokens,
                         const float* x,
                         std::uint8_t* records,
                         Pending& pending);
  void add_codes(const std::vector<Due>& due,
                 const std::array<std::vector<std::uint8_t>, 2>& records,
                 std::int64_t& not_finite);

  detail::CacheLayer empty_layer(int layer) const;
  std::vector<ExactTokens> exact_runs(detail::CacheLayer& state, detail::Uploads* uploads) const;
  void decode_coded(int layer,
                    const detail::CacheLayer& state,
                    int kind,
                    std::int64_t first,
                    std::int64_t tokens,
                    float* out);
  void load_exact(const detail::CacheLayer& state, int kind, std::int64_t slot, float* out) const;
  std::size_t exact_bytes() const {  // of a layer of a sequence
    return 2 * static_cast<std::size_t>(shape.kv_heads * exact_slots()) * number_row();
  }

  std::size_t bytes_of(const Sequence& of) const;
};

}  // namespace lexico
