#include "text/added_tokens.h"

#include <algorithm>

#include "text/regex.h"
#include "text/unicode.h"

namespace lexico::text {
namespace {

/// \w as the Rust regex crate has it: it decides what single_word means in `tokenizers`.
bool is_word(std::string_view character) {
  static const Regex word = Regex::from_oniguruma(
      R"([\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{200C}\x{200D}\x{24B6}-\x{24E9}\x{1F130}-\x{1F149}\x{1F150}-\x{1F169}\x{1F170}-\x{1F189}])");
  std::string storage;
  Regex::Match match;
  return word.find(known_to_pcre2(character, storage), 0, match);
}

std::size_t start_of_character_before(std::string_view text, std::size_t at) {
  do --at;
  while ((static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
  return at;
}

std::size_t end_of_character_at(std::string_view text, std::size_t at) {
  next_code_point(text, at);
  return at;
}

bool word_before(std::string_view text, std::size_t at) {
  if (at == 0) return false;
  const std::size_t start = start_of_character_before(text, at);
  return is_word(text.substr(start, at - start));
}

bool word_behind(std::string_view text, std::size_t at) {
  return at < text.size() && is_word(text.substr(at, end_of_character_at(text, at) - at));
}

std::size_t start_of_space_before(std::string_view text, std::size_t at) {
  while (at > 0) {
    const std::size_t start = start_of_character_before(text, at);
    std::size_t behind = start;
    if (!is_space(next_code_point(text, behind))) break;
    at = start;
  }
  return at;
}

std::size_t end_of_space_behind(std::string_view text, std::size_t at) {
  while (at < text.size()) {
    std::size_t behind = at;
    if (!is_space(next_code_point(text, behind))) break;
    at = behind;
  }
  return at;
}

}  // namespace

void AddedTokenFinder::add(std::string_view written, const AddedToken& token) {
  if (written.empty()) return;
  int node = 0;
  for (const char c : written) {
    int next = child(node, c);
    if (next < 0) {
      next = static_cast<int>(nodes_.size());
      nodes_[static_cast<std::size_t>(node)].next.emplace_back(c, next);
      nodes_.emplace_back();
    }
    node = next;
  }
  nodes_[static_cast<std::size_t>(node)].token = static_cast<int>(tokens_.size());
  tokens_.push_back(token);
  starts_token_[static_cast<unsigned char>(written[0])] = true;
}

int AddedTokenFinder::child(int node, char c) const {
  for (const auto& [next_char, next] : nodes_[static_cast<std::size_t>(node)].next) {
    if (next_char == c) return next;
  }
  return -1;
}

bool AddedTokenFinder::find(std::string_view text, std::size_t from, Found& found) const {
  if (tokens_.empty()) return false;
  for (std::size_t start = from; start < text.size(); ++start) {
    if (!starts_token_[static_cast<unsigned char>(text[start])]) continue;
    int longest = -1, node = 0;
    for (std::size_t at = start; at < text.size() && (node = child(node, text[at])) >= 0; ++at) {
      if (nodes_[static_cast<std::size_t>(node)].token < 0) continue;
      longest = nodes_[static_cast<std::size_t>(node)].token;
      found.end = at + 1;
    }
    if (longest < 0) continue;
    found.start = start;
    found.token = &tokens_[static_cast<std::size_t>(longest)];
    return true;
  }
  return false;
}

/// Lets a found token take the space beside it, or returns false where it may not stand.
bool AddedTokenFinder::widen(std::string_view text,
                             std::size_t done,
                             std::size_t& start,
                             std::size_t& end,
                             const AddedToken& token) {
  if (token.single_word && (word_before(text, start) || word_behind(text, end))) return false;
  if (token.lstrip) start = std::max(start_of_space_before(text, start), done);
  if (token.rstrip) end = end_of_space_behind(text, end);
  return true;
}

}  // namespace lexico::text
