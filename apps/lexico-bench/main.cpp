// lexico-bench: how fast the parts of lexico run on this machine.
#include <sys/resource.h>

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string_view>

#include "common/json_text.h"
#include "common/options.h"
#include "common/program.h"
#include "lexico-bench/attend.h"
#include "lexico-bench/bench_case.h"
#include "lexico-bench/encode_bench.h"
#include "lexico-bench/prefill.h"
#include "lexico-bench/rounds.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

using Json = nlohmann::ordered_json;

struct Config {
  std::string case_file, cpu = "auto", device = "cpu";
  std::vector<std::string> selection{"omp"};
  std::vector<int> threads{0};
  int num_atoms = 1024, dim = 64, sparsity = 8, repeats = 5;
  std::int64_t num_signals = 16384, batch_size = 0, check = 0;
  double tolerance = 0;
  std::uint64_t seed = 0;
  bool curve = false, json = false;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("case",
          self.case_file,
          ".safetensors file with `atoms` [N, m] (unit rows) and `signals` [B, m]; none: random "
          "ones");
    visit("num_signals",
          self.num_signals,
          "signals to encode; of a file the first so many; 0: all there are");
    visit("num_atoms", self.num_atoms, "atoms of the random case (the paper's N)");
    visit("dim", self.dim, "dimension of the random case (the paper's m)");
    visit("seed", self.seed, "of the random case");
    visit("sparsity", self.sparsity, "atoms per signal at most (the paper's s)");
    visit("tolerance",
          self.tolerance,
          "stop a signal once |residual| <= tolerance * |signal|; 0: never");
    visit("selection",
          self.selection,
          "which atom comes next: omp, ols, or ols-N (OLS among the N best, or all of up to 64 N); "
          "several are compared");
    visit("threads", self.threads, "threads; 0: all of the machine; several are compared");
    visit("batch_size", self.batch_size, "signals per call; 0: all at once");
    visit("cpu",
          self.cpu,
          "speed level: auto (the best this CPU has), generic, avx2, avx512, avx512vnni, amx");
    visit("device",
          self.device,
          "where to encode: cpu, cuda or cuda:N (copies from and to the host are timed with it)");
    visit("repeats", self.repeats, "timed runs of each setting, interleaved; the median counts");
    visit("check",
          self.check,
          "encode so many signals in double precision too and compare the atoms");
    visit("curve", self.curve, "also give the mean relative error after every atom");
    visit("json", self.json, "one JSON object per setting and line on stdout");
  }

  void validate() const {
    at_least("num_signals", num_signals, case_file.empty() ? 1 : 0);
    at_least("num_atoms", num_atoms, 1);
    at_least("dim", dim, 1);
    at_least("sparsity", sparsity, 1);
    at_least("repeats", repeats, 1);
    at_least("batch_size", batch_size, 0);
    at_least("check", check, 0);
    if (selection.empty()) throw InvalidArgument("selection is empty, must be omp, ols or ols-N");
    if (threads.empty()) throw InvalidArgument("threads is empty, must be at least one number");
    if (static_cast<double>(num_atoms) * dim > 1e9 || static_cast<double>(num_signals) * dim > 1e11)
      throw InvalidArgument("a case of " + std::to_string(num_atoms) + " atoms and " +
                            std::to_string(num_signals) + " signals of dimension " +
                            std::to_string(dim) + " is too large");
  }
};

std::size_t peak_memory_bytes() {
  struct rusage usage {};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::size_t>(usage.ru_maxrss) * 1024;
}

Json to_json(const Config& config,
             const BenchCase& c,
             const EncodeResult& r,
             std::size_t peak_bytes) {
  Json json{{"case", c.name},
            {"num_atoms", c.num_atoms},
            {"dim", c.dim},
            {"num_signals", c.num_signals},
            {"sparsity", r.options.max_atoms},
            {"selection", r.options.selection.name()},
            {"threads", r.options.threads},
            {"device", r.options.device},
            {"level", cpu_level()},
            {"vectors_per_s", r.vectors_per_s},
            {"seconds", r.seconds},
            {"mean_relative_error", r.mean_relative_error},
            {"mean_atoms", r.mean_atoms},
            {"not_finite", r.not_finite},
            {"workspace_bytes", r.workspace_bytes},
            {"input_bytes", c.input_bytes},
            {"peak_memory_bytes", peak_bytes},
            {"version", lexico_version()}};
  if (config.tolerance > 0) json["tolerance"] = config.tolerance;
  if (config.curve) json["curve"] = r.curve;
  if (r.checked > 0)
    json["check"] = {{"signals", r.checked},
                     {"identical_sequences", r.identical},
                     {"error_ratio", r.error_ratio}};
  return json;
}

std::string padded(std::string text, std::size_t width) {
  text.resize(std::max(text.size(), width), ' ');
  return text;
}

