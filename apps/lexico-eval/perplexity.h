#pragma once

#include <string>
#include <vector>

#include "common/report/report.h"
#include "lexico-eval/cache_settings.h"

namespace lexico::apps {

/// The texts among `sources` with the lengths of the sequences that are read: `tokens` tokens of
/// each text in whole sequences, 0: all.
std::vector<TextLengths> texts_to_read(const std::vector<NamedSource>& sources,
                                       std::int64_t tokens);

/// Runs the model over the texts among `sources` with its cache kept in each of `settings`, and
/// fills `report`'s cache effects. @throws what measure_cache_effect does.
void measure_perplexity(const LanguageModel& model,
                        const std::vector<CacheSettings>& settings,
                        std::vector<NamedSource>& sources,
                        const EvalConfig& config,
                        const EncodeOptions& encode,
                        report::EvaluationReport& report);

/// Tokens read at once where the user leaves it open.
int reading_chunk(const EvalConfig& config);

/// The settings with their bytes, as a table or JSON: for a dry run.
std::string settings_text(const std::vector<CacheSettings>& settings,
                          const ModelInfo& model,
                          const std::vector<TextLengths>& texts);

}  // namespace lexico::apps
