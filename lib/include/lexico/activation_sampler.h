#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "lexico/rope.h"
#include "lexico/trainer.h"
#include "lexico/transform.h"

namespace lexico {

class ActivationReader;

/// What is done to vectors before dictionaries learn from them.
struct TrainingFrame {
  /// Of a layer's keys or values, all its KV heads; what is missing is the identity. `unit_scale`
  /// divides each vector by its length.
  std::map<std::pair<int, Kind>, Transform> transforms;
  /// Keys are moved by a random offset below this, as `rope` rotates them; 0: not moved.
  std::int64_t position_offsets = 0;
  Rope rope = {};

  bool changes_nothing() const { return transforms.empty() && position_offsets == 0; }
  /// The transform of one dictionary's vectors: of its head alone if it has one.
  Transform of(int layer, Kind kind, int head = -1) const;
};

/// The frame that a config asks for: means over rows spread evenly over [0, num_rows) of `reader`,
/// as they are learnt from (positions moved); metrics from its query moments. The same for the same
/// arguments.
/// @throws InvalidArgument if the data does not have what the config needs: query moments, keys of
/// the right stage, a rotation.
TrainingFrame fit_frame(ActivationReader& reader,
                        const std::vector<TrainTarget>& targets,
                        std::int64_t num_rows,
                        const TrainConfig& config);

/// Shuffled vectors of an activation dump, endless: each epoch is a permutation of all rows in use.
/// Two levels: chunks of about 2,048 rows are permuted, a pool of chunks is held in memory (half
/// precision when the file is and no frame changes it) and its rows are permuted. All targets get
/// the same rows in the same order; targets of one head each get the same tokens, and a target of
/// several layers gets each row from one of them, another one in the next epoch.
class ActivationSampler : public VectorStream {
 public:
  /// @param reader      must outlive the sampler.
  /// @param num_rows    rows [0, num_rows) are used (whole tokens only, where targets have heads);
  ///                    the rest is left for validation.
  /// @param pool_bytes  memory for the pool; at least one chunk is held.
  /// @throws InvalidArgument if num_rows < 1, a target is not in the file, or only some targets
  /// have heads.
  ActivationSampler(ActivationReader& reader,
                    std::vector<TrainTarget> targets,
                    std::int64_t num_rows,
                    std::uint64_t seed,
                    std::size_t pool_bytes,
                    TrainingFrame frame = {});
  ~ActivationSampler() override;

  int num_dictionaries() const override;
  int dim() const override;
  void next(std::int64_t count, float* out) override;
  void seek(std::int64_t vectors) override;
  std::string identity() const override;
  std::size_t pool_bytes() const;  ///< really used
  std::int64_t pool_rows() const;  ///< of each layer and kind, at most

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lexico
