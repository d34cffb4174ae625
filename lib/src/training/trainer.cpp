// The training loop and its two recipes. docs/training.md says what each step does and why.
#include "lexico/trainer.h"

#include <torch/torch.h>

#include <cmath>
#include <map>
#include <numbers>
#include <sstream>

#include "check.h"
#include "core/random.h"
#include "core/safetensors.h"
#include "lexico/files.h"
#include "training/sparse_ops.h"

namespace lexico {
namespace {

using detail::throw_invalid;
using torch::Tensor;

constexpr std::uint64_t kInitialAtoms = 3, kRevivedAtoms = 4;  // what a random stream is for
constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;
constexpr int kReviveAfter = 20;  // an atom is unused when none of the last 20 N vectors took it
constexpr double kReviveUntil = 0.8;  // of the run: what comes back later cannot settle any more
constexpr int kReviveEverySteps = 16;
constexpr float kMostEnergy = 1e30f;  // of a vector: sums of squares over a batch stay finite

torch::Device device_from(const std::string& name) {
  if (name == "auto") return torch::Device(torch::cuda::is_available() ? "cuda" : "cpu");
  torch::Device device(torch::kCPU);
  try {
    device = torch::Device(name);
  } catch (const c10::Error&) {
    throw_invalid("device is '", name, "', must be cpu, cuda, cuda:<number> or auto");
  }
  if (device.is_cuda() && !torch::cuda::is_available())
    throw_invalid("device is '", name, "', but torch finds no GPU");
  if (device.is_cuda() && device.index() >= static_cast<int>(torch::cuda::device_count()))
    throw_invalid("device is '", name, "', but there are ", torch::cuda::device_count(), " GPUs");
  return device;
}

Tensor unit_rows(const Tensor& rows) { return rows / rows.norm(2, -1, true).clamp_min(1e-30); }

/// Drops the part of each atom's gradient along the atom, which normalization would undo.
void keep_tangent(const Tensor& atoms, Tensor& gradient) {
  gradient -= (gradient * atoms).sum(2, true) * atoms;
}

/// Unit atoms, so that nothing but the direction is learnt.
void normalize(Tensor& atoms) { atoms /= atoms.norm(2, 2, true); }

std::string target_text(const std::vector<TrainTarget>& targets) {
  std::string text;
  for (const TrainTarget& t : targets)
    text += std::to_string(t.layer) + ":" + name_of(t.kind) + " ";
  return text;
}

/// What decides the result, as text: a checkpoint of another run must not be loaded.
std::map<std::string, std::string> fingerprint(const TrainConfig& config,
                                               const std::vector<TrainTarget>& targets,
                                               const VectorStream& stream) {
  std::map<std::string, std::string> fields;
  TrainConfig::for_each_field(config, [&](const char* key, const auto& value, const char*) {
    std::ostringstream text;
    text.precision(17);
    text << value;
    fields[key] = text.str();
  });
  fields.erase("threads");
  fields.erase("device");
  fields["targets"] = target_text(targets);
  fields["data"] = stream.identity();
  return fields;
}

}  // namespace

struct Trainer::Impl {
  TrainConfig config;
  std::vector<TrainTarget> targets;
  VectorStream& stream;
  torch::Device device;
  detail::SparseOps ops;

  Tensor atoms, first, second;  // [P, N, m]: the dictionaries and Adam's moments
  Tensor last_used;             // [P, N] int64: step that last took the atom
  Tensor batch;                 // [P, B, m] on the host
  std::int64_t step = 0, bad_vectors = 0, revived = 0;

  Impl(const TrainConfig& c, std::vector<TrainTarget> t, VectorStream& s)
      : config(c),
        targets(std::move(t)),
        stream(s),
        device(device_from(c.device)),
        ops({c.sparsity,
             static_cast<float>(c.relative_tolerance),
             Selection::from(c.selection),
             c.threads},
            device) {}

  std::int64_t P() const { return static_cast<std::int64_t>(targets.size()); }
  std::int64_t N() const { return config.num_atoms; }
  std::int64_t m() const { return stream.dim(); }
  bool published() const { return config.recipe == "lexico"; }

