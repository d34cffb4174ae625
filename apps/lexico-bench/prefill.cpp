// lexico-bench prefill: the options, the rounds and what is printed.
#include "lexico-bench/prefill.h"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/json_text.h"
#include "common/options.h"
#include "common/program.h"
#include "lexico-bench/cache_bench.h"
#include "lexico-bench/rounds.h"
#include "lexico/encoder.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

using Json = nlohmann::ordered_json;

struct PrefillConfig {
  std::vector<std::int64_t> tokens{512, 2048};
  std::vector<int> sparsity{8};
  std::vector<std::string> format{"packed"};
  std::string key_stage = "post_rope", selection = "omp", cpu = "auto", clock = "wall";
  int layers = 32, batch = 1, kv_heads = 8, dim = 128, num_atoms = 4096, window = 128;
  int threads = 0, repeats = 5;
  double least_ms = 20;
  std::uint64_t seed = 0;
  bool json = false, turns = false;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("tokens", self.tokens, "tokens of the prompt; several are measured");
    visit("sparsity", self.sparsity, "atoms per vector (the paper's s); several are measured");
    visit("format",
          self.format,
          "packed (5-bit weights, 8-bit scale) or fp8-int16; several are measured");
    visit("key_stage", self.key_stage, "keys are coded post_rope or pre_rope");
    visit("selection", self.selection, "which atom comes next: omp, ols, or ols-N");
    visit("window", self.window, "last tokens of the prompt, which stay exact");
    visit("layers", self.layers, "of the model that the rate is also given for");
    visit("batch", self.batch, "sequences, a prompt each");
    visit("kv_heads", self.kv_heads, "heads that have keys and values");
    visit("dim", self.dim, "head dimension (the paper's m)");
    visit("num_atoms", self.num_atoms, "atoms per dictionary (the paper's N)");
    visit("threads", self.threads, "threads; 0: all of the machine");
    visit("cpu",
          self.cpu,
          "speed level: auto (the best this CPU has), generic, avx2, avx512, avx512vnni, amx");
    visit("repeats", self.repeats, "rounds over all settings; the median counts");
    visit("least_ms", self.least_ms, "one round times a setting for at least so long");
    visit("clock",
          self.clock,
          "wall, or processor: the time of all threads, which other work on the machine changes "
          "less; with one thread");
    visit("turns",
          self.turns,
          "wait for a line on stdin before each round, for a program that takes turns with this");
    visit("seed", self.seed, "of the random vectors and dictionaries");
    visit("json", self.json, "one JSON object per round and setting on stdout, then the medians");
  }

  void validate() const {
    if (tokens.empty()) throw InvalidArgument("tokens is empty, must be at least one number");
    if (sparsity.empty()) throw InvalidArgument("sparsity is empty, must be at least one number");
    if (format.empty()) throw InvalidArgument("format is empty, must be packed or fp8-int16");
    for (const std::int64_t count : tokens) at_least("tokens", count, 1);
    for (const int s : sparsity) at_least("sparsity", s, 1);
    for (const std::string& name : format)
      if (name != "packed" && name != "fp8-int16")
        throw InvalidArgument("format is '" + name + "', must be packed or fp8-int16");
    at_least("window", window, 0);
    at_least("layers", layers, 1);
    at_least("batch", batch, 1);
    at_least("kv_heads", kv_heads, 1);
    at_least("dim", dim, 4);
    at_least("num_atoms", num_atoms, 1);
    at_least("threads", threads, 0);
    at_least("repeats", repeats, 1);
    if (clock != "wall" && clock != "processor")
      throw InvalidArgument("clock is '" + clock + "', must be wall or processor");
  }
};

/// One format and sparsity; a line of the table for each number of tokens.
struct Setting {
  std::string format;
  int sparsity = 0;
  CacheCase cache;
};

