// What a run would do, and how long it would take.
#include "lexico-eval/plan.h"

#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>

#include "common/json_text.h"
#include "common/program.h"
#include "common/report/text.h"
#include "lexico-eval/perplexity.h"
#include "lexico/evaluation.h"

namespace lexico::apps {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

namespace {

Json settings_json(const std::vector<CacheSettings>& caches,
                   const LanguageModel& model,
                   const std::vector<TextLengths>& texts) {
  Json all = Json::array();
  for (const TextLengths& text : texts)
    for (const CacheSettings& cache : caches)
      all.push_back({{"dataset", text.name},
                     {"coder", cache.coder},
                     {"split", cache.split},
                     {"key_bits", cache.mean_bits(Kind::kKeys, model.info())},
                     {"value_bits", cache.mean_bits(Kind::kValues, model.info())},
                     {"key_atoms", cache.key_atoms},
                     {"value_atoms", cache.value_atoms},
                     {"recent_window", cache.recent_window},
                     {"sink_tokens", cache.sink_tokens},
                     {"adaptive_threshold", cache.adaptive_threshold},
                     {"bytes", cache_bytes(cache, model.info(), text)},
                     {"full_bytes", full_bytes(model.info(), text)}});
  return all;
}

}  // namespace

void print_plan(const std::vector<Contender>& contenders,
                std::vector<NamedSource>& sources,
                const MeasureOptions& options,
                const std::vector<CacheSettings>& caches,
                const TextTools& tools,
                const std::vector<TextLengths>& texts,
                bool as_json) {
  double encodes = 0, most_rows = 0;
  Json plan{{"data", Json::array()}};
  for (const NamedSource& source : sources) {
    const auto tokens = chosen_tokens(*source.source, options.max_vectors);
    const double rows = static_cast<double>(tokens.size()) * source.source->info().kv_heads;
    for (const Contender& contender : contenders)
      encodes += rows * static_cast<double>(contender.set.dictionaries.size());
    most_rows = std::max(most_rows, rows);
    plan["data"].push_back({{"name", source.spec.name},
                            {"path", source.spec.path},
                            {"in_domain", source.spec.in_domain},
                            {"tokens", source.source->info().num_tokens},
                            {"vectors_per_layer_and_kind", static_cast<std::int64_t>(rows)},
                            {"sampling", source.source->sampling(tokens)}});
  }
  // A short probe: what one token costs to get, and one vector to encode.
  double read_seconds = 0, encode_seconds = 0;
  Evaluator evaluator(options.sparsities, options.encode);
  for (NamedSource& source : sources) {
    const auto wanted = chosen_tokens(*source.source, options.max_vectors);
    const auto probe = source.source->choose(
        std::min<std::int64_t>(512, static_cast<std::int64_t>(wanted.size())));
    const auto begin = Clock::now();
    double encoding = 0, measured = 0;
    source.source->read(
        probe,
        options.layers,
        [&](int layer, Kind kind, const std::int64_t*, std::int64_t count, const float* rows) {
          const Dictionary* dictionary = contenders.front().set.find(layer, kind);
          if (!dictionary || measured > 0) return;
          evaluator.use(*dictionary);
          RelativeErrors errors(options.sparsities);
          const auto from = Clock::now();
          evaluator.measure(rows, count * source.source->info().kv_heads, errors);
          encoding = std::chrono::duration<double>(Clock::now() - from).count();
          measured = static_cast<double>(count * source.source->info().kv_heads);
        });
    const double all = std::chrono::duration<double>(Clock::now() - begin).count();
    if (source.spec.is_text)
      read_seconds +=
          (all - encoding) / static_cast<double>(probe.size()) * static_cast<double>(wanted.size());
    if (measured > 0) encode_seconds = std::max(encode_seconds, encoding / measured);
  }
  const double seconds = read_seconds + encode_seconds * encodes;
  const double error_bytes = 4 * most_rows * static_cast<double>(options.sparsities.size()) *
                             static_cast<double>(contenders.size());
  plan["encodes"] = encodes;
  plan["memory_bytes"] = 6e8 + error_bytes * 2 * static_cast<double>(options.layers.size());
  plan["seconds"] = seconds;
  if (as_json && !caches.empty()) plan["perplexity"] = settings_json(caches, *tools.model, texts);
  if (as_json) {
    std::cout << json_text(plan);
    return;
  }
  std::cout << "Plan (nothing is written)\n";
  for (const Json& data : plan["data"])
    std::cout << "  " << report::pad_right(data["name"].get<std::string>(), 12) << "  "
              << (data["in_domain"].get<bool>() ? "in domain,     " : "out of domain, ")
              << report::grouped(data["vectors_per_layer_and_kind"].get<std::int64_t>())
              << " vectors per layer and kind: " << data["sampling"].get<std::string>() << '\n';
  std::cout << "  " << contenders.size()
            << (contenders.size() == 1 ? " dictionary, " : " dictionaries and baselines, ")
            << options.layers.size() << " layers: " << format_count(encodes) << " pursuits of "
            << options.sparsities.back() << " atoms\n  memory        about "
            << format_bytes(plan["memory_bytes"].get<double>()) << "\n  time          about "
            << format_duration(seconds) << " (from a short probe)\n";
  if (!caches.empty()) std::cout << settings_text(caches, tools.model->info(), texts);
}

}  // namespace lexico::apps
