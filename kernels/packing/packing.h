#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace lexico::kernels {

/// Records of `record_bytes` bytes that hold unsigned fields of fixed widths one after another: bit
/// b of a record is bit b % 8 of its byte b / 8, and a field's lowest bit comes first.
struct RecordLayout {
  static constexpr int kMaxWidth = 24;
  int num_fields = 0;
  int record_bytes = 0;                  ///< at least the sum of the widths in bits; the rest is 0
  const std::uint8_t* widths = nullptr;  ///< [num_fields], 0..kMaxWidth; a field of 0 bits reads 0
  std::int64_t step = 1;  ///< of rows: 2 packs or unpacks every other one, and skips those between
};

namespace cpu {

/// fields [rows * step, num_fields] to records [rows * step, record_bytes]; bits of a field above
/// its width are dropped. Fails if a width or record_bytes is out of bounds.
Status pack_fields(const RecordLayout& layout,
                   const std::uint32_t* fields,
                   std::int64_t rows,
                   std::uint8_t* records);
/// And back. Nothing outside the records is read.
Status unpack_fields(const RecordLayout& layout,
                     const std::uint8_t* records,
                     std::int64_t rows,
                     std::uint32_t* fields);

/// To E4M3 (1 sign, 4 exponent, 3 mantissa bits, bias 7, no Inf, NaN 0x7f and 0xff; Micikevicius et
/// al. 2022): rounded to nearest even, magnitudes above 448 saturate at 448, NaN becomes 0.
void e4m3_from_floats(const float* values, std::int64_t count, std::uint8_t* codes);
/// Exact; both NaN codes give NaN.
void floats_from_e4m3(const std::uint8_t* codes, std::int64_t count, float* values);

}  // namespace cpu

}  // namespace lexico::kernels
