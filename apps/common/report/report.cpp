// What the numbers of a report add up to, and the two outputs that machines read. Next:
// console.cpp, html.cpp.
#include "common/report/report.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>

#include "common/json_text.h"
#include "common/report/text.h"
#include "lexico/error.h"
#include "lexico/evaluation.h"
#include "lexico/files.h"

namespace lexico::report {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kDefinition =
    "mean over vectors of |x - D y| / (|x| + 1e-8), before the weights are quantized";

const Dataset* find_dataset(const EvaluationReport& report, const std::string& name) {
  for (const Dataset& dataset : report.datasets)
    if (dataset.name == name) return &dataset;
  return nullptr;
}

const char* role_name(Coder::Role role) {
  switch (role) {
    case Coder::Role::kRandom:
      return "random";
    case Coder::Role::kSamples:
      return "samples";
    default:
      return "dictionary";
  }
}

bool fits(const EvaluationReport& report, const Row& row, const Query& query) {
  if (row.coder != query.coder || row.sparsity != query.sparsity || row.vectors == 0) return false;
  if (query.kind && row.kind != *query.kind) return false;
  if (query.layer && row.layer != *query.layer) return false;
  if (query.dataset && row.dataset != *query.dataset) return false;
  if (!query.in_domain) return true;
  const Dataset* dataset = find_dataset(report, row.dataset);
  return dataset && dataset->in_domain == *query.in_domain && dataset->position_offset == 0;
}

template <typename Value>
double mean_over(const EvaluationReport& report, const Query& query, Value value) {
  double sum = 0;
  int count = 0;
  for (const Row& row : report.rows) {
    if (!fits(report, row, query)) continue;
    sum += value(row);
    ++count;
  }
  return sum / count;
}

/// JSON has no NaN.
Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"') quoted += '"';
    quoted += c;
  }
  return quoted + '"';
}

std::string csv_number(double value) { return std::isfinite(value) ? print("%.9g", value) : ""; }

Json summary_of(const EvaluationReport& report, const Coder& coder, int sparsity) {
  Json summary{{"coder", coder.name}, {"sparsity", sparsity}};
  const double bytes = mean_bytes(report, {coder.name, sparsity, {}, {}, {}, {}});
  summary["bytes_per_vector"] = number(bytes);
  summary["share_of_fp16"] = number(bytes / fp16_bytes(report.dim));
  for (const bool in_domain : {true, false}) {
    Json& domain = summary[in_domain ? "in_domain" : "out_of_domain"];
    for (const Kind kind : kBothKinds)
      domain[name_of(kind)] =
          number(mean_error(report, {coder.name, sparsity, kind, in_domain, {}, {}}));
    domain["both"] = number(mean_error(report, {coder.name, sparsity, {}, in_domain, {}, {}}));
  }
  summary["out_over_in"] = number(out_over_in(report, coder.name, sparsity));
  return summary;
}

Json training_json(const Training& training) {
  Json json{{"recipe", training.recipe},
            {"seconds", number(training.seconds)},
            {"config", training.config}};
  json["series"] = Json::array();
  for (const TrainingSeries& series : training.series) {
    Json entry{{"layer", series.layer}, {"kind", name_of(series.kind)}};
    entry["unused_atoms"] = series.unused_atoms < 0 ? Json(nullptr) : Json(series.unused_atoms);
    Json points = Json::array();
    for (const TrainingPoint& point : series.points)
      points.push_back({{"vectors", point.vectors},
                        {"loss", number(point.loss)},
                        {"relative_error", number(point.relative_error)},
                        {"learning_rate", number(point.learning_rate)}});
    entry["points"] = std::move(points);
    json["series"].push_back(std::move(entry));
  }
  return json;
}

}  // namespace

double mean_error(const EvaluationReport& report, const Query& query) {
  return mean_over(report, query, [](const Row& row) { return row.mean; });
}

double mean_bytes(const EvaluationReport& report, const Query& query) {
  return published_bytes(mean_over(report, query, [](const Row& row) { return row.mean_atoms; }));
}

std::vector<RatePoint> rate_line(const EvaluationReport& report,
                                 const std::string& coder,
                                 Kind kind,
                                 bool in_domain) {
  std::map<int, std::map<int, std::pair<double, int>>> by_bits;  // bits, layer: sum and count
  std::set<int> layers;
  for (const Rate& rate : report.rates) {
    if (rate.coder != coder || rate.kind != kind || rate.vectors == 0) continue;
    const Dataset* dataset = find_dataset(report, rate.dataset);
    if (!dataset || dataset->in_domain != in_domain || dataset->position_offset != 0) continue;
    auto& [sum, count] = by_bits[rate.bits][rate.layer];
    sum += rate.mean;
    ++count;
    layers.insert(rate.layer);
  }
  std::vector<RatePoint> line;
  for (const auto& [bits, of_layers] : by_bits) {
    if (of_layers.size() != layers.size()) continue;
    double total = 0;
    for (const auto& [layer, sum] : of_layers) total += sum.first / sum.second;
    line.push_back({bits, total / static_cast<double>(layers.size())});
  }
  return line;
}

