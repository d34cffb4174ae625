#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lexico/dictionary.h"
#include "lexico/error.h"
#include "lexico/train_config.h"

namespace lexico {

/// One dictionary to be trained.
struct TrainTarget {
  int layer = 0;  ///< of a group: the first
  Kind kind = Kind::kKeys;
  int head = -1;                      ///< the KV head it serves; -1: all of the layer
  std::vector<int> more_layers = {};  ///< that share it
};

/// "layer 3 keys", "layer 3 keys, head 1", "layers 0, 1, 2 values".
std::string name_of(const TrainTarget& target);

/// Where training vectors come from: an endless stream, the same for the same seed.
class VectorStream {
 public:
  virtual ~VectorStream() = default;
  virtual int num_dictionaries() const = 0;
  virtual int dim() const = 0;
  /// The next `count` vectors of each dictionary: out [num_dictionaries, count, dim].
  virtual void next(std::int64_t count, float* out) = 0;
  /// Continues as if `vectors` of each dictionary had been taken from the start.
  virtual void seek(std::int64_t vectors) = 0;
  /// Reads nothing ahead any more, until `next`: what the stream reads from is the caller's again.
  virtual void pause() {}
  /// What decides the vectors, as text: a checkpoint belongs to streams of equal identity.
  virtual std::string identity() const { return {}; }
};

/// One step, as an observer sees it.
struct TrainStep {
  std::int64_t step = 0;       ///< counts from 1
  std::int64_t num_steps = 0;  ///< 0: not known yet (a budget in minutes)
  std::int64_t vectors = 0;    ///< of each dictionary, so far
  double learning_rate = 0;
  double loss = 0;            ///< mean of (x - D y)^2 over batch, dictionaries and channels
  double relative_error = 0;  ///< mean of |x - D y| / (|x| + 1e-8) over batch and dictionaries
  std::vector<double> relative_errors;  ///< the same, of each dictionary; without a usable vector
                                        ///< in the batch, that of the step before
  std::int64_t bad_vectors = 0;         ///< vectors with NaN or Inf met so far, left out
  std::int64_t skipped_batches = 0;     ///< of one dictionary, with no other vectors; so far
  std::int64_t revived_atoms = 0;       ///< so far
};

class TrainObserver {
 public:
  virtual ~TrainObserver() = default;
  virtual void on_step(const TrainStep& step) = 0;
  /// Asked after every step; true ends `run` early, ready to be saved and resumed.
  virtual bool wants_stop() { return false; }
};

/// Training went wrong: a dictionary codes no better than random directions, after it did, or holds
/// no numbers any more. The message gives advice; the trainer then holds the best atoms so far.
class Diverged : public InvalidArgument {
 public:
  using InvalidArgument::InvalidArgument;
};

/// What decides the result, as text by name: a checkpoint of another run must not be loaded.
/// @param config  resolved.
std::map<std::string, std::string> fingerprint(const TrainConfig& config,
                                               const std::vector<TrainTarget>& targets,
                                               const VectorStream& stream,
                                               int dictionaries_of_job);

/// Learns one dictionary per target, all side by side: pursuit in the loop, gradient descent on the
/// atoms (or block coordinate descent), unit norm. Source: Lexico, arXiv:2412.08890; recipe
/// `lexico` follows the released trainer step by step (docs/training.md). On the CPU the result
/// depends on the seed and the config alone, not on the thread count; that of one target does not
/// depend on which others are trained beside it.
class Trainer {
 public:
  /// @param stream  gives vectors for the targets, in their order; must outlive the trainer.
  /// @param initial  empty, or one dictionary per target to start from, [targets, num_atoms, dim].
  ///                 Reading the file that config.initial names is the caller's part.
  /// @param dictionaries_of_job  how many are trained in all, where others are trained elsewhere:
  ///                 recipe `lexico` takes one mean over all of them. 0: no others.
  /// @throws InvalidArgument if the config is out of range or does not fit the stream's dim;
  /// ResourceError if the
  ///         device is not there or has too little memory.
  Trainer(const TrainConfig& config,
          std::vector<TrainTarget> targets,
          VectorStream& stream,
          const std::vector<float>& initial = {},
          int dictionaries_of_job = 0);
  ~Trainer();

  const TrainConfig& config() const;  ///< resolved; of a budget in minutes once it is known

  /// Trains until the budget is used or the observer wants to stop; the stream is read in the
  /// background meanwhile, and not after it returns. The next batch is read while a step runs.
  /// @returns whether the budget is used.
  /// @throws IoError if a dictionary meets nothing but NaN and Inf from the start, or vectors too
  /// large to square; Diverged.
  bool run(TrainObserver& observer);

  /// The dictionaries as they are now, unit norm.
  DictionarySet dictionaries() const;
  std::int64_t step() const;
  /// As TrainStep has them.
  std::int64_t bad_vectors() const;
  std::int64_t skipped_batches() const;
  /// For each target, atoms that no vector of the last `20 * num_atoms` used.
  std::vector<int> unused_atoms() const;

  /// Everything a later `load` needs to go on to the same result, ended by a checksum of all of it;
  /// written aside, synced, renamed. `notes` are the caller's, given back by `load`.
  /// @throws ResourceError naming the file.
  void save(const std::string& path, const std::map<std::string, std::string>& notes = {}) const;
  /// Needs as much memory again as the file has bytes. @returns the notes of `save`.
  /// @throws IoError if any byte of the file is not as it was written; InvalidArgument if it
  /// belongs to another config or other targets (names the difference). The trainer is then as it
  /// was.
  std::map<std::string, std::string> load(const std::string& path);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// The atoms of the targets in dictionaries read from `path`, to start from: [targets, num_atoms,
/// dim]. @throws InvalidArgument naming both sides if a layer, the number of atoms, the dim or the
/// key stage does not fit.
std::vector<float> initial_atoms(const DictionarySet& set,
                                 const std::string& path,
                                 const std::vector<TrainTarget>& targets,
                                 const TrainConfig& config,
                                 int dim,
                                 KeyStage key_stage);

}  // namespace lexico
