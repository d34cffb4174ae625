#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

namespace lexico::text {

/// A pattern that cannot be run with the meaning it has in `tokenizers`; what() says why.
struct BadPattern : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A pattern of a tokenizer.json (syntax and meaning of Oniguruma, which `tokenizers` uses), run by
/// PCRE2. Immutable; threads may share one.
class Regex {
 public:
  /// @throws BadPattern
  static Regex from_oniguruma(std::string_view pattern);
  static Regex literal(std::string_view text);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  struct Match {
    std::size_t start, end;
  };
  /// First match at or behind `from`. `text` is valid UTF-8 known_to_pcre2().
  /// @throws ResourceError if the search needs more steps or memory than allowed.
  bool find(std::string_view text, std::size_t from, Match& match) const;

  /// Calls `use(Match)` for each match from left to right. An empty match that touches the one
  /// before is none.
  template <typename Use>
  void for_each(std::string_view text, Use&& use) const {
    std::size_t from = 0, last_end = std::string_view::npos;
    Match match;
    while (from <= text.size() && find(text, from, match)) {
      if (match.start == match.end && match.end == last_end) {
        from = after_character(text, from);
        continue;
      }
      use(match);
      from = last_end = match.end;
    }
  }

 private:
  struct Program;
  explicit Regex(std::unique_ptr<Program> program);
  static Regex compile(const std::string& pattern, std::uint32_t options);
  static std::size_t after_character(std::string_view text, std::size_t at);
  std::unique_ptr<Program> program_;
};

/// The same pattern in PCRE2's syntax (UTF, UCP, MULTILINE). @throws BadPattern
std::string pcre2_from_oniguruma(std::string_view pattern);

}  // namespace lexico::text
