// Top-k sparse autoencoders. Gradients are written out: every vector touches s latents only, so
// that the kernels of the dictionary trainer serve here too.
#include "lexico/sparse_autoencoder.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "check.h"
#include "core/random.h"
#include "lexico/error.h"
#include "lexico/trainer.h"
#include "training/sparse_ops.h"

namespace lexico {
namespace {

using detail::throw_invalid;
using torch::Tensor;

constexpr std::int64_t kHeldOut = 8192;  // vectors of each stream
constexpr std::uint64_t kStart = 11;     // what a random stream is for
constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;
constexpr double kWarmup = 0.05;  // of the steps
constexpr int kDeadAfter = 20;    // a latent is dead when none of the last 20 N vectors took it
constexpr double kAuxiliary = 1.0 / 8;       // share of the auxiliary loss
constexpr double kEncoderStart = 0.3;        // length of its rows: others are slower
constexpr std::int64_t kEncodeBlock = 4096;  // bounds the [block, N] activations
constexpr float kMostEnergy = 1e30f;         // of a vector: sums of squares stay finite

torch::Device device_from(const std::string& name) {
  try {
    const torch::Device device(name == "auto" ? (torch::cuda::is_available() ? "cuda" : "cpu")
                                              : name);
    if (device.is_cpu() || (device.is_cuda() && torch::cuda::is_available() &&
                            device.index() < static_cast<int>(torch::cuda::device_count())))
      return device;
  } catch (const c10::Error&) {  // no device's name
  }
  throw_invalid("device is '", name, "', must be auto, cpu, or a GPU that is there");
}

Tensor unit_rows(const Tensor& rows) { return rows / rows.norm(2, -1, true).clamp_min(1e-30); }

struct Chosen {
  Tensor indices;  // [B, s] int64
  Tensor weights;  // [B, s], 0: none
};

/// The `sparsity` activations that stay, of z [B, N].
Chosen choose(const Tensor& z, std::int64_t sparsity, bool is_signed) {
  const Tensor indices = std::get<1>(torch::topk(is_signed ? z.abs() : z, sparsity, 1, true, true));
  const Tensor weights = z.gather(1, indices);
  return {indices, is_signed ? weights : weights.clamp_min(0)};
}

/// A parameter with its Adam moments (Kingma and Ba, arXiv:1412.6980).
struct Parameter {
  Tensor value, first, second;

  explicit Parameter(const Tensor& start)
      : value(start.contiguous().clone()),
        first(torch::zeros_like(value)),
        second(torch::zeros_like(value)) {}

  void adam_step(const Tensor& gradient, double rate, std::int64_t step) {
    const auto t = static_cast<double>(step);
    first.mul_(kBeta1).add_(gradient, 1.0 - kBeta1);
    second.mul_(kBeta2).addcmul_(gradient, gradient, 1.0 - kBeta2);
    const Tensor scale = (second / (1.0 - std::pow(kBeta2, t))).sqrt_().add_(kEpsilon);
    value.addcdiv_(first, scale, -rate / (1.0 - std::pow(kBeta1, t)));
  }
};

/// Vectors as the network sees them: without their mean, mean square norm 1.
struct Normalization {
  Tensor mean;   // [P, 1, m]
  Tensor scale;  // [P, 1, 1]
};

/// Vectors of a stream on the device. Those that are zero, which have no relative error, or hold
/// NaN or Inf are marked.
class Batches {
 public:
  Batches(VectorStream& stream, torch::Device device) : stream_(stream), device_(device) {}

