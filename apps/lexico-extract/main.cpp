// lexico-extract: runs a language model over text and writes the keys and values of its layers to
// HDF5.
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <future>
#include <iostream>
#include <nlohmann/json.hpp>

#include "common/json_text.h"
#include "common/memory.h"
#include "common/options.h"
#include "common/program.h"
#include "lexico-extract/config.h"
#include "lexico-extract/extraction.h"
#include "lexico-extract/output.h"
#include "lexico/activations.h"
#include "lexico/error.h"
#include "lexico/language_model.h"
#include "lexico/sha256.h"

namespace lexico::apps {

void ExtractConfig::validate() const {
  TextPlanConfig::validate();
  if (output.empty())
    throw InvalidArgument("output is missing: --output FILE.h5, or a folder for shards");
  if (resume && overwrite) throw InvalidArgument("--resume and --overwrite contradict each other");
  at_least("threads", threads, 0);
  at_least("shard_vectors", shard_vectors, 0);
  if (key_stage != "post_rope" && key_stage != "pre_rope")
    throw InvalidArgument("key_stage is '" + key_stage + "', must be one of: post_rope, pre_rope");
}

namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

Json describe(const Plan& plan, const Output& output) {
  return {{"model", plan.info.model},
          {"texts", plan.info.corpora},
          {"output", output.path()},
          {"files", plan.shards.size()},
          {"sequences", plan.sequences.count},
          {"sequence_length", plan.info.sequence_length},
          {"bos", plan.info.bos},
          {"key_stage", name_of(plan.info.key_stage)},
          {"dtype", plan.info.half ? "float16" : "float32"},
          {"layers", plan.info.num_layers},
          {"kv_heads", plan.info.kv_heads},
          {"head_dim", plan.info.head_dim},
          {"tokens", plan.num_tokens},
          {"vectors_per_layer_and_kind", plan.num_vectors()},
          {"vectors", plan.all_vectors()},
          {"bytes", plan.bytes},
          {"plan_hash", plan.info.plan_hash}};
}

/// Of batches on their way and of the writer, beside the model.
double buffer_bytes(const Plan& plan) {
  const ActivationInfo& info = plan.info;
  const double row = static_cast<double>(info.head_dim) * sizeof(float),
               tokens = static_cast<double>(info.batch_sequences) * info.sequence_length,
               batch = tokens * info.num_layers * 2 * info.kv_heads * row,
               chunks = info.num_layers * 2.0 * 2048 * row * (info.half ? 0.5 : 1.0);
  return 2 * batch + chunks;
}

struct PlannedPhase {
  std::string name;
  double bytes, seconds;
};

/// Reading is over: what it took is known. Two batches are run to see what the model takes.
std::vector<PlannedPhase> planned_phases(LanguageModel& model,
                                         const Corpus& corpus,
                                         const Plan& plan,
                                         double seconds_so_far) {
  std::vector<PlannedPhase> phases = {
      {"reading", static_cast<double>(peak_resident_bytes()), seconds_so_far}};
  const double seconds =
      probe_seconds_per_token(model, corpus, plan) * static_cast<double>(plan.num_tokens);
  // The probe had one batch.
  phases.push_back(
      {"extracting",
       static_cast<double>(peak_resident_bytes()) + 0.75 * buffer_bytes(plan) + kTorchBytes,
       seconds});
  return phases;
}

int print_plan(const ExtractConfig& config,
               LanguageModel& model,
               const Corpus& corpus,
               const Plan& plan,
               const Output& output,
               double seconds_so_far) {
  const std::vector<PlannedPhase> phases = planned_phases(model, corpus, plan, seconds_so_far);
  double bytes = 0, seconds = 0;
  for (const PlannedPhase& phase : phases) {
    bytes = std::max(bytes, phase.bytes);
    seconds += phase.seconds;
  }
  const std::int64_t free = free_bytes(output.path()), memory = available_memory_bytes();
  const bool fits_disk = free < 0 || plan.bytes <= free, in_memory = fits_memory(bytes);
  if (config.json) {
    Json json = describe(plan, output);
    for (const PlannedPhase& phase : phases)
      json["phases"].push_back(
          {{"name", phase.name}, {"memory_bytes", phase.bytes}, {"seconds", phase.seconds}});
    json["memory_bytes"] = bytes;
    json["free_memory_bytes"] = memory;
    json["free_bytes"] = free;
    json["seconds"] = seconds;
    json["fits"] = fits_disk && in_memory;
    std::cout << json_text(json, 1);
    return 0;
  }
  const ActivationInfo& info = plan.info;
  std::cout << "model    " << info.model << ": " << info.num_layers << " layers, " << info.kv_heads
            << " KV heads of " << info.head_dim << "\n";
  std::cout << "text     ";
  for (std::size_t i = 0; i < info.corpora.size(); ++i)
    std::cout << (i > 0 ? ", " : "") << info.corpora[i] << " (" << info.corpus_documents[i]
              << " documents)";
  std::cout << ", bos " << info.bos << "\n";
  std::cout << "tokens   " << plan.num_tokens << " of " << corpus.num_tokens << ", in "
            << plan.sequences.count << " sequences of up to " << info.sequence_length << "\n";
  std::cout << "vectors  " << plan.num_vectors() << " per layer and kind, "
            << format_count(static_cast<double>(plan.all_vectors())) << " in all, "
            << (info.half ? "float16" : "float32") << ", keys " << name_of(info.key_stage) << "\n";
  std::cout << "disk     " << format_bytes(static_cast<double>(plan.bytes)) << " in "
            << plan.shards.size() << (plan.shards.size() == 1 ? " file" : " files");
  if (free >= 0) std::cout << ", " << format_bytes(static_cast<double>(free)) << " free";
  std::cout << "\n";
  for (const PlannedPhase& phase : phases)
    std::cout << (phase.name + "          ").substr(0, 11) << format_bytes(phase.bytes)
              << " of memory, about " << format_duration(phase.seconds) << "\n";
  std::cout << "memory   " << format_bytes(bytes);
  if (memory >= 0) std::cout << " of " << format_bytes(static_cast<double>(memory)) << " free";
  std::cout << "\ntime     about " << format_duration(seconds) << "\n";
  if (!fits_disk)
    std::cout << "verdict  does not fit the disk: lower --max-vectors (" << output.path() << ")\n";
  else if (!in_memory)
    std::cout << "verdict  does not fit the memory: lower --batch-tokens\n";
  else
    std::cout << "verdict  fits; run it again without --dry-run\n";
  return 0;
}

void check_space(const Plan& plan, const Output& output, const std::vector<bool>& finished) {
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < finished.size(); ++i)
    if (!finished[i]) bytes += ActivationWriter::file_bytes(plan.info_of(i));
  const std::int64_t free = free_bytes(output.path());
  if (free >= 0 && free < bytes)
    throw ResourceError(output.path() + ": needs " + format_bytes(static_cast<double>(bytes)) +
                        ", but " + format_bytes(static_cast<double>(free)) +
                        " are free (--max-vectors sets a budget)");
}

