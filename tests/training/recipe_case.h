#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "core/safetensors.h"
#include "lexico/trainer.h"

namespace lexico {

/// A case of the published training recipe, one dictionary set and all its batches: a safetensors
/// file with `initial` [P, N, m] and `batches` [steps, P, B, m].
class RecipeCase : public VectorStream, public TrainObserver {
 public:
  explicit RecipeCase(const std::string& path) : file_(detail::read_safetensors(path)) {
    const auto& initial = file_.tensors.at("initial").shape;
    const auto& batches = file_.tensors.at("batches").shape;
    num_dictionaries_ = static_cast<int>(initial.at(0));
    num_atoms_ = static_cast<int>(initial.at(1));
    dim_ = static_cast<int>(initial.at(2));
    num_steps_ = batches.at(0);
    batch_size_ = batches.at(2);
    batches_ = floats("batches");
  }

  std::vector<float> floats(const char* name) const {
    return detail::to_floats(file_.tensors.at(name), name);
  }

  /// Trains with `recipe: lexico` and fills what follows.
  void train(int sparsity, double learning_rate, std::int64_t steps_per_epoch) {
    TrainConfig config;
    config.recipe = "lexico";
    config.num_atoms = num_atoms_;
    config.sparsity = sparsity;
    config.batch_size = static_cast<int>(batch_size_);
    config.vectors = num_steps_ * batch_size_;
    config.epochs = static_cast<int>((num_steps_ + steps_per_epoch - 1) / steps_per_epoch);
    config.learning_rate = learning_rate;
    std::vector<TrainTarget> targets;
    for (int p = 0; p < num_dictionaries_; ++p)
      targets.push_back({p / 2, p % 2 == 0 ? Kind::kKeys : Kind::kValues});
    Trainer trainer(config, targets, *this, floats("initial"));
    trainer.run(*this);
    for (const Dictionary& d : trainer.dictionaries().dictionaries)
      atoms.insert(atoms.end(), d.atoms.begin(), d.atoms.end());
  }

  std::vector<float> atoms, loss, relative_error;

  std::vector<std::int64_t> shape() const { return {num_dictionaries_, num_atoms_, dim_}; }
  int num_dictionaries() const override { return num_dictionaries_; }
  int dim() const override { return dim_; }
  void seek(std::int64_t vectors) override {
    position_ =
        static_cast<std::size_t>(vectors) * static_cast<std::size_t>(num_dictionaries_ * dim_);
  }
  void next(std::int64_t count, float* out) override {
    const auto size = static_cast<std::size_t>(num_dictionaries_ * count * dim_);
    std::copy_n(batches_.begin() + static_cast<std::ptrdiff_t>(position_), size, out);
    position_ += size;
  }
  void on_step(const TrainStep& step) override {
    loss.push_back(static_cast<float>(step.loss));
    relative_error.push_back(static_cast<float>(step.relative_error));
  }

 private:
  detail::SafeTensors file_;
  int num_dictionaries_ = 0, num_atoms_ = 0, dim_ = 0;
  std::int64_t num_steps_ = 0, batch_size_ = 0;
  std::vector<float> batches_;
  std::size_t position_ = 0;
};

}  // namespace lexico
