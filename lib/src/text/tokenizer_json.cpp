// Reads and checks a tokenizer.json of the package `tokenizers`.
#include "text/tokenizer_json.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "lexico/error.h"
#include "text/read_file.h"
#include "text/unicode.h"

namespace lexico::text {
namespace {

using Json = nlohmann::json;

constexpr char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr char kAdvice[] =
    ": only byte-level BPE tokenizers (GPT-2, Llama-3, Qwen2 style) can be read; pass ids made "
    "elsewhere instead (--token-ids FILE)";
constexpr int kMaxNesting = 16;
constexpr std::int64_t kMaxId = std::numeric_limits<std::int32_t>::max() - 1;

std::string show(const Json& value) {
  if (value.is_structured()) return value.is_array() ? "an array" : "an object";
  if (value.is_string()) return '"' + excerpt(value.get_ref<const std::string&>()) + '"';
  return value.dump();
}

/// A value of the file together with its name, as errors give it: "model.merges[3]".
class Field {
 public:
  Field(const Json& value, std::string path, std::string name)
      : value_(value), path_(std::move(path)), name_(std::move(name)) {}

  [[noreturn]] void damaged(const std::string& what) const {
    throw IoError(path_ + ": " + (name_.empty() ? "" : name_ + " ") + what);
  }
  [[noreturn]] void unsupported(const std::string& what) const { damaged(what + kAdvice); }
  [[noreturn]] void unsupported() const { unsupported("is " + show(value_)); }

  const Json& json() const { return value_; }

  bool has(const char* key) const {
    if (!value_.is_object()) damaged("is " + show(value_) + ", want an object");
    const auto found = value_.find(key);
    return found != value_.end() && !found->is_null();
  }
  Field operator[](const char* key) const {
    if (!has(key)) damaged("has no field \"" + std::string(key) + '"');
    return {*value_.find(key), path_, name_.empty() ? key : name_ + '.' + key};
  }
  Field item(std::size_t i) const {
    return {value_[i], path_, name_ + '[' + std::to_string(i) + ']'};
  }
  /// Of an object whose keys are data: `value` stands under `key`.
  Field entry(const std::string& key, const Json& value) const {
    return {value, path_, name_ + "[\"" + excerpt(key) + "\"]"};
  }
  std::size_t array_size() const {
    if (!value_.is_array()) damaged("is " + show(value_) + ", want an array");
    return value_.size();
  }
  const std::string& string() const {
    if (!value_.is_string()) damaged("is " + show(value_) + ", want a string");
    return value_.get_ref<const std::string&>();
  }
  bool boolean() const {
    if (!value_.is_boolean()) damaged("is " + show(value_) + ", want true or false");
    return value_.get<bool>();
  }
  bool boolean_or(const char* key, bool otherwise) const {
    return has(key) ? (*this)[key].boolean() : otherwise;
  }
  std::int32_t id() const {
    const bool is_id = value_.is_number_unsigned() &&
                       value_.get<std::uint64_t>() <= static_cast<std::uint64_t>(kMaxId);
    if (!is_id) {
      damaged("is " + show(value_) + ", want an id in [0, " + std::to_string(kMaxId) + "]");
    }
    return value_.get<std::int32_t>();
  }

 private:
  const Json& value_;
  std::string path_, name_;
};

/// The characters that stand for the 256 bytes in vocabularies: printable ones for themselves, the
/// others for U+0100 and up, in order.
class ByteAlphabet {
 public:
  ByteAlphabet() {
    char32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable =
          (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      code_points_[static_cast<std::size_t>(byte)] =
          printable ? static_cast<char32_t>(byte) : next++;
    }
    byte_of_.assign(next, -1);
    for (std::size_t byte = 0; byte < 256; ++byte) {
      byte_of_[code_points_[byte]] = static_cast<int>(byte);
    }
  }
  /// UTF-8 of the character for `byte`.
  std::string character(std::size_t byte) const {
    const char32_t c = code_points_[byte];
    if (c < 0x80) return {static_cast<char>(c)};
    return {static_cast<char>(0xC0 | (c >> 6)), static_cast<char>(0x80 | (c & 0x3F))};
  }
  /// The bytes that `token` stands for, or nothing if it has a character of no byte.
  std::optional<std::string> bytes(std::string_view token) const {
    std::string out;
    for (std::size_t at = 0; at < token.size();) {
      const char32_t c = next_code_point(token, at);
      if (c >= byte_of_.size() || byte_of_[c] < 0) return std::nullopt;
      out += static_cast<char>(byte_of_[c]);
    }
    return out;
  }

