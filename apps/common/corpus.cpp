// Texts on their way to a model: token ids on the disk, and where sequences start.
#include "common/corpus.h"

#include <algorithm>
#include <filesystem>
#include <optional>
#include <set>

#include "common/program.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

std::vector<TextSpec> specs_of(const ModelTextConfig& config,
                               const std::vector<std::string>& texts,
                               const std::vector<std::string>& token_ids) {
  std::vector<TextSpec> specs;
  for (const std::string& text : texts) {
    specs.push_back(TextSpec::from(text));
    specs.back().field = config.field;
  }
  for (const std::string& text : token_ids) {
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

/// In [0, 1). SplitMix64.
double fraction_of(std::uint64_t seed) {
  std::uint64_t z = seed + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

}  // namespace

void Corpus::add(const TextSpec& spec,
                 const Tokenizer* tokenizer,
                 const PackOptions& options,
                 int vocab) {
  std::int32_t earlier = 0;  // documents
  for (const std::int64_t count : num_documents) earlier += static_cast<std::int32_t>(count);
  Text text{num_sequences, num_tokens, 0};
  std::int32_t last = -1;
  std::vector<std::int32_t> marked, of_sequences;
  num_documents.push_back(
      pack_text(spec, tokenizer, options, vocab, [&](const auto& ids, const auto& documents) {
        if (stop_requested())
          throw Interrupted("stopped while reading the texts; nothing was written");
        marked.assign(ids.begin(), ids.end());
        of_sequences.clear();
        for (std::size_t i = 0; i < ids.size(); ++i, ++text.num_tokens) {
          if (documents[i] != last) marked[i] = ~marked[i];
          last = documents[i];
          if (text.num_tokens % options.sequence_length == 0)
            of_sequences.push_back(earlier + documents[i]);
        }
        ids_.append(marked.data(), marked.size() * sizeof(std::int32_t));
        documents_.append(of_sequences.data(), of_sequences.size() * sizeof(std::int32_t));
        num_sequences += static_cast<std::int64_t>(of_sequences.size());
      }));
  num_tokens += text.num_tokens;
  texts_.push_back(text);
  names.push_back(spec.name);
}

Corpus::Sequence Corpus::sequence(std::int64_t number) const {
  const auto after =
      std::upper_bound(texts_.begin(), texts_.end(), number, [](std::int64_t n, const Text& text) {
        return n < text.first_sequence;
      });
  const Text& text = *(after - 1);
  const std::int64_t at = (number - text.first_sequence) * sequence_length;
  return {number,
          text.first_token + at,
          static_cast<std::int32_t>(std::min<std::int64_t>(sequence_length, text.num_tokens - at))};
}

void Corpus::read(const Sequence& sequence, std::int32_t* ids, std::int32_t* documents) const {
  constexpr std::int64_t kBytes = sizeof(std::int32_t);
  const auto length = static_cast<std::size_t>(sequence.length);
  ids_.read(sequence.first * kBytes, ids, length * sizeof(std::int32_t));
  std::int32_t document = 0;
  if (documents != nullptr) documents_.read(sequence.number * kBytes, &document, sizeof document);
  for (std::size_t i = 0; i < length; ++i) {
    if (ids[i] < 0) {
      ids[i] = ~ids[i];
      if (i > 0) ++document;
    }
    if (documents != nullptr) documents[i] = document;
  }
}

Corpus read_corpus(const ModelTextConfig& config,
                   const std::vector<std::string>& texts,
                   const std::vector<std::string>& token_ids,
                   const ModelInfo& model,
                   const std::string& output) {
  const std::vector<TextSpec> specs = specs_of(config, texts, token_ids);
  Corpus corpus(output);
  const PackOptions packing = packing_for(config, model);
  corpus.sequence_length = packing.sequence_length;
  corpus.bos = name_of(packing.bos);
  std::optional<Tokenizer> tokenizer;
  if (!texts.empty()) tokenizer = load_tokenizer(config, model);
  for (const TextSpec& spec : specs) {
    if (stop_requested()) throw Interrupted("stopped while reading the texts; nothing was written");
    std::error_code unknown;
    const auto bytes = std::filesystem::file_size(spec.path, unknown);
    if (!unknown && bytes > 16'000'000)  // seconds
      log_info("reading " + spec.path + " (" + format_bytes(static_cast<double>(bytes)) + ")");
    corpus.add(spec, tokenizer ? &*tokenizer : nullptr, packing, model.vocab);
  }
  return corpus;
}

Corpus::Sequence Picks::sequence(const Corpus& corpus, std::size_t i) const {
  Corpus::Sequence sequence =
      corpus.sequence(numbers.empty() ? static_cast<std::int64_t>(i) : numbers[i]);
  if (static_cast<std::int64_t>(i) + 1 == count) sequence.length = last_length;
  return sequence;
}

Picks pick_sequences(const Corpus& corpus, std::int64_t max_tokens, std::uint64_t seed) {
  const std::int64_t all = corpus.num_sequences;
  if (max_tokens == 0 || max_tokens >= corpus.num_tokens)
    return {all, {}, corpus.sequence(all - 1).length};
  // Short sequences (each text's last) may leave the budget unmet: then the next larger number of
  // picks meets it.
  for (std::int64_t wanted =
           std::min(all, (max_tokens + corpus.sequence_length - 1) / corpus.sequence_length);
       ;
       ++wanted) {
    Picks picks;
    std::int64_t tokens = 0;
    for (std::int64_t i = 0; i < wanted && tokens < max_tokens; ++i) {
      const double at = (static_cast<double>(i) + fraction_of(seed)) * static_cast<double>(all) /
                        static_cast<double>(wanted);
      picks.numbers.push_back(std::min(all - 1, static_cast<std::int64_t>(at)));
      picks.last_length = corpus.sequence(picks.numbers.back()).length;
      tokens += picks.last_length;
    }
    if (tokens < max_tokens && wanted < all) continue;
    if (tokens > max_tokens) picks.last_length -= static_cast<std::int32_t>(tokens - max_tokens);
    picks.count = static_cast<std::int64_t>(picks.numbers.size());
    return picks;
  }
}

}  // namespace lexico::apps
