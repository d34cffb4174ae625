#pragma once
#include "kernels/common/status.h"
#include "kernels/pursuit/level.h"

namespace lexico::kernels::cpu {

/// The level in use: the one set, else the one LEXICO_CPU names, else the best this machine has.
const PursuitLevel& current_level();

}  // namespace lexico::kernels::cpu
