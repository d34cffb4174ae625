#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/corpus.h"
#include "common/model_text.h"
#include "lexico/activations.h"
#include "lexico/language_model.h"

namespace lexico::apps {

/// The options that decide which vectors a model gives for which texts: the same in every program
/// that learns from them.
struct TextPlanConfig : ModelTextConfig {
  std::vector<std::string> text, token_ids;
  std::string dtype = "float16";
  // Small batches are as fast on a CPU, and let training shuffle finer (docs/training.md).
  int batch_size = 0, batch_tokens = 1024;
  std::int64_t max_vectors = 0;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    ModelTextConfig::for_each_field(self, visit);
    visit("text",
          self.text,
          "[name=]FILE to run the model on: .txt, or .jsonl with one document a line; repeatable");
    visit("token_ids",
          self.token_ids,
          "[name=]FILE of token ids instead of text: .bin (int32) or .safetensors; repeatable");
    visit("dtype", self.dtype, "type of the stored vectors: float16 or float32");
    visit("max_vectors",
          self.max_vectors,
          "budget per layer and kind; sequences are picked evenly over all texts; 0: all");
    visit("batch_tokens", self.batch_tokens, "tokens the model runs at a time");
    visit("batch_size",
          self.batch_size,
          "sequences the model runs at a time; 0: as batch_tokens says");
  }

  /// @throws InvalidArgument naming the option, its value and its bound.
  void validate() const;
};

/// What else decides them.
struct PlanSettings {
  std::string model_sha256, command_line;
  KeyStage key_stage = KeyStage::kPostRope;  ///< of the keys as they are stored
  std::uint64_t seed = 0;                    ///< which sequences are picked
  bool query_moments = false;
  std::int64_t shard_vectors = 0;  ///< in each file; 0: files of about 2 GB
  bool one_file = false;
};

/// What a run will write: which sequences the model runs together, and which go to which file.
/// Equal plans have equal hashes.
struct Plan {
  struct Batch {
    std::size_t first = 0, count = 0;  ///< of its sequences
    std::int64_t length = 0;           ///< of each
  };
  struct Shard {
    std::size_t first = 0, count = 0;  ///< of its sequences
    std::size_t first_batch = 0, num_batches = 0;
    std::int64_t num_tokens = 0;
  };
  ActivationInfo info;  ///< of every file, less num_tokens and shard_index
  Picks sequences;
  std::vector<Batch> batches;  ///< by BatchRule; a shard holds whole ones
  std::vector<Shard> shards;
  std::int64_t num_tokens = 0, bytes = 0;
  bool query_moments = false;

  std::int64_t num_vectors() const {
    return num_tokens * info.kv_heads;
  }  ///< of each layer and kind
  std::int64_t all_vectors() const { return num_vectors() * info.num_layers * 2; }
  ActivationInfo info_of(std::size_t shard) const;
};

/// @throws InvalidArgument if the config does not fit the model.
Plan make_plan(const TextPlanConfig& config,
               const PlanSettings& settings,
               const ModelInfo& model,
               const Corpus& corpus);

}  // namespace lexico::apps
