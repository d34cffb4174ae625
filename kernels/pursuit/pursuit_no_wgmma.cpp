// In place of pursuit_wgmma.cu where kernels run on the CPU: it does not know these instructions.
#include "kernels/pursuit/pursuit_tensor.cuh"

namespace lexico::kernels::cuda {

bool has_wgmma() { return false; }
std::size_t wgmma_shared_bytes(const PursuitProblem&) { return 0; }
Status run_wgmma(const PursuitProblem&, const PursuitPlan&, const TensorSpace&, Stream) {
  return {static_cast<int>(cudaErrorInvalidValue), "no wgmma here"};
}

}  // namespace lexico::kernels::cuda
