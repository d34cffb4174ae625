#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lexico/encoder.h"

namespace lexico {

struct Dictionary;

/// What the atoms leave over, r = z - D y (y as decoded), by transform coding: component c of
/// U_g (r - mean_g) is a number of `bits[g, c]` bits, decoded by a table. Row r of a batch belongs
/// to group (first_head + r) % groups.
struct ResidualCode {
  static constexpr int kMaxBits = 8;  ///< of one component

  int groups = 0;           ///< 0: no residual code; 1: one for all KV heads; else one per KV head
  std::vector<float> mean;  ///< [groups, dim]
  std::vector<float> axes;  ///< U: [groups, dim, dim], rows orthonormal
  std::vector<int> bits;    ///< [groups, dim], 0..kMaxBits; every group has the same sum
  /// 0: scalar quantization, 2^bits levels a component. Otherwise trellis-coded quantization
  /// (Marcellin and Fischer 1990) over the components with bits, in order, with Ungerboeck's code
  /// of so many states (4, 8, 16, 32, 64, 128 or 256): 2^(bits + 1) levels a component, of which
  /// the low bits of this component and of the log2(states) before it choose a quarter. Decoding
  /// needs no other part of the code than these bits.
  int states = 0;
  /// Ascending, component after component, group after group; in units of the vector's scale if
  /// `relative`. A component without bits has no level and decodes to 0.
  std::vector<float> levels;
  bool relative = false;

  int num_levels(int component_bits) const {
    return component_bits == 0 ? 0 : 1 << (component_bits + (states > 0 ? 1 : 0));
  }
  int total_bits(int dim) const;  ///< of one vector
};

/// How the code of a vector becomes bytes: in a dictionary file, obeyed by everything that encodes
/// with that dictionary. The vector is in the dictionary's frame (lexico/transform.h).
struct CodeFormat {
  enum class Coding {
    kExact,     ///< fp32 weights, int32 indices: no bytes
    kFp8Int16,  ///< as published: E4M3 weights, int16 indices, 3 s + 2 bytes a vector
    kPacked,    ///< indices of ceil(log2 N) bits, weights of weight_bits, then the residual code
  };
  Coding coding = Coding::kExact;
  int max_atoms = 0;  ///< the paper's s. kExact: 0 leaves it to the caller. kPacked: may be 0
  // kPacked:
  int weight_bits = 5;  ///< 2..8
  /// 0..8. The scale of a vector is |z| rounded on the grid 2^(scale_low + k * scale_step), k = 0
  /// .. 2^scale_bits - 1; with 0 bits it is 1, and levels are absolute.
  int scale_bits = 8;
  float scale_low = 0, scale_step = 0;
  /// [max_atoms, 2^weight_bits]: ascending, those of the first atom that pursuit took, of the
  /// second, ...; in units of the scale. Each row holds a 0.
  std::vector<float> weight_levels;
  ResidualCode residual;

  /// "exact", "fp8-int16" or "packed".
  const char* name() const;
  /// Of one vector, whatever it holds; a pursuit that stops early leaves slots unused and saves
  /// nothing here. fp8-int16: 24 max_atoms + 16. kExact: 64 max_atoms (fp32 and int32).
  int bits_per_vector(int num_atoms, int dim) const;
  /// Of one vector in memory: bits_per_vector rounded up to whole bytes.
  int bytes_per_vector(int num_atoms, int dim) const {
    return (bits_per_vector(num_atoms, dim) + 7) / 8;
  }
  /// @throws InvalidArgument naming the field, its value and its bound: counts, bit widths, sizes
  /// of tables, NaN, levels out of order, axes that are not orthonormal.
  void validate(int num_atoms, int dim) const;
};

/// @throws InvalidArgument unless `name` is "exact", "fp8-int16" or "packed".
CodeFormat::Coding coding_from(const std::string& name);

/// ceil(log2 num_atoms): 0 for a single atom.
int index_bits(int num_atoms);

/// What happened to the vectors that were encoded.
struct CodeCounts {
  std::int64_t vectors = 0;
  std::int64_t not_finite = 0;  ///< held a NaN or Inf and were encoded as zero vectors
  std::int64_t saturated = 0;   ///< weights or scales that lay beyond their grid and got its end
};

/// Vectors to bytes and back, with one dictionary and its format. A vector takes
/// bytes_per_vector() bytes, whose fields lie one after another from the lowest bit of the first
/// byte on (docs/formats.md, "Codes"). The bytes do not depend on the number of threads, nor on how
/// vectors are split into batches. One codec serves one caller at a time.
///
/// Weights are quantized one after another in the order of pursuit, each time with the weights not
/// yet quantized solved again for least squares. They saturate and never become NaN.
class Codec {
 public:
  /// @param dictionary  must outlive the codec and stay as it is; its format may be kExact, which
  /// reconstructs and has no bytes.
  /// @param options     selection, relative_tolerance and threads of pursuit; max_atoms is the
  /// format's.
  /// @throws InvalidArgument as CodeFormat::validate and Encoder do; also for max_atoms = 0 with
  /// kExact.
  explicit Codec(const Dictionary& dictionary, const EncodeOptions& options = {});
  /// For codecs that share an encoder, whose max_atoms must be the format's, and for atoms that
  /// join: indices get the bits for num_atoms + more_atoms. use_atoms must come before encode, and
  /// again after another codec used the encoder, which must outlive this.
  Codec(const Dictionary& dictionary, Encoder& encoder, int more_atoms);
  /// From now on the first `count` of `atoms` [count, dim] are meant, which must stay as they are.
  /// @throws InvalidArgument unless count is in [max_atoms, num_atoms + more_atoms].
  void use_atoms(const float* atoms, int count);
  ~Codec();
  Codec(Codec&&) noexcept;
  Codec& operator=(Codec&&) noexcept;

  int bits_per_vector() const;
  int bytes_per_vector() const;

  /// @param vectors  [rows, dim] in the dictionary's frame; row 0 belongs to KV head `first_head`.
  /// @param bytes    [rows, bytes_per_vector()], overwritten.
  /// @throws InvalidArgument if the format is kExact.
  void encode(const float* vectors, std::int64_t rows, std::uint8_t* bytes, int first_head = 0);
  /// Any bytes decode to finite numbers (fp8-int16: an index beyond the last atom or a NaN weight
  /// counts as an unused slot). @throws InvalidArgument if the format is kExact.
  void decode(const std::uint8_t* bytes,
              std::int64_t rows,
              float* vectors,
              int first_head = 0) const;
  /// decode(encode(vectors)) without the bytes, bit for bit. `out` may be `vectors`.
  void reconstruct(const float* vectors, std::int64_t rows, float* out, int first_head = 0);

  /// Of all calls so far.
  const CodeCounts& counts() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lexico
