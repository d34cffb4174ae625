#pragma once
// Random codes for the tests of kernels/sparse: of 0 to s atoms, where one may come twice.
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/sparse/sparse.h"

namespace lexico::kernels {

struct SparseCase {
  int P, N, m, s;
  std::int64_t B;
  std::vector<float> atoms, signals, weights;
  std::vector<std::int32_t> indices;

  explicit SparseCase(int dictionaries = 3,
                      std::int64_t signals_each = 41,
                      int num_atoms = 37,
                      int dim = 20,
                      int max_atoms = 5)
      : P(dictionaries), N(num_atoms), m(dim), s(max_atoms), B(signals_each) {
    std::mt19937 rng(5);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& v, std::int64_t size) {
      v.resize(static_cast<std::size_t>(size));
      for (float& x : v) x = normal(rng);
    };
    fill(atoms, std::int64_t{P} * N * m);
    fill(signals, P * B * m);
    fill(weights, P * B * s);
    indices.resize(weights.size());
    for (std::size_t row = 0; row < indices.size() / static_cast<std::size_t>(s); ++row) {
      const int count =
          static_cast<int>(rng() % static_cast<unsigned>(s + 1));  // 0..s slots in use
      for (int k = 0; k < s; ++k) {
        const std::size_t slot = row * static_cast<std::size_t>(s) + static_cast<std::size_t>(k);
        indices[slot] = k < count ? static_cast<int>(rng() % static_cast<unsigned>(N)) : -1;
        if (k >= count) weights[slot] = 0;
      }
    }
  }
  SparseProblem problem(int threads) const {
    return {P, B, N, m, s, threads, atoms.data(), indices.data(), weights.data()};
  }
  double weight(int p, std::int64_t b, int n) const {  // y_n of a signal; an atom may come twice
    double total = 0;
    for (int k = 0; k < s; ++k) {
      const auto slot = static_cast<std::size_t>((p * B + b) * s + k);
      if (indices[slot] == n) total += static_cast<double>(weights[slot]);
    }
    return total;
  }
};

}  // namespace lexico::kernels
