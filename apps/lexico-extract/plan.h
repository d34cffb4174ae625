#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lexico-extract/config.h"
#include "lexico-extract/inputs.h"
#include "lexico/activations.h"
#include "lexico/language_model.h"

namespace lexico::apps {

/// What a run will write: which sequences go to which file. Equal plans have equal hashes.
struct Plan {
  struct Shard {
    std::size_t first = 0, count = 0;  ///< of its sequences
    std::int64_t num_tokens = 0;
  };
  ActivationInfo info;  ///< of every file, less num_tokens and shard_index
  std::vector<Corpus::Sequence> sequences;
  std::vector<Shard> shards;
  std::int64_t num_tokens = 0, bytes = 0;
  std::int64_t batch_size = 1;  ///< sequences the model runs at a time
  bool query_moments = false;

  std::int64_t num_vectors() const {
    return num_tokens * info.kv_heads;
  }  ///< of each layer and kind
  std::int64_t all_vectors() const { return num_vectors() * info.num_layers * 2; }
  ActivationInfo info_of(std::size_t shard) const;
};

Plan make_plan(const ExtractConfig& config,
               const ModelInfo& model,
               const std::string& model_sha256,
               const Corpus& corpus,
               const std::string& command_line,
               bool one_file);

}  // namespace lexico::apps
