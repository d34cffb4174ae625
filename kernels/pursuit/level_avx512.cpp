// Pursuit for CPUs with AVX-512.
#include "kernels/pursuit/pursuit_simd.h"

namespace lexico::kernels::cpu {

const PursuitLevel kAvx512Level = LEXICO_PURSUIT_LEVEL("avx512");

}  // namespace lexico::kernels::cpu
