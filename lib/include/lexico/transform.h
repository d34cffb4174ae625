#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lexico {

/// The frame that atoms and codes live in. A vector x of KV head h, as the dictionary's key stage
/// has it, becomes
///   z = W_h (x - mean_h),
/// and comes back as x = mean_h + W_h^-1 z. Rows go with tokens: row r of a batch belongs to KV
/// head r % heads.
struct Transform {
  int heads = 1;                ///< KV heads that are told apart by `mean` and `map`
  std::vector<float> mean;      ///< empty (zero), or [heads, dim]
  std::vector<float> map;       ///< empty (identity), or W: [heads, dim, dim]
  std::vector<float> back_map;  ///< W^-1, likewise; empty exactly if `map` is
  bool unit_scale = false;      ///< vectors count for learning by direction alone: z / |z|

  bool is_identity() const { return mean.empty() && map.empty(); }

  /// In place on `rows` vectors of `dim`, the first of which belongs to head `first_head`. NaN
  /// stays NaN.
  void forward(float* vectors, std::int64_t rows, int dim, int first_head = 0) const;
  void backward(float* vectors, std::int64_t rows, int dim, int first_head = 0) const;
};

/// The mean of each head over the finite ones of all vectors added; computed in double. Heads
/// without a finite vector get zero.
class HeadMeans {
 public:
  HeadMeans(int dim, int heads);
  /// [rows, dim], row r of head r % heads.
  void add(const float* vectors, std::int64_t rows);
  std::vector<float> means() const;  ///< [heads, dim]

 private:
  std::size_t dim_;
  std::vector<double> sums_;
  std::vector<std::int64_t> counts_;
};
/// The same over one array.
std::vector<float> head_means(const float* vectors, std::int64_t rows, int dim, int heads);

/// W = (C_h / tr(C_h) * dim + share * I)^(1/2) and its inverse, for a metric C_h (symmetric, at
/// least semidefinite) of each head: errors in z count as they do in the metric. For keys, C is the
/// attention-weighted second moment of the queries before RoPE.
/// @param metric  [heads, dim, dim]
/// @param share   > 0: of the mean eigenvalue, added to all.
/// @throws InvalidArgument if a metric holds a NaN or Inf, or its trace is not positive.
void set_metric(
    Transform& transform, const std::vector<float>& metric, int heads, int dim, double share);

}  // namespace lexico
