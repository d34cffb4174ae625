#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace lexico::kernels {

/// Codes of P dictionaries with B signals each, and the atoms they refer to. All arrays are
/// row-major and on the backend's device; an index of -1 marks an unused slot.
struct SparseProblem {
  int num_dictionaries;      // P
  std::int64_t num_signals;  // B, per dictionary
  int num_atoms, dim, max_atoms;
  int threads;                  // CPU: 0 = all
  const float* atoms;           // [P, num_atoms, dim]
  const std::int32_t* indices;  // [P, B, max_atoms]
  const float* weights;         // [P, B, max_atoms]
};

namespace cpu {
/// residual [P, B, dim] = signals - D y.
Status sparse_residual(const SparseProblem& problem, const float* signals, float* residual);
/// gradient [P, num_atoms, dim] = scale * sum over signals of y_n r: with scale = -2 / (number of
/// values), the gradient of the mean of (x - D y)^2 in the atoms, y held fixed. Every atom is
/// summed in the order of the signals, whatever the thread count.
Status sparse_gradient(const SparseProblem& problem,
                       const float* residual,
                       float scale,
                       float* gradient);
}  // namespace cpu

}  // namespace lexico::kernels
