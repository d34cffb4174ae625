#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lexico {

class Tokenizer;

/// One `--text [name=]FILE` or `--token-ids [name=]FILE`.
struct TextSpec {
  std::string name;         ///< given before '=', else the file's name without folder and extension
  std::string path;
  std::string field = "text";  ///< of each line of a .jsonl file
  bool is_token_ids = false;

  /// Splits "[name=]path". A path that exists as a file wins over reading '=' as a separator.
  static TextSpec from(const std::string& text);
};

/// How documents become the sequences that a model reads.
struct PackOptions {
  enum class Bos {
    kAlways,    ///< the BOS token starts every document and every sequence
    kDocument,  ///< every document
    kNone
  };
  int sequence_length = 512;
  Bos bos = Bos::kAlways;
  std::int32_t bos_id = -1;  ///< < 0: there is none, and `bos` must be kNone
};

/// Token ids packed into sequences: documents follow each other without padding; the last sequence may be shorter.
struct PackedText {
  int sequence_length = 0;
  std::vector<std::int32_t> ids;        ///< all sequences one after the other
  std::vector<std::int32_t> documents;  ///< same size: running number of the document each token is from
  std::int64_t num_documents = 0;

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(ids.size()); }
  std::int64_t num_sequences() const { return (num_tokens() + sequence_length - 1) / sequence_length; }
};

/// Reads a .txt file (one document), a .jsonl file (one document a line, the string under `field`), or token ids
/// (.bin: int32 little-endian, one document; .safetensors: every 1-d integer tensor is a document, in name order),
/// and packs it.
/// @param tokenizer  may be null for token ids.
/// @param vocab      ids outside [0, vocab) are refused; 0: not checked.
/// @throws IoError naming the file (and the line) if it is missing, empty, holds no text, or is not what its name says.
PackedText read_packed(const TextSpec& spec, const Tokenizer* tokenizer, const PackOptions& options, int vocab);

}  // namespace lexico
