#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/common/status.h"
#include "kernels/common/stream.h"

namespace lexico::kernels {

enum class PursuitRule : int { kOmp = 0, kOls = 1 };

/// One batched pursuit over P dictionaries of one shape. Every pointer is on the backend's device; all arrays are
/// row-major. See lexico/encoder.h for what happens to zero, NaN and exactly sparse signals.
struct PursuitProblem {
  int num_dictionaries;            // P
  std::int64_t num_signals;        // B, per dictionary
  int num_atoms, dim, max_atoms;
  PursuitRule rule;
  int candidates;                  // OLS among the best this many by correlation; 0: all atoms
  float relative_tolerance;        // stop once |r| <= relative_tolerance * |x|
  int threads;                     // CPU: 0 = all
  const float* atoms;              // [P, num_atoms, dim], rows of unit L2 norm
  const float* signals;            // [P, B, dim]
  const std::int32_t* budgets;     // nullptr, or [P, B]: at most this many atoms for the signal
  std::int32_t* indices;           // out [P, B, max_atoms]; -1 in unused slots
  float* weights;                  // out [P, B, max_atoms]; 0 in unused slots
  std::int32_t* counts;            // out [P, B]
  float* residual_norms;           // out [P, B], L2; NaN if the signal holds NaN or Inf
  float* curve;                    // nullptr, or out [P, B, max_atoms]: |r| after each atom, the last value repeated
};

namespace cpu {
/// Scratch `pursuit` needs, in bytes.
std::size_t pursuit_workspace_bytes(const PursuitProblem& problem);
Status pursuit(const PursuitProblem& problem, void* workspace);
}  // namespace cpu

}  // namespace lexico::kernels
