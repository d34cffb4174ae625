// The hot loops of pursuit, each alone and on one thread, at every speed level this CPU has:
//   lexico_kernels_bench --benchmark_filter=gram
// Rates are in the unit that docs/encoder.md compares with the output of machine_limits.
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/pursuit/levels.h"
#include "kernels/pursuit/pursuit.h"

namespace {

using namespace lexico::kernels;

std::vector<float> unit_rows(int rows, int dim, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(rows) * static_cast<std::size_t>(dim));
  for (int n = 0; n < rows; ++n) {
    float* const row = values.data() + static_cast<std::ptrdiff_t>(n) * dim;
    float norm2 = 0;
    for (int k = 0; k < dim; ++k) row[k] = normal(random);
    for (int k = 0; k < dim; ++k) norm2 += row[k] * row[k];
    for (int k = 0; k < dim; ++k) row[k] /= std::sqrt(norm2);
  }
  return values;
}

struct Shape {
  int num_atoms, dim, max_atoms;
};
constexpr Shape kShapes[] = {{1024, 64, 8}, {4096, 128, 8}, {4096, 128, 32}};

// One call of pursuit on one thread, preparation apart.
class Problem {
 public:
  Problem(const Shape& shape, PursuitForm form, PursuitRule rule, int candidates, int num_signals)
      : atoms_(unit_rows(shape.num_atoms, shape.dim, 1)),
        signals_(unit_rows(num_signals, shape.dim, 2)) {
    const std::size_t count = static_cast<std::size_t>(num_signals),
                      slots = count * static_cast<std::size_t>(shape.max_atoms);
    indices_.resize(slots);
    weights_.resize(slots);
    counts_.resize(count);
    norms_.resize(count);
    problem_.num_signals = num_signals;
    problem_.num_atoms = shape.num_atoms;
    problem_.dim = shape.dim;
    problem_.max_atoms = shape.max_atoms;
    problem_.rule = rule;
    problem_.candidates = candidates;
    problem_.threads = 1;
    problem_.form = form;
    problem_.atoms = atoms_.data();
    problem_.signals = signals_.data();
    problem_.indices = indices_.data();
    problem_.weights = weights_.data();
    problem_.counts = counts_.data();
    problem_.residual_norms = norms_.data();
    plan_ = cpu::plan_pursuit(problem_, num_signals);
    workspace_.resize(plan_.workspace_bytes);
    run(false);
  }
  bool run(bool prepared) {
    return cpu::pursuit(problem_, plan_, workspace_.data(), prepared).ok();
  }

 private:
  std::vector<float> atoms_, signals_, weights_, norms_;
  std::vector<std::int32_t> indices_, counts_;
  PursuitProblem problem_;
  cpu::PursuitPlan plan_;
  std::vector<char> workspace_;
};

void use_level(benchmark::State& state, const std::string& level) {
  if (!cpu::set_pursuit_level(level.c_str()).ok()) state.SkipWithError("no such level here");
}

double multiply_adds(const Shape& shape, int num_signals) {
  return static_cast<double>(shape.num_atoms) * shape.dim * num_signals;
}

// Atoms times signals: one pick of the correlate form, everything else of a pursuit included.
void correlate(benchmark::State& state, const std::string& level, Shape shape) {
  use_level(state, level);
  constexpr int kSignals = 960;
  shape.max_atoms = 1;
  Problem problem(shape, PursuitForm::kCorrelate, PursuitRule::kOmp, 0, kSignals);
  for (auto _ : state) benchmark::DoNotOptimize(problem.run(true));
  state.counters["multiply_adds/s"] = benchmark::Counter(
      multiply_adds(shape, kSignals), benchmark::Counter::kIsIterationInvariantRate);
}

// Packing of the atoms, and the Gram matrix: what a change of the dictionary costs.
void prepare(benchmark::State& state, const std::string& level, Shape shape) {
  use_level(state, level);
  Problem problem(shape, PursuitForm::kGram, PursuitRule::kOmp, 0, 1);
  for (auto _ : state) benchmark::DoNotOptimize(problem.run(false));
  state.counters["multiply_adds/s"] = benchmark::Counter(
      multiply_adds(shape, shape.num_atoms), benchmark::Counter::kIsIterationInvariantRate);
}

// A whole pursuit in one form, the atoms prepared.
void encode(benchmark::State& state,
            const std::string& level,
            Shape shape,
            PursuitForm form,
            PursuitRule rule,
            int candidates) {
  use_level(state, level);
  constexpr int kSignals = 480;
  Problem problem(shape, form, rule, candidates, kSignals);
  for (auto _ : state) benchmark::DoNotOptimize(problem.run(true));
  state.counters["signals/s"] =
      benchmark::Counter(kSignals, benchmark::Counter::kIsIterationInvariantRate);
}

void register_all() {
  std::istringstream levels(cpu::pursuit_levels());
  for (std::string level; std::getline(levels, level, '|');) {
    for (const Shape& s : kShapes) {
      const std::string sizes = "m" + std::to_string(s.dim) + "_N" + std::to_string(s.num_atoms);
      const std::string name = level + "/" + sizes;
      if (s.max_atoms == 8) {
        benchmark::RegisterBenchmark(("correlate/" + name).c_str(), correlate, level, s);
        benchmark::RegisterBenchmark(("prepare/" + name).c_str(), prepare, level, s);
      }
      for (const PursuitForm form : {PursuitForm::kCorrelate, PursuitForm::kGram}) {
        const std::string prefix = (form == PursuitForm::kGram ? "gram/" : "again/") + name + "_s" +
                                   std::to_string(s.max_atoms);
        benchmark::RegisterBenchmark(
            (prefix + "/omp").c_str(), encode, level, s, form, PursuitRule::kOmp, 0);
        benchmark::RegisterBenchmark(
            (prefix + "/ols").c_str(), encode, level, s, form, PursuitRule::kOls, 0);
        benchmark::RegisterBenchmark(
            (prefix + "/ols-16").c_str(), encode, level, s, form, PursuitRule::kOls, 16);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
