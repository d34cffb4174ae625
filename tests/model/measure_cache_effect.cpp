// measure_cache_effect MODEL IDS LENGTH GRID {WINDOW SINKS CHUNK}...: what rounding the cache's
// vectors to multiples of GRID does to the model, as a JSON list with an object per setting.
// IDS is a file of int32, cut in sequences of LENGTH.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "lexico/cache_effect.h"
#include "lexico/files.h"
#include "lexico/language_model.h"

int main(int argc, char** argv) {
  using namespace lexico;
  if (argc < 8 || (argc - 5) % 3 != 0) return 2;
  const LanguageModel model(argv[1], "cpu", 0);
  const std::string bytes = read_file(argv[2]);
  const std::size_t length = std::strtoul(argv[3], nullptr, 10);
  const float grid = std::strtof(argv[4], nullptr);
  std::vector<std::vector<std::int32_t>> sequences;
  for (std::size_t at = 0; at + 4 * length <= bytes.size(); at += 4 * length) {
    sequences.emplace_back(length);
    std::memcpy(sequences.back().data(), bytes.data() + at, 4 * length);
  }
  const std::int64_t numbers_of_a_token = model.info().kv_heads * model.info().head_dim;
  const auto round_all = [&](int, Kind, const std::int32_t*, std::int64_t tokens, float* vectors) {
    for (std::int64_t i = 0; i < tokens * numbers_of_a_token; ++i)
      vectors[i] = grid * std::nearbyint(vectors[i] / grid);
  };
  std::vector<CacheSetting> settings;
  for (int i = 5; i < argc; i += 3)
    settings.push_back(
        {round_all, std::atoi(argv[i]), std::atoi(argv[i + 1]), std::atoi(argv[i + 2])});
  const auto start = std::chrono::steady_clock::now();
  const auto effects = measure_cache_effect(model, sequences, settings);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::fprintf(stderr, "%zu sequences, %.2f s\n", sequences.size(), took.count());
  const char* separator = "[";
  for (const CacheEffect& e : effects) {
    std::printf(
        "%s{\"tokens\": %lld, \"full_perplexity\": %.17g, \"compressed_perplexity\": %.17g, "
        "\"mean_kl\": %.17g, \"p99_kl\": %.17g}",
        separator,
        static_cast<long long>(e.tokens),
        e.full_perplexity(),
        e.compressed_perplexity(),
        e.mean_kl,
        e.p99_kl);
    separator = ", ";
  }
  std::printf("]\n");
}
