#pragma once

#include <cstdint>
#include <vector>

#include "common/report/report.h"
#include "lexico-eval/rates.h"

namespace lexico {
class LanguageModel;
}

namespace lexico::apps {

struct PerplexityOptions {
  int recent_window = 32, sink_tokens = 0, chunk = 0;
  std::int64_t tokens = 12288;  ///< of each data set, in whole sequences; 0: all
};

/// Runs the model over the texts among `sources` with its cache compressed by each coder that has
/// every layer and both kinds, and fills `report`'s cache effects. @throws what
/// measure_cache_effect does.
void measure_perplexity(const LanguageModel& model,
                        const std::vector<RateCoder>& coders,
                        std::vector<NamedSource>& sources,
                        const PerplexityOptions& options,
                        report::EvaluationReport& report);

}  // namespace lexico::apps
