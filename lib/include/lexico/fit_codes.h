#pragma once

#include <cstdint>
#include <vector>

#include "lexico/dictionary.h"

namespace lexico {

/// What a format is to look like; its tables are learned from vectors.
struct CodeFitOptions {
  int max_atoms = 8;              ///< 0: transform coding alone
  int weight_bits = 5;            ///< 2..8; 0 (choose_codes): what errs least
  int scale_bits = 8;             ///< 0..8; -1 (choose_codes): what errs least
  int residual_bits = 0;          ///< of all components together; 0: no residual code
  int groups = 0;                 ///< residual codes: 1 for all KV heads, or `heads`; 0: `heads`
  int states = 8;                 ///< of the trellis; 0: scalar Lloyd-Max levels
  bool relative = false;          ///< residual amplitudes relative to the vector's scale
  bool learned_levels = true;     ///< weights: Lloyd-Max per position; else uniform
  bool learned_residual = true;   ///< residual levels: learned per component; else those of a
                                  ///< Gaussian of its variance
  std::int64_t max_rows = 32768;  ///< of the sample are used, evenly spread
  Selection selection;
  int threads = 0;
};

/// Learns the tables of a packed format: scale grid, weight levels, principal axes of what the
/// atoms leave over, bits per component (always to the largest drop of the expected error), levels.
/// The same for the same arguments, whatever the number of threads.
/// @param dictionary  its format is not looked at.
/// @param vectors     [rows, dim] in the dictionary's frame, row r of head r % heads; rows with a
/// NaN or Inf are left out.
/// @throws InvalidArgument naming the option and its bound (residual_bits: kMaxBits * dim), or if
/// fewer than 2 usable rows per group are left.
CodeFormat fit_codes(const Dictionary& dictionary,
                     const float* vectors,
                     std::int64_t rows,
                     int heads,
                     const CodeFitOptions& options);

/// A format and the mean of |x - x^| / |x| over the sample it was chosen by: in the caller's frame,
/// or in the dictionary's where its transform has a map.
struct CodeChoice {
  CodeFormat format;
  double error = 0;
};

/// The packed format of exactly `bits` a vector, at most options.max_atoms atoms, that errs least:
/// searches numbers of atoms, weight bits and scale bits where the options leave them open
/// (weight_bits 0, scale_bits -1) by their expected errors, then measures the best few.
/// options.residual_bits is not looked at.
/// @throws InvalidArgument naming the least possible bits if `bits` is less, the most if it is
/// more.
CodeChoice choose_codes(const Dictionary& dictionary,
                        const float* vectors,
                        std::int64_t rows,
                        int heads,
                        int bits,
                        const CodeFitOptions& options);

/// Mean of |x - x^| / |x| (see CodeChoice) of `vectors` under the dictionary's format.
double code_error(const Dictionary& dictionary,
                  const float* vectors,
                  std::int64_t rows,
                  const EncodeOptions& options = {});

}  // namespace lexico
