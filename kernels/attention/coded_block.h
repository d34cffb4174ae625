#pragma once

#include <cstddef>
#include <cstdint>

namespace lexico::kernels {

/// Coded tokens are kept in blocks of this many. docs/attention.md draws a block.
constexpr int kBlockTokens = 64;
/// Bytes behind the last block of a page that must be readable; what they hold does not matter.
constexpr std::size_t kPageSlack = 32;

enum class CodedWeights : int {
  kFloat32,  ///< as they are: 32 bits
  kE4m3,     ///< FP8 E4M3, never NaN (0x7f, 0xff): 8 bits
  kLevels,   ///< numbers of levels: weight_bits
};

/// Trellis-coded components: with h the lowest bits of a component's field (bit 0), of the one with
/// bits before it (bit 1) and so on, and 0 before the first, the level is 4 * (field >> 1) + 2 *
/// parity(h & high) + parity(h & low), of 2^(bits + 1) levels.
struct TrellisTaps {
  std::uint32_t high = 0, low = 0;  ///< both 0: none; fields are levels
};

/// What one coded vector of a KV head is made of, and how a block of them lies in memory: one
/// plane after another, a plane being one field of all kBlockTokens tokens, packed from the lowest
/// bit of its first byte on:
///   slots planes of atom numbers, slots planes of weights, the scale, components with bits > 0.
/// So a vector takes exactly the sum of its fields' bits. A slot that is not used has the weight 0
/// and any atom.
struct CodeLayout {
  int slots = 0;       ///< atoms per vector (the paper's s); may be 0
  int index_bits = 0;  ///< 0..24
  CodedWeights weights = CodedWeights::kFloat32;
  int weight_bits = 0;            ///< kLevels: 1..8
  const float* levels = nullptr;  ///< kLevels: [slots, 2^weight_bits]
  int scale_bits = 0;             ///< 0 (the scale is 1) .. 8
  const float* scales = nullptr;  ///< [2^scale_bits]
  /// Residual code: component c adds its level times row c of `axes`.
  int components = 0;  ///< 0, or dim
  const std::int32_t* component_bits =
      nullptr;  ///< [components], 0..8; with 0 bits it adds nothing
  const float* component_levels =
      nullptr;  ///< 2^bits (or more: TrellisTaps), those of one component after those of the one
                ///< before; none for one without bits
  TrellisTaps trellis;
  bool relative = false;  ///< component levels count in units of the scale
};

/// Bits of one vector; a block has kBlockTokens / 8 times as many bytes.
int coded_bits(const CodeLayout& layout);
std::size_t block_bytes(const CodeLayout& layout);
int weight_field_bits(const CodeLayout& layout);  ///< of one weight: 32, 8 or weight_bits

/// The fields of one vector, as unsigned numbers; a kFloat32 weight by its bit pattern.
struct CodedFields {
  std::uint32_t* atoms = nullptr;       ///< [slots]
  std::uint32_t* weights = nullptr;     ///< [slots]
  std::uint32_t scale = 0;              ///< without scale_bits: not used
  std::uint32_t* components = nullptr;  ///< [components]; those without bits are not used
};

/// Writes the fields of token `token` (0 .. kBlockTokens - 1) of a block; the other tokens keep
/// theirs. Bits beyond a field's width are dropped.
void write_fields(const CodeLayout& layout,
                  std::uint8_t* block,
                  int token,
                  const CodedFields& fields);
/// Reads them into the arrays of `fields`.
void read_fields(const CodeLayout& layout,
                 const std::uint8_t* block,
                 int token,
                 CodedFields& fields);

}  // namespace lexico::kernels
