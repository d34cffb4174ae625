// What a compressed cache does to the model's next-token distributions.
#include "lexico-eval/perplexity.h"

#include <algorithm>
#include <cmath>

#include "common/program.h"
#include "common/report/text.h"
#include "lexico/cache_effect.h"
#include "lexico/error.h"
#include "lexico/language_model.h"

namespace lexico::apps {
namespace {

using report::print;

constexpr int kUsualWindow = 32;
constexpr int kBudgetChunk = 8;  // the tokens of a chunk are exact: few beside most windows

/// The coders of a setting without dictionaries, in the place of a CompressedCache's codes.
class Approximation {
 public:
  Approximation(const CacheSettings& settings, const ModelInfo& model)
      : settings_(settings), model_(model) {}

  void operator()(
      int layer, Kind kind, const std::int32_t* positions, std::int64_t tokens, float* vectors) {
    const int heads = model_.kv_heads, dim = model_.head_dim;
    const auto whole = settings_.places.find({layer, kind, Dictionary::kAllHeads});
    if (whole != settings_.places.end()) {
      row_positions_.clear();
      for (std::int64_t t = 0; t < tokens; ++t)
        row_positions_.insert(row_positions_.end(), static_cast<std::size_t>(heads), positions[t]);
      code(*whole->second.coder, layer, kind, row_positions_.data(), tokens * heads, vectors);
      return;
    }
    of_head_.resize(static_cast<std::size_t>(tokens * dim));
    for (int head = 0; head < heads; ++head) {
      for (std::int64_t t = 0; t < tokens; ++t)
        std::copy_n(vectors + (t * heads + head) * dim, dim, of_head_.data() + t * dim);
      VectorCoder& coder = *settings_.places.at({layer, kind, head}).coder;
      code(coder, layer, kind, positions, tokens, of_head_.data());
      for (std::int64_t t = 0; t < tokens; ++t)
        std::copy_n(of_head_.data() + t * dim, dim, vectors + (t * heads + head) * dim);
    }
  }

 private:
  void code(VectorCoder& coder,
            int layer,
            Kind kind,
            const std::int32_t* positions,
            std::int64_t rows,
            float* vectors) {
    const bool rotate = kind == Kind::kKeys && settings_.key_stage == KeyStage::kPreRope;
    if (rotate) model_.rope.undo(layer, vectors, model_.head_dim, positions, rows);
    coder.reconstruct(vectors, rows, vectors);
    if (rotate) model_.rope.apply(layer, vectors, model_.head_dim, positions, rows);
  }

