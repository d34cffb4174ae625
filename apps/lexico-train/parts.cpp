// A run in parts: what each leaves in its folder, and how the whole is made of it.
#include "lexico-train/parts.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "lexico/error.h"
#include "lexico/files.h"

namespace lexico::apps {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr const char* kFolder = "/parts/";
constexpr const char* kLearned = "/learned.safetensors";
constexpr double kLookEverySeconds = 0.5;

/// Lines of metrics.jsonl by step.
std::map<std::int64_t, Json> metrics_in(const std::string& folder) {
  std::map<std::int64_t, Json> lines;
  std::ifstream in(folder + "/metrics.jsonl");
  for (std::string text; std::getline(in, text);) {
    const Json line = Json::parse(text, nullptr, false);
    if (line.is_object()) lines[line.value("step", std::int64_t{0})] = line;
  }
  return lines;
}

}  // namespace

Parts::Parts(std::string run, std::vector<TrainTarget> targets, int count)
    : run_(std::move(run)), targets_(std::move(targets)), count_(count) {
  if (count < 1 || count > static_cast<int>(targets_.size()))
    throw InvalidArgument(run_ + ": holds a run of " + std::to_string(count) +
                          " parts, this one has " + std::to_string(targets_.size()) +
                          " dictionaries; start again with --overwrite or restore the settings");
}

int Parts::count_in(const std::string& run) {
  for (const fs::path& path : entries_of(run + kFolder)) {
    int part = 0, count = 0;
    if (std::sscanf(path.filename().c_str(), "%d-of-%d", &part, &count) == 2 && count > 1)
      return count;
  }
  for (const fs::path& path : entries_of(run + "/checkpoints"))
    if (path.extension() == ".safetensors") return 1;
  return 0;
}

std::vector<TrainTarget> Parts::targets(int part) const {
  const auto at = [&](int number) {
    return targets_.begin() + static_cast<std::ptrdiff_t>(targets_.size()) * number / count_;
  };
  return {at(part), at(part + 1)};
}

std::string Parts::folder(int part) const {
  if (!many()) return run_;
  char name[40];
  std::snprintf(name, sizeof name, "%05d-of-%05d", part + 1, count_);
  return run_ + kFolder + name;
}

std::string Parts::name(int part) const {
  return "part " + std::to_string(part + 1) + " of " + std::to_string(count_);
}

std::string Parts::learned_file(int part) const { return folder(part) + kLearned; }

void Parts::write(int part,
                  const Learned& learned,
                  const std::map<std::string, std::string>& fingerprint) const {
  DictionarySet set = learned.dictionaries;
  set.metadata = {{"trained_with", Json(fingerprint).dump()},
                  {"learned",
                   Json({{"unused_atoms", learned.unused_atoms},
                         {"steps", learned.steps},
                         {"vectors", learned.vectors},
                         {"bad_vectors", learned.bad_vectors},
                         {"skipped_batches", learned.skipped_batches}})
                       .dump()}};
  write_dictionaries(set, learned_file(part));
}

std::optional<Learned> Parts::read(int part,
                                   const std::map<std::string, std::string>& fingerprint) const {
  const std::string path = learned_file(part);
  std::error_code error;
  if (!fs::exists(path, error)) return {};
  Learned learned;
  learned.dictionaries = read_dictionaries(path);
  std::map<std::string, std::string>& metadata = learned.dictionaries.metadata;
  try {
    const Json with = Json::parse(metadata.at("trained_with"));
    for (const auto& [key, value] : fingerprint)
      if (const std::string own = with.value(key, ""); own != value)
        throw InvalidArgument(path + ": was trained with " + key + " = " + own + ", this run has " +
                              value + "; start again with --overwrite or restore the setting");
    const Json json = Json::parse(metadata.at("learned"));
    learned.unused_atoms = json.at("unused_atoms").get<std::vector<int>>();
    learned.steps = json.at("steps");
    learned.vectors = json.at("vectors");
    learned.bad_vectors = json.at("bad_vectors");
    learned.skipped_batches = json.at("skipped_batches");
  } catch (const InvalidArgument&) {
    throw;
  } catch (const std::exception& e) {
    throw IoError(path + ": is not what a part of a run has learned: " + e.what());
  }
  metadata.clear();
  if (learned.unused_atoms.size() != targets(part).size())
    throw IoError(path + ": holds " + std::to_string(learned.unused_atoms.size()) +
                  " dictionaries, " + name(part) + " has " + std::to_string(targets(part).size()));
  return learned;
}

