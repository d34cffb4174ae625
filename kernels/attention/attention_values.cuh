#pragma once
// Softmax weights summed per atom: the launch "values" of attention. Tokens in tiles are gathered
// by atom, tokens in rows are scattered as integers; neither has an atomic of floats, so runs
// agree.
#include "kernels/attention/attention_call.cuh"

namespace lexico::kernels::cuda {

// A power of two that brings what is at most `bound` below 2^bits, and one over it; for a bound
// that is not finite a NaN, which is then what the sums become.
struct Fixed {
  float to, from;
};
__device__ inline Fixed fixed_of(float bound, int bits) {
  if (!(bound < infinity())) return {0, not_a_number()};
  const int exponent = static_cast<int>(__float_as_uint(bound) >> 23) - 127;
  const int power = min(126, max(-126, bits - 1 - exponent));
  return {__int_as_float((127 + power) << 23), __int_as_float((127 - power) << 23)};
}

// ---- tokens in tiles (value_tiles.h)
// ---------------------------------------------------------------------------------------

enum class Tiles { kNone, kFloat, kHalf };  // what softmax weights of a tile are kept in

// Whether codes of weights have room in a tile's entries.
__device__ inline bool codes_fit_tiles(const CodeLayout& layout) {
  return layout.weights == CodedWeights::kE4m3 ||
         (layout.weights == CodedWeights::kLevels &&
          std::int64_t{layout.slots} << layout.weight_bits < 1 << kTileCodeBits);
}

// What a tile's entries are looked up in, all in shared memory. Of the weights of kLevels there are
// copies next to each other, in different banks for different lanes.
template <CodedWeights kWeights, typename Row>
struct Lookup {
  const Row* tokens;     // [tile_tokens]: softmax weight times scale
  const float* weights;  // [codes + 1, copies], from this lane's copy on
  int copies;

  __device__ float4 add(std::uint32_t token, std::uint32_t code, float4 sum) const {
    float weight;
    if constexpr (kWeights == CodedWeights::kE4m3)
      weight = e4m3(code);
    else
      weight = weights[static_cast<int>(code) * copies];
    return fma4(weight, entry(tokens[token]), sum);
  }
};

// Fills in weights [floats] with as many copies as fit, at most one for each lane.
template <CodedWeights kWeights, typename Row>
__device__ inline Lookup<kWeights, Row> make_lookup(const CodeLayout& layout,
                                                    const Row* tokens,
                                                    float* weights,
                                                    int floats) {
  if constexpr (kWeights == CodedWeights::kE4m3) return {tokens, nullptr, 0};
  const int codes = layout.slots << layout.weight_bits;
  int copies = kWarpSize;
  while (copies > 1 && copies * (codes + 1) > floats) copies /= 2;
  for (int i = static_cast<int>(threadIdx.x); i < copies * (codes + 1); i += kThreads)
    weights[i] = i / copies < codes ? __ldg(layout.levels + i / copies) : 0.0f;
  return {tokens, weights + lane_id() % copies, copies};
}

// This lane's entries of a chunk of kSteps steps, added to `sum`.
template <int kSteps, typename From>
__device__ inline float4 add_chunk(const unsigned char* chunk, const From& from, float4 sum) {
  const unsigned char* low = chunk + lane_id() * 2 * kSteps;
  const unsigned char* high = chunk + kTileLanes * 2 * kSteps + lane_id() * kSteps;
  std::uint32_t pairs[(kSteps + 1) / 2], fours[(kSteps + 3) / 4];
  if constexpr (kSteps == 8) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(low));
    const uint2 w = __ldg(reinterpret_cast<const uint2*>(high));
    pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
    fours[0] = w.x, fours[1] = w.y;
  } else if constexpr (kSteps == 4) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(low));
    pairs[0] = v.x, pairs[1] = v.y;
    fours[0] = __ldg(reinterpret_cast<const std::uint32_t*>(high));
  } else if constexpr (kSteps == 2) {
    pairs[0] = __ldg(reinterpret_cast<const std::uint32_t*>(low));
    fours[0] = __ldg(reinterpret_cast<const std::uint16_t*>(high));
  } else {
    pairs[0] = __ldg(reinterpret_cast<const std::uint16_t*>(low));
    fours[0] = __ldg(high);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const std::uint32_t pair = pairs[i / 2] >> 16 * (i % 2) & 0xffff;
    const std::uint32_t code = (fours[i / 4] >> 8 * (i % 4) & 0xff) | pair >> kTileTokenBits << 8;
    sum = from.add(pair & ((1u << kTileTokenBits) - 1), code, sum);
  }
  return sum;
}

