#pragma once
#include "kernels/common/status.h"
#include "kernels/pursuit/level.h"

namespace lexico::kernels::cpu {

/// The level in use: the one set, else the one LEXICO_CPU names, else the best this machine has.
const PursuitLevel& current_level();

/// Whether a level encodes a few signals as another does: same atoms, same weights up to rounding.
/// A level that no machine of ours has is offered only if it agrees with one that they have.
bool agrees(const PursuitLevel& level, const PursuitLevel& with);

/// For tests: one more level, counted as the worst. To be called before any other function of
/// levels.
void offer_level(const PursuitLevel& level);

}  // namespace lexico::kernels::cpu