std::string percent(double share) {
  char text[16];
  std::snprintf(text, sizeof text, "%.0f %%", 100 * share);
  return text;
}

std::string verdict_of(const Plan& plan, const Output& output, const ExtractionResult& result) {
  std::string text = "wrote " + format_count(static_cast<double>(plan.num_vectors())) +
                     " vectors per layer and kind (" + std::to_string(plan.info.num_layers) +
                     " layers, " + format_bytes(static_cast<double>(plan.bytes)) + ") to " +
                     output.path();
  if (result.tokens == 0) return text + " before: nothing was left to do";
  const double rate = static_cast<double>(result.tokens) / result.seconds;
  text += " in " + format_duration(result.seconds) + ": " + format_count(rate) + " tokens/s, ";
  if (result.bare_tokens_per_s > 0)
    return text + "at " + percent(rate / result.bare_tokens_per_s) +
           " of the bare forward's speed (" + format_count(result.bare_tokens_per_s) + ")";
  return text + percent(result.model_seconds / result.seconds) +
         " of the time in the model's forward";
}

/// Shards of another rank that are not there yet, in words.
std::string missing_shards(const Plan& plan, const Output& output, Ranks ranks, int rank) {
  ranks.rank = rank;
  std::string text;
  int count = 0;
  for (std::size_t shard = 0; shard < plan.shards.size(); ++shard) {
    std::error_code error;
    if (!ranks.owns(shard)) continue;
    // One of another run, which --overwrite will replace, does not count.
    if (std::filesystem::exists(output.file_of(shard), error) && output.is_of(plan, shard))
      continue;
    if (++count <= 3) text += (text.empty() ? "" : ", ") + output.file_of(shard);
  }
  return count > 3 ? text + " and " + std::to_string(count - 3) + " more" : text;
}

/// What was kept, and how to go on.
std::string after_stop(const Plan& plan, const Output& output, const std::string& again) {
  if (output.is_one_file())
    return "stopped: one file is all or nothing, so nothing was kept; run it again with: " + again;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < plan.shards.size(); ++i)
    if (std::FILE* file = std::fopen(output.file_of(i).c_str(), "rb")) {
      ++kept;
      std::fclose(file);
    }
  return "stopped: " + std::to_string(kept) + " of " + std::to_string(plan.shards.size()) +
         " files are finished and kept; go on with: " + again + " --resume";
}

