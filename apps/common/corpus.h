#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/model_text.h"
#include "common/scratch_file.h"

namespace lexico::apps {

/// The texts as token ids, one after the other: 4 bytes a token on the disk, and hardly any memory.
class Corpus {
 public:
  struct Sequence {
    std::int64_t number = 0, first = 0;  ///< of itself, of its first token
    std::int32_t length = 0;
  };
  std::vector<std::string> names;
  std::vector<std::int64_t> num_documents;  ///< of each text
  std::int64_t num_tokens = 0, num_sequences = 0;
  int sequence_length = 0;
  std::string bos;  ///< the policy: always, document or none

  explicit Corpus(const std::string& output) : ids_(output), documents_(output) {}

  /// In the order of the texts; the last one of each may be shorter.
  Sequence sequence(std::int64_t number) const;
  /// Ids of `sequence` and, unless it is null, the document of each: they are numbered through all
  /// texts.
  void read(const Sequence& sequence, std::int32_t* ids, std::int32_t* documents) const;

  /// @throws IoError, InvalidArgument as pack_text does.
  void add(const TextSpec& spec, const Tokenizer* tokenizer, const PackOptions& options, int vocab);

 private:
  struct Text {
    std::int64_t first_sequence = 0, first_token = 0, num_tokens = 0;
  };
  std::vector<Text> texts_;
  ScratchFile ids_;        // of the first token of each document: the complement
  ScratchFile documents_;  // of the first token of each sequence
};

/// Reads, tokenizes and packs all texts of a config. @param output  near which they are kept.
/// @throws IoError, InvalidArgument as pack_text does, and if a text needs a tokenizer that cannot
/// be found; Interrupted.
Corpus read_corpus(const ModelTextConfig& config,
                   const std::vector<std::string>& texts,
                   const std::vector<std::string>& token_ids,
                   const ModelInfo& model,
                   const std::string& output);

/// Some sequences of a corpus.
struct Picks {
  std::int64_t count = 0;
  std::vector<std::int64_t> numbers;  ///< empty: all
  std::int32_t last_length = 0;       ///< of the last one, which may be cut

  Corpus::Sequence sequence(const Corpus& corpus, std::size_t i) const;
};

/// Sequences of at most `max_tokens` tokens together, at even steps through the corpus from a start
/// that `seed` draws; the last one is cut to fit. 0: all.
Picks pick_sequences(const Corpus& corpus, std::int64_t max_tokens, std::uint64_t seed);

}  // namespace lexico::apps
