// Training from the running model: the rows of a dump that is never written.
#include "lexico-train/stream.h"

#include <algorithm>
#include <chrono>

#include "common/program.h"
#include "lexico/error.h"
#include "lexico/sha256.h"

namespace lexico::apps {
namespace {

std::vector<std::string> files_of(const StreamConfig& config) {
  std::vector<std::string> files = {config.model};
  for (const std::vector<std::string>* texts : {&config.text, &config.token_ids})
    for (const std::string& text : *texts) files.push_back(TextSpec::from(text).path);
  return files;
}

std::vector<ModelActivations::Batch> batches_of(const Plan& plan) {
  std::vector<ModelActivations::Batch> batches;
  std::int64_t token = 0;
  for (const Plan::Batch& batch : plan.batches) {
    const auto size = static_cast<std::int64_t>(batch.count);
    batches.push_back({token, size, batch.length});
    token += size * batch.length;
  }
  return batches;
}

void read_ids(const Corpus& corpus, const Plan& plan, std::size_t number, std::int32_t* out) {
  // The model may have much to read before the next step of training hears of a stop.
  if (stop_requested())
    throw Interrupted("stopped while the model ran; the same command with --resume goes on");
  const Plan::Batch& batch = plan.batches[number];
  for (std::size_t i = batch.first; i < batch.first + batch.count; ++i) {
    corpus.read(plan.sequences.sequence(corpus, i), out, nullptr);
    out += batch.length;
  }
}

}  // namespace

Stream::Stream(const StreamConfig& config,
               KeyStage key_stage,
               std::uint64_t seed,
               int threads,
               const std::string& output)
    : device_(config.device),
      model_(config.model, config.device, threads),
      model_sha256_(std::async(std::launch::async, sha256_of_file, config.model)),
      corpus_(read_corpus(config, config.text, config.token_ids, model_.info(), output)),
      plan_(make_plan(config,
                      {.model_sha256 = model_sha256_.get(),
                       .command_line = {},
                       .key_stage = key_stage,
                       .seed = seed},
                      model_.info(),
                      corpus_)) {
  ActivationInfo info = plan_.info;
  info.num_tokens = plan_.num_tokens;
  info.complete = true;
  rows_ = std::make_unique<ModelActivations>(
      model_, info, files_of(config), batches_of(plan_), [this](std::size_t batch, auto* out) {
        read_ids(corpus_, plan_, batch, out);
      });
}

double Stream::probe_seconds_per_token() {
  using Clock = std::chrono::steady_clock;
  const Plan::Batch& batch = plan_.batches.front();
  const std::int64_t size = static_cast<std::int64_t>(batch.count), length = batch.length;
  std::vector<std::int32_t> ids(static_cast<std::size_t>(size * length));
  read_ids(corpus_, plan_, 0, ids.data());
  CacheBatch cache;
  model_.forward(ids.data(), size, length, false, cache);
  const Clock::time_point begin = Clock::now();
  model_.forward(ids.data(), size, length, false, cache);
  return std::chrono::duration<double>(Clock::now() - begin).count() /
         static_cast<double>(size * length);
}

StreamPlan Stream::plan(std::int64_t tokens, std::int64_t held_rows) {
  const ActivationInfo& info = plan_.info;
  const double token = 2.0 * info.num_layers * info.kv_heads * info.head_dim,
               batch = static_cast<double>(info.batch_sequences) * info.sequence_length;
  StreamPlan plan;
  plan.tokens = tokens;
  plan.seconds = probe_seconds_per_token() * static_cast<double>(tokens);
  // What the model gives, as it gives it and as we take it.
  plan.memory_bytes = 2 * batch * token * sizeof(float) +
                      static_cast<double>(held_rows) / info.kv_heads * token * (info.half ? 2 : 4);
  plan.disk_bytes = 4.0 * static_cast<double>(corpus_.num_tokens);
  return plan;
}

double Stream::seconds_with_training(const StreamPlan& plan,
                                     double training_seconds,
                                     const std::string& training_device) const {
  const bool apart = device_.starts_with("cuda") != training_device.starts_with("cuda");
  return apart ? std::max(plan.seconds, training_seconds) : plan.seconds + training_seconds;
}

}  // namespace lexico::apps
