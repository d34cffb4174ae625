#include "training/sparse_ops.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/torch.h>

#include <cmath>

#include "check.h"
#include "kernels/memory/memory.h"
#include "kernels/sparse/sparse.h"
#include "training/device_ops.h"

namespace lexico::detail {
namespace {

constexpr std::int64_t kScoreElements = std::int64_t{1}
                                        << 27;  // bounds the [dictionaries, B, N] scores: 512 MiB

kernels::SparseProblem sparse_problem(const torch::Tensor& atoms,
                                      const torch::Tensor& indices,
                                      const torch::Tensor& weights,
                                      int threads) {
  return {static_cast<int>(atoms.size(0)),
          indices.size(1),
          static_cast<int>(atoms.size(1)),
          static_cast<int>(atoms.size(2)),
          static_cast<int>(indices.size(2)),
          threads,
          atoms.data_ptr<float>(),
          indices.data_ptr<std::int32_t>(),
          weights.data_ptr<float>()};
}

kernels::AtomUses uses_of(const CodedBatch& batch) {
  return {batch.offsets.data_ptr<std::int32_t>(), batch.slots.data_ptr<std::int32_t>()};
}

void list_uses(const torch::Tensor& atoms, CodedBatch& batch, int threads) {
  batch.offsets = torch::empty({atoms.size(0), atoms.size(1) + 1}, torch::kInt32);
  batch.slots =
      torch::empty({atoms.size(0), batch.indices.size(1) * batch.indices.size(2)}, torch::kInt32);
  throw_if_failed(kernels::cpu::atom_uses(
                      sparse_problem(atoms, batch.indices, batch.weights, threads), uses_of(batch)),
                  "atom uses");
}

torch::Tensor gather_atoms(const torch::Tensor& atoms,
                           const torch::Tensor& indices) {  // -> [P, B, ..., m]
  const std::int64_t P = atoms.size(0), m = atoms.size(2);
  const torch::Tensor flat = indices.reshape({P, -1, 1}).expand({P, -1, m});
  std::vector<std::int64_t> shape = indices.sizes().vec();
  shape.push_back(m);
  return torch::gather(atoms, 1, flat).reshape(shape);
}

/// OMP for a few dictionaries: pick, orthogonalize against the chosen (Q), project the residual;
/// weights from R.
CodedBatch omp(const torch::Tensor& D,
               const torch::Tensor& X,
               const EncodeOptions& options,
               const torch::Tensor& budgets) {
  const std::int64_t P = X.size(0), B = X.size(1), m = X.size(2), s = options.max_atoms;
  const torch::Tensor norm = X.norm(2, 2);
  const torch::Tensor stop = norm * options.relative_tolerance;
  torch::Tensor active = norm.isfinite() & (norm > 0);
  torch::Tensor r = torch::where(active.unsqueeze(2), X, torch::zeros_like(X));
  const torch::Tensor start = r.clone();
  torch::Tensor Q = torch::zeros({P, B, s, m}, X.options()),
                R = torch::zeros({P, B, s, s}, X.options());
  torch::Tensor taken = torch::zeros({P, B, D.size(1)}, X.options().dtype(torch::kBool));
  torch::Tensor indices = torch::full({P, B, s}, -1, X.options().dtype(torch::kLong));
  for (std::int64_t k = 0; k < s; ++k) {
    active = active & (r.norm(2, 2) > stop) & (budgets > k);
    torch::Tensor score = torch::einsum("pnm,pbm->pbn", {D, r}).abs_().masked_fill_(taken, -1.0);
    const torch::Tensor pick = score.argmax(2);
    const torch::Tensor chosen = gather_atoms(D, pick);
    torch::Tensor u = chosen.clone();
    torch::Tensor coefficients = torch::zeros({P, B, s}, X.options());
    for (int pass = 0; pass < 2; ++pass) {  // twice is enough for fp32 orthogonality
      const torch::Tensor c = torch::einsum("pbkm,pbm->pbk", {Q, u});
      coefficients += c;
      u = u - torch::einsum("pbkm,pbk->pbm", {Q, c});
    }
    const torch::Tensor length = u.norm(2, 2);
    active =
        active &
        (length > 1e-3f);  // shorter: the atom lies in the span of the chosen ones, up to rounding
    u = torch::where(
        active.unsqueeze(2), u / length.clamp_min(1e-12).unsqueeze(2), torch::zeros_like(u));
    Q.select(2, k).copy_(u);
    R.select(3, k).copy_(
        torch::where(active.unsqueeze(2), coefficients, torch::zeros_like(coefficients)));
    R.select(3, k).select(2, k).copy_(torch::where(active, length, torch::ones_like(length)));
    r = r - u * (r * u).sum(2, true);
    indices.select(2, k).copy_(torch::where(active, pick, torch::full_like(pick, -1)));
    taken.scatter_(2, pick.unsqueeze(2), true);
  }
  const torch::Tensor target = torch::einsum("pbkm,pbm->pbk", {Q, start}).unsqueeze(3);
  torch::Tensor weights = torch::linalg_solve_triangular(R, target, /*upper=*/true).squeeze(3);
  weights = torch::where(indices >= 0, weights, torch::zeros_like(weights));
  torch::Tensor used = torch::zeros({P, D.size(1)}, X.options().dtype(torch::kBool));
  used.scatter_(1, indices.clamp_min(0).view({P, -1}), true);
  // Unused slots marked atom 0 above: it is used only if a code names it.
  used.select(1, 0).copy_((indices == 0).view({P, -1}).any(1));
  return {indices.to(torch::kInt32),
          weights,
          r,
          norm.to(torch::kCPU),
          r.norm(2, 2).to(torch::kCPU),
          used};
}

/// The stream that torch puts its work on, while the device is the current one.
class OnDevice {
 public:
  explicit OnDevice(torch::Device device)
      : guard_(device),
        stream_(static_cast<kernels::Stream>(
            c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle())) {}
  operator kernels::Stream() const { return stream_; }

