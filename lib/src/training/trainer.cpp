// The training loop and its two recipes. docs/training.md says what each step does and why.
#include "lexico/trainer.h"

#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <future>
#include <map>
#include <numbers>
#include <sstream>
#include <utility>

#include "check.h"
#include "core/random.h"
#include "core/safetensors.h"
#include "lexico/files.h"
#include "lexico/sha256.h"
#include "training/sparse_ops.h"

namespace lexico {
namespace {

using detail::throw_invalid;
using torch::Tensor;

const std::string kCheckpointFormat = "lexico-checkpoint 3";
const std::string kNote = "note.";          // before the caller's keys
constexpr std::size_t kChecksumBytes = 64;  // hex digits of SHA-256
// What a random stream is for.
constexpr std::uint64_t kInitialAtoms = 3, kRevivedAtoms = 4, kRandomAtoms = 5;
constexpr int kReviveAfter = 20;  // an atom is unused when none of the last 20 N vectors took it
constexpr double kReviveUntil = 0.8;  // of the run: what comes back later cannot settle any more
constexpr int kReviveEverySteps = 16;
constexpr float kMostNorm = 1e15f;  // of a vector: sums of squares over a batch stay finite
constexpr std::int64_t kWindowVectors = 65536;  // errors are compared in means over this many
// A dictionary that was better than the first share of the error of random atoms and is now worse
// than the second has diverged.
constexpr double kWasBetter = 0.8, kNoBetter = 0.95;
constexpr std::int64_t kPatienceForVectors = 16;  // batches of nothing but NaN before giving up
constexpr double kProbeShare = 0.02;              // of a budget in minutes, to measure the speed
constexpr std::int64_t kProbeSteps = 5;

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

std::string text_of(double value) {
  std::ostringstream text;
  text.precision(17);
  text << value;
  return text.str();
}

std::string text_of(const std::vector<double>& values) {
  std::string text;
  for (double value : values) text += (text.empty() ? "" : " ") + text_of(value);
  return text;
}

/// Of one dictionary: the same whichever others are trained beside it.
detail::Random random_of(const TrainConfig& config,
                         const TrainTarget& target,
                         std::uint64_t purpose,
                         std::uint64_t which = 0) {
  return {config.seed,
          purpose,
          which,
          static_cast<std::uint64_t>(target.layer),
          static_cast<std::uint64_t>(target.kind),
          static_cast<std::uint64_t>(target.head + 1)};
}

std::string target_text(const std::vector<TrainTarget>& targets) {
  std::string text;
  for (const TrainTarget& t : targets) text += (text.empty() ? "" : "; ") + name_of(t);
  return text;
}

/// The bytes of a checkpoint. @throws IoError unless its last ones are the checksum of the others.
std::string read_checked(const std::string& path) {
  std::string bytes = read_file(path);
  const std::size_t size = bytes.size() - std::min(bytes.size(), kChecksumBytes);
  Sha256 sum;
  sum.update(bytes.data(), size);
  if (sum.finish() != std::string_view(bytes).substr(size))
    throw IoError(path + ": the checksum at its end does not fit its " +
                  std::to_string(bytes.size()) +
                  " bytes: it is damaged, cut off, or of an older version");
  return bytes;
}

/// What a schedule does at a step: which method, at which rate.
struct Phase {
  bool online;
  double rate;
};

}  // namespace

std::map<std::string, std::string> fingerprint(const TrainConfig& config,
                                               const std::vector<TrainTarget>& targets,
                                               const VectorStream& stream,
                                               int dictionaries_of_job) {
  std::map<std::string, std::string> fields;
  TrainConfig::for_each_field(config, [&](const char* key, const auto& value, const char*) {
    std::ostringstream text;
    text.precision(17);
    text << value;
    fields[key] = text.str();
  });
  if (config.minutes > 0) fields["vectors"] = "0";  // found on the way
  fields.erase("threads");
  fields.erase("device");
  fields["targets"] = target_text(targets);
  if (config.recipe == "lexico")
    fields["dictionaries_of_job"] = std::to_string(dictionaries_of_job);
  fields["data"] = stream.identity();
  return fields;
}

std::string name_of(const TrainTarget& target) {
  std::string text =
      (target.more_layers.empty() ? "layer " : "layers ") + std::to_string(target.layer);
  for (int layer : target.more_layers) text += ", " + std::to_string(layer);
  text += std::string(" ") + name_of(target.kind);
  if (target.head >= 0) text += ", head " + std::to_string(target.head);
  return text;
}

struct Trainer::Impl {
  using Clock = std::chrono::steady_clock;

