#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/coded_block.h"
#include "kernels/attention/value_tiles.h"
#include "kernels/common/status.h"
#include "kernels/common/stream.h"

namespace lexico::kernels {

/// The keys, or the values, of one layer. A vector of KV head h is
///   mean_h + B_h z,   z = scale * sum over slots of weight * atom + sum over components of level *
///   axis,
/// and keys before RoPE are then rotated to their position.
struct CodedSpace {
  /// [kv_heads], or the same for all: layout_stride 0
  const CodeLayout* layout = nullptr;
  int layout_stride = 0;  ///< 0 or 1. Layouts of different heads have the same number of bits
  int num_atoms = 0;
  const float* atoms = nullptr;   ///< [num_atoms, dim]; of KV head h at atoms + h * atoms_stride
  std::int64_t atoms_stride = 0;  ///< 0: one dictionary for all heads
  /// nullptr, or the atoms rounded to IEEE half, with the same strides: keys before RoPE are then
  /// rebuilt from these, which are half as much to read. Levels without half floats use `atoms`.
  const std::uint16_t* half_atoms = nullptr;
  const float* axes = nullptr;  ///< residual code: [dim, dim], of head h at axes + h * axes_stride
  std::int64_t axes_stride = 0;
  const float* mean = nullptr;      ///< nullptr (zero) or [kv_heads, dim]
  const float* back_map = nullptr;  ///< nullptr (identity) or B: [kv_heads, dim, dim]. Not for keys
                                    ///< before RoPE: fold it into atoms and axes of each head
};

/// Rotation of keys that are coded before RoPE.
struct KeyRotation {
  int rotary_dim = 0;        ///< even
  bool interleaved = false;  ///< dims 2i and 2i + 1 are a pair; else i and i + rotary_dim / 2
  const float* inverse_frequencies = nullptr;  ///< [rotary_dim / 2]; the angle is the float32
                                               ///< product with the position, as in the models
  float attention_scaling = 1;                 ///< of the rotated dims
};

enum class ExactType : int { kFloat32, kFloat16, kBFloat16 };

/// Tokens that are not coded; keys after RoPE.
struct ExactRun {
  const void* keys = nullptr;    ///< [tokens, dim] of KV head h at keys + h * head_stride elements
  const void* values = nullptr;  ///< likewise
  std::int64_t head_stride = 0;
  int tokens = 0;
};

/// The coded keys or values of one sequence, and the atoms that only it has.
struct CodedRun {
  /// Page j holds tokens from j * page_tokens on, as [kv_heads, page_tokens / kBlockTokens,
  /// block_bytes], and kPageSlack bytes more.
  const std::uint8_t* const* pages = nullptr;
  /// [num_extra, dim] with numbers from num_atoms on, of KV head h at extra_atoms + h *
  /// extra_stride. Codes of a head may use fewer.
  const float* extra_atoms = nullptr;
  std::int64_t extra_stride = 0;  ///< 0: the same for all heads
  int num_extra = 0;
  /// Values on the CUDA backend only: tile j (value_tiles.h) holds tokens from j *
  /// value_tile_tokens on, in place of the pages. So pages whose tokens are all in tiles need not
  /// exist: their pointers may be nullptr, and all of `pages` where no tokens are left.
  const std::uint8_t* const* tiles = nullptr;
  int num_tiles = 0;  ///< 0: all tokens are in pages
};

struct AttentionSequence {
  std::int64_t coded_tokens = 0;
  CodedRun keys, values;
  std::int64_t first_position = 0;  ///< of the first coded token; the others follow. Keys before
                                    ///< RoPE only. Positions stay below 2^24
  const ExactRun* exact = nullptr;
  int num_exact = 0;                       ///< runs
  const std::int64_t* left_out = nullptr;  ///< coded tokens that do not count, ascending
  int num_left_out = 0;
};

/// One decode step of one layer: softmax over all tokens of a sequence, coded and exact alike.
/// Query head i reads KV head i / group.
struct AttentionProblem {
  int batch = 0, kv_heads = 0, group = 0, dim = 0;  ///< dim: a multiple of 4
  float softmax_scale = 1;
  CodedSpace keys, values;
  const KeyRotation* rotation = nullptr;  ///< nullptr: keys are coded after RoPE
  int page_tokens = 0;                    ///< a multiple of kBlockTokens
  int value_tile_tokens = 0;  ///< of every tile of values; 0: no sequence has any. Tiles must fit
                              ///< the layouts (value_tiles_fit)
  ExactType exact_type = ExactType::kFloat32;
  const AttentionSequence* sequences = nullptr;  ///< [batch]
  const float* queries = nullptr;                ///< [batch, kv_heads * group, dim], after RoPE
  float* out = nullptr;                          ///< [batch, kv_heads * group, dim]
  float* log_sums =
      nullptr;      ///< nullptr or out [batch, kv_heads * group]: log of the sum of e^score
  int threads = 0;  ///< 0 = all
};

namespace cpu {

/// Bytes of scratch for problems of these sizes; tokens play no part beyond how many splits they
/// make.
std::size_t attention_workspace_bytes(const AttentionProblem& problem);

/// Scores, sums and outputs are in fp32. A sequence without tokens gives zeros (log_sums: -inf). A
/// NaN in one query stays in its head. The result of a sequence depends neither on the number of
/// threads nor on the other sequences. The instruction set level is the one of pursuit.h
/// (LEXICO_CPU). Value tiles are refused: they are no faster than rows here (docs/attention.md).
///
/// Tokens are split into ranges whose number depends on the sequence alone (at most 16). A range
/// leaves the softmax weights summed per atom; they are combined, multiplied by the atoms
/// once, and mapped back. No vector of the cache is ever whole in memory, but for 16 keys before
/// RoPE a thread at a time.
Status attention(const AttentionProblem& problem, void* workspace);

}  // namespace cpu

namespace cuda {

/// What launches and scratch are sized by. A graph of a call stays right while the sequences grow
/// within these bounds.
struct AttentionBounds {
  std::int64_t coded_tokens = 0;                           ///< most of a sequence
  int key_extra = 0, value_extra = 0;                      ///< most num_extra of a sequence
  int key_components = 0, value_components = 0;            ///< most components with bits of a head
  std::size_t key_block_bytes = 0, value_block_bytes = 0;  ///< block_bytes() of the layouts
  CodedWeights key_weights = CodedWeights::kFloat32;       ///< of all heads' layouts
  CodedWeights value_weights = CodedWeights::kFloat32;
  /// The tables of q.D (keys after RoPE) and of the softmax weights of a tile of values in half
  /// floats: gathers from shared memory read half as much; a score, or a sum of softmax weights,
  /// loses up to 2^-11 of each of its terms. For tiles also where floats have no room.
  bool half_tables = false;
  /// Of the device (attention_device): they say how sequences are split, and so which results are
  /// bit-identical.
  int multiprocessors = 0;
  std::size_t shared_bytes = 0;  ///< of a block, at most
};

/// Fills in what `bounds` says of the current device.
Status attention_device(AttentionBounds* bounds);

/// Bytes of scratch, aligned to 256, on the device.
std::size_t attention_workspace_bytes(const AttentionProblem& problem,
                                      const AttentionBounds& bounds);

/// The same result as on the CPU, on the device. All that `problem` points to lies there, what that
/// points to as well (sequences, their pages, runs and left_out, layouts and their tables), but for
/// `rotation` itself, whose frequencies do. Pages, atoms, half_atoms and extra atoms begin at
/// multiples of 16 bytes, for each head, too, as do tiles. dim: at most 1024. `threads` plays no
/// part.
///
/// Six launches at most, whose number and sizes depend on `problem` and `bounds` alone; nothing is
/// read back. The result of a sequence depends neither on the other sequences nor on the run: sums
/// are in a fixed order, or of integers (docs/gpu.md). A sequence that is beyond the bounds gives
/// NaN, as do all if layouts are, and a sequence with more tiles than tokens for them, or with a
/// tile of atoms that it does not have.
Status attention(const AttentionProblem& problem,
                 const AttentionBounds& bounds,
                 void* workspace,
                 Stream stream);

}  // namespace cuda
}  // namespace lexico::kernels
