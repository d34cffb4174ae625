// Where a model's tokenizer is, and how its documents become sequences.
#include "common/model_text.h"

#include <algorithm>
#include <filesystem>

#include "common/program.h"
#include "lexico/error.h"
#include "lexico/sha256.h"

namespace lexico::apps {
namespace fs = std::filesystem;

std::string find_tokenizer(const ModelTextConfig& config) {
  if (!config.tokenizer.empty()) return config.tokenizer;
  const fs::path model(config.model);
  const fs::path own = model.parent_path() / (model.stem().string() + ".tokenizer.json");
  const fs::path beside = model.parent_path() / "tokenizer.json";
  for (const fs::path& path : {own, beside})
    if (fs::exists(path)) return path.string();
  throw InvalidArgument("no tokenizer: neither " + own.string() + " nor " + beside.string() +
                        " is there; pass --tokenizer tokenizer.json, or ids with --token-ids");
}

void ModelTextConfig::validate() const {
  if (sequence_length < 0)
    throw InvalidArgument("sequence_length is " + std::to_string(sequence_length) +
                          ", must be >= 0");
  if (bos != "auto" && bos != "always" && bos != "document" && bos != "none")
    throw InvalidArgument("bos is '" + bos + "', must be one of: auto, always, document, none");
}

Tokenizer load_tokenizer(const ModelTextConfig& config, const ModelInfo& model) {
  const std::string path = find_tokenizer(config);
  Tokenizer tokenizer = Tokenizer::from_file(path);
  if (!model.tokenizer_sha256.empty() && sha256_of_file(path) != model.tokenizer_sha256)
    log_warning(path + " is not the tokenizer that " + config.model +
                " was exported with (SHA-256 differs)");
  return tokenizer;
}

PackOptions packing_for(const ModelTextConfig& config, const ModelInfo& model) {
  constexpr int kUsualLength = 512;
  PackOptions packing;
  packing.sequence_length = config.sequence_length != 0
                                ? config.sequence_length
                                : std::min(kUsualLength, model.max_positions);
  if (packing.sequence_length > model.max_positions)
    throw InvalidArgument("sequence_length is " + std::to_string(config.sequence_length) +
                          ", more than the " + std::to_string(model.max_positions) +
                          " positions of " + config.model);
  packing.bos_id = model.bos_id;
  const std::string bos = config.bos != "auto" ? config.bos : model.add_bos ? "always" : "none";
  if (bos != "none" && model.bos_id < 0)
    throw InvalidArgument("bos is '" + bos + "', but " + config.model +
                          " has no BOS token: use --bos none");
  packing.bos = bos == "always"     ? PackOptions::Bos::kAlways
                : bos == "document" ? PackOptions::Bos::kDocument
                                    : PackOptions::Bos::kNone;
  return packing;
}

std::string name_of(PackOptions::Bos bos) {
  switch (bos) {
    case PackOptions::Bos::kAlways:
      return "always";
    case PackOptions::Bos::kDocument:
      return "document";
    default:
      return "none";
  }
}

CacheShape cache_shape(const ModelInfo& model) {
  CacheShape shape;
  shape.layers = model.layers;
  shape.kv_heads = model.kv_heads;
  shape.group = model.heads / model.kv_heads;
  shape.head_dim = model.head_dim;
  shape.max_positions = model.max_positions;
  return shape;
}

}  // namespace lexico::apps
