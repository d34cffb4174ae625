// Pursuit on a GPU: chooses a path and sizes, lays out the workspace, starts the kernels.
#include "kernels/common/runtime.h"
#include "kernels/pursuit/pursuit_device.h"

namespace lexico::kernels::cuda {
namespace {

constexpr Status refused(const char* why) { return {static_cast<int>(cudaErrorInvalidValue), why}; }

Status limits_of_device(DeviceLimits* limits) {
  int shared_bytes = 0;
  Status status = device_attribute(cudaDevAttrComputeCapabilityMajor, &limits->major);
  if (status.ok())
    status = device_attribute(cudaDevAttrMultiProcessorCount, &limits->multiprocessors);
  if (status.ok())
    status = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_bytes);
  limits->shared_bytes = static_cast<std::size_t>(shared_bytes);
  return status;
}

}  // namespace

Status plan_pursuit(const PursuitProblem& p, PursuitPath wanted, PursuitPlan* plan) {
  DeviceLimits device;
  const Status status = limits_of_device(&device);
  if (!status.ok()) return status;
  if (wanted != PursuitPath::kAuto && wanted != PursuitPath::kPlain) return refused("no such path");
  PursuitPlan made;
  made.path = PursuitPath::kPlain;
  plan_plain(p, device, &made);
  *plan = made;
  return {};
}

Status pursuit(const PursuitProblem& p,
               const PursuitPlan& plan,
               void* workspace,
               bool prepared,
               Stream stream) {
  if (p.num_signals == 0) return {};
  (void)prepared;
  return run_plain(p, plan, workspace, stream);
}

}  // namespace lexico::kernels::cuda
