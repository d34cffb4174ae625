#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace lexico::detail {

/// The weights of one vector's atoms, fixed one after another: after each, the least-squares
/// solution of those that are still free. With positions in reverse, G = L L^T is the Gram matrix
/// of the atoms, and |z - D w|^2 = |L^T (w - w*)|^2 + const lets each free weight be read off the
/// deviations of the fixed ones.
class WeightSolver {
 public:
  /// @param gram   of the first `count` atoms, [count, count] with rows `stride` apart
  /// @param inner  their inner products with the vector
  void start(const double* gram, std::ptrdiff_t stride, const double* inner, int count) {
    n_ = count;
    lower_.resize(static_cast<std::size_t>(count * count));
    weights_.resize(static_cast<std::size_t>(count));
    deviations_.resize(static_cast<std::size_t>(count));
    for (int i = 0; i < n_; ++i) {  // row i is position n - 1 - i
      for (int j = 0; j <= i; ++j) {
        double sum = gram[(n_ - 1 - i) * stride + (n_ - 1 - j)];
        for (int k = 0; k < j; ++k) sum -= at(i, k) * at(j, k);
        // A dependent atom (pursuit takes none) would get a weight of 0.
        if (i == j)
          at(i, i) = sum > 1e-10 ? std::sqrt(sum) : INFINITY;
        else
          at(i, j) = sum / at(j, j);
      }
    }
    for (int i = 0; i < n_; ++i) {
      double sum = inner[n_ - 1 - i];
      for (int k = 0; k < i; ++k) sum -= at(i, k) * weight(k);
      weight(i) = sum / at(i, i);
    }
    for (int i = n_ - 1; i >= 0; --i) {
      double sum = weight(i);
      for (int k = i + 1; k < n_; ++k) sum -= at(k, i) * weight(k);
      weight(i) = sum / at(i, i);
    }
  }
  /// Of `position`, after those before it were fixed.
  double best(int position) const {
    const int i = n_ - 1 - position;
    double shift = 0;
    for (int j = i + 1; j < n_; ++j) shift += at(j, i) * deviations_[static_cast<std::size_t>(j)];
    return weights_[static_cast<std::size_t>(i)] - shift / at(i, i);
  }
  void fix(int position, double value) {
    const auto i = static_cast<std::size_t>(n_ - 1 - position);
    deviations_[i] = value - weights_[i];
  }

 private:
  double& at(int i, int j) { return lower_[static_cast<std::size_t>(i * n_ + j)]; }
  double at(int i, int j) const { return lower_[static_cast<std::size_t>(i * n_ + j)]; }
  double& weight(int i) { return weights_[static_cast<std::size_t>(i)]; }

  int n_ = 0;
  std::vector<double> lower_, weights_, deviations_;  // of reversed positions
};

/// Gram matrix [count, count] of the atoms and their inner products with `vector`, in double.
inline void gram_of(const float* atoms,
                    int dim,
                    const int* indices,
                    int count,
                    const float* vector,
                    std::ptrdiff_t stride,
                    double* gram,
                    double* inner) {
  for (int i = 0; i < count; ++i) {
    const float* a = atoms + static_cast<std::ptrdiff_t>(indices[i]) * dim;
    double with_vector = 0;
    for (int d = 0; d < dim; ++d)
      with_vector += static_cast<double>(a[d]) * static_cast<double>(vector[d]);
    inner[i] = with_vector;
    for (int j = 0; j <= i; ++j) {
      const float* b = atoms + static_cast<std::ptrdiff_t>(indices[j]) * dim;
      double sum = 0;
      for (int d = 0; d < dim; ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
      gram[i * stride + j] = gram[j * stride + i] = sum;
    }
  }
}

}  // namespace lexico::detail
