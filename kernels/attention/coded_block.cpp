// Planes of fields: docs/attention.md draws them.
#include "kernels/attention/coded_block.h"

namespace lexico::kernels {
namespace {

// Calls visit(plane, bits, field) for the fields of a vector in the order of their planes.
template <typename Byte, typename Fields, typename Visit>
void for_each_field(const CodeLayout& layout, Byte* block, Fields& fields, Visit&& visit) {
  const auto next = [&](int bits, auto& field) {
    visit(block, bits, field);
    block += bits * (kBlockTokens / 8);
  };
  const int weight_bits = weight_field_bits(layout);
  for (int k = 0; k < layout.slots; ++k) next(layout.index_bits, fields.atoms[k]);
  for (int k = 0; k < layout.slots; ++k) next(weight_bits, fields.weights[k]);
  next(layout.scale_bits, fields.scale);
  for (int c = 0; c < layout.components; ++c) {
    if (layout.component_bits[c] > 0) next(layout.component_bits[c], fields.components[c]);
  }
}

}  // namespace

int weight_field_bits(const CodeLayout& layout) {
  switch (layout.weights) {
    case CodedWeights::kFloat32:
      return 32;
    case CodedWeights::kE4m3:
      return 8;
    default:
      return layout.weight_bits;
  }
}

int coded_bits(const CodeLayout& layout) {
  int bits = layout.slots * (layout.index_bits + weight_field_bits(layout)) + layout.scale_bits;
  for (int c = 0; c < layout.components; ++c) bits += layout.component_bits[c];
  return bits;
}

std::size_t block_bytes(const CodeLayout& layout) {
  return static_cast<std::size_t>(coded_bits(layout)) * (kBlockTokens / 8);
}

void write_fields(const CodeLayout& layout,
                  std::uint8_t* block,
                  int token,
                  const CodedFields& fields) {
  for_each_field(
      layout, block, fields, [&](std::uint8_t* plane, int bits, const std::uint32_t& field) {
        const int at = token * bits, shift = at % 8;
        const std::uint64_t mask = ((std::uint64_t{1} << bits) - 1) << shift;
        const std::uint64_t value = (std::uint64_t{field} << shift) & mask;
        for (int byte = 0; 8 * byte < shift + bits; ++byte) {
          std::uint8_t& to = plane[at / 8 + byte];
          to = static_cast<std::uint8_t>((to & ~(mask >> 8 * byte)) | value >> 8 * byte);
        }
      });
}

void read_fields(const CodeLayout& layout,
                 const std::uint8_t* block,
                 int token,
                 CodedFields& fields) {
  for_each_field(
      layout, block, fields, [&](const std::uint8_t* plane, int bits, std::uint32_t& field) {
        const int at = token * bits, shift = at % 8;
        std::uint64_t word = 0;
        for (int byte = 0; 8 * byte < shift + bits; ++byte)
          word |= std::uint64_t{plane[at / 8 + byte]} << 8 * byte;
        field = static_cast<std::uint32_t>(word >> shift & ((std::uint64_t{1} << bits) - 1));
      });
}

}  // namespace lexico::kernels
