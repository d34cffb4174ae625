#pragma once
// Layers for tests of attention on codes: a dictionary of each format, stage and transform.
#include <cmath>
#include <random>
#include <vector>

#include "lexico/dictionary.h"
#include "lexico/rope.h"

namespace lexico {

inline constexpr int kHeads = 2, kGroup = 3, kDim = 32, kAtoms = 50;

struct Layer {
  Dictionary keys, values;
  Rope rope;
  KeyStage stage = KeyStage::kPostRope;
};

inline std::vector<float> normals(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& v : x) v = normal(random);
  return x;
}

inline Dictionary dictionary(Kind kind,
                             CodeFormat::Coding coding,
                             bool transform,
                             int residual_groups) {
  Dictionary d;
  d.kind = kind;
  d.num_atoms = kAtoms;
  d.dim = kDim;
  const unsigned seed = kind == Kind::kKeys ? 1 : 2;
  d.atoms = normals(kAtoms * kDim, seed);
  normalize_atoms(d.atoms, kAtoms, kDim);
  if (transform) {
    const std::vector<float> root = normals(kHeads * kDim * kDim, seed + 10);
    std::vector<float> metric(root.size(), 0.0f);
    for (int h = 0; h < kHeads; ++h)
      for (int i = 0; i < kDim; ++i)
        for (int j = 0; j < kDim; ++j)
          for (int k = 0; k < kDim; ++k)
            metric[static_cast<std::size_t>((h * kDim + i) * kDim + j)] +=
                root[static_cast<std::size_t>((h * kDim + i) * kDim + k)] *
                root[static_cast<std::size_t>((h * kDim + j) * kDim + k)];
    set_metric(d.transform, metric, kHeads, kDim, 0.1);
    d.transform.mean = normals(kHeads * kDim, seed + 20);
  }
  CodeFormat& f = d.format;
  f.coding = coding;
  f.max_atoms = 4;
  if (coding != CodeFormat::Coding::kPacked) return d;
  f.weight_bits = 5;
  f.scale_bits = 8;
  f.scale_low = -4;
  f.scale_step = 0.05f;
  for (int k = 0; k < f.max_atoms; ++k)
    for (int i = 0; i < 32; ++i) f.weight_levels.push_back(static_cast<float>(i - 16) / 12.0f);
  ResidualCode& r = f.residual;
  r.groups = residual_groups;
  r.relative = true;
  for (int g = 0; g < residual_groups; ++g) {
    const std::vector<float> mean = normals(kDim, seed + 30);
    for (const float x : mean) r.mean.push_back(0.1f * x);
    for (int i = 0; i < kDim; ++i)
      for (int j = 0; j < kDim; ++j) r.axes.push_back(j == (i + g + 1) % kDim ? 1.0f : 0.0f);
    for (int c = 0; c < kDim; ++c) {
      const int bits = (c + 3 * g) % 4;
      r.bits.push_back(bits);
      for (int l = 0; l < 1 << bits && bits > 0; ++l)
        r.levels.push_back(0.1f *
                           (static_cast<float>(l) - static_cast<float>(1 << bits) / 2 + 0.5f));
    }
  }
  return d;
}

inline Rope a_rope() {
  Rope rope;
  rope.kind = "default";
  rope.rotary_dim = kDim;
  for (int i = 0; i < kDim / 2; ++i)
    rope.inverse_frequencies.push_back(std::pow(10000.0, -2.0 * i / kDim));
  return rope;
}

}  // namespace lexico
