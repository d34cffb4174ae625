// lexico-train: learns the dictionaries of a model from its keys and values, dumped or running.
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <tuple>

#include "common/json_text.h"
#include "common/memory.h"
#include "common/options.h"
#include "common/program.h"
#include "common/ranks.h"
#include "common/report/report.h"
#include "lexico-train/codes.h"
#include "lexico-train/parts.h"
#include "lexico-train/plan.h"
#include "lexico-train/run_folder.h"
#include "lexico-train/stream.h"
#include "lexico/activation_sampler.h"
#include "lexico/activations.h"
#include "lexico/error.h"
#include "lexico/evaluation.h"
#include "lexico/files.h"
#include "lexico/pt_file.h"
#include "lexico/trainer.h"
#include "lexico/vector_coder.h"

namespace lexico::apps {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

struct Config : RankConfig {
  std::string data, output, layers = "all", kinds = "both", validation_data, registry;
  std::int64_t validation_vectors = 16384;
  int pool_mib = 1024;
  double checkpoint_seconds = 300;
  bool resume = false, overwrite = false, dry_run = false, json = false;
  std::string key_stage = "auto";
  StreamConfig stream;
  TrainConfig train;
  CodeConfig codes;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("data",
          self.data,
          "activations to learn from: a file, a folder of shards, or a 'glob' (lexico-extract "
          "writes them); or else the model and texts themselves:");
    StreamConfig::for_each_field(self.stream, visit);
    visit("output", self.output, "folder of the run: dictionaries, metrics, checkpoints, report");
    visit(
        "key_stage",
        self.key_stage,
        "keys as the cache holds them (post_rope) or with RoPE undone (pre_rope: far less error, "
        "and good at every "
        "position); auto: post_rope for recipe lexico, else pre_rope, if the data knows its RoPE");
    TrainConfig::for_each_field(self.train, visit);
    CodeConfig::for_each_field(self.codes, visit);
    visit("layers", self.layers, "layers to train: all, or numbers like 0,2,5-7");
    visit("kinds", self.kinds, "keys, values or both");
    visit("validation_data",
          self.validation_data,
          "activations for the report; empty: the end of data, held out");
    visit("validation_vectors",
          self.validation_vectors,
          "vectors of each dictionary in the report (a tenth of data at most)");
    visit("pool_mib", self.pool_mib, "memory for shuffling, MiB");
    visit("checkpoint_seconds", self.checkpoint_seconds, "time between checkpoints");
    visit("registry",
          self.registry,
          "JSON map that the .pt is entered in; empty: OUTPUT/path_to_dictionary.json");
    RankConfig::for_each_field(self, visit);
    visit("resume", self.resume, "go on with the run in OUTPUT, or begin it if there is none");
    visit("overwrite", self.overwrite, "start again in OUTPUT; the run there is removed");
    visit("dry_run", self.dry_run, "print the plan (vectors, memory, disk, time) and stop");
    visit("json", self.json, "print the result as JSON on stdout");
  }

  void validate() const {
    if (data.empty() && !stream.asked_for())
      throw InvalidArgument(
          "data is missing: --data FILE (activations that lexico-extract wrote), or --model "
          "FILE.pt "
          "--text FILE");
    if (!data.empty() && stream.asked_for())
      throw InvalidArgument(
          "--data and --model, --text or --token-ids contradict each other: vectors come from a "
          "dump "
          "or from the running model");
    if (output.empty()) throw InvalidArgument("output is missing: --output FOLDER");
    if (kinds != "both" && kinds != "keys" && kinds != "values")
      throw InvalidArgument("kinds is '" + kinds + "', must be keys, values or both");
    if (validation_vectors < 1)
      throw InvalidArgument("validation_vectors is " + std::to_string(validation_vectors) +
                            ", must be >= 1");
    if (pool_mib < 1)
      throw InvalidArgument("pool_mib is " + std::to_string(pool_mib) + ", must be >= 1");
    if (!(checkpoint_seconds > 0)) throw InvalidArgument("checkpoint_seconds must be > 0");
    if (resume && overwrite)
      throw InvalidArgument("--resume and --overwrite contradict each other");
    if (key_stage != "auto") (void)key_stage_from(key_stage);
    train.validate();
    codes.validate();
    if (!stream.asked_for()) return;
    stream.validate();
    if (train.metric == "queries")
      throw InvalidArgument(
          "metric is 'queries', which needs moments over the whole text before training: dump it "
          "with lexico-extract --key-stage pre_rope --query-moments");
  }
};

/// Lets the keys of `reader` come in the stage that the config asks for.
void choose_key_stage(ActivationSource& reader, const Config& config) {
  if (config.key_stage != "auto") {
    reader.set_key_stage(key_stage_from(config.key_stage));
    return;
  }
  const KeyStage best = config.train.recipe == "lexico" ? KeyStage::kPostRope : KeyStage::kPreRope;
  if (reader.info().rope.empty()) return;
  reader.set_key_stage(best);
}

/// Groups of layers that share dictionaries, those not trained left out; the others on their own.
std::vector<std::vector<int>> layer_groups_of(const Config& config, int num_layers) {
  const std::vector<int> layers = parse_layers(config.layers, num_layers);
  std::vector<std::vector<int>> groups;
  std::set<int> taken;
  for (const std::string& text : split_commas({config.train.layer_groups})) {
    if (text.empty()) continue;
    std::vector<int> group;
    for (int layer : parse_layers(text, num_layers)) {
      if (!taken.insert(layer).second)
        throw InvalidArgument("layer_groups is '" + config.train.layer_groups + "': layer " +
                              std::to_string(layer) + " is in two groups");
      if (std::binary_search(layers.begin(), layers.end(), layer)) group.push_back(layer);
    }
    if (!group.empty()) groups.push_back(group);
  }
  for (int layer : layers)
    if (taken.count(layer) == 0) groups.push_back({layer});
  std::sort(groups.begin(), groups.end());
  return groups;
}

std::vector<TrainTarget> targets_of(const Config& config, const ActivationInfo& info) {
  std::vector<TrainTarget> targets;
  const bool by_head = config.train.dictionaries == "head";
  for (const std::vector<int>& group : layer_groups_of(config, info.num_layers))
    for (Kind kind : kBothKinds) {
      if (config.kinds != "both" && config.kinds != name_of(kind)) continue;
      for (int head = by_head ? 0 : -1; head < (by_head ? info.kv_heads : 0); ++head)
        targets.push_back({group.front(), kind, head, {group.begin() + 1, group.end()}});
    }
  return targets;
}