std::vector<std::string> rate_coders(const EvaluationReport& report) {
  std::vector<std::string> names;
  for (const Rate& rate : report.rates)
    if (std::find(names.begin(), names.end(), rate.coder) == names.end())
      names.push_back(rate.coder);
  return names;
}

namespace {

/// Whether a line belongs to a dictionary: its name begins with that of one.
bool is_dictionary_line(const EvaluationReport& report, const std::string& line) {
  return std::any_of(report.coders.begin(), report.coders.end(), [&](const Coder& coder) {
    return coder.role == Coder::Role::kDictionary &&
           (line == coder.name || line.rfind(coder.name + ", ", 0) == 0);
  });
}

/// The error at `bits` by interpolation of its logarithm; NaN beyond the ends.
double error_at(const std::vector<RatePoint>& line, double bits) {
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (line[i].bits == bits) return line[i].error;
    if (i + 1 < line.size() && line[i].bits < bits && bits < line[i + 1].bits) {
      const double t = (bits - line[i].bits) / (line[i + 1].bits - line[i].bits);
      return std::exp((1 - t) * std::log(line[i].error) + t * std::log(line[i + 1].error));
    }
  }
  return std::nan("");
}

}  // namespace

std::vector<std::string> crossings(const EvaluationReport& report) {
  std::vector<std::string> sentences;
  const std::vector<std::string> coders = rate_coders(report);
  // The published format is compared as one of the others where there are better ones.
  std::vector<std::string> ours;
  for (const bool published : {false, true})
    for (const std::string& name : coders)
      if (is_dictionary_line(report, name) && name.ends_with(kPublishedSuffix) == published &&
          (!published || ours.empty()))
        ours.push_back(name);
  for (const Kind kind : kBothKinds) {
    std::vector<std::vector<RatePoint>> own_lines;
    for (const std::string& name : ours) own_lines.push_back(rate_line(report, name, kind, true));
    for (const std::string& other : coders) {
      if (std::find(ours.begin(), ours.end(), other) != ours.end()) continue;
      std::vector<std::string> parts;
      std::size_t wins = 0;
      for (const RatePoint& point : rate_line(report, other, kind, true)) {
        double best = std::nan("");
        for (const auto& line : own_lines) best = std::fmin(best, error_at(line, point.bits));
        if (!std::isfinite(best)) continue;
        wins += best < point.error;
        parts.push_back(print("%.2fx at %s",
                              best / point.error,
                              short_number(static_cast<double>(point.bits) / report.dim).c_str()));
      }
      if (parts.empty()) continue;
      const std::string verdict =
          wins == parts.size() ? "the dictionary wins at every rate"
          : wins == 0          ? "the dictionary loses at every rate"
                      : print("the dictionary wins at %zu of %zu rates", wins, parts.size());
      sentences.push_back(std::string(name_of(kind)) + " against " + other + ": " + verdict + " (" +
                          join(parts, ", ") + " bits per number)");
    }
  }
  return sentences;
}

double out_over_in(const EvaluationReport& report,
                   const std::string& coder,
                   int sparsity,
                   std::optional<Kind> kind,
                   std::optional<int> layer) {
  return mean_error(report, {coder, sparsity, kind, false, {}, layer}) /
         mean_error(report, {coder, sparsity, kind, true, {}, layer});
}

int headline_sparsity(const EvaluationReport& report) {
  if (report.sparsities.empty()) return 0;
  for (const int sparsity : report.sparsities)
    if (sparsity == 8) return sparsity;
  return report.sparsities[report.sparsities.size() / 2];
}

const Coder* find_coder(const EvaluationReport& report, Coder::Role role) {
  for (const Coder& coder : report.coders)
    if (coder.role == role) return &coder;
  return nullptr;
}

