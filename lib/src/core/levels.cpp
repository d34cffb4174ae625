// Lloyd-Max quantizers of one number.
#include "core/levels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

namespace lexico::detail {
namespace {

constexpr int kRounds = 40;        // at most
constexpr double kSettled = 1e-5;  // relative drop of the distortion that ends the rounds
constexpr int kGaussianBits = 9, kGaussianNumbers = 1 << 16;

// Sums over any range of the sorted numbers in constant time.
struct Sums {
  std::vector<double> first, second;  // of numbers and of squares, up to an index

  explicit Sums(const std::vector<float>& sorted)
      : first(sorted.size() + 1), second(sorted.size() + 1) {
    for (std::size_t i = 0; i < sorted.size(); ++i) {
      first[i + 1] = first[i] + static_cast<double>(sorted[i]);
      second[i + 1] = second[i] + static_cast<double>(sorted[i]) * static_cast<double>(sorted[i]);
    }
  }
  double mean(std::size_t begin, std::size_t end) const {
    return (first[end] - first[begin]) / static_cast<double>(end - begin);
  }
  double squares(std::size_t begin, std::size_t end) const { return second[end] - second[begin]; }
  /// Sum of squared differences from `level`.
  double error(std::size_t begin, std::size_t end, double level) const {
    return std::max(0.0,
                    squares(begin, end) - 2 * level * (first[end] - first[begin]) +
                        level * level * static_cast<double>(end - begin));
  }
};

// Where each level's numbers begin; one more for the end.
std::vector<std::size_t> cells(const std::vector<float>& sorted,
                               const std::vector<double>& levels) {
  std::vector<std::size_t> begins(levels.size() + 1, sorted.size());
  begins[0] = 0;
  auto from = sorted.begin();
  for (std::size_t k = 1; k < levels.size(); ++k) {
    const auto middle = static_cast<float>(0.5 * (levels[k - 1] + levels[k]));
    from = std::upper_bound(from, sorted.end(), middle);
    begins[k] = static_cast<std::size_t>(from - sorted.begin());
  }
  return begins;
}

double iterate(const std::vector<float>& sorted, const Sums& sums, std::vector<double>& levels) {
  double before = INFINITY;
  for (int round = 0;; ++round) {
    const std::vector<std::size_t> begins = cells(sorted, levels);
    double error = 0;
    for (std::size_t k = 0; k < levels.size(); ++k) {
      if (begins[k] == begins[k + 1]) continue;
      levels[k] = sums.mean(begins[k], begins[k + 1]);
      error += sums.error(begins[k], begins[k + 1], levels[k]);
    }
    std::sort(levels.begin(), levels.end());  // a level without numbers stays where it is
    if (round == kRounds || error >= before * (1 - kSettled))
      return error / static_cast<double>(sorted.size());
    before = error;
  }
}

}  // namespace

std::vector<Levels> lloyd_max(std::vector<float>& numbers, int max_bits) {
  std::sort(numbers.begin(), numbers.end());
  const Sums sums(numbers);
  std::vector<double> levels = {sums.mean(0, numbers.size())};
  std::vector<Levels> all;
  for (int bits = 0;; ++bits) {
    const double distortion = iterate(numbers, sums, levels);
    all.push_back({{levels.begin(), levels.end()}, distortion});
    if (bits == max_bits) return all;
    const std::vector<std::size_t> begins = cells(numbers, levels);
    std::vector<double> twice;
    for (std::size_t k = 0; k < levels.size(); ++k) {
      const auto count = static_cast<double>(begins[k + 1] - begins[k]);
      const double spread =
          count > 0 ? std::sqrt(sums.error(begins[k], begins[k + 1], levels[k]) / count) : 0.0;
      twice.push_back(levels[k] - 0.8 * spread);
      twice.push_back(levels[k] + 0.8 * spread);
    }
    levels = std::move(twice);
  }
}

int nearest_level(const float* levels, int num_levels, float value) {
  const float* const above = std::lower_bound(levels, levels + num_levels, value);
  const auto at = static_cast<int>(above - levels);
  if (at == 0) return 0;
  if (at == num_levels) return num_levels - 1;
  return value - levels[at - 1] <= levels[at] - value ? at - 1 : at;
}

namespace {

// The quantiles of a Gaussian, which stand for its density.
const std::vector<Levels>& gaussian() {
  static const std::vector<Levels> levels = [] {
    std::vector<float> numbers;
    numbers.reserve(kGaussianNumbers);
    double x = -4.5;  // Newton steps from one quantile to the next
    for (int i = 0; i < kGaussianNumbers; ++i) {
      const double want = (i + 0.5) / kGaussianNumbers;
      for (int step = 0; step < 30; ++step) {
        const double density = std::exp(-0.5 * x * x) * 0.3989422804014327;
        const double move = (want - 0.5 * std::erfc(-x * 0.7071067811865476)) / density;
        x += std::clamp(move, -0.3, 0.3);
        if (std::fabs(move) < 1e-10) break;
      }
      numbers.push_back(static_cast<float>(x));
    }
    return lloyd_max(numbers, kGaussianBits);
  }();
  return levels;
}

}  // namespace

double gaussian_distortion(int bits) {
  return gaussian()[static_cast<std::size_t>(bits)].distortion;
}
const std::vector<float>& gaussian_levels(int bits) {
  return gaussian()[static_cast<std::size_t>(bits)].values;
}

}  // namespace lexico::detail
