// lexico-eval: how well dictionaries reconstruct keys and values that they have never seen.
#include <algorithm>
#include <filesystem>
#include <iostream>
#include <optional>

#include "common/options.h"
#include "common/program.h"
#include "common/report/report.h"
#include "lexico-eval/inputs.h"
#include "lexico-eval/measure.h"
#include "lexico-eval/output_folder.h"
#include "lexico-eval/perplexity.h"
#include "lexico-eval/plan.h"
#include "lexico-eval/rates.h"
#include "lexico/activations.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

namespace fs = std::filesystem;
using report::Coder;
using report::EvaluationReport;

EvaluationReport describe(const EvalConfig& config,
                          const std::vector<Contender>& contenders,
                          const std::vector<NamedSource>& sources,
                          const MeasureOptions& options,
                          const TextTools& tools,
                          const std::string& command) {
  const Contender& first = contenders.front();
  EvaluationReport report;
  report.title = "Evaluation of " + first.coder.path;
  const auto others =
      std::count_if(contenders.begin(),
                    contenders.end(),
                    [](const Contender& c) { return c.coder.role == Coder::Role::kDictionary; }) -
      1;
  if (others > 0)
    report.title += " and " + std::to_string(others) + (others == 1 ? " other" : " others");
  report.command = command;
  report.version = std::string("lexico-eval ") + lexico_version();
  report.created = utc_time();
  report.model = sources.front().source->info().model;
  report.dim = first.set.dictionaries.front().dim;
  report.key_stage = name_of(first.set.key_stage);
  report.layers = options.layers;
  report.sparsities = options.sparsities;
  report.selection = options.encode.selection.name();
  report.relative_tolerance = config.tolerance;
  for (const Contender& contender : contenders) report.coders.push_back(contender.coder);
  report.settings = {{"model_sha256", sources.front().source->info().model_sha256},
                     {"max_vectors", std::to_string(config.max_vectors)},
                     {"seed", std::to_string(config.seed)},
                     {"threads", std::to_string(config.threads)}};
  if (tools.model) {
    report.settings.emplace_back("model_file", config.model);
    report.settings.emplace_back("tokenizer", tools.tokenizer_path);
    report.settings.emplace_back("sequence_length", std::to_string(tools.packing.sequence_length));
    report.settings.emplace_back("bos", name_of(tools.packing.bos));
    report.settings.emplace_back("device", config.device);
  }
  return report;
}

/// The baselines, beside the dictionaries. @returns where the vectors of the samples are from.
struct SamplesOrigin {
  std::string dataset;  ///< empty: there is no such baseline
  std::vector<std::int64_t> tokens;
};

SamplesOrigin add_baselines(const MeasureOptions& options,
                            std::vector<NamedSource>& sources,
                            std::vector<Contender>& contenders,
                            std::vector<std::string>& notes) {
  SamplesOrigin origin;
  const DictionarySet dictionaries = contenders.front().set;
  const auto in_domain = std::find_if(
      sources.begin(), sources.end(), [](const NamedSource& s) { return s.spec.in_domain; });
  try {
    if (in_domain == sources.end()) throw InvalidArgument("there is no in-domain data");
    contenders.push_back(sample_contender(dictionaries, *in_domain, options, origin.tokens));
    origin.dataset = in_domain->spec.name;
  } catch (const InvalidArgument& e) {
    notes.push_back(std::string("No baseline of plain samples: ") + e.what() + ".");
  }
  contenders.push_back(random_contender(dictionaries, options));
  return origin;
}

/// @throws InvalidArgument without text; IoError if the model cannot read on from a cache.
void require_step(const EvalConfig& config, const TextTools& tools) {
  if (!tools.model)
    throw InvalidArgument("perplexity needs text and --model FILE: activations cannot be run");
  if (!tools.model->info().has_step)
    throw IoError(config.model +
                  ": perplexity needs a model with the method 'step'; export it again with "
                  "tools/export_model.py");
}

