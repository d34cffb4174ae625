// Attention on codes for CPUs with AVX2, FMA and F16C.
#include "kernels/attention/attention_simd.h"

namespace lexico::kernels::cpu {

const AttentionLevel kAvx2Attention = LEXICO_ATTENTION_LEVEL("avx2");

}  // namespace lexico::kernels::cpu
