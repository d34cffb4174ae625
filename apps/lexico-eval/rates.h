#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/report/report.h"
#include "lexico-eval/measure.h"
#include "lexico/vector_coder.h"

namespace lexico::apps {

struct RateOptions {
  std::vector<double>
      bits_per_number;               ///< where coders that can be fitted to any rate are measured
  std::int64_t fit_vectors = 32768;  ///< per layer and kind that they are fitted on
  bool baselines = true;
  std::int64_t autoencoder_vectors =
      -1;  ///< that a sparse autoencoder learns from; 0: its own default; -1: there is none
};

/// One coder of one layer and kind, ready to be measured.
struct RateCoder {
  std::string name;  ///< as the report names it; the same for all rates, layers and kinds
  int layer = 0;
  Kind kind = Kind::kKeys;
  KeyStage key_stage = KeyStage::kPostRope;
  int head = Dictionary::kAllHeads;  ///< the rows it is given: of one KV head, or all
  std::shared_ptr<VectorCoder> coder;
  /// Of a dictionary: the contender's, the format that is used with it, and where that is from:
  /// "file", "fp8-int16" or "fitted".
  const Dictionary* dictionary = nullptr;
  std::shared_ptr<const CodeFormat> format = nullptr;
  std::string coding = {};
};

/// How the lines of fitted codes are named: the dictionary's name and this.
inline constexpr const char* kFittedSuffix = ", fitted";

/// The coders that errors are compared at equal bits of, after quantization:
///   each dictionary in its own format, and in the published one (fp8-int16) at each sparsity;
///   min/max and rotation + Lloyd-Max, which need no fitting;
///   with `fit`: each dictionary in the best packed format for each rate, PCA transform coding, and
///   if asked for a top-k sparse autoencoder with as many latents as the first dictionary has
///   atoms, coded like the published format.
/// @param fit  vectors to fit on, or null: nothing is fitted. @throws Interrupted.
std::vector<RateCoder> make_rate_coders(const std::vector<Contender>& contenders,
                                        NamedSource* fit,
                                        int dim,
                                        const MeasureOptions& options,
                                        const RateOptions& rates);

/// Measures them all on every data set and fills `report`'s rates. @throws Interrupted.
void measure_rates(const std::vector<RateCoder>& coders,
                   std::vector<NamedSource>& sources,
                   const MeasureOptions& options,
                   report::EvaluationReport& report);

}  // namespace lexico::apps
