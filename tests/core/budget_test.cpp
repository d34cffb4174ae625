// The contract of lexico/budget.h.
#include "lexico/budget.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/random.h"
#include "lexico/error.h"
#include "support/message_of.h"

namespace lexico {
namespace {

std::vector<BudgetCurve> random_curves(int count, int points, std::uint64_t seed) {
  detail::Random random({seed});
  std::vector<BudgetCurve> curves;
  for (int c = 0; c < count; ++c) {
    BudgetCurve curve{c / 2, c % 2 == 0 ? Kind::kKeys : Kind::kValues, {}, 0.5 + random.uniform()};
    for (int p = 0; p < points; ++p)
      curve.points.push_back({8 * p + 8, std::exp2(-0.5 * p) * (1 + 0.3 * random.uniform())});
    curves.push_back(curve);
  }
  return curves;
}

TEST(Budget, IsAsGoodAsTryingEverything) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    const auto curves = random_curves(4, 5, seed);
    for (double bytes : {8.0, 14.0, 21.0, 30.0, 40.0}) {
      const BudgetChoice choice = choose_budget(curves, 2, bytes);
      EXPECT_LE(choice.bytes_per_token, bytes);
      double least = INFINITY, least_step = 0;
      for (int all = 0; all < 625; ++all) {
        double distortion = 0, used = 0;
        int rest = all;
        for (const BudgetCurve& curve : curves) {
          const BudgetPoint& p = curve.points[static_cast<std::size_t>(rest % 5)];
          rest /= 5;
          distortion += curve.weight * p.distortion;
          used += 2.0 * p.bits / 8;
        }
        if (used <= bytes) least = std::min(least, distortion);
      }
      for (const BudgetCurve& curve : curves) least_step = std::max(least_step, curve.weight * 0.3);
      EXPECT_LE(choice.total_distortion, least + least_step);  // a step of one curve at most
      double sum = 0;
      for (std::size_t c = 0; c < curves.size(); ++c)
        sum += curves[c].weight *
               curves[c].points[static_cast<std::size_t>(choice.points[c])].distortion;
      EXPECT_DOUBLE_EQ(sum, choice.total_distortion);
    }
  }
}

TEST(Budget, IsOptimalOnTheHull) {
  // Two curves of equal slopes in turn: at every whole step the greedy choice is the best there is.
  std::vector<BudgetCurve> curves(2);
  for (int p = 0; p < 6; ++p) {
    curves[0].points.push_back({8 * (p + 1), std::exp2(-2 * p)});
    curves[1].points.push_back({8 * (p + 1), std::exp2(-2 * p - 1)});
  }
  EXPECT_EQ(choose_budget(curves, 1, 6).points, (std::vector<int>{2, 2}));
  EXPECT_EQ(choose_budget(curves, 1, 7).points, (std::vector<int>{3, 2}));
}

TEST(Budget, CountsWholeBytesAndHeads) {
  const std::vector<BudgetCurve> curves = {{0, Kind::kKeys, {{9, 1.0}, {17, 0.5}}, 1}};
  EXPECT_EQ(choose_budget(curves, 4, 8).bytes_per_token, 8);
  EXPECT_EQ(choose_budget(curves, 4, 11.9).bytes_per_token, 8);
  EXPECT_EQ(choose_budget(curves, 4, 12).bytes_per_token, 12);
}

TEST(Budget, WeightsDecide) {
  std::vector<BudgetCurve> curves = {{0, Kind::kKeys, {{8, 1.0}, {16, 0.5}}, 1},
                                     {0, Kind::kValues, {{8, 1.0}, {16, 0.5}}, 2}};
  EXPECT_EQ(choose_budget(curves, 1, 3).points, (std::vector<int>{0, 1}));
  curves[0].weight = 3;
  EXPECT_EQ(choose_budget(curves, 1, 3).points, (std::vector<int>{1, 0}));
}

TEST(Budget, WhatCannotBeIsSaid) {
  std::vector<BudgetCurve> curves = random_curves(4, 3, 1);
  const auto message = [&](double bytes) {
    return test::message_of<InvalidArgument>([&] { choose_budget(curves, 2, bytes); });
  };
  EXPECT_NE(message(7).find("must be at least 8"), std::string::npos) << message(7);
  EXPECT_NE(message(NAN).find("bytes_per_token is nan"), std::string::npos);
  curves[1].points[0].distortion = NAN;
  EXPECT_NE(message(100).find("values of layer 0"), std::string::npos);
  curves[1].points.clear();
  EXPECT_NE(message(100).find("has no points"), std::string::npos);
  EXPECT_TRUE(choose_budget({}, 1, 0).points.empty());
}

}  // namespace
}  // namespace lexico
