#pragma once

#include <chrono>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/report/report.h"
#include "lexico-train/tensorboard.h"
#include "lexico/trainer.h"

namespace lexico::apps {

/// What a checkpoint keeps for the program, by name.
using CheckpointNotes = std::map<std::string, std::string>;

/// The folder a training run leaves behind (docs/formats.md, "A run folder"): config.yaml,
/// run.json, metrics.jsonl, metrics.csv, TensorBoard events, checkpoints/, dictionary.*, report.*.
class RunFolder {
 public:
  /// kResume begins a run where there is none.
  enum class IfExists { kRefuse, kResume, kOverwrite };
  /// @throws InvalidArgument if it exists and may not be used (says which flag would allow it),
  /// ResourceError if it
  ///         cannot be made.
  RunFolder(std::string path, IfExists if_exists);

  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

  /// Loads the newest checkpoint that is whole; a damaged one is named in a warning and the older
  /// one taken.
  /// @returns what it was saved with; nothing if there is no checkpoint.
  /// @throws IoError if there are only damaged ones.
  std::optional<CheckpointNotes> restore(Trainer& trainer);
  /// Writes checkpoints/step-<n>.safetensors, then removes damaged ones and all but the last two.
  void save_checkpoint(const Trainer& trainer, const CheckpointNotes& notes);
  /// Whether the user has asked for a checkpoint: a file SAVE in the folder. It is looked for twice
  /// a second.
  bool save_requested();
  /// Removes that file.
  void request_is_met();

  /// Opens the metrics files; lines after `step` (written by a run that was cut off) are dropped.
  void open_metrics(const std::vector<TrainTarget>& targets, std::int64_t step);
  /// One line in metrics.jsonl and metrics.csv, one point in each TensorBoard curve, one in the
  /// report's curves.
  void log(const TrainStep& step);
  void log_scalar(const std::string& tag, double value, std::int64_t step);
  /// The curves for the report, earlier parts of a resumed run included.
  const std::vector<report::TrainingSeries>& series() const { return series_; }

 private:
  void remove_old_checkpoints() const;
  void add_points(const std::string& json_line);

  std::string path_;
  std::vector<report::TrainingSeries> series_;
  std::vector<std::string> names_;  // of the series, as in the header of metrics.csv
  std::unique_ptr<TensorBoard> tensorboard_;
  std::vector<std::string> damaged_;  // checkpoints
  std::chrono::steady_clock::time_point last_look_ = {};
};

/// What is in a folder; nothing if there is none. @throws ResourceError: to take a folder that
/// cannot be read for an empty one would lose what is in it.
std::vector<std::filesystem::path> entries_of(const std::string& folder);

/// And those above it. @throws ResourceError.
void make_folder(const std::string& path);

/// Before hours of work. @throws IoError if `registry` is there but not a JSON map, ResourceError
/// if its folder is neither there nor the run's own.
void check_registry(const std::string& registry, const std::string& run_folder);

/// Merges {"<model>_N_<N>_s_<s>": path of the .pt relative to the registry's folder} into a JSON
/// file, as the published code looks dictionaries up. Other entries are kept. @throws IoError if
/// the file is there but not such a map.
void register_dictionary(const std::string& registry,
                         const std::string& model,
                         int num_atoms,
                         int sparsity,
                         const std::string& pt_path);

}  // namespace lexico::apps
