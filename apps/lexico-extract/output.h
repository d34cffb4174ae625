#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lexico-extract/config.h"
#include "lexico-extract/plan.h"

namespace lexico::apps {

/// Where the shards of a run go: one file, or a folder of them.
class Output {
 public:
  /// Looks, but changes nothing. @throws InvalidArgument if something is there that the options do
  /// not allow to touch; ResourceError if nothing can be written there.
  explicit Output(const ExtractConfig& config);

  bool is_one_file() const { return one_file_; }
  const std::string& path() const { return path_; }
  std::string file_of(std::size_t shard) const;

  /// Makes the folder, removes what --overwrite replaces. @returns for each shard whether it is
  /// there already.
  /// @throws InvalidArgument if --resume finds files of another run.
  std::vector<bool> prepare(const Plan& plan);

 private:
  bool is_finished(const Plan& plan, std::size_t shard) const;

  std::string path_;
  bool one_file_ = false, resume_ = false, overwrite_ = false;
};

}  // namespace lexico::apps
