// fit_autoencoder TRAIN HELD_OUT LAYER LATENTS SPARSITY VECTORS BATCH RATE ACTIVATION: trains the
// autoencoders of a layer's keys and values on an activation dump and prints their errors on
// another. Vectors of position 0, the BOS, are not measured.
#include <cstdio>
#include <cstdlib>

#include "lexico/activation_sampler.h"
#include "lexico/activations.h"
#include "lexico/sparse_autoencoder.h"

int main(int argc, char** argv) {
  using namespace lexico;
  if (argc != 10) return 2;
  ActivationReader train(argv[1]), held_out(argv[2]);
  const int layer = std::atoi(argv[3]);
  SparseAutoencoderConfig config;
  config.num_latents = std::atoi(argv[4]);
  config.sparsity = std::atoi(argv[5]);
  config.vectors = std::atoll(argv[6]);
  if (std::atoi(argv[7]) > 0) config.batch_size = std::atoi(argv[7]);
  if (std::atof(argv[8]) > 0) config.learning_rate = std::atof(argv[8]);
  config.activation = argv[9];
  const auto dim = static_cast<std::size_t>(train.info().head_dim);
  const auto heads = static_cast<std::size_t>(held_out.info().kv_heads);
  const std::int64_t tokens = held_out.info().num_tokens;
  std::vector<std::int32_t> positions(static_cast<std::size_t>(tokens));
  held_out.read_tokens(0, tokens, nullptr, positions.data(), nullptr);
  for (Kind kind : kBothKinds) {
    ActivationSampler stream(train, {{layer, kind}}, train.num_rows(), 0, std::size_t{1} << 28);
    const SparseAutoencoder fitted =
        train_sparse_autoencoders(config, stream, [](const SparseAutoencoderStep& step) {
          if (step.step % 200 == 0)
            std::fprintf(stderr,
                         "%lld/%lld %.4f\n",
                         static_cast<long long>(step.step),
                         static_cast<long long>(step.num_steps),
                         step.relative_error);
          return true;
        })[0];
    std::vector<float> all(static_cast<std::size_t>(held_out.num_rows()) * dim), measured;
    held_out.read(layer, kind, 0, held_out.num_rows(), all.data());
    for (std::size_t row = 0; row * dim < all.size(); ++row)
      if (positions[row / heads] > 0)
        measured.insert(measured.end(),
                        all.begin() + static_cast<std::ptrdiff_t>(row * dim),
                        all.begin() + static_cast<std::ptrdiff_t>((row + 1) * dim));
    const auto count = static_cast<std::int64_t>(measured.size() / dim);
    std::printf("layer %d %s: %s, error %.4f on %lld vectors, %.4f kept aside, %d of %d unused\n",
                layer,
                name_of(kind),
                fitted.is_signed ? "signed" : "relu",
                fitted.relative_error(measured.data(), count),
                static_cast<long long>(count),
                fitted.held_out_error,
                fitted.unused_latents,
                fitted.num_latents);
    std::fflush(stdout);
  }
}
