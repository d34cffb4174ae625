// The affine frame per KV head.
#include "lexico/transform.h"

#include <Eigen/Dense>
#include <cmath>

#include "check.h"

namespace lexico {
namespace {

using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Strided = Eigen::Map<RowMatrix, 0, Eigen::OuterStride<>>;
using ConstMatrix = Eigen::Map<const RowMatrix>;

constexpr std::int64_t kPiece = 4096;  // rows multiplied at once

}  // namespace

void Transform::forward(float* vectors, std::int64_t rows, int dim, int first_head) const {
  if (is_identity()) return;
  for (int offset = 0; offset < heads && offset < rows; ++offset) {
    const int head = (first_head + offset) % heads;
    const float* middle = mean.empty() ? nullptr : mean.data() + std::ptrdiff_t{head} * dim;
    const std::int64_t count = (rows - offset + heads - 1) / heads;
    for (std::int64_t first = 0; first < count; first += kPiece) {
      const std::int64_t n = std::min(kPiece, count - first);
      Strided x(vectors + (offset + first * heads) * dim,
                n,
                dim,
                Eigen::OuterStride<>(std::ptrdiff_t{heads} * dim));
      if (middle != nullptr) x.rowwise() -= Eigen::Map<const Eigen::RowVectorXf>(middle, dim);
      if (!map.empty())
        x = (x * ConstMatrix(map.data() + std::ptrdiff_t{head} * dim * dim, dim, dim).transpose())
                .eval();
    }
  }
}

void Transform::backward(float* vectors, std::int64_t rows, int dim, int first_head) const {
  if (is_identity()) return;
  for (int offset = 0; offset < heads && offset < rows; ++offset) {
    const int head = (first_head + offset) % heads;
    const float* middle = mean.empty() ? nullptr : mean.data() + std::ptrdiff_t{head} * dim;
    const std::int64_t count = (rows - offset + heads - 1) / heads;
    for (std::int64_t first = 0; first < count; first += kPiece) {
      const std::int64_t n = std::min(kPiece, count - first);
      Strided z(vectors + (offset + first * heads) * dim,
                n,
                dim,
                Eigen::OuterStride<>(std::ptrdiff_t{heads} * dim));
      if (!back_map.empty())
        z = (z *
             ConstMatrix(back_map.data() + std::ptrdiff_t{head} * dim * dim, dim, dim).transpose())
                .eval();
      if (middle != nullptr) z.rowwise() += Eigen::Map<const Eigen::RowVectorXf>(middle, dim);
    }
  }
}

std::vector<float> head_means(const float* vectors, std::int64_t rows, int dim, int heads) {
  std::vector<float> means;
  for (int head = 0; head < heads; ++head) {
    Eigen::VectorXd sum = Eigen::VectorXd::Zero(dim);
    double count = 0;
    for (std::int64_t row = head; row < rows; row += heads) {
      const Eigen::VectorXd x =
          Eigen::Map<const Eigen::VectorXf>(vectors + row * dim, dim).cast<double>();
      if (!x.allFinite()) continue;
      sum += x;
      ++count;
    }
    for (int d = 0; d < dim; ++d)
      means.push_back(static_cast<float>(count > 0 ? sum[d] / count : 0.0));
  }
  return means;
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
