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
        for (int i = 0; i < bits; ++i) {
          const int at = token * bits + i;
          std::uint8_t& byte = plane[at / 8];
          const unsigned bit = 1u << at % 8;
          byte = static_cast<std::uint8_t>((field >> i & 1u) != 0 ? byte | bit : byte & ~bit);
        }
      });
}

void read_fields(const CodeLayout& layout,
                 const std::uint8_t* block,
                 int token,
                 CodedFields& fields) {
  for_each_field(
      layout, block, fields, [&](const std::uint8_t* plane, int bits, std::uint32_t& field) {
        field = 0;
        for (int i = 0; i < bits; ++i) {
          const int at = token * bits + i;
          field |= static_cast<std::uint32_t>(plane[at / 8] >> at % 8 & 1) << i;
        }
      });
}

}  // namespace lexico::kernels
