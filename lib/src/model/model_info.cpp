// lexico.json: what a model file says of itself.
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "lexico/error.h"
#include "lexico/language_model.h"

namespace lexico {
namespace {

using Json = nlohmann::json;

/// One object of the file; every accessor names the key and its value when it refuses.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  [[noreturn]] void refuse(const std::string& key, const std::string& want) const {
    std::string value = object_.at(key).dump();
    if (value.size() > 60) value = value.substr(0, 57) + "...";
    throw IoError(where_ + "'" + key + "' is " + value + ", must be " + want);
  }

  const Json& required(const std::string& key) const {
    const auto at = object_.find(key);
    if (at == object_.end()) throw IoError(where_ + "'" + key + "' is missing");
    return *at;
  }

  std::string text(const std::string& key) const {
    const Json& value = required(key);
    if (!value.is_string()) refuse(key, "a text");
    return value.get<std::string>();
  }

  int integer(const std::string& key, std::int64_t least) const {
    constexpr std::int64_t kMost = std::numeric_limits<int>::max();
    const Json& value = required(key);
    if (!value.is_number_integer() ||
        (value.is_number_unsigned() && value.get<std::uint64_t>() > kMost) ||
        value.get<std::int64_t>() < least || value.get<std::int64_t>() > kMost)
      refuse(key, "a whole number, at least " + std::to_string(least));
    return value.get<int>();
  }

  std::vector<double> frequencies(const Json& list, const std::string& key, int count) const {
    std::vector<double> values;
    for (const Json& item : list) {
      if (!item.is_number() || !std::isfinite(item.get<double>()))
        refuse(key, "a list of finite numbers");
      values.push_back(item.get<double>());
    }
    if (static_cast<int>(values.size()) != count)
      throw IoError(where_ + "'" + key + "' has " + std::to_string(values.size()) +
                    " numbers, must have rotary_dim / 2 = " + std::to_string(count));
    return values;
  }

 private:
  const Json& object_;
  std::string where_;
};

void parse_rope(const Json& json, const std::string& where, ModelInfo& info) {
  const Fields rope(json, where + "rope: ");
  info.rope_kind = rope.text("kind");
  if (info.rope_kind == "none") return;
  info.rope_layout = rope.text("layout");
  if (info.rope_layout != "half" && info.rope_layout != "interleaved")
    rope.refuse("layout", "half or interleaved");
  info.rotary_dim = rope.integer("rotary_dim", 2);
  if (info.rotary_dim % 2 != 0 || info.rotary_dim > info.head_dim)
    rope.refuse("rotary_dim", "even and at most head_dim = " + std::to_string(info.head_dim));
  const Json& scaling = rope.required("attention_scaling");
  if (!scaling.is_number() || !std::isfinite(scaling.get<double>()) || scaling.get<double>() == 0)
    rope.refuse("attention_scaling", "a finite number, not 0");
  info.attention_scaling = scaling.get<double>();
  constexpr const char* kKey = "inverse_frequencies";
  const Json& lists = rope.required(kKey);
  if (!lists.is_array() || lists.empty())
    rope.refuse(kKey, "a list of numbers, or one such list per layer");
  if (!lists.front().is_array()) {
    info.inverse_frequencies = rope.frequencies(lists, kKey, info.rotary_dim / 2);
    return;
  }
  for (const Json& list : lists) {
    if (!list.is_array()) rope.refuse(kKey, "a list of numbers, or one such list per layer");
    info.layer_inverse_frequencies.push_back(rope.frequencies(list, kKey, info.rotary_dim / 2));
  }
  if (static_cast<int>(info.layer_inverse_frequencies.size()) != info.layers)
    throw IoError(where + "rope: '" + kKey + "' has " +
                  std::to_string(info.layer_inverse_frequencies.size()) + " lists for " +
                  std::to_string(info.layers) + " layers");
}

}  // namespace

ModelInfo parse_model_info(const std::string& text, const std::string& file) {
  const std::string where = file + ": lexico.json: ";
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::exception& error) {
    throw IoError(where + error.what());
  }
  if (!json.is_object()) throw IoError(where + "is no JSON object");
  const Fields fields(json, where);
  if (fields.text("contract") != "lexico-model 1") fields.refuse("contract", "\"lexico-model 1\"");
  ModelInfo info;
  info.name = fields.text("model");
  info.dtype = fields.text("dtype");
  info.layers = fields.integer("layers", 1);
  info.heads = fields.integer("heads", 1);
  info.kv_heads = fields.integer("kv_heads", 1);
  if (info.heads % info.kv_heads != 0)
    fields.refuse("kv_heads", "a divisor of heads = " + std::to_string(info.heads));
  info.head_dim = fields.integer("head_dim", 1);
  info.vocab = fields.integer("vocab", 1);
  info.max_positions = fields.integer("max_positions", 1);
  if (!fields.required("bos_id").is_null()) {
    info.bos_id = fields.integer("bos_id", 0);
    if (info.bos_id >= info.vocab)
      fields.refuse("bos_id", "below vocab = " + std::to_string(info.vocab));
    info.add_bos = true;
    if (json.contains("add_bos")) {
      if (!json["add_bos"].is_boolean()) fields.refuse("add_bos", "true or false");
      info.add_bos = json["add_bos"].get<bool>();
    }
  }
  if (!fields.required("tokenizer_sha256").is_null())
    info.tokenizer_sha256 = fields.text("tokenizer_sha256");
  if (!fields.required("rope").is_object()) fields.refuse("rope", "an object");
  parse_rope(json["rope"], where, info);
  bool has_forward = false;
  const Json& methods = fields.required("methods");
  if (!methods.is_array()) fields.refuse("methods", "a list of names");
  for (const Json& method : methods) {
    if (!method.is_string()) fields.refuse("methods", "a list of names");
    has_forward |= method == "forward";
    info.has_queries |= method == "queries";
    info.has_step |= method == "step";
  }
  if (!has_forward) fields.refuse("methods", "a list with \"forward\"");
  return info;
}

}  // namespace lexico
