#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lexico {

/// Rotary position embedding of a model (Su et al., arXiv:2104.09864), as numbers: at position p
/// the pair (a, b) of a head becomes m (a cos f - b sin f, b cos f + a sin f) with f = p *
/// inverse_frequencies[i] and m = attention_scaling. f is computed in float32, as models do: far
/// out, double would be another angle.
struct Rope {
  std::string kind = "none";  ///< "default", "llama3", ...: for people; "none" rotates nothing
  std::string layout =
      "half";  ///< "half": dims i and i + rotary_dim / 2 are a pair; "interleaved": 2i and 2i + 1
  int rotary_dim = 0;  ///< the first dimensions of a head, which are rotated; the others stay
  std::vector<double> inverse_frequencies;  ///< one per pair; empty if the layers differ
  std::vector<std::vector<double>> layer_inverse_frequencies;  ///< per layer, if they differ
  double attention_scaling = 1.0;

  bool rotates() const { return kind != "none"; }

  /// In place on `rows` vectors of `dim` >= rotary_dim, row i at position positions[i] >= 0; keys
  /// and queries alike. `undo` also divides by attention_scaling. @throws InvalidArgument if there
  /// is no such layer.
  void apply(
      int layer, float* vectors, int dim, const std::int32_t* positions, std::int64_t rows) const;
  void undo(
      int layer, float* vectors, int dim, const std::int32_t* positions, std::int64_t rows) const;

  /// The object `rope` of a lexico.json (docs/formats.md), and its text.
  /// @param where   put before every message. @param layers  how many lists there may be; 0: any
  /// number.
  /// @throws IoError naming the key, its value and what it must be.
  static Rope parse(const std::string& json, const std::string& where, int head_dim, int layers);
  std::string to_json() const;
};

}  // namespace lexico