 private:
  c10::DeviceGuard guard_;
  kernels::Stream stream_;
};

}  // namespace

CodedBatch code_with_tensor_ops(const torch::Tensor& atoms,
                                const torch::Tensor& signals,
                                const EncodeOptions& options,
                                const std::vector<int>& budgets) {
  if (options.selection.rule != Selection::Rule::kOmp)
    throw_invalid("selection '",
                  options.selection.name(),
                  "' needs the CPU; on other devices only omp is built");
  const std::int64_t P = atoms.size(0);
  torch::Tensor most = torch::full({P, 1}, options.max_atoms, torch::kLong);
  for (std::size_t p = 0; p < budgets.size(); ++p) most[static_cast<std::int64_t>(p)] = budgets[p];
  most = most.to(atoms.device());
  const std::int64_t group =
      std::max<std::int64_t>(1, kScoreElements / (signals.size(1) * atoms.size(1)));
  std::vector<torch::Tensor> parts[6];
  for (std::int64_t first = 0; first < P; first += group) {
    const std::int64_t count = std::min(group, P - first);
    const CodedBatch part = omp(atoms.narrow(0, first, count),
                                signals.narrow(0, first, count),
                                options,
                                most.narrow(0, first, count));
    int i = 0;
    for (const torch::Tensor& tensor : {part.indices,
                                        part.weights,
                                        part.residual,
                                        part.signal_norms,
                                        part.residual_norms,
                                        part.used})
      parts[i++].push_back(tensor);
  }
  return {torch::cat(parts[0]),
          torch::cat(parts[1]),
          torch::cat(parts[2]),
          torch::cat(parts[3]).contiguous(),
          torch::cat(parts[4]).contiguous(),
          torch::cat(parts[5])};
}

torch::Tensor gradient_with_tensor_ops(const torch::Tensor& atoms,
                                       const CodedBatch& batch,
                                       double scale) {
  const std::int64_t P = atoms.size(0), N = atoms.size(1), m = atoms.size(2);
  const torch::Tensor used = batch.indices >= 0;
  torch::Tensor rows =
      batch.indices.to(torch::kLong) +
      torch::arange(P, batch.indices.options().dtype(torch::kLong)).view({P, 1, 1}) * N;
  rows = torch::where(used, rows, torch::zeros_like(rows));  // weight 0: row 0 gets nothing
  const torch::Tensor parts = (batch.weights * scale).unsqueeze(3) * batch.residual.unsqueeze(2);
  return torch::zeros({P * N, m}, atoms.options())
      .index_add_(0, rows.reshape({-1}), parts.reshape({-1, m}))
      .view({P, N, m});
}

void adam_with_tensor_ops(torch::Tensor& atoms,
                          AdamMoments& moments,
                          const torch::Tensor& gradient,
                          const std::vector<float>& scales,
                          double rate,
                          bool normalize_first) {
  const auto unit = [](const torch::Tensor& rows) {
    return rows / rows.norm(2, 2, true).clamp_min(1e-30);
  };
  const double t = static_cast<double>(++moments.step);
  const torch::Tensor scale = torch::tensor(scales)
                                  .to(atoms.device())
                                  .view({static_cast<std::int64_t>(scales.size()), 1, 1});
  const torch::Tensor start = normalize_first ? unit(atoms) : atoms;
  const torch::Tensor g = scale * (gradient - (gradient * start).sum(2, true) * start);
  const torch::Tensor first = moments.first * kAdamBeta1 + g * (1.0 - kAdamBeta1);
  const torch::Tensor second = moments.second * kAdamBeta2 + g.square() * (1.0 - kAdamBeta2);
  const torch::Tensor spread =
      (second / (1.0 - std::pow(kAdamBeta2, t))).sqrt_().add_(kAdamEpsilon);
  torch::Tensor moved = start - first / spread * (rate / (1.0 - std::pow(kAdamBeta1, t)));
  if (!normalize_first) moved = unit(moved);
  const torch::Tensor moves = scale != 0;
  atoms.copy_(torch::where(moves, moved, atoms));
  moments.first.copy_(torch::where(moves, first, moments.first));
  moments.second.copy_(torch::where(moves, second, moments.second));
}

void add_co_occurrence_with_tensor_ops(const CodedBatch& batch,
                                       const torch::Tensor& signals,
                                       double keep,
                                       torch::Tensor& A,
                                       torch::Tensor& B) {
  A.mul_(keep);
  B.mul_(keep);
  for (std::int64_t p = 0; p < A.size(0); ++p) {
    const torch::Tensor rows = batch.indices[p].to(torch::kLong).clamp_min(0);
    const torch::Tensor Y =  // [B, N]; unused slots add weight 0 to atom 0
        torch::zeros({rows.size(0), A.size(1)}, A.options())
            .scatter_add_(1, rows, batch.weights[p]);
    A[p].add_(torch::matmul(Y.t(), Y));
    B[p].add_(torch::matmul(Y.t(), signals[p]));
  }
}

void descend_with_tensor_ops(torch::Tensor& atoms, const torch::Tensor& A, const torch::Tensor& B) {
  const std::int64_t N = atoms.size(1);
  for (std::int64_t first = 0; first < N; first += kernels::kDescentBlock) {
    const std::int64_t rows = std::min<std::int64_t>(kernels::kDescentBlock, N - first);
    torch::Tensor D = atoms.narrow(1, first, rows);
    const torch::Tensor own = A.narrow(1, first, rows).narrow(2, first, rows);
    torch::Tensor misfit =
        B.narrow(1, first, rows) - torch::matmul(A.narrow(1, first, rows), atoms);
    for (std::int64_t j = 0; j < rows; ++j) {
      const torch::Tensor uses = own.select(1, j).select(1, j).unsqueeze(1);  // [P, 1]
      const torch::Tensor before = D.select(1, j).clone();
      const torch::Tensor u = misfit.select(1, j) + uses * before;
      const torch::Tensor length = u.norm(2, 1, true);
      const torch::Tensor after =
          torch::where((uses > 0).logical_and(length > 0), u / length.clamp_min(1e-30), before);
      D.select(1, j).copy_(after);
      misfit -= own.select(2, j).unsqueeze(2) * (after - before).unsqueeze(1);
    }
  }
}

SparseOps::SparseOps(const EncodeOptions& options, torch::Device device)
    : options_(options), device_(device), encoder_(options) {
  if (device.is_cuda() && kernels::cuda::device_count() > 0)
    on_device_ = std::make_unique<DeviceOps>(options);
}
SparseOps::~SparseOps() = default;

CodedBatch SparseOps::code(const torch::Tensor& atoms,
                           const torch::Tensor& signals,
                           const std::vector<int>& budgets) {
  if (on_device_ != nullptr) return on_device_->code(atoms, signals, budgets, OnDevice(device_));
  if (!device_.is_cpu()) return code_with_tensor_ops(atoms, signals, options_, budgets);
  const std::int64_t P = signals.size(0), B = signals.size(1), N = atoms.size(1);
  signal_budgets_.clear();
  for (int budget : budgets)
    signal_budgets_.insert(signal_budgets_.end(), static_cast<std::size_t>(B), budget);
  encoder_.set_atoms(atoms.data_ptr<float>(),
                     static_cast<int>(P),
                     static_cast<int>(N),
                     static_cast<int>(atoms.size(2)));
  encoder_.encode(signals.data_ptr<float>(),
                  B,
                  codes_,
                  false,
                  budgets.empty() ? nullptr : signal_budgets_.data());
  const std::int64_t s = codes_.max_atoms;
  CodedBatch batch{torch::from_blob(codes_.indices.data(), {P, B, s}, torch::kInt32),
                   torch::from_blob(codes_.weights.data(), {P, B, s}, torch::kFloat32),
                   torch::empty_like(signals),
                   torch::empty({P, B}),
                   torch::empty({P, B})};
  throw_if_failed(kernels::cpu::sparse_residual(
                      sparse_problem(atoms, batch.indices, batch.weights, options_.threads),
                      signals.data_ptr<float>(),
                      batch.residual.data_ptr<float>(),
                      batch.signal_norms.data_ptr<float>(),
                      batch.residual_norms.data_ptr<float>()),
                  "residual");
  list_uses(atoms, batch, options_.threads);
  batch.used = batch.offsets.narrow(1, 1, N) > batch.offsets.narrow(1, 0, N);
  return batch;
}

torch::Tensor SparseOps::gradient(const torch::Tensor& atoms,
                                  const CodedBatch& given,
                                  double scale) const {
  if (on_device_ != nullptr) return on_device_->gradient(atoms, given, scale, OnDevice(device_));
  if (!device_.is_cpu()) return gradient_with_tensor_ops(atoms, given, scale);
  CodedBatch batch = given;
  if (!batch.offsets.defined()) list_uses(atoms, batch, options_.threads);
  torch::Tensor gradient = torch::empty_like(atoms);
  throw_if_failed(kernels::cpu::sparse_gradient(
                      sparse_problem(atoms, batch.indices, batch.weights, options_.threads),
                      uses_of(batch),
                      batch.residual.data_ptr<float>(),
                      static_cast<float>(scale),
                      gradient.data_ptr<float>()),
                  "gradient");
  return gradient;
}

void SparseOps::adam(torch::Tensor& atoms,
                     AdamMoments& moments,
                     const torch::Tensor& gradient,
                     const std::vector<float>& scales,
                     double rate,
                     bool normalize_first) const {
  if (on_device_ != nullptr) {
    on_device_->adam(atoms, moments, gradient, scales, rate, normalize_first, OnDevice(device_));
    return;
  }
  if (!device_.is_cpu()) {
    adam_with_tensor_ops(atoms, moments, gradient, scales, rate, normalize_first);
    return;
  }
  ++moments.step;
  throw_if_failed(kernels::cpu::adam_step({static_cast<int>(atoms.size(0)),
                                           static_cast<int>(atoms.size(1)),
                                           static_cast<int>(atoms.size(2)),
                                           options_.threads,
                                           rate,
                                           kAdamBeta1,
                                           kAdamBeta2,
                                           kAdamEpsilon,
                                           moments.step,
                                           normalize_first,
                                           scales.data(),
                                           gradient.data_ptr<float>(),
                                           atoms.data_ptr<float>(),
                                           moments.first.data_ptr<float>(),
                                           moments.second.data_ptr<float>()}),
                  "Adam step");
}

void SparseOps::add_co_occurrence(const torch::Tensor& atoms,
                                  const CodedBatch& batch,
                                  const torch::Tensor& signals,
                                  double keep,
                                  torch::Tensor& A,
                                  torch::Tensor& B) const {
  if (on_device_ != nullptr) {
    on_device_->add_co_occurrence(atoms, batch, signals, keep, A, B, OnDevice(device_));
    return;
  }
  if (!device_.is_cpu()) {
    add_co_occurrence_with_tensor_ops(batch, signals, keep, A, B);
    return;
  }
  throw_if_failed(kernels::cpu::add_co_occurrence(
                      sparse_problem(atoms, batch.indices, batch.weights, options_.threads),
                      uses_of(batch),
                      signals.data_ptr<float>(),
                      static_cast<float>(keep),
                      {A.data_ptr<float>(), B.data_ptr<float>()}),
                  "co-occurrence sums");
}

void SparseOps::descend(torch::Tensor& atoms,
                        const torch::Tensor& A,
                        const torch::Tensor& B) const {
  if (on_device_ != nullptr) {
    on_device_->descend(atoms, A, B, OnDevice(device_));
    return;
  }
  if (!device_.is_cpu()) {
    descend_with_tensor_ops(atoms, A, B);
    return;
  }
  torch::Tensor scratch = torch::empty({atoms.size(0), kernels::kDescentBlock, atoms.size(2)});
  throw_if_failed(kernels::cpu::descend_atoms(static_cast<int>(atoms.size(0)),
                                              static_cast<int>(atoms.size(1)),
                                              static_cast<int>(atoms.size(2)),
                                              options_.threads,
                                              {A.data_ptr<float>(), B.data_ptr<float>()},
                                              scratch.data_ptr<float>(),
                                              atoms.data_ptr<float>()),
                  "block coordinate descent");
}

}  // namespace lexico::detail
