// follow_recipe CASE OUT SPARSITY LEARNING_RATE STEPS_PER_EPOCH: trains on the batches of CASE with
// `recipe: lexico` and writes what it learnt: atoms [P, N, m], loss and relative_error [steps].
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "lexico/files.h"
#include "training/recipe_case.h"

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fputs("follow_recipe CASE OUT SPARSITY LEARNING_RATE STEPS_PER_EPOCH\n", stderr);
    return 2;
  }
  try {
    lexico::RecipeCase recipe(argv[1]);
    recipe.train(std::atoi(argv[3]), std::atof(argv[4]), std::atol(argv[5]));
    const auto steps = static_cast<std::int64_t>(recipe.loss.size());
    lexico::write_file(argv[2],
                       lexico::detail::safetensors_text(
                           {{"atoms", {recipe.shape(), recipe.atoms.data()}},
                            {"loss", {{steps}, recipe.loss.data()}},
                            {"relative_error", {{steps}, recipe.relative_error.data()}}},
                           {}));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
