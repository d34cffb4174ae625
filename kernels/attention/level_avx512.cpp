// Attention on codes for CPUs with AVX-512 F, BW, DQ, VL.
#include "kernels/attention/attention_simd.h"

namespace lexico::kernels::cpu {

const AttentionLevel kAvx512Attention = LEXICO_ATTENTION_LEVEL("avx512");

}  // namespace lexico::kernels::cpu