/// The rows the report measures: the end of the data, or another file.
struct Validation {
  ActivationSource* reader;
  std::int64_t first_row, num_rows;
};

void require_same_model(const ActivationSource& a, const ActivationSource& b) {
  const ActivationInfo &x = a.info(), &y = b.info();
  const auto differ =
      [&](const std::string& what, const std::string& in_a, const std::string& in_b) {
        throw IoError(b.files().front() + ": " + what + " is " + in_b + ", but " +
                      a.files().front() + " has " + in_a);
      };
  if (x.num_layers != y.num_layers)
    differ("number of layers", std::to_string(x.num_layers), std::to_string(y.num_layers));
  if (x.head_dim != y.head_dim)
    differ("head_dim", std::to_string(x.head_dim), std::to_string(y.head_dim));
  if (x.key_stage != y.key_stage) differ("key_stage", name_of(x.key_stage), name_of(y.key_stage));
}

/// Logs means over intervals, saves checkpoints by the clock, and stops when the user asks.
class Observer : public TrainObserver {
 public:
  Observer(RunFolder& folder, Parts* parts, const Trainer& trainer, double checkpoint_seconds)
      : folder_(folder),
        parts_(parts),
        trainer_(trainer),
        checkpoint_seconds_(checkpoint_seconds),
        by_the_clock_(trainer.config().minutes > 0),
        progress_("training",
                  by_the_clock_ ? trainer.config().minutes * 60
                                : static_cast<double>(trainer.config().num_steps()) *
                                      trainer.config().batch_size,
                  by_the_clock_ ? "seconds" : "vectors"),
        last_save_(Clock::now()) {
    if (!by_the_clock_)
      progress_.start_from(static_cast<double>(trainer.step()) * trainer.config().batch_size);
  }

  void on_step(const TrainStep& step) override {
    add(step);
    char detail[96];
    std::snprintf(detail,
                  sizeof detail,
                  "loss=%.3e rel_err=%.4f lr=%.1e",
                  step.loss,
                  step.relative_error,
                  step.learning_rate);
    progress_.update(by_the_clock_ ? progress_.seconds() : static_cast<double>(step.vectors),
                     detail);
    const std::int64_t interval = std::max<std::int64_t>(1, step.num_steps / 500);
    if (step.step % interval == 0 || step.step == step.num_steps) flush();
  }

  bool wants_stop() override {
    if (parts_ != nullptr) parts_->pass_on_save_request();
    const bool requested = folder_.save_requested();
    if (requested ||
        std::chrono::duration<double>(Clock::now() - last_save_).count() > checkpoint_seconds_)
      save();
    if (requested) {
      folder_.request_is_met();
      log_info("saved at step " + std::to_string(trainer_.step()) + ", as SAVE asked");
    }
    return stop_requested();
  }

  /// A checkpoint, unless there is one of this step.
  void save() {
    if (saved_step_ != trainer_.step())
      folder_.save_checkpoint(trainer_, {{"metrics", unlogged()}});
    saved_step_ = trainer_.step();
    last_save_ = Clock::now();
  }

  /// Goes on from a checkpoint that has been loaded.
  void restore(const CheckpointNotes& notes) {
    saved_step_ = trainer_.step();
    const auto found = notes.find("metrics");
    if (found == notes.end()) return;
    const Json json = Json::parse(found->second);
    count_ = json.at("count");
    sum_.loss = json.at("loss");
    sum_.relative_error = json.at("relative_error");
    sum_.relative_errors = json.at("relative_errors").get<std::vector<double>>();
  }

  void flush() {
    if (count_ == 0) return;
    sum_.loss /= count_;
    sum_.relative_error /= count_;
    for (double& error : sum_.relative_errors) error /= count_;
    folder_.log(sum_);
    count_ = 0;
  }

  double seconds() const { return progress_.seconds(); }

 private:
  void add(const TrainStep& step) {
    if (count_++ == 0) {
      sum_ = step;
      return;
    }
    const TrainStep before = sum_;
    sum_ = step;
    sum_.loss += before.loss;
    sum_.relative_error += before.relative_error;
    for (std::size_t i = 0; i < sum_.relative_errors.size(); ++i)
      sum_.relative_errors[i] += before.relative_errors[i];
  }

  /// The sums of the steps since the last line, so that a resumed run writes the same lines.
  std::string unlogged() const {
    return Json({{"count", count_},
                 {"loss", sum_.loss},
                 {"relative_error", sum_.relative_error},
                 {"relative_errors", sum_.relative_errors}})
        .dump();
  }

  RunFolder& folder_;
  Parts* parts_;
  const Trainer& trainer_;
  double checkpoint_seconds_;
  bool by_the_clock_;
  Progress progress_;
  Clock::time_point last_save_;
  TrainStep sum_;
  int count_ = 0;
  std::int64_t saved_step_ = -1;
};

/// What was learnt as a file holds it: one dictionary for each layer, kind and head, with its
/// frame.
DictionarySet learned_dictionaries(const Trainer& trainer,
                                   const std::vector<TrainTarget>& targets,
                                   const TrainingFrame& frame,
                                   const ActivationInfo& info) {
  DictionarySet set = trainer.dictionaries();
  set.key_stage = info.key_stage;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const TrainTarget& target = targets[i];
    Dictionary& own = set.dictionaries[i];
    own.head = target.head;
    own.transform = frame.of(target.layer, target.kind, target.head);
    own.format.max_atoms = trainer.config().sparsity_of(target.kind);
    for (int layer : target.more_layers) {
      Dictionary& other = set.dictionaries.emplace_back(set.dictionaries[i]);
      other.layer = layer;
      other.transform = frame.of(layer, target.kind, target.head);
      other.shares_atoms_with = target.layer;
    }
  }
  std::sort(set.dictionaries.begin(),
            set.dictionaries.end(),
            [](const Dictionary& a, const Dictionary& b) {
              return std::tuple(a.layer, a.kind, a.head) < std::tuple(b.layer, b.kind, b.head);
            });
  return set;
}

EncodeOptions encode_options(const TrainConfig& train) {
  return {std::max(train.key_sparsity, train.value_sparsity),
          static_cast<float>(train.relative_tolerance),
          Selection::from(train.selection),
          train.threads};
}

