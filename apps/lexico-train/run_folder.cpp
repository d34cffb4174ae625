#include "lexico-train/run_folder.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>
#include <system_error>
#include <utility>

#include "common/json_text.h"
#include "common/options.h"
#include "common/program.h"
#include "common/ranks.h"
#include "lexico/error.h"
#include "lexico/files.h"

namespace lexico::apps {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr std::size_t kKeptCheckpoints = 2;
constexpr const char* kSaveRequest = "SAVE";
constexpr double kLookEverySeconds = 0.5;  // for a request to save

/// What a run may have left; nothing else is ever removed.
bool is_ours(const fs::path& path) {
  const std::string name = path.filename().string();
  for (const char* own : {"config.yaml",
                          "run.json",
                          "metrics.jsonl",
                          "metrics.csv",
                          "checkpoints",
                          kSaveRequest,
                          "parts",
                          "learned.safetensors",
                          "path_to_dictionary.json"})
    if (name == own) return true;
  return name.starts_with(kRankFiles) || name.starts_with("dictionary.") ||
         name.starts_with("report.") || name.starts_with("events.out.tfevents.") ||
         name.ends_with(".partial");
}

/// Nothing but what ranks that wait for this one have put there.
bool is_as_empty(const std::string& folder) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error))
    if (!entry.path().filename().string().starts_with(kRankFiles)) return false;
  return true;
}

}  // namespace

std::vector<fs::path> entries_of(const std::string& folder) {
  std::vector<fs::path> paths;
  try {
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) paths.push_back(entry);
  } catch (const fs::filesystem_error& e) {
    if (e.code() != std::errc::no_such_file_or_directory &&
        e.code() != std::errc::not_a_directory)  // is named later
      throw ResourceError(folder + ": cannot be read: " + e.code().message());
  }
  return paths;
}

void make_folder(const std::string& path) {
  std::error_code error;
  if (fs::create_directories(path, error)) sync_folder(fs::absolute(path).parent_path().string());
  if (error) throw ResourceError(path + ": cannot make the folder: " + error.message());
}

namespace {

/// What a run that was cut off was about to write.
void remove_left_over(const std::string& folder) {
  std::error_code error;
  for (const fs::path& path : entries_of(folder))
    if (path.extension() == kPartialSuffix &&
        (is_ours(path.stem()) || path.stem().extension() == ".safetensors") &&
        !fs::remove(path, error) && error)
      throw ResourceError(path.string() + ": cannot be removed: " + error.message());
}

/// Not worth losing a run over.
void remove_or_warn(const std::string& path) {
  std::error_code error;
  if (!fs::remove(path, error) && error)
    log_warning(path + ": cannot be removed: " + error.message());
}

/// Newest first; numbers have one width.
std::vector<fs::path> checkpoints_in(const std::string& folder) {
  std::vector<fs::path> paths = entries_of(folder);
  std::erase_if(paths, [](const fs::path& path) { return path.extension() != ".safetensors"; });
  std::sort(paths.rbegin(), paths.rend());
  return paths;
}

std::string name_of_series(const TrainTarget& target) {
  char number[16];
  std::snprintf(number, sizeof number, "layer%02d", target.layer);
  std::string name = number;
  for (int layer : target.more_layers) name += "+" + std::to_string(layer);
  name += std::string("_") + name_of(target.kind);
  if (target.head >= 0) name += "_head" + std::to_string(target.head);
  return name;
}

std::string csv_line(const Json& line) {
  std::string text;
  for (const auto& [key, value] : line.items()) {
    if (value.is_array()) {
      for (const auto& item : value) text += "," + item.dump();
    } else {
      text += (text.empty() ? "" : ",") + value.dump();
    }
  }
  return text + "\n";
}

Json read_registry(const std::string& registry) {
  std::error_code error;
  if (!fs::exists(registry, error)) return Json::object();
  Json map = Json::parse(read_file(registry), nullptr, false);
  if (!map.is_object())
    throw IoError(registry +
                  ": is not a JSON map of names to paths; move it away or name another --registry");
  return map;
}

}  // namespace

RunFolder::RunFolder(std::string path, IfExists if_exists) : path_(std::move(path)) {
  std::error_code error;
  if (fs::exists(path_, error) && !fs::is_directory(path_, error))
    throw ResourceError(
        path_ + ": cannot be written: is not a folder; --output names the folder of the run");
  const bool is_run = fs::exists(file("run.json"), error);
  if (if_exists == IfExists::kResume && !is_run) {
    for (const fs::path& entry : entries_of(path_))
      if (!is_ours(entry))
        throw InvalidArgument(path_ + ": holds other files and no run to resume");
  }
  if (if_exists == IfExists::kRefuse && fs::is_directory(path_, error) && !is_as_empty(path_))
    throw InvalidArgument(
        path_ + ": is not empty; --resume goes on with the run in it, --overwrite starts again");
  if (if_exists == IfExists::kOverwrite && fs::is_directory(path_, error)) {
    std::vector<fs::path> old;
    bool others = false;
    for (const fs::path& entry : entries_of(path_)) {
      if (is_ours(entry))
        old.push_back(entry);
      else
        others = true;
    }
    if (others && !is_run)
      throw InvalidArgument(path_ + ": holds other files and no run; choose another --output");
    for (const fs::path& entry : old)
      if (!error) fs::remove_all(entry, error);
    if (error) throw ResourceError(path_ + ": cannot remove the old run: " + error.message());
  }
  make_folder(path_);
  make_folder(file("checkpoints"));
  if (if_exists == IfExists::kResume) {
    remove_left_over(path_);
    remove_left_over(file("checkpoints"));
  }
}

