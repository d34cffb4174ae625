#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lexico {

/// Byte-level BPE from a Hugging Face `tokenizer.json`: the GPT-2, Llama-3 and Qwen2 styles and
/// what else is built of the same steps. Ids equal those of the Python package `tokenizers` 0.23
/// with add_special_tokens=False; `truncation` and `padding` in the file have no effect here.
///
/// Immutable once read: any number of threads may call encode on one object at the same time. Each
/// thread keeps a few MB of words it met lately, of the tokenizer it used last; there are no locks.
class Tokenizer {
 public:
  /// @throws IoError if the file is missing, damaged, or of another kind; the message names the
  /// file, the
  ///         field and its value, and for another kind advises to pass ids (--token-ids) instead.
  static Tokenizer from_file(const std::string& path);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  /// Appends the ids of `text` to `ids`. Added tokens in the text ("<|endoftext|>") become their
  /// ids. Bytes that are not UTF-8 are read as U+FFFD each maximal invalid part, as Python's
  /// errors="replace" does. NUL is a character like others. Empty text has no ids. Time is linear
  /// in the text (n log n in a single long word).
  /// @throws ResourceError if a pattern of the file needs more steps for this text than allowed.
  void encode(std::string_view text, std::vector<std::int32_t>& ids) const;
  std::vector<std::int32_t> encode(std::string_view text) const;

  /// The text of `ids`, that of added tokens as written. Parts that are not UTF-8, as where a
  /// character's ids are cut, become U+FFFD; an id that no token has adds nothing.
  std::string decode(const std::vector<std::int32_t>& ids) const;

  int vocab_size() const;  ///< largest id + 1, added tokens included
  std::optional<std::int32_t> id_of(
      std::string_view token) const;  ///< of a token as written in the file
  /// The token that the post-processor puts before a text (the file's own BOS), if it names one.
  std::optional<std::int32_t> bos_id() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lexico
