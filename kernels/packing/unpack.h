#pragma once

#include <cstdint>

namespace lexico::kernels::cpu {

/// Sixteen fields that one byte permutation brings into place: dword f holds the four bytes from
/// the one where field f begins.
struct FieldGroup {
  std::int32_t first_byte;               ///< of the record
  std::int32_t num_bytes;                ///< to read, at most 64: none beyond the record
  alignas(64) std::uint8_t bytes[64];    ///< counted from first_byte
  alignas(64) std::uint32_t shifts[16];  ///< then right by so many bits,
  alignas(64) std::uint32_t masks[16];   ///< and all else off
};

constexpr int kMaxGroups = 64;  // on the stack

/// Groups of all fields of a record, for records `step` apart; rows of `num_fields` fields
/// likewise. Needs AVX-512 VBMI.
void unpack_rows_vbmi(const FieldGroup* groups,
                      int num_groups,
                      int num_fields,
                      int record_bytes,
                      std::int64_t step,
                      const std::uint8_t* records,
                      std::int64_t rows,
                      std::uint32_t* fields);

}  // namespace lexico::kernels::cpu