std::vector<int> report_sparsities(const TrainConfig& config, int dim) {
  std::set<int> out;
  for (int trained : {config.key_sparsity, config.value_sparsity})
    for (int s : {trained / 2, trained, 2 * trained})
      if (s >= 1 && s <= std::min(dim, config.num_atoms)) out.insert(s);
  return {out.begin(), out.end()};
}

/// Of one layer and kind, each head coded with the dictionary that serves it.
RelativeErrors held_out_errors(Evaluator& evaluator,
                               const std::vector<int>& sparsities,
                               const DictionarySet& set,
                               int layer,
                               Kind kind,
                               Validation validation) {
  constexpr std::int64_t kPiece = 2048;  // a stop is heard between two of them
  const int heads = validation.reader->info().kv_heads, dim = validation.reader->info().head_dim;
  const std::int64_t piece = std::max<std::int64_t>(1, kPiece / heads) * heads;
  std::vector<float> rows(static_cast<std::size_t>(piece * dim)), of_head;
  RelativeErrors errors(sparsities);
  const Dictionary* all = set.find(layer, kind);
  if (all != nullptr) evaluator.use(*all);
  for (std::int64_t first = 0; first < validation.num_rows; first += piece) {
    if (stop_requested())
      throw Interrupted("stopped in the report; the same command with --resume makes it");
    const std::int64_t count = std::min(piece, validation.num_rows - first);
    const int first_head = static_cast<int>((validation.first_row + first) % heads);
    validation.reader->read(layer, kind, validation.first_row + first, count, rows.data());
    if (all != nullptr) {
      evaluator.measure(rows.data(), count, errors, first_head);
      continue;
    }
    for (int head = 0; head < heads; ++head) {
      of_head.clear();
      for (std::int64_t row = (head - first_head + heads) % heads; row < count; row += heads)
        of_head.insert(of_head.end(), rows.data() + row * dim, rows.data() + (row + 1) * dim);
      evaluator.use(*set.find(layer, kind, head));
      evaluator.measure(of_head.data(), static_cast<std::int64_t>(of_head.size()) / dim, errors);
    }
  }
  return errors;
}

/// What is left after the format of a layer and kind, whose heads may each have a dictionary.
struct CodeError {
  int bits = 0;  ///< of a vector, mean over heads
  double error = 0;
  std::int64_t vectors = 0;
};

std::optional<CodeError> held_out_code_error(const DictionarySet& set,
                                             int layer,
                                             Kind kind,
                                             Validation validation,
                                             const EncodeOptions& encode) {
  const int heads = validation.reader->info().kv_heads, dim = validation.reader->info().head_dim;
  const Dictionary* all = set.find(layer, kind);
  if (set.find(layer, kind, 0)->format.coding == CodeFormat::Coding::kExact) return {};
  // Whole tokens: row 0 is of head 0.
  const std::int64_t first = (validation.first_row + heads - 1) / heads * heads,
                     tokens = (validation.first_row + validation.num_rows - first) / heads;
  std::vector<float> rows(static_cast<std::size_t>(tokens * heads * dim)), of_head;
  validation.reader->read(layer, kind, first, tokens * heads, rows.data());
  CodeError result;
  double sum = 0;
  const int dictionaries = all != nullptr ? 1 : heads;
  for (int head = 0; head < dictionaries; ++head) {
    if (stop_requested())
      throw Interrupted("stopped in the report; the same command with --resume makes it");
    of_head.clear();
    if (all == nullptr)
      for (std::int64_t t = 0; t < tokens; ++t) {
        const float* row = rows.data() + (t * heads + head) * dim;
        of_head.insert(of_head.end(), row, row + dim);
      }
    const std::vector<float>& x = all != nullptr ? rows : of_head;
    const auto count = static_cast<std::int64_t>(x.size()) / dim;
    const auto coder =
        dictionary_coder(all != nullptr ? *all : *set.find(layer, kind, head), encode);
    sum += coder_error(*coder, x.data(), count, dim);
    result.bits += coder->bits_per_vector();
    result.vectors += count;
  }
  result.bits /= dictionaries;
  result.error = sum / dictionaries;
  return result;
}

report::EvaluationReport evaluate_run(const Config& config,
                                      const TrainConfig& train,
                                      const DictionarySet& set,
                                      Validation validation) {
  const ActivationInfo& info = validation.reader->info();
  report::EvaluationReport out;
  out.model = info.model;
  out.dim = info.head_dim;
  out.key_stage = name_of(info.key_stage);
  out.layers = set.layers();
  out.sparsities = report_sparsities(train, info.head_dim);
  out.selection = train.selection;
  out.relative_tolerance = train.relative_tolerance;
  out.coders.push_back({"dictionary",
                        report::Coder::Role::kDictionary,
                        train.num_atoms,
                        config.output,
                        set.metadata});
  report::Dataset data{"held out",
                       config.validation_data.empty() && config.data.empty()
                           ? validation.reader->files().back()  // a text
                           : validation.reader->files().front(),
                       true,
                       validation.num_rows / info.kv_heads,
                       validation.num_rows,
                       0,
                       config.validation_data.empty()
                           ? "the last rows of the training data, never trained on"
                           : "evenly many rows from the start of the validation data"};
  std::vector<ActivationSource::Dataset> datasets;
  for (const Dictionary& d : set.dictionaries) datasets.emplace_back(d.layer, d.kind);
  validation.reader->hold({{validation.first_row, validation.num_rows}}, datasets);
  Evaluator evaluator(out.sparsities, encode_options(train));
  for (int layer : out.layers)
    for (Kind kind : kBothKinds) {
      if (set.find(layer, kind, 0) == nullptr) continue;
      const RelativeErrors errors =
          held_out_errors(evaluator, out.sparsities, set, layer, kind, validation);
      if (errors.num_not_finite() > 0)
        out.notes.push_back("layer " + std::to_string(layer) + " " + name_of(kind) + ": " +
                            std::to_string(errors.num_not_finite()) + " of " +
                            std::to_string(validation.num_rows) +
                            " held-out vectors hold NaN or Inf and are not in the report");
      for (const ErrorSummary& e : errors.summarize())
        out.rows.push_back({data.name,
                            layer,
                            kind,
                            "dictionary",
                            e.sparsity,
                            e.mean,
                            e.median,
                            e.p99,
                            e.mean_atoms,
                            e.vectors});
      data.not_finite += errors.num_not_finite();
      if (const auto coded =
              held_out_code_error(set, layer, kind, validation, encode_options(train)))
        out.rates.push_back(
            {data.name, layer, kind, "dictionary", coded->bits, coded->error, coded->vectors});
    }
  out.datasets.push_back(data);
  return out;
}

