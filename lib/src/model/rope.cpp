#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "lexico/language_model.h"

namespace lexico {

void undo_rope(const ModelInfo& info,
               int layer,
               float* vectors,
               const std::int32_t* positions,
               std::int64_t rows) {
  if (layer < 0 || layer >= info.layers)
    detail::throw_invalid("layer is ", layer, ", must be in [0, ", info.layers, ")");
  if (info.rope_kind == "none" || rows <= 0) return;
  const std::vector<double>& frequencies =
      info.layer_inverse_frequencies.empty()
          ? info.inverse_frequencies
          : info.layer_inverse_frequencies[static_cast<std::size_t>(layer)];
  const std::size_t pairs = frequencies.size();
  const auto [least, most] = std::minmax_element(positions, positions + rows);
  const std::int64_t first = *least, count = std::int64_t{*most} - first + 1;
  // Rows share positions: one table, unless the positions are far apart.
  const bool has_table = count <= 4 * rows;
  std::vector<float> cos_table, sin_table;
  const auto fill = [&](std::int64_t position, float* cos_row, float* sin_row) {
    for (std::size_t i = 0; i < pairs; ++i) {
      // The model multiplies in float32 too: far out, an angle in double would be another one.
      const double angle =
          static_cast<double>(static_cast<float>(position) * static_cast<float>(frequencies[i]));
      cos_row[i] = static_cast<float>(std::cos(angle) / info.attention_scaling);
      sin_row[i] = static_cast<float>(std::sin(angle) / info.attention_scaling);
    }
  };
  cos_table.resize(pairs * static_cast<std::size_t>(has_table ? count : 1));
  sin_table.resize(cos_table.size());
  for (std::int64_t p = 0; has_table && p < count; ++p)
    fill(first + p,
         &cos_table[static_cast<std::size_t>(p) * pairs],
         &sin_table[static_cast<std::size_t>(p) * pairs]);

  const bool interleaved = info.rope_layout == "interleaved";
  const std::size_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::size_t at = has_table ? static_cast<std::size_t>(positions[row] - first) * pairs : 0;
    if (!has_table) fill(positions[row], cos_table.data(), sin_table.data());
    const float* c = &cos_table[at];
    const float* s = &sin_table[at];
    float* vector = vectors + row * info.head_dim;
    for (std::size_t i = 0; i < pairs; ++i) {
      float& a = vector[i * step];
      float& b = vector[i * step + apart];
      const float turned_a = a * c[i] + b * s[i], turned_b = b * c[i] - a * s[i];
      a = turned_a;
      b = turned_b;
    }
  }
}

}  // namespace lexico
