#include "text/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>

#include "text/unicode_tables.h"

namespace lexico::text {
namespace {

unsigned char byte_at(std::string_view text, std::size_t at) {
  return static_cast<unsigned char>(text[at]);
}

/// The bytes that a valid sequence starting with `lead` has, and the range of its second byte
/// (Unicode standard, table 3-7). Length 0: no sequence starts so.
struct Sequence {
  std::size_t length;
  unsigned char second_min, second_max;
};
Sequence sequence_of(unsigned char lead) {
  if (lead < 0x80) return {1, 0, 0};
  if (lead < 0xC2) return {0, 0, 0};
  if (lead < 0xE0) return {2, 0x80, 0xBF};
  if (lead < 0xF0) {
    return {3,
            static_cast<unsigned char>(lead == 0xE0 ? 0xA0 : 0x80),
            static_cast<unsigned char>(lead == 0xED ? 0x9F : 0xBF)};
  }
  if (lead < 0xF5) {
    return {4,
            static_cast<unsigned char>(lead == 0xF0 ? 0x90 : 0x80),
            static_cast<unsigned char>(lead == 0xF4 ? 0x8F : 0xBF)};
  }
  return {0, 0, 0};
}

/// How many bytes at `at` form a beginning of a valid sequence; `complete` if they are all of it.
std::size_t well_formed_part(std::string_view text, std::size_t at, bool& complete) {
  const Sequence sequence = sequence_of(byte_at(text, at));
  complete = false;
  if (sequence.length == 0) return 0;
  std::size_t length = 1;
  for (; length < sequence.length && at + length < text.size(); ++length) {
    const unsigned char next = byte_at(text, at + length);
    const bool fits = length == 1 ? next >= sequence.second_min && next <= sequence.second_max
                                  : (next & 0xC0) == 0x80;
    if (!fits) break;
  }
  complete = length == sequence.length;
  return length;
}

std::size_t end_of_ascii(std::string_view text, std::size_t at) {
  for (; at + 8 <= text.size(); at += 8) {
    std::uint64_t eight;
    std::memcpy(&eight, text.data() + at, 8);
    if (eight & 0x8080808080808080u) break;
  }
  while (at < text.size() && byte_at(text, at) < 0x80) ++at;
  return at;
}

template <typename Range>
const Range* find_range(const Range* ranges, std::size_t count, char32_t c) {
  const Range* found = std::lower_bound(
      ranges, ranges + count, c, [](const Range& range, char32_t x) { return range.last < x; });
  return found != ranges + count && found->first <= c ? found : nullptr;
}

bool is_inert(char32_t c) { return find_range(kInert, kNumInert, c) != nullptr; }

void append_nfc_of_known(std::string_view text, std::string& out) {
  if (text.empty()) return;
  utf8proc_uint8_t* composed = nullptr;
  const utf8proc_ssize_t length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()),
                   &composed,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(composed, &std::free);
  if (length < 0) throw std::bad_alloc();  // valid UTF-8 can fail for no other reason
  out.append(reinterpret_cast<const char*>(composed), static_cast<std::size_t>(length));
}

/// Appends the NFC of `run`, taking inert characters for starters that compose with nothing.
void append_nfc(std::string_view run, std::string& out) {
  std::size_t known_from = 0;
  for (std::size_t at = 0; at < run.size();) {
    const std::size_t start = at;
    if (!is_inert(next_code_point(run, at))) continue;
    append_nfc_of_known(run.substr(known_from, start - known_from), out);
    out.append(run.substr(start, at - start));
    known_from = at;
  }
  append_nfc_of_known(run.substr(known_from), out);
}

/// Calls `use_valid(std::string_view)` for valid stretches and, behind each but the last,
/// `use_invalid(num_bytes)` for one maximal invalid part.
template <typename UseValid, typename UseInvalid>
void for_each_valid_part(std::string_view text, UseValid&& use_valid, UseInvalid&& use_invalid) {
  while (!text.empty()) {
    const std::size_t valid = valid_utf8_prefix(text);
    use_valid(text.substr(0, valid));
    text.remove_prefix(valid);
    if (text.empty()) break;
    bool complete;
    const std::size_t invalid = std::max<std::size_t>(1, well_formed_part(text, 0, complete));
    use_invalid(invalid);
    text.remove_prefix(invalid);
  }
}

}  // namespace

std::size_t valid_utf8_prefix(std::string_view text) {
  std::size_t at = 0;
  while ((at = end_of_ascii(text, at)) < text.size()) {
    bool complete;
    const std::size_t length = well_formed_part(text, at, complete);
    if (!complete) return at;
    at += length;
  }
  return at;
}

std::size_t count_invalid_utf8(std::string_view text) {
  std::size_t count = 0;
  for_each_valid_part(
      text, [](std::string_view) {}, [&](std::size_t bytes) { count += bytes; });
  return count;
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for_each_valid_part(
      text,
      [&](std::string_view valid) { out.append(valid); },
      [&](std::size_t) { out.append("\xEF\xBF\xBD"); });
  return out;
}

char32_t next_code_point(std::string_view text, std::size_t& at) {
  const unsigned char lead = byte_at(text, at++);
  if (lead < 0x80) return lead;
  const int num_more = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
  char32_t c = lead & (0x3Fu >> num_more);
  for (int i = 0; i < num_more; ++i) c = c << 6 | (byte_at(text, at++) & 0x3Fu);
  return c;
}

bool is_space(char32_t c) {
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

std::string_view to_nfc(std::string_view text, std::string& storage) {
  // Below U+0300 everything is normal, and an ASCII character composes with nothing before it: only
  // stretches from the ASCII character before a higher one to the next ASCII character need work.
  constexpr unsigned char kLeadOf0300 = 0xCC;
  bool changed = false;
  std::size_t done = 0;
  std::string run_nfc;
  for (std::size_t at = end_of_ascii(text, 0); at < text.size(); at = end_of_ascii(text, at)) {
    const std::size_t start = at == 0 ? 0 : at - 1;
    bool may_change = false;
    for (; at < text.size() && byte_at(text, at) >= 0x80; ++at) {
      may_change |= byte_at(text, at) >= kLeadOf0300;
    }
    if (!may_change) continue;
    const std::string_view run = text.substr(start, at - start);
    run_nfc.clear();
    append_nfc(run, run_nfc);
    if (run_nfc == run) continue;
    if (!changed) storage.clear();
    changed = true;
    storage.append(text.substr(done, start - done)).append(run_nfc);
    done = at;
  }
  if (!changed) return text;
  storage.append(text.substr(done));
  return storage;
}

std::string_view known_to_pcre2(std::string_view text, std::string& storage) {
  constexpr unsigned char kLeadOf0800 = 0xE0;  // no shorter character is in the table
  bool changed = false;
  for (std::size_t at = end_of_ascii(text, 0); at < text.size(); at = end_of_ascii(text, at)) {
    if (byte_at(text, at) < kLeadOf0800) {
      at += 2;
      continue;
    }
    const std::size_t start = at;
    const char32_t c = next_code_point(text, at);
    const StandIn* found = find_range(kStandIns, kNumStandIns, c);
    if (found == nullptr) continue;
    if (!changed) storage.assign(text);
    changed = true;
    utf8proc_encode_char(static_cast<utf8proc_int32_t>(found->stand_in),
                         reinterpret_cast<utf8proc_uint8_t*>(storage.data() + start));
  }
  return changed ? std::string_view(storage) : text;
}

}  // namespace lexico::text
