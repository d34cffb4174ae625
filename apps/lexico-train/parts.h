#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/ranks.h"
#include "lexico-train/run_folder.h"
#include "lexico/dictionary.h"
#include "lexico/trainer.h"

namespace lexico::apps {

/// What training a part, or all of a run, has given.
struct Learned {
  DictionarySet dictionaries;     ///< sorted, with their frames
  std::vector<int> unused_atoms;  ///< of each target
  std::int64_t steps = 0, vectors = 0, bad_vectors = 0, skipped_batches = 0;
};

/// A run cut into parts, which ranks share out: rank r of n has parts r, r + n, ... Each part
/// trains its own dictionaries, with its own checkpoints and metrics, in
/// RUN/parts/<part>-of-<parts>; a run of one part needs no such folder. There are as many parts as
/// there were ranks when the run began, and any number of ranks may go on with them.
class Parts {
 public:
  /// @throws InvalidArgument if there are more parts than targets.
  Parts(std::string run, std::vector<TrainTarget> targets, int count);
  /// Of the run in a folder; 0: none has left anything to go on with. @throws ResourceError if the
  /// folder cannot be read.
  static int count_in(const std::string& run);

  int count() const { return count_; }
  bool many() const { return count_ > 1; }
  const std::vector<TrainTarget>& all_targets() const { return targets_; }
  /// Neighbours, so that a part reads few layers.
  std::vector<TrainTarget> targets(int part) const;
  std::string folder(int part) const;
  std::string name(int part) const;  ///< "part 2 of 4"

  /// Of a part that is done: written aside, synced, renamed. @param fingerprint  of its trainer.
  void write(int part,
             const Learned& learned,
             const std::map<std::string, std::string>& fingerprint) const;
  /// Nothing if the part is not done. @throws InvalidArgument naming what differs if it was trained
  /// with another `fingerprint`; IoError if the file is damaged.
  std::optional<Learned> read(int part,
                              const std::map<std::string, std::string>& fingerprint) const;
  /// The dictionaries that a rank has not finished, in words.
  std::string missing(Ranks ranks, int rank) const;

  /// A file SAVE in the run's folder becomes one in the folder of each part that is not done. It is
  /// looked for twice a second.
  void pass_on_save_request();

 private:
  std::string learned_file(int part) const;

  std::string run_;
  std::vector<TrainTarget> targets_;
  int count_;
  std::chrono::steady_clock::time_point last_look_ = {};
};

/// All parts together, as one process would have learnt them. @param parts  in order.
Learned merged(std::vector<Learned> parts);

/// Writes the metrics of all parts into those of the run; errors of a part that took other steps
/// (a budget in minutes) are those of its step before.
void merge_metrics(const Parts& parts, RunFolder& run);

}  // namespace lexico::apps
