#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "lexico-eval/config.h"
#include "lexico-eval/rates.h"
#include "lexico/compressed_cache.h"
#include "lexico/language_model.h"

namespace lexico::apps {

/// How one place of a cache is coded: by a dictionary with `format` in place of its own, or by any
/// other coder.
struct PlaceCode {
  const Dictionary* dictionary = nullptr;
  std::shared_ptr<const CodeFormat> format;
  std::shared_ptr<VectorCoder> coder;

  /// Of a vector, as a cache holds it.
  int bits(int own_atoms) const;
};
using Place = std::tuple<int, Kind, int>;  ///< layer, kind, KV head or Dictionary::kAllHeads

/// A way to keep the whole cache: a line of the report's table.
struct CacheSettings {
  std::string coder;  ///< as the report names it
  KeyStage key_stage = KeyStage::kPostRope;
  std::map<Place, PlaceCode> places;
  int key_atoms = 0,
      value_atoms = 0;  ///< of each vector; 0: not one number for all layers, or none
  int recent_window = 0, sink_tokens = 0, compress_chunk = 1;
  double adaptive_threshold = 0;
  int adaptive_atoms = 0;  ///< 0 without a threshold
  std::string split;       ///< its line in the curve of a budget sweep; else empty

  bool by_dictionaries() const { return places.begin()->second.dictionary != nullptr; }
  double mean_bits(Kind kind, const ModelInfo& model) const;  ///< of a vector
};

/// Pages as small as they can be: the texts are short.
inline constexpr int kCachePageTokens = 64;

/// For settings by dictionaries. @throws what CompressedCache's constructor does, naming the coder.
CompressedCache make_cache(const CacheSettings& settings,
                           const ModelInfo& model,
                           const EncodeOptions& encode);
/// What the cache of one sequence of so many tokens takes: CompressedCache::bytes_for, and for
/// other coders the same with their bits in the place of codes.
std::size_t cache_bytes(const CacheSettings& settings, const ModelInfo& model, std::int64_t tokens);
/// Of the full cache in half floats.
double full_bytes(const ModelInfo& model, std::int64_t tokens);

/// Lengths of the sequences of a text that are read.
struct TextLengths {
  std::string name;
  std::vector<std::int64_t> lengths;
};
std::size_t cache_bytes(const CacheSettings& settings, const ModelInfo& model, const TextLengths&);
double full_bytes(const ModelInfo& model, const TextLengths& text);

/// Every coder that has all places, with each recent window, number of sinks and threshold; beside
/// each code of a dictionary random rotation + Lloyd-Max at its bits.
/// @param notes  gets what was left out.
/// @throws InvalidArgument if a window leaves nothing to compress, or no coder can be adaptive.
std::vector<CacheSettings> listed_settings(const EvalConfig& config,
                                           const std::vector<RateCoder>& coders,
                                           const ModelInfo& model,
                                           const std::vector<TextLengths>& texts,
                                           std::vector<std::string>& notes);

/// The settings of a sweep at `budget` of the full cache's bytes: for each window, and each split
/// of what it leaves between keys and values, the highest rates of both that fit.
/// @throws InvalidArgument naming the least budget if none fits.
std::vector<CacheSettings> budget_settings(const EvalConfig& config,
                                           const std::vector<Contender>& contenders,
                                           const std::vector<RateCoder>& coders,
                                           const ModelInfo& model,
                                           const std::vector<TextLengths>& texts,
                                           std::vector<std::string>& notes);

/// "window 32, sinks 4, adaptive 0.3": what stays exact.
std::string exact_part(const CacheSettings& settings);

}  // namespace lexico::apps
