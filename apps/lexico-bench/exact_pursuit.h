#pragma once

#include <vector>

#include "lexico/encoder.h"

namespace lexico::apps {

/// What a pursuit finds whose every sum is in double: what the encoder's codes are checked against.
struct ExactCode {
  std::vector<int> atoms;    ///< in the order of the picks
  double residual_norm = 0;  ///< L2
};

/// Plain and slow: every correlation anew for every pick.
/// @param atoms  [num_atoms, dim], unit rows.  @param signal  [dim], finite.
ExactCode exact_pursuit(
    const float* atoms, int num_atoms, int dim, const float* signal, const EncodeOptions& options);

}  // namespace lexico::apps
