// Coders to compare at equal bytes.
#include "lexico/vector_coder.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "check.h"
#include "core/half.h"
#include "core/levels.h"
#include "core/random.h"

namespace lexico {
namespace {

using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Vectors = Eigen::Map<const RowMatrix>;

constexpr int kHalfBits = 16;

float through_half(float value) {
  return detail::float_from_half(detail::half_from_float(std::clamp(value, -65504.0f, 65504.0f)));
}

// A dictionary's frame, its codec, and back.
class DictionaryCoder : public VectorCoder {
 public:
  DictionaryCoder(Dictionary dictionary, const EncodeOptions& options, std::string name)
      : dictionary_(std::move(dictionary)), name_(std::move(name)), codec_(dictionary_, options) {}
  std::string name() const override { return name_; }
  int bits_per_vector() const override { return codec_.bits_per_vector(); }
  void reconstruct(const float* vectors, std::int64_t rows, float* out) override {
    if (out != vectors) std::copy_n(vectors, rows * dictionary_.dim, out);
    dictionary_.transform.forward(out, rows, dictionary_.dim);
    codec_.reconstruct(out, rows, out);
    dictionary_.transform.backward(out, rows, dictionary_.dim);
  }

 private:
  const Dictionary dictionary_;
  const std::string name_;
  Codec codec_;
};

class RotationCoder : public VectorCoder {
 public:
  RotationCoder(int dim, int bits, std::uint64_t seed) : dim_(dim), bits_(bits) {
    const int left = bits - kHalfBits;
    if (dim < 1 || left < (dim + 3) / 4 || left > 8 * dim)
      detail::throw_invalid("rotation: ",
                            bits,
                            " bits a vector, must be in [",
                            kHalfBits + (dim + 3) / 4,
                            ", ",
                            kHalfBits + 8 * dim,
                            "]");
    Eigen::MatrixXd random(dim, dim);
    detail::Random numbers{seed, static_cast<std::uint64_t>(dim)};
    for (double& value : random.reshaped()) value = numbers.normal();
    const Eigen::HouseholderQR<Eigen::MatrixXd> qr(random);
    rotation_ = Eigen::MatrixXd(qr.householderQ()).cast<float>();
    for (int c = 0; c < dim; ++c) {
      const int own = left / dim + (c < left % dim ? 1 : 0);
      levels_.push_back(&detail::gaussian_levels(own));
    }
  }
  std::string name() const override { return "rotation"; }
  int bits_per_vector() const override { return bits_; }
  void reconstruct(const float* vectors, std::int64_t rows, float* out) override {
    const float root = std::sqrt(static_cast<float>(dim_));
    for (std::int64_t r = 0; r < rows; ++r) {
      const Eigen::RowVectorXf x = Vectors(vectors + r * dim_, 1, dim_);
      const float norm = through_half(x.norm());
      Eigen::RowVectorXf y = x * rotation_;
      if (y.norm() > 0) y *= root / y.norm();
      for (int c = 0; c < dim_; ++c) {
        const std::vector<float>& levels = *levels_[static_cast<std::size_t>(c)];
        y[c] = levels[static_cast<std::size_t>(
            detail::nearest_level(levels.data(), static_cast<int>(levels.size()), y[c]))];
      }
      Eigen::Map<Eigen::RowVectorXf>(out + r * dim_, dim_) =
          (norm / root) * (y * rotation_.transpose());
    }
  }

 private:
  const int dim_, bits_;
  RowMatrix rotation_;
  std::vector<const std::vector<float>*> levels_;  // of each component
};

class MinMaxCoder : public VectorCoder {
 public:
  MinMaxCoder(int dim, int bits_per_number) : dim_(dim), bits_(bits_per_number) {
    if (bits_ < 1 || bits_ > 8)
      detail::throw_invalid("min-max: bits_per_number is ", bits_, ", must be in [1, 8]");
  }
  std::string name() const override { return "min-max int" + std::to_string(bits_); }
  int bits_per_vector() const override { return 2 * kHalfBits + dim_ * bits_; }
  void reconstruct(const float* vectors, std::int64_t rows, float* out) override {
    const float top = static_cast<float>((1 << bits_) - 1);
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* x = vectors + r * dim_;
      const auto [low, high] = std::minmax_element(x, x + dim_);
      const float zero = through_half(*low), step = through_half((*high - *low) / top);
      for (int c = 0; c < dim_; ++c) {
        const float at = step > 0 ? std::round((x[c] - zero) / step) : 0.0f;
        out[r * dim_ + c] = zero + step * std::clamp(at, 0.0f, top);
      }
    }
  }

 private:
  const int dim_, bits_;
};

}  // namespace

std::unique_ptr<VectorCoder> pca_coder(const float* vectors,
                                       std::int64_t rows,
                                       int dim,
                                       int heads,
                                       int bits,
                                       int states,
                                       int threads) {
  Dictionary none;  // a single atom that no vector takes
  none.num_atoms = 1;
  none.dim = dim;
  none.atoms.assign(static_cast<std::size_t>(dim), 0.0f);
  none.atoms[0] = 1.0f;
  CodeFitOptions options;
  options.max_atoms = 0;
  options.scale_bits = 0;
  options.residual_bits = bits;
  options.states = states;
  options.threads = threads;
  none.format = fit_codes(none, vectors, rows, heads, options);
  EncodeOptions encode;
  encode.threads = threads;
  return std::make_unique<DictionaryCoder>(
      std::move(none), encode, states > 0 ? "pca + trellis" : "pca");
}

std::unique_ptr<VectorCoder> rotation_coder(int dim, int bits, std::uint64_t seed) {
  return std::make_unique<RotationCoder>(dim, bits, seed);
}

std::unique_ptr<VectorCoder> min_max_coder(int dim, int bits_per_number) {
  return std::make_unique<MinMaxCoder>(dim, bits_per_number);
}

std::unique_ptr<VectorCoder> dictionary_coder(const Dictionary& dictionary,
                                              const EncodeOptions& options) {
  return std::make_unique<DictionaryCoder>(dictionary, options, dictionary.format.name());
}

double coder_error(VectorCoder& coder, const float* vectors, std::int64_t rows, int dim) {
  double sum = 0;
  std::int64_t measured = 0;
  std::vector<float> back(static_cast<std::size_t>(rows * dim));
  coder.reconstruct(vectors, rows, back.data());
  for (std::int64_t r = 0; r < rows; ++r) {
    const Eigen::VectorXd x =
        Eigen::Map<const Eigen::VectorXf>(vectors + r * dim, dim).cast<double>();
    if (!x.allFinite() || x.squaredNorm() == 0) continue;
    const Eigen::VectorXd y =
        Eigen::Map<const Eigen::VectorXf>(back.data() + r * dim, dim).cast<double>();
    sum += (x - y).norm() / x.norm();
    ++measured;
  }
  return measured > 0 ? sum / static_cast<double>(measured) : NAN;
}

}  // namespace lexico
