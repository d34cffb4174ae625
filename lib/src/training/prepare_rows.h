#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "lexico/activation_sampler.h"
#include "lexico/activations.h"

namespace lexico::detail {

using TakeRows = std::function<void(int layer, Kind kind, std::vector<float>& rows)>;

/// ActivationSampler::fit_frame.
/// @param each  hands over the rows to fit on, a piece of all datasets after the other, each of
/// whole
///              tokens.
TrainingFrame fit_frame(ActivationSource& source,
                        const std::vector<TrainTarget>& targets,
                        const TrainConfig& config,
                        const std::function<void(const TakeRows&)>& each);

/// Turns the keys of a layer by positions: none (no offsets), or one for each row.
void move_positions(const TrainingFrame& frame,
                    int layer,
                    float* rows,
                    int dim,
                    const std::vector<std::int32_t>& offsets);

/// Rows of one head as training sees them: transformed, scaled.
void transform_rows(const Transform& transform, float* rows, std::int64_t count, int dim);

}  // namespace lexico::detail