std::string verdict(const EvaluationReport& report) {
  const Coder* dictionary = find_coder(report, Coder::Role::kDictionary);
  if (!dictionary || report.sparsities.empty() || report.rows.empty())
    return "Nothing was measured.";
  const int s = headline_sparsity(report);
  const bool has_in = std::isfinite(mean_error(report, {dictionary->name, s, {}, true, {}, {}}));
  const double bytes = mean_bytes(report, {dictionary->name, s, {}, {}, {}, {}});

  const auto errors_at = [&](int sparsity, bool in_domain) {
    std::vector<std::string> parts;
    for (const Kind kind : kBothKinds) {
      const double error =
          mean_error(report, {dictionary->name, sparsity, kind, in_domain, {}, {}});
      if (std::isfinite(error))
        parts.push_back(std::string(name_of(kind)) + " " + short_error(error));
    }
    return join(parts, ", ");
  };
  std::string line;
  std::vector<std::string> coded;  // in the dictionary's own format
  for (const Kind kind : kBothKinds) {
    const std::vector<RatePoint> own = rate_line(report, dictionary->name, kind, has_in);
    if (own.size() == 1)
      coded.push_back(
          print("%s %s at %d bits", name_of(kind), short_error(own[0].error).c_str(), own[0].bits));
  }
  if (!coded.empty()) line = "as stored: relative error " + join(coded, ", ") + "; ";
  line += "s=" + std::to_string(s) + ": relative error " + errors_at(s, has_in) +
          (has_in ? " in domain" : " out of domain");
  const double ratio = out_over_in(report, dictionary->name, s);
  if (std::isfinite(ratio)) {
    line += "; out of domain " + print("%.2fx", ratio);
    std::string worst_name;
    double worst = 0;
    int out_of_domain = 0;
    const double in = mean_error(report, {dictionary->name, s, {}, true, {}, {}});
    for (const Dataset& dataset : report.datasets) {
      if (dataset.in_domain) continue;
      ++out_of_domain;
      const double here = mean_error(report, {dictionary->name, s, {}, {}, dataset.name, {}}) / in;
      if (here > worst) worst = here, worst_name = dataset.name;
    }
    if (out_of_domain > 1) line += print(" (worst: %s %.2fx)", worst_name.c_str(), worst);
  }
  line += print("; %s bytes a vector = %.0f %% of fp16",
                short_number(bytes).c_str(),
                100 * bytes / fp16_bytes(report.dim));

  const double own = mean_error(report, {dictionary->name, s, {}, has_in, {}, {}});
  double against_samples = std::nan("");
  if (const Coder* samples = find_coder(report, Coder::Role::kSamples)) {
    against_samples = own / mean_error(report, {samples->name, s, {}, has_in, {}, {}});
    if (std::isfinite(against_samples))
      line += print("; %.2fx the error of plain samples", against_samples);
  }
  line += ". ";

  if (against_samples > 0.98)
    return line + "No better than plain samples: train longer or with a higher learning rate.";
  if (ratio > 1.25) return line + "Much weaker out of domain: train on more varied text.";
  // What one step of sparsity up (else down) would give.
  for (std::size_t i = 0; i < report.sparsities.size(); ++i) {
    if (report.sparsities[i] != s || report.sparsities.size() == 1) continue;
    const bool up = i + 1 < report.sparsities.size();
    const int other = report.sparsities[up ? i + 1 : i - 1];
    const double other_bytes = mean_bytes(report, {dictionary->name, other, {}, {}, {}, {}});
    line += print("%s s=%d: %s at %s bytes (%.0f %%)",
                  up ? "For less error take" : "For fewer bytes take",
                  other,
                  errors_at(other, has_in).c_str(),
                  short_number(other_bytes).c_str(),
                  100 * other_bytes / fp16_bytes(report.dim));
    line += ".";
  }
  return line.back() == ' ' ? line.substr(0, line.size() - 1) : line;
}

std::string exact_part(const CacheEffectRow& row) {
  std::string text = "window " + std::to_string(row.recent_window);
  if (row.sink_tokens > 0) text += ", sinks " + std::to_string(row.sink_tokens);
  if (row.adaptive_threshold > 0) text += print(", adaptive %g", row.adaptive_threshold);
  return text;
}

std::string rate_text(const CacheEffectRow& row) {
  if (row.key_atoms > 0 && row.value_atoms > 0)
    return row.key_atoms == row.value_atoms ? print("s = %d", row.key_atoms)
                                            : print("s = %d + %d", row.key_atoms, row.value_atoms);
  return row.key_bits == row.value_bits ? print("%.4g bits", row.key_bits)
                                        : print("%.4g + %.4g bits", row.key_bits, row.value_bits);
}