  /// @param good  [P, count] bool. Others are zero in the result [P, count, m].
  Tensor next(std::int64_t count, Tensor& good) {
    Tensor x = torch::empty({stream_.num_dictionaries(), count, stream_.dim()});
    stream_.next(count, x.data_ptr<float>());
    const Tensor energy = x.square().sum(2);
    good = (energy < kMostEnergy).logical_and(energy > 0);
    const Tensor counts = good.sum(1);
    for (std::int64_t p = 0; p < x.size(0); ++p)
      if (counts[p].item<std::int64_t>() == 0)
        throw IoError(
            "stream " + std::to_string(p) +
            ": every vector of a batch is zero, holds NaN or Inf, or is too large to square");
    x.masked_fill_(good.logical_not().unsqueeze(2), 0.0f);
    good = good.to(device_);
    return x.to(device_);
  }

 private:
  VectorStream& stream_;
  torch::Device device_;
};

/// [B, 1]: times the residual this is the gradient of the mean relative error in x_hat. Vectors
/// much shorter than most (lengths are in units of the spread), or all but perfect, pull no harder.
Tensor error_weights(const Tensor& residual, const Tensor& lengths) {
  const Tensor most = lengths.clamp_min(1e-2);
  return 1.0 /
         ((residual.norm(2, 1, true) + 1e-3 * most) * most * static_cast<double>(residual.size(0)));
}

/// Of the loss in the parameters, [P, ...] each.
struct Gradients {
  Tensor decoder, encoder, bias, center;
};

class Training {
 public:
  /// @param start  [P, N, m]: unit rows, directions of encoder and decoder.
  Training(const SparseAutoencoderConfig& config,
           bool is_signed,
           const Normalization& normalization,
           const Tensor& start)
      : config_(config),
        is_signed_(is_signed),
        normalization_(normalization),
        decoder_(start),
        encoder_(start * kEncoderStart),
        bias_(torch::zeros({start.size(0), start.size(1)}, start.options())),
        center_(torch::zeros({start.size(0), start.size(2)}, start.options())),
        last_used_(
            torch::zeros({start.size(0), start.size(1)}, start.options().dtype(torch::kLong))),
        ops_({config.sparsity, 0.0f, {}, config.threads}, start.device()) {}

  std::int64_t num_steps() const {
    return (config_.vectors + config_.batch_size - 1) / config_.batch_size;
  }

  /// @param x  [P, B, m], @param good  [P, B]. @returns the mean relative error before the step.
  double step(const Tensor& x, const Tensor& good) {
    const std::int64_t P = x.size(0), B = x.size(1), s = config_.sparsity;
    const Tensor normalized = (x - normalization_.mean) / normalization_.scale;
    const Tensor lengths = x.norm(2, 2, true) / normalization_.scale;  // of x, not of x - mean
    const Tensor centered = normalized - center_.value.unsqueeze(1);
    detail::CodedBatch to_decoder{torch::empty({P, B, s}, x.options().dtype(torch::kInt32)),
                                  torch::empty({P, B, s}, x.options()),
                                  torch::empty_like(x)};
    detail::CodedBatch to_encoder{
        to_decoder.indices, torch::empty({P, B, s}, x.options()), centered};
    Gradients extra{torch::zeros_like(decoder_.value),
                    torch::zeros_like(encoder_.value),
                    torch::zeros_like(bias_.value),
                    torch::zeros_like(center_.value)};
    Tensor errors = torch::empty_like(x);  // x_hat - x
    for (std::int64_t p = 0; p < P; ++p) {
      const Tensor z = torch::addmm(bias_.value[p], centered[p], encoder_.value[p].t());
      const Chosen chosen = choose(z, s, is_signed_);
      const Tensor flat = chosen.indices.reshape({-1});
      const Tensor rows = decoder_.value[p].index_select(0, flat).view({B, s, -1});
      errors[p] = (torch::bmm(chosen.weights.unsqueeze(1), rows).squeeze(1) - centered[p])
                      .masked_fill_(good[p].logical_not().unsqueeze(1), 0.0f);
      const Tensor weights = error_weights(errors[p], lengths[p]);
      const Tensor of_output = errors[p] * weights;
      Tensor of_latents = torch::bmm(rows, of_output.unsqueeze(2)).squeeze(2);
      if (!is_signed_) of_latents *= chosen.weights > 0;
      extra.bias[p].index_add_(0, flat, of_latents.reshape({-1}));
      extra.center[p] = of_output.sum(0) - encoder_.value[p].t().mv(extra.bias[p]);
      to_decoder.indices[p] = chosen.indices.to(torch::kInt32);
      to_decoder.weights[p] = chosen.weights;
      to_decoder.residual[p] = of_output;
      to_encoder.weights[p] = of_latents;
      add_auxiliary(p, z, centered[p], errors[p], weights, extra);
      last_used_[p].index_fill_(
          0, flat.masked_select(chosen.weights.reshape({-1}) != 0), done_ + 1);
    }
    Tensor of_decoder = ops_.gradient(decoder_.value, to_decoder, 1.0) + extra.decoder;
    of_decoder -= (of_decoder * decoder_.value).sum(2, true) * decoder_.value;
    const Tensor of_encoder = ops_.gradient(encoder_.value, to_encoder, 1.0) + extra.encoder;
    const double rate = learning_rate();
    ++done_;
    decoder_.adam_step(of_decoder, rate, done_);
    encoder_.adam_step(of_encoder, rate, done_);
    bias_.adam_step(extra.bias, rate, done_);
    center_.adam_step(extra.center, rate, done_);
    decoder_.value /= decoder_.value.norm(2, 2, true);
    const Tensor relative = errors.norm(2, 2) / (lengths.squeeze(2) + 1e-8);
    return (relative.sum(torch::kFloat64) / good.sum()).item<double>();
  }

