#pragma once

#include <cstddef>

// Where the package `tokenizers` and the C libraries used here see Unicode differently. Sorted.
namespace lexico::text {

struct CodePointRange {
  char32_t first, last;
};

/// Characters newer than the oldest PCRE2 supported (Unicode 14); `stand_in` has the same general
/// category and the same number of UTF-8 bytes, and every PCRE2 knows it.
struct StandIn {
  char32_t first, last, stand_in;
};
extern const StandIn kStandIns[];
extern const std::size_t kNumStandIns;

/// Characters that NFC moves or composes today, but not in `tokenizers` (whose NFC is Unicode 9).
extern const CodePointRange kInert[];
extern const std::size_t kNumInert;

}  // namespace lexico::text
