#include "lexico/text_source.h"

#include <algorithm>
#include <filesystem>
#include <new>
#include <nlohmann/json.hpp>
#include <span>
#include <string_view>

#include "lexico/error.h"
#include "lexico/tokenizer.h"
#include "text/read_file.h"
#include "text/token_ids.h"
#include "text/unicode.h"

namespace lexico {
namespace {

using Json = nlohmann::json;

/// Lays documents one after the other, with BOS where the options want it. In place: a large text's
/// ids are there only once.
class Packer {
 public:
  explicit Packer(const PackOptions& options) : options_(options) {
    out_.sequence_length = options.sequence_length;
  }

  /// Room for the ids of a text, rather more than most need: untouched memory costs nothing.
  void reserve_for_text(std::size_t num_bytes) {
    out_.ids.reserve(num_bytes / 3);
    out_.documents.reserve(num_bytes / 3);
  }

  /// Where the next document's ids are appended, before add_document().
  std::vector<std::int32_t>& ids() { return out_.ids; }

  std::span<const std::int32_t> new_ids() const {
    return std::span(out_.ids).subspan(out_.documents.size());
  }

  /// Makes new_ids(), if there are any, a document.
  void add_document() {
    if (new_ids().empty()) return;
    if (options_.bos != PackOptions::Bos::kNone) insert_bos();
    out_.documents.resize(out_.ids.size(), static_cast<std::int32_t>(out_.num_documents));
    ++out_.num_documents;
  }

  PackedText finish() && { return std::move(out_); }

 private:
  bool wants_bos(std::size_t place, bool starts_document) const {
    if (starts_document) return true;
    return options_.bos == PackOptions::Bos::kAlways &&
           place % static_cast<std::size_t>(options_.sequence_length) == 0;
  }

  void insert_bos() {
    std::vector<std::int32_t>& ids = out_.ids;
    const std::size_t start = out_.documents.size();
    std::vector<std::size_t> before;  // the ids that one BOS each goes before
    for (std::size_t i = start; i < ids.size(); ++i) {
      if (ids[i] == options_.bos_id) continue;
      if (wants_bos(i + before.size(), i == start)) before.push_back(i);
      // The document's BOS may have filled a sequence, so that its first token starts the next one.
      if (wants_bos(i + before.size(), false)) before.push_back(i);
    }
    std::size_t end = ids.size();  // of the ids not yet at their place, which are moved from behind
    ids.resize(end + before.size());
    for (std::size_t num_left = before.size(); num_left > 0; --num_left) {
      const auto at = [&](std::size_t i) { return ids.begin() + static_cast<std::ptrdiff_t>(i); };
      const std::size_t first = before[num_left - 1];
      std::move_backward(at(first), at(end), at(end + num_left));
      ids[first + num_left - 1] = options_.bos_id;
      end = first;
    }
  }

  PackOptions options_;
  PackedText out_;
};

bool is_blank(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    // Not a space at its first byte? Then whatever follows, valid or not, is text.
    if (text::valid_utf8_prefix(text.substr(at, 4)) == 0) return false;
    if (!text::is_space(text::next_code_point(text, at))) return false;
  }
  return true;
}

std::string_view without_bom(std::string_view text) {
  return text.substr(0, 3) == "\xEF\xBB\xBF" ? text.substr(3) : text;
}

/// Refuses what is plainly not text, and text in another encoding; a few odd bytes are let through.
void check_is_text(std::string_view text, const std::string& path) {
  if (text.substr(0, 2) == "\xFF\xFE" || text.substr(0, 2) == "\xFE\xFF") {
    throw IoError(path + ": is UTF-16, want UTF-8 (iconv -f UTF-16 -t UTF-8)");
  }
  std::size_t num_odd =
      static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
        return (c >= 0 && c < 32 && !(c >= '\t' && c <= '\r') && c != 27) || c == 127;
      }));
  num_odd += text::count_invalid_utf8(text);
  constexpr std::size_t kAlwaysAllowed = 16;
  if (num_odd <= kAlwaysAllowed || num_odd * 10 <= text.size()) return;
  throw IoError(path + ": is not UTF-8 text: " + std::to_string(num_odd) + " of its " +
                std::to_string(text.size()) + " bytes are invalid or control characters");
}

/// A tokenizer whose ids do not fit the model is an error, not something to look up out of bounds.
void check_ids(std::span<const std::int32_t> ids, int vocab, const std::string& where) {
  if (vocab <= 0) return;
  const auto wrong =
      std::find_if(ids.begin(), ids.end(), [&](std::int32_t id) { return id >= vocab; });
  if (wrong == ids.end()) return;
  throw IoError(where + ": the tokenizer gives token id " + std::to_string(*wrong) + " at index " +
                std::to_string(wrong - ids.begin()) + ", the model takes ids in [0, " +
                std::to_string(vocab) + "): they do not belong together");
}

