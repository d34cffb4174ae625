#pragma once

#include <vector>

namespace lexico::detail {

/// Levels that quantize a set of numbers, ascending, and the mean squared error they leave.
struct Levels {
  std::vector<float> values;
  double distortion = 0;
};

/// Lloyd-Max levels of 0, 1, ... `max_bits` bits, found by splitting those of one bit less (Linde,
/// Buzo and Gray 1980). Numbers with few distinct values give equal levels.
/// @param numbers  finite, not empty; sorted on return.
std::vector<Levels> lloyd_max(std::vector<float>& numbers, int max_bits);

/// Index of the level nearest to `value`, of ascending `levels`; ties go to the lower one.
int nearest_level(const float* levels, int num_levels, float value);

/// Mean squared error of Lloyd-Max levels of so many bits for a Gaussian of unit variance; bits up
/// to 9.
double gaussian_distortion(int bits);
/// The levels themselves.
const std::vector<float>& gaussian_levels(int bits);

}  // namespace lexico::detail
