#pragma once

#include <torch/types.h>

#include "lexico/encoder.h"

namespace lexico::detail {

/// A coded batch of P dictionaries: which atoms, how much of each, what is left.
struct CodedBatch {
  torch::Tensor indices;   ///< [P, B, s] int32, -1 in unused slots
  torch::Tensor weights;   ///< [P, B, s]
  torch::Tensor residual;  ///< [P, B, m] = x - D y
};

/// Pursuit and the gradient on tensors: on the CPU by our own kernels, elsewhere by tensor
/// operations.
class SparseOps {
 public:
  SparseOps(const EncodeOptions& options, torch::Device device);
  /// @param atoms  [P, N, m] unit rows, @param signals  [P, B, m], both float32, contiguous, on the
  /// device.
  CodedBatch code(const torch::Tensor& atoms, const torch::Tensor& signals);
  /// [P, N, m] = scale * sum over signals of y_n r.
  torch::Tensor gradient(const torch::Tensor& atoms, const CodedBatch& batch, double scale) const;

 private:
  EncodeOptions options_;
  torch::Device device_;
  Encoder encoder_;
  SparseCodes codes_;
};

// The two forms of each, apart so that a test can hold them against each other.
CodedBatch code_with_tensor_ops(const torch::Tensor& atoms,
                                const torch::Tensor& signals,
                                const EncodeOptions& options);
torch::Tensor gradient_with_tensor_ops(const torch::Tensor& atoms,
                                       const CodedBatch& batch,
                                       double scale);

}  // namespace lexico::detail
