// Cases to measure on: read from a file, or random.
#include "lexico-bench/bench_case.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "core/safetensors.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

using detail::SafeTensor;
using detail::SafeTensors;

const SafeTensor& matrix(const std::string& path, const SafeTensors& file, const char* name) {
  const auto found = file.tensors.find(name);
  if (found == file.tensors.end())
    throw IoError(path + ": has no tensor '" + name +
                  "'; a case holds atoms [N, m] and signals [B, m]");
  const SafeTensor& tensor = found->second;
  if (tensor.shape.size() != 2 || tensor.shape[0] < 1 || tensor.shape[1] < 1)
    throw IoError(path + ": tensor '" + name + "' must have two extents, both at least 1");
  return tensor;
}

// Where it lies if it can be used there, else converted.
const float* floats(const SafeTensor& tensor, const std::string& what, std::vector<float>& owned) {
  if (tensor.dtype == "F32" &&
      reinterpret_cast<std::uintptr_t>(tensor.bytes.data()) % alignof(float) == 0)
    return reinterpret_cast<const float*>(tensor.bytes.data());
  owned = detail::to_floats(tensor, what);
  return owned.data();
}

double norm(const float* row, int dim) {
  double norm2 = 0;
  for (int k = 0; k < dim; ++k) norm2 += double{row[k]} * row[k];
  return std::sqrt(norm2);
}

}  // namespace

BenchCase read_case(const std::string& path, std::int64_t max_signals) {
  SafeTensors file = detail::read_safetensors(path);
  BenchCase c;
  c.name = path;
  const SafeTensor atoms = matrix(path, file, "atoms"), signals = matrix(path, file, "signals");
  constexpr std::int64_t kMost = 1 << 20;
  if (atoms.shape[0] > kMost || atoms.shape[1] > kMost)
    throw IoError(path + ": " + std::to_string(atoms.shape[0]) + " atoms of dimension " +
                  std::to_string(atoms.shape[1]) + "; at most " + std::to_string(kMost) +
                  " of either");
  if (signals.shape[1] != atoms.shape[1])
    throw IoError(path + ": signals have dimension " + std::to_string(signals.shape[1]) +
                  ", atoms " + std::to_string(atoms.shape[1]));
  c.num_atoms = static_cast<int>(atoms.shape[0]);
  c.dim = static_cast<int>(atoms.shape[1]);
  c.num_signals = max_signals > 0 ? std::min(max_signals, signals.shape[0]) : signals.shape[0];
  c.atoms = floats(atoms, path + ": tensor 'atoms'", c.owned_atoms);
  c.signals = floats(signals, path + ": tensor 'signals'", c.owned_signals);
  c.input_bytes =
      file.file.size() + (c.owned_atoms.size() + c.owned_signals.size()) * sizeof(float);
  c.file = std::move(
      file.file);  // longer than any string that lies in the object itself: it does not move
  for (int n = 0; n < c.num_atoms; ++n) {
    const double length = norm(c.atoms + static_cast<std::ptrdiff_t>(n) * c.dim, c.dim);
    if (!(std::fabs(length - 1) < 1e-2))
      throw IoError(path + ": atom " + std::to_string(n) + " has norm " + std::to_string(length) +
                    ", must be 1");
  }
  return c;
}

BenchCase random_case(int num_atoms, int dim, std::int64_t num_signals, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  const auto count = [](std::int64_t rows, int columns) {
    return static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns);
  };
  BenchCase c;
  c.name = "random";
  c.num_atoms = num_atoms;
  c.dim = dim;
  c.num_signals = num_signals;
  c.owned_atoms.resize(count(num_atoms, dim));
  for (float& x : c.owned_atoms) x = normal(random);
  for (int n = 0; n < num_atoms; ++n) {
    float* row = c.owned_atoms.data() + count(n, dim);
    const double length = norm(row, dim);
    for (int k = 0; k < dim; ++k) row[k] = static_cast<float>(row[k] / length);
  }
  constexpr int kTerms = 8;
  const float noise = 0.1f * std::sqrt(static_cast<float>(kTerms) / static_cast<float>(dim));
  c.owned_signals.resize(count(num_signals, dim));
  for (std::int64_t b = 0; b < num_signals; ++b) {
    float* x = c.owned_signals.data() + count(b, dim);
    for (int k = 0; k < dim; ++k) x[k] = noise * normal(random);
    for (int i = 0; i < kTerms; ++i) {
      const float weight = normal(random);
      const float* d =
          c.owned_atoms.data() +
          count(static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(num_atoms)), dim);
      for (int k = 0; k < dim; ++k) x[k] += weight * d[k];
    }
  }
  c.atoms = c.owned_atoms.data();
  c.signals = c.owned_signals.data();
  c.input_bytes = (c.owned_atoms.size() + c.owned_signals.size()) * sizeof(float);
  return c;
}

}  // namespace lexico::apps
