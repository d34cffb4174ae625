// Bit fields sixteen at a time, for CPUs with AVX-512 VBMI.
#include <immintrin.h>

#include "kernels/packing/unpack.h"

namespace lexico::kernels::cpu {

void unpack_rows_vbmi(const FieldGroup* groups,
                      int num_groups,
                      int num_fields,
                      int record_bytes,
                      std::int64_t step,
                      const std::uint8_t* records,
                      std::int64_t rows,
                      std::uint32_t* fields) {
  for (int g = 0; g < num_groups; ++g) {
    const FieldGroup& group = groups[g];
    const __m512i bytes = _mm512_load_si512(group.bytes);
    const __m512i shifts = _mm512_load_si512(group.shifts);
    const __m512i masks = _mm512_load_si512(group.masks);
    const __mmask64 inside = ~std::uint64_t{0} >> (64 - group.num_bytes);
    const int left = num_fields - 16 * g;
    const auto wanted = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::uint8_t* from = records + row * step * record_bytes + group.first_byte;
      const __m512i window = _mm512_maskz_loadu_epi8(inside, from);
      const __m512i words = _mm512_permutexvar_epi8(bytes, window);
      const __m512i values = _mm512_and_si512(_mm512_srlv_epi32(words, shifts), masks);
      _mm512_mask_storeu_epi32(fields + row * step * num_fields + 16 * g, wanted, values);
    }
  }
}

}  // namespace lexico::kernels::cpu