// This lane's entries of a bundle.
template <typename From>
__device__ inline float4 sum_bundle(const unsigned char* chunk, int steps, const From& from) {
  float4 sum = zero4();
  for (; steps >= 8; steps -= 8, chunk += 8 * kTileStepBytes) sum = add_chunk<8>(chunk, from, sum);
  if ((steps & 4) != 0) {
    sum = add_chunk<4>(chunk, from, sum);
    chunk += 4 * kTileStepBytes;
  }
  if ((steps & 2) != 0) {
    sum = add_chunk<2>(chunk, from, sum);
    chunk += 2 * kTileStepBytes;
  }
  if ((steps & 1) != 0) sum = add_chunk<1>(chunk, from, sum);
  return sum;
}

// Softmax weights times scales of a tile's tokens, for Lookup. A thread adds those of its tokens,
// without scales, to `total`. Returns what sums must be multiplied by. All threads call it.
template <typename Row>
__device__ inline float4 make_tokens(const CodeLayout& layout,
                                     const unsigned char* scales,
                                     const float4* scores,
                                     int count,
                                     float4 most,
                                     Row* tokens,
                                     float4* total,
                                     float4* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto scale = [&](int t) {
    return layout.scale_bits == 0 ? 1.0f : __ldg(layout.scales + scales[t]);
  };
  float4 to = all4(1), from = all4(1);
  if constexpr (std::is_same_v<Row, Half4>) {  // the largest to the upper end of what a half holds
    float4 top = zero4();
#pragma unroll 4
    for (int t = thread; t < count; t += kThreads)
      top = max4(top, fabsf(scale(t)) * exp4(scores[t], most));
    top = block_reduce<true>(top, scratch);
    const Fixed x = fixed_of(top.x, 15), y = fixed_of(top.y, 15);
    const Fixed z = fixed_of(top.z, 15), w = fixed_of(top.w, 15);
    to = make_float4(x.to, y.to, z.to, w.to);
    from = make_float4(x.from, y.from, z.from, w.from);
  }
#pragma unroll 4
  for (int t = thread; t < count; t += kThreads) {
    const float4 p = exp4(scores[t], most);
    *total = *total + p;
    set_entry(tokens[t], scale(t) * (to * p));
  }
  return from;
}

