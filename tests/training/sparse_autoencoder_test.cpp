// The contract of lexico/sparse_autoencoder.h.
#include "lexico/sparse_autoencoder.h"

#include <gtest/gtest.h>
#include <cmath>
#include <limits>

#include "core/random.h"
#include "lexico/dictionary.h"
#include "lexico/error.h"
#include "lexico/trainer.h"
#include "support/message_of.h"

namespace lexico {
namespace {

constexpr int kDim = 24, kHidden = 40, kAtoms = 2;

/// offset + scale * (2 of 40 hidden directions with weights in [1, 2], or of either sign).
class PlantedStream : public VectorStream {
 public:
  explicit PlantedStream(std::vector<bool> is_signed) : is_signed_(std::move(is_signed)) {
    detail::Random random({99});
    truth_.resize(is_signed_.size() * kHidden * kDim);
    for (float& v : truth_) v = static_cast<float>(random.normal());
    normalize_atoms(truth_, static_cast<int>(is_signed_.size()) * kHidden, kDim);
  }
  int num_dictionaries() const override { return static_cast<int>(is_signed_.size()); }
  int dim() const override { return kDim; }
  void seek(std::int64_t vectors) override { position_ = vectors; }
  void next(std::int64_t count, float* out) override {
    for (std::size_t p = 0; p < is_signed_.size(); ++p)
      for (std::int64_t i = 0; i < count; ++i, out += kDim) fill(p, position_ + i, out);
    position_ += count;
  }
  float scale = 1, offset = 0;
  std::int64_t bad_every = 0;  ///< every so-th vector holds a NaN