std::string Parts::missing(Ranks ranks, int rank) const {
  constexpr int kNamed = 4;
  ranks.rank = rank;
  std::string text;
  int unnamed = 0, named = 0;
  for (int part = 0; part < count_; ++part) {
    if (!ranks.owns(static_cast<std::size_t>(part)) || !many()) continue;
    // Opening a file makes network file systems look again.
    if (std::ifstream(learned_file(part)).good()) continue;
    for (const TrainTarget& target : targets(part)) {
      if (++named > kNamed)
        ++unnamed;
      else
        text += (text.empty() ? "" : ", ") + name_of(target);
    }
  }
  return unnamed > 0 ? text + " and " + std::to_string(unnamed) + " more" : text;
}

void Parts::pass_on_save_request() {
  const auto now = std::chrono::steady_clock::now();
  if (!many() || std::chrono::duration<double>(now - last_look_).count() < kLookEverySeconds)
    return;
  last_look_ = now;
  std::error_code error;
  if (!fs::exists(run_ + "/SAVE", error)) return;
  for (int part = 0; part < count_; ++part)
    if (!fs::exists(learned_file(part), error)) std::ofstream(folder(part) + "/SAVE");
  fs::remove(run_ + "/SAVE", error);
}

Learned merged(std::vector<Learned> parts) {
  Learned all = std::move(parts.front());
  for (std::size_t i = 1; i < parts.size(); ++i) {
    Learned& part = parts[i];
    std::move(part.dictionaries.dictionaries.begin(),
              part.dictionaries.dictionaries.end(),
              std::back_inserter(all.dictionaries.dictionaries));
    all.unused_atoms.insert(
        all.unused_atoms.end(), part.unused_atoms.begin(), part.unused_atoms.end());
    all.steps = std::max(all.steps, part.steps);
    all.vectors = std::min(all.vectors, part.vectors);  // what each has seen at least
    all.bad_vectors += part.bad_vectors;
    all.skipped_batches += part.skipped_batches;
  }
  std::sort(all.dictionaries.dictionaries.begin(),
            all.dictionaries.dictionaries.end(),
            [](const Dictionary& a, const Dictionary& b) {
              return std::tuple(a.layer, a.kind, a.head) < std::tuple(b.layer, b.kind, b.head);
            });
  return all;
}

void merge_metrics(const Parts& parts, RunFolder& run) {
  std::error_code error;
  for (const fs::path& path : entries_of(run.path()))  // of an earlier merge
    if (path.filename().string().starts_with("events.out.tfevents.") && !fs::remove(path, error) &&
        error)
      throw ResourceError(path.string() + ": cannot be removed: " + error.message());
  run.open_metrics(parts.all_targets(), 0);

  std::vector<std::map<std::int64_t, Json>> lines;
  std::set<std::int64_t> steps;
  for (int part = 0; part < parts.count(); ++part) {
    lines.push_back(metrics_in(parts.folder(part)));
    if (lines.back().empty()) return;  // removed by hand: nothing to show
    for (const auto& [step, line] : lines.back()) steps.insert(step);
  }
  for (const std::int64_t step : steps) {
    TrainStep all;
    all.step = step;
    for (int part = 0; part < parts.count(); ++part) {
      const auto& own = lines[static_cast<std::size_t>(part)];
      const auto after = own.upper_bound(step);
      const Json& line = (after == own.begin() ? after : std::prev(after))->second;
      const auto share = static_cast<double>(parts.targets(part).size()) /
                         static_cast<double>(parts.all_targets().size());
      all.vectors = std::max(all.vectors, line.value("vectors", std::int64_t{0}));
      all.learning_rate = std::max(all.learning_rate, line.value("learning_rate", 0.0));
      all.loss += share * line.value("loss", 0.0);
      all.relative_error += share * line.value("relative_error", 0.0);
      const Json errors = line.value("relative_errors", Json::array());
      for (std::size_t i = 0; i < parts.targets(part).size(); ++i)
        all.relative_errors.push_back(
            i < errors.size() && errors[i].is_number() ? errors[i].get<double>() : 0.0);
    }
    run.log(all);
  }
}

}  // namespace lexico::apps
