#pragma once
// Coded values of whole tiles of tokens, sorted by atom: a backend then gathers softmax weights for
// an atom where it would else scatter them. Only the CUDA backend reads them (attention.h).
#include <cstddef>
#include <cstdint>

#include "kernels/attention/coded_block.h"

namespace lexico::kernels {

// A tile is made of rows, one for each atom that any of its tokens uses: the row's entries are a
// token in the tile and the code of a weight each. 32 rows are a bundle, one for each lane of a
// warp; it has as many steps as its longest row has entries, and rows are sorted by that number,
// so that few steps are padded. A row of more than kLongRow entries is a bundle by itself, whose
// entries go around the lanes. So an atom is in one bundle: nothing is summed in two places.
//
// In memory, little-endian, a multiple of 16 bytes and to be put at one:
//   heads    [kv_heads] ValueTileHead
//   and for each head
//   scales   [tile_tokens] numbers of scales, a byte each; nothing with scale_bits 0
//   starts   [num_bundles + 1] uint32: the first step of each bundle, and how many steps there are;
//            then zeros up to a multiple of 16 bytes
//   atoms    [num_bundles, 32] uint16: each row's, kNoRow where a bundle has fewer; in the bundle
//   of
//            a long row all 32 are the same
//   steps    96 bytes each. Those of a bundle are in chunks: of 8 steps as many as there are, of
//            what is left 4, 2 and 1. A chunk of w steps has for each lane w uint16, the token in
//            13 bits and above it 3 bits of the code, then for each lane w bytes, the code's
//            lower 8.
// The code of a weight is its byte (kE4m3) or slot << weight_bits | number of the level (kLevels).
// Slots with the weight 0 have no entry. Padding is any token with a code for zero: 0 (kE4m3), or
// slots << weight_bits.
//
// The order of a bundle's rows, and of a row's entries, is free. The packer's is one in which few
// lanes that are served together need the same bank of shared memory. Sums are in that order.

constexpr int kMostTileTokens = 8192;
constexpr int kTileTokenBits = 13, kTileCodeBits = 11;
constexpr int kTileLanes = 32;
constexpr int kTileStepBytes = 3 * kTileLanes;
constexpr int kLongRow = 64;
constexpr std::uint16_t kNoRow = 0xffff;

struct ValueTileHead {
  std::uint32_t offset = 0;  ///< of the head's scales, from the tile's begin
  std::uint32_t num_bundles = 0;
  std::uint32_t num_long = 0;   ///< the first so many bundles are of long rows
  std::uint32_t num_atoms = 0;  ///< one more than the last atom that has a row; 0 without rows
};

/// Whether values of this layout can be in tiles: kE4m3 or kLevels with fewer than 2^11 codes
/// (slots << weight_bits), no components with bits, at least a slot, tile_tokens a multiple of 64
/// in [64, 8192], and at most 65535 atoms, a sequence's own among them. `layout.levels` is not
/// read.
bool value_tiles_fit(const CodeLayout& layout, int tile_tokens, int num_atoms);

/// Rows-form values that a tile is made of. All pointers are the host's.
struct ValueTileSource {
  const CodeLayout* layout = nullptr;  ///< [kv_heads], or one for all: layout_stride 0
  int layout_stride = 0;
  int kv_heads = 0;
  int num_atoms = 0;    ///< every atom of a slot whose weight is not 0 is below it: own atoms count
  int tile_tokens = 0;  ///< value_tiles_fit
  const std::uint8_t* const* pages = nullptr;  ///< as CodedRun::pages; only those of these tokens
  int page_tokens = 0;
  std::int64_t first_token = 0;  ///< a multiple of 64: tile j of a run begins at j * tile_tokens
};

/// Bytes of scratch (aligned to 4) for the two functions below.
std::size_t value_tile_workspace_bytes(int num_atoms);

/// Exact bytes of the tile. They depend on the codes: of a head tile_tokens of scales, 68 for each
/// bundle (long rows, and a 32nd of the others), 96 for each step. There are at most entries / 32 +
/// kLongRow + long rows steps. A head all of whose weights are 0 has no bundle and no step. Tiles
/// of which rows have 8 to 32 entries on average (tile_tokens * slots / num_atoms) take the least.
std::size_t value_tile_bytes(const ValueTileSource& source, void* workspace);

/// Writes all of the tile's bytes: the same bytes for the same codes.
void pack_value_tile(const ValueTileSource& source, void* workspace, std::uint8_t* tile);

struct ValueTileEntry {
  int atom = 0, token = 0;
  std::uint32_t code = 0;
};
/// How many entries a head has, padding not counted; written to `entries` unless that is nullptr,
/// in the order of bundles and lanes. For tests and tools; `layout` is the head's.
std::int64_t read_value_tile(const CodeLayout& layout,
                             int tile_tokens,
                             const std::uint8_t* tile,
                             int head,
                             ValueTileEntry* entries);

}  // namespace lexico::kernels
