// Pursuit for any CPU: the compiler's baseline.
#include "kernels/pursuit/pursuit_simd.h"

namespace lexico::kernels::cpu {

const PursuitLevel kGenericLevel = LEXICO_PURSUIT_LEVEL("generic");

}  // namespace lexico::kernels::cpu
