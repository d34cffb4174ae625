#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "lexico/trainer.h"

namespace lexico {

class ActivationReader;

/// Shuffled vectors of an activation dump, endless: each epoch is a permutation of all rows in use.
/// Two levels: chunks of 2,048 rows are permuted, a pool of chunks is held in memory (half
/// precision when the file is) and its rows are permuted. All targets get the same rows in the same
/// order.
class ActivationSampler : public VectorStream {
 public:
  /// @param reader      must outlive the sampler.
  /// @param num_rows    rows [0, num_rows) are used; the rest is left for validation.
  /// @param pool_bytes  memory for the pool; at least one chunk is held.
  /// @throws InvalidArgument if num_rows < 1 or a target is not in the file.
  ActivationSampler(ActivationReader& reader,
                    std::vector<TrainTarget> targets,
                    std::int64_t num_rows,
                    std::uint64_t seed,
                    std::size_t pool_bytes);
  ~ActivationSampler() override;

  int num_dictionaries() const override;
  int dim() const override;
  void next(std::int64_t count, float* out) override;
  void seek(std::int64_t vectors) override;
  std::string identity() const override;
  std::size_t pool_bytes() const;  ///< really used

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lexico
