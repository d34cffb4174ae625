// lexico.json: what a model file says of itself.
#include "core/json_fields.h"
#include "lexico/error.h"
#include "lexico/language_model.h"

namespace lexico {

ModelInfo parse_model_info(const std::string& text, const std::string& file) {
  const std::string where = file + ": lexico.json: ";
  using Json = nlohmann::json;
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::exception& error) {
    throw IoError(where + error.what());
  }
  if (!json.is_object()) throw IoError(where + "is no JSON object");
  const detail::JsonFields fields(json, where);
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
  info.rope = Rope::parse(json["rope"].dump(), where + "rope: ", info.head_dim, info.layers);
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