  std::vector<SparseAutoencoder> results() const {
    const auto host = [](const Tensor& t) {
      const Tensor flat = t.to(torch::kCPU, torch::kFloat32).contiguous();
      return std::vector<float>(flat.data_ptr<float>(), flat.data_ptr<float>() + flat.numel());
    };
    std::vector<SparseAutoencoder> out;
    for (std::int64_t p = 0; p < decoder_.value.size(0); ++p) {
      // Latents in the units of x: z scale = encoder (x - offset) + bias scale.
      const Tensor scale = normalization_.scale[p].squeeze();
      SparseAutoencoder one;
      one.num_latents = config_.num_latents;
      one.dim = static_cast<int>(decoder_.value.size(2));
      one.sparsity = config_.sparsity;
      one.is_signed = is_signed_;
      one.encoder = host(encoder_.value[p]);
      one.encoder_bias = host(bias_.value[p] * scale);
      one.decoder = host(decoder_.value[p]);
      one.offset = host(normalization_.mean[p].squeeze(0) + center_.value[p] * scale);
      out.push_back(std::move(one));
    }
    return out;
  }

 private:
  double learning_rate() const {
    const auto steps = static_cast<double>(num_steps()), step = static_cast<double>(done_);
    const double rise = std::min(1.0, (step + 1) / (kWarmup * steps + 1));
    return config_.learning_rate * rise * 0.5 * (1.0 + std::cos(std::numbers::pi * step / steps));
  }

  /// Dead latents of stream p are to explain what the others leave over (the auxiliary loss of Gao
  /// et al.): adds its gradients. Without it half of the latents die.
  /// @param z  [B, N] activations, @param error  [B, m] of x_hat, masked, @param weights  [B, 1].
  void add_auxiliary(std::int64_t p,
                     const Tensor& z,
                     const Tensor& centered,
                     const Tensor& error,
                     const Tensor& weights,
                     Gradients& out) const {
    const Tensor dead = (last_used_[p] < done_ + 1 - patience(z.size(0))).nonzero().squeeze(1);
    if (dead.size(0) == 0) return;
    const std::int64_t count = std::min((centered.size(1) + 1) / 2, dead.size(0));
    const Chosen chosen = choose(z.index_select(1, dead), count, is_signed_);
    const Tensor y = torch::zeros({z.size(0), dead.size(0)}, z.options())
                         .scatter_(1, chosen.indices, chosen.weights)
                         .masked_fill_((error == 0).all(1, true), 0.0f);
    const Tensor rows = decoder_.value[p].index_select(0, dead);
    const Tensor of_output = kAuxiliary * (torch::mm(y, rows) + error) * weights;
    const Tensor of_latents = torch::mm(of_output, rows.t()) * (y != 0);
    out.decoder[p].index_add_(0, dead, torch::mm(y.t(), of_output));
    out.encoder[p].index_add_(0, dead, torch::mm(of_latents.t(), centered));
    out.bias[p].index_add_(0, dead, of_latents.sum(0));
  }