 private:
  std::array<char32_t, 256> code_points_{};
  std::vector<int> byte_of_;
};

void read_vocab(const Field& vocab, std::unordered_map<std::string, std::int32_t>& ids) {
  if (!vocab.json().is_object()) vocab.damaged("is " + show(vocab.json()) + ", want an object");
  if (vocab.json().empty()) vocab.damaged("is empty");
  std::vector<std::pair<std::int32_t, const std::string*>> sorted;
  for (const auto& [token, id] : vocab.json().items()) {
    const auto added = ids.emplace(token, vocab.entry(token, id).id()).first;
    sorted.emplace_back(added->second, &added->first);
  }
  std::sort(sorted.begin(), sorted.end());
  for (std::size_t i = 1; i < sorted.size(); ++i) {
    if (sorted[i].first != sorted[i - 1].first) continue;
    vocab.damaged("gives id " + std::to_string(sorted[i].first) + " to both \"" +
                  excerpt(*sorted[i - 1].second) + "\" and \"" + excerpt(*sorted[i].second) + '"');
  }
}

void read_merges(const Field& merges,
                 const std::unordered_map<std::string, std::int32_t>& ids,
                 std::vector<BpeModel::Merge>& out) {
  const std::size_t count = merges.array_size();
  out.reserve(count);
  const auto id_of = [&](std::size_t i, const std::string& token) {
    const auto found = ids.find(token);
    if (found == ids.end()) {
      merges.item(i).damaged("names the token \"" + excerpt(token) +
                             "\", which model.vocab does not have");
    }
    return found->second;
  };
  std::string left, right;
  for (std::size_t i = 0; i < count; ++i) {
    const Json& merge = merges.json()[i];
    if (merge.is_string()) {
      const std::string& text = merge.get_ref<const std::string&>();
      if (text.rfind("#version", 0) == 0) continue;
      const std::size_t space = text.find(' ');
      if (space == text.npos || text.find(' ', space + 1) != text.npos) {
        merges.item(i).damaged("is " + show(merge) + ", want two tokens separated by one space");
      }
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else if (merge.is_array() && merge.size() == 2) {
      left = merges.item(i).item(0).string();
      right = merges.item(i).item(1).string();
    } else {
      merges.item(i).damaged("is " + show(merge) + ", want two tokens");
    }
    out.push_back({id_of(i, left), id_of(i, right), id_of(i, left + right)});
  }
}

/// Before anything else, so that the error says what the file is, not what comes first in it.
void check_kind(const Field& model) {
  if (model.has("type") && model["type"].string() != "BPE") model["type"].unsupported();
  if (!model.has("type") && !model.has("merges")) model.unsupported("has no field \"merges\"");
  const char* const sentencepiece_newline = "<0x0A>";
  if (model.boolean_or("byte_fallback", false) && model["vocab"].has(sentencepiece_newline)) {
    model.unsupported("is a SentencePiece BPE (byte_fallback is true)");
  }
}

void read_model(const Field& model, TokenizerJson& out) {
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (model.has(key) && !model[key].string().empty()) model[key].unsupported();
  }
  if (model.has("dropout") && model["dropout"].json() != 0) model["dropout"].unsupported();
  out.model.fuse_unknown = model.boolean_or("fuse_unk", false);
  out.model.ignore_merges = model.boolean_or("ignore_merges", false);
  read_vocab(model["vocab"], out.vocab);
  read_merges(model["merges"], out.vocab, out.model.merges);

  const ByteAlphabet alphabet;
  bool complete = true;
  for (std::size_t byte = 0; byte < 256; ++byte) {
    const auto found = out.vocab.find(alphabet.character(byte));
    out.model.id_of_byte[byte] = found == out.vocab.end() ? -1 : found->second;
    complete &= found != out.vocab.end();
  }
  if (!complete) {  // otherwise these can have no effect
    if (model.boolean_or("byte_fallback", false)) model["byte_fallback"].unsupported();
    if (model.has("unk_token")) {
      const Field unknown = model["unk_token"];
      const auto found = out.vocab.find(unknown.string());
      if (found == out.vocab.end()) {
        unknown.damaged("is " + show(unknown.json()) + ", which model.vocab does not have");
      }
      out.model.unknown_id = found->second;
    }
  }
  if (!out.model.ignore_merges) return;
  for (const auto& [token, id] : out.vocab) {
    if (const auto bytes = alphabet.bytes(token)) out.model.words.emplace(*bytes, id);
  }
}

void read_normalizer(const Field& normalizer, int nesting, bool& nfc) {
  const std::string& type = normalizer["type"].string();
  if (type == "NFC") {
    nfc = true;
  } else if (type == "Sequence" && nesting < kMaxNesting) {
    const Field steps = normalizer["normalizers"];
    for (std::size_t i = 0; i < steps.array_size(); ++i) {
      read_normalizer(steps.item(i), nesting + 1, nfc);
    }
  } else {
    normalizer["type"].unsupported();
  }
}

PreTokenizeStep::Behavior read_behavior(const Field& field) {
  using enum PreTokenizeStep::Behavior;
  const std::string& name = field.string();
  if (name == "Isolated") return kIsolated;
  if (name == "Removed") return kRemoved;
  if (name == "MergedWithPrevious") return kMergedWithPrevious;
  if (name == "MergedWithNext") return kMergedWithNext;
  if (name == "Contiguous") return kContiguous;
  field.unsupported();
}

Regex read_pattern(const Field& pattern) {
  const bool is_regex = pattern.has("Regex");
  const Field text = pattern[is_regex ? "Regex" : "String"];
  try {
    return is_regex ? Regex::from_oniguruma(text.string()) : Regex::literal(text.string());
  } catch (const BadPattern& bad) {
    text.unsupported("is " + show(text.json()) + " (" + bad.what() + ')');
  }
}

/// `ends_in_bytes`: a ByteLevel step has come; there must be one, and nothing behind it.
void read_pre_tokenizer(const Field& field,
                        int nesting,
                        std::vector<PreTokenizeStep>& steps,
                        bool& ends_in_bytes) {
  const std::string& type = field["type"].string();
  if (type == "Sequence" && nesting < kMaxNesting) {
    const Field parts = field["pretokenizers"];
    for (std::size_t i = 0; i < parts.array_size(); ++i) {
      read_pre_tokenizer(parts.item(i), nesting + 1, steps, ends_in_bytes);
    }
    return;
  }
  if (ends_in_bytes)
    field["type"].unsupported("is " + show(field["type"].json()) + " after ByteLevel");
  PreTokenizeStep step;
  if (type == "ByteLevel") {
    step.adds_space = field["add_prefix_space"].boolean();
    if (field.boolean_or("use_regex", true)) step.pattern = Regex::from_oniguruma(kGpt2Pattern);
    ends_in_bytes = true;
  } else if (type == "Split") {
    step.pattern = read_pattern(field["pattern"]);
    step.behavior = read_behavior(field["behavior"]);
    step.invert = field["invert"].boolean();
  } else if (type == "Digits") {
    // This step knows the digits of Unicode 17, unlike the patterns.
    step.pattern = Regex::from_oniguruma(R"([\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}])");
    step.behavior = field["individual_digits"].boolean() ? PreTokenizeStep::Behavior::kIsolated
                                                         : PreTokenizeStep::Behavior::kContiguous;
  } else {
    field["type"].unsupported();
  }
  steps.push_back(std::move(step));
}

AddedToken read_added_token(const Field& field) {
  AddedToken token;
  token.content = field["content"].string();
  field["id"].id();
  token.single_word = field["single_word"].boolean();
  token.lstrip = field["lstrip"].boolean();
  token.rstrip = field["rstrip"].boolean();
  token.normalized = field["normalized"].boolean();
  token.special = field["special"].boolean();
  return token;
}

/// As `tokenizers` does it: a token of the vocabulary keeps that id, others count on from the
/// vocabulary's size, whatever id the file gives them.
void read_added_tokens(const Field& tokens, TokenizerJson& out) {
  std::unordered_map<std::string, std::size_t> index_of;
  std::int64_t largest = -1;
  const auto vocab_size = static_cast<std::int64_t>(out.vocab.size());
  for (std::size_t i = 0; i < tokens.array_size(); ++i) {
    AddedToken token = read_added_token(tokens.item(i));
    if (token.content.empty()) continue;
    if (const auto known = index_of.find(token.content); known != index_of.end()) {
      token.id = out.added_tokens[known->second].id;
      out.added_tokens[known->second] = std::move(token);
      continue;
    }
    const auto in_vocab = out.vocab.find(token.content);
    const std::int64_t id =
        in_vocab != out.vocab.end() ? in_vocab->second : std::max(vocab_size, largest + 1);
    if (id > kMaxId) tokens.item(i).damaged("has no id left");
    token.id = static_cast<std::int32_t>(id);
    largest = std::max(largest, id);
    index_of.emplace(token.content, out.added_tokens.size());
    out.added_tokens.push_back(std::move(token));
  }
}

/// What the post-processor puts before a text.
std::optional<std::int32_t> read_bos(const Field& field, int nesting) {
  const std::string& type = field["type"].string();
  if (type == "ByteLevel") return std::nullopt;
  if (type == "BertProcessing" || type == "RobertaProcessing") {
    const Field cls = field["cls"];
    if (cls.array_size() != 2)
      cls.damaged("has " + std::to_string(cls.array_size()) + " items, want 2");
    return cls.item(1).id();
  }
  if (type == "TemplateProcessing") {
    const Field single = field["single"];
    if (single.array_size() == 0 || !single.item(0).has("SpecialToken")) return std::nullopt;
    const std::string& name = single.item(0)["SpecialToken"]["id"].string();
    const Field ids = field["special_tokens"][name.c_str()]["ids"];
    if (ids.array_size() == 0) ids.damaged("is empty");
    return ids.item(0).id();
  }
  if (type != "Sequence" || nesting >= kMaxNesting) field["type"].unsupported();
  const Field parts = field["processors"];
  std::optional<std::int32_t> bos;
  for (std::size_t i = 0; i < parts.array_size() && !bos; ++i)
    bos = read_bos(parts.item(i), nesting + 1);
  return bos;
}

Json parse(const std::string& path) {
  if (path.ends_with(".model")) {
    throw IoError(path + ": is a SentencePiece or tiktoken model" + kAdvice);
  }
  const std::string bytes = read_file(path);
  try {
    return Json::parse(bytes);
  } catch (const Json::exception& error) {
    throw IoError(path + ": is not a tokenizer.json: " + std::string(error.what()).substr(0, 200));
  }
}

}  // namespace

std::string bytes_of_token(const std::string& token) {
  static const ByteAlphabet alphabet;
  return alphabet.bytes(token).value_or(token);
}

TokenizerJson read_tokenizer_json(const std::string& path) {
  const Json json = parse(path);
  const Field file(json, path, "");
  const Field model = file["model"];
  if (file.has("version") && file["version"].string() != "1.0") {
    file["version"].damaged("is " + show(file["version"].json()) + ", want \"1.0\"");
  }
  check_kind(model);
  TokenizerJson out;
  if (file.has("normalizer")) read_normalizer(file["normalizer"], 0, out.nfc);
  bool ends_in_bytes = false;
  if (file.has("pre_tokenizer")) {
    read_pre_tokenizer(file["pre_tokenizer"], 0, out.steps, ends_in_bytes);
  }
  if (!ends_in_bytes) {
    Field(json, path, "pre_tokenizer").unsupported("has no ByteLevel step");
  }
  read_model(model, out);
  if (file.has("added_tokens")) read_added_tokens(file["added_tokens"], out);
  if (file.has("post_processor")) out.bos_id = read_bos(file["post_processor"], 0);
  return out;
}

}  // namespace lexico::text
