#pragma once

#include <cstdint>
#include <string>

namespace lexico {

/// Everything that decides what a training run learns. Defaults live here and nowhere else; 0 or
/// "auto" asks for the recipe's own value, which `resolved` fills in.
struct TrainConfig {
  std::string recipe = "sgd";
  int num_atoms = 4096;
  int sparsity = 8;
  std::string selection = "omp";
  double relative_tolerance = 0.0;
  std::int64_t vectors = 0;
  int batch_size = 0;
  double learning_rate = 0.0;
  int epochs = 20;
  std::string initialization = "auto";
  std::uint64_t seed = 0;
  int threads = 0;
  std::string device = "cpu";

  /// @throws InvalidArgument naming the first field out of range, its value and its bound.
  void validate() const;
  /// The same with every 0 and "auto" replaced by the recipe's value.
  TrainConfig resolved() const;
  /// Steps in all: the budget in whole batches, the last one included. Of a resolved config.
  std::int64_t num_steps() const { return (vectors + batch_size - 1) / batch_size; }

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("recipe",
          self.recipe,
          "lexico: as published (random start, Adam, small batches); sgd: large batches, starts "
          "from samples, revives "
          "unused atoms");
    visit("num_atoms", self.num_atoms, "atoms per dictionary (the paper's N)");
    visit("sparsity", self.sparsity, "atoms per vector while training (the paper's s)");
    visit("selection",
          self.selection,
          "how pursuit picks an atom: omp, ols or ols-N (OLS among the N best)");
    visit("relative_tolerance",
          self.relative_tolerance,
          "stop a pursuit at this relative error; 0: always sparsity atoms");
    visit("vectors",
          self.vectors,
          "vectors each dictionary learns from; 0: 36,026,880 (lexico), max(1e6, 500 N) (sgd)");
    visit("batch_size",
          self.batch_size,
          "vectors of each dictionary per step; 0: 64 (lexico), 1024 (sgd)");
    visit("learning_rate",
          self.learning_rate,
          "Adam step size at the start, cosine to 0; 0: 1e-4 (lexico), 1e-2 (sgd)");
    visit("epochs",
          self.epochs,
          "lexico: the learning rate moves this many times in a run; sgd: it moves every step");
    visit("initialization",
          self.initialization,
          "random, samples, or auto: random (lexico), samples (sgd)");
    visit("seed", self.seed, "seed of every random choice");
    visit("threads", self.threads, "CPU threads; 0: all");
    visit("device", self.device, "cpu, cuda, cuda:1, or auto: cuda if there is one");
  }
};

}  // namespace lexico
