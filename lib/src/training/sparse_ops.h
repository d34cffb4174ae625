#pragma once

#include <torch/types.h>

#include <memory>

#include "lexico/encoder.h"

namespace lexico::detail {

constexpr double kAdamBeta1 = 0.9, kAdamBeta2 = 0.999, kAdamEpsilon = 1e-8;  // as published

/// A coded batch of P dictionaries: which atoms, how much of each, what is left.
struct CodedBatch {
  torch::Tensor indices;              ///< [P, B, s] int32, -1 in unused slots
  torch::Tensor weights;              ///< [P, B, s]
  torch::Tensor residual;             ///< [P, B, m] = x - D y
  torch::Tensor signal_norms = {};    ///< [P, B], on the host: |x|; not finite for a bad vector
  torch::Tensor residual_norms = {};  ///< [P, B], on the host: |x - D y|
  torch::Tensor used = {};            ///< [P, N] bool: atoms in some code
  torch::Tensor offsets = {}, slots = {};  ///< kernels::AtomUses; undefined: made when needed
};

/// How an Adam step is taken; the moments are [P, N, m].
struct AdamMoments {
  torch::Tensor first, second;
  std::int64_t step = 0;  ///< taken so far
};

class DeviceOps;

/// Pursuit and what moves the atoms, on tensors: by our own kernels on the CPU and, where the CUDA
/// backend is built, on a GPU; elsewhere by tensor operations.
class SparseOps {
 public:
  SparseOps(const EncodeOptions& options, torch::Device device);
  ~SparseOps();
  /// @param atoms    [P, N, m] unit rows, @param signals  [P, B, m], both float32, contiguous, on
  ///                 the device.
  /// @param budgets  empty, or most atoms for the signals of each dictionary, [P].
  /// The result stands until the next call.
  CodedBatch code(const torch::Tensor& atoms,
                  const torch::Tensor& signals,
                  const std::vector<int>& budgets = {});
  /// [P, N, m] = scale * sum over signals of y_n r.
  torch::Tensor gradient(const torch::Tensor& atoms, const CodedBatch& batch, double scale) const;
  /// kernels::AdamStep: the tangent part of `gradient`, times `scales` [P] (0: the dictionary
  /// stays).
  void adam(torch::Tensor& atoms,
            AdamMoments& moments,
            const torch::Tensor& gradient,
            const std::vector<float>& scales,
            double rate,
            bool normalize_first) const;
  /// A [P, N, N] = keep A + sum y y^T, B [P, N, m] = keep B + sum y x^T.
  void add_co_occurrence(const torch::Tensor& atoms,
                         const CodedBatch& batch,
                         const torch::Tensor& signals,
                         double keep,
                         torch::Tensor& A,
                         torch::Tensor& B) const;
  /// One sweep of block coordinate descent (kernels::cpu::descend_atoms).
  void descend(torch::Tensor& atoms, const torch::Tensor& A, const torch::Tensor& B) const;

 private:
  EncodeOptions options_;
  torch::Device device_;
  Encoder encoder_;
  SparseCodes codes_;
  std::vector<std::int32_t> signal_budgets_;
  std::unique_ptr<DeviceOps> on_device_;  // our kernels of the CUDA backend, if they are used
};

// The tensor forms, apart so that a test can hold them against the kernels.
CodedBatch code_with_tensor_ops(const torch::Tensor& atoms,
                                const torch::Tensor& signals,
                                const EncodeOptions& options,
                                const std::vector<int>& budgets = {});
torch::Tensor gradient_with_tensor_ops(const torch::Tensor& atoms,
                                       const CodedBatch& batch,
                                       double scale);
void adam_with_tensor_ops(torch::Tensor& atoms,
                          AdamMoments& moments,
                          const torch::Tensor& gradient,
                          const std::vector<float>& scales,
                          double rate,
                          bool normalize_first);
void add_co_occurrence_with_tensor_ops(const CodedBatch& batch,
                                       const torch::Tensor& signals,
                                       double keep,
                                       torch::Tensor& A,
                                       torch::Tensor& B);
void descend_with_tensor_ops(torch::Tensor& atoms, const torch::Tensor& A, const torch::Tensor& B);

}  // namespace lexico::detail
