// lexico-bench attend: the options, the rounds and what is printed.
#include "lexico-bench/attend.h"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "common/json_text.h"
#include "common/options.h"
#include "common/program.h"
#include "lexico-bench/attend_bench.h"
#include "lexico-bench/cache_bench.h"
#include "lexico-bench/rounds.h"
#include "lexico/encoder.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

using Json = nlohmann::ordered_json;

struct AttendConfig {
  std::vector<std::int64_t> context{1024, 4096, 16384, 32768};
  std::vector<int> sparsity{8};
  std::string format = "packed", key_stage = "post_rope", cpu = "auto", clock = "wall",
              device = "cpu";
  int batch = 1, kv_heads = 8, group = 4, dim = 128, num_atoms = 4096, window = 128;
  int threads = 0, repeats = 5, compress_chunk = 32, value_tile_tokens = 0;
  double least_ms = 20;
  std::uint64_t seed = 0;
  bool json = false, turns = false, half_tables = false;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("context", self.context, "tokens of each sequence; several are measured");
    visit("sparsity", self.sparsity, "atoms per vector (the paper's s); several are measured");
    visit("format", self.format, "packed (5-bit weights, 8-bit scale) or fp8-int16");
    visit("key_stage", self.key_stage, "keys are coded post_rope or pre_rope");
    visit("window", self.window, "tokens of the context that are exact");
    visit("batch", self.batch, "sequences");
    visit("kv_heads", self.kv_heads, "heads that have keys and values");
    visit("group", self.group, "query heads per KV head");
    visit("dim", self.dim, "head dimension (the paper's m)");
    visit("num_atoms", self.num_atoms, "atoms per dictionary (the paper's N)");
    visit("threads", self.threads, "threads; 0: all of the machine");
    visit("cpu", self.cpu, "speed level: auto (the best this CPU has), generic, avx2, avx512");
    visit("device",
          self.device,
          "cpu, cuda or cuda:1; on a GPU a call ends when its result is there");
    visit("value_tile_tokens",
          self.value_tile_tokens,
          "on a GPU: values of so many tokens are sorted by atom; a multiple of 64, 0: none");
    visit("half_tables", self.half_tables, "on a GPU: products and softmax weights in half floats");
    visit("repeats", self.repeats, "rounds over all settings; the median counts");
    visit("least_ms", self.least_ms, "one round times a setting for at least so long");
    visit("clock",
          self.clock,
          "wall, or processor: the time of all threads, which other work on the machine changes "
          "less; with one thread");
    visit("compress_chunk",
          self.compress_chunk,
          "also time the appending of new tokens to the cache, of which so many are compressed "
          "together (the paper's n_a); 0: do not");
    visit("turns",
          self.turns,
          "wait for a line on stdin before each round, for a program that takes turns with this");
    visit("seed", self.seed, "of the random codes");
    visit("json", self.json, "one JSON object per round and setting on stdout, then the medians");
  }

  void validate() const {
    if (context.empty()) throw InvalidArgument("context is empty, must be at least one number");
    if (sparsity.empty()) throw InvalidArgument("sparsity is empty, must be at least one number");
    for (const std::int64_t tokens : context) at_least("context", tokens, 1);
    for (const int s : sparsity) at_least("sparsity", s, 1);
    at_least("window", window, 0);
    at_least("batch", batch, 1);
    at_least("kv_heads", kv_heads, 1);
    at_least("group", group, 1);
    at_least("dim", dim, 4);
    at_least("num_atoms", num_atoms, 1);
    at_least("threads", threads, 0);
    at_least("repeats", repeats, 1);
    at_least("compress_chunk", compress_chunk, 0);
    if (clock != "wall" && clock != "processor")
      throw InvalidArgument("clock is '" + clock + "', must be wall or processor");
    if (format == "exact") throw InvalidArgument("format is 'exact', must be packed or fp8-int16");
  }
};

Json to_json(const AttendConfig& config, const AttendCase& c) {
  return {{"context", c.context()},
          {"sparsity", c.sparsity()},
          {"format", config.format},
          {"key_stage", config.key_stage},
          {"window", config.window},
          {"batch", config.batch},
          {"kv_heads", config.kv_heads},
          {"group", config.group},
          {"dim", config.dim},
          {"num_atoms", config.num_atoms},
          {"threads", config.threads},
          {"clock", config.clock},
          {"device", config.device},
          {"value_tile_tokens", config.value_tile_tokens},
          {"half_tables", config.half_tables},
          {"level", cpu_level()},
          {"layers", c.layers()},
          {"coded_bytes", c.coded_bytes()},
          {"workspace_bytes", c.workspace_bytes()}};
}