void print_plan(const Config& config,
                const TrainConfig& train,
                const TrainSizes& sizes,
                int num_parts,
                const TrainPlan& planned,
                const ActivationSource& reader,
                std::int64_t training_rows,
                std::int64_t steps,
                const std::optional<StreamPlan>& stream) {
  const std::int64_t free = free_bytes(config.output), memory = available_memory_bytes();
  Json plan;
  plan["dictionaries"] = sizes.dictionaries;
  plan["parts"] = num_parts;
  plan["num_atoms"] = train.num_atoms;
  plan["dim"] = sizes.dim;
  plan["training_vectors_per_dictionary"] = steps * train.batch_size;
  plan["vectors_in_data"] = training_rows;
  plan["passes_over_data"] =
      static_cast<double>(steps) * train.batch_size / static_cast<double>(training_rows);
  plan["steps"] = steps;
  for (const PlannedPhase& phase : planned.phases)
    plan["phases"].push_back(
        {{"name", phase.name}, {"memory_bytes", phase.bytes}, {"seconds", phase.seconds}});
  plan["memory_bytes"] = planned.most_bytes();
  plan["device_memory_bytes"] = planned.device_bytes;
  plan["free_memory_bytes"] = memory < 0 ? Json(nullptr) : Json(memory);
  plan["disk_bytes"] = planned.disk_most_bytes();
  plan["disk_left_bytes"] = planned.disk_left_bytes();
  plan["checkpoint_bytes"] = planned.checkpoint_bytes;
  plan["free_disk_bytes"] = free < 0 ? Json(nullptr) : Json(free);
  plan["seconds"] = planned.seconds();
  const bool fits = (free < 0 || planned.disk_most_bytes() <= static_cast<double>(free)) &&
                    fits_memory(planned.most_bytes());
  plan["fits"] = fits;
  if (stream) {
    plan["model_tokens"] = stream->tokens;
    plan["model_seconds"] = stream->seconds;
    plan["token_ids_bytes"] = stream->disk_bytes;
  }
  if (config.json) {
    std::cout << json_text(plan);
    return;
  }
  std::cout << "Plan for " << config.output << " (nothing is written)\n"
            << "  data      " << reader.files().front()
            << (reader.files().size() > 1 ? " and more" : "") << ": "
            << format_count(static_cast<double>(training_rows)) << " vectors for each of "
            << sizes.dictionaries << " dictionaries of " << train.num_atoms << " atoms, dim "
            << sizes.dim << '\n'
            << (num_parts == 1 ? std::string()
                               : "  ranks     " + std::to_string(num_parts) +
                                     " share them; memory is that of one, disk that of all\n")
            << "  training  " << train.recipe << ": "
            << format_count(plan["training_vectors_per_dictionary"]) << " vectors each ("
            << value_text(std::round(plan["passes_over_data"].get<double>() * 100) / 100)
            << " passes), " << steps << " steps of " << train.batch_size << '\n';
  if (stream)
    std::cout << "  model     " << format_count(static_cast<double>(stream->tokens))
              << " tokens in about " << format_duration(stream->seconds)
              << ", beside training; nothing is dumped\n";
  for (const PlannedPhase& phase : planned.phases) {
    std::cout << "  " << (phase.name + "          ").substr(0, 10) << format_bytes(phase.bytes)
              << " of memory";
    if (phase.seconds >= 0) std::cout << ", about " << format_duration(phase.seconds);
    std::cout << '\n';
  }
  std::cout << "  memory    " << format_bytes(planned.most_bytes())
            << (memory < 0 ? "" : " of " + format_bytes(static_cast<double>(memory)) + " free")
            << '\n';
  if (planned.device_bytes > 0)
    std::cout << "  device    up to " << format_bytes(planned.device_bytes)
              << " of its memory, beside libtorch and CUDA\n";
  std::cout << "  disk      " << format_bytes(planned.disk_most_bytes())
            << (free < 0 ? "" : " of " + format_bytes(static_cast<double>(free)) + " free") << ", "
            << format_bytes(planned.disk_left_bytes()) << " in the end (two checkpoints of "
            << format_bytes(planned.checkpoint_bytes) << " each)\n"
            << "  time      "
            << (planned.phases.front().seconds < 0 ? "not probed: that takes the memory"
                                                   : "about " + format_duration(planned.seconds()) +
                                                         " (from a probe of each phase)")
            << '\n'
            << "  verdict   "
            << (fits ? "fits; run it again without --dry-run"
                     : "does not fit: a smaller num_atoms, batch_size or pool_mib needs less")
            << '\n';
}

constexpr int kProbeSteps = 3;

/// Seconds of one step, the first (which warms up) not counted.
double probe_step_seconds(Trainer& trainer) {
  struct Probe : TrainObserver {
    int steps = 0;
    Clock::time_point first, last;
    void on_step(const TrainStep&) override { (steps++ == 0 ? first : last) = Clock::now(); }
    bool wants_stop() override { return steps == kProbeSteps; }
  } probe;
  trainer.run(probe);
  return probe.steps < 2
             ? 0
             : std::chrono::duration<double>(probe.last - probe.first).count() / (probe.steps - 1);
}

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// Codes and report of one layer and kind, timed.
void probe_results(const Config& config,
                   const TrainConfig& train,
                   const DictionarySet& all,
                   ActivationSource& reader,
                   std::int64_t training_rows,
                   Validation validation,
                   TrainPlan& plan) {
  DictionarySet one = all;
  const Dictionary& first = all.dictionaries.front();
  std::erase_if(one.dictionaries, [&](const Dictionary& d) {
    return d.layer != first.layer || d.kind != first.kind;
  });
  const double places =
      static_cast<double>(all.dictionaries.size()) / static_cast<double>(one.dictionaries.size());
  CodeConfig codes = config.codes;
  double rates = 1;
  if (codes.bytes_per_token > 0) {  // several rates are tried: here their mean
    const double vectors = static_cast<double>(all.dictionaries.size()) *
                           (first.head < 0 ? reader.info().kv_heads : 1);
    codes.bits = static_cast<int>(std::lround(codes.bytes_per_token / vectors)) * 8;
    codes.bytes_per_token = 0;
    rates = kNumRates;
  }
  // A model is not asked for rows while the clock runs: it gives those of all dictionaries at once.
  const std::vector<TrainTarget> target = {{first.layer, first.kind, first.head}};
  std::vector<ActivationSource::Rows> rows =
      hold_code_rows(reader, training_rows, codes, train, target);
  validation.reader->hold({{validation.first_row, validation.num_rows}},
                          {{first.layer, first.kind}});
  std::vector<float> unused;
  const auto read = [&](ActivationSource& source, const ActivationSource::Rows& some) {
    unused.resize(static_cast<std::size_t>(some.count * first.dim));
    source.read(first.layer, first.kind, some.first, some.count, unused.data());
  };
  for (const ActivationSource::Rows& some : rows) read(reader, some);
  read(*validation.reader, {validation.first_row, validation.num_rows});
  auto begin = Clock::now();
  fit_formats(one, reader, training_rows, codes, train);
  plan.phases[2].seconds = seconds_since(begin) * places * rates;
  begin = Clock::now();
  (void)evaluate_run(config, train, one, validation);
  plan.phases[3].seconds = seconds_since(begin) * places;
}

