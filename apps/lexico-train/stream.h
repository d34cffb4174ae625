#pragma once

#include <cstring>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "common/text_plan.h"
#include "lexico/language_model.h"
#include "lexico/model_activations.h"

namespace lexico::apps {

/// The options of training from the running model: those of lexico-extract, by the same names but
/// for two that training has itself.
struct StreamConfig : TextPlanConfig {
  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    TextPlanConfig::for_each_field(self, [&](const char* key, auto& value, const char* help) {
      const bool is_taken = std::strcmp(key, "device") == 0 || std::strcmp(key, "batch_size") == 0;
      visit(((is_taken ? "model_" : "") + std::string(key)).c_str(), value, help);
    });
  }
  /// Whether any of them says so.
  bool asked_for() const { return !model.empty() || !text.empty() || !token_ids.empty(); }
};

/// What a stream adds to a run.
struct StreamPlan {
  std::int64_t tokens = 0;  ///< that the model will read
  double seconds = 0;       ///< that it takes for them, from two batches (the first one warms up)
  double memory_bytes = 0;  ///< beside the model: what it gives at a time, rows that are held
  double disk_bytes = 0;    ///< of token ids
};

/// A model and the texts it is to read, as a source of activations: what a dump of them would hold,
/// with nothing on the disk but 4 bytes a token.
class Stream {
 public:
  /// Loads the model, reads and packs the texts.
  /// @param key_stage  as the dump would store keys.
  /// @param output     near which token ids are kept.
  /// @throws as lexico-extract does.
  Stream(const StreamConfig& config,
         KeyStage key_stage,
         std::uint64_t seed,
         int threads,
         const std::string& output);

  ModelActivations& rows() { return *rows_; }
  /// @param held_rows  of each layer and kind.
  StreamPlan plan(std::int64_t tokens, std::int64_t held_rows);
  /// Of a run: the model and training run side by side, and take turns where they share a device.
  double seconds_with_training(const StreamPlan& plan,
                               double training_seconds,
                               const std::string& training_device) const;

 private:
  std::string device_;
  double probe_seconds_per_token();

  LanguageModel model_;
  std::future<std::string> model_sha256_;  // minutes for a large one
  Corpus corpus_;
  Plan plan_;
  std::unique_ptr<ModelActivations> rows_;
};

}  // namespace lexico::apps
