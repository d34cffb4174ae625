// Times the encoder on one case.
#include "lexico-bench/encode_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>

#include "lexico-bench/exact_pursuit.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

double norm(const float* x, int dim) {
  double norm2 = 0;
  for (int k = 0; k < dim; ++k) norm2 += double{x[k]} * x[k];
  return std::sqrt(norm2);
}

// One setting with what it keeps between repeats.
struct Run {
  std::optional<Encoder> encoder;  // one setting at a time has scratch
  SparseCodes codes;               // of one batch
  EncodeResult result;
};

// All batches of the case once; visit(first signal, codes) after each, outside the time that is
// returned.
template <typename Visit>
double encode_all(
    Run& run, const BenchCase& c, std::int64_t batch_size, bool curve, Visit&& visit) {
  using Clock = std::chrono::steady_clock;
  double seconds = 0;
  auto begin = Clock::now();
  run.encoder->set_atoms(c.atoms, 1, c.num_atoms, c.dim);
  for (std::int64_t first = 0; first < c.num_signals; first += batch_size) {
    const std::int64_t count = std::min(batch_size, c.num_signals - first);
    run.encoder->encode(c.signals + first * c.dim, count, run.codes, curve);
    seconds += std::chrono::duration<double>(Clock::now() - begin).count();
    visit(first, count);
    begin = Clock::now();
  }
  return seconds;
}

// What the codes are worth; not timed.
void measure_quality(Run& run,
                     const BenchCase& c,
                     std::int64_t batch_size,
                     const EncodeBench& bench) {
  EncodeResult& result = run.result;
  const int s = result.options.max_atoms;
  double errors = 0, atoms = 0, our_errors = 0, exact_errors = 0;
  std::int64_t finite = 0, identical = 0;
  result.curve.assign(bench.curve ? static_cast<std::size_t>(s) : 0, 0.0);
  encode_all(run, c, batch_size, bench.curve, [&](std::int64_t first, std::int64_t count) {
    const SparseCodes& codes = run.codes;
    std::vector<double> sizes(static_cast<std::size_t>(count));
    for (std::int64_t b = 0; b < count; ++b) {
      const std::size_t i = static_cast<std::size_t>(b);
      sizes[i] = norm(c.signals + (first + b) * c.dim, c.dim) + 1e-8;
      if (std::isnan(codes.residual_norms[i])) {
        ++result.not_finite;
        continue;
      }
      ++finite;
      errors += codes.residual_norms[i] / sizes[i];
      atoms += codes.counts[i];
      for (std::size_t k = 0; k < result.curve.size(); ++k)
        result.curve[k] += codes.curve[i * static_cast<std::size_t>(s) + k] / sizes[i];
    }
    const std::int64_t check = std::clamp<std::int64_t>(bench.check - first, 0, count);
    std::int64_t same = 0;
    double ours = 0, exact = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : same, ours, exact)
    for (std::int64_t b = 0; b < check; ++b) {
      const std::size_t i = static_cast<std::size_t>(b);
      if (std::isnan(codes.residual_norms[i])) continue;
      const ExactCode code = exact_pursuit(
          c.atoms, c.num_atoms, c.dim, c.signals + (first + b) * c.dim, result.options);
      const auto picks = codes.indices.begin() + b * s;
      same += std::equal(picks, picks + codes.counts[i], code.atoms.begin(), code.atoms.end());
      ours += codes.residual_norms[i] / sizes[i];
      exact += code.residual_norm / sizes[i];
    }
    result.checked += check;
    identical += same;
    our_errors += ours;
    exact_errors += exact;
  });
  const double n = static_cast<double>(std::max<std::int64_t>(finite, 1));
  result.mean_relative_error = errors / n;
  result.mean_atoms = atoms / n;
  for (double& error : result.curve) error /= n;
  if (result.checked > 0) {
    result.identical = static_cast<double>(identical) / static_cast<double>(result.checked);
    result.error_ratio = exact_errors > 0 ? our_errors / exact_errors : 1;
  }
  result.workspace_bytes = run.encoder->workspace_bytes(batch_size);
}

}  // namespace

std::vector<EncodeResult> bench_encode(const BenchCase& c,
                                       const std::vector<EncodeOptions>& settings,
                                       const EncodeBench& bench,
                                       const std::function<bool()>& keep_on) {
  const std::int64_t batch_size =
      bench.batch_size > 0 ? std::min(bench.batch_size, c.num_signals) : c.num_signals;
  const auto check_stop = [&] {
    if (!keep_on()) throw Interrupted("interrupted; nothing was measured");
  };
  const auto nothing = [](std::int64_t, std::int64_t) {};
  std::vector<Run> runs(settings.size());
  for (std::size_t i = 0; i < runs.size(); ++i) {
    check_stop();
    runs[i].result.options = settings[i];
    runs[i].encoder.emplace(settings[i]);
    measure_quality(runs[i], c, batch_size, bench);  // also warms up
    if (runs.size() > 1) runs[i].encoder.reset();
  }
  for (int repeat = 0; repeat < bench.repeats; ++repeat) {
    for (Run& run : runs) {
      check_stop();
      const bool warm = run.encoder.has_value();
      if (!warm) {
        run.encoder.emplace(run.result.options);
        encode_all(run, c, batch_size, false, nothing);
      }
      run.result.seconds.push_back(encode_all(run, c, batch_size, false, nothing));
      if (!warm) run.encoder.reset();
    }
  }
  std::vector<EncodeResult> results;
  for (Run& run : runs) {
    std::vector<double> sorted = run.result.seconds;
    std::sort(sorted.begin(), sorted.end());
    const double median = 0.5 * (sorted[(sorted.size() - 1) / 2] + sorted[sorted.size() / 2]);
    run.result.vectors_per_s = static_cast<double>(c.num_signals) / median;
    results.push_back(std::move(run.result));
  }
  return results;
}

}  // namespace lexico::apps
