#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lexico/kind.h"

namespace lexico {

/// What `lexico.json` in a model file says ("lexico-model 1"; docs/formats.md).
struct ModelInfo {
  std::string name;
  int layers = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0, max_positions = 0;
  std::int32_t bos_id = -1;             ///< -1: none
  std::string rope_kind;                ///< "default", ... ; "none" when the model has no RoPE
  std::vector<double> inverse_frequencies;  ///< one per rotated pair; per layer in `layer_inverse_frequencies` if they differ
  double attention_scaling = 1.0;       ///< the factor RoPE puts on cos and sin
  std::string rope_layout = "half";     ///< "half": dims i and i + r/2 rotate together; "interleaved": 2i and 2i + 1
  std::string tokenizer_sha256;         ///< empty: not known
  bool has_queries = false;             ///< the file also has the method `queries`
};

/// Keys and values of a batch of sequences, float32, [layers, batch, kv_heads, length, head_dim], keys after RoPE.
struct CacheBatch {
  std::int64_t batch = 0, length = 0;
  std::vector<float> keys, values;
  std::vector<float> queries;  ///< empty, or [layers, batch, heads, length, head_dim], after RoPE
};

/// A TorchScript language model written by tools/export_model.py. libtorch stays behind this header.
class LanguageModel {
 public:
  /// @param device  "cpu", "cuda", "cuda:1", or "auto".
  /// @throws IoError if the file is missing, truncated, or breaks the contract (says which part);
  ///         InvalidArgument if the device is not there.
  LanguageModel(const std::string& path, const std::string& device, int threads);
  ~LanguageModel();
  LanguageModel(LanguageModel&&) noexcept;

  const ModelInfo& info() const;
  /// @param ids  [batch, length], every id in [0, vocab). @throws InvalidArgument naming the first bad id.
  /// @throws IoError if the model fails or returns other shapes than its lexico.json promises.
  void forward(const std::int32_t* ids, std::int64_t batch, std::int64_t length, bool with_queries, CacheBatch& out);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Undoes RoPE in place on `rows` vectors; row i is at position positions[i].
void undo_rope(const ModelInfo& info, int layer, float* vectors, const std::int32_t* positions, std::int64_t rows);

}  // namespace lexico
