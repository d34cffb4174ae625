#pragma once
#include "kernels/pursuit/level.h"

namespace lexico::kernels::cpu {

extern const PursuitLevel kEmulatedAmxLevel;  // needs AVX-512 VNNI

}  // namespace lexico::kernels::cpu
