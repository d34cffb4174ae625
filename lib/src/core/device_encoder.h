#pragma once
// Encoding on a GPU from and to host memory, in pieces that fit there.
#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/device_memory.h"
#include "kernels/pursuit/pursuit.h"

namespace lexico::detail {

class DeviceEncoder {
 public:
  explicit DeviceEncoder(int device) : device_(device) {}

  /// Both then serve one caller at a time together. `other` is of the same device.
  void share_scratch(const DeviceEncoder& other) { scratch_ = other.scratch_; }
  /// The atoms changed.
  void forget_atoms() { first_dictionary_ = -1; }
  /// @param problem  all pointers on the host.
  /// @throws ResourceError with what CUDA said; where memory is short only once not even a piece of
  /// one signal fits.
  void encode(const kernels::PursuitProblem& problem);
  /// Device memory that a call wants if it can have it.
  std::size_t device_bytes(const kernels::PursuitProblem& problem) const;

 private:
  // Some dictionaries with all their signals, or some signals of one.
  struct Piece {
    std::int64_t first_dictionary, first_signal;
    int dictionaries;
    std::int64_t signals;
  };
  struct Layout {
    kernels::cuda::PursuitPlan plan;
    std::size_t atoms_bytes, prepared, atoms_total;  // of what stays between calls
    std::size_t workspace, signals, budgets, indices, weights, counts, norms, curve, total;
  };

  std::int64_t most_signals(const kernels::PursuitProblem& problem) const;
  Layout layout(const kernels::PursuitProblem& problem, const Piece& piece) const;
  kernels::Status run(const kernels::PursuitProblem& problem, const Piece& piece);

  int device_;
  std::int64_t limit_ = 0;  // signals of a piece that memory was short for, halved; 0: none yet
  // Atoms of these dictionaries, and what the path of `prepared_` derives from them.
  DeviceBuffer atoms_;
  std::int64_t first_dictionary_ = -1;
  int dictionaries_ = 0;
  kernels::cuda::PursuitPlan prepared_;
  std::shared_ptr<DeviceBuffer> scratch_ = std::make_shared<DeviceBuffer>();
};

}  // namespace lexico::detail