  const CacheSettings& settings_;
  const ModelInfo& model_;
  std::vector<std::int32_t> row_positions_;
  std::vector<float> of_head_;
};

/// Of a CompressedCache, about: atoms, their copies for attention, an encoder's Gram matrix.
std::int64_t dictionary_memory(const CacheSettings& settings, const ModelInfo& model) {
  std::int64_t bytes = 0;
  for (const auto& [place, code] : settings.places)
    bytes +=
        std::int64_t{4} * code.dictionary->num_atoms * code.dictionary->dim * (2 + model.kv_heads);
  return bytes;
}

CacheSetting setting_of(const CacheSettings& settings,
                        const ModelInfo& model,
                        const EncodeOptions& encode,
                        int chunk) {
  CacheSetting setting;
  setting.recent_window = settings.recent_window;
  setting.sink_tokens = settings.sink_tokens;
  setting.chunk = chunk;
  setting.compress_chunk = settings.compress_chunk;
  setting.half_floats = true;
  if (settings.by_dictionaries()) {
    setting.compressed = [&settings, &model, encode] {
      return make_cache(settings, model, encode);
    };
    setting.memory_bytes = dictionary_memory(settings, model);
  } else {
    setting.approximate = Approximation(settings, model);
  }
  return setting;
}

report::CacheEffectRow row_of(const CacheSettings& settings,
                              const ModelInfo& model,
                              const TextLengths& text,
                              int chunk,
                              const CacheEffect& effect) {
  report::CacheEffectRow row;
  row.dataset = text.name;
  row.coder = settings.coder;
  row.split = settings.split;
  row.by_dictionary = settings.by_dictionaries();
  row.key_bits = settings.mean_bits(Kind::kKeys, model);
  row.value_bits = settings.mean_bits(Kind::kValues, model);
  row.key_atoms = settings.key_atoms;
  row.value_atoms = settings.value_atoms;
  row.recent_window = settings.recent_window;
  row.sink_tokens = settings.sink_tokens;
  row.compress_chunk = settings.compress_chunk;
  row.chunk = chunk;
  row.adaptive_threshold = settings.adaptive_threshold;
  row.own_atoms = effect.own_atoms;
  row.bytes = settings.by_dictionaries() ? static_cast<double>(effect.bytes)
                                         : static_cast<double>(cache_bytes(settings, model, text));
  row.full_bytes = full_bytes(model, text);
  row.tokens = effect.tokens;
  row.full_perplexity = effect.full_perplexity();
  row.perplexity = effect.compressed_perplexity();
  row.mean_kl = effect.mean_kl;
  row.p99_kl = effect.p99_kl;
  return row;
}

}  // namespace

int reading_chunk(const EvalConfig& config) {
  if (config.chunk > 0) return config.chunk;
  if (!config.budget.empty()) return kBudgetChunk;
  int chunk = 0;
  for (const int window : config.recent_window)
    if (window > 0 && (chunk == 0 || window < chunk)) chunk = window;
  return chunk > 0 ? chunk : kUsualWindow;
}

std::vector<TextLengths> texts_to_read(const std::vector<NamedSource>& sources,
                                       std::int64_t tokens) {
  std::vector<TextLengths> texts;
  for (const NamedSource& source : sources) {
    if (source.position_offset != 0) continue;
    TextLengths text{source.spec.name, {}};
    for (const std::vector<std::int32_t>& sequence : source.source->sequences(tokens))
      if (sequence.size() > 1)  // others are not read
        text.lengths.push_back(static_cast<std::int64_t>(sequence.size()));
    if (!text.lengths.empty()) texts.push_back(std::move(text));
  }
  return texts;
}

void measure_perplexity(const LanguageModel& model,
                        const std::vector<CacheSettings>& settings,
                        std::vector<NamedSource>& sources,
                        const EvalConfig& config,
                        const EncodeOptions& encode,
                        report::EvaluationReport& report) {
  const int chunk = reading_chunk(config);
  std::vector<CacheSetting> all;
  for (const CacheSettings& one : settings)
    all.push_back(setting_of(one, model.info(), encode, chunk));
  for (const TextLengths& text : texts_to_read(sources, config.perplexity_tokens)) {
    const auto source = std::find_if(sources.begin(), sources.end(), [&](const NamedSource& s) {
      return s.spec.name == text.name && s.position_offset == 0;
    });
    double tokens = 0;
    for (const std::int64_t length : text.lengths) tokens += static_cast<double>(length);
    log_info("perplexity on " + text.name + ": " + std::to_string(all.size()) + " settings, " +
             format_count(tokens) + " tokens each");
    const double total = tokens * static_cast<double>(all.size());
    Progress progress("perplexity on " + text.name, total, "tokens");
    CacheEffectOptions how;
    how.on_progress = [&](double part) {
      progress.update(part * total);
      return !stop_requested();
    };
    const std::vector<CacheEffect> effects =
        measure_cache_effect(model, source->source->sequences(config.perplexity_tokens), all, how);
    for (std::size_t i = 0; i < settings.size(); ++i)
      report.cache_effects.push_back(row_of(settings[i], model.info(), text, chunk, effects[i]));
  }
}

std::string settings_text(const std::vector<CacheSettings>& settings,
                          const ModelInfo& model,
                          const std::vector<TextLengths>& texts) {
  std::string lines;
  for (const TextLengths& text : texts) {
    lines += "Perplexity on " + text.name + ": " + std::to_string(settings.size()) + " settings\n";
    for (const CacheSettings& one : settings) {
      const auto bytes = static_cast<double>(cache_bytes(one, model, text));
      std::string rate = print("%.4g + %.4g bits",
                               one.mean_bits(Kind::kKeys, model),
                               one.mean_bits(Kind::kValues, model));
      if (one.key_atoms > 0 && one.value_atoms > 0)
        rate += print(", s = %d + %d", one.key_atoms, one.value_atoms);
      const std::string split = one.split.empty() || !one.by_dictionaries() ? "" : one.split + ", ";
      lines += "  " + report::pad_right(one.coder, 26) + report::pad_right(rate, 28) +
               report::pad_right(split + exact_part(one), 40) +
               report::pad_left(format_bytes(bytes), 9) +
               print("  %.2f %%\n", 100 * bytes / full_bytes(model, text));
    }
  }
  return lines;
}

}  // namespace lexico::apps
