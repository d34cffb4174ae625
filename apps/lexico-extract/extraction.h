#pragma once

#include <vector>

#include "common/text_plan.h"
#include "lexico-extract/output.h"
#include "lexico/language_model.h"

namespace lexico::apps {

struct ExtractionResult {
  std::int64_t tokens = 0;       ///< that the model read in this run
  double seconds = 0;            ///< from the first batch to the last file's name
  double model_seconds = 0;      ///< of it in the model
  double bare_tokens_per_s = 0;  ///< of the model alone, with --benchmark
};

/// Runs the model over the shards that are not finished yet and writes them.
/// @throws Interrupted after Ctrl-C or SIGTERM; the finished shards stay.
ExtractionResult extract(LanguageModel& model,
                         const Corpus& corpus,
                         const Plan& plan,
                         const Output& output,
                         const std::vector<bool>& finished,
                         bool benchmark);

/// Seconds the model takes for a token, from two batches (the first one warms up).
double probe_seconds_per_token(LanguageModel& model, const Corpus& corpus, const Plan& plan);

}  // namespace lexico::apps
