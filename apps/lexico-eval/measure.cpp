#include "lexico-eval/measure.h"

#include <algorithm>
#include <map>
#include <utility>

#include "common/program.h"
#include "common/report/text.h"
#include "lexico/error.h"
#include "lexico/evaluation.h"

namespace lexico::apps {
namespace {

constexpr std::int64_t kVectorsBetweenStops = 2048;  // Ctrl-C is heard this often

using report::Coder;
using Place = std::pair<int, Kind>;

std::string name_of_place(int layer, Kind kind) {
  return "layer " + std::to_string(layer) + " " + name_of(kind);
}

DictionarySet like(const DictionarySet& dictionaries) {
  DictionarySet set;
  set.key_stage = dictionaries.key_stage;
  return set;
}

int most_atoms(const DictionarySet& dictionaries) {
  int most = 0;
  for (const Dictionary& dictionary : dictionaries.dictionaries)
    most = std::max(most, dictionary.num_atoms);
  return most;
}

bool wanted(const MeasureOptions& options, int layer) {
  return std::find(options.layers.begin(), options.layers.end(), layer) != options.layers.end();
}

/// The rows of those tokens that are not in `skip`, packed.
std::int64_t without(const std::vector<std::int64_t>& skip,
                     const std::int64_t* tokens,
                     std::int64_t count,
                     std::int64_t token_floats,
                     const float* rows,
                     std::vector<float>& packed) {
  packed.clear();
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (std::binary_search(skip.begin(), skip.end(), tokens[i])) continue;
    packed.insert(packed.end(), rows + i * token_floats, rows + (i + 1) * token_floats);
    ++kept;
  }
  return kept;
}

/// One data set under way.
class DatasetRun {
 public:
  DatasetRun(const std::vector<Contender>& contenders,
             const MeasureOptions& options,
             const std::vector<std::int64_t>& skipped_by_samples,
             NamedSource& source,
             Progress& progress,
             double& done)
      : contenders_(contenders),
        options_(options),
        skipped_by_samples_(skipped_by_samples),
        source_(source),
        evaluator_(options.sparsities, options.encode),
        progress_(progress),
        done_(done) {}

  void run(report::EvaluationReport& report) {
    VectorSource& source = *source_.source;
    const std::vector<std::int64_t> tokens = chosen_tokens(source, options_.max_vectors);
    report::Dataset dataset;
    dataset.name = source_.spec.name;
    dataset.path = source_.spec.path;
    dataset.in_domain = source_.spec.in_domain;
    dataset.position_offset = source_.position_offset;
    dataset.tokens = source.info().num_tokens;
    dataset.vectors = static_cast<std::int64_t>(tokens.size()) * source.info().kv_heads;
    dataset.sampling = source.sampling(tokens);
    std::string bad_places;
    for (const std::vector<int>& group : source.groups(options_.layers)) {
      errors_.clear();
      source.read(tokens, group, [this](auto&&... piece) { take(piece...); });
      for (const int layer : group)
        for (const Kind kind : kBothKinds) {
          dataset.not_finite += not_finite(layer, kind, bad_places);
          add_rows(layer, kind, report);
        }
    }
    if (dataset.not_finite > 0)
      report.notes.push_back(dataset.name + ": " + report::grouped(dataset.not_finite) +
                             " vectors hold NaN or Inf and are left out of its errors (" +
                             bad_places + ").");
    report.datasets.push_back(dataset);
  }

 private:
  void take(
      int layer, Kind kind, const std::int64_t* tokens, std::int64_t count, const float* rows) {
    if (kind == Kind::kValues && source_.position_offset != 0) return;  // they do not move
    const int heads = source_.source->info().kv_heads;
    const std::int64_t dim = source_.source->info().head_dim;
    StagedRows staged(source_, layer, kind, tokens, count, rows);
    for (std::size_t c = 0; c < contenders_.size(); ++c) {
      const DictionarySet& set = contenders_[c].set;
      if (!set.find(layer, kind) && !set.find(layer, kind, 0)) continue;
      std::int64_t measured = count;
      const float* from = staged.at(set.key_stage);
      if (contenders_[c].coder.role == Coder::Role::kSamples && !skipped_by_samples_.empty()) {
        measured = without(skipped_by_samples_, tokens, count, heads * dim, from, packed_);
        from = packed_.data();
      }
      auto& errors = errors_.try_emplace({{layer, kind}, c}, options_.sparsities).first->second;
      for_each_dictionary(
          set,
          layer,
          kind,
          heads,
          from,
          measured,
          [&](const Dictionary& dictionary, const float* its_rows, std::int64_t its_count) {
            measure(dictionary, its_rows, its_count, errors);
          });
    }
  }