  TrainConfig config;
  std::vector<TrainTarget> targets;
  VectorStream& stream;
  int dictionaries_of_job;
  torch::Device device;
  std::vector<int> budgets;  // [P], or empty: all alike
  detail::SparseOps ops;

  Tensor atoms;                  // [P, N, m]: the dictionaries
  bool samples_first = false;    // they are yet to be replaced by samples
  detail::AdamMoments moments;   // sgd
  Tensor codes_sum, signal_sum;  // online: A [P, N, N] and B [P, N, m]
  Tensor last_used;              // [P, N] int64: step that last took the atom
  std::int64_t step = 0, bad_vectors = 0, skipped = 0, revived = 0;
  std::vector<std::int64_t> good_vectors;  // [P], so far
  std::vector<double> last_errors;         // [P]

  // The best so far, by the mean error of windows of the training batches.
  Tensor best_atoms;
  std::vector<double> best_errors, window_errors;  // [P]; the sum over the window so far
  std::vector<double> random_errors;               // [P]: of random atoms on the first batch
  std::int64_t window_steps = 0;

  Tensor batches[2];          // [P, B, m] on the host: the one in use and the one being read
  std::future<void> reading;  // into batches[1]; valid: the stream is one batch ahead
  Clock::time_point began = Clock::now();

  Impl(const TrainConfig& c, std::vector<TrainTarget> t, VectorStream& s, int of_job)
      : config(c),
        targets(std::move(t)),
        stream(s),
        dictionaries_of_job(of_job > 0 ? of_job : static_cast<int>(targets.size())),
        device(device_from(c.device)),
        budgets(budgets_of(c, targets)),
        ops({most_atoms(c, targets),
             static_cast<float>(c.relative_tolerance),
             Selection::from(c.selection),
             c.threads},
            device) {}
  ~Impl() {
    if (reading.valid()) reading.wait();
  }

  static int most_atoms(const TrainConfig& config, const std::vector<TrainTarget>& targets) {
    int most = 1;
    for (const TrainTarget& t : targets) most = std::max(most, config.sparsity_of(t.kind));
    return most;
  }
  static std::vector<int> budgets_of(const TrainConfig& config,
                                     const std::vector<TrainTarget>& targets) {
    std::vector<int> out;
    for (const TrainTarget& t : targets) out.push_back(config.sparsity_of(t.kind));
    if (std::all_of(out.begin(), out.end(), [&](int b) { return b == out[0]; })) out.clear();
    return out;
  }

  std::int64_t P() const { return static_cast<std::int64_t>(targets.size()); }
  std::int64_t N() const { return config.num_atoms; }
  std::int64_t m() const { return stream.dim(); }
  std::int64_t batch_size() const { return config.batch_size; }
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
      atoms = random_atoms(kInitialAtoms);
    samples_first = initial.empty() && config.initialization == "samples";
    atoms = unit_rows(atoms).to(device).contiguous();
    last_used = torch::zeros({P(), N()}, torch::TensorOptions(torch::kLong).device(device));
    const auto count = static_cast<std::size_t>(P());
    good_vectors.assign(count, 0);
    last_errors.assign(count, 1.0);
    best_atoms = atoms.clone();
    best_errors.assign(count, 2.0);  // above any error
    window_errors.assign(count, 0.0);
    if (config.recipe == "online") {
      codes_sum = torch::zeros({P(), N(), N()}, atoms.options());
      signal_sum = torch::zeros_like(atoms);
    }
    if (config.recipe != "online" || config.finish > 0) {
      moments.first = torch::zeros_like(atoms);
      moments.second = torch::zeros_like(atoms);
    }
  }

