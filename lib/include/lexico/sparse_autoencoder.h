#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "lexico/encoder.h"

namespace lexico {

class VectorStream;

/// How a top-k sparse autoencoder is trained. The defaults are what measured best on keys and
/// values of a small Llama (docs/sparse_autoencoder.md).
struct SparseAutoencoderConfig {
  int num_latents = 1024;  ///< the N of a dictionary to be compared with
  int sparsity = 8;        ///< latents of a vector: its s
  /// "relu": the s largest activations, negative ones become 0. "signed": the s of largest
  /// magnitude. "auto": both are trained, and each stream keeps the one of the smaller error on
  /// vectors neither has trained on.
  std::string activation = "auto";
  std::int64_t vectors = 0;  ///< of each stream to learn from; 0: max(2e6, 2000 num_latents)
  int batch_size = 1024;     ///< vectors of each stream per step
  double learning_rate =
      1e-2;  ///< of Adam: rises over the first 5 % of the steps, then cosine to 0
  std::uint64_t seed = 0;
  int threads = 0;             ///< 0: all the machine has
  std::string device = "cpu";  ///< cpu, cuda, cuda:<number> or auto

  /// @throws InvalidArgument naming the first field out of range, its value and its bound.
  void validate() const;
  /// With `vectors` filled in.
  SparseAutoencoderConfig resolved() const;
};

/// A baseline for dictionaries: a vector's s latents are chosen by one linear map in place of a
/// pursuit. z = encoder (x - offset) + encoder_bias; y: the s largest of z; x_hat = offset + sum of
/// y_n decoder_n. Sources: Makhzani and Frey, arXiv:1312.5663; Gao et al., arXiv:2406.04093.
struct SparseAutoencoder {
  int num_latents = 0, dim = 0, sparsity = 0;
  bool is_signed = false;
  std::vector<float> encoder;       ///< [num_latents, dim]
  std::vector<float> encoder_bias;  ///< [num_latents]
  std::vector<float> decoder;       ///< [num_latents, dim], rows of unit norm
  std::vector<float> offset;        ///< [dim]
  double held_out_error = 0;        ///< mean relative error on the vectors kept aside
  int unused_latents = 0;           ///< that none of those vectors uses

  /// @param vectors  [count, dim]. @returns codes of one dictionary, in order of magnitude; latents
  /// of weight 0 are left out. A vector with NaN or Inf has none, and a NaN residual norm.
  SparseCodes encode(const float* vectors, std::int64_t count) const;
  /// [count, dim]. A vector with NaN or Inf gives NaN.
  std::vector<float> reconstruct(const float* vectors, std::int64_t count) const;
  /// Mean of |x - x_hat| / (|x| + 1e-8) over vectors that are finite and not zero (shorter than
  /// 1e-7); NaN if there are none.
  double relative_error(const float* vectors, std::int64_t count) const;
};

/// One step of training, as an observer sees it.
struct SparseAutoencoderStep {
  std::int64_t step = 0, num_steps = 0;  ///< counts from 1, over both trainings of "auto"
  double relative_error = 0;             ///< of the batch, mean over streams
};

/// Trains one autoencoder per stream of `stream`, side by side. The stream's first 8,192 vectors
/// are kept aside: they choose the activation and give `held_out_error` (an endless stream over a
/// finite file comes back to them after a pass). Equal config, stream and thread count give equal
/// results.
///
/// @param on_step  may be empty; false ends training with Interrupted.
/// @throws InvalidArgument if the config is out of range, or sparsity exceeds num_latents; IoError
///         if all vectors of a stream in a batch are zero or hold NaN or Inf; ResourceError if
///         memory or the device does not suffice; Error if training diverges.
std::vector<SparseAutoencoder> train_sparse_autoencoders(
    const SparseAutoencoderConfig& config,
    VectorStream& stream,
    const std::function<bool(const SparseAutoencoderStep&)>& on_step = {});

}  // namespace lexico