// One of `parts` equal parts of a sequence's tiles. A tile that lies in several parts is shared by
// its bundles: those whose number mod `parts` is in a part's piece of the tile.
template <CodedWeights kWeights, Tiles kTiles, bool kShared>
__device__ inline void sum_tiles(
    const Call& c, const Group& g, float4 most, int part, int parts, int level_floats) {
  using Row = std::conditional_t<kTiles == Tiles::kHalf, Half4, float4>;
  const AttentionSequence& s = c.p.sequences[g.b];
  const CodeLayout layout = layout_of(c.p.values, g.h);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int tile_tokens = c.p.value_tile_tokens;
  const int rows = static_cast<int>(c.value_rows);  // there are no components
  const std::int64_t at = part_at(c, g.at, part);

  auto* scratch = reinterpret_cast<float4*>(dynamic_shared());  // [kWarps]
  int* turns = reinterpret_cast<int*>(scratch + kWarps);        // [2], of a tile and the next
  float4* rest = scratch + kWarps + 1;
  float4* const all_sums = c.sums + at * c.value_rows;
  float4* const sums = kShared ? rest : all_sums;  // [rows]
  if (kShared) rest += rows;
  auto* tokens = reinterpret_cast<Row*>(rest);  // [tile_tokens]
  const Lookup<kWeights, Row> lookup = make_lookup<kWeights>(
      layout, tokens, reinterpret_cast<float*>(tokens + tile_tokens), level_floats);
  for (int n = thread; n < rows; n += kThreads) sums[n] = zero4();
  if (thread < 2) turns[thread] = 0;
  __syncthreads();

  float4 total = zero4();
  bool known = true;  // all atoms are
  const std::int64_t n = s.values.num_tiles, begin = part * n, end = begin + n;
  for (std::int64_t tile = begin / parts; tile * parts < end; ++tile) {
    // Of every `parts` bundles those from `low` on are this part's.
    const int low = static_cast<int>(max(begin - tile * parts, std::int64_t{0}));
    const int width = static_cast<int>(min(end - tile * parts, std::int64_t{parts})) - low;
    const unsigned char* base = s.values.tiles[tile];
    const ValueTileHead head = reinterpret_cast<const ValueTileHead*>(base)[g.h];
    if (static_cast<int>(head.num_atoms) > c.p.values.num_atoms + s.values.num_extra) known = false;
    if (!known) break;
    const unsigned char* scales = base + head.offset;
    const auto* starts =
        reinterpret_cast<const std::uint32_t*>(scales + (layout.scale_bits > 0 ? tile_tokens : 0));
    const int num_bundles = static_cast<int>(head.num_bundles);
    const auto* atoms =
        reinterpret_cast<const std::uint16_t*>(starts + (num_bundles + 1 + 3) / 4 * 4);
    const auto* steps = reinterpret_cast<const unsigned char*>(atoms + num_bundles * kTileLanes);

    // Warps take bundles as they are done with others: an atom is in one, so it does not matter who
    // has it.
    struct Bundle {
      int index, atom;
      std::uint32_t first, end;
    };
    int* const turn = turns + (tile & 1);
    const auto take = [&] {
      const int k = __shfl_sync(kWholeWarp, lane == 0 ? atomicAdd(turn, 1) : 0, 0);
      const int i = low + k % width + k / width * parts;
      if (i >= num_bundles) return Bundle{-1, kNoRow, 0, 0};
      return Bundle{
          i, __ldg(atoms + i * kTileLanes + lane), __ldg(starts + i), __ldg(starts + i + 1)};
    };
    const auto fetch = [&](const Bundle& bundle) {
      const int bytes = static_cast<int>(bundle.end - bundle.first) * kTileStepBytes;
      for (int b = lane * 128; b < bytes; b += kWarpSize * 128)
        prefetch(steps + std::size_t{bundle.first} * kTileStepBytes + b);
    };
    Bundle bundle = take(), next = take();
    fetch(bundle);

    float4 its_total = zero4();
    const float4 unit = make_tokens(layout,
                                    scales,
                                    scores_of(c, g.at) + tile * tile_tokens,
                                    tile_tokens,
                                    most,
                                    tokens,
                                    &its_total,
                                    scratch);
    if (low == 0) total = total + its_total;  // once a tile
    __syncthreads();
    if (thread == 0) turns[~tile & 1] = 0;
    while (bundle.index >= 0) {
      const Bundle after = take();
      fetch(next);
      float4 sum = sum_bundle(steps + std::size_t{bundle.first} * kTileStepBytes,
                              static_cast<int>(bundle.end - bundle.first),
                              lookup);
      const bool is_long = bundle.index < static_cast<int>(head.num_long);
      if (is_long) sum = warp_sum4(sum);
      if (bundle.atom != kNoRow && (lane == 0 || !is_long))
        sums[bundle.atom] = sums[bundle.atom] + unit * sum;
      bundle = next;
      next = after;
    }
    __syncthreads();
  }
  if (kShared) {
    for (int n = thread; n < rows; n += kThreads) all_sums[n] = sums[n];
  }
  total = block_reduce<false>(total, scratch);
  if (thread == 0) c.totals[at] = known ? total : all4(not_a_number());
}

