#include "lexico/tokenizer.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>

#include "text/bpe.h"
#include "text/tokenizer_json.h"
#include "text/unicode.h"

namespace lexico {
namespace {

using text::PreTokenizeStep;
using text::Regex;

/// A stretch of text on its way to becoming words; `known` is the same as patterns shall see it.
struct Piece {
  std::string_view text, known;
  Piece part(std::size_t start, std::size_t end) const {
    return {text.substr(start, end - start), known.substr(start, end - start)};
  }
};

/// Whether a span joins the one before it, by whether each of the two matches.
bool joins(PreTokenizeStep::Behavior behavior, bool previous_matches, bool matches) {
  using enum PreTokenizeStep::Behavior;
  switch (behavior) {
    case kMergedWithPrevious:
      return matches && !previous_matches;
    case kMergedWithNext:
      return !matches && previous_matches;
    case kContiguous:
      return matches == previous_matches;
    case kIsolated:
    case kRemoved:
      break;
  }
  return false;
}

/// Calls `use(Piece)` for each non-empty part that `step` leaves of `piece`.
template <typename Use>
void cut(const PreTokenizeStep& step, const Piece& piece, Use&& use) {
  std::size_t start = 0, end = 0;  // of the span held back, since the next one may join it
  bool held = false, held_matches = false;
  const auto release = [&] {
    if (held && start < end) use(piece.part(start, end));
    held = false;
  };
  const auto add_span = [&](std::size_t span_start, std::size_t span_end, bool found) {
    const bool matches = found != step.invert;
    if (!(held && joins(step.behavior, held_matches, matches))) {
      release();
      start = span_start;
      held = !(matches && step.behavior == PreTokenizeStep::Behavior::kRemoved);
    }
    end = span_end;
    held_matches = matches;
  };
  std::size_t done = 0;
  step.pattern->for_each(piece.known, [&](const Regex::Match& match) {
    if (done < match.start) add_span(done, match.start, false);
    add_span(match.start, match.end, true);
    done = match.end;
  });
  if (done < piece.text.size()) add_span(done, piece.text.size(), false);
  release();
}

/// Words that this thread met lately, of the tokenizer it used last.
struct ThreadCache {
  std::uint64_t owner = 0;
  text::WordCache words;
};

text::WordCache& words_of(std::uint64_t owner) {
  thread_local ThreadCache cache;
  if (cache.owner != owner) {
    cache.words.clear();
    cache.owner = owner;
  }
  return cache.words;
}

std::uint64_t next_owner() {
  static std::atomic<std::uint64_t> count{0};
  return ++count;
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(text::TokenizerJson file)
      : bpe(std::move(file.model)),
        vocab(std::move(file.vocab)),
        nfc(file.nfc),
        steps(std::move(file.steps)),
        bos_id(file.bos_id) {
    std::string storage;
    for (const text::AddedToken& token : file.added_tokens) {
      if (token.normalized) {
        added_normalized.add(nfc ? text::to_nfc(token.content, storage) : token.content, token);
      } else {
        added.add(token.content, token);
      }
      vocab[token.content] = token.id;
    }
    for (const auto& [token, id] : vocab) vocab_size = std::max(vocab_size, id + 1);
  }

  void encode(std::string_view text, std::vector<std::int32_t>& ids) const {
    text::WordCache& words = words_of(cache_owner);
    const auto add_id = [&](std::int32_t id) { ids.push_back(id); };
    std::string normal_storage, known_storage;
    added.split(
        text,
        [&](std::string_view part) {
          if (nfc) part = text::to_nfc(part, normal_storage);
          added_normalized.split(
              part,
              [&](std::string_view plain) {
                run(0, {plain, text::known_to_pcre2(plain, known_storage)}, words, ids);
              },
              add_id);
        },
        add_id);
  }

  /// Takes a piece through the steps from `step` on, and each word that comes out to its ids.
  void run(std::size_t step,
           const Piece& piece,
           text::WordCache& words,
           std::vector<std::int32_t>& ids) const {
    if (step == steps.size()) return words.encode(bpe, piece.text, ids);
    if (steps[step].adds_space && piece.text[0] != ' ') {
      const std::string spaced_text = ' ' + std::string(piece.text);
      const std::string spaced_known = ' ' + std::string(piece.known);
      return apply(step, {spaced_text, spaced_known}, words, ids);
    }
    apply(step, piece, words, ids);
  }

  void apply(std::size_t step,
             const Piece& piece,
             text::WordCache& words,
             std::vector<std::int32_t>& ids) const {
    if (!steps[step].pattern) return run(step + 1, piece, words, ids);
    cut(steps[step], piece, [&](const Piece& part) { run(step + 1, part, words, ids); });
  }

  /// Made when first asked for: most programs only encode.
  const std::vector<std::string>& bytes_of_ids() const {
    std::call_once(decoding, [this] {
      id_bytes.resize(static_cast<std::size_t>(vocab_size));
      for (const auto& [token, id] : vocab)
        id_bytes[static_cast<std::size_t>(id)] = text::bytes_of_token(token);
    });
    return id_bytes;
  }

  text::Bpe bpe;
  std::unordered_map<std::string, std::int32_t> vocab;  ///< added tokens included
  text::AddedTokenFinder added, added_normalized;
  bool nfc;
  std::vector<PreTokenizeStep> steps;
  std::optional<std::int32_t> bos_id;
  std::int32_t vocab_size = 0;
  std::uint64_t cache_owner = next_owner();
  mutable std::once_flag decoding;
  mutable std::vector<std::string> id_bytes;
};

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::from_file(const std::string& path) {
  return Tokenizer(std::make_unique<Impl>(text::read_tokenizer_json(path)));
}

void Tokenizer::encode(std::string_view text, std::vector<std::int32_t>& ids) const {
  if (text::valid_utf8_prefix(text) == text.size()) return impl_->encode(text, ids);
  impl_->encode(text::replace_invalid_utf8(text), ids);
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<std::int32_t> ids;
  encode(text, ids);
  return ids;
}

std::string Tokenizer::decode(const std::vector<std::int32_t>& ids) const {
  const std::vector<std::string>& bytes = impl_->bytes_of_ids();
  std::string text;
  for (const std::int32_t id : ids)
    if (id >= 0 && id < vocab_size()) text += bytes[static_cast<std::size_t>(id)];
  return text::valid_utf8_prefix(text) == text.size() ? text : text::replace_invalid_utf8(text);
}

int Tokenizer::vocab_size() const { return impl_->vocab_size; }

std::optional<std::int32_t> Tokenizer::id_of(std::string_view token) const {
  const auto found = impl_->vocab.find(std::string(token));
  if (found == impl_->vocab.end()) return std::nullopt;
  return found->second;
}

std::optional<std::int32_t> Tokenizer::bos_id() const { return impl_->bos_id; }

}  // namespace lexico