int run(int argc, char** argv) {
  ExtractConfig config;
  std::vector<Option> options = options_of(config);
  ProgramInfo program;
  program.name = "lexico-extract";
  program.purpose =
      "Runs a language model over text and writes the keys and values of every layer to HDF5.\n"
      "Documents follow each other in sequences of --sequence-length tokens; where the model "
      "expects it, the BOS token\n"
      "starts every document and every sequence (--bos).";
  program.examples =
      "lexico-extract --model model.pt --text wiki=train.txt --output activations --max-vectors "
      "4e6\n"
      "lexico-extract --model model.pt --text chats.jsonl --field prompt --output chats.h5 "
      "--dry-run\n\n"
      "Exit codes: 0 done, 2 usage, 3 input that does not fit, 4 no space or memory, 75 "
      "interrupted\n"
      "(finished files are kept: --resume).";
  program.extra_names = {{"output", "-o"}};
  program.versions = "libtorch " + torch_version() + ", HDF5 " + hdf5_version();
  if (!parse_command_line(program, options, argc, argv)) return 0;
  config.validate();
  watch_stop_signals();
  const auto began = Clock::now();

  const Ranks ranks = config.resolve();
  if (!ranks.leads()) speak_as_rank(ranks.rank, ranks.size);
  take_own_gpu(ranks, config.device);
  Output output(config, ranks);
  LanguageModel model(config.model, config.device, config.threads);
  std::future<std::string> model_sha256 =
      std::async(std::launch::async, sha256_of_file, config.model);  // minutes for a large one
  const Corpus corpus =
      read_corpus(config, config.text, config.token_ids, model.info(), output.path());
  const std::string again = typed_command(argc, argv, {"--resume", "--overwrite"});
  const Plan plan = make_plan(config,
                              {.model_sha256 = model_sha256.get(),
                               .command_line = again,
                               .key_stage = key_stage_from(config.key_stage),
                               .seed = config.seed,
                               .query_moments = config.query_moments,
                               .shard_vectors = config.shard_vectors,
                               .one_file = output.is_one_file()},
                              model.info(),
                              corpus);
  if (plan.info.key_stage == KeyStage::kPreRope && !model.info().rope.rotates())
    log_info(config.model + " has no RoPE: its keys are the same at both stages");
  if (config.dry_run)
    return ranks.leads() ? print_plan(config, model, corpus, plan, output, seconds_since(began))
                         : 0;

  std::vector<bool> finished = output.prepare(plan);
  const SignOfLife alive(output.path(), ranks);
  for (std::size_t shard = 0; shard < finished.size(); ++shard)
    if (!ranks.owns(shard)) finished[shard] = true;  // by another rank
  check_space(plan, output, finished);
  require_memory(static_cast<double>(resident_bytes()) + buffer_bytes(plan) + kTorchBytes,
                 "lower --batch-tokens");
  log_info(format_count(static_cast<double>(plan.num_tokens)) + " tokens in " +
           std::to_string(plan.sequences.count) + " sequences of up to " +
           std::to_string(plan.info.sequence_length) + ", " +
           format_bytes(static_cast<double>(plan.bytes)) + " in " +
           std::to_string(plan.shards.size()) + (plan.shards.size() == 1 ? " file" : " files") +
           ": " + output.path());
  const auto missing = [&](int rank) { return missing_shards(plan, output, ranks, rank); };
  ExtractionResult result;
  try {
    result = extract(model, corpus, plan, output, finished, config.benchmark);
  } catch (const Interrupted&) {
    const std::string lost = ranks.leads() ? killed_ranks(output.path(), ranks, missing) : "";
    throw Interrupted((lost.empty() ? "" : lost + "; ") + after_stop(plan, output, again));
  }
  if (!ranks.leads()) return 0;
  wait_for_ranks(output.path(), ranks, config.rank_timeout, missing);
  const std::string verdict = verdict_of(plan, output, result);
  if (!config.json) {
    std::cout << verdict << "\n";
    return 0;
  }
  Json json = describe(plan, output);
  json["tokens_this_run"] = result.tokens;
  json["seconds"] = result.seconds;
  json["model_seconds"] = result.model_seconds;
  json["bare_tokens_per_s"] =
      result.bare_tokens_per_s > 0 ? Json(result.bare_tokens_per_s) : Json(nullptr);
  json["verdict"] = verdict;
  std::cout << json_text(json, 1);
  log_info(verdict);
  return 0;
}

}  // namespace
}  // namespace lexico::apps

int main(int argc, char** argv) {
  return lexico::apps::run_program("lexico-extract", [&] { return lexico::apps::run(argc, argv); });
}