std::vector<std::string> effect_sentences(const EvaluationReport& report) {
  std::vector<std::string> sentences, datasets;
  for (const CacheEffectRow& row : report.cache_effects)
    if (std::find(datasets.begin(), datasets.end(), row.dataset) == datasets.end())
      datasets.push_back(row.dataset);
  const auto described = [](const CacheEffectRow& row) {
    return row.coder + ", " + rate_text(row) + ", " + exact_part(row) +
           print(" (KL %.3g, perplexity x %.4f, %.2f %% of fp16)",
                 row.mean_kl,
                 row.perplexity_ratio(),
                 100 * row.share());
  };
  for (const std::string& dataset : datasets) {
    const CacheEffectRow *best = nullptr, *other = nullptr;
    for (const CacheEffectRow& row : report.cache_effects) {
      if (row.dataset != dataset || row.split.empty() || !std::isfinite(row.mean_kl)) continue;
      const CacheEffectRow*& of = row.by_dictionary ? best : other;
      if (of == nullptr || row.mean_kl < of->mean_kl) of = &row;
    }
    if (best == nullptr) continue;
    std::string text = dataset + ": the best within the budget is " + described(*best);
    if (best->key_atoms > 0 && best->key_atoms != best->value_atoms)
      text += print(": %d atoms for keys, %d for values", best->key_atoms, best->value_atoms);
    text += ".";
    if (other != nullptr) text += " Without a dictionary: " + described(*other) + ".";
    sentences.push_back(text);
  }
  // Lists: each code of a dictionary beside the other coders that take as many bytes.
  for (const CacheEffectRow& row : report.cache_effects) {
    if (!row.by_dictionary || !row.split.empty() || row.adaptive_threshold > 0) continue;
    for (const CacheEffectRow& rival : report.cache_effects) {
      constexpr double kEqual = 0.001;  // of the bytes
      if (rival.by_dictionary || rival.dataset != row.dataset ||
          rival.recent_window != row.recent_window || rival.sink_tokens != row.sink_tokens ||
          std::fabs(rival.bytes / row.bytes - 1) > kEqual)
        continue;
      sentences.push_back(row.dataset + ": " + row.coder + ", " + rate_text(row) + ", " +
                          exact_part(row) + ": " +
                          print("%.2fx the KL of ", row.mean_kl / rival.mean_kl) + rival.coder +
                          print(" at equal bytes, %.2f %% of fp16.", 100 * row.share()));
    }
  }
  return sentences;
}

std::string to_json(const EvaluationReport& report) {
  Json json{{"format", "lexico-report 1"},
            {"title", report.title},
            {"verdict", verdict(report)},
            {"error", kDefinition},
            {"weights_quantized", false},
            {"command", report.command},
            {"version", report.version},
            {"created", report.created},
            {"model", report.model},
            {"head_dim", report.dim},
            {"key_stage", report.key_stage},
            {"layers", report.layers},
            {"sparsities", report.sparsities},
            {"selection", report.selection},
            {"relative_tolerance", report.relative_tolerance},
            {"fp16_bytes_per_vector", fp16_bytes(report.dim)}};
  json["settings"] = Json::object();
  for (const auto& [key, value] : report.settings) json["settings"][key] = value;
  json["notes"] = report.notes;
  json["coders"] = Json::array();
  for (const Coder& coder : report.coders)
    json["coders"].push_back({{"name", coder.name},
                              {"role", role_name(coder.role)},
                              {"num_atoms", coder.num_atoms},
                              {"path", coder.path},
                              {"metadata", coder.metadata}});
  json["datasets"] = Json::array();
  for (const Dataset& dataset : report.datasets)
    json["datasets"].push_back({{"name", dataset.name},
                                {"path", dataset.path},
                                {"in_domain", dataset.in_domain},
                                {"tokens", dataset.tokens},
                                {"vectors_per_layer_and_kind", dataset.vectors},
                                {"not_finite", dataset.not_finite},
                                {"sampling", dataset.sampling},
                                {"position_offset", dataset.position_offset}});
  json["summary"] = Json::array();
  for (const Coder& coder : report.coders)
    for (const int sparsity : report.sparsities)
      json["summary"].push_back(summary_of(report, coder, sparsity));
  json["rows"] = Json::array();
  for (const Row& row : report.rows)
    json["rows"].push_back({{"dataset", row.dataset},
                            {"layer", row.layer},
                            {"kind", name_of(row.kind)},
                            {"coder", row.coder},
                            {"sparsity", row.sparsity},
                            {"mean", number(row.mean)},
                            {"median", number(row.median)},
                            {"p99", number(row.p99)},
                            {"mean_atoms", number(row.mean_atoms)},
                            {"bytes_per_vector", number(published_bytes(row.mean_atoms))},
                            {"vectors", row.vectors}});
  json["rates"] = Json::array();
  for (const Rate& rate : report.rates)
    json["rates"].push_back({{"dataset", rate.dataset},
                             {"layer", rate.layer},
                             {"kind", name_of(rate.kind)},
                             {"coder", rate.coder},
                             {"bits_per_vector", rate.bits},
                             {"mean", number(rate.mean)},
                             {"vectors", rate.vectors}});
  json["cache_effects"] = Json::array();
  for (const CacheEffectRow& row : report.cache_effects)
    json["cache_effects"].push_back(
        {{"dataset", row.dataset},
         {"coder", row.coder},
         {"split", row.split},
         {"key_bits", number(row.key_bits)},
         {"value_bits", number(row.value_bits)},
         {"key_atoms", row.key_atoms},
         {"value_atoms", row.value_atoms},
         {"bytes_per_token_and_head", number((row.key_bits + row.value_bits) / 8)},
         {"recent_window", row.recent_window},
         {"sink_tokens", row.sink_tokens},
         {"compress_chunk", row.compress_chunk},
         {"chunk", row.chunk},
         {"adaptive_threshold", number(row.adaptive_threshold)},
         {"own_atoms", row.own_atoms},
         {"bytes", number(row.bytes)},
         {"full_bytes", number(row.full_bytes)},
         {"share_of_fp16", number(row.share())},
         {"tokens", row.tokens},
         {"full_perplexity", number(row.full_perplexity)},
         {"perplexity", number(row.perplexity)},
         {"perplexity_ratio", number(row.perplexity_ratio())},
         {"mean_kl", number(row.mean_kl)},
         {"p99_kl", number(row.p99_kl)}});
  if (report.training) json["training"] = training_json(*report.training);
  return apps::json_text(json, 1);
}

