#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lexico/kind.h"

/// What lexico-eval and lexico-train tell a person: a table, JSON, CSV and one HTML page, from one
/// struct.
namespace lexico::report {

/// What encodes the vectors: a trained dictionary, or a baseline to compare it with.
struct Coder {
  enum class Role { kDictionary, kRandom, kSamples };
  std::string name;  ///< as rows name it; unique
  Role role = Role::kDictionary;
  int num_atoms = 0;
  std::string path;                             ///< of a dictionary
  std::map<std::string, std::string> metadata;  ///< of a dictionary: its provenance
};

struct Dataset {
  std::string name;  ///< as rows name it; unique
  std::string path;
  bool in_domain = true;
  std::int64_t tokens = 0;   ///< it holds
  std::int64_t vectors = 0;  ///< measured per layer and kind, those that are not finite included
  std::int64_t not_finite =
      0;  ///< of them, over all layers and kinds, hold NaN or Inf: counted, left out of all errors
  std::string sampling;     ///< in words: which vectors were measured
  int position_offset = 0;  ///< its keys were moved this far; then it belongs to no domain's mean
};

/// One measurement.
struct Row {
  std::string dataset;
  int layer = 0;
  Kind kind = Kind::kKeys;
  std::string coder;
  int sparsity = 0;
  double mean = 0, median = 0,
         p99 = 0;         ///< relative error |x - D y| / |x|, before the weights are quantized
  double mean_atoms = 0;  ///< used per vector: `sparsity`, or less with a tolerance
  std::int64_t vectors = 0;
};

/// One measurement after quantization, at a number of bits that a vector really takes.
struct Rate {
  std::string dataset;
  int layer = 0;
  Kind kind = Kind::kKeys;
  std::string coder;  ///< its line in the chart
  int bits = 0;       ///< of one vector, scales and norms included
  double mean = 0;    ///< relative error |x - x^| / |x|
  std::int64_t vectors = 0;
};

/// What a compressed cache did to the model on one data set.
struct CacheEffectRow {
  std::string dataset, coder;
  std::string split;  ///< of a sweep at a fixed budget: its line; else empty
  bool by_dictionary = true;
  double key_bits = 0, value_bits = 0;  ///< of a vector as the cache stores it, mean over layers
  int key_atoms = 0, value_atoms = 0;   ///< of each vector; 0: not one number, or none
  int recent_window = 0, sink_tokens = 0, compress_chunk = 1;
  int chunk = 0;  ///< tokens read at once
  double adaptive_threshold = 0;
  std::int64_t own_atoms = 0;        ///< that joined, in all sequences
  double bytes = 0, full_bytes = 0;  ///< of all sequences at their ends; the full cache in fp16
  std::int64_t tokens = 0;           ///< predicted
  double full_perplexity = 0, perplexity = 0;
  double mean_kl = 0, p99_kl = 0;  ///< KL(full || compressed) of the next token, nats

  double share() const { return bytes / full_bytes; }
  double perplexity_ratio() const { return perplexity / full_perplexity; }
};

struct TrainingPoint {
  std::int64_t vectors = 0;  ///< seen per dictionary so far
  double loss = 0, relative_error = 0, learning_rate = 0;
};

/// One dictionary's way through training.
struct TrainingSeries {
  int layer = 0;
  Kind kind = Kind::kKeys;
  std::vector<TrainingPoint> points;
  std::int64_t unused_atoms = -1;  ///< at the end; -1: not known
};

struct Training {
  std::string recipe;
  std::string config;  ///< resolved, as YAML
  double seconds = 0;
  std::vector<TrainingSeries> series;
};

struct EvaluationReport {
  std::string title;    ///< "Evaluation of ...", "Training of ..."
  std::string command;  ///< as it was typed
  std::string version;  ///< of the program
  std::string created;  ///< date and time, UTC
  std::string model;
  int dim = 0;
  std::string key_stage = "post_rope";
  std::vector<int> layers;
  std::vector<int> sparsities;  ///< ascending
  std::string selection = "omp";
  double relative_tolerance = 0;
  std::vector<Coder> coders;  ///< the first one is what verdict and charts are about
  std::vector<Dataset> datasets;
  std::vector<Row> rows;
  std::vector<Rate> rates;                    ///< may be empty
  std::vector<CacheEffectRow> cache_effects;  ///< may be empty
  std::vector<std::string>
      notes;  ///< warnings worth keeping: NaN vectors, a baseline that is missing and why
  std::vector<std::pair<std::string, std::string>>
      settings;  ///< anything else worth knowing, in order
  std::optional<Training> training;
};

/// Mean over layers of a coder's mean error; domain and dataset narrow it down. NaN if no row fits.
struct Query {
  std::string coder;
  int sparsity = 0;
  std::optional<Kind> kind;
  std::optional<bool> in_domain;
  std::optional<std::string> dataset;
  std::optional<int> layer;
};
double mean_error(const EvaluationReport& report, const Query& query);
/// Atoms a vector uses on average (rows as above), and the bytes that takes in the published
/// format.
double mean_bytes(const EvaluationReport& report, const Query& query);

/// How the line of a dictionary in the published format is named: the dictionary's name and this.
inline constexpr const char* kPublishedSuffix = ", fp8-int16";

/// A coder's errors against bits per vector, ascending: means over layers, in or out of domain
/// (moved data sets aside). Only bits that all layers have.
struct RatePoint {
  int bits = 0;
  double error = 0;
};
std::vector<RatePoint> rate_line(const EvaluationReport& report,
                                 const std::string& coder,
                                 Kind kind,
                                 bool in_domain);
/// The coders of `rates`, in the order of their first appearance.
std::vector<std::string> rate_coders(const EvaluationReport& report);
/// Where the lowest lines of dictionaries cross those of the other coders, one sentence per kind,
/// in domain.
std::vector<std::string> crossings(const EvaluationReport& report);

/// "window 32, sinks 4, adaptive 0.3": what stays exact.
std::string exact_part(const CacheEffectRow& row);
/// "s = 8", "s = 6 + 4", or bits where it is no number of atoms.
std::string rate_text(const CacheEffectRow& row);
/// In words: the best of a sweep at a fixed budget, and dictionaries against other coders at equal
/// bytes.
std::vector<std::string> effect_sentences(const EvaluationReport& report);

/// Out-of-domain over in-domain mean error. NaN without either.
double out_over_in(const EvaluationReport& report,
                   const std::string& coder,
                   int sparsity,
                   std::optional<Kind> kind = {},
                   std::optional<int> layer = {});
/// The first coder in that role, or nullptr.
const Coder* find_coder(const EvaluationReport& report, Coder::Role role);

/// The sparsity that verdict and tiles speak of: 8 if it was measured, else the middle one.
int headline_sparsity(const EvaluationReport& report);
/// One line that says how good the first dictionary is and what to do about it.
std::string verdict(const EvaluationReport& report);

/// Layers as rows, domains side by side, keys and values apart; ends with the verdict.
std::string console_table(const EvaluationReport& report);
std::string to_json(const EvaluationReport& report);
std::string to_csv(const EvaluationReport& report);  ///< a header line, then one line per row
std::string effects_to_csv(const EvaluationReport& report);  ///< likewise, of `cache_effects`
std::string to_html(const EvaluationReport& report);         ///< one page that loads nothing

/// Writes report.json, report.csv and report.html into `folder` (made if missing), and
/// cache_effects.csv if there are any, each by way of a temporary file.
/// @throws ResourceError naming the file that cannot be written; no part of that file is left.
void write_report(const EvaluationReport& report, const std::string& folder);

}  // namespace lexico::report