  /// Starts from samples where the config says so: not before someone asks for atoms, since a
  /// resumed run needs none and the stream may be dear.
  void take_samples() {
    if (!std::exchange(samples_first, false)) return;
    atoms = unit_rows(sampled_atoms()).to(device).contiguous();
    best_atoms = atoms.clone();
  }

  /// Directions as `kaiming_uniform_` and a normalization give them: independent uniform
  /// components.
  Tensor random_atoms(std::uint64_t purpose) const {
    Tensor rows = torch::empty({P(), N(), m()});
    float* out = rows.data_ptr<float>();
    for (const TrainTarget& target : targets) {
      detail::Random random = random_of(config, target, purpose);
      for (std::int64_t i = 0; i < N() * m(); ++i)
        *out++ = static_cast<float>(2.0 * random.uniform() - 1.0);
    }
    return rows;
  }

  /// The first usable N vectors of the (shuffled) stream; what is missing is filled with random
  /// directions.
  Tensor sampled_atoms() {
    Tensor rows = random_atoms(kInitialAtoms);
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
    float* out = rows.data_ptr<float>();
    const double noise = 0.01 / std::sqrt(static_cast<double>(m()));
    for (const TrainTarget& target : targets) {
      detail::Random random = random_of(config, target, kInitialAtoms, 1);
      for (std::int64_t i = 0; i < N() * m(); ++i)
        *out++ += static_cast<float>(noise * random.normal());
    }
    return rows;
  }

  // --- the budget ---------------------------------------------------------------------------

  std::int64_t num_steps() const { return config.num_steps(); }
  bool budget_known() const { return config.vectors > 0; }
  double minutes_used() const {
    return std::chrono::duration<double>(Clock::now() - began).count() / 60;
  }

  /// Turns a budget in minutes into vectors once some steps have shown the speed; the first, which
  /// warms up, does not count.
  void fit_budget(Clock::time_point first_step_done, std::int64_t steps_since) {
    if (budget_known() || steps_since < kProbeSteps ||
        minutes_used() < kProbeShare * config.minutes)
      return;
    const double minutes_a_step =
        std::chrono::duration<double>(Clock::now() - first_step_done).count() / 60 /
        static_cast<double>(steps_since);
    const double left = std::max(0.0, config.minutes - minutes_used()) / minutes_a_step;
    config.vectors =
        (step + std::max<std::int64_t>(1, static_cast<std::int64_t>(left))) * batch_size();
  }

  Phase phase() const {
    if (!budget_known()) return {config.recipe == "online", config.learning_rate};
    const double steps = static_cast<double>(num_steps());
    double first = 0;  // of the annealing
    if (config.recipe == "online") {
      first = std::ceil((1 - config.finish) * steps);
      if (static_cast<double>(step) < first) return {true, 0};
    }
    double progress = (static_cast<double>(step) - first) / (steps - first);
    if (published()) {  // the schedule moves once per epoch
      const std::int64_t per_epoch = (num_steps() + config.epochs - 1) / config.epochs;
      progress = static_cast<double>(step / per_epoch) / config.epochs;
    }
    return {false, config.learning_rate * 0.5 * (1.0 + std::cos(std::numbers::pi * progress))};
  }

  // --- vectors ------------------------------------------------------------------------------

  /// The next batch on the device; the one after it is read meanwhile.
  Tensor next_batch() {
    for (Tensor& batch : batches)
      if (!batch.defined())  // pinned: copies do not hold up whoever starts them
        batch = torch::empty({P(), batch_size(), m()},
                             torch::TensorOptions().pinned_memory(device.is_cuda()));
    if (reading.valid())
      reading.get();
    else
      stream.next(batch_size(), batches[1].data_ptr<float>());
    std::swap(batches[0], batches[1]);
    if (!budget_known() || step + 1 < num_steps())
      reading = std::async(std::launch::async, [this, out = batches[1].data_ptr<float>()] {
        stream.next(batch_size(), out);
      });
    // Read into again no earlier than in the next call: coding waits for the device in between.
    return device.is_cpu() ? batches[0] : batches[0].to(device, /*non_blocking=*/true);
  }