std::string to_csv(const EvaluationReport& report) {
  std::string csv =
      "dataset,in_domain,layer,kind,coder,sparsity,mean,median,p99,vectors,mean_atoms,"
      "bytes_per_vector,share_of_fp16,weights_quantized\n";
  for (const Row& row : report.rows) {
    const Dataset* dataset = find_dataset(report, row.dataset);
    const double bytes = published_bytes(row.mean_atoms);
    csv += csv_field(row.dataset) + "," + (dataset && dataset->in_domain ? "1" : "0") + "," +
           std::to_string(row.layer) + "," + name_of(row.kind) + "," + csv_field(row.coder) + "," +
           std::to_string(row.sparsity) + "," + csv_number(row.mean) + "," +
           csv_number(row.median) + "," + csv_number(row.p99) + "," + std::to_string(row.vectors) +
           "," + csv_number(row.mean_atoms) + "," + csv_number(bytes) + "," +
           csv_number(bytes / fp16_bytes(report.dim)) + ",0\n";
  }
  return csv;
}

std::string effects_to_csv(const EvaluationReport& report) {
  std::string csv =
      "dataset,coder,split,key_bits,value_bits,key_atoms,value_atoms,recent_window,sink_tokens,"
      "compress_chunk,chunk,adaptive_threshold,own_atoms,bytes,full_bytes,share_of_fp16,tokens,"
      "full_perplexity,perplexity,perplexity_ratio,mean_kl,p99_kl\n";
  for (const CacheEffectRow& row : report.cache_effects) {
    csv += csv_field(row.dataset) + "," + csv_field(row.coder) + "," + csv_field(row.split);
    for (const double value : {row.key_bits, row.value_bits}) csv += "," + csv_number(value);
    for (const int value : {row.key_atoms,
                            row.value_atoms,
                            row.recent_window,
                            row.sink_tokens,
                            row.compress_chunk,
                            row.chunk})
      csv += "," + std::to_string(value);
    csv += "," + csv_number(row.adaptive_threshold) + "," + std::to_string(row.own_atoms) +
           print(",%.0f,%.0f,", row.bytes, row.full_bytes) + csv_number(row.share()) + "," +
           std::to_string(row.tokens);
    for (const double value :
         {row.full_perplexity, row.perplexity, row.perplexity_ratio(), row.mean_kl, row.p99_kl})
      csv += "," + csv_number(value);
    csv += "\n";
  }
  return csv;
}

void write_report(const EvaluationReport& report, const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw ResourceError(folder + ": cannot make the folder: " + error.message());
  const std::filesystem::path root(folder);
  write_file((root / "report.json").string(), to_json(report));
  write_file((root / "report.csv").string(), to_csv(report));
  write_file((root / "report.html").string(), to_html(report));
  if (!report.cache_effects.empty())
    write_file((root / "cache_effects.csv").string(), effects_to_csv(report));
  else
    std::filesystem::remove(root / "cache_effects.csv", error);  // of the report replaced
}

}  // namespace lexico::report
