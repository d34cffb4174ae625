#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lexico-train/codes.h"
#include "lexico/train_config.h"

namespace lexico::apps {

/// What decides how much a run takes.
struct TrainSizes {
  TrainConfig train;  ///< resolved
  CodeConfig codes;
  std::int64_t dictionaries = 0;  ///< that are trained
  std::int64_t stored = 0;        ///< more where layers share one
  std::int64_t dim = 0, kv_heads = 0;
  std::int64_t pool_bytes = 0, pool_rows = 0;
  std::int64_t validation_rows = 0;
  bool resumes = false;
  bool writes_pt = false;
};

struct PlannedPhase {
  std::string name;
  double bytes = 0;     ///< of memory at its peak, all of the process
  double seconds = -1;  ///< < 0: not known
};

struct TrainPlan {
  std::vector<PlannedPhase> phases;  ///< reading, training, codes, report
  double device_bytes = 0;  ///< of a GPU's memory, beside torch and CUDA themselves; 0 on the CPU
  double checkpoint_bytes = 0;
  double beside_checkpoints = 0, left_beside_checkpoints = 0;  ///< while it trains, in the end
  bool one_checkpoint = false;  ///< it is over before the first one by the clock

  double disk_most_bytes() const;  ///< at any time
  double disk_left_bytes() const;  ///< in the end
  double most_bytes() const;
  double seconds() const;
};

/// @param resident  bytes of the process before the trainer is made, data opened.
/// @param steps     of the run: the length of its metrics.
TrainPlan plan_training(const TrainSizes& sizes, double resident, std::int64_t steps);

}  // namespace lexico::apps