  /// Zeroes vectors with NaN or Inf and what is left of them, and counts them. @returns how many of
  /// each dictionary are good.
  std::vector<std::int64_t> leave_out_bad(Tensor& x, detail::CodedBatch& coded) {
    const std::int64_t B = batch_size();
    std::vector<std::int64_t> good(static_cast<std::size_t>(P()), B);
    float* norms = coded.signal_norms.data_ptr<float>();
    float* left = coded.residual_norms.data_ptr<float>();
    for (std::int64_t row = 0; row < P() * B; ++row) {
      if (norms[row] < kMostNorm) continue;
      const std::int64_t p = row / B, b = row % B;
      const Tensor values = batches[0][p][b];
      if (values.isfinite().all().item<bool>())
        throw IoError("vectors of norm " + std::to_string(values.abs().max().item<float>()) +
                      " are too large to square in float32: scale the data");
      x[p][b].zero_();
      coded.residual[p][b].zero_();
      norms[row] = left[row] = 0;
      --good[static_cast<std::size_t>(p)];
      ++bad_vectors;
    }
    for (std::size_t p = 0; p < good.size(); ++p) {
      good_vectors[p] += good[p];
      if (good[p] > 0) continue;
      ++skipped;
      if (good_vectors[p] == 0 && (step + 1 >= kPatienceForVectors || step + 1 == num_steps()))
        throw IoError(name_of(targets[p]) + ": every vector of the first " +
                      std::to_string((step + 1) * B) + " holds NaN or Inf");
    }
    return good;
  }

  // --- one step -----------------------------------------------------------------------------

  void adam_step(const detail::CodedBatch& coded,
                 const std::vector<std::int64_t>& good,
                 double rate) {
    const std::int64_t B = batch_size();
    std::vector<float> scales(good.size(), 0.0f);
    for (std::size_t p = 0; p < good.size(); ++p) {
      if (good[p] == 0) continue;
      // Published: the loss is one mean over everything. sgd: each dictionary has its own scale,
      // the mean energy of its vectors, so that Adam's epsilon never matters.
      double unit = static_cast<double>(dictionaries_of_job * B * m());
      if (!published()) {
        const float* norms =
            coded.signal_norms.data_ptr<float>() + static_cast<std::int64_t>(p) * B;
        unit = 1e-30;
        for (std::int64_t b = 0; b < B; ++b) unit += static_cast<double>(norms[b]) * norms[b];
      }
      scales[p] = static_cast<float>(1 / unit);
    }
    const Tensor gradient = ops.gradient(atoms, coded, -2.0);  // of |x - D y|^2, y held fixed
    ops.adam(atoms, moments, gradient, scales, rate, /*normalize_first=*/published());
  }

  void online_step(const Tensor& x, const detail::CodedBatch& coded) {
    const double remembered = config.window * static_cast<double>(N());
    const double keep = std::exp(-static_cast<double>(batch_size()) / remembered);
    ops.add_co_occurrence(atoms, coded, x, keep, codes_sum, signal_sum);
    ops.descend(atoms, codes_sum, signal_sum);
  }

  Tensor unused() const {
    const std::int64_t patience = (kReviveAfter * N() + batch_size() - 1) / batch_size();
    return last_used < step + 1 - patience;
  }

