#include "lexico/text_source.h"

#include <algorithm>
#include <filesystem>
#include <new>
#include <nlohmann/json.hpp>
#include <span>
#include <string_view>
#include <utility>

#include "lexico/error.h"
#include "lexico/tokenizer.h"
#include "text/read_file.h"
#include "text/token_ids.h"
#include "text/unicode.h"

namespace lexico {
namespace {

using Json = nlohmann::json;

/// Lays documents one after the other, with BOS where the options want it.
class Packer {
 public:
  Packer(const PackOptions& options, const TakeTokens& take) : options_(options), take_(take) {}

  void begin_document() {
    starts_document_ = true;
    ids_before_ = 0;
  }

  /// Where the next ids of the document are put, before add_ids().
  std::vector<std::int32_t>& ids() { return ids_; }
  /// Of the document, that were added before.
  std::int64_t ids_before() const { return ids_before_; }

  void add_ids() {
    if (ids_.empty()) return;
    ids_before_ += static_cast<std::int64_t>(ids_.size());
    if (std::exchange(starts_document_, false)) {
      ++num_documents_;
      if (options_.bos != PackOptions::Bos::kNone) insert_bos(true);
    } else if (options_.bos == PackOptions::Bos::kAlways) {
      insert_bos(false);
    }
    documents_.assign(ids_.size(), static_cast<std::int32_t>(num_documents_ - 1));
    take_(ids_, documents_);
    num_tokens_ += ids_.size();
    ids_.clear();
  }

  std::int64_t num_documents() const { return num_documents_; }

 private:
  bool wants_bos(std::size_t place, bool starts_document) const {
    if (starts_document) return true;
    return options_.bos == PackOptions::Bos::kAlways &&
           place % static_cast<std::size_t>(options_.sequence_length) == 0;
  }

  void insert_bos(bool starts_document) {
    std::vector<std::int32_t>& ids = ids_;
    std::vector<std::size_t> before;  // the ids that one BOS each goes before
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] == options_.bos_id) continue;
      const auto place = [&] { return num_tokens_ + i + before.size(); };
      if (wants_bos(place(), starts_document && i == 0)) before.push_back(i);
      // The document's BOS may have filled a sequence, so that its first token starts the next one.
      if (wants_bos(place(), false)) before.push_back(i);
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
  const TakeTokens& take_;
  std::vector<std::int32_t> ids_, documents_;
  std::size_t num_tokens_ = 0;  // handed over
  std::int64_t num_documents_ = 0, ids_before_ = 0;
  bool starts_document_ = true;
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
class TextCheck {
 public:
  explicit TextCheck(const std::string& path) : path_(path) {}
  void add(std::string_view text) {
    if (size_ == 0 && (text.substr(0, 2) == "\xFF\xFE" || text.substr(0, 2) == "\xFE\xFF"))
      throw IoError(path_ + ": is UTF-16, want UTF-8 (iconv -f UTF-16 -t UTF-8)");
    size_ += text.size();
    num_odd_ += static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
      return (c >= 0 && c < 32 && !(c >= '\t' && c <= '\r') && c != 27) || c == 127;
    }));
    num_odd_ += text::count_invalid_utf8(text);
  }
  /// When all was added.
  void finish() const {
    constexpr std::size_t kAlwaysAllowed = 16;
    if (num_odd_ <= kAlwaysAllowed || num_odd_ * 10 <= size_) return;
    throw IoError(path_ + ": is not UTF-8 text: " + std::to_string(num_odd_) + " of its " +
                  std::to_string(size_) + " bytes are invalid or control characters");
  }

 private:
  const std::string& path_;
  std::size_t size_ = 0, num_odd_ = 0;
};

/// A tokenizer whose ids do not fit the model is an error, not something to look up out of bounds.
void check_ids(const Packer& packer,
               std::span<const std::int32_t> ids,
               int vocab,
               const std::string& where) {
  if (vocab <= 0) return;
  const auto wrong =
      std::find_if(ids.begin(), ids.end(), [&](std::int32_t id) { return id >= vocab; });
  if (wrong == ids.end()) return;
  throw IoError(where + ": the tokenizer gives token id " + std::to_string(*wrong) + " at index " +
                std::to_string(packer.ids_before() + (wrong - ids.begin())) +
                ", the model takes ids in [0, " + std::to_string(vocab) +
                "): they do not belong together");
}

