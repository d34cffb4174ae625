#include "text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cctype>
#include <new>
#include <vector>

#include "lexico/error.h"

namespace lexico::text {
namespace {

// \s, \S and \w inside [...]: lists, since PCRE2's own differ (\s by U+180E, \w by marks and more).
constexpr char kSpace[] =
    R"(\t-\r\x20\x85\xA0\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";
constexpr char kNotSpace[] =
    R"(\x00-\x08\x0E-\x1F\x21-\x84\x86-\x9F\xA1-\x{167F}\x{1681}-\x{1FFF}\x{200B}-\x{2027})"
    R"(\x{202A}-\x{202E}\x{2030}-\x{205E}\x{2060}-\x{2FFF}\x{3001}-\x{10FFFF})";
// Oniguruma's \w has six superscripts and fractions of Latin-1 more when it stands outside [...].
#define LEXICO_WORD                                  \
  R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{24B6}-\x{24E9})" \
  R"(\x{1F130}-\x{1F149}\x{1F150}-\x{1F169}\x{1F170}-\x{1F189})"
constexpr char kWordInClass[] = LEXICO_WORD;
constexpr char kWord[] = LEXICO_WORD R"(\xB2\xB3\xB9\xBC-\xBE)";
#undef LEXICO_WORD
constexpr char kHex[] = "0-9A-Fa-f";

/// Rewrites one pattern, left to right.
class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  std::string run() {
    while (at_ < in_.size()) step();
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw BadPattern(what + " at offset " + std::to_string(at_) + " is not supported");
  }
  bool next_is(std::string_view text) const {
    return in_.substr(at_).substr(0, text.size()) == text;
  }

  void step() {
    const char c = in_[at_];
    switch (c) {
      case '\\':
        atom_ = out_.size();
        escape();
        return;
      case '[':
        atom_ = out_.size();
        out_ += '[';
        character_class();
        out_ += ']';
        return;
      case '(':
        open_group();
        return;
      case ')':
        if (groups_.empty()) refuse("')' without '('");
        atom_ = groups_.back();
        groups_.pop_back();
        break;
      case '{':
        interval();
        return;
      case '*':
      case '+':
      case '?':
      case '|':
        break;
      default:
        atom_ = out_.size();
    }
    out_ += c;
    ++at_;
  }

