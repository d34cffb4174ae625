#pragma once
// What the parts of the CUDA pursuit agree on: the driver (pursuit_cuda.cu) and its paths
// (pursuit_plain.cu, pursuit_mma.cu, pursuit_wgmma.cu).
#include <cstddef>
#include <cstdint>

#include "kernels/pursuit/pursuit.h"

namespace lexico::kernels::cuda {

// As on the CPU (kernels/pursuit/pursuit_simd.h says what they are for).
constexpr float kResidualFloor = 1e-6f;
constexpr float kCorrelationFloor = 5e-7f;
constexpr float kIndependent = 1e-5f;
constexpr int kMaxRefused = 16;

constexpr std::size_t kWorkspaceAlignment = 256;
constexpr std::size_t aligned(std::size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

/// What the current device has.
struct DeviceLimits {
  int major = 0, minor = 0, multiprocessors = 0;
  std::size_t shared_bytes = 0;  // that a block can ask for; a multiprocessor has 1 KiB more
};

/// Fills everything of a plan but `path`.
void plan_plain(const PursuitProblem& problem, const DeviceLimits& device, PursuitPlan* plan);
Status run_plain(const PursuitProblem& problem,
                 const PursuitPlan& plan,
                 void* workspace,
                 Stream stream);

}  // namespace lexico::kernels::cuda
