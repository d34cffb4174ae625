#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lexico/dictionary.h"
#include "lexico/rope.h"

namespace lexico {

namespace detail {
class DeviceBuffer;
struct DeviceScratch;
class MirroredBytes;
}  // namespace detail

/// Numbers of tokens that are not coded: fp32, IEEE half, or bfloat16.
enum class ExactNumbers { kFloat32, kFloat16, kBFloat16 };

/// What a layer's attention looks like, and how it is computed.
struct AttentionOptions {
  int kv_heads = 1;         ///< heads that have keys and values
  int group = 1;            ///< query heads that read one of them: query head i reads i / group
  float softmax_scale = 0;  ///< of scores; 0: 1 / sqrt(dim)
  int page_tokens = 1024;   ///< coded tokens are stored in pages of so many; a multiple of 64
  /// Keys before RoPE are rebuilt from atoms rounded to half floats (a relative 2^-11, far below
  /// any code's error), which is half as much to read. Only where the CPU converts them.
  bool half_keys = true;
  ExactNumbers exact = ExactNumbers::kFloat32;
  /// Atoms that a sequence may have of its own, for each dictionary (CodedVectors::add_atom);
  /// indices are made wide enough for them.
  int own_atoms = 0;
  int threads = 0;  ///< 0: all
  /// Where to attend: cpu, cuda or cuda:N. On a GPU queries, out, log_sums and exact tokens lie
  /// there; codes are kept by the host and copied there as they grow (docs/gpu.md).
  std::string device = "cpu";
  /// On a GPU: products of queries and atoms, and softmax weights of tiles, are rounded to half
  /// floats (a relative 2^-11 of each term), which is half as much to read. Those of tiles are in
  /// any case where floats have no room in the device's shared memory (docs/gpu.md).
  bool half_tables = false;
  /// On a GPU: values of every so many tokens are sorted by atom there, once there are so many:
  /// faster, for about half more device memory of values and some 0.4 us of the host for each
  /// token and KV head (docs/gpu.md). 0: off; else a multiple of 64 up to 8192. Formats with
  /// residual codes or exact weights, and more than 65535 atoms, stay as they are.
  int value_tile_tokens = 0;
};

class LayerAttention;

/// The coded keys, or values, of one sequence in one layer, in the order that attention reads them.
/// They take Codec's bits per vector exactly (fp8-int16 less: indices take ceil(log2 N) bits and no
/// count is kept; exact: likewise, with fp32 weights), rounded up to whole pages; N counts the own
/// atoms there may be. A copy shares its pages with the original until one of them changes. Must
/// not outlive the LayerAttention that made it.
class CodedVectors {
 public:
  /// Of one vector in append and read: Codec's; `exact` has max_atoms indices and then as many
  /// weights (int32, fp32). Indices have ceil(log2 N) bits in `packed`, own atoms counted.
  int record_bytes() const;
  /// What Codec::encode wrote for `tokens` tokens: [tokens, kv_heads, record_bytes()]. Any bytes
  /// are taken: a slot whose index or weight does not exist counts as unused, as in Codec::decode.
  /// @throws std::bad_alloc; then nothing has changed.
  void append(const std::uint8_t* records, std::int64_t tokens);
  /// Records of tokens [first, first + tokens), which decode to the same vectors. @throws
  /// InvalidArgument if there are no such tokens.
  void read(std::int64_t first, std::int64_t tokens, std::uint8_t* records) const;
  /// Keeps the first so many. @throws InvalidArgument unless tokens is in [0, tokens()].
  void truncate(std::int64_t tokens);
  std::int64_t tokens() const { return tokens_; }
  std::size_t bytes() const;  ///< of its pages, shared ones included, and own atoms
  std::size_t bytes_for(std::int64_t tokens) const;  ///< of pages for so many tokens
  /// Calls visit(address, bytes) for each page.
  void for_each_page(
      const std::function<void(const void* address, std::size_t bytes)>& visit) const;

