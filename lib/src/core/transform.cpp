// The affine frame per KV head.
#include "lexico/transform.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "check.h"

namespace lexico {
namespace {

using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Strided = Eigen::Map<RowMatrix, 0, Eigen::OuterStride<>>;
using ConstMatrix = Eigen::Map<const RowMatrix>;

constexpr std::int64_t kPiece = 4096;  // rows multiplied at once

/// Calls `change(rows, head)` with the rows of one head at a time, a piece at a time, as a matrix
/// in place.
template <typename Change>
void for_each_head(
    float* vectors, std::int64_t rows, int dim, int heads, int first_head, const Change& change) {
  for (int offset = 0; offset < heads && offset < rows; ++offset) {
    const std::int64_t count = (rows - offset + heads - 1) / heads;
    for (std::int64_t first = 0; first < count; first += kPiece) {
      Strided piece(vectors + (offset + first * heads) * dim,
                    std::min(kPiece, count - first),
                    dim,
                    Eigen::OuterStride<>(std::ptrdiff_t{heads} * dim));
      change(piece, (first_head + offset) % heads);
    }
  }
}

/// The mean of one head, or its map, out of those of all.
Eigen::Map<const Eigen::RowVectorXf> mean_of(const std::vector<float>& all, int head, int dim) {
  return {all.data() + std::ptrdiff_t{head} * dim, dim};
}
ConstMatrix map_of(const std::vector<float>& all, int head, int dim) {
  return {all.data() + std::ptrdiff_t{head} * dim * dim, dim, dim};
}

}  // namespace

void Transform::forward(float* vectors, std::int64_t rows, int dim, int first_head) const {
  if (is_identity()) return;
  for_each_head(vectors, rows, dim, heads, first_head, [&](Strided& x, int head) {
    if (!mean.empty()) x.rowwise() -= mean_of(mean, head, dim);
    if (!map.empty()) x = (x * map_of(map, head, dim).transpose()).eval();
  });
}

void Transform::backward(float* vectors, std::int64_t rows, int dim, int first_head) const {
  if (is_identity()) return;
  for_each_head(vectors, rows, dim, heads, first_head, [&](Strided& z, int head) {
    if (!back_map.empty()) z = (z * map_of(back_map, head, dim).transpose()).eval();
    if (!mean.empty()) z.rowwise() += mean_of(mean, head, dim);
  });
}

HeadMeans::HeadMeans(int dim, int heads)
    : dim_(static_cast<std::size_t>(dim)),
      sums_(dim_ * static_cast<std::size_t>(heads)),
      counts_(static_cast<std::size_t>(heads)) {}

void HeadMeans::add(const float* vectors, std::int64_t rows) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* x = vectors + row * static_cast<std::int64_t>(dim_);
    if (!std::all_of(x, x + dim_, [](float value) { return std::isfinite(value); })) continue;
    const std::size_t head = static_cast<std::size_t>(row) % counts_.size();
    for (std::size_t d = 0; d < dim_; ++d) sums_[head * dim_ + d] += static_cast<double>(x[d]);
    ++counts_[head];
  }
}

std::vector<float> HeadMeans::means() const {
  std::vector<float> means;
  for (std::size_t i = 0; i < sums_.size(); ++i) {
    const auto count = static_cast<double>(counts_[i / dim_]);
    means.push_back(static_cast<float>(count > 0 ? sums_[i] / count : 0.0));
  }
  return means;
}

std::vector<float> head_means(const float* vectors, std::int64_t rows, int dim, int heads) {
  HeadMeans sums(dim, heads);
  sums.add(vectors, rows);
  return sums.means();
}

void set_metric(
    Transform& transform, const std::vector<float>& metric, int heads, int dim, double share) {
  const std::size_t square = static_cast<std::size_t>(dim) * static_cast<std::size_t>(dim);
  if (metric.size() != static_cast<std::size_t>(heads) * square)
    detail::throw_invalid(
        "metric holds ", metric.size(), " numbers, must be ", heads, " x ", dim, " x ", dim);
  if (!(share > 0)) detail::throw_invalid("metric: share is ", share, ", must be > 0");
  std::vector<float> map(metric.size()), back(metric.size());
  for (int head = 0; head < heads; ++head) {
    const std::size_t at = static_cast<std::size_t>(head) * square;
    Eigen::MatrixXd c = ConstMatrix(metric.data() + at, dim, dim).cast<double>();
    const double trace = c.trace();
    if (!c.allFinite() || !(trace > 0))
      detail::throw_invalid(
          "metric of head ", head, " has trace ", trace, ", must be finite and positive");
    c = 0.5 * (c + c.transpose()).eval() * (dim / trace);
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solved(c);
    const Eigen::VectorXd roots = (solved.eigenvalues().cwiseMax(0.0).array() + share).sqrt();
    const Eigen::MatrixXd& axes = solved.eigenvectors();
    Eigen::Map<RowMatrix>(map.data() + at, dim, dim) =
        (axes * roots.asDiagonal() * axes.transpose()).cast<float>();
    Eigen::Map<RowMatrix>(back.data() + at, dim, dim) =
        (axes * roots.cwiseInverse().asDiagonal() * axes.transpose()).cast<float>();
  }
  transform.heads = heads;
  transform.map = std::move(map);
  transform.back_map = std::move(back);
}

}  // namespace lexico
