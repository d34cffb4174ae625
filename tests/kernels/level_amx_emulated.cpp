// The AMX level with tiles in plain C++, for CPUs that have AVX-512 VNNI and no AMX. Tests only.
#include "tests/kernels/level_amx_emulated.h"

#include "tests/kernels/tiles_emulated.h"

#include "kernels/pursuit/pursuit_simd.h"

namespace lexico::kernels::cpu {

const PursuitLevel kEmulatedAmxLevel = LEXICO_PURSUIT_LEVEL("amx_emulated");

}  // namespace lexico::kernels::cpu
