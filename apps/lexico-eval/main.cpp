// lexico-eval: how well dictionaries reconstruct keys and values that they have never seen.
#include <algorithm>
#include <chrono>
#include <ctime>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "common/options.h"
#include "common/program.h"
#include "common/report/report.h"
#include "common/report/text.h"
#include "lexico-eval/measure.h"
#include "lexico-eval/output_folder.h"
#include "lexico-eval/vector_source.h"
#include "lexico/error.h"
#include "lexico/evaluation.h"
#include "lexico/language_model.h"
#include "lexico/pt_file.h"
#include "lexico/sha256.h"
#include "lexico/text_source.h"
#include "lexico/tokenizer.h"

namespace lexico::apps {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;
using report::Coder;
using report::EvaluationReport;

struct Config {
  std::vector<std::string> dictionary, data, text, ood;
  std::string model, tokenizer, field = "text", bos = "auto", layers = "all", selection = "omp";
  std::string output, device = "auto";
  std::vector<int> sparsity{4, 8, 16};
  std::int64_t max_vectors = 65536;
  int sequence_length = 512, threads = 0;
  double tolerance = 0;
  std::uint64_t seed = 0;
  bool no_baselines = false, overwrite = false, dry_run = false, json = false;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("dictionary",
          self.dictionary,
          "[name=]FILE or run folder of lexico-train (.safetensors or .pt); several are compared");
    visit("data",
          self.data,
          "[name=]PATH of in-domain data: activations (file, folder, 'glob') or text");
    visit("text", self.text, "[name=]FILE of in-domain text; the same as --data");
    visit("ood", self.ood, "[name=]PATH of out-of-domain data, activations or text");
    visit("model", self.model, "model file of tools/export_model.py; for text");
    visit("tokenizer", self.tokenizer, "tokenizer.json; for text");
    visit("field", self.field, "of each line of a .jsonl text");
    visit("sequence_length", self.sequence_length, "tokens the model sees at once; for text");
    visit(
        "bos",
        self.bos,
        "what the BOS token starts: always (every sequence), document, none; auto: always if the "
        "model expects it");
    visit("layers", self.layers, "layers to measure: all, or numbers like 0,2,5-7");
    visit("sparsity", self.sparsity, "numbers of atoms per vector to measure at");
    visit("max_vectors",
          self.max_vectors,
          "vectors per data set, layer and kind, evenly spread; 0: all");
    visit("selection", self.selection, "omp, ols, or ols-N (OLS among N candidates)");
    visit("tolerance", self.tolerance, "stop a vector once |r| <= tolerance * |x|; 0: never");
    visit("no_baselines", self.no_baselines, "leave out the random and the sample dictionary");
    visit("output", self.output, "folder for report.json, report.csv and report.html");
    visit("overwrite", self.overwrite, "replace a report in OUTPUT");
    visit("json", self.json, "print the report as JSON on stdout instead of a table");
    visit("dry_run", self.dry_run, "check the inputs, print the plan and stop");
    visit("threads", self.threads, "0: all the machine has");
    visit("seed", self.seed, "of the random dictionary");
    visit("device", self.device, "that runs the model on text: auto, cpu, cuda or cuda:1");
  }

  void validate() {
    if (dictionary.empty())
      throw InvalidArgument("dictionary is missing: --dictionary FILE_OR_RUN_FOLDER");
    if (data.empty() && text.empty() && ood.empty())
      throw InvalidArgument("data is missing: --data PATH (activations or text), --ood PATH");
    if (sparsity.empty()) throw InvalidArgument("sparsity is empty, must name at least one");
    std::sort(sparsity.begin(), sparsity.end());
    sparsity.erase(std::unique(sparsity.begin(), sparsity.end()), sparsity.end());
    if (sparsity.front() < 1) throw_bound("sparsity", sparsity.front(), ">= 1");
    if (max_vectors < 0) throw_bound("max_vectors", max_vectors, ">= 0");
    if (sequence_length < 1) throw_bound("sequence_length", sequence_length, ">= 1");
    if (threads < 0) throw_bound("threads", threads, ">= 0");
    if (!(tolerance >= 0 && tolerance < 1)) throw_bound("tolerance", tolerance, "in [0, 1)");
    if (bos != "auto" && bos != "always" && bos != "document" && bos != "none")
      throw InvalidArgument("bos is '" + bos + "', must be auto, always, document or none");
    (void)Selection::from(selection);
  }