  void open_group() {
    groups_.push_back(out_.size());
    std::string_view opening = "(";
    if (next_is("(?")) {
      opening = {};
      for (const char* known : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:", "(?-i:"}) {
        if (next_is(known)) opening = known;
      }
      // Elsewhere Oniguruma lets it reach over the alternatives that follow.
      if (at_ == 0 && next_is("(?i)")) opening = "(?i";
      if (opening.empty()) refuse("group '" + std::string(in_.substr(at_, 4)) + "'");
    }
    out_ += opening;
    at_ += opening.size();
  }

  /// At '{': an interval, or else the character itself.
  void interval() {
    std::size_t end = at_ + 1;
    std::string bounds[2];
    int num_bounds = 1;
    for (; end < in_.size() && in_[end] != '}'; ++end) {
      if (in_[end] == ',' && num_bounds == 1) {
        num_bounds = 2;
      } else if (std::isdigit(static_cast<unsigned char>(in_[end]))) {
        bounds[num_bounds - 1] += in_[end];
      } else {
        break;
      }
    }
    const bool closed = end < in_.size() && in_[end] == '}';
    if (!closed || (bounds[0].empty() && bounds[1].empty())) {
      atom_ = out_.size();
      out_ += "\\{";
      ++at_;
      return;
    }
    if (bounds[0].size() > 5 || bounds[1].size() > 5) refuse("interval above 99999");
    const bool exact = num_bounds == 1;
    if (!exact && !bounds[1].empty() && !bounds[0].empty() &&
        std::stoi(bounds[1]) < std::stoi(bounds[0])) {
      refuse("interval with its bounds reversed");
    }
    out_ += '{' + (bounds[0].empty() ? "0" : bounds[0]) + (exact ? "" : ",") + bounds[1] + '}';
    at_ = end + 1;
    // To Oniguruma X{n,m}+ is (?:X{n,m})+ and X{n}? is (?:X{n})?, to PCRE2 possessive and lazy.
    if (next_is("+") || (exact && next_is("?"))) {
      out_.insert(atom_, "(?:");
      out_ += ')';
    }
  }

  /// At '[': everything to the matching ']', without the brackets.
  void character_class() {
    ++at_;
    if (next_is("^")) {
      out_ += '^';
      ++at_;
    }
    class_items();
  }

  void class_items() {
    if (next_is("]")) {
      out_ += "\\]";
      ++at_;
    }
    for (; at_ < in_.size();) {
      const char c = in_[at_];
      if (c == ']') {
        ++at_;
        return;
      }
      if (next_is("&&")) refuse("intersection '&&'");
      if (next_is("[:")) refuse("'[:'");
      if (next_is("[^")) refuse("'[^' inside a character class");
      if (c == '[') {  // a union: its items are as good as ours
        ++at_;
        class_items();
      } else if (c == '\\') {
        class_escape();
      } else {
        out_ += c;
        ++at_;
      }
    }
    refuse("'[' without ']'");
  }

  char escaped() const {
    if (at_ + 1 >= in_.size()) refuse("'\\' at the end");
    return in_[at_ + 1];
  }

  void put(std::string_view replacement) {
    out_ += replacement;
    at_ += 2;
  }

  void put_class(std::string_view items, const char* opening = "[") {
    out_.append(opening).append(items).append("]");
    at_ += 2;
  }

  /// A place where a word begins or ends (`differ`), or any other place.
  void put_boundary(bool differ) {
    for (const char* opening :
         {"(?:(?<=[", differ ? "])(?![" : "])(?=[", "])|(?<![", differ ? "])(?=[" : "])(?!["}) {
      out_.append(opening).append(kWord);
    }
    out_.append("]))");
    at_ += 2;
  }

  void escape() {
    switch (escaped()) {
      case 's':
        return put_class(kSpace);
      case 'S':
        return put_class(kSpace, "[^");
      case 'w':
        return put_class(kWord);
      case 'W':
        return put_class(kWord, "[^");
      case 'h':
        return put_class(kHex);
      case 'H':
        return put_class(kHex, "[^");
      case 'b':
        return put_boundary(true);
      case 'B':
        return put_boundary(false);
      case 'A':
      case 'Z':
      case 'z':
        return put(in_.substr(at_, 2));
      default:
        common_escape();
    }
  }

  void class_escape() {
    switch (escaped()) {
      case 's':
        return put(kSpace);
      case 'S':
        return put(kNotSpace);
      case 'w':
        return put(kWordInClass);
      case 'h':
        return put(kHex);
      case 'b':
        return put("\\x08");
      default:
        common_escape();
    }
  }

  void common_escape() {
    const char c = escaped();
    switch (c) {
      case 'd':
        return put("\\p{Nd}");
      case 'D':
        return put("\\P{Nd}");
      case 'v':
        return put("\\x0B");
      case 'p':
      case 'P':
        return property();
      case 'x':
      case 'u':
        return code_point();
      case 'n':
      case 'r':
      case 't':
      case 'f':
      case 'a':
      case 'e':
        return put(in_.substr(at_, 2));
      default:
        if (!std::ispunct(static_cast<unsigned char>(c))) {
          refuse("escape '\\" + std::string(1, c) + "'");
        }
        put(in_.substr(at_, 2));
    }
  }

  void property() {
    const std::size_t end = in_.find('}', at_);
    if (in_.substr(at_ + 2, 1) != "{" || end == in_.npos) refuse("property without '{...}'");
    std::string_view name = in_.substr(at_ + 3, end - at_ - 3);
    bool negated = in_[at_ + 1] == 'P';
    if (!name.empty() && name[0] == '^') {
      negated = !negated;
      name.remove_prefix(1);
    }
    for (const char c : name) {
      if (!std::isalpha(static_cast<unsigned char>(c)) && c != '_') {
        refuse("property '" + std::string(name) + "'");
      }
    }
    // One or two letters are a general category, a longer name is a script: of the character
    // itself, which PCRE2 has written "sc:" since it began to mean the script extensions.
    constexpr bool kNeedsScriptPrefix = PCRE2_MAJOR > 10 || PCRE2_MINOR >= 40;
    out_ += negated ? "\\P{" : "\\p{";
    if (name.size() > 2 && name != "Any" && kNeedsScriptPrefix) out_ += "sc:";
    out_ += name;
    out_ += '}';
    at_ = end + 1;
  }

  /// \xHH, \x{H...}, \uHHHH
  void code_point() {
    const bool braces = in_.substr(at_, 3) == "\\x{";
    const std::size_t max_digits = braces ? 8 : in_[at_ + 1] == 'u' ? 4 : 2;
    std::size_t from = at_ + (braces ? 3 : 2), end = from;
    while (end < in_.size() && end - from < max_digits &&
           std::isxdigit(static_cast<unsigned char>(in_[end]))) {
      ++end;
    }
    const bool closed = !braces || in_.substr(end, 1) == "}";
    const std::string digits(in_.substr(from, end - from));
    if (digits.empty() || !closed || (!braces && max_digits == 4 && digits.size() != 4)) {
      refuse("escape '" + std::string(in_.substr(at_, 4)) + "'");
    }
    // In UTF-8, Oniguruma takes \xHH from 80 up for a byte of a sequence.
    if (max_digits == 2 && std::stoul(digits, nullptr, 16) >= 0x80) {
      refuse("byte '" + std::string(in_.substr(at_, 4)) + "'");
    }
    out_ += "\\x{" + digits + '}';
    at_ = end + (braces ? 1 : 0);
  }

  std::string_view in_;
  std::size_t at_ = 0;
  std::string out_;
  std::size_t atom_ = 0;             ///< where in out_ the thing begins that a quantifier repeats
  std::vector<std::size_t> groups_;  ///< where in out_ each open group begins
};

struct MatchDataFree {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};
struct ContextFree {
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};
struct StackFree {
  void operator()(pcre2_jit_stack* stack) const { pcre2_jit_stack_free(stack); }
};

/// What PCRE2 writes to while it matches: one per thread, for all patterns.
struct Workspace {
  std::unique_ptr<pcre2_match_data, MatchDataFree> data{pcre2_match_data_create(1, nullptr)};
  std::unique_ptr<pcre2_match_context, ContextFree> context{pcre2_match_context_create(nullptr)};
  std::unique_ptr<pcre2_jit_stack, StackFree> stack{
      pcre2_jit_stack_create(32 * 1024, 256 * 1024 * 1024, nullptr)};

