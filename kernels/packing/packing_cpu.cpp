// Bit fields of fixed widths to bytes and back.
#include "kernels/packing/packing.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/common/cpu_features.h"
#include "kernels/packing/unpack.h"

namespace lexico::kernels::cpu {
namespace {

constexpr int kMaxFields = 1 << 16;

Status check(const RecordLayout& layout) {
  if (layout.num_fields < 0 || layout.num_fields > kMaxFields)
    return {1, "a record has more than 65536 fields"};
  int bits = 0;
  for (int f = 0; f < layout.num_fields; ++f) {
    if (layout.widths[f] > RecordLayout::kMaxWidth) return {1, "a field is wider than 24 bits"};
    bits += layout.widths[f];
  }
  if (bits > 8 * layout.record_bytes) return {1, "the fields are longer than the record"};
  return {};
}

// Little-endian, whatever the machine.
std::uint64_t load(const std::uint8_t* bytes) {
  std::uint64_t word = 0;
  std::memcpy(&word, bytes, sizeof word);
  if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
  return word;
}
void store(std::uint64_t word, std::uint8_t* bytes) {
  if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
  std::memcpy(bytes, &word, sizeof word);
}

constexpr std::uint64_t low_bits(int width) { return (std::uint64_t{1} << width) - 1; }

// 8 bytes at a time: a field is wholly in the word that starts at its first byte (7 + 24 bits).
void unpack_record(const RecordLayout& layout, const std::uint8_t* record, std::uint32_t* fields) {
  std::uint64_t word = 0;
  int have = 0;
  const std::uint8_t* next = record;
  for (int f = 0; f < layout.num_fields; ++f) {
    const int width = layout.widths[f];
    if (have < width) {  // refill to at least 56 bits
      word |= load(next) << have;
      next += (63 - have) >> 3;
      have |= 56;
    }
    fields[f] = static_cast<std::uint32_t>(word & low_bits(width));
    word >>= width;
    have -= width;
  }
}

#if defined(__x86_64__)
void group_fields(const RecordLayout& layout, FieldGroup* groups) {
  int bit = 0;
  for (int f = 0; f < layout.num_fields; ++f) {
    FieldGroup& group = groups[f / 16];
    if (f % 16 == 0) {
      group = {};
      group.first_byte = std::min(bit / 8, std::max(layout.record_bytes - 1, 0));
      group.num_bytes = std::min(64, layout.record_bytes - group.first_byte);
    }
    const int width = layout.widths[f];
    for (int b = 0; b < 4; ++b)  // bytes beyond the record hold none of the field's bits
      group.bytes[4 * (f % 16) + b] =
          static_cast<std::uint8_t>(std::min(bit / 8 + b - group.first_byte, 63));
    group.shifts[f % 16] = static_cast<std::uint32_t>(bit % 8);
    group.masks[f % 16] = static_cast<std::uint32_t>(low_bits(width));
    bit += width;
  }
}
#endif

}  // namespace

Status pack_fields(const RecordLayout& layout,
                   const std::uint32_t* fields,
                   std::int64_t rows,
                   std::uint8_t* records) {
  if (const Status status = check(layout); !status.ok()) return status;
  for (std::int64_t row = 0; row < rows; ++row) {
    std::uint8_t* next = records + row * layout.step * layout.record_bytes;
    std::uint8_t* const end = next + layout.record_bytes;
    const std::uint32_t* from = fields + row * layout.step * layout.num_fields;
    std::uint64_t word = 0;
    int have = 0;
    for (int f = 0; f < layout.num_fields; ++f) {
      const int width = layout.widths[f];
      word |= (from[f] & low_bits(width)) << have;
      have += width;
      if (have >= 32) {  // 4 bytes go out; they are within the record, as all its bits are
        const std::uint32_t low = static_cast<std::uint32_t>(word);
        std::uint8_t bytes[8];
        store(low, bytes);
        std::memcpy(next, bytes, 4);
        next += 4;
        word >>= 32;
        have -= 32;
      }
    }
    for (; next < end; ++next, word >>= 8) *next = static_cast<std::uint8_t>(word);
  }
  return {};
}

Status unpack_fields(const RecordLayout& layout,
                     const std::uint8_t* records,
                     std::int64_t rows,
                     std::uint32_t* fields) {
  if (const Status status = check(layout); !status.ok()) return status;
  if (layout.num_fields == 0) return {};
  // unpack_record may load up to 8 bytes beyond a record: the last rows are read byte by byte.
  const std::int64_t size = layout.record_bytes, step = layout.step;
#if defined(__x86_64__)
  const int num_groups = (layout.num_fields + 15) / 16;
  if (cpu_features().avx512_vbmi && num_groups <= kMaxGroups && size > 0) {
    FieldGroup groups[kMaxGroups];
    group_fields(layout, groups);
    constexpr std::int64_t kRows = 64;  // whose records and fields stay in the first cache
    for (std::int64_t row = 0; row < rows; row += kRows)
      unpack_rows_vbmi(groups,
                       num_groups,
                       layout.num_fields,
                       layout.record_bytes,
                       step,
                       records + row * step * size,
                       std::min(kRows, rows - row),
                       fields + row * step * layout.num_fields);
    return {};
  }
#endif
  const std::int64_t last = size > 0 ? (8 + size * step - 1) / (size * step) : rows;
  const std::int64_t safe = std::max<std::int64_t>(0, rows - last);
  for (std::int64_t row = 0; row < safe; ++row)
    unpack_record(layout, records + row * step * size, fields + row * step * layout.num_fields);
  for (std::int64_t row = safe; row < rows; ++row) {
    const std::uint8_t* next = records + row * step * size;
    std::uint32_t* const to = fields + row * step * layout.num_fields;
    std::uint64_t word = 0;
    int have = 0;
    for (int f = 0; f < layout.num_fields; ++f) {
      const int width = layout.widths[f];
      for (; have < width; have += 8) word |= std::uint64_t{*next++} << have;
      to[f] = static_cast<std::uint32_t>(word & low_bits(width));
      word >>= width;
      have -= width;
    }
  }
  return {};
}

}  // namespace lexico::kernels::cpu
