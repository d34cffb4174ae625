// Attention on codes on a CUDA device: docs/gpu.md has the plan of the launches.
//   prepare   queries mapped by B^T, what means add; where a head's planes are; steps of rotation
//   tables    q.D (keys after RoPE)
//   scores    of all coded tokens; blocks of their own attend over the exact tokens
//   values    softmax weights, summed per atom (attention_values.cuh)
//   join      the parts' sums, multiplied by a tile of atoms
//   finish    all tiles and the exact tokens: mapped back, divided
// Four query heads of a KV head go together (a "group"); a float4 has one number of each.
#include "kernels/attention/attention_call.cuh"
#include "kernels/attention/attention_values.cuh"
#include "kernels/common/launch.h"

namespace lexico::kernels::cuda {
namespace {

// ---- prepare
// ---------------------------------------------------------------------------------------

__device__ void map_queries(const Call& c, const Group& g) {
  auto* plain = reinterpret_cast<float4*>(dynamic_shared());  // [dim]
  float4* scratch = plain + c.p.dim;                          // [warps]
  const int dim = c.p.dim, thread = static_cast<int>(threadIdx.x);
  for (int d = thread; d < dim; d += kSmallThreads) plain[d] = query4(c, g, d);
  __syncthreads();
  const bool maps = !c.rotates && c.p.keys.back_map != nullptr;
  const float* map = c.p.keys.back_map + std::int64_t{g.h} * dim * dim;
  for (int d = thread; d < dim; d += kSmallThreads) {
    float4 q = plain[d];
    if (maps) {
      q = zero4();
      for (int i = 0; i < dim; ++i) q = fma4(map[std::int64_t{i} * dim + d], plain[i], q);
    }
    c.queries[std::int64_t{g.at} * dim + d] = q;
  }
  float4 shift = zero4();
  if (!c.rotates && c.p.keys.mean != nullptr) {
    for (int d = thread; d < dim; d += kSmallThreads)
      shift = fma4(c.p.keys.mean[g.h * dim + d], plain[d], shift);
  }
  shift = block_reduce<false>(shift, scratch);
  if (thread == 0) c.shifts[g.at] = c.p.softmax_scale * shift;
}

__device__ void list_components(const Call& c, int of_values, int h) {
  const CodeLayout& layout = layout_of(of_values ? c.p.values : c.p.keys, h);
  const int most = of_values ? c.bounds.value_components : c.bounds.key_components;
  const std::size_t bytes = of_values ? c.bounds.value_block_bytes : c.bounds.key_block_bytes;
  const CodedWeights weights = of_values ? c.bounds.value_weights : c.bounds.key_weights;
  auto* list = const_cast<Component*>(components_of(c, of_values, h));
  const int before = layout.slots * (layout.index_bits + weight_bits(layout)) + layout.scale_bits;
  const int trellis = layout.trellis.high != 0 ? 1 : 0;
  for (int i = static_cast<int>(threadIdx.x); i <= layout.components; i += kSmallThreads) {
    int count = 0, bits = before, levels = 0;
    for (int k = 0; k < i; ++k) {
      const int width = layout.component_bits[k];
      if (width == 0) continue;
      ++count;
      bits += width;
      levels += 1 << (width + trellis);
    }
    if (i == layout.components) {
      bool good = count <= most && layout.weights == weights &&
                  static_cast<std::size_t>(bits) * (kBlockTokens / 8) == bytes;
      if (of_values && c.p.value_tile_tokens > 0) good = good && codes_fit_tiles(layout);
      c.num_components[of_values * c.p.kv_heads + h] = good ? count : -1;
    } else if (layout.component_bits[i] > 0 && count < most) {
      list[count] = {bits * (kBlockTokens / 8), layout.component_bits[i], levels, i};
    }
  }
}

// cos and sin of t * frequency, from the angle in half turns.
__device__ float2 turn_of(double position, float frequency) {
  const double turns = position * static_cast<double>(frequency) * 0.31830988618379067154;
  double s, co;
  sincospi(turns - 2 * rint(turns / 2), &s, &co);
  return make_float2(static_cast<float>(co), static_cast<float>(s));
}

__global__ void __launch_bounds__(kSmallThreads, 4) prepare_kernel(Call c) {
  int at = static_cast<int>(blockIdx.x);
  if (at < c.groups) {
    map_queries(c, group_of(c, at));
    return;
  }
  at -= c.groups;
  if (at < 2 * c.p.kv_heads) {
    list_components(c, at / c.p.kv_heads, at % c.p.kv_heads);
    return;
  }
  const int t = at - 2 * c.p.kv_heads, pairs = c.rotation.rotary_dim / 2;
  for (int i = static_cast<int>(threadIdx.x); i < pairs; i += kSmallThreads)
    c.steps[t * pairs + i] = turn_of(t, c.rotation.inverse_frequencies[i]);
}

// ---- tables
// ----------------------------------------------------------------------------------------

// Rows of a group's table that no other has: extra atoms and components. A warp has a row.
__device__ void own_rows(const Call& c, const Group& g) {
  const AttentionSequence& s = c.p.sequences[g.b];
  if (!fits(c, s)) return;
  const int dim = c.p.dim, lane = lane_id();
  const int extra = s.keys.num_extra, count = extra + num_components_of(c, 0, g.h);
  const Component* components = components_of(c, 0, g.h);
  float4* table = c.tables + g.at * c.key_rows + c.p.keys.num_atoms;
  const float4* q = c.queries + std::int64_t{g.at} * dim;
  for (int n = warp_id(); n < count; n += kTableThreads / kWarpSize) {
    const float* row = n < extra
                           ? s.keys.extra_atoms + g.h * s.keys.extra_stride + std::int64_t{n} * dim
                           : c.p.keys.axes + g.h * c.p.keys.axes_stride +
                                 std::int64_t{components[n - extra].axis} * dim;
    float4 sum = zero4();
    for (int d = lane; d < dim; d += kWarpSize) sum = fma4(row[d], q[d], sum);
    sum = warp_sum4(sum);
    if (lane == 0) table[n < extra ? n : c.bounds.key_extra + n - extra] = sum;
  }
}

// kTableRows rows for kTableGroups groups that read the same dictionary; behind the last tile of
// rows one more block for what is the groups' own.
__global__ void __launch_bounds__(kTableThreads, 2)
    tables_kernel(Call c, int row_tiles, int share) {
  constexpr int kPitch = kTableDims + 4;
  auto* atoms = reinterpret_cast<float*>(dynamic_shared());  // [kTableRows, kPitch]
  auto* queries =
      reinterpret_cast<float4*>(atoms + kTableRows * kPitch);  // [kTableGroups, kTableDims]
  const int thread = static_cast<int>(threadIdx.x), dim = c.p.dim;
  const int group_tiles = (share + kTableGroups - 1) / kTableGroups;
  const int tile = static_cast<int>(blockIdx.x) % (row_tiles + 1);
  const int rest = static_cast<int>(blockIdx.x) / (row_tiles + 1);
  const int dictionary = rest / group_tiles, of_share = rest % group_tiles * kTableGroups;
  const int first_group = dictionary * share + of_share;
  const int num_groups = min(kTableGroups, share - of_share);
  if (tile == row_tiles) {
    for (int g = 0; g < num_groups; ++g) own_rows(c, group_of(c, first_group + g));
    return;
  }
  const int row0 = tile * kTableRows, row = thread % kTableRows, first = thread / kTableRows;
  const int N = c.p.keys.num_atoms;
  const float* D = c.p.keys.atoms + dictionary * c.p.keys.atoms_stride + std::int64_t{row0} * dim;
  constexpr int kApart = kTableThreads / kTableRows, kEach = kTableGroups / kApart;
  float4 sums[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) sums[j] = zero4();
  for (int d0 = 0; d0 < dim; d0 += kTableDims) {
    const int dims = min(kTableDims, dim - d0);
    for (int i = thread; i < kTableRows * kTableDims / 4; i += kTableThreads) {
      const int r = i / (kTableDims / 4), d = i % (kTableDims / 4) * 4;
      float4 v = zero4();
      if (row0 + r < N && d < dims)
        v = *reinterpret_cast<const float4*>(D + std::int64_t{r} * dim + d0 + d);
      *reinterpret_cast<float4*>(atoms + r * kPitch + d) = v;
    }
    for (int i = thread; i < kTableGroups * kTableDims; i += kTableThreads) {
      const int g = i / kTableDims, d = i % kTableDims;
      queries[i] = g < num_groups && d < dims
                       ? c.queries[std::int64_t{first_group + g} * dim + d0 + d]
                       : zero4();
    }
    __syncthreads();
#pragma unroll 4
    for (int d = 0; d < kTableDims; d += 4) {
      const float4 atom = *reinterpret_cast<const float4*>(atoms + row * kPitch + d);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const float4* q = queries + (first + j * kApart) * kTableDims + d;
        sums[j] = fma4(atom.x, q[0], sums[j]);
        sums[j] = fma4(atom.y, q[1], sums[j]);
        sums[j] = fma4(atom.z, q[2], sums[j]);
        sums[j] = fma4(atom.w, q[3], sums[j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int g = first + j * kApart;
    if (g < num_groups && row0 + row < N)
      c.tables[(first_group + g) * c.key_rows + row0 + row] = sums[j];
  }
}

// ---- exact tokens
// ------------------------------------------------------------------------------------

__device__ float read_exact(const void* base, ExactType type, std::int64_t at) {
  if (type == ExactType::kFloat32) return static_cast<const float*>(base)[at];
  const unsigned short bits = static_cast<const unsigned short*>(base)[at];
  return type == ExactType::kFloat16 ? __half2float(__ushort_as_half(bits))
                                     : __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
}

// By how much what was relative to `before` shrinks.
__device__ float4 shrink4(float4 before, float4 now) { return exp4(before, now); }

// Dense attention of one group over all exact runs. Shared memory: dim * 2 + kExactTile + warps
// float4s.
__device__ void attend_exact(const Call& c, const Group& g) {
  const int dim = c.p.dim, thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarpSize;
  auto* queries = reinterpret_cast<float4*>(dynamic_shared());  // [dim]
  float4* sums = queries + dim;                                 // [dim], one thread each
  float4* scores = sums + dim;                                  // [kExactTile]
  for (int d = thread; d < dim; d += threads) {
    queries[d] = query4(c, g, d);
    sums[d] = zero4();
  }
  __syncthreads();
  const AttentionSequence& s = c.p.sequences[g.b];
  float4 most = all4(-infinity()), total = zero4();
  for (int r = 0; r < s.num_exact; ++r) {
    const ExactRun run = s.exact[r];
    const std::int64_t base = g.h * run.head_stride;
    for (int tile = 0; tile < run.tokens; tile += kExactTile) {
      const int count = min(kExactTile, run.tokens - tile);
      for (int t = warp_id(); t < count; t += warps) {
        const std::int64_t row = base + std::int64_t{tile + t} * dim;
        float4 sum = zero4();
        for (int d = lane_id(); d < dim; d += kWarpSize)
          sum = fma4(read_exact(run.keys, c.p.exact_type, row + d), queries[d], sum);
        sum = c.p.softmax_scale * warp_sum4(sum);
        const auto least = [](float x) { return x < kLowest ? kLowest : x; };
        if (lane_id() == 0)
          scores[t] = make_float4(least(sum.x), least(sum.y), least(sum.z), least(sum.w));
      }
      __syncthreads();
      float4 now = most;
      for (int t = 0; t < count; ++t) now = max4(now, scores[t]);
      const float4 factor = shrink4(most, now);
      most = now;
      __syncthreads();
      if (thread < count) scores[thread] = exp4(scores[thread], most);
      __syncthreads();
      total = total * factor;
      for (int t = 0; t < count; ++t) total = total + scores[t];
      for (int d = thread; d < dim; d += threads) {
        float4 sum = sums[d] * factor;
        for (int t = 0; t < count; ++t)
          sum =
              fma4(read_exact(run.values, c.p.exact_type, base + std::int64_t{tile + t} * dim + d),
                   scores[t],
                   sum);
        sums[d] = sum;
      }
      __syncthreads();
    }
  }
  float4* out = c.exact + std::int64_t{g.at} * (2 + dim);
  for (int d = thread; d < dim; d += threads) out[2 + d] = sums[d];
  if (thread == 0) {
    out[0] = most;
    out[1] = total;
  }
}

// ---- scores from tables
// ------------------------------------------------------------------------------

enum class Table { kGlobal, kShared, kSharedHalf };

// A token's score without shift and scale of the softmax. Rows of the table from residual_row on
// are the components'.
template <CodedWeights kWeights, typename Row>
__device__ float4 score_token(const CodeLayout& layout,
                              const Component* components,
                              int num_components,
                              const unsigned char* block,
                              int token,
                              const Row* table,
                              int residual_row) {
  const int index_bytes = layout.index_bits * (kBlockTokens / 8);
  const int weight_bytes = weight_bits<kWeights>(layout) * (kBlockTokens / 8);
  const unsigned char* weights = block + layout.slots * index_bytes;
  float4 sum = zero4();
#pragma unroll 4
  for (int k = 0; k < layout.slots; ++k) {
    const std::uint32_t n = read_field(block + k * index_bytes, layout.index_bits, token);
    const float weight = read_weight<kWeights>(layout, weights + k * weight_bytes, k, token);
    sum = fma4(weight, entry(table[n]), sum);
  }
  const float scale = read_scale(layout, weights + layout.slots * weight_bytes, token);
  sum = scale * sum;
  if (num_components == 0) return sum;
  float4 rest = zero4();
  std::uint32_t history = 0;
  for (int i = 0; i < num_components; ++i) {
    const Component component = components[i];
    const std::uint32_t field = read_field(block + component.plane, component.bits, token);
    history = (history << 1 | (field & 1)) & 0x1ff;
    rest =
        fma4(read_level(layout, component, field, history), entry(table[residual_row + i]), rest);
  }
  return sum + (layout.relative ? scale : 1.0f) * rest;
}

template <CodedWeights kWeights, Table kTable>
__global__ void __launch_bounds__(kThreads, 1) scores_kernel(Call c, int tile_blocks) {
  using Row = std::conditional_t<kTable == Table::kSharedHalf, Half4, float4>;
  const int blocks = c.most_ranges + 1;  // of a group: the first has the exact tokens
  const Group g = group_of(c, static_cast<int>(blockIdx.x) / blocks);
  const int range = static_cast<int>(blockIdx.x) % blocks - 1;
  if (range < 0) {
    attend_exact(c, g);
    return;
  }
  const AttentionSequence& s = c.p.sequences[g.b];
  const Ranges ranges = ranges_of(c, s);
  if (range >= ranges.count || !is_as_bounds_say(c, 0, g.h)) return;
  const int first = range * ranges.tokens;
  const int last = min(static_cast<int>(s.coded_tokens), first + ranges.tokens);

  const float4* from = c.tables + g.at * c.key_rows;
  const Row* table = reinterpret_cast<const Row*>(from);
  unsigned char* rest = dynamic_shared();
  const int num_rows = static_cast<int>(c.key_rows);
  if constexpr (kTable != Table::kGlobal) {
    Row* copy = reinterpret_cast<Row*>(rest);
    rest += (static_cast<std::size_t>(num_rows) * sizeof(Row) + 15) / 16 * 16;
    for (int n = static_cast<int>(threadIdx.x); n < num_rows; n += kThreads) {
      if constexpr (kTable == Table::kShared) {
        cp_async_16(copy + n, from + n);  // waited for with the first tile
      } else {
        const float4 v = from[n];
        copy[n] = {__floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w)};
      }
    }
    table = copy;
  }
  auto* scratch = reinterpret_cast<float4*>(rest);
  const Stage stage =
      stage_of(c, s.keys, c.bounds.key_block_bytes, tile_blocks, g.h, scratch + kWarps);
  const CodeLayout layout = layout_of(c.p.keys, g.h);
  const int num_components = num_components_of(c, 0, g.h);
  const Component* components = components_of(c, 0, g.h);
  const int residual_row = c.p.keys.num_atoms + c.bounds.key_extra;
  const float4 shift = c.shifts[g.at];
  float4* scores = scores_of(c, g.at);
  const int block = static_cast<int>(threadIdx.x) / kBlockTokens;
  const int in_block = static_cast<int>(threadIdx.x) % kBlockTokens;
  float4 most = all4(-infinity());
  for_each_tile(stage,
                first / kBlockTokens,
                (last + kBlockTokens - 1) / kBlockTokens,
                [&](int which, int first_block) {
                  const int token = (first_block + block) * kBlockTokens + in_block;
                  if (block >= tile_blocks || token >= last) return;
                  const float4 sum = score_token<kWeights>(layout,
                                                           components,
                                                           num_components,
                                                           stage.block(which, first_block, block),
                                                           in_block,
                                                           table,
                                                           residual_row);
                  const auto score = [&](float x, float add) {
                    const float y = fmaf(x, c.p.softmax_scale, add);
                    return y < kLowest ? kLowest : y;  // an Inf in a key
                  };
                  float4 v = make_float4(score(sum.x, shift.x),
                                         score(sum.y, shift.y),
                                         score(sum.z, shift.z),
                                         score(sum.w, shift.w));
                  if (s.num_left_out > 0 && is_left_out(s, token)) v = all4(-infinity());
                  scores[token] = v;
                  most = max4(most, v);
                });
  most = block_reduce<true>(most, scratch);
  if (threadIdx.x == 0) c.most[range_at(c, g.at, range)] = most;
}

// ---- scores of rebuilt keys
// --------------------------------------------------------------------------

// Four neighbouring dims of an atom's row.
__device__ float4 atom_part(const Call& c, const AttentionSequence& s, int h, int n, int d) {
  const CodedSpace& keys = c.p.keys;
  const int dim = c.p.dim;
  if (n >= keys.num_atoms)
    return *reinterpret_cast<const float4*>(s.keys.extra_atoms + h * s.keys.extra_stride +
                                            std::int64_t{n - keys.num_atoms} * dim + d);
  const std::int64_t at = h * keys.atoms_stride + std::int64_t{n} * dim + d;
  if (keys.half_atoms == nullptr) return *reinterpret_cast<const float4*>(keys.atoms + at);
  const uint2 pair = *reinterpret_cast<const uint2*>(keys.half_atoms + at);
  const auto half = [](unsigned bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffff)));
  };
  return make_float4(half(pair.x), half(pair.x >> 16), half(pair.y), half(pair.y >> 16));
}

// A warp rebuilds the key of one token, before rotation, into row [dim].
__device__ void rebuild_key(const Call& c,
                            const AttentionSequence& s,
                            int h,
                            const CodeLayout& layout,
                            const Component* components,
                            int num_components,
                            const unsigned char* block,
                            int token,
                            float* row) {
  const int lane = lane_id(), dim = c.p.dim;
  const int index_bytes = layout.index_bits * (kBlockTokens / 8);
  const int weight_bytes = weight_bits(layout) * (kBlockTokens / 8);
  const unsigned char* weights = block + layout.slots * index_bytes;
  const float scale = read_scale(layout, weights + layout.slots * weight_bytes, token);
  const float unit = layout.relative ? scale : 1.0f;
  // Reversed: bit 8 - j of a window is that of the j-th component before.
  const std::uint32_t high = __brev(layout.trellis.high) >> 23;
  const std::uint32_t low = __brev(layout.trellis.low) >> 23;
  for (int d0 = 0; d0 < dim; d0 += kWarpSize * 4) {
    const int d = d0 + lane * 4;
    const bool mine = d < dim;
    float4 sum = zero4();
    for (int first = 0; first < layout.slots; first += kWarpSize) {
      const int slot = first + lane, count = min(kWarpSize, layout.slots - first);
      int n = 0;
      float weight = 0;
      if (slot < layout.slots) {
        n = static_cast<int>(read_field(block + slot * index_bytes, layout.index_bits, token));
        weight = read_weight(layout, weights + slot * weight_bytes, slot, token);
      }
#pragma unroll 4
      for (int k = 0; k < count; ++k) {
        const int atom = __shfl_sync(kWholeWarp, n, k);
        const float w = __shfl_sync(kWholeWarp, weight, k);
        if (mine) sum = fma4(w, atom_part(c, s, h, atom, d), sum);
      }
    }
    sum = scale * sum;
    if (mine && c.p.keys.mean != nullptr) {
      const float* mean = c.p.keys.mean + h * dim + d;
      sum = sum + make_float4(mean[0], mean[1], mean[2], mean[3]);
    }
    std::uint64_t lows = 0;  // of 32 components before and of these
    for (int first = 0; first < num_components; first += kWarpSize) {
      const int count = min(kWarpSize, num_components - first);
      Component component{};
      std::uint32_t field = 0;
      if (lane < count) {
        component = components[first + lane];
        field = read_field(block + component.plane, component.bits, token);
      }
      const unsigned bits = __ballot_sync(kWholeWarp, lane < count && (field & 1) != 0);
      lows = lows >> 32 | std::uint64_t{bits} << 32;
      const std::uint32_t window = static_cast<std::uint32_t>(lows >> (24 + lane)) & 0x1ff;
      if (layout.trellis.high != 0)
        field = 4 * (field >> 1) + 2 * (__popc(window & high) & 1) + (__popc(window & low) & 1);
      const float level =
          lane < count ? unit * layout.component_levels[component.levels + field] : 0.0f;
      for (int k = 0; k < count; ++k) {
        const int axis = __shfl_sync(kWholeWarp, component.axis, k);
        const float l = __shfl_sync(kWholeWarp, level, k);
        const float* from = c.p.keys.axes + h * c.p.keys.axes_stride + std::int64_t{axis} * dim + d;
        if (mine) sum = fma4(l, make_float4(from[0], from[1], from[2], from[3]), sum);
      }
    }
    if (mine) *reinterpret_cast<float4*>(row + d) = sum;
  }
}

// 64 keys at a time are rebuilt in shared memory, rotated, and multiplied by all queries of their
// KV head.
__global__ void __launch_bounds__(kRebuildThreads, 2) rebuilt_scores_kernel(Call c) {
  const int blocks = c.most_ranges + c.chunks;  // of a KV head and sequence
  const int rest = static_cast<int>(blockIdx.x) / blocks;
  const int b = rest % c.p.batch, h = rest / c.p.batch;
  const int range = static_cast<int>(blockIdx.x) % blocks - c.chunks;
  const int first_group = (h * c.p.batch + b) * c.chunks;
  if (range < 0) {
    attend_exact(c, group_of(c, first_group + range + c.chunks));
    return;
  }
  const AttentionSequence& s = c.p.sequences[b];
  const Ranges ranges = ranges_of(c, s);
  if (range >= ranges.count || !is_as_bounds_say(c, 0, h)) return;
  const int first = range * ranges.tokens;
  const int last = min(static_cast<int>(s.coded_tokens), first + ranges.tokens);

  const int dim = c.p.dim, pitch = dim + 4, thread = static_cast<int>(threadIdx.x);
  const int pairs = c.rotation.rotary_dim / 2, heads = c.chunks * 4;
  auto* keys = reinterpret_cast<float*>(dynamic_shared());                // [kBlockTokens, pitch]
  float* queries = keys + kBlockTokens * pitch;                           // [heads, dim]
  auto* base = reinterpret_cast<float2*>(queries + heads * dim);          // [pairs]
  auto* scratch = reinterpret_cast<float4*>(base + (pairs + 1) / 2 * 2);  // [warps]
  const Stage stage =
      stage_of(c, s.keys, c.bounds.key_block_bytes, 1, h, scratch + kRebuildThreads / kWarpSize);
  for (int i = thread; i < c.chunks * dim; i += kRebuildThreads) {
    const int chunk = i / dim, d = i % dim;
    const float4 q = c.queries[std::int64_t{first_group + chunk} * dim + d];
    for (int lane = 0; lane < 4; ++lane) queries[(chunk * 4 + lane) * dim + d] = lane_of(q, lane);
  }
  const CodeLayout layout = layout_of(c.p.keys, h);
  const int num_components = num_components_of(c, 0, h);
  const Component* components = components_of(c, 0, h);
  const int t = thread % kBlockTokens, lane = thread / kBlockTokens;  // of the dot products

  for_each_tile(
      stage,
      first / kBlockTokens,
      (last + kBlockTokens - 1) / kBlockTokens,
      [&](int which, int block) {
        const std::int64_t position = s.first_position + std::int64_t{block} * kBlockTokens;
        const int count = min(kBlockTokens, last - block * kBlockTokens);
        for (int i = thread; i < pairs; i += kRebuildThreads)
          base[i] = turn_of(static_cast<double>(position), c.rotation.inverse_frequencies[i]);
        for (int k = warp_id(); k < count; k += kRebuildThreads / kWarpSize)
          rebuild_key(c,
                      s,
                      h,
                      layout,
                      components,
                      num_components,
                      stage.block(which, block, 0),
                      k,
                      keys + k * pitch);
        __syncthreads();
        for (int i = thread; i < count * pairs; i += kRebuildThreads) {
          const int token = i / pairs, pair = i % pairs;
          const float2 from = base[pair], step = __ldg(c.steps + token * pairs + pair);
          const float co = from.x * step.x - from.y * step.y;
          const float si = from.y * step.x + from.x * step.y;
          // Models take the angle in float32, which far out is another one: by `off`, which is
          // exact.
          const float at = static_cast<float>(position + token);
          const float frequency = __ldg(c.rotation.inverse_frequencies + pair);
          const float off = -fmaf(at, frequency, -__fmul_rn(at, frequency));
          const float scaling = c.rotation.attention_scaling;
          const float near = scaling - 0.5f * scaling * off * off, far = scaling * off;
          const float cosine = co * near - si * far, sine = si * near + co * far;
          float* row = keys + token * pitch;
          float* low = row + (c.rotation.interleaved ? 2 * pair : pair);
          float* high = row + (c.rotation.interleaved ? 2 * pair + 1 : pair + pairs);
          const float x = *low, y = *high;
          *low = x * cosine - y * sine;
          *high = y * cosine + x * sine;
        }
        __syncthreads();
        if (t >= count) return;
        const int token = block * kBlockTokens + t;
        const bool left_out = s.num_left_out > 0 && is_left_out(s, token);
        for (int chunk = 0; chunk < c.chunks; ++chunk) {
          const float* q = queries + (chunk * 4 + lane) * dim;
          float sum = 0;
          for (int d = 0; d < dim; d += 4) {
            const float4 k4 = *reinterpret_cast<const float4*>(keys + t * pitch + d);
            const float4 q4 = *reinterpret_cast<const float4*>(q + d);
            sum = fmaf(k4.x, q4.x, fmaf(k4.y, q4.y, fmaf(k4.z, q4.z, fmaf(k4.w, q4.w, sum))));
          }
          sum *= c.p.softmax_scale;
          sum = sum < kLowest ? kLowest : sum;
          if (left_out) sum = -infinity();
          reinterpret_cast<float*>(scores_of(c, first_group + chunk) + token)[lane] = sum;
        }
      });
  for (int chunk = 0; chunk < c.chunks; ++chunk) {
    float4 most = all4(-infinity());
    const float4* scores = scores_of(c, first_group + chunk);
    for (int token = first + thread; token < last; token += kRebuildThreads)
      most = max4(most, scores[token]);
    most = block_reduce<true>(most, scratch);
    if (thread == 0) c.most[range_at(c, first_group + chunk, range)] = most;
  }
}

// ---- join and finish
// ---------------------------------------------------------------------------------

// What the coded and the exact tokens of a group count, the softmax weights of all coded ones, and
// log of the sum of e^score. In shared memory; all threads of a block of four warps call it, and a
// warp does a query head.
struct Weights {
  float4 coded, exact, mass, log_sum;
};
__device__ void weigh(const Call& c, const Group& g, Weights* weights) {
  static_assert(kSmallThreads == 4 * kWarpSize);
  const AttentionSequence& s = c.p.sequences[g.b];
  const int head = warp_id(), parts = parts_of(c, s).count();
  const float4* exact = c.exact + std::int64_t{g.at} * (2 + c.p.dim);
  const float exact_most = lane_of(exact[0], head), exact_total = lane_of(exact[1], head);
  const float coded_most = lane_of(largest_score(c, g, ranges_of(c, s).count), head);
  double coded_total = 0;
  for (int part = lane_id(); part < parts; part += kWarpSize)
    coded_total += static_cast<double>(lane_of(c.totals[part_at(c, g.at, part)], head));
  for (int step = kWarpSize / 2; step > 0; step /= 2)
    coded_total += __shfl_xor_sync(kWholeWarp, coded_total, step);
  const float most = fmaxf(exact_most, coded_most);
  // Without tokens that count the total is 0.
  const float coded = coded_total == 0 ? 0.0f : expf(coded_most - most);
  const float dense = exact_total == 0 ? 0.0f : expf(exact_most - most);
  const double total = coded_total * coded + static_cast<double>(exact_total) * dense;
  const float whole = total == 0 ? 0.0f : static_cast<float>(1 / total);
  if (lane_id() == 0) {
    const auto of_head = [&](float4& all) -> float& {
      return reinterpret_cast<float*>(&all)[head];
    };
    of_head(weights->coded) = whole * coded;
    of_head(weights->exact) = whole * dense;
    of_head(weights->mass) = static_cast<float>(static_cast<double>(whole * coded) * coded_total);
    of_head(weights->log_sum) =
        total == 0 ? -infinity() : static_cast<float>(static_cast<double>(most) + log(total));
  }
  __syncthreads();
}

// The row that sums of this number belong to; nullptr where the sequence has none.
__device__ const float* value_row(const Call& c,
                                  const AttentionSequence& s,
                                  int h,
                                  std::int64_t row) {
  const CodedSpace& values = c.p.values;
  const int dim = c.p.dim;
  if (row < values.num_atoms) return values.atoms + h * values.atoms_stride + row * dim;
  row -= values.num_atoms;
  if (row < s.values.num_extra) return s.values.extra_atoms + h * s.values.extra_stride + row * dim;
  row -= c.bounds.value_extra;
  if (row < 0 || row >= num_components_of(c, 1, h)) return nullptr;
  return values.axes + h * values.axes_stride +
         std::int64_t{components_of(c, 1, h)[row].axis} * dim;
}

// A tile of atoms, read once for kTogether groups of those that share the dictionary.
template <int kTogether>
__global__ void __launch_bounds__(kSmallThreads, 4) join_kernel(Call c, int share) {
  static_assert(kJoinRows == kSmallThreads);
  const int tile = static_cast<int>(blockIdx.x) % c.join_tiles;
  const int set = static_cast<int>(blockIdx.x) / c.join_tiles;
  const int sets = (share + kTogether - 1) / kTogether;  // of a dictionary
  const int first_group = set / sets * share + set % sets * kTogether;
  const int num_groups = min(kTogether, share - set % sets * kTogether);
  auto* weights = reinterpret_cast<Weights*>(dynamic_shared());
  auto* joined = reinterpret_cast<float4*>(weights + 1);  // [kTogether, kJoinRows]
  const int thread = static_cast<int>(threadIdx.x), dim = c.p.dim;
  const std::int64_t first = std::int64_t{tile} * kJoinRows, row = first + thread;
  const int h = group_of(c, first_group).h;
  const std::int64_t atoms_here = c.p.values.num_atoms - first;
  const int count = static_cast<int>(c.value_rows - first < kJoinRows ? c.value_rows - first
                                                                      : std::int64_t{kJoinRows});
  const int plain = atoms_here < count ? max(0, static_cast<int>(atoms_here)) : count;
  const float* atoms_of_tile = c.p.values.atoms + h * c.p.values.atoms_stride + first * dim;
  for (int i = thread * 32; i < plain * dim; i += kSmallThreads * 32) prefetch(atoms_of_tile + i);
  for (int i = 0; i < kTogether; ++i) {
    float4 sum = zero4();
    if (i < num_groups) {
      const Group g = group_of(c, first_group + i);
      weigh(c, g, weights);
      if (row < c.value_rows) {
        const int parts = parts_of(c, c.p.sequences[g.b]).count();
        const float4* from = c.sums + part_at(c, g.at, 0) * c.value_rows + row;
#pragma unroll 8
        for (int part = 0; part < parts; ++part) sum = sum + from[part * c.value_rows];
        sum = weights->coded * sum;
      }
    }
    joined[i * kJoinRows + thread] = sum;
    __syncthreads();  // weights are the next group's then
  }
  for (int d = thread; d < dim; d += kSmallThreads) {
    float4 products[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) products[i] = zero4();
      // Many loads at once: they are what takes the time.
#pragma unroll(kTogether == 1 ? 32 : 16)
    for (int n = 0; n < plain; ++n) {
      const float atom = __ldg(atoms_of_tile + std::int64_t{n} * dim + d);
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        products[i] = fma4(atom, joined[i * kJoinRows + n], products[i]);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (i >= num_groups) continue;
      const Group g = group_of(c, first_group + i);
      for (int n = plain; n < count; ++n) {
        const float* other = value_row(c, c.p.sequences[g.b], g.h, first + n);
        if (other != nullptr) products[i] = fma4(other[d], joined[i * kJoinRows + n], products[i]);
      }
      c.products[(std::int64_t{g.at} * c.join_tiles + tile) * dim + d] = products[i];
    }
  }
}

__global__ void __launch_bounds__(kSmallThreads, 4) finish_kernel(Call c) {
  const Group g = group_of(c, static_cast<int>(blockIdx.x));
  const AttentionSequence& s = c.p.sequences[g.b];
  const int thread = static_cast<int>(threadIdx.x), dim = c.p.dim;
  const std::int64_t head = first_head(c, g);
  auto* weights = reinterpret_cast<Weights*>(dynamic_shared());
  auto* z = reinterpret_cast<float4*>(weights + 1);  // [dim]
  const bool bad =
      !fits(c, s) || c.num_components[g.h] < 0 || c.num_components[c.p.kv_heads + g.h] < 0;
  const bool coded = parts_of(c, s).count() > 0;
  weigh(c, g, weights);
  if (c.p.log_sums != nullptr && thread < g.lanes)
    c.p.log_sums[head + thread] = bad ? not_a_number() : lane_of(weights->log_sum, thread);
  for (int d = thread; d < dim; d += kSmallThreads) {
    float4 sum = zero4();
#pragma unroll 8
    for (int tile = 0; tile < (coded ? c.join_tiles : 0); ++tile)
      sum = sum + c.products[(std::int64_t{g.at} * c.join_tiles + tile) * dim + d];
    z[d] = sum;
  }
  __syncthreads();
  for (int d = thread; d < dim; d += kSmallThreads) {
    float4 x = z[d];
    if (c.p.values.back_map != nullptr) {
      const float* row = c.p.values.back_map + (std::int64_t{g.h} * dim + d) * dim;
      x = zero4();
      for (int i = 0; i < dim; ++i) x = fma4(row[i], z[i], x);
    }
    const float mean = c.p.values.mean != nullptr && coded ? c.p.values.mean[g.h * dim + d] : 0.0f;
    x = fma4(mean, weights->mass, x);
    x = x + weights->exact * c.exact[std::int64_t{g.at} * (2 + dim) + 2 + d];
    for (int lane = 0; lane < g.lanes; ++lane)
      c.p.out[(head + lane) * dim + d] = bad ? not_a_number() : lane_of(x, lane);
  }
}

// ---- the host
// ----------------------------------------------------------------------------------------

// Hands out pieces of the workspace; without one it only counts.
class Pieces {
 public:
  explicit Pieces(void* memory) : base_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(std::int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
  std::size_t bytes() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

std::size_t at_least(std::size_t a, std::size_t b) { return a > b ? a : b; }

// What launches need beside the call itself.
struct Shapes {
  Table table = Table::kGlobal;
  bool shared_sums = false;
  Tiles tiles = Tiles::kNone;
  int level_floats = 0;  // room for weights of tiles
  int key_tile_blocks = 1, value_tile_blocks = 1;
  std::size_t scores_bytes = 0, values_bytes = 0, rebuilt_bytes = 0;  // shared memory
};

// Blocks of a tile so that two of them take little of the shared memory.
int tile_blocks_of(std::size_t block_bytes) {
  constexpr std::size_t kMostStage = 40 << 10;
  int blocks = kMostTileBlocks;
  while (blocks > 1 && 2 * blocks * static_cast<std::size_t>(slot_bytes(block_bytes)) > kMostStage)
    blocks /= 2;
  return blocks;
}

Shapes shapes_of(const Call& c) {
  Shapes shapes;
  const std::size_t limit = c.bounds.shared_bytes, dim = static_cast<std::size_t>(c.p.dim);
  const std::size_t exact =
      (2 * dim + kExactTile + static_cast<std::size_t>(kWarps)) * sizeof(float4);
  const auto stage = [](int blocks, std::size_t bytes) {
    return 2 * static_cast<std::size_t>(blocks) * static_cast<std::size_t>(slot_bytes(bytes));
  };
  shapes.key_tile_blocks = tile_blocks_of(c.bounds.key_block_bytes);
  shapes.value_tile_blocks = tile_blocks_of(c.bounds.value_block_bytes);
  const std::size_t base =
      kWarps * sizeof(float4) + stage(shapes.key_tile_blocks, c.bounds.key_block_bytes);
  const std::size_t rows = static_cast<std::size_t>(c.key_rows);
  const std::size_t table = rows * sizeof(float4), half = (rows * sizeof(Half4) + 15) / 16 * 16;
  shapes.scores_bytes = base;
  if (c.bounds.half_tables && base + half <= limit) {
    shapes.table = Table::kSharedHalf;
    shapes.scores_bytes += half;
  } else if (base + table <= limit) {
    shapes.table = Table::kShared;
    shapes.scores_bytes += table;
  }
  shapes.scores_bytes = at_least(shapes.scores_bytes, exact);
  shapes.rebuilt_bytes = at_least(
      exact,
      (kBlockTokens * (dim + 4) + static_cast<std::size_t>(c.chunks) * 4 * dim) * sizeof(float) +
          (static_cast<std::size_t>(c.rotation.rotary_dim) / 2 + 2) * sizeof(float2) +
          kRebuildThreads / kWarpSize * sizeof(float4) + stage(1, c.bounds.key_block_bytes));

  const std::size_t sums =
      static_cast<std::size_t>(c.p.values.num_atoms + c.bounds.value_extra) * sizeof(float4);
  const std::size_t in_rows = (kWarps + kThreads) * sizeof(float4) +
                              stage(shapes.value_tile_blocks, c.bounds.value_block_bytes);
  if (c.p.value_tile_tokens == 0) {
    shapes.shared_sums = in_rows + sums <= limit;
    shapes.values_bytes = in_rows + (shapes.shared_sums ? sums : 0);
    return shapes;
  }
  // Of the weights of kLevels as many copies as there is room for, at least one.
  const bool levels = c.bounds.value_weights == CodedWeights::kLevels;
  constexpr std::size_t kLeast = sizeof(float) << kTileCodeBits, kMost = 66 << 10;
  const auto tile_bytes = [&](bool halfs, bool shared) {
    const std::size_t row = halfs ? sizeof(Half4) : sizeof(float4);
    return (kWarps + 1) * sizeof(float4) + (shared ? sums : 0) + (levels ? kLeast : 0) +
           static_cast<std::size_t>(c.p.value_tile_tokens) * row;
  };
  shapes.shared_sums = at_least(in_rows + sums, tile_bytes(true, true)) <= limit;
  const bool halfs = c.bounds.half_tables || tile_bytes(false, shapes.shared_sums) > limit;
  shapes.tiles = halfs ? Tiles::kHalf : Tiles::kFloat;
  std::size_t bytes = tile_bytes(halfs, shapes.shared_sums);
  if (levels && bytes <= limit) {
    const std::size_t room = limit - bytes < kMost - kLeast ? limit - bytes : kMost - kLeast;
    shapes.level_floats = static_cast<int>((kLeast + room) / sizeof(float));
    bytes += room;
  }
  shapes.values_bytes = at_least(in_rows + (shapes.shared_sums ? sums : 0), bytes);
  return shapes;
}

Call call_of(const AttentionProblem& problem, const AttentionBounds& bounds, Pieces& pieces) {
  Call c{};
  c.p = problem;
  c.bounds = bounds;
  c.rotates = problem.rotation != nullptr;
  if (c.rotates) c.rotation = *problem.rotation;
  c.chunks = (problem.group + 3) / 4;
  c.groups = problem.kv_heads * problem.batch * c.chunks;
  const int of_sequence = problem.kv_heads * c.chunks;
  c.most_ranges = bounds.multiprocessors > of_sequence ? bounds.multiprocessors / of_sequence : 1;
  // One of tiles and one of tokens in rows at least.
  c.most_parts = problem.value_tile_tokens > 0 && c.most_ranges == 1 ? 2 : c.most_ranges;
  c.key_rows = std::int64_t{problem.keys.num_atoms} + bounds.key_extra + bounds.key_components;
  c.value_rows =
      std::int64_t{problem.values.num_atoms} + bounds.value_extra + bounds.value_components;
  c.join_tiles = static_cast<int>((c.value_rows + kJoinRows - 1) / kJoinRows);
  const std::int64_t groups = c.groups, dim = problem.dim, parts = groups * c.most_parts;
  const int components = bounds.key_components > bounds.value_components ? bounds.key_components
                                                                         : bounds.value_components;
  c.queries = pieces.take<float4>(groups * dim);
  c.shifts = pieces.take<float4>(groups);
  c.num_components = pieces.take<int>(2 * std::int64_t{problem.kv_heads});
  c.components = pieces.take<Component>(2 * std::int64_t{problem.kv_heads} * components);
  c.steps = pieces.take<float2>(kBlockTokens * (c.rotation.rotary_dim / 2));
  c.tables = pieces.take<float4>(c.rotates ? 0 : groups * c.key_rows);
  c.scores = pieces.take<float4>(groups * padded_tokens(bounds));
  c.most = pieces.take<float4>(groups * c.most_ranges);
  c.totals = pieces.take<float4>(parts);
  c.sums = pieces.take<float4>(parts * c.value_rows);
  c.exact = pieces.take<float4>(groups * (2 + dim));
  c.products = pieces.take<float4>(groups * c.join_tiles * dim);
  if (!shapes_of(c).shared_sums)
    c.wide_sums = pieces.take<int>(parts * 4 * (problem.values.num_atoms + bounds.value_extra));
  return c;
}

template <Table kTable>
auto scores_with(CodedWeights weights) {
  switch (weights) {
    case CodedWeights::kFloat32:
      return scores_kernel<CodedWeights::kFloat32, kTable>;
    case CodedWeights::kE4m3:
      return scores_kernel<CodedWeights::kE4m3, kTable>;
    default:
      return scores_kernel<CodedWeights::kLevels, kTable>;
  }
}
template <bool kShared>
auto values_with(CodedWeights weights, Tiles tiles) {
  if (weights == CodedWeights::kFloat32)
    return values_kernel<CodedWeights::kFloat32, Tiles::kNone, kShared>;
  const bool levels = weights == CodedWeights::kLevels;
  switch (tiles) {
    case Tiles::kNone:
      return levels ? values_kernel<CodedWeights::kLevels, Tiles::kNone, kShared>
                    : values_kernel<CodedWeights::kE4m3, Tiles::kNone, kShared>;
    case Tiles::kFloat:
      return levels ? values_kernel<CodedWeights::kLevels, Tiles::kFloat, kShared>
                    : values_kernel<CodedWeights::kE4m3, Tiles::kFloat, kShared>;
    default:
      return levels ? values_kernel<CodedWeights::kLevels, Tiles::kHalf, kShared>
                    : values_kernel<CodedWeights::kE4m3, Tiles::kHalf, kShared>;
  }
}

Status invalid(const char* what) { return {static_cast<int>(cudaErrorInvalidValue), what}; }

Status check(const Call& c, const Shapes& shapes) {
  const AttentionProblem& p = c.p;
  if (p.dim <= 0 || p.dim % 4 != 0 || p.dim > 1024)
    return invalid("attention: dim must be a multiple of 4 in [4, 1024]");
  if (p.page_tokens <= 0 || p.page_tokens % kBlockTokens != 0)
    return invalid("attention: page_tokens must be a positive multiple of 64");
  if (c.bounds.multiprocessors <= 0 || c.bounds.shared_bytes == 0)
    return invalid("attention: the bounds say nothing of the device; ask attention_device");
  if (c.bounds.coded_tokens > (std::int64_t{1} << 30) - kThreads)
    return invalid("attention: too many coded tokens in a sequence, must be below 2^30");
  if (c.rotates && (p.keys.back_map != nullptr || c.rotation.rotary_dim > p.dim))
    return invalid("attention: keys before RoPE take no map, and rotate at most dim dims");
  if (p.value_tile_tokens != 0) {
    if (p.value_tile_tokens < 0 || p.value_tile_tokens > kMostTileTokens ||
        p.value_tile_tokens % kBlockTokens != 0)
      return invalid("attention: value_tile_tokens must be a multiple of 64 in [64, 8192]");
    if (c.bounds.value_weights == CodedWeights::kFloat32 || c.bounds.value_components > 0)
      return invalid("attention: value tiles take no float weights and no components");
    if (p.values.num_atoms + std::int64_t{c.bounds.value_extra} > kNoRow)
      return invalid("attention: value tiles take at most 65535 atoms");
  }
  const std::size_t scores = c.rotates ? shapes.rebuilt_bytes : shapes.scores_bytes;
  if (scores > c.bounds.shared_bytes || shapes.values_bytes > c.bounds.shared_bytes)
    return invalid(
        "attention: codes of so many bits, or tiles of so many tokens, do not fit the device's "
        "shared memory");
  const std::int64_t most = std::int64_t{c.groups} * (c.most_parts + c.chunks + 1);
  const std::int64_t row_tiles = (p.keys.num_atoms + kTableRows - 1) / kTableRows + 1;
  if (most > 0x7fffffff || std::int64_t{c.groups} * c.join_tiles > 0x7fffffff ||
      row_tiles * c.groups > 0x7fffffff)
    return invalid("attention: too many query heads for one launch");
  return {};
}

dim3 blocks(std::int64_t count) { return dim3(static_cast<unsigned>(count)); }

}  // namespace

Status attention_device(AttentionBounds* bounds) {
  int processors = 0, bytes = 0;
  Status status = device_attribute(cudaDevAttrMultiProcessorCount, &processors);
  if (!status.ok()) return status;
  status = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &bytes);
  if (!status.ok()) return status;
  bounds->multiprocessors = processors;
  bounds->shared_bytes = static_cast<std::size_t>(bytes);
  return {};
}

std::size_t attention_workspace_bytes(const AttentionProblem& problem,
                                      const AttentionBounds& bounds) {
  Pieces pieces(nullptr);
  (void)call_of(problem, bounds, pieces);
  return pieces.bytes();
}

Status attention(const AttentionProblem& problem,
                 const AttentionBounds& bounds,
                 void* workspace,
                 Stream stream) {
  if (problem.batch == 0 || problem.kv_heads == 0 || problem.group == 0) return {};
  Pieces pieces(workspace);
  const Call c = call_of(problem, bounds, pieces);
  const Shapes shapes = shapes_of(c);
  Status status = check(c, shapes);
  if (!status.ok()) return status;
  const std::size_t dim = static_cast<std::size_t>(problem.dim);

  status = launch(prepare_kernel,
                  blocks(c.groups + 2 * problem.kv_heads + (c.rotates ? kBlockTokens : 0)),
                  dim3(kSmallThreads),
                  (dim + kSmallThreads / kWarpSize) * sizeof(float4),
                  stream,
                  c);
  if (!status.ok()) return status;
  if (c.rotates) {
    status =
        launch(rebuilt_scores_kernel,
               blocks(std::int64_t{problem.kv_heads} * problem.batch * (c.most_ranges + c.chunks)),
               dim3(kRebuildThreads),
               shapes.rebuilt_bytes,
               stream,
               c);
  } else {
    const int row_tiles = (problem.keys.num_atoms + kTableRows - 1) / kTableRows;
    const int dictionaries = problem.keys.atoms_stride == 0 ? 1 : problem.kv_heads;
    const int share = c.groups / dictionaries;
    status = launch(
        tables_kernel,
        blocks(std::int64_t{row_tiles + 1} * dictionaries *
               ((share + kTableGroups - 1) / kTableGroups)),
        dim3(kTableThreads),
        kTableRows * (kTableDims + 4) * sizeof(float) + kTableGroups * kTableDims * sizeof(float4),
        stream,
        c,
        row_tiles,
        share);
    if (!status.ok()) return status;
    const auto kernel =
        shapes.table == Table::kGlobal   ? scores_with<Table::kGlobal>(bounds.key_weights)
        : shapes.table == Table::kShared ? scores_with<Table::kShared>(bounds.key_weights)
                                         : scores_with<Table::kSharedHalf>(bounds.key_weights);
    status = launch(kernel,
                    blocks(std::int64_t{c.groups} * (c.most_ranges + 1)),
                    dim3(kThreads),
                    shapes.scores_bytes,
                    stream,
                    c,
                    shapes.key_tile_blocks);
  }
  if (!status.ok()) return status;
  if (bounds.coded_tokens > 0) {
    status = launch(shapes.shared_sums ? values_with<true>(bounds.value_weights, shapes.tiles)
                                       : values_with<false>(bounds.value_weights, shapes.tiles),
                    blocks(std::int64_t{c.groups} * c.most_parts),
                    dim3(kThreads),
                    shapes.values_bytes,
                    stream,
                    c,
                    shapes.value_tile_blocks,
                    shapes.level_floats);
    if (!status.ok()) return status;
    if (c.join_tiles > 0) {
      // Together where that leaves blocks enough.
      const bool many = std::int64_t{c.groups} * c.join_tiles >= 4 * bounds.multiprocessors;
      const int together = many ? kMostTogether : 1;
      const int dictionaries = problem.values.atoms_stride == 0 ? 1 : problem.kv_heads;
      const int share = c.groups / dictionaries;
      status = launch(
          many ? join_kernel<kMostTogether> : join_kernel<1>,
          blocks(std::int64_t{dictionaries} * ((share + together - 1) / together) * c.join_tiles),
          dim3(kSmallThreads),
          sizeof(Weights) + static_cast<std::size_t>(together) * kJoinRows * sizeof(float4),
          stream,
          c,
          share);
      if (!status.ok()) return status;
    }
  }
  return launch(finish_kernel,
                blocks(c.groups),
                dim3(kSmallThreads),
                sizeof(Weights) + dim * sizeof(float4),
                stream,
                c);
}

}  // namespace lexico::kernels::cuda