std::optional<CheckpointNotes> RunFolder::restore(Trainer& trainer) {
  const std::string folder = file("checkpoints");
  for (const fs::path& path : checkpoints_in(folder)) {
    try {
      CheckpointNotes notes = trainer.load(path.string());
      if (!damaged_.empty())
        log_warning("going on from the older " + path.string() + ", step " +
                    std::to_string(trainer.step()));
      remove_old_checkpoints();
      return notes;
    } catch (const IoError& e) {
      log_warning(std::string("left out a damaged checkpoint: ") + e.what());
      damaged_.push_back(path.string());
    }
  }
  if (!damaged_.empty())
    throw IoError(folder + ": no checkpoint there is whole (" + std::to_string(damaged_.size()) +
                  " damaged): put back a copy of one, or start again with --overwrite");
  return std::nullopt;
}

void RunFolder::save_checkpoint(const Trainer& trainer, const CheckpointNotes& notes) {
  char name[64];
  std::snprintf(name,
                sizeof name,
                "checkpoints/step-%010lld.safetensors",
                static_cast<long long>(trainer.step()));
  sync_file(file("metrics.jsonl"));  // the checkpoint counts on its lines
  trainer.save(file(name), notes);
  std::erase(damaged_, file(name));
  for (const std::string& path : std::exchange(damaged_, {})) remove_or_warn(path);
  remove_old_checkpoints();
}

void RunFolder::remove_old_checkpoints() const {
  std::size_t kept = 0;
  for (const fs::path& path : checkpoints_in(file("checkpoints")))
    if (std::find(damaged_.begin(), damaged_.end(), path.string()) == damaged_.end() &&
        ++kept > kKeptCheckpoints)
      remove_or_warn(path.string());
}

bool RunFolder::save_requested() {
  const auto now = std::chrono::steady_clock::now();
  if (std::chrono::duration<double>(now - last_look_).count() < kLookEverySeconds) return false;
  last_look_ = now;
  std::error_code error;
  return fs::exists(file(kSaveRequest), error);
}

void RunFolder::request_is_met() {
  std::error_code error;
  if (fs::exists(file(kSaveRequest), error)) remove_or_warn(file(kSaveRequest));
}

void RunFolder::open_metrics(const std::vector<TrainTarget>& targets, std::int64_t step) {
  for (const TrainTarget& target : targets) {
    series_.push_back({target.layer, target.kind, {}, -1});
    names_.push_back(name_of_series(target));
  }
  std::string kept_lines, csv = "step,vectors,learning_rate,loss,relative_error";
  for (const std::string& name : names_) csv += "," + name;
  csv += "\n";
  std::error_code error;
  std::istringstream in(fs::exists(file("metrics.jsonl"), error) ? read_file(file("metrics.jsonl"))
                                                                 : "");
  for (std::string line; std::getline(in, line);) {
    const Json json = Json::parse(line, nullptr, false);
    if (!json.is_object() || json.value("step", std::int64_t{0}) > step || step == 0) continue;
    kept_lines += line + "\n";
    csv += csv_line(json);
    add_points(line);
  }
  write_file(file("metrics.jsonl"), kept_lines);
  write_file(file("metrics.csv"), csv);
  tensorboard_ = std::make_unique<TensorBoard>(path_);
}

void RunFolder::add_points(const std::string& json_line) {
  const Json line = Json::parse(json_line, nullptr, false);
  const Json errors = line.value("relative_errors", Json::array());
  for (std::size_t i = 0; i < series_.size() && i < errors.size(); ++i)
    series_[i].points.push_back({line.value("vectors", std::int64_t{0}),
                                 line.value("loss", 0.0),
                                 errors[i].get<double>(),
                                 line.value("learning_rate", 0.0)});
}

void RunFolder::log(const TrainStep& step) {
  Json line;
  line["step"] = step.step;
  line["vectors"] = step.vectors;
  line["learning_rate"] = step.learning_rate;
  line["loss"] = step.loss;
  line["relative_error"] = step.relative_error;
  line["relative_errors"] = step.relative_errors;
  append_file(file("metrics.jsonl"), line.dump() + "\n");
  append_file(file("metrics.csv"), csv_line(line));
  add_points(line.dump());
  std::vector<std::pair<std::string, double>> values = {
      {"Loss/train", step.loss},
      {"RelativeReconstructionError/train", step.relative_error},
      {"LearningRate", step.learning_rate}};
  for (std::size_t i = 0; i < series_.size(); ++i)
    values.emplace_back("RelativeReconstructionError/train_" + names_[i], step.relative_errors[i]);
  tensorboard_->scalars(values, step.step);
}

void RunFolder::log_scalar(const std::string& tag, double value, std::int64_t step) {
  tensorboard_->scalars({{tag, value}}, step);
}

void check_registry(const std::string& registry, const std::string& run_folder) {
  read_registry(registry);
  const auto folder_of = [](const fs::path& file) {
    return fs::absolute(file).lexically_normal().parent_path();
  };
  const fs::path folder = folder_of(registry);
  std::error_code error;
  if (folder != folder_of(run_folder + "/file") && !fs::is_directory(folder, error))
    throw ResourceError(registry + ": cannot be written: " + folder.string() + " is no folder");
}

void register_dictionary(const std::string& registry,
                         const std::string& model,
                         int num_atoms,
                         int sparsity,
                         const std::string& pt_path) {
  Json map = read_registry(registry);
  std::string key = model;
  std::replace(key.begin(), key.end(), '/', '_');
  key += "_N_" + std::to_string(num_atoms) + "_s_" + std::to_string(sparsity);
  const fs::path folder = fs::absolute(registry).parent_path();
  map[key] = fs::absolute(pt_path).lexically_relative(folder).string();
  write_file(registry, json_text(map));
}

}  // namespace lexico::apps
