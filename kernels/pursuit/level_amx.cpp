// Pursuit for CPUs with AMX, its byte products, and AVX-512 VNNI.
#include "kernels/pursuit/tiles_amx.h"

#include "kernels/pursuit/pursuit_simd.h"

namespace lexico::kernels::cpu {

const PursuitLevel kAmxLevel = LEXICO_PURSUIT_LEVEL("amx");

}  // namespace lexico::kernels::cpu
