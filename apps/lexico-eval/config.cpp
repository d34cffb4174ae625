#include "lexico-eval/config.h"

#include <algorithm>
#include <cmath>

#include "common/options.h"
#include "lexico/encoder.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

template <typename T>
[[noreturn]] void throw_bound(const char* key, T value, const char* bound) {
  throw InvalidArgument(std::string(key) + " is " + value_text(value) + ", must be " + bound);
}

template <typename T>
void sort_each_once(std::vector<T>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

constexpr int kMostPositions = 1 << 24;

}  // namespace

void EvalConfig::validate() {
  if (dictionary.empty())
    throw InvalidArgument("dictionary is missing: --dictionary FILE_OR_RUN_FOLDER");
  if (data.empty() && text.empty() && token_ids.empty() && ood.empty())
    throw InvalidArgument("data is missing: --data PATH (activations or text), --ood PATH");
  if (sparsity.empty()) throw InvalidArgument("sparsity is empty, must name at least one");
  sort_each_once(sparsity);
  if (sparsity.front() < 1) throw_bound("sparsity", sparsity.front(), ">= 1");
  for (const double rate : bits)
    if (!(rate > 0 && rate <= 16)) throw_bound("bits", rate, "in (0, 16]");
  if (sparse_autoencoder && fit.empty())
    throw InvalidArgument("sparse_autoencoder needs data to learn from: --fit ACTIVATIONS");
  if (autoencoder_vectors < 0) throw_bound("autoencoder_vectors", autoencoder_vectors, ">= 0");
  if (fit_vectors < 256) throw_bound("fit_vectors", fit_vectors, ">= 256");
  sort_each_once(recent_window);
  sort_each_once(sink_tokens);
  sort_each_once(adaptive_threshold);
  if (sink_tokens.empty()) sink_tokens = {0};
  if (adaptive_threshold.empty()) adaptive_threshold = {0};
  for (const int window : recent_window)
    if (window < 0 || window > kMostPositions) throw_bound("recent_window", window, "in [0, 2^24]");
  for (const int sinks : sink_tokens)
    if (sinks < 0 || sinks > kMostPositions) throw_bound("sink_tokens", sinks, "in [0, 2^24]");
  for (const double threshold : adaptive_threshold)
    if (!(threshold >= 0 && std::isfinite(threshold)))
      throw_bound("adaptive_threshold", threshold, ">= 0");
  if (adaptive_atoms < 1 || adaptive_atoms > 1 << 16)
    throw_bound("adaptive_atoms", adaptive_atoms, "in [1, 65536]");
  if (compress_chunk < 1 || compress_chunk > kMostPositions)
    throw_bound("compress_chunk", compress_chunk, "in [1, 2^24]");
  for (const std::string& name : coding)
    if (name != "file" && name != "fp8-int16" && name != "fitted")
      throw InvalidArgument("coding is '" + name + "', must be file, fp8-int16 or fitted");
  if (coding.empty()) throw InvalidArgument("coding is empty, must name at least one");
  if (chunk < 0) throw_bound("chunk", chunk, ">= 0");
  for (const double part : budget)
    if (!(part > 0 && part < 1)) throw_bound("budget", part, "in (0, 1)");
  if (budget.size() > 1) throw InvalidArgument("budget names several, must be one");
  if (!budget.empty()) {
    perplexity = true;
    if (sink_tokens.size() > 1) throw InvalidArgument("budget takes one number of sink_tokens");
    if (adaptive_threshold.size() > 1) throw InvalidArgument("budget takes one adaptive_threshold");
  }
  if (perplexity_tokens < 0) throw_bound("perplexity_tokens", perplexity_tokens, ">= 0");
  for (const int offset : position_offset)
    if (offset < 1 || offset > 1 << 24) throw_bound("position_offset", offset, "in [1, 2^24]");
  if (max_vectors < 0) throw_bound("max_vectors", max_vectors, ">= 0");
  if (threads < 0) throw_bound("threads", threads, ">= 0");
  if (!(tolerance >= 0 && tolerance < 1)) throw_bound("tolerance", tolerance, "in [0, 1)");
  (void)Selection::from(selection);
  ModelTextConfig::validate();
}

}  // namespace lexico::apps