int attend(const AttendConfig& config) {
  AttendBench bench{config.batch,
                    config.kv_heads,
                    config.group,
                    config.dim,
                    config.num_atoms,
                    config.window,
                    config.format,
                    key_stage_from(config.key_stage),
                    config.threads,
                    config.seed,
                    {},
                    config.device,
                    config.value_tile_tokens,
                    config.half_tables};
  const bool processor = config.clock == "processor";
  std::vector<AttendCase> cases;
  std::vector<CacheCase> caches;  // per sparsity, if appending is timed
  for (const int sparsity : config.sparsity) {
    if (config.compress_chunk > 0) caches.emplace_back(bench, sparsity, config.compress_chunk);
    for (const std::int64_t context : config.context) {
      if (stop_requested()) throw Interrupted("interrupted; nothing was measured");
      cases.emplace_back(bench, context, sparsity);
    }
  }
  std::vector<std::vector<double>> times(cases.size()), append_times(caches.size());
  std::string line;
  for (int round = 0; round < config.repeats; ++round) {
    if (config.turns && !std::getline(std::cin, line)) break;
    for (std::size_t i = 0; i < caches.size(); ++i)
      append_times[i].push_back(caches[i].step_ms(config.least_ms, processor));
    for (std::size_t i = 0; i < cases.size(); ++i) {
      if (stop_requested()) throw Interrupted("interrupted; nothing was measured");
      times[i].push_back(cases[i].time(config.least_ms, processor));
      if (!config.json) continue;
      std::cout << json_text(Json{{"round", round},
                                  {"context", cases[i].context()},
                                  {"sparsity", cases[i].sparsity()},
                                  {"ms", times[i].back()}},
                             -1);
    }
    std::cout << std::flush;
  }
  if (times.front().empty()) throw Interrupted("stdin ended before the first round");
  if (!config.json)
    std::cout
        << config.key_stage << ", " << config.format << ", " << config.num_atoms
        << " atoms, window " << config.window << ", " << config.batch << " x " << config.kv_heads
        << " KV heads of " << config.group << " x " << config.dim << ", "
        << (config.device == "cpu" ? "level " + cpu_level() : config.device) << "\n\n"
        << " context   s   ms per token  fastest  slowest  appending   layer's codes  scratch\n";
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const AttendCase& c = cases[i];
    const auto [best, worst] = std::minmax_element(times[i].begin(), times[i].end());
    const double append_ms = caches.empty() ? 0.0 : median(append_times[i / config.context.size()]);
    if (config.json) {
      Json json = to_json(config, c);
      json["ms"] = median(times[i]);
      json["all_ms"] = times[i];
      if (!caches.empty()) {
        json["compress_chunk"] = config.compress_chunk;
        json["append_ms"] = append_ms;
        json["all_append_ms"] = append_times[i / config.context.size()];
      }
      std::cout << json_text(json, -1);
      continue;
    }
    char text[160];
    std::snprintf(text,
                  sizeof text,
                  "%8lld %3d  %12.3f %8.3f %8.3f %10.3f  %14s  %s\n",
                  static_cast<long long>(c.context()),
                  c.sparsity(),
                  median(times[i]),
                  *best,
                  *worst,
                  append_ms,
                  format_bytes(static_cast<double>(c.coded_bytes())).c_str(),
                  format_bytes(static_cast<double>(c.workspace_bytes())).c_str());
    std::cout << text;
  }
  return 0;
}

}  // namespace

int attend_main(int argc, char** argv) {
  AttendConfig config;
  std::vector<Option> options = options_of(config);
  const ProgramInfo program{
      "lexico-bench attend",
      "Times decode attention of one layer on random codes: milliseconds per token and layer, the\n"
      "products with the dictionaries included, every call with the codes and dictionaries of\n"
      "another layer; and the appending of new tokens to a compressed cache, the mean over steps "
      "with\n"
      "and without compression. bench/attend_against_torch.py compares it with dense attention in "
      "turns.",
      "Examples:\n"
      "  lexico-bench attend --context 1024,32768 --sparsity 4,8,16 --threads 2\n"
      "  lexico-bench attend --key-stage pre_rope --sparsity 4 --json",
      "",
      {},
      ""};
  if (!parse_command_line(program, options, argc, argv)) return 0;
  config.validate();
  use_cpu_level(config.cpu);
  watch_stop_signals();
  return attend(config);
}

}  // namespace lexico::apps