  void measure(const Dictionary& dictionary,
               const float* rows,
               std::int64_t count,
               RelativeErrors& errors) {
    evaluator_.use(dictionary);
    const int heads = dictionary.transform.heads;
    for (std::int64_t first = 0; first < count; first += kVectorsBetweenStops) {
      if (stop_requested()) throw Interrupted("stopped; nothing was written");
      const std::int64_t part = std::min(kVectorsBetweenStops, count - first);
      evaluator_.measure(
          rows + first * dictionary.dim, part, errors, static_cast<int>(first % heads));
      progress_.update(done_ += static_cast<double>(part),
                       source_.spec.name + ", " + name_of_place(dictionary.layer, dictionary.kind));
    }
  }

  /// How many there were, as the first contender met them.
  std::int64_t not_finite(int layer, Kind kind, std::string& places) const {
    for (std::size_t c = 0; c < contenders_.size(); ++c) {
      const auto errors = errors_.find({{layer, kind}, c});
      if (errors == errors_.end() || contenders_[c].coder.role == Coder::Role::kSamples) continue;
      const std::int64_t count = errors->second.num_not_finite();
      if (count > 0 && errors->second.num_vectors() == 0)
        throw IoError(source_.spec.path + ": all " + report::grouped(count) + " vectors of " +
                      name_of_place(layer, kind) + " hold NaN or Inf");
      if (count > 0)
        places += (places.empty() ? "" : ", ") + name_of_place(layer, kind) + ": " +
                  report::grouped(count);
      return count;
    }
    return 0;
  }

  void add_rows(int layer, Kind kind, report::EvaluationReport& report) const {
    for (std::size_t c = 0; c < contenders_.size(); ++c) {
      const auto errors = errors_.find({{layer, kind}, c});
      if (errors == errors_.end()) continue;
      for (const ErrorSummary& error : errors->second.summarize())
        report.rows.push_back({source_.spec.name,
                               layer,
                               kind,
                               contenders_[c].coder.name,
                               error.sparsity,
                               error.mean,
                               error.median,
                               error.p99,
                               error.mean_atoms,
                               error.vectors});
    }
  }

  const std::vector<Contender>& contenders_;
  const MeasureOptions& options_;
  const std::vector<std::int64_t>& skipped_by_samples_;
  NamedSource& source_;
  Evaluator evaluator_;
  Progress& progress_;
  double& done_;
  std::map<std::pair<Place, std::size_t>, RelativeErrors> errors_;  // of the group at hand
  std::vector<float> packed_;
};

}  // namespace

const float* StagedRows::at(KeyStage stage) {
  if (kind_ == Kind::kValues ||
      (source_.source->info().key_stage == stage && source_.position_offset == 0))
    return rows_;
  std::vector<float>& staged = staged_[stage == KeyStage::kPreRope];
  if (staged.empty()) {
    const VectorSource::Info& info = source_.source->info();
    staged.assign(rows_, rows_ + count_ * info.kv_heads * info.head_dim);
    to_stage(*source_.source, layer_, tokens_, count_, stage, source_.position_offset, staged);
  }
  return staged.data();
}

std::vector<float> rows_of_head(
    const float* rows, std::int64_t tokens, int heads, int head, int dim) {
  std::vector<float> out;
  for (std::int64_t token = 0; token < tokens; ++token) {
    const float* row = rows + (token * heads + head) * dim;
    out.insert(out.end(), row, row + dim);
  }
  return out;
}