  void initialize(const std::vector<float>& initial) {
    const std::size_t size = static_cast<std::size_t>(P() * N() * m());
    if (!initial.empty() && initial.size() != size)
      throw_invalid("initial dictionaries hold ",
                    initial.size(),
                    " numbers, must be ",
                    P(),
                    " x ",
                    N(),
                    " x ",
                    m());
    if (!initial.empty())
      atoms = torch::from_blob(const_cast<float*>(initial.data()), {P(), N(), m()}).clone();
    else
      atoms = config.initialization == "samples" ? sampled_atoms() : random_atoms();
    atoms = unit_rows(atoms).to(device).contiguous();
    first = torch::zeros_like(atoms);
    second = torch::zeros_like(atoms);
    last_used = torch::zeros({P(), N()}, torch::TensorOptions(torch::kLong).device(device));
  }

  /// Directions as `kaiming_uniform_` and a normalization give them: independent uniform
  /// components.
  Tensor random_atoms() const {
    Tensor rows = torch::empty({P(), N(), m()});
    detail::Random random({config.seed, kInitialAtoms});
    float* out = rows.data_ptr<float>();
    for (std::int64_t i = 0; i < rows.numel(); ++i)
      out[i] = static_cast<float>(2.0 * random.uniform() - 1.0);
    return rows;
  }

  /// The first usable N vectors of the (shuffled) stream; what is missing is filled with random
  /// directions.
  Tensor sampled_atoms() {
    Tensor rows = random_atoms();
    const std::int64_t want = 2 * N();  // spare ones replace zero and bad vectors
    Tensor samples = torch::empty({P(), want, m()});
    stream.next(want, samples.data_ptr<float>());
    stream.seek(0);
    const Tensor norms = samples.norm(2, 2);
    const Tensor usable = norms.isfinite() & (norms > 0);
    for (std::int64_t p = 0; p < P(); ++p) {
      const Tensor good = samples[p].index({usable[p]});
      const std::int64_t count = std::min(N(), good.size(0));
      rows[p].narrow(0, 0, count).copy_(unit_rows(good.narrow(0, 0, count)));
    }
    // Equal samples would be equal atoms for ever: a little noise tells them apart.
    detail::Random random({config.seed, kInitialAtoms, 1});
    float* out = rows.data_ptr<float>();
    const double noise = 0.01 / std::sqrt(static_cast<double>(m()));
    for (std::int64_t i = 0; i < rows.numel(); ++i)
      out[i] += static_cast<float>(noise * random.normal());
    return rows;
  }

  /// The next batch on the device; vectors with NaN or Inf are zeroed and counted. @returns how
  /// many of each dictionary are good, [P].
  Tensor next_batch(Tensor& x) {
    if (!batch.defined()) batch = torch::empty({P(), std::int64_t{config.batch_size}, m()});
    stream.next(config.batch_size, batch.data_ptr<float>());
    const Tensor energy = batch.square().sum(2);
    const Tensor good = energy < kMostEnergy;  // not of a NaN or Inf
    const Tensor counts = good.sum(1);
    const std::int64_t bad = batch.size(0) * batch.size(1) - counts.sum().item<std::int64_t>();
    if (bad > 0) {
      if (torch::isfinite(batch.amax(2))
              .logical_and(torch::isfinite(batch.amin(2)))
              .ne(good)
              .any()
              .item<bool>())
        throw IoError("vectors of norm " +
                      std::to_string(batch.nan_to_num(0, 0, 0).abs().max().item<float>()) +
                      " are too large to square in float32: scale the data");
      bad_vectors += bad;
      batch.masked_fill_(good.logical_not().unsqueeze(2), 0.0f);
      for (std::int64_t p = 0; p < P(); ++p)
        if (counts[p].item<std::int64_t>() == 0)
          throw IoError("layer " + std::to_string(targets[static_cast<std::size_t>(p)].layer) +
                        " " + name_of(targets[static_cast<std::size_t>(p)].kind) +
                        ": every vector of a batch holds NaN or Inf");
    }
    x = batch.to(device);
    return counts;
  }

