#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lexico-extract/config.h"

namespace lexico::apps {

/// Where the shards of a run go: one file, or a folder of them.
class Output {
 public:
  /// Looks, but changes nothing. @throws InvalidArgument if something is there that the options do
  /// not allow to touch; ResourceError if nothing can be written there.
  /// Several ranks share a folder, each its own shards; what is finished there is kept.
  Output(const ExtractConfig& config, const Ranks& ranks);

  bool is_one_file() const { return one_file_; }
  const std::string& path() const { return path_; }
  std::string file_of(std::size_t shard) const;

  /// Makes the folder, removes what --overwrite replaces (of its own shards, where ranks share the
  /// folder).
  /// @returns for each shard whether it is there already.
  /// @throws InvalidArgument if --resume finds files of another run.
  std::vector<bool> prepare(const Plan& plan);
  /// Whether the shard is there, whole and of this run. @throws InvalidArgument if it is of another
  /// run.
  bool is_finished(const Plan& plan, std::size_t shard) const;
  /// The same without a word about what is wrong.
  bool is_of(const Plan& plan, std::size_t shard) const;

 private:
  void remove_old_shards(const Plan& plan);

  Ranks ranks_;
  std::string path_;
  bool one_file_ = false, resume_ = false, overwrite_ = false;
};

}  // namespace lexico::apps