int prefill(const PrefillConfig& config) {
  AttendBench bench{config.batch,
                    config.kv_heads,
                    1,
                    config.dim,
                    config.num_atoms,
                    config.window,
                    config.format.front(),
                    key_stage_from(config.key_stage),
                    config.threads,
                    config.seed,
                    Selection::from(config.selection)};
  std::vector<Setting> settings;
  for (const std::string& format : config.format) {
    for (const int sparsity : config.sparsity) {
      bench.format = format;
      settings.push_back({format, sparsity, CacheCase(bench, sparsity, 1)});
    }
  }
  const std::size_t lengths = config.tokens.size();
  std::vector<std::vector<double>> times(settings.size() * lengths);
  std::string line;
  for (int round = 0; round < config.repeats; ++round) {
    if (config.turns && !std::getline(std::cin, line)) break;
    for (std::size_t i = 0; i < times.size(); ++i) {
      if (stop_requested()) throw Interrupted("interrupted; nothing was measured");
      Setting& setting = settings[i / lengths];
      const std::int64_t tokens = config.tokens[i % lengths];
      times[i].push_back(
          setting.cache.prompt_ms(tokens, config.least_ms, config.clock == "processor"));
      if (!config.json) continue;
      std::cout << json_text(Json{{"round", round},
                                  {"tokens", tokens},
                                  {"sparsity", setting.sparsity},
                                  {"format", setting.format},
                                  {"ms", times[i].back()}},
                             -1);
    }
    std::cout << std::flush;
  }
  if (times.front().empty()) throw Interrupted("stdin ended before the first round");
  if (!config.json)
    std::cout << config.key_stage << ", " << config.selection << ", " << config.num_atoms
              << " atoms, window " << config.window << ", " << config.batch << " x "
              << config.kv_heads << " KV heads of " << config.dim << ", level " << cpu_level()
              << "\n\n"
              << "  tokens   s  format     ms per layer  fastest  slowest  vectors/s  tokens/s: a "
                 "layer  "
              << config.layers << " layers\n";
  for (std::size_t i = 0; i < times.size(); ++i) {
    const Setting& setting = settings[i / lengths];
    const std::int64_t tokens = config.tokens[i % lengths];
    const std::int64_t coded = setting.cache.coded_tokens(tokens);
    const double ms = median(times[i]);
    const double rate = 1e3 * static_cast<double>(tokens) * config.batch / ms;
    const double vectors = 2e3 * static_cast<double>(coded) * config.batch * config.kv_heads / ms;
    if (config.json) {
      std::cout << json_text(Json{{"tokens", tokens},
                                  {"coded_tokens", coded},
                                  {"sparsity", setting.sparsity},
                                  {"format", setting.format},
                                  {"key_stage", config.key_stage},
                                  {"selection", config.selection},
                                  {"window", config.window},
                                  {"batch", config.batch},
                                  {"kv_heads", config.kv_heads},
                                  {"dim", config.dim},
                                  {"num_atoms", config.num_atoms},
                                  {"threads", config.threads},
                                  {"clock", config.clock},
                                  {"level", cpu_level()},
                                  {"ms", ms},
                                  {"all_ms", times[i]},
                                  {"vectors_per_s", vectors},
                                  {"layer_tokens_per_s", rate},
                                  {"layers", config.layers},
                                  {"model_tokens_per_s", rate / config.layers}},
                             -1);
      continue;
    }
    const auto [best, worst] = std::minmax_element(times[i].begin(), times[i].end());
    char text[160];
    std::snprintf(text,
                  sizeof text,
                  "%8lld %3d  %-9s  %12.1f %8.1f %8.1f  %9s  %17s  %s\n",
                  static_cast<long long>(tokens),
                  setting.sparsity,
                  setting.format.c_str(),
                  ms,
                  *best,
                  *worst,
                  format_count(vectors).c_str(),
                  format_count(rate).c_str(),
                  format_count(rate / config.layers).c_str());
    std::cout << text;
  }
  return 0;
}

}  // namespace

int prefill_main(int argc, char** argv) {
  PrefillConfig config;
  std::vector<Option> options = options_of(config);
  const ProgramInfo program{
      "lexico-bench prefill",
      "Times the compression of a prompt in a compressed cache, of random vectors: milliseconds "
      "per\n"
      "layer, every call with the dictionaries of another layer, and tokens per second for a "
      "layer\n"
      "and for a model. bench/prefill_against_torch.py compares it with the dense attention of "
      "the\n"
      "same prompt in turns.",
      "Examples:\n"
      "  lexico-bench prefill --tokens 512,4096 --sparsity 4,8,16 --threads 2\n"
      "  lexico-bench prefill --format packed --format fp8-int16 --key-stage pre_rope --json",
      "",
      {},
      ""};
  if (!parse_command_line(program, options, argc, argv)) return 0;
  config.validate();
  use_cpu_level(config.cpu);
  watch_stop_signals();
  return prefill(config);
}

}  // namespace lexico::apps