Json run_record(const Config& config, const std::string& command, const ActivationSource& reader) {
  Json run;
  run["program"] = std::string("lexico-train ") + lexico_version();
  run["command"] = command;
  run["started"] = utc_time();
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  run["host"] = host;
  run["seed"] = config.train.seed;
  run["inputs"] = Json::array();
  for (const std::string& path : reader.files()) {
    std::error_code error;
    run["inputs"].push_back({{"path", path},
                             {"bytes", fs::file_size(path, error)},
                             {"plan_hash", reader.info().plan_hash}});
  }
  run["model"] = reader.info().model;
  run["model_sha256"] = reader.info().model_sha256;
  return run;
}

std::map<std::string, std::string> provenance(const Config& config,
                                              const TrainConfig& train,
                                              const ActivationInfo& info,
                                              const std::vector<Option>& options) {
  std::string corpora;
  for (const std::string& name : info.corpora) corpora += (corpora.empty() ? "" : ", ") + name;
  return {{"model", info.model},
          {"rope", info.rope},
          {"model_sha256", info.model_sha256},
          {"corpora", corpora},
          {"data", config.data.empty() ? config.stream.model : config.data},
          {"recipe", train.recipe},
          {"num_atoms", std::to_string(train.num_atoms)},
          {"sparsity", std::to_string(train.sparsity)},
          {"key_sparsity", std::to_string(train.key_sparsity)},
          {"value_sparsity", std::to_string(train.value_sparsity)},
          {"selection", train.selection},
          {"vectors", std::to_string(train.num_steps() * train.batch_size)},
          {"seed", std::to_string(train.seed)},
          {"version", std::string("lexico-train ") + lexico_version()},
          {"config", to_yaml(options)}};
}

std::string registry_of(const Config& config) {
  return config.registry.empty() ? config.output + "/path_to_dictionary.json" : config.registry;
}

/// Both files and the registry. @returns why there is no .pt, or nothing.
std::string write_dictionary_files(const Config& config,
                                   const TrainConfig& train,
                                   const RunFolder& folder,
                                   const DictionarySet& set,
                                   const ActivationInfo& info) {
  write_dictionaries(set, folder.file("dictionary.safetensors"));
  if (set.key_stage == KeyStage::kPreRope)
    return "no dictionary.pt: the published layout has no place for pre_rope keys";
  for (const Dictionary& d : set.dictionaries)
    if (d.head != Dictionary::kAllHeads || !d.transform.is_identity())
      return "no dictionary.pt: the published layout has no place for transforms or dictionaries "
             "of "
             "single heads";
  if (static_cast<int>(set.dictionaries.size()) != 2 * info.num_layers)
    return "no dictionary.pt: the published layout needs keys and values of all " +
           std::to_string(info.num_layers) + " layers";
  const std::string pt = folder.file("dictionary.pt");
  write_dictionaries_pt(set, pt);
  register_dictionary(registry_of(config), info.model, train.num_atoms, train.sparsity, pt);
  return {};
}

/// What belongs to the run, not to one start of it: a file of these options repeats the run.
std::vector<Option> lasting(std::vector<Option> options) {
  std::erase_if(options, [](const Option& option) {
    return option.key == "resume" || option.key == "overwrite" || option.key == "dry_run" ||
           option.key == "json" || option.key == "rank" || option.key == "num_ranks" ||
           option.key == "rank_timeout";
  });
  return options;
}

/// Several ranks go on with a run unasked: that is what a launcher's restart means.
RunFolder::IfExists if_exists(const Config& config, const Ranks& ranks) {
  std::error_code error;
  if (config.resume ||
      (ranks.many() && !config.overwrite && fs::exists(config.output + "/run.json", error)))
    return RunFolder::IfExists::kResume;
  return config.overwrite ? RunFolder::IfExists::kOverwrite : RunFolder::IfExists::kRefuse;
}

/// What all parts of a run have in common.
struct Job {
  const Config& config;
  const std::vector<Option>& options;
  const Ranks& ranks;
  Parts& parts;
  ActivationSource& reader;
  Stream* stream;  ///< null: the data is a dump
  std::int64_t training_rows;
  Validation validation;

  int num_dictionaries() const { return static_cast<int>(parts.all_targets().size()); }
};

/// One part's vectors, in the order that all parts have. @param steps  of the run; 0: not known.
std::unique_ptr<ActivationSampler> sampler_of(const Job& job, int part, std::int64_t steps) {
  return std::make_unique<ActivationSampler>(job.reader,
                                             job.parts.targets(part),
                                             job.training_rows,
                                             job.config.train.seed,
                                             static_cast<std::size_t>(job.config.pool_mib) << 20,
                                             steps * job.config.train.resolved().batch_size);
}
std::unique_ptr<ActivationSampler> sampler_of(const Job& job, int part) {
  return sampler_of(job, part, job.config.train.resolved().num_steps());
}

std::map<std::string, std::string> fingerprint_of(const Job& job,
                                                  int part,
                                                  const VectorStream& stream) {
  return fingerprint(
      job.config.train.resolved(), job.parts.targets(part), stream, job.num_dictionaries());
}

/// Of a trainer of `targets`, which are all or a part.
TrainSizes sizes_of(const Job& job,
                    const std::vector<TrainTarget>& targets,
                    const ActivationSampler& sampler) {
  const ActivationInfo& info = job.reader.info();
  const TrainConfig& train = job.config.train;
  TrainSizes sizes{train.resolved(),
                   job.config.codes,
                   static_cast<std::int64_t>(targets.size()),
                   0,
                   info.head_dim,
                   info.kv_heads,
                   static_cast<std::int64_t>(sampler.pool_bytes()),
                   sampler.pool_rows(),
                   job.validation.num_rows,
                   job.config.resume,
                   info.key_stage == KeyStage::kPostRope && train.mean != "head" &&
                       train.scale == "none" && train.dictionaries != "head"};
  for (const TrainTarget& target : targets)
    sizes.stored += 1 + static_cast<std::int64_t>(target.more_layers.size());
  return sizes;
}