  /// Unused atoms take the direction of what is left of a badly coded vector, chosen with
  /// probability ~ |r|^2.
  void revive_unused(const detail::CodedBatch& coded) {
    if ((step + 1) % kReviveEverySteps != 0 ||
        (budget_known() &&
         static_cast<double>(step) > kReviveUntil * static_cast<double>(num_steps())))
      return;
    const Tensor dead = unused().nonzero().to(torch::kCPU);
    if (dead.size(0) == 0) return;
    const Tensor energy = coded.residual_norms.to(torch::kFloat64).square().cumsum(1).contiguous();
    detail::Random random({});
    for (std::int64_t i = 0, before = -1; i < dead.size(0); ++i) {
      const std::int64_t p = dead[i][0].item<std::int64_t>(), n = dead[i][1].item<std::int64_t>();
      if (p != std::exchange(before, p))
        random = random_of(config,
                           targets[static_cast<std::size_t>(p)],
                           kRevivedAtoms,
                           static_cast<std::uint64_t>(step));
      const double* sums = energy[p].data_ptr<double>();
      const double total = sums[batch_size() - 1];
      if (!(total > 0)) continue;
      const std::int64_t b =
          std::upper_bound(sums, sums + batch_size() - 1, random.uniform() * total) - sums;
      const Tensor direction = coded.residual[p][b];
      if (!(direction.norm().item<float>() > 0)) continue;
      atoms[p][n].copy_(direction / direction.norm());
      forget(p, n);
      last_used[p][n] = step + 1;
      ++revived;
    }
  }

  /// What was learnt about an atom that is another one now.
  void forget(std::int64_t p, std::int64_t n) {
    if (moments.first.defined()) {
      moments.first[p][n].zero_();
      moments.second[p][n].zero_();
    }
    if (codes_sum.defined()) {
      codes_sum[p].select(0, n).zero_();
      codes_sum[p].select(1, n).zero_();
      signal_sum[p][n].zero_();
    }
  }

  TrainStep measure(const std::vector<std::int64_t>& good,
                    const detail::CodedBatch& coded,
                    double rate) {
    TrainStep out;
    const float* norms = coded.signal_norms.data_ptr<float>();
    const float* left = coded.residual_norms.data_ptr<float>();
    double energy = 0;
    std::int64_t vectors = 0;
    for (std::size_t p = 0; p < good.size(); ++p) {
      double sum = 0;
      for (std::int64_t b = 0; b < batch_size(); ++b, ++norms, ++left) {
        sum += *left / (*norms + 1e-8);
        energy += static_cast<double>(*left) * *left;
      }
      vectors += good[p];
      if (good[p] > 0) last_errors[p] = sum / static_cast<double>(good[p]);
      out.relative_error += last_errors[p] / static_cast<double>(P());
    }
    out.step = step + 1;
    out.num_steps = num_steps();
    out.vectors = (step + 1) * batch_size();
    out.learning_rate = rate;
    out.loss = vectors > 0 ? energy / static_cast<double>(vectors * m()) : 0;
    out.relative_errors = last_errors;
    out.bad_vectors = bad_vectors;
    out.skipped_batches = skipped;
    out.revived_atoms = revived;
    return out;
  }

  /// Compares this window's errors with the best and with those of random atoms.
  void keep_best() {
    if (step == 0) best_errors = last_errors;  // of the start
    for (std::size_t p = 0; p < last_errors.size(); ++p) {
      if (!std::isfinite(last_errors[p])) diverged(p);
      window_errors[p] += last_errors[p];
    }
    if (++window_steps * batch_size() < kWindowVectors) return;
    for (std::size_t p = 0; p < window_errors.size(); ++p) {
      const double error = window_errors[p] / static_cast<double>(window_steps);
      if (error > kNoBetter * random_errors[p] && best_errors[p] < kWasBetter * random_errors[p])
        diverged(p);
      if (error < best_errors[p]) {
        best_errors[p] = error;
        const auto at = static_cast<std::int64_t>(p);
        best_atoms[at].copy_(atoms[at]);
      }
      window_errors[p] = 0;
    }
    window_steps = 0;
  }

  [[noreturn]] void diverged(std::size_t p) {
    atoms.copy_(best_atoms);
    std::string text = "training of " + name_of(targets[p]) + " diverged at step " +
                       std::to_string(step + 1) + " (error " + std::to_string(last_errors[p]) +
                       ", random atoms " + std::to_string(random_errors[p]) + "); ";
    text += "the best atoms so far (error " + std::to_string(best_errors[p]) + ") are kept";
    text += config.recipe == "online" && phase().online
                ? "; try a larger window or batch_size"
                : "; try a learning_rate below " + text_of(config.learning_rate);
    throw Diverged(text);
  }

