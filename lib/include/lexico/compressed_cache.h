#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lexico/attention.h"
#include "lexico/dictionary.h"
#include "lexico/encoder.h"

namespace lexico {

/// The part of a model that a cache must know.
struct CacheShape {
  int layers = 0;
  int kv_heads = 0;
  int group = 1;  ///< query heads that read one KV head: query head i reads i / group
  int head_dim = 0;
  std::int64_t max_positions = 0;  ///< longest sequence; 0: what positions allow, 2^24
};

/// How the keys, or the values, of a layer are coded.
struct CacheCoding {
  int max_atoms = 0;  ///< the paper's s. 0: the dictionary's. packed: at most the dictionary's
  float relative_tolerance = 0;  ///< pursuit stops once |r| <= this * |z|; slots left over stay
                                 ///< unused and take their bytes
};

struct CacheOptions {
  /// The last so many tokens (the paper's n_b) stay exact. Beyond them, tokens wait until there are
  /// compress_chunk (n_a) of them; then all that wait are compressed at once. So right after a
  /// prompt of at least recent_window + compress_chunk tokens (and the sinks) all but the last
  /// recent_window are compressed, and never more than recent_window + compress_chunk - 1 are
  /// exact.
  int recent_window = 32;  ///< may be 0
  int compress_chunk = 1;  ///< >= 1; may be larger than the window
  int sink_tokens = 0;     ///< the first so many tokens of a sequence stay exact for ever

  CacheCoding keys, values;                             ///< of all layers
  std::map<int, CacheCoding> layer_keys, layer_values;  ///< of single layers, in their place
  Selection selection;                                  ///< of pursuit

  /// Of exact tokens: 16 bits a number. What is compressed is the rounded numbers, however tokens
  /// came. kFloat16 rounds 8 times finer; numbers beyond 65504 become 65504 (and are
  /// counted). kFloat32 takes 32 bits.
  ExactNumbers exact = ExactNumbers::kFloat16;

  /// Adaptive dictionary: a vector whose relative error |x - x^| / |x| exceeds this brings its
  /// direction into the sequence's own atoms, which pursuit takes beside the dictionary's from then
  /// on (and for itself). 0: off. A zero vector brings nothing.
  float adaptive_threshold = 0;
  /// Own atoms of a sequence for each layer, kind and dictionary (of a head, where heads have their
  /// own); indices are made wide enough for them. Each takes head_dim * 2 bytes.
  int adaptive_atoms = 64;

  float softmax_scale = 0;    ///< of scores; 0: 1 / sqrt(head_dim)
  int page_tokens = 256;      ///< codes are stored in pages of so many tokens: a multiple of 64
  bool half_keys = true;      ///< AttentionOptions::half_keys
  std::size_t max_bytes = 0;  ///< for all sequences (shared pages count for each); 0: no bound
  int threads = 0;            ///< 0: all. No result depends on it.
  /// Where to compress and to attend: cpu, cuda or cuda:N. On a GPU queries, out and log_sums of
  /// attend lie there; new tokens come from the host, which keeps all and saves it (docs/gpu.md).
  /// Bytes that a cache counts, and max_bytes, are those of the host.
  std::string device = "cpu";
  bool half_tables = false;   ///< AttentionOptions::half_tables
  int value_tile_tokens = 0;  ///< AttentionOptions::value_tile_tokens
};

/// What happened so far, in all sequences, removed ones included.
struct CacheCounts {
  std::int64_t coded_vectors = 0;    ///< keys and values
  std::int64_t saturated = 0;        ///< weights or scales beyond their grid (CodeCounts)
  std::int64_t not_finite = 0;       ///< tokens of a layer kept exact because a key or a value
                                     ///< of theirs holds a NaN or Inf
  std::int64_t exact_saturated = 0;  ///< numbers beyond 65504 that became 65504
  std::int64_t own_atoms = 0;        ///< that vectors brought in
};

/// New tokens of one sequence in one layer, fp32, keys after RoPE. Number i of token t and KV head
/// h is at t * token_stride + h * head_stride + i.
struct NewTokens {
  int sequence = 0;
  std::int64_t tokens = 0;
  const float* keys = nullptr;
  const float* values = nullptr;
  std::int64_t token_stride = 0;  ///< 0: kv_heads * head_dim
  std::int64_t head_stride = 0;   ///< 0: head_dim
};

/// The key-value cache of a model, for any number of sequences, compressed by dictionaries
/// (docs/cache.md). A token of a layer is exact (sinks, the recent window), or coded by its format.
/// Token t of a sequence is at position t.
///
/// A token with a NaN or Inf in a layer is kept exact there for ever, beside its codes, which then
/// count for nothing; attention has what the exact vectors give: NaN in the heads that hold it.
///
/// Memory of codes comes in pages, so a growing sequence copies nothing. Calls either do all they
/// say or throw and leave the cache as it was. One cache serves one caller at a time.
class CompressedCache {
 public:
  /// @param dictionaries  a layer each for keys and values (for all KV heads, or one for each), any
  /// format and transform; an `exact` format keeps fp32 weights. Taken over: move them in. Keys
  /// before RoPE need metadata "rope".
  /// @throws InvalidArgument naming what does not fit: the layer and kind without dictionary, dims,
  /// KV heads, keys before RoPE without rope, an option out of bounds. IoError if "rope" cannot be
  /// read.
  CompressedCache(DictionarySet dictionaries, const CacheShape& shape, const CacheOptions& options);
  ~CompressedCache();
  CompressedCache(CompressedCache&&) noexcept;
  CompressedCache& operator=(CompressedCache&&) noexcept;

