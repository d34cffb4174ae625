#include "lexico/rope.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "core/json_fields.h"

namespace lexico {
namespace {

using Json = nlohmann::json;

/// Turns by `direction` (1 or -1) times the angle, and scales.
void turn(const Rope& rope,
          int layer,
          double direction,
          double scale,
          float* vectors,
          int dim,
          const std::int32_t* positions,
          std::int64_t rows) {
  const bool own = !rope.layer_inverse_frequencies.empty();
  if (layer < 0 || (own && layer >= static_cast<int>(rope.layer_inverse_frequencies.size())))
    detail::throw_invalid(
        "layer is ", layer, ", must be in [0, ", rope.layer_inverse_frequencies.size(), ")");
  if (!rope.rotates() || rows <= 0) return;
  const std::vector<double>& frequencies =
      own ? rope.layer_inverse_frequencies[static_cast<std::size_t>(layer)]
          : rope.inverse_frequencies;
  const std::size_t pairs = frequencies.size();
  const auto [least, most] = std::minmax_element(positions, positions + rows);
  const std::int64_t first = *least, count = std::int64_t{*most} - first + 1;
  // Rows share positions: one table, unless the positions are far apart.
  const bool has_table = count <= 4 * rows;
  std::vector<float> cos_table, sin_table;
  const auto fill = [&](std::int64_t position, float* cos_row, float* sin_row) {
    for (std::size_t i = 0; i < pairs; ++i) {
      const double angle =
          static_cast<double>(static_cast<float>(position) * static_cast<float>(frequencies[i]));
      cos_row[i] = static_cast<float>(std::cos(angle) * scale);
      sin_row[i] = static_cast<float>(std::sin(angle) * scale * direction);
    }
  };
  cos_table.resize(pairs * static_cast<std::size_t>(has_table ? count : 1));
  sin_table.resize(cos_table.size());
  for (std::int64_t p = 0; has_table && p < count; ++p)
    fill(first + p,
         &cos_table[static_cast<std::size_t>(p) * pairs],
         &sin_table[static_cast<std::size_t>(p) * pairs]);

  const bool interleaved = rope.layout == "interleaved";
  const std::size_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::size_t at = has_table ? static_cast<std::size_t>(positions[row] - first) * pairs : 0;
    if (!has_table) fill(positions[row], cos_table.data(), sin_table.data());
    const float* c = &cos_table[at];
    const float* s = &sin_table[at];
    float* vector = vectors + row * dim;
    for (std::size_t i = 0; i < pairs; ++i) {
      float& a = vector[i * step];
      float& b = vector[i * step + apart];
      const float turned_a = a * c[i] - b * s[i], turned_b = b * c[i] + a * s[i];
      a = turned_a;
      b = turned_b;
    }
  }
}

constexpr const char* kFrequencies = "inverse_frequencies";

std::vector<double> frequencies_from(const Json& list,
                                     const detail::JsonFields& fields,
                                     const std::string& where,
                                     int count) {
  std::vector<double> values;
  for (const Json& item : list) {
    if (!item.is_number() || !std::isfinite(item.get<double>()))
      fields.refuse(kFrequencies, "a list of finite numbers");
    values.push_back(item.get<double>());
  }
  if (static_cast<int>(values.size()) != count)
    throw IoError(where + "'" + kFrequencies + "' has " + std::to_string(values.size()) +
                  " numbers, must have rotary_dim / 2 = " + std::to_string(count));
  return values;
}

}  // namespace

void Rope::apply(
    int layer, float* vectors, int dim, const std::int32_t* positions, std::int64_t rows) const {
  turn(*this, layer, 1, attention_scaling, vectors, dim, positions, rows);
}

void Rope::undo(
    int layer, float* vectors, int dim, const std::int32_t* positions, std::int64_t rows) const {
  turn(*this, layer, -1, 1 / attention_scaling, vectors, dim, positions, rows);
}

Rope Rope::parse(const std::string& text, const std::string& where, int head_dim, int layers) {
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::exception& error) {
    throw IoError(where + error.what());
  }
  if (!json.is_object()) throw IoError(where + "is no JSON object");
  const detail::JsonFields fields(json, where);
  Rope rope;
  rope.kind = fields.text("kind");
  if (!rope.rotates()) return rope;
  rope.layout = fields.text("layout");
  if (rope.layout != "half" && rope.layout != "interleaved")
    fields.refuse("layout", "half or interleaved");
  rope.rotary_dim = fields.integer("rotary_dim", 2);
  if (rope.rotary_dim % 2 != 0 || rope.rotary_dim > head_dim)
    fields.refuse("rotary_dim", "even and at most head_dim = " + std::to_string(head_dim));
  rope.attention_scaling = fields.finite("attention_scaling");
  if (rope.attention_scaling == 0) fields.refuse("attention_scaling", "a finite number, not 0");
  const Json& lists = fields.required(kFrequencies);
  constexpr const char* kWant = "a list of numbers, or one such list per layer";
  if (!lists.is_array() || lists.empty()) fields.refuse(kFrequencies, kWant);
  if (!lists.front().is_array()) {
    rope.inverse_frequencies = frequencies_from(lists, fields, where, rope.rotary_dim / 2);
    return rope;
  }
  for (const Json& list : lists) {
    if (!list.is_array()) fields.refuse(kFrequencies, kWant);
    rope.layer_inverse_frequencies.push_back(
        frequencies_from(list, fields, where, rope.rotary_dim / 2));
  }
  if (layers > 0 && static_cast<int>(rope.layer_inverse_frequencies.size()) != layers)
    throw IoError(where + "'" + kFrequencies + "' has " +
                  std::to_string(rope.layer_inverse_frequencies.size()) + " lists for " +
                  std::to_string(layers) + " layers");
  return rope;
}

std::string Rope::to_json() const {
  nlohmann::ordered_json json{{"kind", kind}};
  if (rotates()) {
    json["layout"] = layout;
    json["rotary_dim"] = rotary_dim;
    json["attention_scaling"] = attention_scaling;
    if (layer_inverse_frequencies.empty())
      json[kFrequencies] = inverse_frequencies;
    else
      json[kFrequencies] = layer_inverse_frequencies;
  }
  return json.dump();
}

}  // namespace lexico
