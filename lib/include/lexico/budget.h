#pragma once

#include <vector>

#include "lexico/kind.h"

namespace lexico {

/// One way to code the vectors of a layer and kind, and what it costs.
struct BudgetPoint {
  int bits = 0;           ///< of one vector, as stored
  double distortion = 0;  ///< in any one unit: a mean error, an effect on the output distribution
};

/// The choices of one (layer, kind). Points in any order.
struct BudgetCurve {
  int layer = 0;
  Kind kind = Kind::kKeys;
  std::vector<BudgetPoint> points;
  double weight = 1;  ///< of its distortion in the total
};

struct BudgetChoice {
  std::vector<int> points;      ///< one per curve: index into its points
  double bytes_per_token = 0;   ///< of all curves and KV heads
  double total_distortion = 0;  ///< sum of weight * distortion
};

/// Least total distortion within `bytes_per_token`, by Lagrange multipliers: every curve moves down
/// its lower convex hull, always the step with the largest drop of distortion per bit, until the
/// next does not fit; then whatever smaller steps still fit. Optimal among totals on the hulls.
/// @param kv_heads  each curve's bits count once for each; a total counts vectors as whole bytes.
/// @throws InvalidArgument naming the least possible bytes if no choice fits, or the curve that
/// has no points, a NaN, or bits < 0.
BudgetChoice choose_budget(const std::vector<BudgetCurve>& curves,
                           int kv_heads,
                           double bytes_per_token);

}  // namespace lexico
