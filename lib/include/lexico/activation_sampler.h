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

class ActivationSource;

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

/// Shuffled vectors of a source of activations, endless: each epoch is a permutation of all rows in
/// use. Two levels: chunks (batches of the model's forward, at least 2,048 rows together) are
/// permuted; pools of chunks are held in memory as they are stored, and the rows of a pool are
/// permuted. The next pool is loaded in the background while one is given out. A run that fits
/// into memory as a whole is loaded once; from its second epoch on it is one pool. All targets get
/// the same rows in the same order; targets of one head each get the same tokens, and a target of
/// several layers gets each row from one of them, another one in the next epoch.
///
/// The order depends on the source's batches, the seed, the numbers given to the constructor and
/// nothing else: a dump and the model that made it give the same vectors.
class ActivationSampler : public VectorStream {
 public:
  /// @param source      must outlive the sampler, which alone may use it between `next` and
  ///                    `pause`.
  /// @param num_rows    rows [0, num_rows) are used (whole tokens only, where targets have heads);
  ///                    the rest is left for validation.
  /// @param pool_bytes  memory for pools, if all layers were trained: what is held does not depend
  ///                    on which are, and the order neither. Two chunks are held at least.
  /// @param vectors     of each dictionary that the run will take: later ones are not loaded ahead.
  ///                    0: not known.
  /// @throws InvalidArgument if num_rows < 1, a target is not in the source, or only some targets
  /// have heads.
  ActivationSampler(ActivationSource& source,
                    std::vector<TrainTarget> targets,
                    std::int64_t num_rows,
                    std::uint64_t seed,
                    std::size_t pool_bytes,
                    std::int64_t vectors = 0);
  ~ActivationSampler() override;
  ActivationSampler(ActivationSampler&&) noexcept;

  /// From now on vectors come in the frame that a config asks for: means over 65,536 rows (the
  /// first chunks of the first epoch), as they are learnt from (positions moved); metrics from the
  /// source's query moments. The same for the same arguments.
  /// @throws InvalidArgument if the data does not have what the config needs: query moments, keys
  /// of the right stage, a rotation.
  const TrainingFrame& fit_frame(const TrainConfig& config);
  const TrainingFrame& frame() const;

  int num_dictionaries() const override;
  int dim() const override;
  void next(std::int64_t count, float* out) override;
  void seek(std::int64_t vectors) override;
  void pause() override;
  std::string identity() const override;
  std::size_t pool_bytes() const;     ///< really used, at most
  std::int64_t pool_rows() const;     ///< of each dataset, that are in memory at most
  std::int64_t rows_to_load() const;  ///< of each dataset, in a run of `vectors`; 0: not known

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lexico
