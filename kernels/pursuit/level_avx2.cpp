// Pursuit for CPUs with AVX2 and FMA.
#include "kernels/pursuit/pursuit_simd.h"

namespace lexico::kernels::cpu {

const PursuitLevel kAvx2Level = LEXICO_PURSUIT_LEVEL("avx2");

}  // namespace lexico::kernels::cpu
