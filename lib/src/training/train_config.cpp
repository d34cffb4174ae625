#include "lexico/train_config.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "check.h"
#include "lexico/encoder.h"

namespace lexico {

void TrainConfig::validate() const {
  using detail::throw_invalid;
  const auto one_of =
      [](const char* name, const std::string& value, std::initializer_list<const char*> allowed) {
        std::string names;
        for (const char* a : allowed) {
          if (value == a) return;
          names += (names.empty()                                   ? ""
                    : names.size() > 0 && a == *(allowed.end() - 1) ? " or "
                                                                    : ", ") +
                   std::string(a);
        }
        throw_invalid(name, " is '", value, "', must be ", names);
      };
  one_of("recipe", recipe, {"lexico", "sgd", "online"});
  if (num_atoms < 1 || num_atoms > 1 << 20)
    throw_invalid("num_atoms is ", num_atoms, ", must be in [1, 1048576]");
  if (sparsity < 1 || sparsity > num_atoms)
    throw_invalid("sparsity is ", sparsity, ", must be in [1, num_atoms = ", num_atoms, "]");
  for (const auto& [name, value] :
       {std::pair{"key_sparsity", key_sparsity}, std::pair{"value_sparsity", value_sparsity}})
    if (value < 0 || value > num_atoms)
      throw_invalid(
          name, " is ", value, ", must be in [0, num_atoms = ", num_atoms, "] (0: sparsity)");
  Selection::from(selection);
  if (!(relative_tolerance >= 0 && relative_tolerance < 1))
    throw_invalid("relative_tolerance is ", relative_tolerance, ", must be in [0, 1)");
  if (vectors < 0 || vectors > 1'000'000'000'000'000)
    throw_invalid("vectors is ", vectors, ", must be in [0, 1e15] (0: the recipe's own)");
  if (!(minutes >= 0 && minutes <= 1e6))
    throw_invalid("minutes is ", minutes, ", must be in [0, 1e6] (0: as vectors says)");
  if (minutes > 0 && vectors > 0)
    throw_invalid("vectors is ", vectors, " and minutes is ", minutes, ": give one of them");
  if (batch_size < 0)
    throw_invalid("batch_size is ", batch_size, ", must be >= 0 (0: the recipe's own)");
  if (!(learning_rate >= 0 && learning_rate <= 1))  // of unit vectors
    throw_invalid("learning_rate is ", learning_rate, ", must be in [0, 1] (0: the recipe's own)");
  if (epochs < 1) throw_invalid("epochs is ", epochs, ", must be >= 1");
  if (!(window > 0 && window <= 1e6))
    throw_invalid("window is ", window, ", must be in (0, 1e6] vectors per atom");
  if (!(finish >= 0 && finish <= 1)) throw_invalid("finish is ", finish, ", must be in [0, 1]");
  if (finish > 0 && recipe != "online")
    throw_invalid("finish is ", finish, ", which needs recipe online; the recipe is ", recipe);
  one_of("initialization", initialization, {"random", "samples", "auto"});
  one_of("mean", mean, {"head", "none", "auto"});
  one_of("scale", scale, {"none", "unit"});
  one_of("dictionaries", dictionaries, {"layer", "head"});
  one_of("metric", metric, {"none", "queries"});
  if (position_offsets < 0 || position_offsets > 1 << 24)
    throw_invalid("position_offsets is ", position_offsets, ", must be in [0, 16777216]");
  if (threads < 0) throw_invalid("threads is ", threads, ", must be >= 0 (0: all)");
}

TrainConfig TrainConfig::resolved() const {
  TrainConfig c = *this;
  const bool published = recipe == "lexico";
  const bool online = recipe == "online";
  // Published: 20 epochs of 28,146 batches of 64 vectors (docs/training.md).
  if (c.vectors == 0 && c.minutes == 0)
    c.vectors = published ? std::int64_t{20} * 28146 * 64
                : online  ? std::int64_t{300} * num_atoms
                          : std::max<std::int64_t>(1'200'000, 500LL * num_atoms);
  if (c.batch_size == 0) c.batch_size = published ? 64 : online ? 2048 : 1024;
  if (c.learning_rate == 0) c.learning_rate = published ? 1e-4 : 2e-2;
  if (c.initialization == "auto") c.initialization = published ? "random" : "samples";
  if (c.key_sparsity == 0) c.key_sparsity = sparsity;
  if (c.value_sparsity == 0) c.value_sparsity = sparsity;
  c.sparsity = std::max(c.key_sparsity, c.value_sparsity);
  return c;
}

}  // namespace lexico
