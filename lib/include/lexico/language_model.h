#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lexico/kind.h"
#include "lexico/rope.h"

namespace lexico {

/// What `lexico.json` in a model file says ("lexico-model 1"; docs/formats.md).
struct ModelInfo {
  std::string name;
  std::string dtype;  ///< of the model's arithmetic, as it says
  int layers = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0, max_positions = 0;
  std::int32_t bos_id = -1;  ///< -1: none
  bool add_bos = false;      ///< whether the model expects sequences to start with it
  Rope rope;
  std::string tokenizer_sha256;  ///< empty: not known
  bool has_queries = false;      ///< the file also has the method `queries`
  bool has_step = false;         ///< the file also has the method `step`
};

/// Reads the text of a `lexico.json`; keys it does not know are left aside.
/// @param where  put before every message, usually the file's name.
/// @throws IoError naming the key, its value and what it must be.
ModelInfo parse_model_info(const std::string& json, const std::string& where);

/// Keys and values of a batch of sequences, float32, [layers, batch, kv_heads, length, head_dim],
/// keys after RoPE.
struct CacheBatch {
  std::int64_t batch = 0, length = 0;
  std::vector<float> keys, values;
  std::vector<float> queries;  ///< empty, or [layers, batch, heads, length, head_dim], after RoPE
};

/// What one `step` gives: of the new tokens only.
struct StepResult {
  std::vector<float> logits;  ///< [batch, length, vocab]
  CacheBatch cache;           ///< keys and values, no queries
};

namespace detail {
struct LanguageModelImpl;
}

/// A TorchScript language model written by tools/export_model.py. libtorch stays behind this
/// header.
class LanguageModel {
 public:
  /// @param device  "cpu", "cuda", "cuda:1", or "auto".
  /// @throws IoError if the file is missing, truncated, or breaks the contract (says which part);
  ///         InvalidArgument if the device is not there.
  LanguageModel(const std::string& path, const std::string& device, int threads);
  ~LanguageModel();
  LanguageModel(LanguageModel&&) noexcept;

  const ModelInfo& info() const;
  /// @param ids  [batch, length], every id in [0, vocab), length <= max_positions.
  /// @param with_queries  also fill `out.queries`; needs `info().has_queries`.
  /// @throws InvalidArgument naming the first bad id, or the length and its bound.
  /// @throws IoError if the model fails or returns other shapes than its lexico.json promises;
  /// ResourceError if memory
  ///         does not suffice.
  void forward(const std::int32_t* ids,
               std::int64_t batch,
               std::int64_t length,
               bool with_queries,
               CacheBatch& out);

  /// Reads `length` new tokens after a past that may be approximated: attention sees the past's
  /// vectors as they are given, the new tokens' own exactly.
  /// @param ids   [batch, length], at positions past.length ..; past.length + length <=
  ///              max_positions.
  /// @param past  of all tokens before, keys after RoPE; length 0: there is none.
  /// @throws InvalidArgument if an id is out of bounds or the past has another shape (names both);
  ///         IoError if the model has no method `step`, fails, or returns other shapes than its
  ///         lexico.json promises; ResourceError if memory does not suffice.
  void step(const std::int32_t* ids,
            std::int64_t batch,
            std::int64_t length,
            const CacheBatch& past,
            StepResult& out);

  /// For the library's own use (lib/src/model/language_model_impl.h).
  const detail::LanguageModelImpl& impl() const { return *impl_; }

 private:
  std::unique_ptr<detail::LanguageModelImpl> impl_;
};

/// Adds to `sums` [layers, kv_heads, head_dim, head_dim] the q q^T of all tokens and of all query
/// heads that share the KV head.
void add_query_products(const ModelInfo& info, const CacheBatch& cache, std::vector<double>& sums);

/// Of the libtorch in use.
std::string torch_version();

}  // namespace lexico
