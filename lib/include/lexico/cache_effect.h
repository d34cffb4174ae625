#pragma once

// What a compressed cache does to a model: its next-token distributions against those with the full
// cache. The cache is a CompressedCache, or any function that puts approximations in the place of
// vectors.

#include <cstdint>
#include <functional>
#include <vector>

#include "lexico/compressed_cache.h"
#include "lexico/kind.h"

namespace lexico {

class LanguageModel;

/// Puts in the place of vectors what a compressed cache would give back for them.
/// @param positions  [tokens] of the tokens in their sequences. Sequences read side by side follow
///                   each other; in one the positions ascend without gaps.
/// @param vectors    [tokens, kv_heads, head_dim], keys after RoPE, as the cache holds them; finite
///                   before and, or it is an error, after the call.
using ApproximateVectors = std::function<void(
    int layer, Kind kind, const std::int32_t* positions, std::int64_t tokens, float* vectors)>;

/// One way to keep a cache. Sequences are read in chunks; attention of a chunk that starts at
/// position c sees
///   - the first `sink_tokens` tokens exactly,
///   - the other tokens before c - recent_window as `approximate` left them,
///   - the tokens from c - recent_window to c, and the chunk's own (causally), exactly.
/// A vector is approximated once, when it leaves the window, from the vector that the model gave
/// when it read the token - with the past already compressed, as in a real cache. Approximation
/// errors of early tokens thus reach the later vectors of all layers above.
///
/// With `compressed` in place of `approximate` the chunks are appended to a CompressedCache, and
/// the next chunk sees what it reconstructs. Its options say what stays exact, and when tokens are
/// compressed.
struct CacheSetting {
  ApproximateVectors approximate;
  int recent_window = 32;
  int sink_tokens = 0;
  int chunk = 0;  ///< 1: token by token; 0: recent_window, or 32 if that is 0
  /// With `approximate`: as CacheOptions::compress_chunk, and whether all vectors are rounded to
  /// half floats first, as CompressedCache keeps exact ones.
  int compress_chunk = 1;
  bool half_floats = false;
  /// Makes an empty cache for the model's shape; called for each batch of sequences.
  std::function<CompressedCache()> compressed = {};
  std::int64_t memory_bytes = 0;  ///< of what `compressed` makes, about, beside dense vectors
};

struct CacheEffectOptions {
  int sequences_at_once = 0;  ///< of equal length; 0: as many as memory_bytes hold, 64 at most
  /// Caches, logits and attention scores of what is read at once, about; a single sequence with a
  /// single setting is read whatever it takes.
  std::int64_t memory_bytes = std::int64_t{1} << 30;
  /// Told the part of the work that is done, in (0, 1]; false ends it with Interrupted.
  std::function<bool(double)> on_progress;
};

/// Means over the tokens of all sequences but the first of each, which nothing predicts. Logarithms
/// are natural; sums are in double. NaN if no token was measured.
struct CacheEffect {
  std::int64_t tokens = 0;    ///< that were predicted: the sum of (length - 1)
  double full_nll = 0;        ///< mean -log p(token) with the full cache
  double compressed_nll = 0;  ///< with the compressed cache
  double mean_kl = 0;         ///< of KL(full || compressed) of the distribution over the vocabulary
  double p99_kl = 0;          ///< interpolated linearly, as numpy does
  /// With `compressed`: CompressedCache::bytes once each sequence is read to its end, summed, and
  /// the own atoms that joined.
  std::size_t bytes = 0;
  std::int64_t own_atoms = 0;

  double full_perplexity() const;  ///< exp(full_nll): teacher-forced
  double compressed_perplexity() const;
  double nll_increase() const { return compressed_nll - full_nll; }
};

/// Reads `sequences` with the full cache and with each setting's, chunk by chunk side by side, and
/// compares. Settings of equal chunk share the reading with the full cache.
///
/// @param sequences  token ids, BOS where the caller wants it. Of fewer than two tokens: left out.
/// @returns one effect per setting, in order.
/// @throws IoError if the model has no method `step`, or gives a NaN (says where);
///         InvalidArgument if a setting or an id is out of bounds, `compressed` gave a cache of
///         another shape, or `approximate` wrote a NaN or Inf: names the layer, the kind, the
///         position; Interrupted; ResourceError if memory does not suffice. What the functions of
///         a setting throw passes through.
std::vector<CacheEffect> measure_cache_effect(
    const LanguageModel& model,
    const std::vector<std::vector<std::int32_t>>& sequences,
    const std::vector<CacheSetting>& settings,
    const CacheEffectOptions& options = {});

}  // namespace lexico
