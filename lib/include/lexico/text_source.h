#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace lexico {

class Tokenizer;

/// One `--text [name=]FILE` or `--token-ids [name=]FILE`.
struct TextSpec {
  std::string name;  ///< given before '=', else the file's name without folder and extension
  std::string path;
  std::string field = "text";  ///< of each line of a .jsonl file
  bool is_token_ids = false;

  /// Splits "[name=]path" at the first '='. A path that exists as a file wins over reading '=' as a
  /// separator, and a name has no '/'.
  /// @throws InvalidArgument if the name before '=' or the path is empty.
  static TextSpec from(const std::string& text);
};

/// How documents become the sequences that a model reads.
struct PackOptions {
  enum class Bos {
    kAlways,    ///< the BOS token starts every document and every sequence; sequence_length must be
                ///< >= 2
    kDocument,  ///< every document
    kNone
  };
  // Where both a document and a sequence start there is one BOS, and none is put before a token
  // that is the BOS already. A sequence that starts inside a document thus holds sequence_length -
  // 1 text tokens.
  int sequence_length = 512;
  Bos bos = Bos::kAlways;
  std::int32_t bos_id = -1;  ///< < 0: there is none, and `bos` must be kNone
};

/// Token ids packed into sequences: documents follow each other without padding; the last sequence
/// may be shorter.
struct PackedText {
  int sequence_length = 0;
  std::vector<std::int32_t> ids;  ///< all sequences one after the other
  std::vector<std::int32_t>
      documents;  ///< same size: running number of the document each token is from
  std::int64_t num_documents = 0;

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(ids.size()); }
  std::int64_t num_sequences() const {
    return (num_tokens() + sequence_length - 1) / sequence_length;
  }
};

/// Tokens on their way into sequences: their ids, and the running number of the document each is
/// from.
using TakeTokens = std::function<void(const std::vector<std::int32_t>& ids,
                                      const std::vector<std::int32_t>& documents)>;

/// Reads a .jsonl or .ndjson file (one document a line, the string under `field`; blank lines are
/// skipped), token ids
/// (.bin: int32 little-endian, one document; .safetensors: every tensor is a document, 1-d and of
/// an integer type, in name order), or a file of any other name as text (one document), and packs
/// it. A UTF-8 BOM is dropped; line ends stay as they are. Documents of white space only, or
/// without ids, are left out and not counted.
/// @param tokenizer  may be null for token ids.
/// @param vocab      ids outside [0, vocab) are refused; 0: only negative ones are.
/// @throws IoError naming the file (and the line, or the tensor, the index and the value) if it is
/// missing, unreadable,
///         empty, holds no text, or is not what its name says: text in UTF-16, or with more than a
///         tenth of its bytes (and more than 16) not UTF-8 or control characters, is refused; less
///         is read as Tokenizer::encode says.
/// @throws InvalidArgument if there is no tokenizer for a text, or sequence_length or bos_id do not
/// fit `bos`.
/// The tokens are handed over a piece at a time: a large text is never in memory as a whole
/// (but a document of a .jsonl file is, and a text whose tokenizer joins words over ends of lines).
/// @returns the number of documents.
std::int64_t pack_text(const TextSpec& spec,
                       const Tokenizer* tokenizer,
                       const PackOptions& options,
                       int vocab,
                       const TakeTokens& take,
                       std::size_t piece_bytes = 1 << 20);

/// The same in memory.
PackedText read_packed(const TextSpec& spec,
                       const Tokenizer* tokenizer,
                       const PackOptions& options,
                       int vocab);

}  // namespace lexico
