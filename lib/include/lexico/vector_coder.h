#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lexico/dictionary.h"
#include "lexico/fit_codes.h"

namespace lexico {

/// Anything that turns vectors into a fixed number of bits and back, to be compared at equal bytes.
/// Vectors are as the dictionary's key stage has them, before any Transform; row r of a batch
/// belongs to KV head r % heads. A vector with a NaN or Inf comes back as that coder's zero vector
/// or with NaN, its neighbours unharmed.
class VectorCoder {
 public:
  virtual ~VectorCoder() = default;
  virtual std::string name() const = 0;
  /// All a decoder needs for one vector beyond the coder's own tables: scales and norms included.
  virtual int bits_per_vector() const = 0;
  /// What a decoder would return for `vectors` [rows, dim]; `out` may be `vectors`.
  virtual void reconstruct(const float* vectors, std::int64_t rows, float* out) = 0;
};

/// PCA transform coding: mean and principal axes per KV head, bits always to the component with the
/// largest drop of the expected error, Lloyd-Max levels per component. Learned from `vectors`.
/// @param states  0: scalar levels. Else trellis-coded quantization, as in ResidualCode.
std::unique_ptr<VectorCoder> pca_coder(const float* vectors,
                                       std::int64_t rows,
                                       int dim,
                                       int heads,
                                       int bits,
                                       int states = 0,
                                       int threads = 0);

/// Random rotation, Lloyd-Max levels of a Gaussian, the norm in 16 bits (TurboQuant's MSE form,
/// arXiv 2504.19874). `bits` in all: (bits - 16) / dim a component, the first ones one bit more
/// where that is no whole number. @throws InvalidArgument unless bits is in [16 + dim / 4, 16 + 8
/// dim].
std::unique_ptr<VectorCoder> rotation_coder(int dim, int bits, std::uint64_t seed);

/// Per vector: minimum and step in 16 bits each (IEEE half), every number in `bits_per_number`
/// (1..8). 32 + dim * bits_per_number bits.
std::unique_ptr<VectorCoder> min_max_coder(int dim, int bits_per_number);

/// A dictionary with its own transform and format: published (fp8-int16), packed, or exact. It is
/// copied.
std::unique_ptr<VectorCoder> dictionary_coder(const Dictionary& dictionary,
                                              const EncodeOptions& options = {});

/// Mean of |x - x^| / |x| over rows without NaN or Inf and with |x| > 0; NaN if there are none.
double coder_error(VectorCoder& coder, const float* vectors, std::int64_t rows, int dim);

}  // namespace lexico
