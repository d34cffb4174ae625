#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/ranks.h"
#include "common/text_plan.h"

namespace lexico::apps {

/// The options of lexico-extract.
struct ExtractConfig : TextPlanConfig, RankConfig {
  std::string output, key_stage = "post_rope";
  int threads = 0;
  std::int64_t shard_vectors = 0;
  std::uint64_t seed = 0;
  bool query_moments = false, resume = false, overwrite = false, dry_run = false, benchmark = false,
       json = false;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    TextPlanConfig::for_each_field(self, visit);
    visit("output", self.output, "FILE.h5, or a folder for shards activations-00000.h5, ...");
    visit("key_stage",
          self.key_stage,
          "keys after RoPE as the cache holds them (post_rope), or with it undone (pre_rope)");
    visit(
        "query_moments", self.query_moments, "also store the mean of q q^T per layer and KV head");
    visit("seed", self.seed, "which sequences are picked under max_vectors");
    visit("shard_vectors",
          self.shard_vectors,
          "vectors per layer and kind in each file of a folder; 0: files of about 2 GB");
    RankConfig::for_each_field(self, visit);
    visit("resume",
          self.resume,
          "keep the finished shards of the same run in OUTPUT and make the others");
    visit("overwrite", self.overwrite, "replace what is in OUTPUT");
    visit("dry_run",
          self.dry_run,
          "print the plan (tokens, vectors, bytes, free disk, time) and stop");
    visit("benchmark", self.benchmark, "also time the bare model on every third batch, to compare");
    visit("json", self.json, "print the result as JSON on stdout");
    visit("threads", self.threads, "CPU threads for the model; 0: all the machine has");
  }

  /// @throws InvalidArgument naming the option, its value and its bound.
  void validate() const;
};

}  // namespace lexico::apps