  const CacheShape& shape() const;
  const CacheOptions& options() const;
  const CacheCounts& counts() const;

  /// A new empty sequence, with memory for its exact tokens in all layers. Returns its number,
  /// the lowest that is free. @throws ResourceError if there is no memory.
  int add_sequence();
  /// A copy that goes its own way; pages of codes are shared until one of both changes them.
  int fork(int sequence);
  void remove(int sequence);
  /// Removes all sequences.
  void clear();
  bool has(int sequence) const;

  /// Tokens that a layer has, and those that all layers have.
  std::int64_t tokens(int sequence, int layer) const;
  std::int64_t tokens(int sequence) const;
  /// Of these: coded ones. (Coded tokens follow the sinks.)
  std::int64_t coded_tokens(int sequence, int layer) const;

  /// Keeps the first `tokens` of every layer; also the way back from a step that failed between
  /// layers. Tokens that are compressed stay so; own atoms that dropped vectors brought are
  /// dropped.
  /// @throws InvalidArgument unless tokens is in [0, tokens(sequence)].
  void truncate(int sequence, std::int64_t tokens);

  /// Adds tokens to a layer, a prompt or a step alike, and compresses what is due, all sequences
  /// together. Nothing to add is fine.
  /// @throws InvalidArgument naming the layer and sequence: no such one, named twice, tokens < 0,
  /// positions beyond max_positions. ResourceError: no memory, or beyond max_bytes.
  void append(int layer, const std::vector<NewTokens>& batch);
  /// The same for sequences of equal length: keys and values [sequences, tokens, kv_heads,
  /// head_dim].
  void append(int layer,
              const std::vector<int>& sequences,
              std::int64_t tokens,
              const float* keys,
              const float* values);

  /// Attention of one query per head over all tokens of a layer, exact and coded in one softmax,
  /// without making them dense (lexico/attention.h).
  /// @param sequences  may name one more than once, each with its own queries.
  /// @param queries    [sequences, kv_heads * group, head_dim], after RoPE.
  /// @param out        likewise; a sequence without tokens gives zeros.
  /// @param log_sums   nullptr, or [sequences, kv_heads * group]: log of the sum of e^score.
  /// @param stream     of a GPU: a cudaStream_t (nullptr: the default one). The call returns when
  /// its work has been put on it; all calls of a cache are in the order of one stream.
  /// @throws InvalidArgument: no such layer or sequence; ResourceError: no memory for scratch, or
  /// CUDA reports an error.
  void attend(int layer,
              const std::vector<int>& sequences,
              const float* queries,
              float* out,
              float* log_sums = nullptr,
              void* stream = nullptr);

  /// What attention sees, as dense vectors: keys (after RoPE) and values of tokens [first, first +
  /// tokens), [tokens, kv_heads, head_dim].
  /// @throws InvalidArgument: no such layer, sequence or tokens.
  void reconstruct(int layer,
                   int sequence,
                   std::int64_t first,
                   std::int64_t tokens,
                   float* keys,
                   float* values) const;

  /// Bytes of memory that hold the tokens: pages of codes (shared ones once), exact tokens, own
  /// atoms; not dictionaries, scratch and bookkeeping (some 100 bytes a page).
  std::size_t bytes() const;
  /// Of one sequence, shared pages included.
  std::size_t bytes(int sequence) const;
  /// Most that a sequence of so many tokens takes, all own atoms it may have included, tokens with
  /// a NaN or Inf not; exactly that much if its tokens come at once and dictionaries are not
  /// adaptive.
  std::size_t bytes_for(std::int64_t tokens) const;

  /// One sequence to a file ("lexico-cache 1", docs/cache.md), with checksums.
  /// @throws ResourceError naming the path if it cannot be written.
  void save(int sequence, const std::string& path) const;
  /// A new sequence from a file. It continues as the saved one would have.
  /// @throws IoError naming the file: missing, damaged (any changed or missing byte), another
  /// version, saved with other dictionaries or options (which). ResourceError: no memory.
  int load(const std::string& path);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lexico
