// lexico-generate: continues a prompt with the full and with a compressed cache, and says what both
// caches take.
//
// The model's `step` attends by itself and wants dense keys and values, so before each step what
// CompressedCache holds is reconstructed. An engine with its own attention would call
// CompressedCache::attend, and the dense vectors would not exist.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "common/json_text.h"
#include "common/model_text.h"
#include "common/options.h"
#include "common/program.h"
#include "lexico/compressed_cache.h"
#include "lexico/dictionary.h"
#include "lexico/error.h"
#include "lexico/files.h"
#include "lexico/language_model.h"
#include "lexico/tokenizer.h"

namespace lexico::apps {
namespace {

using Json = nlohmann::ordered_json;

struct GenerateConfig {
  std::string model, dictionary, tokenizer, prompt, prompt_file, device = "auto";
  int tokens = 32, sparsity = 0, recent_window = 32, compress_chunk = 1, sink_tokens = 4;
  double adaptive_threshold = 0;
  int threads = 0;
  bool json = false;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("model", self.model, "model file of tools/export_model.py (.pt)");
    visit("dictionary", self.dictionary, "run folder of lexico-train, or dictionary.safetensors");
    visit("prompt", self.prompt, "text to continue");
    visit("prompt_file", self.prompt_file, "file with the text to continue, in place of prompt");
    visit("tokens", self.tokens, "tokens to generate, the likeliest each time");
    visit("tokenizer",
          self.tokenizer,
          "tokenizer.json; empty: MODEL.tokenizer.json or tokenizer.json beside the model");
    visit("sparsity",
          self.sparsity,
          "atoms per vector (the paper's s), at most those of a packed format; 0: the "
          "dictionary's, or 8");
    visit("recent_window", self.recent_window, "last tokens that stay exact (the paper's n_b)");
    visit("compress_chunk", self.compress_chunk, "tokens compressed at once (the paper's n_a)");
    visit("sink_tokens", self.sink_tokens, "first tokens that stay exact");
    visit("adaptive_threshold",
          self.adaptive_threshold,
          "relative error from which on a vector joins the sequence's own atoms; 0: off");
    visit("device", self.device, "that runs the model: auto, cpu, cuda or cuda:1");
    visit("threads", self.threads, "threads; 0: all of the machine");
    visit("json", self.json, "print the result as JSON");
  }

  void validate() const {
    if (model.empty())
      throw InvalidArgument("model is missing: --model FILE.pt (tools/export_model.py writes it)");
    if (dictionary.empty())
      throw InvalidArgument("dictionary is missing: --dictionary RUN (lexico-train writes it)");
    if (prompt.empty() == prompt_file.empty())
      throw InvalidArgument("one of --prompt TEXT and --prompt-file FILE must be given");
    at_least("tokens", tokens, 1);
    at_least("sparsity", sparsity, 0);
    at_least("threads", threads, 0);
  }
};

/// Takes the keys and values of new tokens and gives those of all tokens to the model's `step`.
class Past {
 public:
  virtual ~Past() = default;
  virtual void append(const CacheBatch& tokens) = 0;
  virtual const CacheBatch& dense() = 0;
};

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

class FullPast : public Past {
 public:
  explicit FullPast(const ModelInfo& info) : info_(info) {}

  void append(const CacheBatch& tokens) override {
    CacheBatch all;
    all.batch = 1;
    all.length = past_.length + tokens.length;
    join(past_.keys, tokens.keys, tokens.length, all.keys);
    join(past_.values, tokens.values, tokens.length, all.values);
    past_ = std::move(all);
  }
  const CacheBatch& dense() override { return past_; }

 private:
  /// [layers, kv_heads, tokens, head_dim] each.
  void join(const std::vector<float>& old,
            const std::vector<float>& added,
            std::int64_t length,
            std::vector<float>& all) const {
    all.reserve(old.size() + added.size());
    const std::int64_t before = past_.length * info_.head_dim, more = length * info_.head_dim;
    for (std::int64_t head = 0; head < info_.layers * info_.kv_heads; ++head) {
      all.insert(all.end(), old.data() + head * before, old.data() + (head + 1) * before);
      all.insert(all.end(), added.data() + head * more, added.data() + (head + 1) * more);
    }
  }

  const ModelInfo& info_;
  CacheBatch past_{1, 0, {}, {}, {}};
};

class CompressedPast : public Past {
 public:
  CompressedPast(const ModelInfo& info, CompressedCache& cache)
      : info_(info), cache_(cache), sequence_(cache.add_sequence()) {}

