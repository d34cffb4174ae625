#pragma once

#include <cstdint>
#include <initializer_list>

#include "lexico/activation_sampler.h"

namespace lexico::detail {

/// Turns keys by random positions below frame.position_offsets; `keys` name the random stream.
void move_positions(const TrainingFrame& frame,
                    int layer,
                    Kind kind,
                    float* rows,
                    std::int64_t count,
                    int dim,
                    std::initializer_list<std::uint64_t> keys);

/// Rows [first_row, first_row + count) of a layer as training sees them: moved, transformed,
/// scaled.
void prepare_rows(const TrainingFrame& frame,
                  int layer,
                  Kind kind,
                  std::int64_t first_row,
                  float* rows,
                  std::int64_t count,
                  int dim,
                  std::initializer_list<std::uint64_t> keys);

}  // namespace lexico::detail
