#pragma once

#include <vector>

#include "lexico-eval/cache_settings.h"
#include "lexico-eval/inputs.h"
#include "lexico-eval/measure.h"

namespace lexico::apps {

/// Prints to stdout what would be measured, with memory and time from a short probe, and the
/// `caches` that the model would be run with.
void print_plan(const std::vector<Contender>& contenders,
                std::vector<NamedSource>& sources,
                const MeasureOptions& options,
                const std::vector<CacheSettings>& caches,
                const TextTools& tools,
                const std::vector<TextLengths>& texts,
                bool as_json);

}  // namespace lexico::apps