  void append(const CacheBatch& tokens) override {
    const std::int64_t layer_numbers = tokens.length * info_.kv_heads * info_.head_dim;
    for (int layer = 0; layer < info_.layers; ++layer) {
      NewTokens added;
      added.sequence = sequence_;
      added.tokens = tokens.length;
      added.keys = tokens.keys.data() + layer * layer_numbers;
      added.values = tokens.values.data() + layer * layer_numbers;
      added.token_stride = info_.head_dim;
      added.head_stride = tokens.length * info_.head_dim;
      cache_.append(layer, {added});
    }
  }

  const CacheBatch& dense() override {
    const std::int64_t length = cache_.tokens(sequence_), dim = info_.head_dim;
    const std::int64_t layer_numbers = length * info_.kv_heads * dim;
    std::vector<float> keys(size(layer_numbers)), values(size(layer_numbers));
    past_.batch = 1;
    past_.length = length;
    past_.keys.resize(size(info_.layers * layer_numbers));
    past_.values.resize(size(info_.layers * layer_numbers));
    for (int layer = 0; layer < info_.layers; ++layer) {
      cache_.reconstruct(layer, sequence_, 0, length, keys.data(), values.data());
      for (std::int64_t head = 0; head < info_.kv_heads; ++head) {
        for (std::int64_t token = 0; token < length; ++token) {
          const std::int64_t from = (token * info_.kv_heads + head) * dim;
          const std::int64_t to = layer * layer_numbers + (head * length + token) * dim;
          std::copy_n(&keys[size(from)], dim, &past_.keys[size(to)]);
          std::copy_n(&values[size(from)], dim, &past_.values[size(to)]);
        }
      }
    }
    return past_;
  }

  int sequence() const { return sequence_; }

