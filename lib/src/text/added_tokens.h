#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lexico::text {

struct AddedToken {
  std::string content;
  std::int32_t id = 0;
  bool single_word = false;  ///< only where no word character touches it
  bool lstrip = false;       ///< takes the white space before it along
  bool rstrip = false;       ///< and behind it
  bool normalized = true;    ///< looked for in the normalized text
  bool special = false;
};

/// Finds added tokens in a text: from left to right, at each place the longest.
class AddedTokenFinder {
 public:
  /// A token is looked for as `written`; of two written alike the later one counts.
  void add(std::string_view written, const AddedToken& token);

  /// Calls `use_text(std::string_view)` for each part between tokens and `use_token(id)` for each
  /// token, in order. `text` is valid UTF-8.
  template <typename UseText, typename UseToken>
  void split(std::string_view text, UseText&& use_text, UseToken&& use_token) const {
    std::size_t done = 0;
    Found found;
    for (std::size_t from = 0; find(text, from, found); from = found.end) {
      std::size_t start = found.start, end = found.end;
      if (!widen(text, done, start, end, *found.token)) continue;
      if (done < start) use_text(text.substr(done, start - done));
      // Not where the token before has taken all of this one's characters along, if they are
      // spaces.
      if (start < end) use_token(found.token->id);
      done = end;
    }
    if (done < text.size()) use_text(text.substr(done));
  }

 private:
  struct Found {
    std::size_t start, end;
    const AddedToken* token;
  };
  struct Node {
    std::vector<std::pair<char, int>> next;
    int token = -1;
  };
  bool find(std::string_view text, std::size_t from, Found& found) const;
  static bool widen(std::string_view text,
                    std::size_t done,
                    std::size_t& start,
                    std::size_t& end,
                    const AddedToken& token);
  int child(int node, char c) const;

  std::vector<AddedToken> tokens_;
  std::vector<Node> nodes_{1};
  std::array<bool, 256> starts_token_{};
};

}  // namespace lexico::text