// ---- tokens in rows
// ---------------------------------------------------------------------------------------

template <CodedWeights kWeights, bool kShared>
__device__ inline void sum_rows(const Call& c,
                                const Group& g,
                                float4 most,
                                int first,
                                int last,
                                std::int64_t part,
                                int tile_blocks) {
  const AttentionSequence& s = c.p.sequences[g.b];
  const int thread = static_cast<int>(threadIdx.x);

  // Sums of integers do not depend on their order. A row of them for each query head.
  const int rows = c.p.values.num_atoms + c.bounds.value_extra;
  auto* scratch = reinterpret_cast<float4*>(dynamic_shared());  // [kWarps]
  float4* weights_of_tile = scratch + kWarps;                   // [kThreads]
  auto* counts =
      kShared ? reinterpret_cast<int*>(weights_of_tile + kThreads) : c.wide_sums + part * 4 * rows;
  unsigned char* codes = reinterpret_cast<unsigned char*>(weights_of_tile + kThreads) +
                         (kShared ? (static_cast<std::size_t>(rows) * 16 + 15) / 16 * 16 : 0);
  const Stage stage = stage_of(c, s.values, c.bounds.value_block_bytes, tile_blocks, g.h, codes);
  float4* sums = c.sums + part * c.value_rows;
  for (int i = thread; i < 4 * rows; i += kThreads) counts[i] = 0;
  for (int i = thread; i < static_cast<int>(c.value_rows); i += kThreads) sums[i] = zero4();
  __syncthreads();

  const CodeLayout layout = layout_of(c.p.values, g.h);
  const int num_components = num_components_of(c, 1, g.h);
  const Component* components = components_of(c, 1, g.h);
  const int index_bytes = layout.index_bits * (kBlockTokens / 8);
  const int weight_bytes = weight_bits<kWeights>(layout) * (kBlockTokens / 8);
  const int block = thread / kBlockTokens, in_block = thread % kBlockTokens;
  float4* scores = scores_of(c, g.at);
  float4 total = zero4();
  for (int epoch = first; epoch < last; epoch += kEpochTokens) {
    const int end = min(last, epoch + kEpochTokens);
    const int first_block = epoch / kBlockTokens;
    const int last_block = (end + kBlockTokens - 1) / kBlockTokens;
    // Softmax weights, and what the sums of the epoch stay below.
    float4 bound = zero4();
    for_each_tile(stage, first_block, last_block, [&](int which, int tile) {
      const int token = (tile + block) * kBlockTokens + in_block;
      if (block >= tile_blocks || token >= end) return;
      const unsigned char* codes_of = stage.block(which, tile, block) + layout.slots * index_bytes;
      float size = 0;
#pragma unroll 4
      for (int k = 0; k < layout.slots; ++k)
        size += fabsf(read_weight<kWeights>(layout, codes_of + k * weight_bytes, k, in_block));
      size *= fabsf(read_scale(layout, codes_of + layout.slots * weight_bytes, in_block));
      const float4 p = exp4(scores[token], most);
      scores[token] = p;
      total = total + p;
      bound = fma4(size, p, bound);
    });
    bound = block_reduce<false>(bound, scratch);
    const Fixed fixed[4] = {
        fixed_of(bound.x, 30), fixed_of(bound.y, 30), fixed_of(bound.z, 30), fixed_of(bound.w, 30)};
    for_each_tile(stage, first_block, last_block, [&](int which, int tile) {
      const int token = (tile + block) * kBlockTokens + in_block;
      const bool mine = block < tile_blocks && token < end;
      if (mine) {
        const unsigned char* indices = stage.block(which, tile, block);
        const unsigned char* codes_of = indices + layout.slots * index_bytes;
        const float4 p = scores[token];
        const float scale = read_scale(layout, codes_of + layout.slots * weight_bytes, in_block);
        const float4 v =
            scale *
            make_float4(p.x * fixed[0].to, p.y * fixed[1].to, p.z * fixed[2].to, p.w * fixed[3].to);
#pragma unroll 4
        for (int k = 0; k < layout.slots; ++k) {
          const float weight =
              read_weight<kWeights>(layout, codes_of + k * weight_bytes, k, in_block);
          int* to = counts + read_field(indices + k * index_bytes, layout.index_bits, in_block);
          if (weight == 0) continue;  // unused slots may all name one atom
          atomicAdd(to, __float2int_rn(weight * v.x));
          if (g.lanes > 1) atomicAdd(to + rows, __float2int_rn(weight * v.y));
          if (g.lanes > 2) atomicAdd(to + 2 * rows, __float2int_rn(weight * v.z));
          if (g.lanes > 3) atomicAdd(to + 3 * rows, __float2int_rn(weight * v.w));
        }
        weights_of_tile[thread] = layout.relative ? scale * p : p;
      }
      if (num_components == 0) return;
      __syncthreads();
      // A thread has a component, and takes the tokens one after another.
      const int tokens = min(tile_blocks * kBlockTokens, end - tile * kBlockTokens);
      for (int i = thread; i < num_components; i += kThreads) {
        const Component component = components[i];
        float4 sum = zero4();
        for (int t = 0; t < tokens; ++t) {
          const unsigned char* of = stage.block(which, tile, t / kBlockTokens);
          const int at = t % kBlockTokens;
          const std::uint32_t field = read_field(of + component.plane, component.bits, at);
          std::uint32_t history = 0;
          const std::uint32_t taps = layout.trellis.high | layout.trellis.low;
          for (int j = 0; taps >> j != 0 && j <= i; ++j) {
            if ((taps >> j & 1) == 0) continue;
            const Component before = components[i - j];
            history |= (read_field(of + before.plane, before.bits, at) & 1) << j;
          }
          sum = fma4(read_level(layout, component, field, history), weights_of_tile[t], sum);
        }
        sums[rows + i] = sums[rows + i] + sum;
      }
    });
    for (int n = thread; n < rows; n += kThreads) {
      const auto next = [&](int lane) {
        int& count = counts[lane * rows + n];
        const float sum = static_cast<float>(count) * fixed[lane].from;
        count = 0;
        return sum;
      };
      sums[n] = sums[n] + make_float4(next(0), next(1), next(2), next(3));
    }
    __syncthreads();
  }
  total = block_reduce<false>(total, scratch);
  if (thread == 0) c.totals[part] = total;
}

template <CodedWeights kWeights, Tiles kTiles, bool kShared>
__global__ void __launch_bounds__(kThreads, 1)
    values_kernel(Call c, int tile_blocks, int level_floats) {
  const Group g = group_of(c, static_cast<int>(blockIdx.x) / c.most_parts);
  const int part = static_cast<int>(blockIdx.x) % c.most_parts;
  const AttentionSequence& s = c.p.sequences[g.b];
  const Parts parts = parts_of(c, s);
  if (part >= parts.count() || !is_as_bounds_say(c, 1, g.h)) return;
  const float4 most = largest_score(c, g, ranges_of(c, s).count);
  if constexpr (kTiles != Tiles::kNone) {
    if (part < parts.tiles) {
      sum_tiles<kWeights, kTiles, kShared>(c, g, most, part, parts.tiles, level_floats);
      return;
    }
  }
  const int first = parts.first_token + (part - parts.tiles) * parts.tokens;
  const int last = min(static_cast<int>(s.coded_tokens), first + parts.tokens);
  sum_rows<kWeights, kShared>(c, g, most, first, last, part_at(c, g.at, part), tile_blocks);
}

}  // namespace lexico::kernels::cuda
