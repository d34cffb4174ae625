#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lexico/kind.h"
#include "lexico/rope.h"

namespace lexico {
class LanguageModel;
class Tokenizer;
struct PackOptions;
}  // namespace lexico

namespace lexico::apps {

/// One `[name=]PATH` of --data, --ood, --text or --token-ids.
struct DataSpec {
  std::string name, path;
  bool in_domain = true;
  bool is_text = false;       ///< text or token ids, else activations
  bool is_token_ids = false;  ///< .bin or .safetensors

  /// Text is told from activations by the file's first bytes; a folder or a glob is activations.
  /// @throws IoError if there is no such file; InvalidArgument for an empty name or path.
  static DataSpec from(const std::string& text, bool in_domain);
  /// In-domain text or token ids by the user's word. @throws InvalidArgument as above.
  static DataSpec from_text(const std::string& text, bool is_token_ids);
};

/// `count` different numbers in [0, total), ascending; all of them if count >= total. One from each
/// of `count` equal stretches, at a place in it that no period in the data can follow: with a = i *
/// total / count and b = (i + 1) * total / count (whole), a + floor(frac(i * 0.6180339887498949) *
/// (b - a)).
std::vector<std::int64_t> spread(std::int64_t total, std::int64_t count);

/// Keys and values of a data set, wherever they come from. Rows go with tokens: each token has
/// `kv_heads` of them in a layer.
class VectorSource {
 public:
  struct Info {
    std::string model, model_sha256;
    KeyStage key_stage = KeyStage::kPostRope;  ///< of the keys that `read` hands over
    std::optional<Rope> rope;                  ///< of the model, if it is known
    int num_layers = 0, kv_heads = 0, head_dim = 0;
    std::int64_t num_tokens = 0;
  };
  /// `rows` [count * kv_heads, head_dim] of the tokens `tokens` [count], which ascend. Called at
  /// most a few MB at a time, for a layer and kind perhaps more than once.
  using Take = std::function<void(
      int layer, Kind kind, const std::int64_t* tokens, std::int64_t count, const float* rows)>;

  virtual ~VectorSource() = default;
  virtual const Info& info() const = 0;

  /// About `count` tokens (never more), ascending, spread over the whole; all if it has no more.
  virtual std::vector<std::int64_t> choose(std::int64_t count) const = 0;
  /// What `choose` did, in words.
  virtual std::string sampling(const std::vector<std::int64_t>& tokens) const = 0;
  /// About `count` tokens like `choose`, but from many places even where that costs more per token.
  virtual std::vector<std::int64_t> choose_widely(std::int64_t count) const = 0;
  /// Where each of `tokens` is in its sequence. @throws IoError if the file does not know.
  virtual std::vector<std::int32_t> positions(const std::int64_t* tokens, std::int64_t count) = 0;
  /// The text itself: whole sequences, evenly spread, `tokens` tokens in all or somewhat more; 0:
  /// all. Empty for activations.
  virtual std::vector<std::vector<std::int32_t>> sequences(std::int64_t tokens) const = 0;
  /// Layers that are best read together: a file gives one at a time, a model all at once.
  virtual std::vector<std::vector<int>> groups(const std::vector<int>& layers) const = 0;
  /// @throws IoError naming the file, Interrupted.
  virtual void read(const std::vector<std::int64_t>& tokens,
                    const std::vector<int>& layers,
                    const Take& take) = 0;
};

/// Takes keys of a source, rows [count * kv_heads, head_dim] in its own stage, to `stage`, in
/// place, as if their sequences began `offset` positions later.
/// @throws IoError if that takes a RoPE that the source does not know.
void to_stage(VectorSource& source,
              int layer,
              const std::int64_t* tokens,
              std::int64_t count,
              KeyStage stage,
              std::int32_t offset,
              std::vector<float>& rows);

/// @throws IoError as ActivationReader does.
std::unique_ptr<VectorSource> open_activations(const DataSpec& spec);

/// Runs `model` over the text when it is read, a few sequences at a time; nothing is kept on disk.
/// Keys come out as the cache holds them. The model must outlive the source.
std::unique_ptr<VectorSource> open_text(const DataSpec& spec,
                                        const std::string& field,
                                        LanguageModel& model,
                                        const std::string& model_sha256,
                                        const Tokenizer* tokenizer,
                                        const PackOptions& packing);

}  // namespace lexico::apps
