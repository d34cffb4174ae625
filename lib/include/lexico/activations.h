#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lexico/kind.h"

namespace lexico {

/// What an activation file says of itself ("lexico-activations 1"; docs/formats.md).
struct ActivationInfo {
  std::string model;                 ///< name in the model file
  std::string model_sha256;
  std::vector<std::string> corpora;  ///< names of the texts
  KeyStage key_stage = KeyStage::kPostRope;
  int num_layers = 0, kv_heads = 0, head_dim = 0;
  std::int64_t num_tokens = 0;       ///< rows of a layer = num_tokens * kv_heads
  std::uint64_t seed = 0;
  bool complete = false;
};

/// Reads K/V vectors dumped by lexico-extract: one file, a folder of shards, or a glob, seen as one.
/// Row r of a layer is token r / kv_heads, head r % kv_heads. One reader serves one thread.
class ActivationReader {
 public:
  /// @throws IoError naming the file: missing, truncated, not complete, not this format, or shards that do not fit
  ///         each other (names both files and the attribute).
  explicit ActivationReader(const std::string& file_folder_or_glob);
  ~ActivationReader();
  ActivationReader(ActivationReader&&) noexcept;
  ActivationReader& operator=(ActivationReader&&) noexcept;

  const ActivationInfo& info() const;
  const std::vector<std::string>& files() const;
  std::int64_t num_rows() const;  ///< of each layer and kind, over all shards

  /// Copies rows [first, first + count) as float32 to `out` [count, head_dim].
  /// @throws IoError if the file cannot be read there; InvalidArgument if the range or the layer is out of bounds.
  void read(int layer, Kind kind, std::int64_t first, std::int64_t count, float* out);
  /// The same rows as they are stored: IEEE half bits. @throws InvalidArgument if the file stores float32.
  void read_half(int layer, Kind kind, std::int64_t first, std::int64_t count, std::uint16_t* out);
  bool is_half() const;

  /// Tokens [first, first + count): any of the three may be null.
  void read_tokens(std::int64_t first, std::int64_t count, std::int32_t* id, std::int32_t* position, std::int32_t* document);
  /// Mean of q q^T over tokens and the query heads of each group, [kv_heads, head_dim, head_dim], in the frame of the
  /// keys (averaged over shards by their tokens). Empty if the model gave no queries.
  std::vector<float> query_second_moment(int layer);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lexico
