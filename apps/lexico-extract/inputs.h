#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lexico-extract/config.h"
#include "lexico/language_model.h"

namespace lexico::apps {

/// The texts as token ids, one after the other.
struct Corpus {
  std::vector<std::string> names;
  std::vector<std::int64_t> num_documents;   ///< of each text
  std::vector<std::int32_t> ids, documents;  ///< documents are numbered through all texts
  struct Sequence {
    std::int64_t first = 0;  ///< of its tokens in `ids`
    std::int32_t length = 0;
  };
  std::vector<Sequence> sequences;  ///< in the order of the texts
  int sequence_length = 0;
  std::string bos;  ///< the policy: always, document or none
};

/// Reads, tokenizes and packs all texts. @throws IoError, InvalidArgument as read_packed does, and
/// if a text needs a tokenizer that cannot be found.
Corpus read_corpus(const ExtractConfig& config, const ModelInfo& model);

/// Sequences of at most `max_tokens` tokens together, at even steps through the corpus from a start
/// that `seed` draws; the last one is cut to fit. 0: all.
std::vector<Corpus::Sequence> pick_sequences(const Corpus& corpus,
                                             std::int64_t max_tokens,
                                             std::uint64_t seed);

}  // namespace lexico::apps