 private:
  template <typename T>
  [[noreturn]] static void throw_bound(const char* key, T value, const char* bound) {
    throw InvalidArgument(std::string(key) + " is " + value_text(value) + ", must be " + bound);
  }
};

std::string command_line(int argc, char** argv) {
  std::string text;
  for (int i = 0; i < argc; ++i) {
    const std::string word = argv[i];
    const bool plain =
        !word.empty() && word.find_first_of(" \t\n'\"\\$*?[]&;|<>()") == std::string::npos;
    std::string quoted = "'";
    for (const char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
    text += (i ? " " : "") + (plain ? word : quoted + "'");
  }
  return text;
}

std::string utc_now() {
  char text[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", std::gmtime(&now));
  return text;
}

/// "name", or "name-2" if that is taken.
std::string unique_name(const std::string& name, std::set<std::string>& taken) {
  std::string candidate = name;
  for (int i = 2; !taken.insert(candidate).second; ++i) candidate = name + "-" + std::to_string(i);
  return candidate;
}

std::string metadata_of(const DictionarySet& set, const std::string& key) {
  const auto found = set.metadata.find(key);
  return found == set.metadata.end() ? "" : found->second;
}

// ---- what is compared ----

/// A name for a dictionary that was given none: its own, or its folder's if it is called
/// dictionary.*
std::string default_name(const std::string& path) {
  const fs::path full = fs::absolute(path).lexically_normal();
  const fs::path last = full.filename().empty() ? full.parent_path() : full;
  if (!fs::is_directory(path) && last.stem() == "dictionary") return last.parent_path().filename();
  return fs::is_directory(path) ? last.filename() : last.stem();
}

std::vector<Contender> read_contenders(const std::vector<std::string>& arguments) {
  std::vector<Contender> contenders;
  std::set<std::string> taken{"random", "samples"};
  for (const std::string& argument : arguments) {
    const TextSpec split = TextSpec::from(argument);
    Contender contender;
    contender.set = read_dictionaries_any(split.path);
    std::string name = split.path == argument ? default_name(argument) : split.name;
    if (arguments.size() == 1) name = split.path == argument ? "dictionary" : split.name;
    contender.coder = {
        unique_name(name, taken), Coder::Role::kDictionary, 0, split.path, contender.set.metadata};
    for (const Dictionary& d : contender.set.dictionaries)
      contender.coder.num_atoms = std::max(contender.coder.num_atoms, d.num_atoms);
    contenders.push_back(std::move(contender));
  }
  return contenders;
}

/// The layers to measure: of those the first dictionary has. Others of it are dropped everywhere.
std::vector<int> choose_layers(const std::string& wanted, std::vector<Contender>& contenders) {
  const std::vector<int> trained = contenders.front().set.layers();
  std::vector<int> layers = trained;
  if (wanted != "all") layers = parse_layers(wanted, trained.back() + 1);
  for (Contender& contender : contenders) {
    const std::vector<int> has = contender.set.layers();
    for (const int layer : layers)
      if (!std::binary_search(has.begin(), has.end(), layer))
        throw InvalidArgument("layers: " + contender.coder.path + " has no dictionary of layer " +
                              std::to_string(layer));
    std::erase_if(contender.set.dictionaries, [&](const Dictionary& d) {
      return !std::binary_search(layers.begin(), layers.end(), d.layer);
    });
  }
  return layers;
}

void require_alike(const std::vector<Contender>& contenders) {
  const Contender& a = contenders.front();
  const int dim = a.set.dictionaries.front().dim;
  for (const Contender& b : contenders) {
    for (const Dictionary& d : b.set.dictionaries)
      if (d.dim != dim)
        throw IoError(b.coder.path + ": head_dim is " + std::to_string(d.dim) + " in layer " +
                      std::to_string(d.layer) + ", but " + a.coder.path + " has " +
                      std::to_string(dim));
    if (b.set.key_stage != a.set.key_stage)
      throw IoError(b.coder.path + ": keys are " + name_of(b.set.key_stage) + ", but those of " +
                    a.coder.path + " are " + name_of(a.set.key_stage));
  }
}

void require_atoms_for(int sparsity, const std::vector<Contender>& contenders) {
  for (const Contender& contender : contenders)
    for (const Dictionary& d : contender.set.dictionaries) {
      const std::string where = " of " + contender.coder.path + " (layer " +
                                std::to_string(d.layer) + " " + name_of(d.kind) + ")";
      if (sparsity > d.num_atoms)
        throw InvalidArgument("sparsity is " + std::to_string(sparsity) + ", more than the " +
                              std::to_string(d.num_atoms) + " atoms" + where);
      if (sparsity > d.dim)
        throw InvalidArgument("sparsity is " + std::to_string(sparsity) +
                              ", more than the head_dim " + std::to_string(d.dim) + where);
    }
}

// ---- what they are compared on ----

std::vector<DataSpec> data_specs(const Config& config) {
  std::vector<DataSpec> specs;
  std::set<std::string> taken;
  const auto add = [&](const std::vector<std::string>& arguments, bool in_domain) {
    for (const std::string& argument : arguments) {
      specs.push_back(DataSpec::from(argument, in_domain));
      specs.back().name = unique_name(specs.back().name, taken);
    }
  };
  add(config.data, true);
  add(config.text, true);
  add(config.ood, false);
  return specs;
}

/// What turns text into vectors; the parts that are not needed stay empty.
struct TextTools {
  std::optional<LanguageModel> model;
  std::string model_sha256;
  std::optional<Tokenizer> tokenizer;
  PackOptions packing;
};

void load(TextTools& tools, const Config& config, const std::vector<DataSpec>& specs) {
  const auto first_text =
      std::find_if(specs.begin(), specs.end(), [](const DataSpec& s) { return s.is_text; });
  if (first_text == specs.end()) return;
  const bool needs_tokenizer = std::any_of(
      specs.begin(), specs.end(), [](const DataSpec& s) { return s.is_text && !s.is_token_ids; });
  if (config.model.empty() || (needs_tokenizer && config.tokenizer.empty()))
    throw InvalidArgument("'" + first_text->path + "' is text, which needs --model FILE" +
                          (needs_tokenizer ? " and --tokenizer FILE" : ""));
  if (needs_tokenizer) tools.tokenizer = Tokenizer::from_file(config.tokenizer);
  tools.model.emplace(config.model, config.device, config.threads);
  tools.model_sha256 = sha256_of_file(config.model);
  const ModelInfo& info = tools.model->info();
  if (info.max_positions > 0 && config.sequence_length > info.max_positions)
    throw InvalidArgument("sequence_length is " + std::to_string(config.sequence_length) +
                          ", more than the " + std::to_string(info.max_positions) +
                          " positions of " + config.model);
  if (needs_tokenizer && !info.tokenizer_sha256.empty() &&
      info.tokenizer_sha256 != sha256_of_file(config.tokenizer))
    log_warning(config.tokenizer + " is not the tokenizer that " + config.model +
                " was exported with (SHA-256 differs)");
  tools.packing.sequence_length = config.sequence_length;
  tools.packing.bos_id = info.bos_id;
  const std::string bos = config.bos != "auto" ? config.bos : info.add_bos ? "always" : "none";
  tools.packing.bos = bos == "always"     ? PackOptions::Bos::kAlways
                      : bos == "document" ? PackOptions::Bos::kDocument
                                          : PackOptions::Bos::kNone;
}

std::vector<NamedSource> open_sources(const Config& config,
                                      const std::vector<DataSpec>& specs,
                                      TextTools& tools,
                                      KeyStage stage) {
  std::vector<NamedSource> sources;
  for (const DataSpec& spec : specs) {
    const Tokenizer* tokenizer = tools.tokenizer ? &*tools.tokenizer : nullptr;
    sources.push_back({spec,
                       spec.is_text ? open_text(spec,
                                                config.field,
                                                *tools.model,
                                                tools.model_sha256,
                                                tokenizer,
                                                tools.packing,
                                                stage)
                                    : open_activations(spec)});
  }
  return sources;
}

/// @throws IoError naming both files and both values. @returns what is odd, but no reason to stop.
std::string check_fit(const Contender& contender,
                      const NamedSource& source,
                      const std::vector<int>& layers,
                      bool layers_were_chosen,
                      const std::string& model_path) {
  const VectorSource::Info& data = source.source->info();
  const std::string& path = source.spec.is_text ? model_path : source.spec.path;
  const int dim = contender.set.dictionaries.front().dim;
  if (data.head_dim != dim)
    throw IoError(path + ": head_dim is " + std::to_string(data.head_dim) + ", but " +
                  contender.coder.path + " has " + std::to_string(dim));
  const std::string its_sha = metadata_of(contender.set, "model_sha256");
  const bool same_model = !its_sha.empty() && its_sha == data.model_sha256;
  const int num_layers = static_cast<int>(layers.size());
  if (layers.back() >= data.num_layers ||
      (!layers_were_chosen && !same_model && num_layers != data.num_layers))
    throw IoError(path + ": has " + std::to_string(data.num_layers) + " layers, but " +
                  contender.coder.path + " has dictionaries of " + std::to_string(num_layers) +
                  (num_layers == layers.back() + 1
                       ? ""
                       : " (up to layer " + std::to_string(layers.back()) + ")") +
                  "; --layers picks those to compare");
  const bool has_keys = std::any_of(contender.set.dictionaries.begin(),
                                    contender.set.dictionaries.end(),
                                    [](const Dictionary& d) { return d.kind == Kind::kKeys; });
  if (has_keys && data.key_stage != contender.set.key_stage)
    throw IoError(path + ": keys are " + name_of(data.key_stage) + ", but " + contender.coder.path +
                  " was trained on " + name_of(contender.set.key_stage));
  if (!its_sha.empty() && !data.model_sha256.empty() && !same_model)
    return source.spec.name + ": its vectors are of another model file (" + data.model + ", " +
           data.model_sha256.substr(0, 12) + ") than " + contender.coder.name +
           " was trained on (" + metadata_of(contender.set, "model") + ", " +
           its_sha.substr(0, 12) + ").";
  return {};
}

// ---- the run ----

void print_plan(const Config& config,
                const std::vector<Contender>& contenders,
                std::vector<NamedSource>& sources,
                const MeasureOptions& options) {
  double encodes = 0, most_rows = 0;
  Json plan{{"data", Json::array()}};
  for (const NamedSource& source : sources) {
    const auto tokens = chosen_tokens(*source.source, options.max_vectors);
    const double rows = static_cast<double>(tokens.size()) * source.source->info().kv_heads;
    for (const Contender& contender : contenders)
      encodes += rows * static_cast<double>(contender.set.dictionaries.size());
    most_rows = std::max(most_rows, rows);
    plan["data"].push_back({{"name", source.spec.name},
                            {"path", source.spec.path},
                            {"in_domain", source.spec.in_domain},
                            {"tokens", source.source->info().num_tokens},
                            {"vectors_per_layer_and_kind", static_cast<std::int64_t>(rows)},
                            {"sampling", source.source->sampling(tokens)}});
  }
  // A short probe: what one token costs to get, and one vector to encode.
  double read_seconds = 0, encode_seconds = 0;
  Evaluator evaluator(options.sparsities, options.encode);
  for (NamedSource& source : sources) {
    const auto wanted = chosen_tokens(*source.source, options.max_vectors);
    const auto probe = source.source->choose(
        std::min<std::int64_t>(512, static_cast<std::int64_t>(wanted.size())));
    const auto begin = Clock::now();
    double encoding = 0, measured = 0;
    source.source->read(
        probe,
        options.layers,
        [&](int layer, Kind kind, const std::int64_t*, std::int64_t count, const float* rows) {
          const Dictionary* dictionary = contenders.front().set.find(layer, kind);
          if (!dictionary || measured > 0) return;
          evaluator.use(*dictionary);
          RelativeErrors errors(options.sparsities);
          const auto from = Clock::now();
          evaluator.measure(rows, count * source.source->info().kv_heads, errors);
          encoding = std::chrono::duration<double>(Clock::now() - from).count();
          measured = static_cast<double>(count * source.source->info().kv_heads);
        });
    const double all = std::chrono::duration<double>(Clock::now() - begin).count();
    if (source.spec.is_text)
      read_seconds +=
          (all - encoding) / static_cast<double>(probe.size()) * static_cast<double>(wanted.size());
    if (measured > 0) encode_seconds = std::max(encode_seconds, encoding / measured);
  }
  const double seconds = read_seconds + encode_seconds * encodes;
  const double error_bytes = 4 * most_rows * static_cast<double>(options.sparsities.size()) *
                             static_cast<double>(contenders.size());
  plan["encodes"] = encodes;
  plan["memory_bytes"] = 6e8 + error_bytes * 2 * static_cast<double>(options.layers.size());
  plan["seconds"] = seconds;
  if (config.json) {
    std::cout << plan.dump(2) << '\n';
    return;
  }
  std::cout << "Plan (nothing is written)\n";
  for (const Json& data : plan["data"])
    std::cout << "  " << report::pad_right(data["name"].get<std::string>(), 12) << "  "
              << (data["in_domain"].get<bool>() ? "in domain,     " : "out of domain, ")
              << report::grouped(data["vectors_per_layer_and_kind"].get<std::int64_t>())
              << " vectors per layer and kind: " << data["sampling"].get<std::string>() << '\n';
  std::cout << "  " << contenders.size()
            << (contenders.size() == 1 ? " dictionary, " : " dictionaries and baselines, ")
            << options.layers.size() << " layers: " << format_count(encodes) << " pursuits of "
            << options.sparsities.back() << " atoms\n  memory        about "
            << format_bytes(plan["memory_bytes"].get<double>()) << "\n  time          about "
            << format_duration(seconds) << " (from a short probe)\n";
}

EvaluationReport describe(const Config& config,
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
  report.created = utc_now();
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
    static constexpr const char* kBosNames[] = {"always", "document", "none"};
    report.settings.emplace_back("model_file", config.model);
    report.settings.emplace_back("tokenizer", config.tokenizer);
    report.settings.emplace_back("sequence_length", std::to_string(tools.packing.sequence_length));
    report.settings.emplace_back("bos", kBosNames[static_cast<int>(tools.packing.bos)]);
    report.settings.emplace_back("device", config.device);
  }
  return report;
}

int evaluate(Config& config, const std::string& command) {
  std::vector<Contender> contenders = read_contenders(config.dictionary);
  MeasureOptions options;
  options.layers = choose_layers(config.layers, contenders);
  options.sparsities = config.sparsity;
  options.encode.relative_tolerance = static_cast<float>(config.tolerance);
  options.encode.selection = Selection::from(config.selection);
  options.encode.threads = config.threads;
  options.max_vectors = config.max_vectors;
  options.seed = config.seed;
  require_alike(contenders);
  require_atoms_for(options.sparsities.back(), contenders);

  const std::vector<DataSpec> specs = data_specs(config);
  std::optional<OutputFolder> output;
  if (!config.output.empty() && !config.dry_run) output.emplace(config.output, config.overwrite);
  TextTools tools;
  load(tools, config, specs);
  std::vector<NamedSource> sources =
      open_sources(config, specs, tools, contenders.front().set.key_stage);
  std::vector<std::string> notes;
  for (const Contender& contender : contenders)
    for (const NamedSource& source : sources) {
      const std::string note =
          check_fit(contender, source, options.layers, config.layers != "all", config.model);
      if (!note.empty()) notes.push_back(note);
    }

  std::string samples_from;
  std::vector<std::int64_t> sample_tokens;
  if (!config.no_baselines) {
    const auto in_domain = std::find_if(
        sources.begin(), sources.end(), [](const NamedSource& s) { return s.spec.in_domain; });
    try {
      if (in_domain == sources.end()) throw InvalidArgument("there is no in-domain data");
      Contender samples =
          sample_contender(contenders.front().set, *in_domain, options, sample_tokens);
      samples_from = in_domain->spec.name;
      contenders.push_back(std::move(samples));
    } catch (const InvalidArgument& e) {
      notes.push_back(std::string("No baseline of plain samples: ") + e.what() + ".");
    }
    contenders.push_back(random_contender(contenders.front().set, options));
  }
  if (config.dry_run) {
    for (const std::string& note : notes) log_warning(note);
    print_plan(config, contenders, sources, options);
    return 0;
  }

  EvaluationReport report = describe(config, contenders, sources, options, tools, command);
  report.notes = notes;
  if (!samples_from.empty())
    report.settings.emplace_back("samples baseline",
                                 "vectors of " + samples_from +
                                     ", which are left out where that baseline is measured on it");
  measure_all(contenders, sources, options, samples_from, sample_tokens, report);
  for (const std::string& note : report.notes) log_warning(note);

  if (output) {
    report::write_report(report, config.output);
    log_info("report: " + (fs::path(config.output) / "report.html").string());
  }
  std::cout << (config.json ? to_json(report) : console_table(report));
  return 0;
}

int main_body(int argc, char** argv) {
  Config config;
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
      "  lexico-eval --dictionary runs/a --text test.txt --model m.pt --tokenizer tokenizer.json\n"
      "  lexico-eval --dictionary a=runs/a b=runs/b --data test.h5 --sparsity 4,8",
      "data",
      {{"output", "-o"}, {"dictionary", "-d"}, {"ood", "--out-of-domain"}},
      ""};
  if (!parse_command_line(program, options, argc, argv)) return 0;
  config.validate();
  watch_stop_signals();
  return evaluate(config, command_line(argc, argv));
}

}  // namespace
}  // namespace lexico::apps

int main(int argc, char** argv) {
  return lexico::apps::run_program("lexico-eval",
                                   [&] { return lexico::apps::main_body(argc, argv); });
}
