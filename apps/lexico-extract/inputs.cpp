#include "lexico-extract/inputs.h"

#include <algorithm>
#include <filesystem>
#include <optional>
#include <set>

#include "common/model_text.h"
#include "common/program.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

std::vector<TextSpec> specs_of(const ExtractConfig& config) {
  std::vector<TextSpec> specs;
  for (const std::string& text : config.text) {
    specs.push_back(TextSpec::from(text));
    specs.back().field = config.field;
  }
  for (const std::string& text : config.token_ids) {
    specs.push_back(TextSpec::from(text));
    specs.back().is_token_ids = true;
  }
  std::set<std::string> names;
  for (const TextSpec& spec : specs)
    if (!names.insert(spec.name).second)
      throw InvalidArgument("two texts are named '" + spec.name +
                            "': name them, as in --text name=FILE");
  return specs;
}

void append(Corpus& corpus, const TextSpec& spec, const PackedText& text) {
  const auto first = static_cast<std::int64_t>(corpus.ids.size());
  std::int64_t earlier = 0;
  for (const std::int64_t count : corpus.num_documents) earlier += count;
  for (std::int64_t at = 0; at < text.num_tokens(); at += text.sequence_length)
    corpus.sequences.push_back({first + at,
                                static_cast<std::int32_t>(std::min<std::int64_t>(
                                    text.sequence_length, text.num_tokens() - at))});
  corpus.ids.insert(corpus.ids.end(), text.ids.begin(), text.ids.end());
  for (const std::int32_t document : text.documents)
    corpus.documents.push_back(static_cast<std::int32_t>(earlier + document));
  corpus.names.push_back(spec.name);
  corpus.num_documents.push_back(text.num_documents);
}

/// In [0, 1). SplitMix64.
double fraction_of(std::uint64_t seed) {
  std::uint64_t z = seed + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

}  // namespace

Corpus read_corpus(const ExtractConfig& config, const ModelInfo& model) {
  const std::vector<TextSpec> specs = specs_of(config);
  Corpus corpus;
  const PackOptions packing = packing_for(config, model);
  corpus.sequence_length = packing.sequence_length;
  corpus.bos = name_of(packing.bos);
  std::optional<Tokenizer> tokenizer;
  if (!config.text.empty()) tokenizer = load_tokenizer(config, model);
  for (const TextSpec& spec : specs) {
    if (stop_requested()) throw Interrupted("stopped while reading the texts; nothing was written");
    std::error_code unknown;
    const auto bytes = std::filesystem::file_size(spec.path, unknown);
    if (!unknown && bytes > 16'000'000)  // seconds
      log_info("reading " + spec.path + " (" + format_bytes(static_cast<double>(bytes)) + ")");
    append(
        corpus, spec, read_packed(spec, tokenizer ? &*tokenizer : nullptr, packing, model.vocab));
  }
  return corpus;
}

std::vector<Corpus::Sequence> pick_sequences(const Corpus& corpus,
                                             std::int64_t max_tokens,
                                             std::uint64_t seed) {
  const auto all = static_cast<std::int64_t>(corpus.sequences.size());
  const auto total = static_cast<std::int64_t>(corpus.ids.size());
  if (max_tokens == 0 || max_tokens >= total) return corpus.sequences;
  // Short sequences (each text's last) may leave the budget unmet: then the next larger number of
  // picks meets it.
  for (std::int64_t picks =
           std::min(all, (max_tokens + corpus.sequence_length - 1) / corpus.sequence_length);
       ;
       ++picks) {
    std::vector<Corpus::Sequence> picked;
    std::int64_t tokens = 0;
    for (std::int64_t i = 0; i < picks && tokens < max_tokens; ++i) {
      const double at = (static_cast<double>(i) + fraction_of(seed)) * static_cast<double>(all) /
                        static_cast<double>(picks);
      picked.push_back(corpus.sequences[static_cast<std::size_t>(
          std::min(all - 1, static_cast<std::int64_t>(at)))]);
      tokens += picked.back().length;
    }
    if (tokens < max_tokens && picks < all) continue;
    if (tokens > max_tokens) picked.back().length -= static_cast<std::int32_t>(tokens - max_tokens);
    return picked;
  }
}

}  // namespace lexico::apps
