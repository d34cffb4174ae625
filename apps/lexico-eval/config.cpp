#include "lexico-eval/config.h"

#include <algorithm>

#include "common/options.h"
#include "lexico/encoder.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

template <typename T>
[[noreturn]] void throw_bound(const char* key, T value, const char* bound) {
  throw InvalidArgument(std::string(key) + " is " + value_text(value) + ", must be " + bound);
}

}  // namespace

void EvalConfig::validate() {
  if (dictionary.empty())
    throw InvalidArgument("dictionary is missing: --dictionary FILE_OR_RUN_FOLDER");
  if (data.empty() && text.empty() && token_ids.empty() && ood.empty())
    throw InvalidArgument("data is missing: --data PATH (activations or text), --ood PATH");
  if (sparsity.empty()) throw InvalidArgument("sparsity is empty, must name at least one");
  std::sort(sparsity.begin(), sparsity.end());
  sparsity.erase(std::unique(sparsity.begin(), sparsity.end()), sparsity.end());
  if (sparsity.front() < 1) throw_bound("sparsity", sparsity.front(), ">= 1");
  for (const double rate : bits)
    if (!(rate > 0 && rate <= 16)) throw_bound("bits", rate, "in (0, 16]");
  if (sparse_autoencoder && fit.empty())
    throw InvalidArgument("sparse_autoencoder needs data to learn from: --fit ACTIVATIONS");
  if (autoencoder_vectors < 0) throw_bound("autoencoder_vectors", autoencoder_vectors, ">= 0");
  if (fit_vectors < 256) throw_bound("fit_vectors", fit_vectors, ">= 256");
  if (recent_window < 0) throw_bound("recent_window", recent_window, ">= 0");
  if (sink_tokens < 0) throw_bound("sink_tokens", sink_tokens, ">= 0");
  if (chunk < 0) throw_bound("chunk", chunk, ">= 0");
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