  /// Steps after which a latent that no vector took is dead.
  std::int64_t patience(std::int64_t batch) const {
    return (std::int64_t{kDeadAfter} * config_.num_latents + batch - 1) / batch;
  }

  SparseAutoencoderConfig config_;
  bool is_signed_;
  Normalization normalization_;
  Parameter decoder_, encoder_, bias_, center_;
  Tensor last_used_;  // [P, N] int64: the step that last took the latent
  detail::SparseOps ops_;
  std::int64_t done_ = 0;  // steps
};

/// Of the finite vectors of x [P, n, m].
Normalization normalization_of(const Tensor& x, const Tensor& good) {
  const Tensor counts = good.sum(1).to(torch::kFloat64).view({-1, 1, 1});
  const Tensor mean = (x.sum(1, true, torch::kFloat64) / counts).to(torch::kFloat32);
  const Tensor energy = ((x - mean).square().sum(2) * good).sum(1).view({-1, 1, 1}) / counts;
  const Tensor least = mean.norm(2, 2, true) * 1e-6 + 1e-30;  // equal vectors have no spread
  return {mean, torch::maximum(energy.sqrt().to(torch::kFloat32), least)};
}

/// [P, N, m]: unit vectors of random direction.
Tensor starting_directions(const SparseAutoencoderConfig& config, const VectorStream& stream) {
  Tensor rows = torch::empty({stream.num_dictionaries(), config.num_latents, stream.dim()});
  detail::Random random({config.seed, kStart});
  float* out = rows.data_ptr<float>();
  for (std::int64_t i = 0; i < rows.numel(); ++i) out[i] = static_cast<float>(random.normal());
  return unit_rows(rows);
}

/// Both matrices of an autoencoder as tensors.
struct Weights {
  Tensor encoder, bias, decoder, offset;