int evaluate(const EvalConfig& config, const std::string& command) {
  std::vector<Contender> contenders = read_contenders(config.dictionary);
  MeasureOptions options;
  options.layers = choose_layers(config.layers, contenders);
  options.sparsities = config.sparsity;
  options.encode.relative_tolerance = static_cast<float>(config.tolerance);
  options.encode.selection = Selection::from(config.selection);
  options.encode.threads = config.threads;
  options.max_vectors = config.max_vectors;
  options.seed = config.seed;
  require_atoms_for(options.sparsities.back(), contenders);

  const std::vector<DataSpec> specs = data_specs(config);
  const DataSpec fit_spec = config.fit.empty() ? DataSpec{} : DataSpec::from(config.fit, true);
  std::optional<OutputFolder> output;
  if (!config.output.empty() && !config.dry_run) output.emplace(config.output, config.overwrite);
  TextTools tools;
  std::vector<DataSpec> all_specs = specs;
  if (!config.fit.empty()) all_specs.push_back(fit_spec);
  tools.load(config, all_specs);
  std::vector<NamedSource> sources = open_sources(config, specs, tools);
  std::optional<NamedSource> fit;
  if (!config.fit.empty()) fit = open_source(config, fit_spec, tools);
  std::vector<std::string> notes = check_fit(contenders, sources, options.layers, config);
  SamplesOrigin samples;
  if (!config.no_baselines) samples = add_baselines(options, sources, contenders, notes);
  if (config.perplexity) require_step(config, tools);
  const RateOptions rates{config.bits,
                          config.fit_vectors,
                          !config.no_baselines,
                          config.sparse_autoencoder ? config.autoencoder_vectors : -1};
  const std::vector<RateCoder> coders =
      make_rate_coders(contenders,
                       fit && !config.dry_run ? &*fit : nullptr,
                       contenders.front().set.dictionaries.front().dim,
                       options,
                       rates);
  std::vector<TextLengths> texts;
  std::vector<CacheSettings> caches;
  if (config.perplexity) {
    texts = texts_to_read(sources, config.perplexity_tokens);
    if (texts.empty())
      throw InvalidArgument("perplexity needs text with sequences of two tokens or more");
    const ModelInfo& model = tools.model->info();
    caches = config.budget.empty()
                 ? listed_settings(config, coders, model, texts, notes)
                 : budget_settings(config, contenders, coders, model, texts, notes);
    if (caches.empty())
      notes.push_back("No perplexity: no coder has keys and values of all layers.");
  }
  if (config.dry_run) {
    for (const std::string& note : notes) log_warning(note);
    print_plan(contenders, sources, options, caches, tools, texts, config.json);
    if (fit || config.perplexity)
      log_info(
          "fitting codes, comparing them at equal bits and perplexity are not in this time" +
          std::string(fit && config.perplexity ? "; settings of fitted codes are not listed" : ""));
    return 0;
  }

  EvaluationReport report = describe(config, contenders, sources, options, tools, command);
  report.notes = notes;
  if (!samples.dataset.empty())
    report.settings.emplace_back("samples baseline",
                                 "vectors of " + samples.dataset +
                                     ", which are left out where that baseline is measured on it");
  measure_all(contenders, sources, options, samples.dataset, samples.tokens, report);
  measure_rates(coders, sources, options, report);
  if (!caches.empty())
    measure_perplexity(*tools.model, caches, sources, config, options.encode, report);
  for (const std::string& note : report.notes) log_warning(note);

  if (output) {
    report::write_report(report, config.output);
    log_info("report: " + (fs::path(config.output) / "report.html").string());
  }
  std::cout << (config.json ? to_json(report) : console_table(report));
  return 0;
}

int main_body(int argc, char** argv) {
  watch_stop_signals();
  EvalConfig config;
  std::vector<Option> options = options_of(config);
  const ProgramInfo program{
      "lexico-eval",
      "Measures how well dictionaries reconstruct keys and values that they have never seen:\n"
      "relative error of each layer, keys and values apart, at each sparsity, in and out of "
      "domain,\n"
      "beside a random dictionary and one of plain samples. Errors are before weight quantization.",
      "Examples:\n"
      "  lexico-eval --dictionary runs/a --data wiki=test.h5 --ood code=code.h5 --output "
      "runs/a/eval\n"
      "  lexico-eval --dictionary runs/a --model m.pt --data test.txt --ood tweets.jsonl\n"
      "  lexico-eval --dictionary a=runs/a b=runs/b --data test.h5 --sparsity 4,8\n"
      "  lexico-eval --dictionary runs/a --model m.pt --data test.txt --perplexity --window "
      "32,128\n"
      "  lexico-eval --dictionary runs/a --model m.pt --data test.txt --budget 0.2",
      "data",
      {{"output", "-o"},
       {"dictionary", "-d"},
       {"ood", "--out-of-domain"},
       {"recent_window", "--window"},
       {"sink_tokens", "--sinks"},
       {"adaptive_threshold", "--adaptive"}},
      "libtorch " + torch_version() + ", HDF5 " + hdf5_version()};
  if (!parse_command_line(program, options, argc, argv)) return 0;
  config.validate();
  return evaluate(config, typed_command(argc, argv));
}

}  // namespace
}  // namespace lexico::apps

int main(int argc, char** argv) {
  return lexico::apps::run_program("lexico-eval",
                                   [&] { return lexico::apps::main_body(argc, argv); });
}