  TrainStep train_step() {
    take_samples();
    Tensor x = next_batch();  // x: the next vectors
    if (random_errors.empty()) measure_random_atoms(x);
    detail::CodedBatch coded = ops.code(atoms, x, budgets);  // y, and x - D y
    const std::vector<std::int64_t> good = leave_out_bad(x, coded);
    const auto [online, rate] = phase();
    const TrainStep measured = measure(good, coded, rate);
    keep_best();
    if (online)
      online_step(x, coded);
    else
      adam_step(coded, good, rate);
    last_used.masked_fill_(coded.used, step + 1);
    if (!published()) revive_unused(coded);
    ++step;
    return measured;
  }

  void measure_random_atoms(const Tensor& x) {
    const Tensor random = unit_rows(random_atoms(kRandomAtoms)).to(device).contiguous();
    const detail::CodedBatch coded = ops.code(random, x, budgets);
    const Tensor ratio = coded.residual_norms / (coded.signal_norms + 1e-8);
    const Tensor good = coded.signal_norms < kMostNorm;
    for (std::int64_t p = 0; p < P(); ++p) {
      const Tensor errors = ratio[p].index({good[p]}).to(torch::kFloat64);
      random_errors.push_back(errors.numel() > 0 ? errors.mean().item<double>() : 1.0);
    }
  }

  // --- checkpoints --------------------------------------------------------------------------

  /// Tensors of the state by name; those that this recipe has.
  std::map<std::string, Tensor*> state() {
    std::map<std::string, Tensor*> all = {{"atoms", &atoms},
                                          {"first_moment", &moments.first},
                                          {"second_moment", &moments.second},
                                          {"codes_sum", &codes_sum},
                                          {"signal_sum", &signal_sum},
                                          {"last_used", &last_used},
                                          {"best_atoms", &best_atoms}};
    std::erase_if(all, [](const auto& item) { return !item.second->defined(); });
    return all;
  }
  std::map<std::string, std::int64_t*> counters() {
    return {{"step", &step},
            {"moments_step", &moments.step},
            {"bad_vectors_met", &bad_vectors},
            {"skipped_batches", &skipped},
            {"revived_atoms", &revived},
            {"window_steps", &window_steps}};
  }
  std::map<std::string, std::vector<double>*> numbers() {
    return {{"best_errors", &best_errors},
            {"window_errors", &window_errors},
            {"random_errors", &random_errors},
            {"last_errors", &last_errors}};
  }
};

Trainer::Trainer(const TrainConfig& config,
                 std::vector<TrainTarget> targets,
                 VectorStream& stream,
                 const std::vector<float>& initial,
                 int dictionaries_of_job) {
  config.validate();
  const TrainConfig resolved = config.resolved();
  if (targets.empty() || static_cast<int>(targets.size()) != stream.num_dictionaries())
    throw_invalid(
        "trainer: ", targets.size(), " targets, but vectors for ", stream.num_dictionaries());
  for (const TrainTarget& t : targets)
    if (const int s = resolved.sparsity_of(t.kind); s > stream.dim())
      throw_invalid(s == resolved.sparsity  ? ""
                    : t.kind == Kind::kKeys ? "key_"
                                            : "value_",
                    "sparsity is ",
                    s,
                    ", must be at most head_dim = ",
                    stream.dim());
  if (resolved.threads > 0) torch::set_num_threads(resolved.threads);
  const torch::InferenceMode no_gradients;
  impl_ = std::make_unique<Impl>(resolved, std::move(targets), stream, dictionaries_of_job);
  try {
    impl_->initialize(initial);
  } catch (const c10::Error& e) {
    throw ResourceError(std::string("cannot set up training: ") + e.what_without_backtrace());
  }
}

Trainer::~Trainer() = default;

const TrainConfig& Trainer::config() const { return impl_->config; }
std::int64_t Trainer::step() const { return impl_->step; }
std::int64_t Trainer::bad_vectors() const { return impl_->bad_vectors; }
std::int64_t Trainer::skipped_batches() const { return impl_->skipped; }

