// Pursuit for CPUs with AVX-512 and its integer dot products (VNNI).
#include "kernels/pursuit/pursuit_simd.h"

namespace lexico::kernels::cpu {

const PursuitLevel kAvx512VnniLevel = LEXICO_PURSUIT_LEVEL("avx512vnni");

}  // namespace lexico::kernels::cpu
