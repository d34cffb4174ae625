#pragma once

#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/regex.h"

namespace lexico::text {

/// One step of cutting a text into words.
struct PreTokenizeStep {
  enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };
  bool adds_space = false;       ///< puts ' ' before a piece that does not begin with one
  std::optional<Regex> pattern;  ///< then cuts at the matches, if there is one
  bool invert = false;           ///< what does not match counts as the match
  Behavior behavior = Behavior::kIsolated;
};

/// What a tokenizer.json says, checked.
struct TokenizerJson {
  BpeModel model;
  std::unordered_map<std::string, std::int32_t> vocab;  ///< as written
  std::vector<AddedToken> added_tokens;                 ///< with the ids `tokenizers` gives them
  bool nfc = false;
  std::vector<PreTokenizeStep> steps;
  std::optional<std::int32_t> bos_id;
};

/// The bytes that a token of byte-level BPE stands for; a token with a character of no byte stands
/// for itself, as in `tokenizers`.
std::string bytes_of_token(const std::string& token);

/// @throws IoError naming the file, the field and its value.
TokenizerJson read_tokenizer_json(const std::string& path);

}  // namespace lexico::text
