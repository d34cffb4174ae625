// How much memory and disk a run of lexico-train takes, from the sizes of what it holds.
#include "lexico-train/plan.h"

#include <algorithm>

#include "common/memory.h"
#include "lexico/encoder.h"
#include "lexico/kind.h"

namespace lexico::apps {
namespace {

constexpr double kFloat = sizeof(float);
constexpr double kReport = 10e6;  // its tables

struct Numbers {
  double atoms, sums, last_used;  // bytes of [P, N, m], [P, N, N], [P, N]
  double checkpoint;
  bool adam, online;
};

Numbers numbers_of(const TrainSizes& sizes) {
  const auto P = static_cast<double>(sizes.dictionaries), N = double(sizes.train.num_atoms),
             m = static_cast<double>(sizes.dim);
  Numbers n{};
  n.online = sizes.train.recipe == "online";
  n.adam = !n.online || sizes.train.finish > 0;
  n.atoms = kFloat * P * N * m;
  n.sums = n.online ? kFloat * P * N * N : 0;
  n.last_used = kFloat * P * N;
  // Atoms and the best; moments; A and B; a header.
  n.checkpoint =
      n.atoms * (2 + (n.adam ? 2 : 0) + (n.online ? 1 : 0)) + n.sums + n.last_used + 3000 + 150 * P;
  return n;
}

double pursuit_bytes(const TrainSizes& sizes, std::int64_t dictionaries, std::int64_t signals) {
  EncodeOptions options;
  options.max_atoms = 1;
  for (const Kind kind : kBothKinds)
    options.max_atoms = std::max(options.max_atoms, sizes.train.sparsity_of(kind));
  options.max_atoms =
      std::min(options.max_atoms, static_cast<int>(sizes.dim));  // else: refused later
  options.selection = Selection::from(sizes.train.selection);
  options.threads = sizes.train.threads;
  Encoder encoder(options);
  const float unused = 0;  // only sizes matter
  encoder.set_atoms(
      &unused, static_cast<int>(dictionaries), sizes.train.num_atoms, static_cast<int>(sizes.dim));
  return static_cast<double>(encoder.workspace_bytes(signals));
}

double batch_bytes(const TrainSizes& sizes) {
  const double rows =
      static_cast<double>(sizes.dictionaries) * static_cast<double>(sizes.train.batch_size);
  const int s =
      std::max(sizes.train.sparsity_of(Kind::kKeys), sizes.train.sparsity_of(Kind::kValues));
  // Two batches and what is left of one; indices, weights and uses; norms.
  return rows * (3 * kFloat * static_cast<double>(sizes.dim) + 3 * kFloat * s + 6 * kFloat);
}

double dictionary_bytes(const TrainSizes& sizes) {
  const auto N = double(sizes.train.num_atoms), m = static_cast<double>(sizes.dim),
             heads = sizes.train.dictionaries == "head" ? 1.0 : static_cast<double>(sizes.kv_heads);
  const bool packed = sizes.codes.resolved_coding(sizes.train.recipe) == "packed";
  const double tables = packed ? heads * (m * m + 25 * m) + 256 : 0;  // of the residual code
  return kFloat * (static_cast<double>(sizes.dictionaries) * N * m +
                   static_cast<double>(sizes.stored) * (tables + heads * m)) +
         static_cast<double>(sizes.stored) * 600 + 4000;
}

}  // namespace

double TrainPlan::most_bytes() const {
  double most = 0;
  for (const PlannedPhase& phase : phases) most = std::max(most, phase.bytes);
  return most;
}

double TrainPlan::disk_left_bytes() const {
  return (one_checkpoint ? 1 : 2) * checkpoint_bytes + left_beside_checkpoints;
}

double TrainPlan::disk_most_bytes() const {
  return std::max((one_checkpoint ? 1 : 3) * checkpoint_bytes + beside_checkpoints,
                  disk_left_bytes());
}

double TrainPlan::seconds() const {
  double sum = 0;
  for (const PlannedPhase& phase : phases) sum += std::max(0.0, phase.seconds);
  return sum;
}

TrainPlan plan_training(const TrainSizes& sizes, double resident, std::int64_t steps) {
  const Numbers n = numbers_of(sizes);
  const double pool =
                   static_cast<double>(sizes.pool_bytes) + 4 * static_cast<double>(sizes.pool_rows),
               batches = batch_bytes(sizes),
               pursuit = pursuit_bytes(sizes, sizes.dictionaries, sizes.train.batch_size),
               // What stays until the end.
      lasting = resident + kTorchBytes + pool + n.checkpoint + 8 * n.last_used / kFloat / 2,
               rows = static_cast<double>(sizes.dim) * kFloat;
  TrainPlan plan;
  const double samples = sizes.train.initialization == "samples" ? 5 * n.atoms : 3 * n.atoms;
  // Reading: samples and atoms, or the checkpoint's file beside the state it goes to.
  plan.phases.push_back({"reading", resident + pool + samples, -1});
  if (sizes.resumes) plan.phases.back().bytes = lasting + n.checkpoint;
  // Training: at first random atoms to compare with, later the gradient.
  plan.phases.push_back({"training", lasting + 2 * n.atoms + batches + pursuit, -1});
  if (sizes.train.device.starts_with("cuda")) {
    // The checkpoint's tensors (last_used with 8 bytes a number), the gradient or random atoms to
    // compare with and what they are made of, a batch, and the largest scratch of pursuit, which
    // gives way where there is less (training/device_ops.h).
    constexpr double kScratch = 1 << 30;
    plan.device_bytes = n.checkpoint + n.last_used + 2 * n.atoms + batches + kScratch;
  }
  const bool packed = sizes.codes.resolved_coding(sizes.train.recipe) == "packed";
  const double sample = static_cast<double>(sizes.codes.code_vectors) * rows;
  const double after = lasting + batches + pursuit + n.atoms;  // the dictionaries as a set
  plan.phases.push_back({"codes", after + (packed ? 6 * sample : 0), -1});
  const double held_out = static_cast<double>(sizes.validation_rows) * rows;
  plan.phases.push_back({"report",
                         after +
                             std::max(2 * held_out + pursuit_bytes(sizes, 1, 2048),
                                      n.atoms * (sizes.writes_pt ? 2 : 1)) +
                             kReport,
                         -1});

  plan.checkpoint_bytes = n.checkpoint;
  const double interval = static_cast<double>(std::max<std::int64_t>(1, steps / 500)),
               lines = static_cast<double>(steps) / interval,
               of_each = static_cast<double>(sizes.dictionaries);
  // metrics.jsonl, .csv, events; report.json and .html, which draws fewer points. Measured.
  const double points = std::min(lines, std::max(12.0, 800 / of_each)),
               metrics = lines * (421 + 115 * of_each),
               report = 50e3 + 5.5e3 * static_cast<double>(sizes.stored) +
                        of_each * (158 * lines + 361 * points);
  const double results = dictionary_bytes(sizes) + (sizes.writes_pt ? n.atoms + 2000 : 0) + report;
  plan.left_beside_checkpoints = metrics + results + 6000;
  plan.beside_checkpoints = metrics + 6000;
  return plan;
}

}  // namespace lexico::apps
