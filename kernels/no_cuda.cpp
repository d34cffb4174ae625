// The CUDA backend of a build without CUDA: every entry point says so.
// Compiled instead of the *_cuda files, so no other source needs an #ifdef.
#include "kernels/memory/memory.h"
#include "kernels/pursuit/pursuit.h"

namespace lexico::kernels::cuda {
namespace {
constexpr Status kNotBuilt{Status::kNotBuilt, "this build has no CUDA backend"};
}
int device_count() { return 0; }
Status use_device(int) { return kNotBuilt; }
Status allocate(void**, std::size_t) { return kNotBuilt; }
void release(void*) {}
Status copy(void*, const void*, std::size_t, Stream) { return kNotBuilt; }
Status synchronize(Stream) { return kNotBuilt; }

Status plan_pursuit(const PursuitProblem&, PursuitPath, PursuitPlan*) { return kNotBuilt; }
Status pursuit(const PursuitProblem&, const PursuitPlan&, void*, bool, Stream) { return kNotBuilt; }

}  // namespace lexico::kernels::cuda