bool Trainer::run(TrainObserver& observer) {
  const torch::InferenceMode no_gradients;
  Impl::Clock::time_point first_step_done;
  for (std::int64_t steps = 0; !impl_->budget_known() || impl_->step < impl_->num_steps();
       ++steps) {
    TrainStep done;
    try {
      done = impl_->train_step();
    } catch (const c10::Error& e) {
      throw ResourceError("a training step failed: " + std::string(e.what_without_backtrace()));
    }
    if (steps == 0) first_step_done = Impl::Clock::now();
    impl_->fit_budget(first_step_done, steps);
    observer.on_step(done);
    if (observer.wants_stop()) break;
  }
  if (impl_->reading.valid()) impl_->reading.wait();  // the stream is the caller's again
  impl_->stream.pause();
  return impl_->budget_known() && impl_->step >= impl_->num_steps();
}

DictionarySet Trainer::dictionaries() const {
  const torch::InferenceMode no_gradients;
  impl_->take_samples();
  const Tensor atoms = impl_->atoms.to(torch::kCPU).contiguous();
  DictionarySet set;
  for (std::size_t p = 0; p < impl_->targets.size(); ++p) {
    const float* from = atoms[static_cast<std::int64_t>(p)].data_ptr<float>();
    Dictionary d;
    d.layer = impl_->targets[p].layer;
    d.kind = impl_->targets[p].kind;
    d.num_atoms = static_cast<int>(impl_->N());
    d.dim = static_cast<int>(impl_->m());
    d.atoms.assign(from, from + impl_->N() * impl_->m());
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

void Trainer::save(const std::string& path, const std::map<std::string, std::string>& notes) const {
  const torch::InferenceMode no_gradients;
  impl_->take_samples();
  std::map<std::string, std::string> metadata =
      fingerprint(impl_->config, impl_->targets, impl_->stream, impl_->dictionaries_of_job);
  metadata["format"] = kCheckpointFormat;
  metadata["budget"] = std::to_string(impl_->config.vectors);
  for (const auto& [name, value] : impl_->counters()) metadata[name] = std::to_string(*value);
  for (const auto& [name, values] : impl_->numbers()) metadata[name] = text_of(*values);
  std::string good;
  for (std::int64_t count : impl_->good_vectors) good += std::to_string(count) + " ";
  metadata["good_vectors"] = good;
  for (const auto& [key, note] : notes) metadata[kNote + key] = note;
  std::vector<Tensor> held;  // until they are written
  std::map<std::string, detail::NamedFloats> tensors;
  for (const auto& [name, tensor] : impl_->state()) {
    held.push_back(  // steps below 2^24 are exact in float32
        tensor->to(torch::kCPU, torch::kFloat32).contiguous());
    tensors[name] = {held.back().sizes().vec(), held.back().data_ptr<float>()};
  }
  const std::string header = detail::safetensors_header(tensors, metadata, kChecksumBytes);
  std::vector<std::string_view> pieces = {header};
  for (const auto& [name, tensor] : tensors) pieces.push_back(tensor.bytes());
  Sha256 sum;
  for (const std::string_view piece : pieces) sum.update(piece);
  const std::string checksum = sum.finish();
  pieces.push_back(checksum);
  write_file(path, pieces);
}

std::map<std::string, std::string> Trainer::load(const std::string& path) {
  const torch::InferenceMode no_gradients;
  const detail::SafeTensors file = detail::parse_safetensors(read_checked(path), path);
  const auto text = [&](const std::string& key) {
    const auto found = file.metadata.find(key);
    if (found == file.metadata.end()) throw IoError(path + ": no '" + key + "': not a checkpoint");
    return found->second;
  };
  if (text("format") != kCheckpointFormat)
    throw IoError(path + ": format is '" + text("format") + "', must be " + kCheckpointFormat);
  for (const auto& [key, value] :
       fingerprint(impl_->config, impl_->targets, impl_->stream, impl_->dictionaries_of_job))
    if (text(key) != value)
      throw InvalidArgument(path + ": was trained with " + key + " = " + text(key) +
                            ", this run has " + value +
                            "; start again with --overwrite or restore the setting");
  const auto number = [&](const std::string& key) -> std::int64_t {
    try {
      return std::stoll(text(key));
    } catch (const std::logic_error&) {
      throw IoError(path + ": '" + key + "' is '" + text(key) + "', must be a number");
    }
  };
  const auto list = [&](const std::string& key, std::size_t count) {
    std::istringstream in(text(key));
    std::vector<double> values;
    for (double value; in >> value;) values.push_back(value);
    if (values.size() != count)
      throw IoError(path + ": '" + key + "' has " + std::to_string(values.size()) +
                    " numbers, must have " + std::to_string(count));
    return values;
  };
  // Everything is read before anything is changed: a damaged file leaves the trainer as it was.
  for (const auto& [name, like] : impl_->state()) {
    const auto found = file.tensors.find(name);
    if (found == file.tensors.end() || found->second.shape != like->sizes().vec() ||
        found->second.dtype != "F32")
      throw IoError(path + ": tensor '" + name + "' is missing, not float32 or of another shape");
  }
  std::map<std::string, std::int64_t> counters;
  for (const auto& [name, value] : impl_->counters()) counters[name] = number(name);
  const std::int64_t budget = number("budget");
  const std::int64_t num_steps = (budget + impl_->batch_size() - 1) / impl_->batch_size();
  if (counters["step"] < 0 || (budget > 0 && counters["step"] > num_steps) ||
      (impl_->config.minutes == 0 && budget != impl_->config.vectors))
    throw IoError(path + ": step is " + std::to_string(counters["step"]) + " of a budget of " +
                  std::to_string(budget) + " vectors, the run has " +
                  std::to_string(impl_->num_steps()) + " steps");
  const auto P = static_cast<std::size_t>(impl_->P());
  std::map<std::string, std::vector<double>> lists;
  for (const auto& [name, values] : impl_->numbers())
    lists[name] = list(name, name == "random_errors" && text(name).empty() ? 0 : P);
  const std::vector<double> good = list("good_vectors", P);

  if (impl_->reading.valid()) impl_->reading.get();
  impl_->samples_first = false;
  for (const auto& [name, tensor] : impl_->state()) {
    void* values = const_cast<char*>(file.tensors.at(name).bytes.data());  // 8-byte aligned
    tensor->copy_(torch::from_blob(values, tensor->sizes()));
  }
  for (const auto& [name, value] : impl_->counters()) *value = counters[name];
  for (const auto& [name, values] : impl_->numbers()) *values = lists[name];
  impl_->good_vectors.assign(good.begin(), good.end());
  impl_->config.vectors = budget;
  impl_->stream.seek(impl_->step * impl_->batch_size());
  std::map<std::string, std::string> notes;
  for (const auto& [key, value] : file.metadata)
    if (key.starts_with(kNote)) notes[key.substr(kNote.size())] = value;
  return notes;
}

std::vector<float> initial_atoms(const DictionarySet& set,
                                 const std::string& path,
                                 const std::vector<TrainTarget>& targets,
                                 const TrainConfig& config,
                                 int dim,
                                 KeyStage key_stage) {
  std::vector<float> atoms;
  for (const TrainTarget& target : targets) {
    const Dictionary* d = set.find(target.layer, target.kind, target.head);
    if (d == nullptr) throw_invalid(path, ": has no dictionary for ", name_of(target));
    if (d->num_atoms != config.num_atoms || d->dim != dim)
      throw_invalid(path,
                    ": the dictionary for ",
                    name_of(target),
                    " has ",
                    d->num_atoms,
                    " atoms of dim ",
                    d->dim,
                    "; this run has num_atoms ",
                    config.num_atoms,
                    " and vectors of dim ",
                    dim);
    if (target.kind == Kind::kKeys && set.key_stage != key_stage)
      throw_invalid(path,
                    ": its keys are ",
                    name_of(set.key_stage),
                    ", those of the data are ",
                    name_of(key_stage));
    atoms.insert(atoms.end(), d->atoms.begin(), d->atoms.end());
  }
  return atoms;
}

}  // namespace lexico
