#include "training/sparse_ops.h"

#include <torch/torch.h>

#include "check.h"
#include "kernels/sparse/sparse.h"

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
CodedBatch omp(const torch::Tensor& D, const torch::Tensor& X, const EncodeOptions& options) {
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
    active = active & (r.norm(2, 2) > stop);
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
  return {indices.to(torch::kInt32), weights, r};
}

}  // namespace

CodedBatch code_with_tensor_ops(const torch::Tensor& atoms,
                                const torch::Tensor& signals,
                                const EncodeOptions& options) {
  if (options.selection.rule != Selection::Rule::kOmp)
    throw_invalid("selection '",
                  options.selection.name(),
                  "' needs the CPU; on other devices only omp is built");
  const std::int64_t group =
      std::max<std::int64_t>(1, kScoreElements / (signals.size(1) * atoms.size(1)));
  std::vector<torch::Tensor> indices, weights, residuals;
  for (std::int64_t first = 0; first < atoms.size(0); first += group) {
    const std::int64_t count = std::min(group, atoms.size(0) - first);
    CodedBatch part = omp(atoms.narrow(0, first, count), signals.narrow(0, first, count), options);
    indices.push_back(part.indices);
    weights.push_back(part.weights);
    residuals.push_back(part.residual);
  }
  return {torch::cat(indices), torch::cat(weights), torch::cat(residuals)};
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

SparseOps::SparseOps(const EncodeOptions& options, torch::Device device)
    : options_(options), device_(device), encoder_(options) {}

CodedBatch SparseOps::code(const torch::Tensor& atoms, const torch::Tensor& signals) {
  if (!device_.is_cpu()) return code_with_tensor_ops(atoms, signals, options_);
  const std::int64_t P = signals.size(0), B = signals.size(1);
  encoder_.set_atoms(atoms.data_ptr<float>(),
                     static_cast<int>(P),
                     static_cast<int>(atoms.size(1)),
                     static_cast<int>(atoms.size(2)));
  encoder_.encode(signals.data_ptr<float>(), B, codes_);
  CodedBatch batch{
      torch::from_blob(codes_.indices.data(), {P, B, codes_.max_atoms}, torch::kInt32),
      torch::from_blob(codes_.weights.data(), {P, B, codes_.max_atoms}, torch::kFloat32),
      torch::empty_like(signals)};
  throw_if_failed(kernels::cpu::sparse_residual(
                      sparse_problem(atoms, batch.indices, batch.weights, options_.threads),
                      signals.data_ptr<float>(),
                      batch.residual.data_ptr<float>()),
                  "residual");
  return batch;
}

torch::Tensor SparseOps::gradient(const torch::Tensor& atoms,
                                  const CodedBatch& batch,
                                  double scale) const {
  if (!device_.is_cpu()) return gradient_with_tensor_ops(atoms, batch, scale);
  torch::Tensor gradient = torch::empty_like(atoms);
  throw_if_failed(kernels::cpu::sparse_gradient(
                      sparse_problem(atoms, batch.indices, batch.weights, options_.threads),
                      batch.residual.data_ptr<float>(),
                      static_cast<float>(scale),
                      gradient.data_ptr<float>()),
                  "gradient");
  return gradient;
}

}  // namespace lexico::detail
