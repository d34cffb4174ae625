#pragma once
// What the kernels of attention share: the call with its workspace, groups of query heads, how
// sequences are split, and codes as they are read.
#include <cuda_fp16.h>

#include "kernels/attention/attention.h"
#include "kernels/common/warp.cuh"

namespace lexico::kernels::cuda {

constexpr int kThreads = 512;  // of scores and values: a token each
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMostTileBlocks = kThreads / kBlockTokens;
constexpr int kLeastRange = 512;    // tokens: below, a range's sums cost more than its tokens
constexpr int kEpochTokens = 4096;  // summed as integers before they are added as floats
constexpr int kMostTogether = 4;    // groups that join takes at a time
constexpr int kJoinRows = 128;      // atoms that a block multiplies
constexpr int kSmallThreads = 128;  // of prepare, join and finish
constexpr int kTableRows = 64, kTableGroups = 8, kTableDims = 64, kTableThreads = 256;
constexpr int kRebuildThreads = 256;
constexpr int kExactTile = 64;     // exact tokens at a time
constexpr float kLowest = -3e38f;  // least score of a token that counts

// A component of the residual code that has bits.
struct Component {
  int plane;  // bytes from the block's begin
  int bits;
  int levels;  // its first one in component_levels
  int axis;
};

struct Call {
  AttentionProblem p;
  KeyRotation rotation;  // rotary_dim is 0 where p.rotation is nullptr
  AttentionBounds bounds;
  bool rotates;
  int chunks;  // groups of a KV head and sequence
  int groups;  // of the call
  int most_ranges;
  int most_parts;                     // of the values
  std::int64_t key_rows, value_rows;  // atoms, extra atoms, components
  int join_tiles;
  // The workspace.
  float4* queries;        // [groups, dim]: mapped
  float4* shifts;         // [groups]: what the mean adds to a score
  int* num_components;    // [2, kv_heads]: of keys, then values; -1: beyond the bounds
  Component* components;  // [2, kv_heads, most]
  float2* steps;          // [kBlockTokens, pairs]: cos and sin of t * frequency
  float4* tables;         // [groups, key_rows]
  float4* scores;         // [groups, padded tokens]: of tokens in rows then softmax weights
  float4* most;           // [groups, most_ranges]: largest score
  float4* totals;         // [groups, most_parts]: of the softmax weights
  float4* sums;           // [groups, most_parts, value_rows]
  int* wide_sums;         // [groups, most_parts, 4, atoms]: where shared memory has no room
  float4* exact;          // [groups, 2 + dim]: largest score, total, sums of values
  float4* products;       // [groups, join_tiles, dim]
};

// ---- small things
// --------------------------------------------------------------------------------

__device__ inline float4 zero4() { return make_float4(0, 0, 0, 0); }
__device__ inline float4 all4(float x) { return make_float4(x, x, x, x); }
__device__ inline float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ inline float4 operator*(float4 a, float4 b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ inline float4 operator*(float a, float4 b) { return all4(a) * b; }
__device__ inline float4 fma4(float a, float4 b, float4 c) {
  return make_float4(fmaf(a, b.x, c.x), fmaf(a, b.y, c.y), fmaf(a, b.z, c.z), fmaf(a, b.w, c.w));
}
__device__ inline float4 max4(float4 a, float4 b) {  // of a number and a NaN the number
  return make_float4(fmaxf(a.x, b.x), fmaxf(a.y, b.y), fmaxf(a.z, b.z), fmaxf(a.w, b.w));
}
__device__ inline float lane_of(float4 v, int lane) {
  return lane < 2 ? (lane == 0 ? v.x : v.y) : (lane == 2 ? v.z : v.w);
}
__device__ inline float infinity() { return __int_as_float(0x7f800000); }
__device__ inline float not_a_number() { return __int_as_float(0x7fffffff); }

__device__ inline float4 warp_sum4(float4 v) {
  return make_float4(warp_sum(v.x), warp_sum(v.y), warp_sum(v.z), warp_sum(v.w));
}
__device__ inline float4 warp_max4(float4 v) {
  return make_float4(warp_max(v.x), warp_max(v.y), warp_max(v.z), warp_max(v.w));
}

// e^(score - most)
__device__ inline float4 exp4(float4 score, float4 most) {  // of a token that does not count: 0
  const auto one = [](float s, float m) { return s == -infinity() ? 0.0f : expf(s - m); };
  return make_float4(
      one(score.x, most.x), one(score.y, most.y), one(score.z, most.z), one(score.w, most.w));
}

struct alignas(8) Half4 {
  __half2 low, high;
};
__device__ inline float4 entry(const float4& v) { return v; }
__device__ inline float4 entry(const Half4& v) {
  const float2 low = __half22float2(v.low), high = __half22float2(v.high);
  return make_float4(low.x, low.y, high.x, high.y);
}
__device__ inline void set_entry(float4& to, float4 v) { to = v; }
__device__ inline void set_entry(Half4& to, float4 v) {
  to = {__floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w)};
}

// Over the block, in a fixed order; every thread gets the result. scratch [warps of the block].
template <bool kMax>
__device__ inline float4 block_reduce(float4 v, float4* scratch) {
  v = kMax ? warp_max4(v) : warp_sum4(v);
  __syncthreads();
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  float4 all = scratch[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / kWarpSize; ++w)
    all = kMax ? max4(all, scratch[w]) : all + scratch[w];
  return all;
}

struct Group {
  int at, b, h, chunk;
  int lanes;  // query heads that it has, 1 to 4
};
// Groups that read one dictionary are neighbours.
__device__ inline Group group_of(const Call& c, int at) {
  Group g;
  g.at = at;
  g.chunk = at % c.chunks;
  g.b = at / c.chunks % c.p.batch;
  g.h = at / c.chunks / c.p.batch;
  g.lanes = min(4, c.p.group - g.chunk * 4);
  return g;
}
__device__ inline std::int64_t first_head(const Call& c, const Group& g) {
  return (std::int64_t{g.b} * c.p.kv_heads + g.h) * c.p.group + g.chunk * 4;
}
// One dim of the group's queries, 0 for heads that it does not have.
__device__ inline float4 query4(const Call& c, const Group& g, int d) {
  const float* q = c.p.queries + first_head(c, g) * c.p.dim + d;
  const int dim = c.p.dim;
  return make_float4(q[0],
                     g.lanes > 1 ? q[dim] : 0.0f,
                     g.lanes > 2 ? q[2 * dim] : 0.0f,
                     g.lanes > 3 ? q[3 * dim] : 0.0f);
}

// Tokens whose values are in tiles.
__device__ inline std::int64_t tile_tokens_of(const Call& c, const AttentionSequence& s) {
  return std::int64_t{s.values.num_tiles} * c.p.value_tile_tokens;
}
__device__ inline bool fits(const Call& c, const AttentionSequence& s) {
  return s.coded_tokens <= c.bounds.coded_tokens && s.keys.num_extra <= c.bounds.key_extra &&
         s.values.num_extra <= c.bounds.value_extra && s.values.num_tiles >= 0 &&
         tile_tokens_of(c, s) <= s.coded_tokens &&
         (s.values.num_tiles == 0 || c.p.value_tile_tokens > 0);
}

// How the scores of a sequence are split. The last range may be shorter, none is empty.
struct Ranges {
  int count, tokens;
};
__device__ inline Ranges ranges_of(const Call& c, const AttentionSequence& s) {
  if (s.coded_tokens == 0 || !fits(c, s)) return {0, 0};
  const int tokens = static_cast<int>(s.coded_tokens);
  const int blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
  const int wanted = min(c.most_ranges, (tokens + kLeastRange - 1) / kLeastRange);
  const int each = (blocks + wanted - 1) / wanted * kBlockTokens;
  return {(tokens + each - 1) / each, each};
}

// How its values are: so many parts that share all its tiles, and behind them parts of the tokens
// that are in rows, of which the last may be shorter.
struct Parts {
  int tiles, rows;
  int first_token, tokens;  // in rows; of a part
  __device__ int count() const { return tiles + rows; }
};
__device__ inline Parts parts_of(const Call& c, const AttentionSequence& s) {
  if (s.coded_tokens == 0 || !fits(c, s)) return {0, 0, 0, 0};
  const int tokens = static_cast<int>(s.coded_tokens);
  const int in_tiles = static_cast<int>(tile_tokens_of(c, s)), in_rows = tokens - in_tiles;
  const auto pieces = [](int count) { return (count + kLeastRange - 1) / kLeastRange; };
  Parts parts{0, 0, in_tiles, 0};
  if (in_rows > 0) {
    int most = c.most_parts;
    if (in_tiles > 0) {  // a token in rows takes some 2.5 times as long
      const std::int64_t cost = std::int64_t{5} * in_rows, all = cost + std::int64_t{2} * in_tiles;
      most = min(most - 1, static_cast<int>((cost * most + all - 1) / all));
    }
    const int blocks = (in_rows + kBlockTokens - 1) / kBlockTokens;
    const int wanted = min(most, pieces(in_rows));
    parts.tokens = (blocks + wanted - 1) / wanted * kBlockTokens;
    parts.rows = (in_rows + parts.tokens - 1) / parts.tokens;
  }
  parts.tiles = min(c.most_parts - parts.rows, pieces(in_tiles));
  return parts;
}

__host__ __device__ inline std::int64_t padded_tokens(const AttentionBounds& bounds) {
  return (bounds.coded_tokens + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
}
__device__ inline float4* scores_of(const Call& c, int at) {
  return c.scores + at * padded_tokens(c.bounds);
}
__device__ inline std::int64_t range_at(const Call& c, int at, int range) {
  return std::int64_t{at} * c.most_ranges + range;
}
__device__ inline std::int64_t part_at(const Call& c, int at, int part) {
  return std::int64_t{at} * c.most_parts + part;
}
// The largest score of the coded tokens. Whole warps call it.
__device__ inline float4 largest_score(const Call& c, const Group& g, int ranges) {
  float4 most = all4(-infinity());
  for (int r = lane_id(); r < ranges; r += kWarpSize)
    most = max4(most, c.most[range_at(c, g.at, r)]);
  return warp_max4(most);
}

__device__ inline const CodeLayout& layout_of(const CodedSpace& space, int h) {
  return space.layout[h * space.layout_stride];
}
__device__ inline const Component* components_of(const Call& c, int of_values, int h) {
  const int most = c.bounds.key_components > c.bounds.value_components ? c.bounds.key_components
                                                                       : c.bounds.value_components;
  return c.components + (std::int64_t{of_values} * c.p.kv_heads + h) * most;
}
__device__ inline int num_components_of(const Call& c, int of_values, int h) {
  return max(0, c.num_components[of_values * c.p.kv_heads + h]);
}
// Whether a head's layout is what the bounds say. A larger one would be read beyond its block in
// shared memory, which on a device ends the context.
__device__ inline bool is_as_bounds_say(const Call& c, int of_values, int h) {
  return c.num_components[of_values * c.p.kv_heads + h] >= 0;
}

// ---- codes
// -----------------------------------------------------------------------------------------

// A field of up to 24 bits. Planes begin at multiples of 8 bytes.
__device__ inline std::uint32_t read_field(const unsigned char* plane, int bits, int token) {
  const int at = token * bits;
  const std::uint32_t* word = reinterpret_cast<const std::uint32_t*>(plane) + (at >> 5);
  const std::uint64_t both = std::uint64_t{word[1]} << 32 | word[0];
  return static_cast<std::uint32_t>(both >> (at & 31)) & ((1u << bits) - 1);
}

// As a float of which only the exponent is off by 120: that mends subnormals, too.
__device__ inline float e4m3(std::uint32_t byte) {
  return __uint_as_float((byte & 0x7f) << 20 | (byte & 0x80) << 24) * 0x1p120f;
}

template <CodedWeights kWeights>
__device__ inline int weight_bits(const CodeLayout& layout) {
  return kWeights == CodedWeights::kFloat32 ? 32
         : kWeights == CodedWeights::kE4m3  ? 8
                                            : layout.weight_bits;
}
__device__ inline int weight_bits(const CodeLayout& layout) {
  return layout.weights == CodedWeights::kFloat32 ? 32
         : layout.weights == CodedWeights::kE4m3  ? 8
                                                  : layout.weight_bits;
}

template <CodedWeights kWeights>
__device__ inline float read_weight(const CodeLayout& layout,
                                    const unsigned char* plane,
                                    int slot,
                                    int token) {
  if constexpr (kWeights == CodedWeights::kFloat32)
    return reinterpret_cast<const float*>(plane)[token];
  else if constexpr (kWeights == CodedWeights::kE4m3)
    return e4m3(plane[token]);
  else
    return __ldg(layout.levels + (slot << layout.weight_bits) +
                 read_field(plane, layout.weight_bits, token));
}
__device__ inline float read_weight(const CodeLayout& layout,
                                    const unsigned char* plane,
                                    int slot,
                                    int token) {
  if (layout.weights == CodedWeights::kFloat32)
    return read_weight<CodedWeights::kFloat32>(layout, plane, slot, token);
  if (layout.weights == CodedWeights::kE4m3)
    return read_weight<CodedWeights::kE4m3>(layout, plane, slot, token);
  return read_weight<CodedWeights::kLevels>(layout, plane, slot, token);
}

__device__ inline float read_scale(const CodeLayout& layout,
                                   const unsigned char* plane,
                                   int token) {
  if (layout.scale_bits == 0) return 1;
  return __ldg(layout.scales + read_field(plane, layout.scale_bits, token));
}

// The level of a component; `history` has the low bits of fields, its own lowest (TrellisTaps).
__device__ inline float read_level(const CodeLayout& layout,
                                   const Component& component,
                                   std::uint32_t field,
                                   std::uint32_t history) {
  if (layout.trellis.high != 0)
    field = 4 * (field >> 1) + 2 * (__popc(history & layout.trellis.high) & 1) +
            (__popc(history & layout.trellis.low) & 1);
  return __ldg(layout.component_levels + component.levels + field);
}

// Blocks of codes on their way to shared memory, 16 bytes at a time.
struct Stage {
  unsigned char* buffer;  // [2, tile_blocks, slot]
  int block_bytes, slot, tile_blocks, page_blocks;
  int h;
  const std::uint8_t* const* pages;

  __device__ std::int64_t offset(int block) const {  // in its page
    return (std::int64_t{h} * page_blocks + block % page_blocks) * block_bytes;
  }
  // Blocks begin at multiples of 8 bytes, copies at multiples of 16.
  __device__ void fetch(int which, int first, int last) const {
    const int chunks = (block_bytes + 8 + 15) / 16;  // up to 23 bytes behind: kPageSlack
    const int count = min(tile_blocks, last - first) * chunks;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      const int block = first + i / chunks, chunk = i % chunks;
      const std::uint8_t* from = pages[block / page_blocks] + offset(block) / 16 * 16 + chunk * 16;
      cp_async_16(buffer + (which * tile_blocks + block - first) * slot + chunk * 16, from);
    }
    cp_async_commit();
  }
  __device__ const unsigned char* block(int which, int first, int at) const {
    return buffer + (which * tile_blocks + at) * slot + offset(first + at) % 16;
  }
};
__host__ __device__ inline int slot_bytes(std::size_t block_bytes) {
  return static_cast<int>((block_bytes + 8 + 15) / 16 * 16 + 16);
}

__device__ inline Stage stage_of(
    const Call& c, const CodedRun& run, std::size_t block_bytes, int tile_blocks, int h, void* at) {
  return {static_cast<unsigned char*>(at),
          static_cast<int>(block_bytes),
          slot_bytes(block_bytes),
          tile_blocks,
          c.p.page_tokens / kBlockTokens,
          h,
          run.pages};
}

// Calls visit(which buffer, first block) for tiles of blocks [first, last), which are fetched while
// the tile before is worked on. All threads of the block call it.
template <typename Visit>
__device__ inline void for_each_tile(const Stage& stage, int first, int last, Visit&& visit) {
  stage.fetch(0, first, last);
  int which = 0;
  for (int block = first; block < last; block += stage.tile_blocks, which ^= 1) {
    if (block + stage.tile_blocks < last)
      stage.fetch(which ^ 1, block + stage.tile_blocks, last);
    else
      cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    visit(which, block);
    __syncthreads();
  }
  cp_async_wait<0>();
}

// Whether a coded token is left out.
__device__ inline bool is_left_out(const AttentionSequence& s, std::int64_t token) {
  int low = 0, high = s.num_left_out;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (s.left_out[middle] < token)
      low = middle + 1;
    else
      high = middle;
  }
  return low < s.num_left_out && s.left_out[low] == token;
}

}  // namespace lexico::kernels::cuda
