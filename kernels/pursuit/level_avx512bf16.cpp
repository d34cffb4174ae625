// Pursuit for CPUs with AVX-512 and its dot product extensions (VNNI, BF16).
#include "kernels/pursuit/pursuit_simd.h"

namespace lexico::kernels::cpu {

const PursuitLevel kAvx512Bf16Level = LEXICO_PURSUIT_LEVEL("avx512bf16");

}  // namespace lexico::kernels::cpu