/// Memory of the process that trains a part and, of the leading rank, makes the whole; disk of all.
TrainPlan plan_part(const Job& job,
                    int part,
                    const ActivationSampler& sampler,
                    double resident,
                    std::int64_t steps) {
  const TrainSizes own = sizes_of(job, job.parts.targets(part), sampler),
                   all = sizes_of(job, job.parts.all_targets(), sampler);
  TrainPlan plan = plan_training(all, resident, steps);
  if (!job.parts.many()) return plan;
  plan.phases = plan_training(own, resident, steps).phases;
  const double others = sizeof(float) * static_cast<double>(all.dictionaries - own.dictionaries) *
                        own.train.num_atoms * static_cast<double>(own.dim);
  for (const std::size_t phase : {2, 3}) plan.phases[phase].bytes += others;
  plan.left_beside_checkpoints += others;  // learned.safetensors
  return plan;
}

/// What a model adds to a plan: its tokens, and what it takes for them. Nothing where there is
/// none.
std::optional<StreamPlan> plan_stream(const Job& job,
                                      const ActivationSampler& sampler,
                                      TrainPlan& plan) {
  if (job.stream == nullptr) return {};
  const std::int64_t load = sampler.rows_to_load() > 0 ? sampler.rows_to_load() : job.training_rows,
                     held_out = job.reader.num_rows() - job.training_rows;
  const StreamPlan own = job.stream->plan((load + held_out) / job.reader.info().kv_heads,
                                          held_out + job.config.codes.code_vectors);
  for (std::size_t phase = 1; phase < plan.phases.size(); ++phase)
    plan.phases[phase].bytes += own.memory_bytes;
  plan.phases[1].seconds =
      job.stream->seconds_with_training(own, plan.phases[1].seconds, job.config.train.device);
  plan.beside_checkpoints += own.disk_bytes;
  return own;
}

/// What learns one part.
struct PartTraining {
  std::unique_ptr<ActivationSampler> sampler;
  std::unique_ptr<Trainer> trainer;
  double resident = static_cast<double>(resident_bytes());  ///< before there was a trainer

  TrainPlan before;  ///< without times

  /// There is no trainer where a dry run finds that it would not fit. @throws ResourceError if it
  /// does not fit.
  PartTraining(const Job& job, int part) : sampler(sampler_of(job, part)) {
    const std::int64_t steps = job.config.train.resolved().num_steps();
    before = plan_part(job, part, *sampler, resident, steps > 0 ? steps : 500);
    if (job.config.dry_run && !fits_memory(before.most_bytes())) return;
    if (job.config.dry_run && job.stream != nullptr)
      // A few steps show how fast it goes: no more than they take is asked of the model.
      sampler = sampler_of(job, part, kProbeSteps + 1);
    else
      sampler->fit_frame(job.config.train);
    if (!job.config.dry_run) {
      require_memory(before.most_bytes(), "lower num_atoms, batch_size or pool_mib (--dry-run)");
      if (!job.config.resume && job.ranks.leads())  // what is there already counts
        require_disk(job.config.output, before.disk_most_bytes(), "--dry-run says for what");
    }
    const std::vector<TrainTarget> targets = job.parts.targets(part);
    const Config& config = job.config;
    std::vector<float> initial;
    if (!config.train.initial.empty())
      initial = initial_atoms(read_dictionaries(config.train.initial),
                              config.train.initial,
                              targets,
                              config.train,
                              job.reader.info().head_dim,
                              job.reader.info().key_stage);
    trainer =
        std::make_unique<Trainer>(config.train, targets, *sampler, initial, job.num_dictionaries());
  }
};

/// Trains one part to its end. @throws Interrupted if a stop is asked for before.
Learned train_part(
    const Job& job, int part, PartTraining training, RunFolder& folder, bool resume) {
  const Config& config = job.config;
  Trainer& trainer = *training.trainer;
  const std::vector<TrainTarget> targets = job.parts.targets(part);
  const ActivationInfo& info = job.reader.info();
  std::optional<CheckpointNotes> notes;
  if (resume) notes = folder.restore(trainer);
  if (!notes && config.resume && job.ranks.leads())
    log_warning(folder.path() + ": no checkpoint yet, starting at step 0");
  folder.open_metrics(targets, trainer.step());
  const TrainConfig& resolved = trainer.config();
  log_info("training " + std::to_string(targets.size()) +
           (targets.size() == 1 ? " dictionary" : " dictionaries") +
           (job.parts.many() ? " (" + job.parts.name(part) + ")" : "") + " of " +
           std::to_string(resolved.num_atoms) + " atoms, dim " + std::to_string(info.head_dim) +
           ", recipe " + resolved.recipe + ", " +
           (resolved.num_steps() > 0
                ? format_count(static_cast<double>(resolved.num_steps()) * resolved.batch_size) +
                      " vectors each"
                : value_text(resolved.minutes) + " minutes") +
           (trainer.step() > 0 ? ", from step " + std::to_string(trainer.step()) : ""));

  Observer observer(
      folder, job.ranks.leads() ? &job.parts : nullptr, trainer, config.checkpoint_seconds);
  if (notes) observer.restore(*notes);
  bool finished = false;
  try {
    finished = trainer.run(observer);
  } catch (const Interrupted&) {
    // While it waited for the model: what was learned so far is saved below.
  } catch (const Diverged& e) {
    observer.flush();
    DictionarySet best = learned_dictionaries(trainer, targets, training.sampler->frame(), info);
    best.metadata = provenance(config, trainer.config(), info, job.options);
    best.metadata["diverged"] = e.what();
    write_dictionaries(best, folder.file("dictionary.safetensors"));
    throw Diverged(std::string(e.what()) + "; they are in " +
                   folder.file("dictionary.safetensors"));
  }
  if (finished) observer.flush();
  observer.save();
  folder.request_is_met();
  if (!finished)
    throw Interrupted("stopped at step " + std::to_string(trainer.step()) + " of " +
                      std::to_string(resolved.num_steps()) +
                      "; the same command with --resume goes on from there");
  return {learned_dictionaries(trainer, targets, training.sampler->frame(), info),
          trainer.unused_atoms(),
          trainer.step(),
          resolved.vectors,
          trainer.bad_vectors(),
          trainer.skipped_batches()};
}

