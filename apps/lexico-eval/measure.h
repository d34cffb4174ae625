#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/report/report.h"
#include "lexico-eval/vector_source.h"
#include "lexico/dictionary.h"
#include "lexico/encoder.h"

namespace lexico::apps {

/// A dictionary set or a baseline, and how the report calls it.
struct Contender {
  report::Coder coder;
  DictionarySet set;
};

struct MeasureOptions {
  std::vector<int> layers;
  std::vector<int> sparsities;  ///< ascending
  EncodeOptions encode;
  std::int64_t max_vectors = 65536;  ///< per layer and kind of each data set; 0: all
  std::uint64_t seed = 0;
};

struct NamedSource {
  DataSpec spec;
  std::shared_ptr<VectorSource> source;
  std::int32_t position_offset = 0;  ///< its keys as if its sequences began so much later
};

/// Rows of `tokens` [count] as a source hands them over, in whatever stage a dictionary wants them.
class StagedRows {
 public:
  /// Arguments must outlive it.
  StagedRows(const NamedSource& source,
             int layer,
             Kind kind,
             const std::int64_t* tokens,
             std::int64_t count,
             const float* rows)
      : source_(source), layer_(layer), kind_(kind), tokens_(tokens), count_(count), rows_(rows) {}
  /// At the source's position offset. @throws IoError as to_stage does.
  const float* at(KeyStage stage);

 private:
  const NamedSource& source_;
  int layer_;
  Kind kind_;
  const std::int64_t* tokens_;
  std::int64_t count_;
  const float* rows_;
  std::vector<float> staged_[2];
};

/// Those of one KV head among rows [tokens * heads, dim].
std::vector<float> rows_of_head(
    const float* rows, std::int64_t tokens, int heads, int head, int dim);

/// Calls `body` with the dictionary of a layer and kind and all rows [tokens * heads, dim], or with
/// that of each KV head and its rows. @throws IoError naming the head that has none.
void for_each_dictionary(
    const DictionarySet& set,
    int layer,
    Kind kind,
    int heads,
    const float* rows,
    std::int64_t tokens,
    const std::function<void(const Dictionary&, const float*, std::int64_t)>& body);

/// The tokens of a source that are measured.
std::vector<std::int64_t> chosen_tokens(const VectorSource& source, std::int64_t max_vectors);

/// The baseline of random directions, shaped like `dictionaries`.
Contender random_contender(const DictionarySet& dictionaries, const MeasureOptions& options);

/// The baseline of plain samples, shaped like `dictionaries`: vectors of `source`, whose tokens it
/// is made of are added to `used`. @throws InvalidArgument saying what is missing if there are too
/// few.
Contender sample_contender(const DictionarySet& dictionaries,
                           NamedSource& source,
                           const MeasureOptions& options,
                           std::vector<std::int64_t>& used);

/// Measures every contender on every data set and fills `report`'s datasets, rows and notes.
/// @param samples_from  data set whose tokens `sample_tokens` made the samples: they are left out
/// when that
///                      baseline is measured on it.
/// @throws IoError if nothing in a layer is finite; Interrupted.
void measure_all(const std::vector<Contender>& contenders,
                 std::vector<NamedSource>& sources,
                 const MeasureOptions& options,
                 const std::string& samples_from,
                 const std::vector<std::int64_t>& sample_tokens,
                 report::EvaluationReport& report);

}  // namespace lexico::apps
