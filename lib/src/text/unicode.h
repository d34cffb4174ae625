#pragma once

#include <cstdint>
#include <string>
#include <string_view>

// UTF-8, NFC and character classes as the package `tokenizers` sees them.
namespace lexico::text {

/// Length of the longest prefix of `text` that is valid UTF-8.
std::size_t valid_utf8_prefix(std::string_view text);
/// Bytes outside the valid sequences.
std::size_t count_invalid_utf8(std::string_view text);
/// `text` with each maximal invalid part replaced by U+FFFD, as Python's errors="replace" does.
std::string replace_invalid_utf8(std::string_view text);

/// The code point at `at` of valid UTF-8; moves `at` behind it.
char32_t next_code_point(std::string_view text, std::size_t& at);

/// White_Space, what \s matches in `tokenizers`. (PCRE2's \s adds U+180E.)
bool is_space(char32_t c);

/// NFC of valid UTF-8. Returns `text` itself where it is normal already, else a view of `storage`.
std::string_view to_nfc(std::string_view text, std::string& storage);

/// `text` with every character that PCRE2 may be too old to know replaced by one of its category
/// and length. Returns `text` itself where there are none, else a view of `storage`.
std::string_view known_to_pcre2(std::string_view text, std::string& storage);

}  // namespace lexico::text
