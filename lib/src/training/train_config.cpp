#include "lexico/train_config.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "lexico/encoder.h"

namespace lexico {

void TrainConfig::validate() const {
  using detail::throw_invalid;
  if (recipe != "lexico" && recipe != "sgd")
    throw_invalid("recipe is '", recipe, "', must be lexico or sgd");
  if (num_atoms < 1 || num_atoms > 1 << 20)
    throw_invalid("num_atoms is ", num_atoms, ", must be in [1, 1048576]");
  if (sparsity < 1 || sparsity > num_atoms)
    throw_invalid("sparsity is ", sparsity, ", must be in [1, num_atoms = ", num_atoms, "]");
  Selection::from(selection);
  if (!(relative_tolerance >= 0 && relative_tolerance < 1))
    throw_invalid("relative_tolerance is ", relative_tolerance, ", must be in [0, 1)");
  if (vectors < 0 || vectors > 1'000'000'000'000'000)
    throw_invalid("vectors is ", vectors, ", must be in [0, 1e15] (0: the recipe's own)");
  if (batch_size < 0)
    throw_invalid("batch_size is ", batch_size, ", must be >= 0 (0: the recipe's own)");
  if (!(learning_rate >= 0 && learning_rate <= 1))  // of unit vectors
    throw_invalid("learning_rate is ", learning_rate, ", must be in [0, 1] (0: the recipe's own)");
  if (epochs < 1) throw_invalid("epochs is ", epochs, ", must be >= 1");
  if (initialization != "auto" && initialization != "random" && initialization != "samples")
    throw_invalid("initialization is '", initialization, "', must be random, samples or auto");
  if (threads < 0) throw_invalid("threads is ", threads, ", must be >= 0 (0: all)");
}

TrainConfig TrainConfig::resolved() const {
  TrainConfig c = *this;
  const bool published = recipe == "lexico";
  // Published: 20 epochs of 28,146 batches of 64 vectors (docs/training.md).
  if (c.vectors == 0)
    c.vectors = published ? std::int64_t{20} * 28146 * 64
                          : std::max<std::int64_t>(1'000'000, 500LL * num_atoms);
  if (c.batch_size == 0) c.batch_size = published ? 64 : 1024;
  if (c.learning_rate == 0) c.learning_rate = published ? 1e-4 : 1e-2;
  if (c.initialization == "auto") c.initialization = published ? "random" : "samples";
  return c;
}

}  // namespace lexico
