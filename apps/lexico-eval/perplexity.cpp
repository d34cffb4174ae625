// What a compressed cache does to the model's next-token distributions.
#include "lexico-eval/perplexity.h"

#include <algorithm>
#include <map>

#include "common/program.h"
#include "lexico/cache_effect.h"
#include "lexico/error.h"
#include "lexico/language_model.h"

namespace lexico::apps {
namespace {

/// One way to store the cache: a coder for every layer, kind and head.
struct CacheCoder {
  std::string name;
  double bytes_per_token_and_head = 0;  ///< keys and values together
  std::map<std::tuple<int, Kind, int>, const RateCoder*> coders;
};

/// Coders of one name go together if they have the same bits, or if there is one for each place.
std::vector<CacheCoder> cache_coders(const std::vector<RateCoder>& coders, const ModelInfo& model) {
  std::vector<std::string> names;
  std::map<std::string, std::map<int, std::vector<const RateCoder*>>> by_bits;
  for (const RateCoder& coder : coders) {
    if (!by_bits.count(coder.name)) names.push_back(coder.name);
    by_bits[coder.name][coder.coder->bits_per_vector()].push_back(&coder);
  }
  std::vector<CacheCoder> found;
  const auto add_if_whole = [&](const std::string& name, const std::vector<const RateCoder*>& of) {
    CacheCoder cache;
    cache.name = name;
    int places = 0;
    for (const RateCoder* coder : of) {
      const bool all = coder->head == Dictionary::kAllHeads;
      if (!cache.coders.emplace(std::tuple{coder->layer, coder->kind, coder->head}, coder).second)
        return false;  // several rates
      places += all ? model.kv_heads : 1;
      const double bytes = (coder->coder->bits_per_vector() + 7) / 8;
      cache.bytes_per_token_and_head +=
          bytes * (all ? model.kv_heads : 1) / (model.layers * model.kv_heads);
    }
    if (places != 2 * model.layers * model.kv_heads) return false;
    found.push_back(std::move(cache));
    return true;
  };
  for (const std::string& name : names) {
    std::vector<const RateCoder*> all;
    for (const auto& [bits, of] : by_bits[name]) all.insert(all.end(), of.begin(), of.end());
    if (add_if_whole(name, all)) continue;
    for (const auto& [bits, of] : by_bits[name]) add_if_whole(name, of);
  }
  return found;
}

class Approximation {
 public:
  Approximation(const CacheCoder& cache, const ModelInfo& model) : cache_(cache), model_(model) {}

  void operator()(
      int layer, Kind kind, const std::int32_t* positions, std::int64_t tokens, float* vectors) {
    const int heads = model_.kv_heads, dim = model_.head_dim;
    const auto whole = cache_.coders.find({layer, kind, Dictionary::kAllHeads});
    if (whole != cache_.coders.end()) {
      row_positions_.clear();
      for (std::int64_t t = 0; t < tokens; ++t)
        row_positions_.insert(row_positions_.end(), static_cast<std::size_t>(heads), positions[t]);
      code(*whole->second, layer, row_positions_.data(), tokens * heads, vectors);
      return;
    }
    of_head_.resize(static_cast<std::size_t>(tokens * dim));
    for (int head = 0; head < heads; ++head) {
      for (std::int64_t t = 0; t < tokens; ++t)
        std::copy_n(vectors + (t * heads + head) * dim, dim, of_head_.data() + t * dim);
      code(*cache_.coders.at({layer, kind, head}), layer, positions, tokens, of_head_.data());
      for (std::int64_t t = 0; t < tokens; ++t)
        std::copy_n(of_head_.data() + t * dim, dim, vectors + (t * heads + head) * dim);
    }
  }

 private:
  void code(const RateCoder& coder,
            int layer,
            const std::int32_t* positions,
            std::int64_t rows,
            float* vectors) {
    const bool rotate = coder.kind == Kind::kKeys && coder.key_stage == KeyStage::kPreRope;
    if (rotate) model_.rope.undo(layer, vectors, model_.head_dim, positions, rows);
    coder.coder->reconstruct(vectors, rows, vectors);
    if (rotate) model_.rope.apply(layer, vectors, model_.head_dim, positions, rows);
  }

  const CacheCoder& cache_;
  const ModelInfo& model_;
  std::vector<std::int32_t> row_positions_;
  std::vector<float> of_head_;
};

}  // namespace

void measure_perplexity(const LanguageModel& model,
                        const std::vector<RateCoder>& coders,
                        std::vector<NamedSource>& sources,
                        const PerplexityOptions& options,
                        report::EvaluationReport& report) {
  const std::vector<CacheCoder> caches = cache_coders(coders, model.info());
  if (caches.empty()) {
    report.notes.push_back("No perplexity: no coder has keys and values of all layers.");
    return;
  }
  std::vector<CacheSetting> settings;
  for (const CacheCoder& cache : caches)
    settings.push_back({Approximation(cache, model.info()),
                        options.recent_window,
                        options.sink_tokens,
                        options.chunk});
  for (NamedSource& source : sources) {
    if (source.position_offset != 0) continue;
    const std::vector<std::vector<std::int32_t>> sequences =
        source.source->sequences(options.tokens);
    if (sequences.empty()) continue;
    Progress progress("perplexity on " + source.spec.name, 1, "of the text");
    CacheEffectOptions how;
    how.on_progress = [&](double part) {
      progress.update(part, "");
      return !stop_requested();
    };
    const std::vector<CacheEffect> effects = measure_cache_effect(model, sequences, settings, how);
    for (std::size_t i = 0; i < caches.size(); ++i)
      report.cache_effects.push_back({source.spec.name,
                                      caches[i].name,
                                      caches[i].bytes_per_token_and_head,
                                      options.recent_window,
                                      options.sink_tokens,
                                      effects[i].tokens,
                                      effects[i].full_perplexity(),
                                      effects[i].compressed_perplexity(),
                                      effects[i].mean_kl,
                                      effects[i].p99_kl});
  }
}

}  // namespace lexico::apps