void for_each_dictionary(
    const DictionarySet& set,
    int layer,
    Kind kind,
    int heads,
    const float* rows,
    std::int64_t tokens,
    const std::function<void(const Dictionary&, const float*, std::int64_t)>& body) {
  if (const Dictionary* all = set.find(layer, kind)) return body(*all, rows, tokens * heads);
  for (int head = 0; head < heads; ++head) {
    const Dictionary* dictionary = set.find(layer, kind, head);
    if (!dictionary)
      throw IoError("layer " + std::to_string(layer) + " " + name_of(kind) +
                    ": there is no dictionary for KV head " + std::to_string(head) + " of " +
                    std::to_string(heads));
    body(*dictionary, rows_of_head(rows, tokens, heads, head, dictionary->dim).data(), tokens);
  }
}

std::vector<std::int64_t> chosen_tokens(const VectorSource& source, std::int64_t max_vectors) {
  const std::int64_t heads = source.info().kv_heads;
  return source.choose(max_vectors == 0 ? source.info().num_tokens
                                        : std::max<std::int64_t>(1, max_vectors / heads));
}

Contender random_contender(const DictionarySet& dictionaries, const MeasureOptions& options) {
  Contender contender{{"random", Coder::Role::kRandom, most_atoms(dictionaries), "", {}},
                      like(dictionaries)};
  for (const Dictionary& d : dictionaries.dictionaries)
    if (wanted(options, d.layer))
      contender.set.dictionaries.push_back(
          random_dictionary(d.layer, d.kind, d.num_atoms, d.dim, options.seed));
  return contender;
}

Contender sample_contender(const DictionarySet& dictionaries,
                           NamedSource& source,
                           const MeasureOptions& options,
                           std::vector<std::int64_t>& used) {
  const VectorSource::Info& info = source.source->info();
  const int num_atoms = most_atoms(dictionaries);
  const std::int64_t num_rows = info.num_tokens * info.kv_heads;
  if (num_rows < 2 * static_cast<std::int64_t>(num_atoms))
    throw InvalidArgument(source.spec.name + " has " + report::grouped(num_rows) +
                          " vectors a layer, want at least twice the " +
                          report::grouped(num_atoms) + " atoms");
  // A tenth more than needed: zero vectors and those with NaN or Inf cannot be atoms.
  const std::int64_t tokens = (num_atoms + info.kv_heads - 1) / info.kv_heads;
  used = source.source->choose_widely(std::min(info.num_tokens / 2 + 1, tokens + tokens / 10 + 1));

  std::map<Place, std::vector<float>> samples;
  source.source->read(
      used,
      options.layers,
      [&](int layer,
          Kind kind,
          const std::int64_t* tokens_read,
          std::int64_t count,
          const float* rows) {
        const float* vectors =
            StagedRows(source, layer, kind, tokens_read, count, rows).at(dictionaries.key_stage);
        std::vector<float>& all = samples[{layer, kind}];
        all.insert(all.end(), vectors, vectors + count * info.kv_heads * info.head_dim);
      });
  Contender contender{{"samples", Coder::Role::kSamples, num_atoms, "", {}}, like(dictionaries)};
  for (const Dictionary& d : dictionaries.dictionaries) {
    if (!wanted(options, d.layer)) continue;
    const std::vector<float>& vectors = samples[{d.layer, d.kind}];
    contender.set.dictionaries.push_back(
        sample_dictionary(d.layer,
                          d.kind,
                          d.num_atoms,
                          d.dim,
                          vectors.data(),
                          static_cast<std::int64_t>(vectors.size()) / info.head_dim));
  }
  return contender;
}

void measure_all(const std::vector<Contender>& contenders,
                 std::vector<NamedSource>& sources,
                 const MeasureOptions& options,
                 const std::string& samples_from,
                 const std::vector<std::int64_t>& sample_tokens,
                 report::EvaluationReport& report) {
  double total = 0, done = 0;
  for (const NamedSource& source : sources)
    for (const Contender& contender : contenders)
      total += static_cast<double>(chosen_tokens(*source.source, options.max_vectors).size()) *
               source.source->info().kv_heads *
               static_cast<double>(contender.set.dictionaries.size());
  Progress progress("evaluating", total, "vectors");
  static const std::vector<std::int64_t> kNone;
  for (NamedSource& source : sources) {
    const auto& skip = source.spec.name == samples_from ? sample_tokens : kNone;
    DatasetRun(contenders, options, skip, source, progress, done).run(report);
  }
}

}  // namespace lexico::apps