void pack_txt(const std::string& path, const Tokenizer& tokenizer, int vocab, Packer& packer) {
  {
    const std::string bytes = text::read_file(path);
    const std::string_view text = without_bom(bytes);
    check_is_text(text, path);
    if (is_blank(text)) return;
    packer.reserve_for_text(text.size());
    tokenizer.encode(text, packer.ids());
  }
  check_ids(packer.new_ids(), vocab, path);
  packer.add_document();
}

/// The string under `field` of one line.
std::string text_of_line(std::string_view line,
                         const std::string& field,
                         const std::string& where) {
  Json json;
  try {
    json = Json::parse(line);
  } catch (const Json::exception& error) {
    throw IoError(where + " is not JSON: " + std::string(error.what()).substr(0, 200));
  }
  if (!json.is_object()) throw IoError(where + " is not a JSON object");
  const auto found = json.find(field);
  if (found == json.end()) {
    std::string fields;
    for (const auto& [name, value] : json.items()) {
      fields += (fields.empty() ? "\"" : ", \"") + text::excerpt(name) + '"';
      if (fields.size() > 200) break;
    }
    throw IoError(where + " has no field \"" + field + "\" (--field); it has " +
                  (fields.empty() ? "none" : fields));
  }
  if (!found->is_string()) {
    throw IoError(where + ": field \"" + field + "\" is of type " + found->type_name() +
                  ", want a string");
  }
  return std::move(found->get_ref<std::string&>());
}

void pack_jsonl(const TextSpec& spec, const Tokenizer& tokenizer, int vocab, Packer& packer) {
  const std::string bytes = text::read_file(spec.path);
  std::string_view rest = without_bom(bytes);
  packer.reserve_for_text(rest.size());
  for (std::int64_t number = 1; !rest.empty(); ++number) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    const std::string where = spec.path + ": line " + std::to_string(number);
    const std::string text = text_of_line(line, spec.field, where);
    if (is_blank(text)) continue;
    tokenizer.encode(text, packer.ids());
    check_ids(packer.new_ids(), vocab, where);
    packer.add_document();
  }
}

void check(const PackOptions& options, int vocab) {
  const int min_length = options.bos == PackOptions::Bos::kAlways ? 2 : 1;
  if (options.sequence_length < min_length) {
    throw InvalidArgument("sequence_length is " + std::to_string(options.sequence_length) +
                          ", must be >= " + std::to_string(min_length) +
                          (min_length == 2 ? " where every sequence starts with BOS" : ""));
  }
  if (options.bos == PackOptions::Bos::kNone) return;
  if (options.bos_id < 0 || (vocab > 0 && options.bos_id >= vocab)) {
    throw InvalidArgument("bos_id is " + std::to_string(options.bos_id) + ", must be in [0, " +
                          (vocab > 0 ? std::to_string(vocab) : "2147483648") +
                          ") for sequences or documents that start with BOS");
  }
}

bool has_extension(const std::string& path, std::initializer_list<const char*> wanted) {
  const std::string extension = std::filesystem::path(path).extension();
  return std::find(wanted.begin(), wanted.end(), extension) != wanted.end();
}

}  // namespace

TextSpec TextSpec::from(const std::string& text) {
  TextSpec spec;
  spec.path = text;
  const std::size_t equals = text.find('=');
  std::error_code ignored;
  const bool has_name =
      equals != text.npos && text.find('/') > equals && !std::filesystem::exists(text, ignored);
  if (has_name) {
    spec.name = text.substr(0, equals);
    spec.path = text.substr(equals + 1);
    if (spec.name.empty()) throw InvalidArgument("'" + text + "' has no name before '='");
  }
  if (spec.path.empty()) throw InvalidArgument("'" + text + "' names no file");
  if (!has_name) spec.name = std::filesystem::path(spec.path).stem();
  return spec;
}

PackedText read_packed(const TextSpec& spec,
                       const Tokenizer* tokenizer,
                       const PackOptions& options,
                       int vocab) {
  check(options, vocab);
  if (!spec.is_token_ids && tokenizer == nullptr) {
    throw InvalidArgument(spec.path + ": a text needs a tokenizer");
  }
  try {
    Packer packer(options);
    if (spec.is_token_ids) {
      for (const auto& ids : text::read_token_ids(spec.path, vocab)) {
        packer.ids().insert(packer.ids().end(), ids.begin(), ids.end());
        packer.add_document();
      }
    } else if (has_extension(spec.path, {".jsonl", ".ndjson"})) {
      pack_jsonl(spec, *tokenizer, vocab, packer);
    } else {
      pack_txt(spec.path, *tokenizer, vocab, packer);
    }
    PackedText packed = std::move(packer).finish();
    if (packed.ids.empty()) {
      throw IoError(spec.path + (spec.is_token_ids ? ": holds no token ids" : ": holds no text"));
    }
    return packed;
  } catch (const std::bad_alloc&) {
    throw ResourceError(spec.path + ": not enough memory to read it");
  }
}

}  // namespace lexico
