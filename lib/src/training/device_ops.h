#pragma once

#include <cstddef>
#include <vector>

#include "kernels/common/stream.h"
#include "training/sparse_ops.h"

namespace lexico::detail {

/// What SparseOps does, by the kernels of the CUDA backend. Tensors lie on the device of the
/// stream, which must be the current one, and torch allocates on that stream.
class DeviceOps {
 public:
  /// Scratch of pursuit that a group of dictionaries may take; one dictionary may take more.
  static constexpr std::size_t kMostScratchBytes = std::size_t{1} << 30;

  explicit DeviceOps(const EncodeOptions& options, std::size_t scratch_bytes = kMostScratchBytes)
      : options_(options), scratch_bytes_(scratch_bytes) {}

  /// Dictionaries go in groups whose scratch fits; where memory runs out, in smaller ones from then
  /// on. Waits for the norms. @throws c10::OutOfMemoryError if not even one fits.
  CodedBatch code(const torch::Tensor& atoms,
                  const torch::Tensor& signals,
                  const std::vector<int>& budgets,
                  kernels::Stream stream);
  torch::Tensor gradient(const torch::Tensor& atoms,
                         const CodedBatch& batch,
                         double scale,
                         kernels::Stream stream) const;
  void adam(torch::Tensor& atoms,
            AdamMoments& moments,
            const torch::Tensor& gradient,
            const std::vector<float>& scales,
            double rate,
            bool normalize_first,
            kernels::Stream stream) const;
  void add_co_occurrence(const torch::Tensor& atoms,
                         const CodedBatch& batch,
                         const torch::Tensor& signals,
                         double keep,
                         torch::Tensor& A,
                         torch::Tensor& B,
                         kernels::Stream stream) const;
  void descend(torch::Tensor& atoms,
               const torch::Tensor& A,
               const torch::Tensor& B,
               kernels::Stream stream) const;
  /// Dictionaries that pursuit took together in the last call.
  int group() const { return group_; }

 private:
  EncodeOptions options_;
  std::size_t scratch_bytes_;
  int group_ = 0;  // 0: not tried yet
  std::vector<int> budgets_;
  torch::Tensor signal_budgets_;  // [P, B] int32 of budgets_
};

}  // namespace lexico::detail
