#pragma once

#include <cstdint>
#include <string>

#include "lexico/kind.h"

namespace lexico {

/// Everything that decides what a training run learns. Defaults live here and nowhere else; 0 or
/// "auto" asks for the recipe's own value, which `resolved` fills in.
struct TrainConfig {
  std::string recipe = "sgd";
  int num_atoms = 4096;
  int sparsity = 8, key_sparsity = 0, value_sparsity = 0;
  std::string selection = "omp";
  double relative_tolerance = 0.0;
  std::int64_t vectors = 0;
  double minutes = 0.0;
  int batch_size = 0;
  double learning_rate = 0.0;
  int epochs = 20;
  double window = 10.0;
  double finish = 0.0;
  std::string initialization = "auto";
  std::string initial;
  std::string mean = "auto", scale = "none", dictionaries = "layer", layer_groups, metric = "none";
  std::int64_t position_offsets = 0;
  std::uint64_t seed = 0;
  int threads = 0;
  std::string device = "cpu";

  /// @throws InvalidArgument naming the first field out of range, its value and its bound.
  void validate() const;
  /// The same with every 0 and "auto" replaced by the recipe's value; `vectors` stays 0 where
  /// `minutes` decide it.
  TrainConfig resolved() const;
  /// Steps in all: the budget in whole batches, the last one included. Of a resolved config; 0 as
  /// long as `minutes` have not been turned into vectors.
  std::int64_t num_steps() const { return (vectors + batch_size - 1) / batch_size; }
  /// Atoms per vector of this kind.
  int sparsity_of(Kind kind) const {
    const int own = kind == Kind::kKeys ? key_sparsity : value_sparsity;
    return own > 0 ? own : sparsity;
  }

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("recipe",
          self.recipe,
          "sgd: Adam on large batches, starts from samples, revives unused atoms; online: "
          "block coordinate descent on co-occurrence sums, no learning rate, good at any time; "
          "lexico: as published (random start, Adam, small batches)");
    visit("num_atoms", self.num_atoms, "atoms per dictionary (the paper's N)");
    visit("sparsity",
          self.sparsity,
          "atoms per vector while training (the paper's s): train with what will be used; "
          "lexico-train, 0: 3 where a residual code follows (coding packed), else 8");
    visit("key_sparsity", self.key_sparsity, "of keys alone; 0: sparsity");
    visit("value_sparsity", self.value_sparsity, "of values alone; 0: sparsity");
    visit("selection",
          self.selection,
          "how pursuit picks an atom: omp, ols or ols-N (OLS among the N best; among all of up to "
          "64 N)");
    visit("relative_tolerance",
          self.relative_tolerance,
          "stop a pursuit at this relative error; 0: always sparsity atoms");
    visit("vectors",
          self.vectors,
          "vectors each dictionary learns from; 0: 36,026,880 (lexico), max(1.2e6, 500 N) (sgd), "
          "300 N (online)");
    visit("minutes",
          self.minutes,
          "train this long instead of a number of vectors; the schedule is fitted to the speed of "
          "the first steps, so that two runs differ; 0: as vectors says");
    visit("batch_size",
          self.batch_size,
          "vectors of each dictionary per step; 0: 64 (lexico), 1024 (sgd), 2048 (online)");
    visit("learning_rate",
          self.learning_rate,
          "Adam step size at the start, cosine to 0; 0: 1e-4 (lexico), 2e-2 (sgd and the finish of "
          "online)");
    visit("epochs",
          self.epochs,
          "lexico: the learning rate moves this many times in a run; else it moves every step");
    visit("window",
          self.window,
          "online: the sums forget what is older than this many vectors per atom");
    visit("finish",
          self.finish,
          "online: share of the budget that annealed sgd takes at the end, 0 to 1");
    visit("initialization",
          self.initialization,
          "random, samples, or auto: random (lexico), samples (sgd, online)");
    visit(
        "initial",
        self.initial,
        "dictionaries to start from (fine-tuning): dictionary.safetensors or a run folder; empty: "
        "as initialization says");
    visit("mean",
          self.mean,
          "head: subtract the mean of each KV head before coding (stored, added back); none; auto: "
          "head where keys are pre_rope, none for post_rope keys and recipe lexico");
    visit("scale",
          self.scale,
          "unit: vectors count for learning by direction alone; none: longer ones count more");
    visit("dictionaries",
          self.dictionaries,
          "layer: one for all KV heads of a layer (as published); head: one for each KV head");
    visit(
        "layer_groups",
        self.layer_groups,
        "layers that share a dictionary, as 0-2,3-5; the others have their own; empty: none share");
    visit("metric",
          self.metric,
          "queries: errors of pre-RoPE keys count as the stored query moments weigh them; none");
    visit(
        "position_offsets",
        self.position_offsets,
        "post-RoPE keys are learnt at positions moved by a random offset below this; 0: as dumped");
    visit("seed", self.seed, "seed of every random choice");
    visit("threads", self.threads, "CPU threads; 0: all");
    visit("device", self.device, "cpu, cuda, cuda:1, or auto: cuda if there is one");
  }
};

}  // namespace lexico
