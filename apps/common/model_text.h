#pragma once

#include <string>
#include <vector>

#include "lexico/compressed_cache.h"
#include "lexico/language_model.h"
#include "lexico/text_source.h"
#include "lexico/tokenizer.h"

namespace lexico::apps {

/// The options of every program that runs a model over text, and what they mean: the same options
/// give the same sequences everywhere.
struct ModelTextConfig {
  std::string model, tokenizer, field = "text", bos = "auto", device = "auto";
  int sequence_length = 0;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("model", self.model, "model file of tools/export_model.py (.pt)");
    visit("tokenizer",
          self.tokenizer,
          "tokenizer.json; empty: MODEL.tokenizer.json or tokenizer.json beside the model");
    visit("field", self.field, "key of the text in each line of a .jsonl file");
    visit("sequence_length",
          self.sequence_length,
          "tokens the model sees at once; 0: 512, or the model's most if less");
    visit("bos",
          self.bos,
          "what the BOS token starts: always (every document and sequence), document, none; auto: "
          "always if the model expects one");
    visit("device", self.device, "that runs the model: auto, cpu, cuda or cuda:1");
  }

  /// @throws InvalidArgument naming the option, its value and its bound.
  void validate() const;
};

/// The file that was asked for, or the one beside the model. @throws InvalidArgument if there is
/// none.
std::string find_tokenizer(const ModelTextConfig& config);
/// That file; warns on the log if it is not the one the model was exported with.
Tokenizer load_tokenizer(const ModelTextConfig& config, const ModelInfo& model);

/// How `model` gets its documents. @throws InvalidArgument if the options do not fit it.
PackOptions packing_for(const ModelTextConfig& config, const ModelInfo& model);

/// "always", "document" or "none".
std::string name_of(PackOptions::Bos bos);

/// What a compressed cache must know of the model.
CacheShape cache_shape(const ModelInfo& model);

}  // namespace lexico::apps