  double learning_rate() const {
    const double steps = static_cast<double>(config.num_steps());
    double progress = static_cast<double>(step) / steps;
    if (published()) {  // the schedule moves once per epoch
      const std::int64_t per_epoch = (config.num_steps() + config.epochs - 1) / config.epochs;
      progress = static_cast<double>(step / per_epoch) / config.epochs;
    }
    return config.learning_rate * 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
  }

  /// d loss / d atoms up to a constant. Published: the loss is one mean over everything. sgd: each
  /// dictionary has its own scale, the mean energy of its vectors, so that Adam's epsilon never
  /// matters.
  Tensor atom_gradient(const Tensor& x, const detail::CodedBatch& coded) {
    if (published()) return ops.gradient(atoms, coded, -2.0 / static_cast<double>(x.numel()));
    Tensor gradient = ops.gradient(atoms, coded, -2.0 / static_cast<double>(config.batch_size));
    gradient /= x.square().sum(2).mean(1).clamp_min(1e-30).view({P(), 1, 1});
    return gradient;
  }

  void adam_step(const Tensor& gradient, double rate) {  // Kingma and Ba, arXiv:1412.6980
    const double t = static_cast<double>(step + 1);
    first.mul_(kBeta1).add_(gradient, 1.0 - kBeta1);
    second.mul_(kBeta2).addcmul_(gradient, gradient, 1.0 - kBeta2);
    const Tensor scale = (second / (1.0 - std::pow(kBeta2, t))).sqrt_().add_(kEpsilon);
    atoms.addcdiv_(first, scale, -rate / (1.0 - std::pow(kBeta1, t)));
  }

  void note_use(const detail::CodedBatch& coded) {
    const Tensor offsets =
        torch::arange(P(), torch::TensorOptions(torch::kLong).device(device)) * N();
    const Tensor flat = (coded.indices.to(torch::kLong) + offsets.view({P(), 1, 1}))
                            .masked_select(coded.indices >= 0);
    last_used.view({-1}).index_fill_(0, flat, step + 1);
  }

  Tensor unused() const {
    const std::int64_t patience = (kReviveAfter * N() + config.batch_size - 1) / config.batch_size;
    return last_used < step + 1 - patience;
  }

  /// Unused atoms take the direction of what is left of a badly coded vector, chosen with
  /// probability ~ |r|^2.
  void revive_unused(const detail::CodedBatch& coded) {
    if ((step + 1) % kReviveEverySteps != 0 ||
        static_cast<double>(step) > kReviveUntil * static_cast<double>(config.num_steps()))
      return;
    const Tensor dead = unused().nonzero().to(torch::kCPU);
    if (dead.size(0) == 0) return;
    const Tensor energy =
        coded.residual.square().sum(2).to(torch::kCPU, torch::kFloat64).cumsum(1).contiguous();
    detail::Random random({config.seed, kRevivedAtoms, static_cast<std::uint64_t>(step)});
    for (std::int64_t i = 0; i < dead.size(0); ++i) {
      const std::int64_t p = dead[i][0].item<std::int64_t>(), n = dead[i][1].item<std::int64_t>();
      const double* sums = energy[p].data_ptr<double>();
      const double total = sums[config.batch_size - 1];
      if (!(total > 0)) continue;
      const std::int64_t b =
          std::upper_bound(sums, sums + config.batch_size - 1, random.uniform() * total) - sums;
      const Tensor direction = coded.residual[p][b];
      if (!(direction.norm().item<float>() > 0)) continue;
      atoms[p][n].copy_(direction / direction.norm());
      first[p][n].zero_();
      second[p][n].zero_();
      last_used[p][n] = step + 1;
      ++revived;
    }
  }

