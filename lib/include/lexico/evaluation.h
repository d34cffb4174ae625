#pragma once

#include <cstdint>
#include <vector>

#include "lexico/dictionary.h"
#include "lexico/encoder.h"

namespace lexico {

/// How well vectors are reconstructed at one sparsity. The error of a vector is |x - D y| / (|x| +
/// 1e-8), before the weights are quantized: a ratio, 0 is perfect.
struct ErrorSummary {
  int sparsity = 0;
  double mean = 0, median = 0,
         p99 = 0;  ///< quantiles interpolate linearly, as numpy does; NaN without vectors
  double mean_atoms =
      0;  ///< atoms used per vector; below `sparsity` where a tolerance stopped early
  std::int64_t vectors = 0;  ///< that were measured: finite ones
};

/// The errors of a stream of vectors, one per vector and sparsity: 4 bytes each, so that quantiles
/// are exact.
class RelativeErrors {
 public:
  /// @throws InvalidArgument if `sparsities` is empty, not ascending, or starts below 1.
  explicit RelativeErrors(std::vector<int> sparsities);

  const std::vector<int>& sparsities() const { return sparsities_; }
  std::int64_t num_vectors() const;
  std::int64_t num_not_finite() const {
    return num_not_finite_;
  }  ///< hold a NaN or Inf: counted, not measured
  /// One summary per sparsity, in order.
  std::vector<ErrorSummary> summarize() const;

 private:
  friend class Evaluator;
  std::vector<int> sparsities_;
  std::vector<std::vector<float>> errors_;  // [sparsity][vector]
  std::vector<double> atoms_;               // [sparsity]: used by all vectors together
  std::int64_t num_not_finite_ = 0;
};

/// Measures reconstruction with one pursuit per vector, at the largest sparsity: pursuit is greedy,
/// so its first s atoms are what a pursuit of s atoms finds. One evaluator serves one caller at a
/// time.
class Evaluator {
 public:
  /// `options.max_atoms` is replaced by the largest sparsity. @throws InvalidArgument as
  /// RelativeErrors does.
  Evaluator(std::vector<int> sparsities, EncodeOptions options);

  /// Measures with this dictionary from now on, its transform included; it must outlive its use.
  /// @throws InvalidArgument if it has fewer atoms or dimensions than the largest sparsity.
  void use(const Dictionary& dictionary);
  /// Adds the errors of `vectors` [num_vectors, dim] to `errors`, whose sparsities must be this
  /// evaluator's. Vectors are as the dictionary's key stage has them; the first one belongs to KV
  /// head `first_head`, and so on in turn.
  void measure(const float* vectors,
               std::int64_t num_vectors,
               RelativeErrors& errors,
               int first_head = 0);

 private:
  void measure_batch(const float* vectors, std::int64_t count, int head, RelativeErrors& errors);

  std::vector<int> sparsities_;
  Encoder encoder_;
  SparseCodes codes_;
  const Dictionary* dictionary_ = nullptr;
  std::vector<float> frame_, back_;
  std::vector<std::int32_t> budgets_;
};

/// All of it in one call: the errors of `vectors` [num_vectors, dim] at each of `sparsities`
/// (ascending).
std::vector<ErrorSummary> evaluate(const Dictionary& dictionary,
                                   const float* vectors,
                                   std::int64_t num_vectors,
                                   const std::vector<int>& sparsities,
                                   const EncodeOptions& options = {});

/// Baseline: unit vectors of random direction (Gaussian). The same on every machine for the same
/// arguments.
Dictionary random_dictionary(int layer, Kind kind, int num_atoms, int dim, std::uint64_t seed);
/// Baseline: `vectors` [num_vectors, dim] themselves, scaled to unit norm: the first `num_atoms`
/// that are neither zero nor hold a NaN or Inf. @throws InvalidArgument naming both counts if there
/// are fewer.
Dictionary sample_dictionary(
    int layer, Kind kind, int num_atoms, int dim, const float* vectors, std::int64_t num_vectors);

/// Bytes of a vector of `atoms` (index, weight) pairs in the published format fp8-int16: its share
/// of the row pointers included.
inline double published_bytes(double atoms) { return 3 * atoms + 2; }
/// Of a vector as a cache holds it.
inline double fp16_bytes(int dim) { return 2.0 * dim; }

}  // namespace lexico