  explicit Weights(const SparseAutoencoder& a) {
    const auto view = [](const std::vector<float>& v, std::vector<std::int64_t> shape) {
      return torch::from_blob(const_cast<float*>(v.data()), shape, torch::kFloat32);
    };
    encoder = view(a.encoder, {a.num_latents, a.dim});
    bias = view(a.encoder_bias, {a.num_latents});
    decoder = view(a.decoder, {a.num_latents, a.dim});
    offset = view(a.offset, {a.dim});
  }
};

/// Calls `body(first, chosen, centered, reconstructed - offset)` for blocks of the vectors.
template <typename Body>
void for_blocks(const SparseAutoencoder& a,
                const float* vectors,
                std::int64_t count,
                const Body& body) {
  if (count < 0) throw_invalid("count is ", count, ", must be at least 0");
  const torch::InferenceMode no_gradients;
  const Weights weights(a);
  for (std::int64_t first = 0; first < count; first += kEncodeBlock) {
    const std::int64_t n = std::min(kEncodeBlock, count - first);
    const Tensor centered =
        torch::from_blob(const_cast<float*>(vectors) + first * a.dim, {n, a.dim}, torch::kFloat32) -
        weights.offset;
    const Chosen chosen =
        choose(torch::addmm(weights.bias, centered, weights.encoder.t()), a.sparsity, a.is_signed);
    const Tensor rows =
        weights.decoder.index_select(0, chosen.indices.reshape({-1})).view({n, a.sparsity, a.dim});
    body(first, chosen, centered, torch::bmm(chosen.weights.unsqueeze(1), rows).squeeze(1));
  }
}

/// The part of `on_step` and the checks around one training.
void train(Training& training,
           Batches& batches,
           const SparseAutoencoderConfig& config,
           SparseAutoencoderStep& progress,
           const std::function<bool(const SparseAutoencoderStep&)>& on_step) {
  for (std::int64_t i = 0; i < training.num_steps(); ++i) {
    Tensor good;
    const Tensor x = batches.next(config.batch_size, good);
    progress.relative_error = training.step(x, good);
    ++progress.step;
    if (!std::isfinite(progress.relative_error))
      throw Error("training the autoencoder diverged at step " + std::to_string(progress.step) +
                  "; try a learning_rate below " + std::to_string(config.learning_rate));
    if (on_step && !on_step(progress))
      throw Interrupted("stopped while training sparse autoencoders");
  }
}

}  // namespace

void SparseAutoencoderConfig::validate() const {
  const auto at_least = [](const char* name, auto value, auto least) {
    if (!(value >= least))
      throw_invalid("sparse autoencoder: ", name, " is ", value, ", must be at least ", least);
  };
  at_least("num_latents", num_latents, 1);
  at_least("sparsity", sparsity, 1);
  at_least("vectors", vectors, std::int64_t{0});
  at_least("batch_size", batch_size, 1);
  at_least("threads", threads, 0);
  if (sparsity > num_latents)
    throw_invalid("sparse autoencoder: sparsity is ",
                  sparsity,
                  ", must be at most num_latents = ",
                  num_latents);
  if (!(learning_rate > 0 && std::isfinite(learning_rate)))
    throw_invalid("sparse autoencoder: learning_rate is ", learning_rate, ", must be above 0");
  if (activation != "auto" && activation != "signed" && activation != "relu")
    throw_invalid(
        "sparse autoencoder: activation is '", activation, "', must be auto, signed or relu");
}

SparseAutoencoderConfig SparseAutoencoderConfig::resolved() const {
  SparseAutoencoderConfig out = *this;
  if (out.vectors == 0)
    out.vectors = std::max<std::int64_t>(2000000, 2000 * std::int64_t{num_latents});
  return out;
}

SparseCodes SparseAutoencoder::encode(const float* vectors, std::int64_t count) const {
  SparseCodes codes;
  codes.num_dictionaries = 1;
  codes.num_signals = count;
  codes.max_atoms = sparsity;
  const auto slots = static_cast<std::size_t>(std::max<std::int64_t>(count, 0) * sparsity);
  codes.indices.assign(slots, -1);
  codes.weights.assign(slots, 0.0f);
  for_blocks(
      *this,
      vectors,
      count,
      [&](auto first, const Chosen& chosen, const Tensor& x, const Tensor& y) {
        const Tensor order = std::get<1>(chosen.weights.abs().sort(1, true));
        const Tensor indices = chosen.indices.gather(1, order).contiguous();
        const Tensor weights = chosen.weights.gather(1, order).contiguous();
        const Tensor norms = (x - y).norm(2, 1).contiguous();
        for (std::int64_t i = 0; i < x.size(0); ++i) {
          const float norm = norms.data_ptr<float>()[i];
          const bool finite = std::isfinite(norm);
          codes.residual_norms.push_back(finite ? norm : std::numeric_limits<float>::quiet_NaN());
          std::int32_t used = 0;
          for (int k = 0; finite && k < sparsity; ++k) {
            const float weight = weights.data_ptr<float>()[i * sparsity + k];
            if (weight == 0) break;
            const auto slot = static_cast<std::size_t>((first + i) * sparsity + used++);
            codes.indices[slot] =
                static_cast<std::int32_t>(indices.data_ptr<std::int64_t>()[i * sparsity + k]);
            codes.weights[slot] = weight;
          }
          codes.counts.push_back(used);
        }
      });
  return codes;
}

std::vector<float> SparseAutoencoder::reconstruct(const float* vectors, std::int64_t count) const {
  std::vector<float> out(static_cast<std::size_t>(std::max<std::int64_t>(count, 0) * dim));
  for_blocks(
      *this, vectors, count, [&](auto first, const Chosen&, const Tensor& x, const Tensor& y) {
        const Tensor finite = torch::isfinite(x).all(1, true);
        const Tensor result = torch::where(
            finite, y + Weights(*this).offset, std::numeric_limits<float>::quiet_NaN());
        torch::from_blob(out.data() + first * dim, {x.size(0), dim}, torch::kFloat32).copy_(result);
      });
  return out;
}

double SparseAutoencoder::relative_error(const float* vectors, std::int64_t count) const {
  const Weights weights(*this);
  double sum = 0, finite = 0;
  for_blocks(*this, vectors, count, [&](auto, const Chosen&, const Tensor& x, const Tensor& y) {
    const Tensor lengths = (x + weights.offset).norm(2, 1);
    const Tensor errors = (x - y).norm(2, 1) / (lengths + 1e-8);
    const Tensor good = torch::isfinite(errors).logical_and(lengths > 1e-7);
    sum += errors.masked_select(good).sum(torch::kFloat64).template item<double>();
    finite += static_cast<double>(good.sum().template item<std::int64_t>());
  });
  return sum / finite;
}

std::vector<SparseAutoencoder> train_sparse_autoencoders(
    const SparseAutoencoderConfig& asked,
    VectorStream& stream,
    const std::function<bool(const SparseAutoencoderStep&)>& on_step) {
  asked.validate();
  const SparseAutoencoderConfig config = asked.resolved();
  if (config.threads > 0) torch::set_num_threads(config.threads);
  const torch::Device device = device_from(config.device);
  const torch::InferenceMode no_gradients;
  try {
    Batches batches(stream, device);
    Tensor held_good;
    stream.seek(0);
    const Tensor held_out = batches.next(kHeldOut, held_good).to(torch::kCPU).contiguous();
    const Normalization normalization = normalization_of(held_out.to(device), held_good);
    const Tensor start = starting_directions(config, stream).to(device);

    std::vector<bool> activations;  // signed?
    if (config.activation != "signed") activations.push_back(false);
    if (config.activation != "relu") activations.push_back(true);
    SparseAutoencoderStep progress;
    std::vector<SparseAutoencoder> best;
    for (const bool is_signed : activations) {
      stream.seek(kHeldOut);
      Training training(config, is_signed, normalization, start);
      progress.num_steps = training.num_steps() * static_cast<std::int64_t>(activations.size());
      train(training, batches, config, progress, on_step);
      std::vector<SparseAutoencoder> trained = training.results();
      for (std::size_t p = 0; p < trained.size(); ++p) {
        const auto row = static_cast<std::int64_t>(p);
        const Tensor vectors = held_out[row].index({held_good[row].to(torch::kCPU)}).contiguous();
        const float* data = vectors.data_ptr<float>();
        trained[p].held_out_error = trained[p].relative_error(data, vectors.size(0));
        std::vector<bool> used(static_cast<std::size_t>(config.num_latents));
        for (std::int32_t n : trained[p].encode(data, vectors.size(0)).indices)
          if (n >= 0) used[static_cast<std::size_t>(n)] = true;
        trained[p].unused_latents = static_cast<int>(std::count(used.begin(), used.end(), false));
      }
      if (best.empty()) {
        best = std::move(trained);
        continue;
      }
      for (std::size_t p = 0; p < best.size(); ++p)
        if (trained[p].held_out_error < best[p].held_out_error) best[p] = std::move(trained[p]);
    }
    return best;
  } catch (const c10::Error& error) {
    throw ResourceError(std::string("training sparse autoencoders: ") +
                        error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    throw ResourceError("training sparse autoencoders: not enough memory");
  }
}

}  // namespace lexico
