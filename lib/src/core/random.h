#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <numbers>
#include <utility>
#include <vector>

namespace lexico::detail {

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), keyed: Random({seed, what, when}) gives the
/// same numbers on every machine and in every order of use, so that a resumed run needs no saved
/// generator.
class Random {
 public:
  Random(std::initializer_list<std::uint64_t> keys) {
    for (std::uint64_t key : keys) state_ = mix(state_ + key + kStep);
  }
  std::uint64_t next() { return mix(state_ += kStep); }
  /// Uniform in [0, bound); the bias of the multiplication is below bound / 2^64.
  std::uint64_t below(std::uint64_t bound) {
    return static_cast<std::uint64_t>((static_cast<Wide>(next()) * bound) >> 64);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }  ///< in [0, 1)
  double normal() {  // Box-Muller, one of the pair
    return std::sqrt(-2.0 * std::log(1.0 - uniform())) *
           std::cos(2.0 * std::numbers::pi * uniform());
  }
  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (std::size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }

 private:
  __extension__ using Wide = unsigned __int128;
  static constexpr std::uint64_t kStep = 0x9e3779b97f4a7c15u;
  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::uint64_t state_ = 0;
};

}  // namespace lexico::detail