/// Of a run in several parts: trains one that is not done yet and leaves it in its folder.
Learned finish_part(const Job& job, int part, std::unique_ptr<PartTraining> training) {
  const auto own =
      fingerprint_of(job, part, training ? *training->sampler : *sampler_of(job, part));
  try {
    if (std::optional<Learned> done = job.parts.read(part, own)) return std::move(*done);
  } catch (const IoError& e) {
    log_warning(std::string(e.what()) + "; it is made again");
  }
  if (!training) training = std::make_unique<PartTraining>(job, part);
  RunFolder folder(job.parts.folder(part), RunFolder::IfExists::kResume);
  Learned learned = train_part(job, part, std::move(*training), folder, true);
  job.parts.write(part, learned, own);
  return learned;
}

/// All parts of a run of several: this rank's are trained, the others waited for.
/// @returns nothing if this is not the rank that merges.
std::optional<Learned> train_parts(const Job& job, std::unique_ptr<PartTraining> first) {
  const auto missing = [&](int rank) {
    job.parts.pass_on_save_request();
    return job.parts.missing(job.ranks, rank);
  };
  std::vector<Learned> learned(static_cast<std::size_t>(job.parts.count()));
  for (int part = 0; part < job.parts.count(); ++part) {
    if (!job.ranks.owns(static_cast<std::size_t>(part))) continue;
    try {
      learned[static_cast<std::size_t>(part)] = finish_part(job, part, std::move(first));
    } catch (const Interrupted& e) {
      const std::string lost =
          job.ranks.leads() ? killed_ranks(job.config.output, job.ranks, missing) : "";
      throw Interrupted(e.what() + (lost.empty() ? "" : "; " + lost));
    }
  }
  if (!job.ranks.leads()) return {};
  wait_for_ranks(job.config.output, job.ranks, job.config.rank_timeout, missing);
  for (int part = 0; part < job.parts.count(); ++part)
    if (!job.ranks.owns(static_cast<std::size_t>(part)))
      learned[static_cast<std::size_t>(part)] =
          job.parts.read(part, fingerprint_of(job, part, *sampler_of(job, part))).value();
  return merged(std::move(learned));
}

/// The dump; or nothing, and the stream from the model in its place.
std::unique_ptr<ActivationSource> open_source(const Config& config,
                                              std::unique_ptr<Stream>& stream) {
  if (!config.stream.asked_for()) return std::make_unique<ActivationReader>(config.data);
  // As the default dump stores them, unless both programs were told to take another stage.
  const KeyStage stored =
      config.key_stage == "auto" ? KeyStage::kPostRope : key_stage_from(config.key_stage);
  stream = std::make_unique<Stream>(
      config.stream, stored, config.train.seed, config.train.threads, config.output);
  return nullptr;
}