  /// Own atoms, in the dictionary's frame: they have the numbers num_atoms, num_atoms + 1, ... in
  /// codes. Kept as IEEE half floats. `dictionary`: 0, or the KV head where heads have their own.
  /// @param atom  [dim], finite. @throws InvalidArgument if there are AttentionOptions::own_atoms.
  void add_atom(const float* atom, int dictionary = 0);
  int own_atoms(int dictionary = 0) const {
    return static_cast<int>(own_[static_cast<std::size_t>(dictionary)].size() / dim());
  }
  /// As they are kept: [own_atoms(), dim].
  std::vector<float> own_atom_rows(int dictionary = 0) const;
  /// Keeps the first so many; no code may use those dropped. Does not throw.
  void drop_atoms(int keep, int dictionary = 0);

 private:
  friend class LayerAttention;
  struct Frame;
  explicit CodedVectors(std::shared_ptr<const Frame> frame);
  void pages_to_write(std::int64_t first, std::int64_t tokens);
  void drop_copies_in_tiles() const;
  std::size_t dim() const;

  std::shared_ptr<const Frame> frame_;
  std::vector<std::shared_ptr<detail::MirroredBytes>> pages_;
  // Of a GPU: made when attention first needs them; of full tiles, which no append changes.
  mutable std::vector<std::shared_ptr<detail::DeviceBuffer>> tiles_;
  std::vector<std::vector<std::uint16_t>> own_;  // of each dictionary: halfs
  std::int64_t tokens_ = 0;
};

/// Tokens that are not coded: keys after RoPE and values, [tokens, dim] of KV head h at h *
/// head_stride numbers of the type AttentionOptions::exact.
struct ExactTokens {
  const void* keys = nullptr;
  const void* values = nullptr;
  std::int64_t head_stride = 0;
  int tokens = 0;
};

/// What attention works in; grows as needed. The layers of a model, taken one after another, share
/// one (of one device).
struct AttentionScratch {
  std::vector<char> memory;
  std::shared_ptr<detail::DeviceScratch> device;
  std::size_t bytes() const;  ///< of the device, where there is one
};

/// Decode attention of one layer over codes and exact tokens (docs/attention.md): one query per
/// head and sequence, softmax over all tokens together. The cache is never made dense.
class LayerAttention {
 public:
  /// @param keys, values  one dictionary for all KV heads, or one for each in order. They must
  /// outlive this and stay as they are.
  /// @param stage  of the coded keys. Before RoPE, a map of the keys' transform is folded into
  /// atoms of each KV head: kv_heads * num_atoms * dim * 4 bytes.
  /// @param rope   kPreRope: rotates them at their positions.
  /// @throws InvalidArgument naming what does not fit: counts, dims that differ or are no multiple
  /// of 4, formats with different sizes among heads, an exact format without max_atoms, a device
  /// that is not there; ResourceError if there is no memory on it.
  LayerAttention(std::vector<const Dictionary*> keys,
                 std::vector<const Dictionary*> values,
                 const AttentionOptions& options,
                 KeyStage stage = KeyStage::kPostRope,
                 const Rope& rope = {});
  ~LayerAttention();
  LayerAttention(const LayerAttention&) = delete;
  LayerAttention& operator=(const LayerAttention&) = delete;

  /// Without tokens, for this layer.
  CodedVectors coded_keys() const;
  CodedVectors coded_values() const;

  struct Sequence {
    const CodedVectors* keys = nullptr;  ///< of this layer; as many tokens as values
    const CodedVectors* values = nullptr;
    std::int64_t first_position = 0;  ///< of the first coded token; the others follow
    std::vector<ExactTokens> exact;
    std::vector<std::int64_t> left_out = {};  ///< coded tokens that do not count, ascending
  };

  /// @param queries   [sequences, kv_heads * group, dim], after RoPE.
  /// @param out       likewise. A sequence without tokens gives zeros; a NaN stays in its head.
  /// @param log_sums  nullptr, or [sequences, kv_heads * group]: log of the sum of e^score.
  /// @param stream    of a GPU: a cudaStream_t (nullptr: the default one). The call returns when
  /// its work has been put on it; all calls of a layer are in the order of one stream.
  /// On the CPU callers with scratch of their own may call at the same time. The result of a
  /// sequence depends on neither threads nor other sequences.
  /// @throws InvalidArgument naming the sequence whose counts differ or whose codes are of another
  /// layer; ResourceError if there is no memory for scratch, or CUDA reports an error.
  void attend(const std::vector<Sequence>& sequences,
              const float* queries,
              float* out,
              AttentionScratch& scratch,
              float* log_sums = nullptr,
              void* stream = nullptr) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lexico