  Workspace() {
    if (!data || !context) throw std::bad_alloc();
    if (stack) pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
  }
};

std::string message_of(int error) {
  PCRE2_UCHAR buffer[256] = {};
  pcre2_get_error_message(error, buffer, sizeof buffer);
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

struct Regex::Program {
  pcre2_code* code = nullptr;
  bool has_jit = false;

  Program() = default;
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() { pcre2_code_free(code); }
};

Regex::Regex(std::unique_ptr<Program> program) : program_(std::move(program)) {}
Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

std::string pcre2_from_oniguruma(std::string_view pattern) { return Translator(pattern).run(); }

Regex Regex::from_oniguruma(std::string_view pattern) {
  return compile(pcre2_from_oniguruma(pattern), PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE);
}

Regex Regex::literal(std::string_view text) {
  return compile(std::string(text), PCRE2_UTF | PCRE2_LITERAL);
}

Regex Regex::compile(const std::string& pattern, std::uint32_t options) {
  // The search for a first character reads, harmlessly, up to 31 bytes behind the text, which
  // valgrind reports. Tokenizers gain nothing by it: their patterns match nearly everywhere.
  options |= PCRE2_NO_START_OPTIMIZE;
  const std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), &pcre2_compile_context_free);
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto program = std::make_unique<Program>();
  program->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()),
                                pattern.size(),
                                options,
                                &error,
                                &offset,
                                context.get());
  if (program->code == nullptr) throw BadPattern(message_of(error));
  program->has_jit = pcre2_jit_compile(program->code, PCRE2_JIT_COMPLETE) == 0;
  return Regex(std::move(program));
}

bool Regex::find(std::string_view text, std::size_t from, Match& match) const {
  thread_local Workspace workspace;
  // Enough for any linear search of a long text, and an end to an exponential one.
  const std::size_t max_steps = 10'000'000 + 4 * text.size();
  pcre2_set_match_limit(workspace.context.get(),
                        static_cast<std::uint32_t>(std::min<std::size_t>(max_steps, 0xFFFFFFFF)));
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const int rc = program_->has_jit && workspace.stack
                     ? pcre2_jit_match(program_->code,
                                       subject,
                                       text.size(),
                                       from,
                                       PCRE2_NO_UTF_CHECK,
                                       workspace.data.get(),
                                       workspace.context.get())
                     : pcre2_match(program_->code,
                                   subject,
                                   text.size(),
                                   from,
                                   PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                                   workspace.data.get(),
                                   workspace.context.get());
  if (rc == PCRE2_ERROR_NOMATCH) return false;
  if (rc < 0) {
    throw ResourceError("a pattern of the tokenizer stopped at byte " + std::to_string(from) +
                        " of " + std::to_string(text.size()) + ": " + message_of(rc));
  }
  const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(workspace.data.get());
  match = {offsets[0], offsets[1]};
  return true;
}

std::size_t Regex::after_character(std::string_view text, std::size_t at) {
  do ++at;
  while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
  return at;
}

}  // namespace lexico::text
