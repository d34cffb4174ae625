#pragma once

#include <vector>

#include "lexico-eval/measure.h"

namespace lexico::apps {

/// Prints to stdout what would be measured, with memory and time from a short probe.
void print_plan(const std::vector<Contender>& contenders,
                std::vector<NamedSource>& sources,
                const MeasureOptions& options,
                bool as_json);

}  // namespace lexico::apps