 private:
  void fill(std::size_t p, std::int64_t number, float* x) const {
    detail::Random random({7, p, static_cast<std::uint64_t>(number)});
    for (int d = 0; d < kDim; ++d)
      x[d] = offset + scale * static_cast<float>(0.01 * random.normal());
    for (int k = 0; k < kAtoms; ++k) {
      const float* from = truth_.data() + (p * kHidden + random.below(kHidden)) * kDim;
      float weight = static_cast<float>(1 + random.uniform());
      if (is_signed_[p] && random.uniform() < 0.5) weight = -weight;
      for (int d = 0; d < kDim; ++d) x[d] += scale * weight * from[d];
    }
    if (bad_every > 0 && number % bad_every == 0)
      x[kDim / 2] = std::numeric_limits<float>::quiet_NaN();
  }
  std::vector<bool> is_signed_;
  std::vector<float> truth_;
  std::int64_t position_ = 0;
};

SparseAutoencoderConfig small_config(const char* activation) {
  SparseAutoencoderConfig config;
  config.num_latents = 64;
  config.sparsity = 4;
  config.activation = activation;
  config.vectors = 300 * 256;
  config.batch_size = 256;
  config.threads = 1;
  return config;
}

std::vector<float> some_vectors(PlantedStream& stream, std::int64_t count) {
  std::vector<float> x(static_cast<std::size_t>(stream.num_dictionaries() * count * kDim));
  stream.seek(1000000);
  stream.next(count, x.data());
  return x;
}

TEST(SparseAutoencoder, LearnsAPlantedSignal) {
  for (const char* activation : {"relu", "signed"}) {
    PlantedStream stream({false});
    std::vector<double> errors;
    const auto trained = train_sparse_autoencoders(
        small_config(activation), stream, [&](const SparseAutoencoderStep& step) {
          errors.push_back(step.relative_error);
          EXPECT_EQ(step.step, static_cast<std::int64_t>(errors.size()));
          EXPECT_EQ(step.num_steps, 300);
          return true;
        });
    ASSERT_EQ(trained.size(), 1u);
    const std::vector<float> x = some_vectors(stream, 2000);  // never trained on
    const double error = trained[0].relative_error(x.data(), 2000);
    EXPECT_LT(error, 0.5 * errors.front()) << activation;
    EXPECT_LT(error, 0.3) << activation;
    EXPECT_NEAR(trained[0].held_out_error, error, 0.1 * error) << activation;
    EXPECT_EQ(trained[0].is_signed, std::string(activation) == "signed");
    EXPECT_LE(trained[0].unused_latents, 64 - kHidden) << activation;
  }
}

TEST(SparseAutoencoder, AutoKeepsTheBetterActivationOfEachStream) {
  PlantedStream stream({false, true});
  SparseAutoencoderConfig config = small_config("auto");
  config.vectors = 100 * 256;
  const auto best = train_sparse_autoencoders(config, stream);
  config.activation = "relu";
  const auto relu = train_sparse_autoencoders(config, stream);
  config.activation = "signed";
  const auto with_sign = train_sparse_autoencoders(config, stream);
  EXPECT_TRUE(best[1].is_signed);  // weights of either sign
  for (std::size_t p : {0u, 1u}) {
    EXPECT_EQ(best[p].held_out_error,
              std::min(relu[p].held_out_error, with_sign[p].held_out_error));
    EXPECT_EQ(best[p].encoder, best[p].is_signed ? with_sign[p].encoder : relu[p].encoder);
  }
}

TEST(SparseAutoencoder, EqualSeedsGiveEqualResults) {
  PlantedStream stream({false});
  SparseAutoencoderConfig config = small_config("signed");
  config.vectors = 60 * 256;
  const auto first = train_sparse_autoencoders(config, stream);
  const auto again = train_sparse_autoencoders(config, stream);
  EXPECT_EQ(first[0].decoder, again[0].decoder);
  EXPECT_EQ(first[0].encoder_bias, again[0].encoder_bias);
  config.seed = 1;
  EXPECT_NE(first[0].decoder, train_sparse_autoencoders(config, stream)[0].decoder);
}

TEST(SparseAutoencoder, TheScaleOfTheDataDoesNotMatter) {
  PlantedStream stream({false});
  SparseAutoencoderConfig config = small_config("relu");
  config.vectors = 60 * 256;
  const double error = train_sparse_autoencoders(config, stream)[0].held_out_error;
  stream.scale = 1024;
  EXPECT_NEAR(train_sparse_autoencoders(config, stream)[0].held_out_error, error, 1e-3);
}

TEST(SparseAutoencoder, AConstantPartOfTheDataCostsNoLatents) {
  PlantedStream stream({false});
  SparseAutoencoderConfig config = small_config("relu");
  const double error = train_sparse_autoencoders(config, stream)[0].held_out_error;
  stream.offset = 10;  // |x| grows to 49: the same residual is a smaller part
  EXPECT_LT(train_sparse_autoencoders(config, stream)[0].held_out_error, 0.2 * error);
}

TEST(SparseAutoencoder, ReconstructionIsTheSumOfTheCodes) {
  for (const char* activation : {"relu", "signed"}) {
    PlantedStream stream({true});
    SparseAutoencoderConfig config = small_config(activation);
    config.vectors = 20 * 256;
    const SparseAutoencoder trained = train_sparse_autoencoders(config, stream)[0];
    constexpr std::int64_t kCount = 5000;  // more than one block
    const std::vector<float> x = some_vectors(stream, kCount);
    const SparseCodes codes = trained.encode(x.data(), kCount);
    const std::vector<float> got = trained.reconstruct(x.data(), kCount);
    ASSERT_EQ(codes.counts.size(), static_cast<std::size_t>(kCount));
    double error = 0;
    for (std::size_t i = 0; i < kCount; ++i) {
      std::vector<double> want(trained.offset.begin(), trained.offset.end());
      for (std::size_t k = 0; k < 4; ++k) {
        const float weight = codes.weights[i * 4 + k];
        const std::int32_t n = codes.indices[i * 4 + k];
        EXPECT_EQ(n >= 0, static_cast<std::int32_t>(k) < codes.counts[i]);
        if (n < 0) continue;
        EXPECT_TRUE(trained.is_signed || weight > 0);
        // The weight is the latent's activation.
        double z = trained.encoder_bias[static_cast<std::size_t>(n)];
        for (std::size_t d = 0; d < kDim; ++d) {
          const std::size_t at = static_cast<std::size_t>(n) * kDim + d;
          z += trained.encoder[at] * (x[i * kDim + d] - trained.offset[d]);
          want[d] += weight * trained.decoder[at];
        }
        ASSERT_NEAR(weight, z, 1e-4);
      }
      double residual = 0, length = 0;
      for (std::size_t d = 0; d < kDim; ++d) {
        ASSERT_NEAR(got[i * kDim + d], want[d], 1e-4);
        residual += std::pow(x[i * kDim + d] - want[d], 2);
        length += std::pow(x[i * kDim + d], 2);
      }
      ASSERT_NEAR(codes.residual_norms[i], std::sqrt(residual), 1e-4);
      error += std::sqrt(residual) / (std::sqrt(length) + 1e-8) / kCount;
    }
    EXPECT_NEAR(trained.relative_error(x.data(), kCount), error, 1e-5);
  }
}

TEST(SparseAutoencoder, VectorsWithNanAreLeftOutAndGiveNan) {
  PlantedStream stream({false});
  stream.bad_every = 10;
  SparseAutoencoderConfig config = small_config("relu");
  config.vectors = 60 * 256;
  const SparseAutoencoder trained = train_sparse_autoencoders(config, stream)[0];
  EXPECT_LT(trained.held_out_error, 0.6);
  std::vector<float> x = some_vectors(stream, 20);  // the first and the eleventh are bad
  const std::vector<float> got = trained.reconstruct(x.data(), 20);
  const SparseCodes codes = trained.encode(x.data(), 20);
  for (std::size_t i = 0; i < 20; ++i) {
    EXPECT_EQ(std::isnan(got[i * kDim]), i % 10 == 0);
    EXPECT_EQ(std::isnan(codes.residual_norms[i]), i % 10 == 0);
    EXPECT_EQ(codes.counts[i] == 0, i % 10 == 0);
  }
  EXPECT_TRUE(std::isfinite(trained.relative_error(x.data(), 20)));
  EXPECT_TRUE(std::isnan(trained.relative_error(x.data(), 1)));
  EXPECT_TRUE(std::isnan(trained.relative_error(x.data(), 0)));
  EXPECT_TRUE(trained.reconstruct(x.data(), 0).empty());
  stream.bad_every = 1;
  EXPECT_THROW(train_sparse_autoencoders(config, stream), IoError);
}

TEST(SparseAutoencoder, ZeroVectorsAreNeitherMeasuredNorHarmful) {  // padding
  struct WithZeros : PlantedStream {
    using PlantedStream::PlantedStream;
    void next(std::int64_t count, float* out) override {
      PlantedStream::next(count, out);
      for (std::int64_t i = 0; i < count; i += 4) std::fill_n(out + i * kDim, kDim, 0.0f);
    }
  } stream({false});
  SparseAutoencoderConfig config = small_config("relu");
  config.vectors = 100 * 256;
  const SparseAutoencoder trained = train_sparse_autoencoders(config, stream)[0];
  EXPECT_LT(trained.held_out_error, 0.5);
  const std::vector<float> zero(kDim);
  EXPECT_TRUE(std::isnan(trained.relative_error(zero.data(), 1)));
}

TEST(SparseAutoencoder, EqualVectorsAreNoTrap) {  // no variance, one direction
  struct Constant : VectorStream {
    int num_dictionaries() const override { return 1; }
    int dim() const override { return kDim; }
    void seek(std::int64_t) override {}
    void next(std::int64_t count, float* out) override { std::fill_n(out, count * kDim, 3.0f); }
  } stream;
  SparseAutoencoderConfig config = small_config("auto");
  config.vectors = 20 * 256;
  EXPECT_LT(train_sparse_autoencoders(config, stream)[0].held_out_error, 1e-3);
}

TEST(SparseAutoencoder, AnObserverCanStopIt) {
  PlantedStream stream({false});
  int steps = 0;
  EXPECT_THROW(
      train_sparse_autoencoders(
          small_config("relu"), stream, [&](const SparseAutoencoderStep&) { return ++steps < 3; }),
      Interrupted);
  EXPECT_EQ(steps, 3);
}

TEST(SparseAutoencoder, ConfigOutOfRangeIsNamedWithItsBound) {
  PlantedStream stream({false});
  const auto refused = [&](const auto& change) {
    SparseAutoencoderConfig config = small_config("relu");
    change(config);
    return test::message_of<InvalidArgument>([&] { train_sparse_autoencoders(config, stream); });
  };
  EXPECT_EQ(refused([](auto& c) { c.num_latents = 0; }),
            "sparse autoencoder: num_latents is 0, must be at least 1");
  EXPECT_EQ(refused([](auto& c) { c.sparsity = 65; }),
            "sparse autoencoder: sparsity is 65, must be at most num_latents = 64");
  EXPECT_EQ(refused([](auto& c) { c.learning_rate = std::nan(""); }),
            "sparse autoencoder: learning_rate is nan, must be above 0");
  EXPECT_EQ(refused([](auto& c) { c.activation = "gelu"; }),
            "sparse autoencoder: activation is 'gelu', must be auto, signed or relu");
  EXPECT_EQ(refused([](auto& c) { c.batch_size = -5; }),
            "sparse autoencoder: batch_size is -5, must be at least 1");
  EXPECT_EQ(refused([](auto& c) { c.device = "toaster"; }),
            "device is 'toaster', must be auto, cpu, or a GPU that is there");
}

}  // namespace
}  // namespace lexico