int train(const Config& config,
          const std::vector<Option>& all_options,
          const std::string& command) {
  const Clock::time_point began = Clock::now();
  const std::vector<Option> options = lasting(all_options);
  const Ranks ranks = config.resolve();
  if (!ranks.leads()) speak_as_rank(ranks.rank, ranks.size);
  take_own_gpu(ranks, config.train.device);
  if (config.dry_run && !ranks.leads()) return 0;
  std::unique_ptr<Stream> stream;
  const std::unique_ptr<ActivationSource> source = open_source(config, stream);
  ActivationSource& reader = stream ? stream->rows() : *source;
  choose_key_stage(reader, config);
  const ActivationInfo& info = reader.info();
  const std::vector<TrainTarget> targets = targets_of(config, info);
  double vectors_per_token = 0;
  for (const TrainTarget& target : targets)
    vectors_per_token +=
        static_cast<double>(1 + target.more_layers.size()) * (target.head < 0 ? info.kv_heads : 1);
  config.codes.require_room(config.train.num_atoms, vectors_per_token);

  std::unique_ptr<ActivationReader> other;
  std::int64_t training_rows = reader.num_rows();
  Validation validation{&reader, 0, std::min(config.validation_vectors, reader.num_rows() / 10)};
  if (!config.validation_data.empty()) {
    other = std::make_unique<ActivationReader>(config.validation_data);
    other->set_key_stage(info.key_stage);
    require_same_model(reader, *other);
    validation = {other.get(), 0, std::min(config.validation_vectors, other->num_rows())};
  } else {
    training_rows -= validation.num_rows;
    validation.first_row = training_rows;
  }
  if (training_rows < 1 || validation.num_rows < 1)
    throw IoError(reader.files().back() + ": " + std::to_string(reader.num_rows()) +
                  " vectors a layer are too few to train on");
  if (training_rows < config.train.num_atoms && ranks.leads())
    log_warning("only " + std::to_string(training_rows) + " vectors for " +
                std::to_string(config.train.num_atoms) +
                " atoms: the dictionary will know them by heart");

  // The leading rank decides how the run is cut; nothing is written before it has seen that all
  // settings are in order.
  std::optional<SignOfLife> alive;
  int num_parts = config.overwrite ? 0 : Parts::count_in(config.output);
  if (num_parts == 0) num_parts = std::min(ranks.size, static_cast<int>(targets.size()));
  if (!ranks.leads()) {
    make_folder(config.output);
    num_parts = std::stoi(alive.emplace(config.output, ranks).wait_for_word(config.rank_timeout));
  }
  Parts parts(config.output, targets, num_parts);
  const Job job{config, options, ranks, parts, reader, stream.get(), training_rows, validation};
  std::unique_ptr<PartTraining> first;
  if (ranks.leads()) first = std::make_unique<PartTraining>(job, 0);
  if (config.dry_run && !first->trainer) {
    const TrainSizes sizes = sizes_of(job, targets, *first->sampler);
    print_plan(config,
               sizes.train,
               sizes,
               num_parts,
               first->before,
               reader,
               training_rows,
               sizes.train.num_steps(),
               {});
    return 0;
  }
  if (config.dry_run) {
    Trainer& trainer = *first->trainer;
    const TrainConfig& train = trainer.config();
    const double reading = seconds_since(began), step = probe_step_seconds(trainer);
    const std::int64_t steps = train.minutes > 0
                                   ? static_cast<std::int64_t>(60 * train.minutes / step)
                                   : train.num_steps();
    const std::unique_ptr<ActivationSampler> sampler = sampler_of(job, 0);
    TrainPlan planned = plan_part(job, 0, *sampler, first->resident, steps);
    planned.phases[0].seconds = reading;
    planned.phases[1].seconds = step * static_cast<double>(steps);
    planned.one_checkpoint = planned.phases[1].seconds < config.checkpoint_seconds;
    const std::optional<StreamPlan> of_stream = plan_stream(job, *sampler, planned);
    const DictionarySet own =
        learned_dictionaries(trainer, parts.targets(0), first->sampler->frame(), info);
    probe_results(config, train, own, reader, training_rows, validation, planned);
    for (const std::size_t phase : {2, 3})  // of all parts
      planned.phases[phase].seconds *=
          static_cast<double>(targets.size()) / static_cast<double>(parts.targets(0).size());
    print_plan(config,
               train,
               sizes_of(job, targets, *sampler),
               num_parts,
               planned,
               reader,
               training_rows,
               steps,
               of_stream);
    return 0;
  }
  if (!ranks.leads()) {
    train_parts(job, nullptr);
    return 0;
  }

  check_registry(registry_of(config), config.output);
  const RunFolder::IfExists how = if_exists(config, ranks);
  RunFolder folder(config.output, how);
  std::error_code not_empty;
  if (parts.many()) fs::remove(folder.file("checkpoints"), not_empty);  // each part has its own
  const bool is_new = !fs::exists(folder.file("run.json"));
  Json run = run_record(config, command, reader);
  run["parts"] = num_parts;
  const auto record = [&] {
    write_file(folder.file("config.yaml"),
               "# What this run was trained with; lexico-train -c reads it.\n" + to_yaml(options));
    write_file(folder.file("run.json"), json_text(run));
  };
  if (is_new) record();
  hold_code_rows(reader, training_rows, config.codes, config.train.resolved(), targets);
  alive.emplace(config.output, ranks).say(std::to_string(num_parts));
  if (ranks.size > num_parts)
    log_info("the run has " + std::to_string(num_parts) + (num_parts == 1 ? " part" : " parts") +
             ": ranks from " + std::to_string(num_parts) + " on have nothing to do");
  const Clock::time_point ready = Clock::now();
  Learned learned =
      parts.many()
          ? train_parts(job, std::move(first)).value()
          : train_part(job, 0, std::move(*first), folder, how == RunFolder::IfExists::kResume);
  if (!is_new) record();
  if (parts.many()) merge_metrics(parts, folder);
  const Clock::time_point trained = Clock::now();
  const double seconds = std::chrono::duration<double>(trained - ready).count();
  TrainConfig resolved = config.train.resolved();
  resolved.vectors = learned.vectors;

  DictionarySet& set = learned.dictionaries;
  set.metadata = provenance(config, resolved, info, options);
  fit_formats(set, reader, training_rows, config.codes, resolved);
  const Clock::time_point coded = Clock::now();
  report::EvaluationReport result = evaluate_run(config, resolved, set, validation);
  set.metadata["held_out_relative_error"] =
      value_text(report::mean_error(result, {"dictionary", resolved.sparsity, {}, {}, {}, {}}));
  const std::string no_pt = write_dictionary_files(config, resolved, folder, set, info);
  folder.log_scalar("RelativeReconstructionError/eval",
                    std::stod(set.metadata["held_out_relative_error"]),
                    learned.steps);

  result.title = "Training of dictionaries for " + info.model;
  result.command = command;
  result.version = std::string("lexico-train ") + lexico_version();
  result.created = utc_time();
  if (!no_pt.empty()) result.notes.push_back(no_pt);
  if (learned.bad_vectors > 0)
    result.notes.push_back(
        std::to_string(learned.bad_vectors) + " vectors with NaN or Inf were left out of training" +
        (learned.skipped_batches == 0
             ? ""
             : "; " + std::to_string(learned.skipped_batches) + " batches held nothing else"));
  report::Training training{resolved.recipe, to_yaml(options), seconds, folder.series()};
  for (std::size_t i = 0; i < training.series.size(); ++i)
    training.series[i].unused_atoms = learned.unused_atoms[i];
  result.training = std::move(training);
  report::write_report(result, folder.path());
  run["finished"] = utc_time();
  run["seconds"] = seconds;
  run["phases"] = {{"reading", std::chrono::duration<double>(ready - began).count()},
                   {"training", seconds},
                   {"codes", std::chrono::duration<double>(coded - trained).count()},
                   {"report", seconds_since(coded)}};
  run["peak_memory_bytes"] = peak_resident_bytes();
  run["verdict"] = report::verdict(result);
  write_file(folder.file("run.json"), json_text(run));

  for (const std::string& note : result.notes) log_warning(note);
  if (config.json)
    std::cout << report::to_json(result) << '\n';
  else
    std::cout << report::console_table(result);
  log_info("wrote " + folder.file("dictionary.safetensors") +
           (no_pt.empty() ? ", dictionary.pt" : "") + " and report.html in " +
           format_duration(seconds));
  return 0;
}

int run(int argc, char** argv) {
  Config config;
  config.train.sparsity = 0;
  std::vector<Option> options = options_of(config);
  const ProgramInfo program{
      "lexico-train",
      "Learns sparse-coding dictionaries for the keys and values of a model's layers, from vectors "
      "that lexico-extract dumped, or from the running model.",
      "Examples:\n"
      "  lexico-train --data activations/ --output runs/first --num-atoms 1024 --sparsity 8\n"
      "  lexico-train -c configs/published.yaml --data activations/ --output runs/published\n"
      "  lexico-train --data activations/ --output runs/first --resume\n"
      "  lexico-train --model llama.pt --text train.txt --max-vectors 2e6 --output runs/no_dump\n"
      "Exit codes: 0 done, 2 usage, 3 input that does not fit, 4 no space or memory, 75 "
      "interrupted (go on with --resume).",
      "",
      {{"output", "-o"}, {"data", "-d"}},
      ""};
  if (!parse_command_line(program, options, argc, argv)) return 0;
  if (config.train.sparsity == 0)
    config.train.sparsity = config.codes.resolved_coding(config.train.recipe) == "packed" ? 3 : 8;
  config.validate();
  watch_stop_signals();
  return train(config, options, typed_command(argc, argv));
}

}  // namespace
}  // namespace lexico::apps

int main(int argc, char** argv) {
  return lexico::apps::run_program("lexico-train", [&] { return lexico::apps::run(argc, argv); });
}