 private:
  const ModelInfo& info_;
  CompressedCache& cache_;
  int sequence_;
  CacheBatch past_;
};

/// The likeliest continuation. The prompt is read at once, with its own exact keys and values.
std::vector<std::int32_t> generate(LanguageModel& model,
                                   const std::vector<std::int32_t>& prompt,
                                   int tokens,
                                   Past& past) {
  std::vector<std::int32_t> read = prompt, made;
  StepResult step;
  while (true) {
    if (stop_requested()) throw Interrupted("interrupted; nothing is kept");
    const std::int64_t length = static_cast<std::int64_t>(read.size());
    model.step(read.data(), 1, length, past.dense(), step);
    past.append(step.cache);
    const auto last = step.logits.end() - model.info().vocab;
    if (std::any_of(last, step.logits.end(), [](float x) { return std::isnan(x); }))
      throw IoError("the model's logits hold a NaN after " +
                    std::to_string(prompt.size() + made.size()) + " tokens");
    made.push_back(static_cast<std::int32_t>(std::max_element(last, step.logits.end()) - last));
    if (static_cast<int>(made.size()) == tokens) return made;
    read = {made.back()};
  }
}

/// Ids of the prompt, the BOS token first where the model expects it.
std::vector<std::int32_t> prompt_ids(const GenerateConfig& config,
                                     const ModelInfo& model,
                                     const Tokenizer& tokenizer) {
  std::vector<std::int32_t> ids;
  if (model.add_bos) ids.push_back(model.bos_id);
  tokenizer.encode(config.prompt_file.empty() ? config.prompt : read_file(config.prompt_file), ids);
  if (ids.empty()) throw InvalidArgument("the prompt has no tokens");
  const std::size_t all = ids.size() + size(config.tokens);
  if (all > size(model.max_positions))
    throw InvalidArgument(std::to_string(ids.size()) + " tokens of the prompt and " +
                          std::to_string(config.tokens) + " to generate are more than the " +
                          std::to_string(model.max_positions) + " positions of " + config.model);
  return ids;
}

CompressedCache make_cache(const GenerateConfig& config, const ModelInfo& model) {
  DictionarySet set = read_dictionaries(config.dictionary);
  CacheOptions options;
  options.recent_window = config.recent_window;
  options.compress_chunk = config.compress_chunk;
  options.sink_tokens = config.sink_tokens;
  options.adaptive_threshold = static_cast<float>(config.adaptive_threshold);
  options.page_tokens = 64;  // the least: prompts of a demonstration are short
  options.threads = config.threads;
  options.keys.max_atoms = options.values.max_atoms = config.sparsity;
  if (config.sparsity == 0) {
    constexpr int kUsualAtoms = 8;
    for (const Dictionary& d : set.dictionaries) {
      if (d.format.coding == CodeFormat::Coding::kPacked || d.format.max_atoms > 0) continue;
      auto& own = d.kind == Kind::kKeys ? options.layer_keys : options.layer_values;
      own[d.layer].max_atoms = kUsualAtoms;
    }
  }
  const auto trained_on = set.metadata.find("model");
  if (trained_on != set.metadata.end() && !trained_on->second.empty() &&
      trained_on->second != model.name)
    log_warning(config.dictionary + " was trained for " + trained_on->second + ", the model is " +
                model.name);
  return CompressedCache(std::move(set), cache_shape(model), options);
}

int run(int argc, char** argv) {
  GenerateConfig config;
  std::vector<Option> options = options_of(config);
  const ProgramInfo program{
      "lexico-generate",
      "Continues a prompt twice, with the full and with a compressed cache, and prints both texts "
      "and what\nthe caches take. An example: the model's own attention wants dense keys and "
      "values, so they are\nreconstructed from the compressed cache before each step.",
      "Example:\n"
      "  lexico-generate --model llama.pt --dictionary runs/llama --prompt \"The city of\"\n\n"
      "Exit codes: 0 done, 2 usage, 3 input that does not fit, 4 no memory, 75 interrupted.",
      "",
      {},
      ""};
  if (!parse_command_line(program, options, argc, argv)) return 0;
  config.validate();
  watch_stop_signals();

  ModelTextConfig text;
  text.model = config.model;
  text.tokenizer = config.tokenizer;
  LanguageModel model(config.model, config.device, config.threads);
  const ModelInfo& info = model.info();
  if (!info.has_step)
    throw IoError(config.model +
                  ": has no method 'step'; export it again with tools/export_model.py");
  const Tokenizer tokenizer = load_tokenizer(text, info);
  const std::vector<std::int32_t> prompt = prompt_ids(config, info, tokenizer);
  CompressedCache cache = make_cache(config, info);

  FullPast full(info);
  CompressedPast compressed(info, cache);
  const std::vector<std::int32_t> with_full = generate(model, prompt, config.tokens, full);
  const std::vector<std::int32_t> with_codes = generate(model, prompt, config.tokens, compressed);

  const auto same = std::mismatch(with_full.begin(), with_full.end(), with_codes.begin()).first -
                    with_full.begin();
  const std::int64_t tokens = cache.tokens(compressed.sequence());
  const std::int64_t full_bytes = 4 * tokens * info.layers * info.kv_heads * info.head_dim;
  const std::size_t bytes = cache.bytes(compressed.sequence());
  const std::int64_t coded = cache.coded_tokens(compressed.sequence(), 0);
  const CacheCounts& counts = cache.counts();
  if (config.json) {
    std::cout << json_text(
        Json{{"prompt_tokens", prompt.size()},
             {"full", {{"ids", with_full}, {"text", tokenizer.decode(with_full)}}},
             {"compressed", {{"ids", with_codes}, {"text", tokenizer.decode(with_codes)}}},
             {"same_tokens", same},
             {"cached_tokens", tokens},
             {"coded_tokens", coded},
             {"full_bytes", full_bytes},
             {"compressed_bytes", bytes},
             {"own_atoms", counts.own_atoms},
             {"not_finite", counts.not_finite}},
        1);
    return 0;
  }
  char share[32];
  std::snprintf(share,
                sizeof share,
                "%.0f %%",
                100 * static_cast<double>(bytes) / static_cast<double>(full_bytes));
  std::cout << "full cache        " << format_bytes(static_cast<double>(full_bytes)) << " ("
            << tokens << " tokens as 16-bit numbers)\n"
            << tokenizer.decode(with_full) << "\n\n"
            << "compressed cache  " << format_bytes(static_cast<double>(bytes)) << ", " << share
            << " (" << coded << " tokens coded, " << tokens - coded << " exact";
  if (counts.own_atoms > 0) std::cout << ", " << counts.own_atoms << " own atoms";
  std::cout << ")\n"
            << tokenizer.decode(with_codes) << "\n\n"
            << (same == config.tokens ? "the same " + std::to_string(same) + " tokens\n"
                                      : "the same tokens up to the " + std::to_string(same + 1) +
                                            "th of " + std::to_string(config.tokens) + "\n")
            << "(the model attends to dense vectors reconstructed from the compressed cache)\n";
  return 0;
}

}  // namespace
}  // namespace lexico::apps

int main(int argc, char** argv) {
  return lexico::apps::run_program("lexico-generate",
                                   [&] { return lexico::apps::run(argc, argv); });
}