  TrainStep measure(const Tensor& x,
                    const Tensor& good,
                    const detail::CodedBatch& coded,
                    double rate) const {
    TrainStep out;
    const Tensor counts = good.to(torch::kFloat64);
    const Tensor errors =
        (coded.residual.norm(2, 2) / (x.norm(2, 2) + 1e-8)).sum(1).to(torch::kCPU, torch::kFloat64);
    const Tensor per_dictionary = (errors / counts).contiguous();
    out.step = step + 1;
    out.num_steps = config.num_steps();
    out.vectors = (step + 1) * config.batch_size;
    out.learning_rate = rate;
    out.loss = coded.residual.square().sum(torch::kFloat64).item<double>() /
               (counts.sum().item<double>() * static_cast<double>(m()));
    out.relative_error = per_dictionary.mean().item<double>();
    out.relative_errors.assign(per_dictionary.data_ptr<double>(),
                               per_dictionary.data_ptr<double>() + P());
    out.bad_vectors = bad_vectors;
    out.revived_atoms = revived;
    return out;
  }

  TrainStep train_step() {
    Tensor x;
    const Tensor good = next_batch(x);  // x: the next vectors of every dictionary
    const detail::CodedBatch coded =
        ops.code(atoms, x);  // y: which atoms, how much of each, and x - D y
    const double rate = learning_rate();
    const TrainStep measured = measure(x, good, coded, rate);
    if (!std::isfinite(measured.loss))
      throw InvalidArgument("training diverged at step " + std::to_string(step + 1) +
                            "; try a learning_rate below " + std::to_string(config.learning_rate));
    Tensor gradient = atom_gradient(x, coded);  // of mean |x - D y|^2, y held fixed
    if (published()) normalize(atoms);          // before the step: so does the released trainer
    keep_tangent(atoms, gradient);              // without the part along each atom
    adam_step(gradient, rate);
    if (!published()) normalize(atoms);  // |d| = 1 again
    note_use(coded);
    if (!published()) revive_unused(coded);
    ++step;
    return measured;
  }
};

Trainer::Trainer(const TrainConfig& config,
                 std::vector<TrainTarget> targets,
                 VectorStream& stream,
                 const std::vector<float>& initial) {
  config.validate();
  const TrainConfig resolved = config.resolved();
  if (targets.empty() || static_cast<int>(targets.size()) != stream.num_dictionaries())
    throw_invalid(
        "trainer: ", targets.size(), " targets, but vectors for ", stream.num_dictionaries());
  if (resolved.sparsity > stream.dim())
    throw_invalid("sparsity is ", resolved.sparsity, ", must be at most head_dim = ", stream.dim());
  if (resolved.threads > 0) torch::set_num_threads(resolved.threads);
  const torch::InferenceMode no_gradients;
  impl_ = std::make_unique<Impl>(resolved, std::move(targets), stream);
  try {
    impl_->initialize(initial);
  } catch (const c10::Error& e) {
    throw ResourceError(std::string("cannot set up training: ") + e.what_without_backtrace());
  }
}

Trainer::~Trainer() = default;

const TrainConfig& Trainer::config() const { return impl_->config; }
std::int64_t Trainer::step() const { return impl_->step; }

bool Trainer::run(TrainObserver& observer) {
  const torch::InferenceMode no_gradients;
  while (impl_->step < impl_->config.num_steps()) {
    TrainStep done;
    try {
      done = impl_->train_step();
    } catch (const c10::Error& e) {
      throw ResourceError("a training step failed: " + std::string(e.what_without_backtrace()));
    }
    observer.on_step(done);
    if (observer.wants_stop()) break;
  }
  return impl_->step >= impl_->config.num_steps();
}

DictionarySet Trainer::dictionaries() const {
  const torch::InferenceMode no_gradients;
  const Tensor atoms = impl_->atoms.to(torch::kCPU).contiguous();
  DictionarySet set;
  for (std::size_t p = 0; p < impl_->targets.size(); ++p) {
    const float* from = atoms[static_cast<std::int64_t>(p)].data_ptr<float>();
    Dictionary d{impl_->targets[p].layer,
                 impl_->targets[p].kind,
                 static_cast<int>(impl_->N()),
                 static_cast<int>(impl_->m()),
                 {from, from + impl_->N() * impl_->m()}};
    normalize_atoms(d.atoms, d.num_atoms, d.dim);
    set.dictionaries.push_back(std::move(d));
  }
  return set;
}

std::vector<int> Trainer::unused_atoms() const {
  const torch::InferenceMode no_gradients;
  const Tensor counts = impl_->unused().sum(1).to(torch::kCPU);
  std::vector<int> out;
  for (std::int64_t p = 0; p < counts.size(0); ++p)
    out.push_back(static_cast<int>(counts[p].item<std::int64_t>()));
  return out;
}

void Trainer::save(const std::string& path) const {
  const torch::InferenceMode no_gradients;
  const auto host = [](const Tensor& t) { return t.to(torch::kCPU, torch::kFloat32).contiguous(); };
  const Tensor atoms = host(impl_->atoms), first = host(impl_->first), second = host(impl_->second),
               last_used = host(impl_->last_used);  // steps below 2^24 are exact in float32
  const std::vector<std::int64_t> shape = {impl_->P(), impl_->N(), impl_->m()};
  std::map<std::string, std::string> metadata =
      fingerprint(impl_->config, impl_->targets, impl_->stream);
  metadata["format"] = "lexico-checkpoint 1";
  metadata["step"] = std::to_string(impl_->step);
  metadata["bad_vectors"] = std::to_string(impl_->bad_vectors);
  metadata["revived_atoms"] = std::to_string(impl_->revived);
  write_file(path,
             detail::safetensors_text(
                 {{"atoms", {shape, atoms.data_ptr<float>()}},
                  {"first_moment", {shape, first.data_ptr<float>()}},
                  {"second_moment", {shape, second.data_ptr<float>()}},
                  {"last_used", {{impl_->P(), impl_->N()}, last_used.data_ptr<float>()}}},
                 metadata));
}

void Trainer::load(const std::string& path) {
  const torch::InferenceMode no_gradients;
  const detail::SafeTensors file = detail::read_safetensors(path);
  const auto text = [&](const std::string& key) {
    const auto found = file.metadata.find(key);
    if (found == file.metadata.end()) throw IoError(path + ": no '" + key + "': not a checkpoint");
    return found->second;
  };
  if (text("format") != "lexico-checkpoint 1")
    throw IoError(path + ": format is '" + text("format") + "'");
  for (const auto& [key, value] : fingerprint(impl_->config, impl_->targets, impl_->stream))
    if (text(key) != value)
      throw InvalidArgument(path + ": was trained with " + key + " = " + text(key) +
                            ", this run has " + value +
                            "; start again with --overwrite or restore the setting");
  const auto restore = [&](const std::string& name, const Tensor& like) {
    const auto found = file.tensors.find(name);
    if (found == file.tensors.end() || found->second.shape != like.sizes().vec())
      throw IoError(path + ": tensor '" + name + "' is missing or has another shape");
    std::vector<float> values = detail::to_floats(found->second, path + ": tensor '" + name + "'");
    return torch::from_blob(values.data(), like.sizes()).clone().to(like.options());
  };
  const Tensor atoms = restore("atoms", impl_->atoms),
               first = restore("first_moment", impl_->first),
               second = restore("second_moment", impl_->second),
               last_used = restore("last_used", impl_->last_used);
  const auto number = [&](const std::string& key) {
    try {
      return std::stoll(text(key));
    } catch (const std::logic_error&) {
      throw IoError(path + ": '" + key + "' is '" + text(key) + "', must be a number");
    }
  };
  const std::int64_t step = number("step"), bad = number("bad_vectors"),
                     revived = number("revived_atoms");
  if (step < 0 || step > impl_->config.num_steps())
    throw IoError(path + ": step is " + std::to_string(step) + ", the run has " +
                  std::to_string(impl_->config.num_steps()));
  impl_->atoms = atoms;
  impl_->first = first;
  impl_->second = second;
  impl_->last_used = last_used;
  impl_->step = step;
  impl_->bad_vectors = bad;
  impl_->revived = revived;
  impl_->stream.seek(step * impl_->config.batch_size);
}

}  // namespace lexico
