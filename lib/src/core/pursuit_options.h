#pragma once
#include "kernels/pursuit/pursuit.h"
#include "lexico/encoder.h"

namespace lexico::detail {

/// How pursuit picks and when it stops, for a problem whose num_atoms is set.
inline void set_options(kernels::PursuitProblem& problem, const EncodeOptions& options) {
  problem.max_atoms = options.max_atoms;
  problem.rule = options.selection.rule == Selection::Rule::kOls ? kernels::PursuitRule::kOls
                                                                 : kernels::PursuitRule::kOmp;
  problem.candidates = options.selection.candidates_among(problem.num_atoms);
  problem.relative_tolerance = options.relative_tolerance;
}

}  // namespace lexico::detail