std::string fixed(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

void print_table(const BenchCase& c,
                 const std::vector<EncodeResult>& results,
                 std::size_t peak_bytes) {
  std::cout << c.name << ": " << c.num_signals << " signals of dimension " << c.dim << ", "
            << c.num_atoms << " atoms, s = " << results.front().options.max_atoms << ", level "
            << cpu_level() << "\n\n"
            << "selection  threads  vectors/s   slowest    fastest    mean error  scratch\n";
  for (const EncodeResult& r : results) {
    const auto [best, worst] = std::minmax_element(r.seconds.begin(), r.seconds.end());
    const double n = static_cast<double>(c.num_signals);
    std::cout << padded(r.options.selection.name(), 11)
              << padded(r.options.threads == 0 ? "all" : std::to_string(r.options.threads), 9)
              << padded(format_count(r.vectors_per_s), 12) << padded(format_count(n / *worst), 11)
              << padded(format_count(n / *best), 11)
              << padded(fixed("%.5f", r.mean_relative_error), 12)
              << format_bytes(static_cast<double>(r.workspace_bytes)) << '\n';
  }
  for (const EncodeResult& r : results) {
    const std::string name = r.options.selection.name();
    if (r.checked > 0)
      std::cout << name << ": the atoms of " << fixed("%.2f", 100 * r.identical) << " % of "
                << r.checked << " signals are those of double precision, the error is "
                << fixed("%.6f", r.error_ratio) << " of its\n";
    if (r.not_finite > 0)
      std::cout << name << ": " << r.not_finite << " signals hold a NaN or Inf and got no atoms\n";
    if (r.curve.empty()) continue;
    std::cout << name << ", mean error after each atom:";
    for (const double error : r.curve) std::cout << ' ' << fixed("%.5f", error);
    std::cout << '\n';
  }
  std::cout << "peak memory " << format_bytes(static_cast<double>(peak_bytes)) << ", the input "
            << format_bytes(static_cast<double>(c.input_bytes)) << " of it\n";
}

int encode(const Config& config) {
  std::vector<EncodeOptions> settings;
  for (const std::string& selection : config.selection) {
    for (const int threads : config.threads) {
      EncodeOptions options;
      options.max_atoms = config.sparsity;
      options.relative_tolerance = static_cast<float>(config.tolerance);
      options.selection = Selection::from(selection);
      options.threads = threads;
      options.device = config.device;
      (void)Encoder(options);  // says what is wrong before a long case is read
      settings.push_back(options);
    }
  }
  const BenchCase bench_case =
      config.case_file.empty()
          ? random_case(config.num_atoms, config.dim, config.num_signals, config.seed)
          : read_case(config.case_file, config.num_signals);
  if (const int limit = std::min(bench_case.num_atoms, bench_case.dim); config.sparsity > limit)
    throw InvalidArgument("sparsity is " + std::to_string(config.sparsity) + ", must be in [1, " +
                          std::to_string(limit) + "]: the case has " +
                          std::to_string(bench_case.num_atoms) + " atoms of dimension " +
                          std::to_string(bench_case.dim));
  const EncodeBench bench{config.repeats, config.batch_size, config.check, config.curve};
  const std::vector<EncodeResult> results =
      bench_encode(bench_case, settings, bench, [] { return !stop_requested(); });
  const std::size_t peak_bytes = peak_memory_bytes();
  if (config.json) {
    for (const EncodeResult& result : results)
      std::cout << json_text(to_json(config, bench_case, result, peak_bytes), -1);
  } else {
    print_table(bench_case, results, peak_bytes);
  }
  return 0;
}

constexpr const char* kUsage =
    "lexico-bench measures how fast parts of lexico run on this machine.\n\n"
    "Usage: lexico-bench encode|attend|prefill [options]\n\n"
    "  encode    sparse coding: vectors per second, error, memory\n"
    "  attend    attention on codes: time per token and layer\n"
    "  prefill   compression of a prompt: time per layer, tokens per second\n\n"
    "--help after either lists the options.\n";

int main_body(int argc, char** argv) {
  const std::string_view command = argc > 1 ? argv[1] : "";
  if (command == "--help" || command == "-h") {
    std::cout << kUsage;
    return 0;
  }
  if (command == "--version") {
    std::cout << "lexico-bench " << lexico_version() << '\n';
    return 0;
  }
  if (command == "attend") return attend_main(argc - 1, argv + 1);
  if (command == "prefill") return prefill_main(argc - 1, argv + 1);
  if (command != "encode") {
    throw InvalidArgument((command.empty()
                               ? std::string("what is to be measured is missing")
                               : "'" + std::string(command) + "' is nothing to measure") +
                          ", must be: encode, attend or prefill (see --help)");
  }
  Config config;
  std::vector<Option> options = options_of(config);
  const ProgramInfo program{"lexico-bench encode",
                            "Encodes a case repeatedly and prints vectors per second (preparation "
                            "of the atoms included),\n"
                            "mean relative error |x - D y| / |x| and memory. Rates differ from "
                            "machine to machine and from\n"
                            "hour to hour: quote ratios of runs that took turns.",
                            "Examples:\n"
                            "  lexico-bench encode --num-atoms 4096 --dim 128 --threads 1,2\n"
                            "  lexico-bench encode --case case.safetensors --sparsity 8 "
                            "--selection omp ols ols-16 --json\n"
                            "  lexico-bench encode --case case.safetensors --cpu avx2 --check 1000",
                            "",
                            {},
                            ""};
  if (!parse_command_line(program, options, argc - 1, argv + 1)) return 0;
  config.validate();
  use_cpu_level(config.cpu);
  watch_stop_signals();
  return encode(config);
}

}  // namespace
}  // namespace lexico::apps

int main(int argc, char** argv) {
  return lexico::apps::run_program("lexico-bench",
                                   [&] { return lexico::apps::main_body(argc, argv); });
}
