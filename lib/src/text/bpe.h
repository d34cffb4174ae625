#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace lexico::text {

/// The model part of a tokenizer.json, over bytes instead of the characters that stand for them.
struct BpeModel {
  struct Merge {
    std::int32_t left, right, merged;
  };
  std::array<std::int32_t, 256> id_of_byte;  ///< -1: the vocabulary lacks it
  std::vector<Merge> merges;                 ///< best first
  std::optional<std::int32_t> unknown_id;    ///< of a byte that the vocabulary lacks; else left out
  bool fuse_unknown = false;                 ///< one unknown_id for neighbouring ones
  bool ignore_merges = false;                ///< a word in words is one token
  std::unordered_map<std::string, std::int32_t> words;  ///< bytes -> id; filled if ignore_merges
};

/// Splits words (pre-tokens) into ids by byte-pair encoding. Immutable; threads may share one.
class Bpe {
 public:
  explicit Bpe(BpeModel model);

  /// Appends the ids of a non-empty word. O(n log n) in its bytes.
  void encode(std::string_view word, std::vector<std::int32_t>& ids) const;

 private:
  struct Entry {
    std::uint64_t pair = kNoPair;
    std::uint32_t rank = 0;
    std::int32_t merged = 0;
  };
  static constexpr std::uint64_t kNoPair = ~std::uint64_t{0};

  const Entry* find(std::int32_t left, std::int32_t right) const;
  void append_symbols(std::string_view word, std::vector<std::int32_t>& symbols) const;
  void merge_short(std::int32_t* symbols, int& num_symbols) const;
  void merge_long(std::vector<std::int32_t>& symbols) const;

  BpeModel model_;
  std::vector<Entry> table_;  ///< open addressing, a power of two, at most half full
};

/// Ids of words met before: a fixed number of slots, a newer word replaces an older one. A few MB.
class WordCache {
 public:
  /// Appends the ids of `word`, asking `bpe` if they are not here.
  void encode(const Bpe& bpe, std::string_view word, std::vector<std::int32_t>& ids);
  void clear();

 private:
  static constexpr std::size_t kSlots = 1 << 15, kMaxBytes = 46, kMaxIds = 12;
  struct Slot {
    std::uint8_t num_bytes, num_ids;  ///< no bytes: free
    char bytes[kMaxBytes];
    std::int32_t ids[kMaxIds];
  };
  std::vector<Slot> slots_;
};

}  // namespace lexico::text
