// Bytes shared out between layers and kinds.
#include "lexico/budget.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "check.h"

namespace lexico {
namespace {

std::int64_t bytes_of(int bits) { return (std::int64_t{bits} + 7) / 8; }

// The points on the lower convex hull of (bytes, distortion), fewest bytes first.
std::vector<int> hull_of(const std::vector<BudgetPoint>& points) {
  std::vector<int> order(points.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  const auto point = [&](int i) -> const BudgetPoint& {
    return points[static_cast<std::size_t>(i)];
  };
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    const std::int64_t left = bytes_of(point(a).bits), right = bytes_of(point(b).bits);
    if (left != right) return left < right;
    if (point(a).distortion != point(b).distortion)
      return point(a).distortion < point(b).distortion;
    return a < b;
  });
  const auto slope = [&](int a, int b) {  // drop of distortion per byte
    return (point(a).distortion - point(b).distortion) /
           static_cast<double>(bytes_of(point(b).bits) - bytes_of(point(a).bits));
  };
  std::vector<int> hull;
  for (int i : order) {
    if (!hull.empty() && point(i).distortion >= point(hull.back()).distortion) continue;
    while (hull.size() > 1 && slope(hull[hull.size() - 2], hull.back()) <= slope(hull.back(), i))
      hull.pop_back();
    hull.push_back(i);
  }
  return hull;
}

}  // namespace

BudgetChoice choose_budget(const std::vector<BudgetCurve>& curves,
                           int kv_heads,
                           double bytes_per_token) {
  if (kv_heads < 1) detail::throw_invalid("kv_heads is ", kv_heads, ", must be >= 1");
  if (!(bytes_per_token >= 0))
    detail::throw_invalid("bytes_per_token is ", bytes_per_token, ", must be >= 0");
  std::vector<std::vector<int>> hulls;
  std::vector<std::size_t> at(curves.size(), 0);  // on the hull
  const auto point = [&](std::size_t c, std::size_t k) -> const BudgetPoint& {
    return curves[c].points[static_cast<std::size_t>(hulls[c][k])];
  };
  double bytes = 0;
  for (const BudgetCurve& curve : curves) {
    const auto fail = [&](const auto&... what) {
      detail::throw_invalid(
          "curve of the ", name_of(curve.kind), " of layer ", curve.layer, ": ", what...);
    };
    if (curve.points.empty()) fail("has no points");
    if (!(curve.weight >= 0) || !std::isfinite(curve.weight))
      fail("weight is ", curve.weight, ", must be >= 0 and finite");
    for (const BudgetPoint& p : curve.points) {
      if (p.bits < 0) fail("bits is ", p.bits, ", must be >= 0");
      if (!std::isfinite(p.distortion)) fail("distortion is ", p.distortion, ", must be finite");
    }
    hulls.push_back(hull_of(curve.points));
    bytes += static_cast<double>(bytes_of(point(hulls.size() - 1, 0).bits)) * kv_heads;
  }
  if (bytes > bytes_per_token)
    detail::throw_invalid("bytes_per_token is ",
                          bytes_per_token,
                          ", must be at least ",
                          bytes,
                          ": ",
                          curves.size(),
                          " curves for ",
                          kv_heads,
                          " KV heads");
  // Slopes fall along each hull, so taking the steepest step anywhere follows one multiplier down.
  // Steps that do not fit are passed over; flatter and smaller ones may still.
  std::vector<bool> done(curves.size(), false);
  for (;;) {
    std::size_t best = curves.size();
    double steepest = 0;
    for (std::size_t c = 0; c < curves.size(); ++c) {
      if (done[c] || at[c] + 1 == hulls[c].size()) continue;
      const BudgetPoint &now = point(c, at[c]), &next = point(c, at[c] + 1);
      const double slope = curves[c].weight * (now.distortion - next.distortion) /
                           static_cast<double>(bytes_of(next.bits) - bytes_of(now.bits));
      if (slope > steepest) {
        steepest = slope;
        best = c;
      }
    }
    if (best == curves.size()) break;
    const double more = static_cast<double>(bytes_of(point(best, at[best] + 1).bits) -
                                            bytes_of(point(best, at[best]).bits)) *
                        kv_heads;
    if (bytes + more > bytes_per_token) {
      done[best] = true;
      continue;
    }
    bytes += more;
    ++at[best];
  }
  BudgetChoice choice;
  for (std::size_t c = 0; c < curves.size(); ++c) choice.points.push_back(hulls[c][at[c]]);
  // What is left over: the best single move to any point of any curve, hulls left aside.
  for (;;) {
    std::size_t where = curves.size();
    int to = 0;
    double drop = 0, cost = 0;
    for (std::size_t c = 0; c < curves.size(); ++c) {
      const BudgetPoint& now = curves[c].points[static_cast<std::size_t>(choice.points[c])];
      for (std::size_t k = 0; k < curves[c].points.size(); ++k) {
        const BudgetPoint& p = curves[c].points[k];
        const double gain = curves[c].weight * (now.distortion - p.distortion);
        const double more = static_cast<double>(bytes_of(p.bits) - bytes_of(now.bits)) * kv_heads;
        if (gain > drop && bytes + more <= bytes_per_token) {
          where = c;
          to = static_cast<int>(k);
          drop = gain;
          cost = more;
        }
      }
    }
    if (where == curves.size()) break;
    choice.points[where] = to;
    bytes += cost;
  }
  choice.bytes_per_token = bytes;
  for (std::size_t c = 0; c < curves.size(); ++c)
    choice.total_distortion +=
        curves[c].weight * curves[c].points[static_cast<std::size_t>(choice.points[c])].distortion;
  return choice;
}

}  // namespace lexico
