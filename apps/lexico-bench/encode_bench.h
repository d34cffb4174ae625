#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "lexico-bench/bench_case.h"
#include "lexico/encoder.h"

namespace lexico::apps {

struct EncodeBench {
  int repeats = 5;
  std::int64_t batch_size = 0;  ///< signals per call; 0: all
  std::int64_t check = 0;       ///< so many signals are also encoded in double and compared
  bool curve = false;
};

struct EncodeResult {
  EncodeOptions options;
  std::vector<double> seconds;  ///< of each repeat, preparation of the atoms included
  double vectors_per_s = 0;     ///< of the median repeat
  double mean_relative_error = 0, mean_atoms = 0;
  std::int64_t not_finite =
      0;  ///< signals that hold a NaN or Inf: they get no atoms and do not count
  std::vector<double> curve;  ///< mean relative error after 1, 2, ... atoms
  std::size_t workspace_bytes = 0;
  // Against double precision, over the first `checked` signals:
  std::int64_t checked = 0;
  double identical = 0;    ///< share of signals with the same atoms in the same order
  double error_ratio = 0;  ///< of the mean relative errors, ours / double
};

/// Times every setting on the case; repeats of all settings are interleaved, so that a machine that
/// changes its pace changes it for all. @param keep_on  asked between runs; false throws
/// Interrupted.
std::vector<EncodeResult> bench_encode(const BenchCase& bench_case,
                                       const std::vector<EncodeOptions>& settings,
                                       const EncodeBench& bench,
                                       const std::function<bool()>& keep_on);

}  // namespace lexico::apps
