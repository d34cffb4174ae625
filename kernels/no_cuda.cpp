// The CUDA backend of a build without CUDA: every entry point says so.
// Compiled instead of the *_cuda files, so no other source needs an #ifdef.
#include "kernels/attention/attention.h"
#include "kernels/memory/memory.h"
#include "kernels/pursuit/pursuit.h"
#include "kernels/sparse/sparse.h"

namespace lexico::kernels::cuda {
namespace {
constexpr Status kNotBuilt{Status::kNotBuilt, "this build has no CUDA backend"};
}
int device_count() { return 0; }
Status use_device(int) { return kNotBuilt; }
Status current_device(int*) { return kNotBuilt; }
Status allocate(void**, std::size_t) { return kNotBuilt; }
void release(void*) {}
Status allocate_pinned(void**, std::size_t) { return kNotBuilt; }
void release_pinned(void*) {}
Status copy(void*, const void*, std::size_t, Stream) { return kNotBuilt; }
Status copy_rows(
    void*, std::size_t, const void*, std::size_t, std::size_t, std::size_t, Stream) {
  return kNotBuilt;
}
Status synchronize(Stream) { return kNotBuilt; }
Status create_event(Event*) { return kNotBuilt; }
void destroy_event(Event) {}
Status record(Event, Stream) { return kNotBuilt; }
Status wait(Event) { return kNotBuilt; }

Status attention_device(AttentionBounds*) { return kNotBuilt; }
std::size_t attention_workspace_bytes(const AttentionProblem&, const AttentionBounds&) { return 0; }
Status attention(const AttentionProblem&, const AttentionBounds&, void*, Stream) {
  return kNotBuilt;
}

Status plan_pursuit(const PursuitProblem&, PursuitPath, PursuitPlan*) { return kNotBuilt; }
Status pursuit(const PursuitProblem&, const PursuitPlan&, void*, bool, Stream, void*) {
  return kNotBuilt;
}

Status sparse_residual(const SparseProblem&, const float*, float*, float*, float*, Stream) {
  return kNotBuilt;
}
std::size_t atom_uses_workspace_bytes(const SparseProblem&) { return 0; }
Status atom_uses(const SparseProblem&, const AtomUses&, void*, Stream) { return kNotBuilt; }
Status sparse_gradient(const SparseProblem&, const AtomUses&, const float*, float, float*, Stream) {
  return kNotBuilt;
}
Status adam_step(const AdamStep&, Stream) { return kNotBuilt; }
Status add_co_occurrence(
    const SparseProblem&, const AtomUses&, const float*, float, const CoOccurrence&, Stream) {
  return kNotBuilt;
}
Status descend_atoms(int, int, int, const CoOccurrence&, float*, float*, Stream) {
  return kNotBuilt;
}

}  // namespace lexico::kernels::cuda