/// Where `text` may be cut in two, so that the ids of the parts are those of the whole: at the
/// start of a line in its second half, if the tokenizer joins nothing over it. 0: nowhere.
std::size_t find_cut(std::string_view text, const Tokenizer& tokenizer) {
  constexpr std::size_t kContext = 4096, kMostTries = 16;
  if (text.size() < 4 * kContext) return 0;
  std::size_t cut = text.size() - kContext;
  for (std::size_t tries = 0; tries < kMostTries; ++tries) {
    cut = text.rfind('\n', cut - 1);
    if (cut == text.npos || ++cut < text.size() / 2) return 0;
    const std::string_view before = text.substr(cut - kContext, kContext),
                           after = text.substr(cut, kContext),
                           both = text.substr(cut - kContext, 2 * kContext);
    std::vector<std::int32_t> ids = tokenizer.encode(before);
    tokenizer.encode(after, ids);
    if (ids == tokenizer.encode(both)) return cut;
    --cut;
  }
  return 0;
}

void pack_txt(const std::string& path,
              const Tokenizer& tokenizer,
              int vocab,
              std::size_t piece_bytes,
              Packer& packer) {
  text::FileReader file(path);
  TextCheck check(path);
  std::string text;
  packer.begin_document();
  bool blank = true;  // so far: white space alone is no document
  std::size_t checked = 0;
  for (bool first = true, more = true; more; first = false) {
    more = file.append(text, piece_bytes);
    if (first && text.size() != without_bom(text).size()) text.erase(0, 3);
    const std::size_t cut = more ? find_cut(text, tokenizer) : text.size();
    if (cut == 0 && more) continue;
    const std::string_view part = std::string_view(text).substr(0, cut);
    check.add(part.substr(std::min(checked, cut)));
    checked = std::max(checked, cut);
    if (!more) check.finish();
    blank = blank && is_blank(part);
    if (blank) continue;
    tokenizer.encode(part, packer.ids());
    check_ids(packer, packer.ids(), vocab, path);
    packer.add_ids();
    text.erase(0, cut);
    checked = 0;
  }
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

void pack_jsonl(const TextSpec& spec,
                const Tokenizer& tokenizer,
                int vocab,
                std::size_t piece_bytes,
                Packer& packer) {
  text::FileReader file(spec.path);
  std::string bytes;
  std::int64_t number = 0;
  const auto pack_line = [&](std::string_view line) {
    ++number;
    if (line.find_first_not_of(" \t\r") == line.npos) return;
    const std::string where = spec.path + ": line " + std::to_string(number);
    const std::string text = text_of_line(line, spec.field, where);
    if (is_blank(text)) return;
    packer.begin_document();
    tokenizer.encode(text, packer.ids());
    check_ids(packer, packer.ids(), vocab, where);
    packer.add_ids();
  };
  for (bool first = true, more = true; more; first = false) {
    const std::size_t seen = bytes.size();  // of a line that has not ended yet
    more = file.append(bytes, piece_bytes);
    if (first && bytes.size() != without_bom(bytes).size()) bytes.erase(0, 3);
    std::size_t start = 0;
    for (std::size_t end = bytes.find('\n', seen); end != bytes.npos;
         end = bytes.find('\n', start)) {
      pack_line(std::string_view(bytes).substr(start, end - start));
      start = end + 1;
    }
    bytes.erase(0, start);
  }
  if (!bytes.empty()) pack_line(bytes);
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

std::int64_t pack_text(const TextSpec& spec,
                       const Tokenizer* tokenizer,
                       const PackOptions& options,
                       int vocab,
                       const TakeTokens& take,
                       std::size_t piece_bytes) {
  check(options, vocab);
  if (!spec.is_token_ids && tokenizer == nullptr) {
    throw InvalidArgument(spec.path + ": a text needs a tokenizer");
  }
  try {
    Packer packer(options, take);
    if (spec.is_token_ids) {
      text::read_token_ids(
          spec.path,
          vocab,
          [&] { packer.begin_document(); },
          [&](const std::vector<std::int32_t>& ids) {
            packer.ids() = ids;
            packer.add_ids();
          });
    } else if (has_extension(spec.path, {".jsonl", ".ndjson"})) {
      pack_jsonl(spec, *tokenizer, vocab, piece_bytes, packer);
    } else {
      pack_txt(spec.path, *tokenizer, vocab, piece_bytes, packer);
    }
    if (packer.num_documents() == 0) {
      throw IoError(spec.path + (spec.is_token_ids ? ": holds no token ids" : ": holds no text"));
    }
    return packer.num_documents();
  } catch (const std::bad_alloc&) {
    throw ResourceError(spec.path + ": not enough memory to read it");
  }
}

PackedText read_packed(const TextSpec& spec,
                       const Tokenizer* tokenizer,
                       const PackOptions& options,
                       int vocab) {
  PackedText packed;
  packed.sequence_length = options.sequence_length;
  packed.num_documents =
      pack_text(spec, tokenizer, options, vocab, [&](const auto& ids, const auto& documents) {
        packed.ids.insert(packed.ids.end(), ids.begin(), ids.end());
        packed.documents.insert(packed.documents.end(), documents.begin(), documents.end());
      });
  return packed;
}

}  // namespace lexico
