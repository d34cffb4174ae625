#include "lexico-extract/output.h"

#include <unistd.h>
#include <array>
#include <cstdio>
#include <filesystem>

#include "common/program.h"
#include "lexico/activations.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

namespace fs = std::filesystem;

bool is_shard_name(const std::string& name) {
  constexpr const char* kStart = "activations-";
  return name.rfind(kStart, 0) == 0 && (name.ends_with(".h5") || name.ends_with(".h5.partial"));
}

std::vector<fs::path> activation_files(const std::string& folder) {
  std::vector<fs::path> files;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error))
    if (entry->path().extension() == ".h5") files.push_back(entry->path());
  if (error) throw ResourceError(folder + ": " + error.message());
  return files;
}

void make_folder(const fs::path& folder) {
  std::error_code error;
  if (!folder.empty()) fs::create_directories(folder, error);
  if (error) throw ResourceError(folder.string() + ": cannot be made: " + error.message());
}

}  // namespace

Output::Output(const ExtractConfig& config, const Ranks& ranks)
    : ranks_(ranks),
      path_(config.output),
      one_file_(fs::path(config.output).extension() == ".h5"),
      resume_(config.resume || (ranks.many() && !config.overwrite)),
      overwrite_(config.overwrite) {
  if (ranks.many() && one_file_)
    throw InvalidArgument(path_ + ": one file cannot be shared by " + std::to_string(ranks.size) +
                          " ranks; --output must be a folder");
  while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
  std::error_code error;
  const fs::file_status status = fs::status(path_, error);
  if (status.type() == fs::file_type::none) throw ResourceError(path_ + ": " + error.message());
  const bool may_touch = resume_ || overwrite_ || config.dry_run;
  constexpr const char* kHow = " (--resume goes on with it, --overwrite replaces it)";
  if (!fs::exists(status)) return;
  if (fs::is_directory(status)) {
    if (one_file_)
      throw InvalidArgument(path_ + ": is a folder, and its name ends in .h5 like a file's");
    if (!may_touch && !activation_files(path_).empty())
      throw InvalidArgument(path_ + ": holds activations already" + kHow);
    return;
  }
  if (!fs::is_regular_file(status))
    throw ResourceError(path_ + ": cannot be written: is neither a file nor a folder");
  if (!one_file_)
    throw InvalidArgument(path_ + ": is a file; --output must be a folder or end in .h5");
  if (!may_touch) throw InvalidArgument(path_ + ": exists" + kHow);
}

std::string Output::file_of(std::size_t shard) const {
  if (one_file_) return path_;
  std::array<char, 40> name;
  std::snprintf(name.data(), name.size(), "activations-%05zu.h5", shard);
  return (fs::path(path_) / name.data()).string();
}

bool Output::is_of(const Plan& plan, std::size_t shard) const {
  try {
    return ActivationReader(file_of(shard)).info().plan_hash == plan.info.plan_hash;
  } catch (const IoError&) {
    return false;
  }
}

bool Output::is_finished(const Plan& plan, std::size_t shard) const {
  const std::string file = file_of(shard);
  if (!fs::exists(file)) return false;
  try {
    const ActivationInfo own = ActivationReader(file).info();
    if (own.plan_hash != plan.info.plan_hash || own.shard_index != static_cast<int>(shard))
      throw InvalidArgument(file +
                            ": was made with another model, text or settings: it cannot be resumed "
                            "(--overwrite replaces it)");
    return true;
  } catch (const IoError& error) {
    log_warning(std::string(error.what()) + "; it is made again");
    return false;
  }
}

void Output::remove_old_shards(const Plan& plan) {
  std::vector<fs::path> old;
  for (const fs::directory_entry& entry : fs::directory_iterator(path_)) {
    const std::string name = entry.path().filename().string();
    if (!is_shard_name(name)) continue;
    // Every rank removes its own, the first one also those that the run has no more.
    std::size_t shard = 0;
    const bool numbered = std::sscanf(name.c_str(), "activations-%zu.", &shard) == 1;
    const bool ours = numbered && shard < plan.shards.size() ? ranks_.owns(shard) : ranks_.leads();
    if (ours) old.push_back(entry.path());
  }
  for (const fs::path& path : old) {
    std::error_code error;
    if (!fs::remove(path, error) && error)
      throw ResourceError(path.string() + ": cannot be removed: " + error.message());
  }
}

std::vector<bool> Output::prepare(const Plan& plan) {
  std::vector<bool> finished(plan.shards.size(), false);
  if (one_file_) {
    make_folder(fs::path(path_).parent_path());
    if (resume_) finished[0] = is_finished(plan, 0);
    return finished;
  }
  make_folder(path_);
  if (resume_)
    for (std::size_t i = 0; i < finished.size(); ++i) finished[i] = is_finished(plan, i);
  if (overwrite_) remove_old_shards(plan);
  for (const fs::path& path : activation_files(path_)) {
    bool ours = false;
    for (std::size_t i = 0; i < finished.size() && !ours; ++i) ours = path == file_of(i);
    if (!ours)
      throw InvalidArgument(
          path.string() + ": is no file of this run, but would be read with it: move it elsewhere");
  }
  return finished;
}

}  // namespace lexico::apps
