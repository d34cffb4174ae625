#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lexico::apps {

/// Atoms and signals to measure on.
struct BenchCase {
  std::string name;
  int num_atoms = 0, dim = 0;
  std::int64_t num_signals = 0;
  const float* atoms = nullptr;    ///< [num_atoms, dim], unit rows; lies in the case
  const float* signals = nullptr;  ///< [num_signals, dim]; lies in the case
  std::size_t input_bytes = 0;     ///< of what the two lie in

  std::string file;  ///< as read
  std::vector<float> owned_atoms, owned_signals;
};

/// Reads a .safetensors file with `atoms` [N, m] and `signals` [B, m], float32 (used where they
/// lie), float16 or bfloat16. The first `max_signals` signals count; 0: all.
/// @throws IoError naming the file and what does not fit: a tensor, its shape, an atom that is not
/// of unit norm.
BenchCase read_case(const std::string& path, std::int64_t max_signals);

/// Random unit atoms; signals are sums of 8 of them plus 10 % noise.
BenchCase random_case(int num_atoms, int dim, std::int64_t num_signals, std::uint64_t seed);

}  // namespace lexico::apps
