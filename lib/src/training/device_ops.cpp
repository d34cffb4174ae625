#include "training/device_ops.h"

#include <torch/torch.h>

#include <algorithm>

#include "check.h"
#include "core/pursuit_options.h"
#include "kernels/memory/memory.h"
#include "kernels/pursuit/pursuit.h"
#include "kernels/sparse/sparse.h"

namespace lexico::detail {
namespace {

namespace cuda = kernels::cuda;
using torch::Tensor;

kernels::SparseProblem problem_of(const Tensor& atoms, const CodedBatch& batch) {
  return {static_cast<int>(atoms.size(0)),
          batch.indices.size(1),
          static_cast<int>(atoms.size(1)),
          static_cast<int>(atoms.size(2)),
          static_cast<int>(batch.indices.size(2)),
          0,
          atoms.data_ptr<float>(),
          batch.indices.data_ptr<std::int32_t>(),
          batch.weights.data_ptr<float>()};
}

kernels::AtomUses uses_of(const CodedBatch& batch) {
  return {batch.offsets.data_ptr<std::int32_t>(), batch.slots.data_ptr<std::int32_t>()};
}

Tensor bytes_on(torch::Device device, std::size_t bytes) {
  return torch::empty({static_cast<std::int64_t>(bytes)},
                      torch::TensorOptions(torch::kUInt8).device(device));
}

}  // namespace

CodedBatch DeviceOps::code(const Tensor& atoms,
                           const Tensor& signals,
                           const std::vector<int>& budgets,
                           kernels::Stream stream) {
  const std::int64_t P = signals.size(0), B = signals.size(1), N = atoms.size(1), m = atoms.size(2),
                     s = options_.max_atoms;
  const auto integers = signals.options().dtype(torch::kInt32);
  CodedBatch batch{torch::empty({P, B, s}, integers),
                   torch::empty({P, B, s}, signals.options()),
                   torch::empty_like(signals)};
  if (!budgets.empty() && (budgets != budgets_ || signal_budgets_.numel() != P * B)) {
    budgets_ = budgets;
    signal_budgets_ = torch::tensor(budgets, torch::kInt32)
                          .view({P, 1})
                          .expand({P, B})
                          .contiguous()
                          .to(signals.device());
  }
  const Tensor counts = torch::empty({P, B}, integers);
  const Tensor norms = torch::empty({3, P, B}, signals.options());  // |x|, |r|, pursuit's |r|

  kernels::PursuitProblem pursuit;
  pursuit.num_signals = B;
  pursuit.num_atoms = static_cast<int>(N);
  pursuit.dim = static_cast<int>(m);
  set_options(pursuit, options_);
  if (group_ == 0) group_ = static_cast<int>(P);
  Tensor workspace;  // one group after the other
  for (std::int64_t first = 0; first < P;) {
    const int count = static_cast<int>(std::min<std::int64_t>(group_, P - first));
    pursuit.num_dictionaries = count;
    cuda::PursuitPlan plan;
    throw_if_failed(cuda::plan_pursuit(pursuit, cuda::PursuitPath::kAuto, &plan), "pursuit");
    if (plan.workspace_bytes > scratch_bytes_ && count > 1) {
      group_ = count / 2;
      continue;
    }
    try {
      if (!workspace.defined() ||
          static_cast<std::size_t>(workspace.numel()) < plan.workspace_bytes)
        workspace = bytes_on(signals.device(), plan.workspace_bytes);
    } catch (const c10::OutOfMemoryError&) {
      if (count == 1) throw;
      group_ = count / 2;
      continue;
    }
    const std::int64_t row = first * B;
    pursuit.atoms = atoms.data_ptr<float>() + first * N * m;
    pursuit.signals = signals.data_ptr<float>() + row * m;
    pursuit.budgets = budgets.empty() ? nullptr : signal_budgets_.data_ptr<std::int32_t>() + row;
    pursuit.indices = batch.indices.data_ptr<std::int32_t>() + row * s;
    pursuit.weights = batch.weights.data_ptr<float>() + row * s;
    pursuit.counts = counts.data_ptr<std::int32_t>() + row;
    pursuit.residual_norms = norms.data_ptr<float>() + 2 * P * B + row;
    throw_if_failed(cuda::pursuit(pursuit, plan, workspace.data_ptr(), false, stream), "pursuit");
    first += count;
  }

  const kernels::SparseProblem problem = problem_of(atoms, batch);
  throw_if_failed(cuda::sparse_residual(problem,
                                        signals.data_ptr<float>(),
                                        batch.residual.data_ptr<float>(),
                                        norms.data_ptr<float>(),
                                        norms.data_ptr<float>() + P * B,
                                        stream),
                  "residual");
  batch.offsets = torch::empty({P, N + 1}, integers);
  batch.slots = torch::empty({P, B * s}, integers);
  const Tensor room = bytes_on(signals.device(), cuda::atom_uses_workspace_bytes(problem));
  throw_if_failed(cuda::atom_uses(problem, uses_of(batch), room.data_ptr(), stream), "atom uses");
  throw_if_failed(cuda::synchronize(stream), "pursuit");
  batch.used = batch.offsets.narrow(1, 1, N) > batch.offsets.narrow(1, 0, N);
  const Tensor on_host = norms.narrow(0, 0, 2).to(torch::kCPU);
  batch.signal_norms = on_host[0];
  batch.residual_norms = on_host[1];
  return batch;
}

Tensor DeviceOps::gradient(const Tensor& atoms,
                           const CodedBatch& batch,
                           double scale,
                           kernels::Stream stream) const {
  Tensor gradient = torch::empty_like(atoms);
  throw_if_failed(cuda::sparse_gradient(problem_of(atoms, batch),
                                        uses_of(batch),
                                        batch.residual.data_ptr<float>(),
                                        static_cast<float>(scale),
                                        gradient.data_ptr<float>(),
                                        stream),
                  "gradient");
  return gradient;
}

void DeviceOps::adam(Tensor& atoms,
                     AdamMoments& moments,
                     const Tensor& gradient,
                     const std::vector<float>& scales,
                     double rate,
                     bool normalize_first,
                     kernels::Stream stream) const {
  const Tensor factors =
      torch::tensor(scales, torch::TensorOptions().pinned_memory(atoms.is_cuda()))
          .to(atoms.device(), /*non_blocking=*/true);
  ++moments.step;
  throw_if_failed(cuda::adam_step({static_cast<int>(atoms.size(0)),
                                   static_cast<int>(atoms.size(1)),
                                   static_cast<int>(atoms.size(2)),
                                   0,
                                   rate,
                                   kAdamBeta1,
                                   kAdamBeta2,
                                   kAdamEpsilon,
                                   moments.step,
                                   normalize_first,
                                   factors.data_ptr<float>(),
                                   gradient.data_ptr<float>(),
                                   atoms.data_ptr<float>(),
                                   moments.first.data_ptr<float>(),
                                   moments.second.data_ptr<float>()},
                                  stream),
                  "Adam step");
}

void DeviceOps::add_co_occurrence(const Tensor& atoms,
                                  const CodedBatch& batch,
                                  const Tensor& signals,
                                  double keep,
                                  Tensor& A,
                                  Tensor& B,
                                  kernels::Stream stream) const {
  throw_if_failed(cuda::add_co_occurrence(problem_of(atoms, batch),
                                          uses_of(batch),
                                          signals.data_ptr<float>(),
                                          static_cast<float>(keep),
                                          {A.data_ptr<float>(), B.data_ptr<float>()},
                                          stream),
                  "co-occurrence sums");
}

void DeviceOps::descend(Tensor& atoms,
                        const Tensor& A,
                        const Tensor& B,
                        kernels::Stream stream) const {
  const Tensor scratch =
      torch::empty({atoms.size(0), kernels::kDescentBlock, atoms.size(2)}, atoms.options());
  throw_if_failed(cuda::descend_atoms(static_cast<int>(atoms.size(0)),
                                      static_cast<int>(atoms.size(1)),
                                      static_cast<int>(atoms.size(2)),
                                      {A.data_ptr<float>(), B.data_ptr<float>()},
                                      scratch.data_ptr<float>(),
                                      atoms.data_ptr<float>(),
                                      stream),
                  "block coordinate descent");
}

}  // namespace lexico::detail
