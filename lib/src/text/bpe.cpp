#include "text/bpe.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <queue>

#include "lexico/error.h"

namespace lexico::text {
namespace {

std::uint64_t pair_of(std::int32_t left, std::int32_t right) {
  return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
}

std::size_t hash_of(std::uint64_t x) {  // the finalizer of splitmix64
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// In bytes; beyond, a heap beats looking through all pairs for each merge.
constexpr int kShortWord = 48;
constexpr std::uint32_t kNoRank = std::numeric_limits<std::uint32_t>::max();

}  // namespace

Bpe::Bpe(BpeModel model) : model_(std::move(model)) {
  std::size_t size = 16;
  while (size < 2 * model_.merges.size()) size *= 2;
  table_.resize(size);
  std::uint32_t rank = 0;
  for (const BpeModel::Merge& merge : model_.merges) {
    const std::uint64_t pair = pair_of(merge.left, merge.right);
    std::size_t at = hash_of(pair) & (size - 1);
    while (table_[at].pair != kNoPair && table_[at].pair != pair) at = (at + 1) & (size - 1);
    table_[at] = {pair, rank++, merge.merged};  // of two equal merges the later one counts
  }
  model_.merges = {};
}

const Bpe::Entry* Bpe::find(std::int32_t left, std::int32_t right) const {
  const std::uint64_t pair = pair_of(left, right);
  for (std::size_t at = hash_of(pair) & (table_.size() - 1);; at = (at + 1) & (table_.size() - 1)) {
    if (table_[at].pair == pair) return &table_[at];
    if (table_[at].pair == kNoPair) return nullptr;
  }
}

void Bpe::encode(std::string_view word, std::vector<std::int32_t>& ids) const {
  if (model_.ignore_merges) {
    const auto found = model_.words.find(std::string(word));
    if (found != model_.words.end()) {
      ids.push_back(found->second);
      return;
    }
  }
  const std::size_t start = ids.size();
  append_symbols(word, ids);
  if (ids.size() - start <= kShortWord) {
    int num_symbols = static_cast<int>(ids.size() - start);
    merge_short(ids.data() + start, num_symbols);
    ids.resize(start + static_cast<std::size_t>(num_symbols));
  } else {
    std::vector<std::int32_t> symbols(ids.begin() + static_cast<std::ptrdiff_t>(start), ids.end());
    merge_long(symbols);
    ids.resize(start);
    ids.insert(ids.end(), symbols.begin(), symbols.end());
  }
}

void Bpe::append_symbols(std::string_view word, std::vector<std::int32_t>& symbols) const {
  bool after_unknown = false;
  for (const char c : word) {
    const std::int32_t id = model_.id_of_byte[static_cast<unsigned char>(c)];
    if (id >= 0) {
      symbols.push_back(id);
    } else if (model_.unknown_id && !(after_unknown && model_.fuse_unknown)) {
      symbols.push_back(*model_.unknown_id);
    }
    after_unknown = id < 0;
  }
}

/// Merges the pair of the best rank, the leftmost of equals, until none is left.
void Bpe::merge_short(std::int32_t* symbols, int& num_symbols) const {
  std::uint32_t ranks[kShortWord];  // of the pair (i, i + 1)
  const auto rank_at = [&](int i) {
    const Entry* merge = i + 1 < num_symbols ? find(symbols[i], symbols[i + 1]) : nullptr;
    return merge ? merge->rank : kNoRank;
  };
  for (int i = 0; i < num_symbols; ++i) ranks[i] = rank_at(i);
  while (num_symbols > 1) {
    const int best = static_cast<int>(std::min_element(ranks, ranks + num_symbols - 1) - ranks);
    if (ranks[best] == kNoRank) return;
    symbols[best] = find(symbols[best], symbols[best + 1])->merged;
    std::copy(symbols + best + 2, symbols + num_symbols, symbols + best + 1);
    std::copy(ranks + best + 2, ranks + num_symbols, ranks + best + 1);
    --num_symbols;
    ranks[best] = rank_at(best);
    if (best > 0) ranks[best - 1] = rank_at(best - 1);
  }
}

/// The same with a linked list and a heap of candidates: rank, then place of the left symbol. One
/// whose pair has changed since has another rank.
void Bpe::merge_long(std::vector<std::int32_t>& symbols) const {
  constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();
  if (symbols.size() >= kNone) {
    throw ResourceError("a word of " + std::to_string(symbols.size()) + " bytes is too long");
  }
  const auto count = static_cast<std::uint32_t>(symbols.size());
  std::vector<std::uint32_t> previous(count), next(count);
  for (std::uint32_t i = 0; i < count; ++i) {
    previous[i] = i == 0 ? kNone : i - 1;
    next[i] = i + 1 == count ? kNone : i + 1;
  }
  const auto merge_at = [&](std::uint32_t left) {
    return next[left] == kNone ? nullptr : find(symbols[left], symbols[next[left]]);
  };
  std::priority_queue<std::uint64_t, std::vector<std::uint64_t>, std::greater<>> heap;
  const auto add_candidate = [&](std::uint32_t left) {
    if (const Entry* merge = merge_at(left)) heap.push(std::uint64_t{merge->rank} << 32 | left);
  };
  for (std::uint32_t i = 0; i < count; ++i) add_candidate(i);
  while (!heap.empty()) {
    const auto rank = static_cast<std::uint32_t>(heap.top() >> 32);
    const auto left = static_cast<std::uint32_t>(heap.top());
    heap.pop();
    const Entry* merge = merge_at(left);
    if (merge == nullptr || merge->rank != rank) continue;
    const std::uint32_t right = next[left];
    symbols[left] = merge->merged;
    next[left] = next[right];
    next[right] = kNone;  // it is no pair's left symbol any more
    if (next[left] != kNone) previous[next[left]] = left;
    add_candidate(left);
    if (previous[left] != kNone) add_candidate(previous[left]);
  }
  std::size_t num_left = 0;
  for (std::uint32_t i = 0; i != kNone; i = next[i]) symbols[num_left++] = symbols[i];
  symbols.resize(num_left);
}

void WordCache::clear() { slots_.assign(kSlots, Slot{}); }

void WordCache::encode(const Bpe& bpe, std::string_view word, std::vector<std::int32_t>& ids) {
  if (word.size() > kMaxBytes) return bpe.encode(word, ids);
  Slot& slot = slots_[std::hash<std::string_view>()(word) % kSlots];
  if (slot.num_bytes == word.size() && std::memcmp(slot.bytes, word.data(), word.size()) == 0) {
    ids.insert(ids.end(), slot.ids, slot.ids + slot.num_ids);
    return;
  }
  const std::size_t start = ids.size();
  bpe.encode(word, ids);
  const std::size_t num_ids = ids.size() - start;
  if (num_ids > kMaxIds) return;
  slot.num_bytes = static_cast<std::uint8_t>(word.size());
  slot.num_ids = static_cast<std::uint8_t>(num_ids);
  std::memcpy(slot.bytes, word.data(), word.size());
  std::copy(ids.begin() + static_cast<std::ptrdiff_t>(start), ids.end(), slot.ids);
}

}  // namespace lexico::text
