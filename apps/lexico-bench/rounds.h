#pragma once

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <string>
#include <vector>

namespace lexico::apps {

/// Milliseconds of one call: the mean over as many as take `least_ms`, one at least.
/// @param processor  processor time of all threads in place of wall time
template <typename Call>
double ms_per_call(double least_ms, bool processor, Call&& call) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  const std::clock_t processor_begin = std::clock();
  const auto wall_ms = [&] {
    return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
  };
  int calls = 0;
  do {
    call();
    ++calls;
  } while (wall_ms() < least_ms);
  const double ms = processor
                        ? 1e3 * static_cast<double>(std::clock() - processor_begin) / CLOCKS_PER_SEC
                        : wall_ms();
  return ms / calls;
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return 0.5 * (values[(values.size() - 1) / 2] + values[values.size() / 2]);
}

/// Encoders and attention made from now on run at this speed level; "auto": the best of this CPU.
inline void use_cpu_level(const std::string& level) {
  if (level == "auto") {
    unsetenv("LEXICO_CPU");
  } else {
    setenv("LEXICO_CPU", level.c_str(), 1);
  }
}

}  // namespace lexico::apps
