// The contract of sparse.h on a CUDA device. A warp has one signal or one atom, its lanes have
// neighbouring dims, and what it adds up it adds in the order of the signals.
#include <cmath>

#include "kernels/common/launch.h"
#include "kernels/common/warp.cuh"
#include "kernels/sparse/sparse.h"

namespace lexico::kernels::cuda {
namespace {

constexpr int kWarps = 4;  // of a block, where each has its own row
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileSlots = 1024;  // slots of codes that one warp sorts by atom

// V neighbouring numbers of a row: 4 (16 bytes) where rows allow it, else 1.
template <int V>
struct Part {
  float x[V];
};
template <int V>
__device__ Part<V> load(const float* from) {
  if constexpr (V == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    return {{v.x, v.y, v.z, v.w}};
  } else {
    return {{*from}};
  }
}
template <int V>
__device__ void store(float* to, const Part<V>& part) {
  if constexpr (V == 4)
    *reinterpret_cast<float4*>(to) = make_float4(part.x[0], part.x[1], part.x[2], part.x[3]);
  else
    *to = part.x[0];
}
template <int V>
__device__ void add_scaled(Part<V>& to, float weight, const Part<V>& part) {
#pragma unroll
  for (int i = 0; i < V; ++i) to.x[i] += weight * part.x[i];
}
template <int V>
__device__ float dot(const Part<V>& a, const Part<V>& b, float sum) {
#pragma unroll
  for (int i = 0; i < V; ++i) sum += a.x[i] * b.x[i];
  return sum;
}

// ---- residual ----------------------------------------------------------------------------------

template <int V>
__global__ void __launch_bounds__(kThreads) residual_kernel(SparseProblem p,
                                                            const float* signals,
                                                            float* residual,
                                                            float* signal_norms,
                                                            float* residual_norms) {
  const std::int64_t b = std::int64_t{blockIdx.x} * kWarps + warp_id();
  if (b >= p.num_signals) return;
  const std::int64_t dictionary = blockIdx.y, row = dictionary * p.num_signals + b;
  const float* atoms = p.atoms + dictionary * p.num_atoms * p.dim;
  const std::int32_t* index = p.indices + row * p.max_atoms;
  const float* weight = p.weights + row * p.max_atoms;
  const int lane = lane_id();
  float x2 = 0, r2 = 0;
  for (int first = 0; first < p.dim; first += kWarpSize * V) {
    const int d = first + lane * V;
    const bool mine = d < p.dim;
    Part<V> r = {};
    if (mine) r = load<V>(signals + row * p.dim + d);
    x2 = dot(r, r, x2);
    bool ended = false;  // by an unused slot
    for (int k = 0; k < p.max_atoms && !ended; k += kWarpSize) {
      const int n = k + lane < p.max_atoms ? index[k + lane] : -1;
      const float y = n >= 0 ? -weight[k + lane] : 0.0f;
      const unsigned unused = __ballot_sync(kWholeWarp, n < 0);
      const int count = unused == 0 ? kWarpSize : __ffs(static_cast<int>(unused)) - 1;
      ended = count < kWarpSize;
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        const std::int64_t atom = __shfl_sync(kWholeWarp, n, j);
        const float w = __shfl_sync(kWholeWarp, y, j);
        if (mine) add_scaled(r, w, load<V>(atoms + atom * p.dim + d));
      }
    }
    r2 = dot(r, r, r2);
    if (mine) store(residual + row * p.dim + d, r);
  }
  x2 = warp_sum(x2);
  r2 = warp_sum(r2);
  if (lane == 0) {
    signal_norms[row] = sqrtf(x2);
    residual_norms[row] = sqrtf(r2);
  }
}

// ---- uses of atoms: a stable counting sort -----------------------------------------------------

struct Uses {
  SparseProblem p;
  AtomUses uses;
  std::int32_t* counts;  // [P, tiles, num_atoms]: of a tile; then where its next slot goes
  int tiles;
};

__global__ void __launch_bounds__(kThreads) count_uses_kernel(Uses u) {
  const std::int64_t num_slots = u.p.num_signals * u.p.max_atoms;
  const std::int64_t dictionary = blockIdx.y, tile = blockIdx.x;
  std::int32_t* counts = u.counts + (dictionary * u.tiles + tile) * u.p.num_atoms;
  for (int n = static_cast<int>(threadIdx.x); n < u.p.num_atoms; n += kThreads) counts[n] = 0;
  __syncthreads();
  const std::int32_t* indices = u.p.indices + dictionary * num_slots;
  const std::int64_t first = tile * kTileSlots;
  for (int i = static_cast<int>(threadIdx.x); i < kTileSlots && first + i < num_slots;
       i += kThreads) {
    const int n = indices[first + i];
    if (n >= 0) atomicAdd(counts + n, 1);
  }
}

// One block for each dictionary: every thread has a range of atoms.
__global__ void __launch_bounds__(1024) scan_uses_kernel(Uses u) {
  constexpr int kScanThreads = 1024;
  auto* sums = reinterpret_cast<std::int32_t*>(dynamic_shared());  // [kScanThreads]
  const int N = u.p.num_atoms, thread = static_cast<int>(threadIdx.x);
  std::int32_t* counts = u.counts + std::int64_t{blockIdx.x} * u.tiles * N;
  std::int32_t* offsets = u.uses.offsets + std::int64_t{blockIdx.x} * (N + 1);
  std::int32_t before = 0;
  for (int first = 0; first < N; first += kScanThreads) {
    const int n = first + thread;
    std::int32_t total = 0;
    for (int tile = 0; tile < u.tiles && n < N; ++tile) total += counts[std::int64_t{tile} * N + n];
    sums[thread] = total;
    __syncthreads();
    for (int step = 1; step < kScanThreads; step *= 2) {
      const std::int32_t add = thread >= step ? sums[thread - step] : 0;
      __syncthreads();
      sums[thread] += add;
      __syncthreads();
    }
    std::int32_t at = before + sums[thread] - total;
    if (n < N) offsets[n] = at;
    for (int tile = 0; tile < u.tiles && n < N; ++tile) {
      std::int32_t& count = counts[std::int64_t{tile} * N + n];
      const std::int32_t next = at + count;
      count = at;
      at = next;
    }
    before += sums[kScanThreads - 1];
    __syncthreads();
  }
  if (thread == 0) offsets[N] = before;
}

// A warp places its tile, 32 slots at a time: those of one atom keep their order.
__global__ void __launch_bounds__(kWarpSize) place_uses_kernel(Uses u, int index_bits) {
  const std::int64_t num_slots = u.p.num_signals * u.p.max_atoms;
  const std::int64_t dictionary = blockIdx.y, tile = blockIdx.x;
  std::int32_t* next = u.counts + (dictionary * u.tiles + tile) * u.p.num_atoms;
  const std::int32_t* indices = u.p.indices + dictionary * num_slots;
  std::int32_t* slots = u.uses.slots + dictionary * num_slots;
  const std::int64_t start = tile * kTileSlots;
  const int lane = lane_id();
  for (int i = 0; i < kTileSlots && start + i < num_slots; i += kWarpSize) {
    const std::int64_t slot = start + i + lane;
    const int n = slot < num_slots ? indices[slot] : -1;
    unsigned same = __ballot_sync(kWholeWarp, n >= 0);  // lanes with this atom
    for (int bit = 0; bit < index_bits; ++bit) {
      const bool set = (n >> bit & 1) != 0;
      const unsigned with = __ballot_sync(kWholeWarp, set);
      same &= set ? with : ~with;
    }
    if (n >= 0) {
      const int rank = __popc(same & ((1u << lane) - 1));
      const std::int32_t at = next[n];
      slots[at + rank] = static_cast<std::int32_t>(slot);
    }
    __syncwarp();
    if (n >= 0 && (same & ((1u << lane) - 1)) == 0) next[n] += __popc(same);
    __syncwarp();
  }
}

// ---- gradient ----------------------------------------------------------------------------------

// to += scale * weight * row of its signal, over the slots [first, last) of one atom.
template <int V>
__device__ void add_uses(Part<V>& to,
                         const SparseProblem& p,
                         const std::int32_t* slots,
                         std::int32_t first,
                         std::int32_t last,
                         const float* weights,
                         const float* rows,  // of the dictionary's signals, from dim d on
                         bool mine,
                         float scale) {
  const int lane = lane_id();
  for (std::int32_t i = first; i < last; i += kWarpSize) {
    const std::int32_t slot = i + lane < last ? slots[i + lane] : 0;
    const float weight = i + lane < last ? scale * weights[slot] : 0.0f;
    const std::int32_t signal = slot / p.max_atoms;
    const int count = min(kWarpSize, last - i);
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      const std::int64_t row = __shfl_sync(kWholeWarp, signal, j);
      const float w = __shfl_sync(kWholeWarp, weight, j);
      if (mine) add_scaled(to, w, load<V>(rows + row * p.dim));
    }
  }
}

template <int V>
__global__ void __launch_bounds__(kThreads) gradient_kernel(
    SparseProblem p, AtomUses uses, const float* residual, float scale, float* gradient) {
  const int n = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  if (n >= p.num_atoms) return;
  const std::int64_t dictionary = blockIdx.y, row = dictionary * p.num_atoms + n;
  const std::int64_t num_slots = p.num_signals * p.max_atoms;
  const std::int32_t* offsets = uses.offsets + dictionary * (p.num_atoms + 1);
  for (int first = 0; first < p.dim; first += kWarpSize * V) {
    const int d = first + lane_id() * V;
    const bool mine = d < p.dim;
    Part<V> sum = {};
    add_uses(sum,
             p,
             uses.slots + dictionary * num_slots,
             offsets[n],
             offsets[n + 1],
             p.weights + dictionary * num_slots,
             residual + dictionary * p.num_signals * p.dim + d,
             mine,
             scale);
    if (mine) store(gradient + row * p.dim + d, sum);
  }
}

// ---- Adam --------------------------------------------------------------------------------------

struct AdamFactors {
  float keep1, keep2, add1, add2, debias2, rate, epsilon;
};

template <int V>
__global__ void __launch_bounds__(kThreads) adam_kernel(AdamStep step, AdamFactors f) {
  const int n = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  const float scale = step.scales[blockIdx.y];
  if (n >= step.num_atoms || scale == 0) return;
  const std::int64_t at = (std::int64_t{blockIdx.y} * step.num_atoms + n) * step.dim;
  const float* g = step.gradient + at;
  float *atom = step.atoms + at, *m1 = step.first + at, *m2 = step.second + at;
  const int lane = lane_id(), dim = step.dim;
  float before = 1;  // what makes the atom a unit one
  if (step.normalize_first) {
    float sum = 0;
    for (int d = lane * V; d < dim; d += kWarpSize * V) {
      const Part<V> x = load<V>(atom + d);
      sum = dot(x, x, sum);
    }
    const float length = sqrtf(warp_sum(sum));
    if (length > 0) before = 1.0f / length;
  }
  float along = 0;
  for (int d = lane * V; d < dim; d += kWarpSize * V)
    along = dot(load<V>(g + d), load<V>(atom + d), along);
  along = warp_sum(along) * before;
  float sum = 0;
#pragma unroll 1
  for (int d = lane * V; d < dim; d += kWarpSize * V) {
    Part<V> x = load<V>(atom + d), first = load<V>(m1 + d), second = load<V>(m2 + d);
    const Part<V> slope = load<V>(g + d);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x.x[i] *= before;
      const float tangent = scale * (slope.x[i] - along * x.x[i]);
      first.x[i] = f.keep1 * first.x[i] + f.add1 * tangent;
      second.x[i] = f.keep2 * second.x[i] + f.add2 * tangent * tangent;
      x.x[i] -= f.rate * first.x[i] / (sqrtf(second.x[i] * f.debias2) + f.epsilon);
    }
    sum = dot(x, x, sum);
    store(atom + d, x);
    store(m1 + d, first);
    store(m2 + d, second);
  }
  if (step.normalize_first) return;
  const float length = sqrtf(warp_sum(sum));
  if (!(length > 0)) return;  // zeros, or a NaN
  const float after = 1.0f / length;
  for (int d = lane * V; d < dim; d += kWarpSize * V) {
    Part<V> x = load<V>(atom + d);
#pragma unroll
    for (int i = 0; i < V; ++i) x.x[i] *= after;
    store(atom + d, x);
  }
}

// ---- co-occurrence -----------------------------------------------------------------------------

// A block has one atom: its first warp adds to the row of A, the others to that of B.
template <int V, int W>  // V: of B's rows, W: of A's
__global__ void __launch_bounds__(kThreads) co_occurrence_kernel(
    SparseProblem p, AtomUses uses, const float* signals, float keep, CoOccurrence sums) {
  const int n = static_cast<int>(blockIdx.x);
  const std::int64_t dictionary = blockIdx.y, row = dictionary * p.num_atoms + n;
  const std::int64_t num_slots = p.num_signals * p.max_atoms;
  const std::int32_t* offsets = uses.offsets + dictionary * (p.num_atoms + 1);
  const std::int32_t first = offsets[n], last = offsets[n + 1];
  const std::int32_t* slots = uses.slots + dictionary * num_slots;
  const std::int32_t* indices = p.indices + dictionary * num_slots;
  const float* weights = p.weights + dictionary * num_slots;
  float* a = sums.codes + row * p.num_atoms;
  float* b = sums.signals + row * p.dim;
  for (int k = static_cast<int>(threadIdx.x) * W; k < p.num_atoms && keep != 1; k += kThreads * W) {
    Part<W> x = load<W>(a + k);
#pragma unroll
    for (int i = 0; i < W; ++i) x.x[i] *= keep;
    store(a + k, x);
  }
  __syncthreads();
  const int lane = lane_id(), warp = warp_id();
  if (warp > 0) {
    for (int base = (warp - 1) * kWarpSize * V; base < p.dim;
         base += (kWarps - 1) * kWarpSize * V) {
      const int d = base + lane * V;
      const bool mine = d < p.dim;
      Part<V> sum = {};
      if (mine) sum = load<V>(b + d);
#pragma unroll
      for (int i = 0; i < V; ++i) sum.x[i] *= keep;
      add_uses(sum,
               p,
               slots,
               first,
               last,
               weights,
               signals + dictionary * p.num_signals * p.dim + d,
               mine,
               1.0f);
      if (mine) store(b + d, sum);
    }
    return;
  }
  for (std::int32_t i = first; i < last; ++i) {
    const std::int32_t slot = slots[i];
    const std::int64_t code = std::int64_t{slot / p.max_atoms} * p.max_atoms;
    const float weight = weights[slot];
    bool ended = false;
    for (int k = 0; k < p.max_atoms && !ended; k += kWarpSize) {
      const int other = k + lane < p.max_atoms ? indices[code + k + lane] : -1;
      const float y = other >= 0 ? weight * weights[code + k + lane] : 0.0f;
      const unsigned unused = __ballot_sync(kWholeWarp, other < 0);
      const int count = unused == 0 ? kWarpSize : __ffs(static_cast<int>(unused)) - 1;
      ended = count < kWarpSize;
      // An atom that a code names twice is added by its first lane.
      int leader = -1;
      float sum = 0;
      for (int j = 0; j < count; ++j) {
        const int its = __shfl_sync(kWholeWarp, other, j);
        const float add = __shfl_sync(kWholeWarp, y, j);
        if (its == other) {
          leader = leader < 0 ? j : leader;
          sum += add;
        }
      }
      if (lane < count && leader == lane) a[other] += sum;
      __syncwarp();
    }
  }
}

// ---- block coordinate descent ------------------------------------------------------------------

constexpr int kMisfitRows = 16, kMisfitDims = 64, kMisfitThreads = 256, kMisfitDepth = 32;

// misfit [P, kDescentBlock, dim] = B - A D for the atoms of one block: kMisfitRows rows and
// kMisfitDims dims of it, four neighbouring dims a thread.
__global__ void __launch_bounds__(kMisfitThreads) misfit_kernel(
    int N, int dim, int first, int rows, CoOccurrence sums, const float* atoms, float* misfit) {
  auto* a = reinterpret_cast<float*>(dynamic_shared());  // [kMisfitRows, kMisfitDepth + 1]
  float* d = a + kMisfitRows * (kMisfitDepth + 4);       // [kMisfitDepth, kMisfitDims]
  const std::int64_t p = blockIdx.z;
  const int row0 = static_cast<int>(blockIdx.y) * kMisfitRows;
  const int dim0 = static_cast<int>(blockIdx.x) * kMisfitDims;
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / 16, column = thread % 16 * 4;
  const float* A = sums.codes + (p * N + first + row0) * N;
  const float* D = atoms + p * N * dim;
  const bool inside = row0 + row < rows;
  float total[4] = {};
  for (int i = 0; i < 4 && inside; ++i) {
    if (dim0 + column + i < dim)
      total[i] = sums.signals[(p * N + first + row0 + row) * dim + dim0 + column + i];
  }
  for (int k0 = 0; k0 < N; k0 += kMisfitDepth) {
    for (int i = thread; i < kMisfitRows * kMisfitDepth; i += kMisfitThreads) {
      const int r = i / kMisfitDepth, k = i % kMisfitDepth;
      a[r * (kMisfitDepth + 1) + k] =
          row0 + r < rows && k0 + k < N ? A[std::int64_t{r} * N + k0 + k] : 0.0f;
    }
    for (int i = thread; i < kMisfitDepth * kMisfitDims; i += kMisfitThreads) {
      const int k = i / kMisfitDims, c = i % kMisfitDims;
      d[i] = k0 + k < N && dim0 + c < dim ? D[std::int64_t{k0 + k} * dim + dim0 + c] : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kMisfitDepth; ++k) {
      const float weight = a[row * (kMisfitDepth + 1) + k];
      const float4 atom = *reinterpret_cast<const float4*>(d + k * kMisfitDims + column);
      total[0] -= weight * atom.x;
      total[1] -= weight * atom.y;
      total[2] -= weight * atom.z;
      total[3] -= weight * atom.w;
    }
    __syncthreads();
  }
  for (int i = 0; i < 4 && inside; ++i) {
    if (dim0 + column + i < dim)
      misfit[(p * kDescentBlock + row0 + row) * dim + dim0 + column + i] = total[i];
  }
}

// The atoms of one block in turn. A block of threads has one dictionary.
template <bool kShared>  // whether the misfit fits in shared memory
__global__ void __launch_bounds__(256) descend_kernel(
    int N, int dim, int first, int rows, const float* codes, float* scratch, float* atoms) {
  constexpr int kAll = 256;
  auto* own = reinterpret_cast<float*>(dynamic_shared());  // [kDescentBlock, kDescentBlock] of A
  float* parts = own + kDescentBlock * kDescentBlock;      // [kAll / kWarpSize]
  const std::int64_t p = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  float* misfit = scratch + p * kDescentBlock * dim;
  if constexpr (kShared) {
    float* copy = parts + kWarpSize;
    for (int i = thread; i < rows * dim; i += kAll) copy[i] = misfit[i];
    misfit = copy;
  }
  for (int i = thread; i < rows * kDescentBlock; i += kAll) {
    const int r = i / kDescentBlock, c = i % kDescentBlock;
    if (c < rows) own[i] = codes[(p * N + first + r) * N + first + c];
  }
  __syncthreads();
  float* D = atoms + (p * N + first) * dim;
  for (int j = 0; j < rows; ++j) {
    const float* a = own + j * kDescentBlock;
    if (!(a[j] > 0)) continue;
    float *g = misfit + j * dim, *d = D + std::int64_t{j} * dim;
    // g becomes b_j - sum over k != j of A_jk d_k, then the move of d_j.
    float sum = 0;
    for (int i = thread; i < dim; i += kAll) {
      const float x = g[i] + a[j] * d[i];
      g[i] = x;
      sum += x * x;
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) parts[warp_id()] = sum;
    __syncthreads();
    float length = 0;
    for (int w = 0; w < kAll / kWarpSize; ++w) length += parts[w];
    length = sqrtf(length);
    __syncthreads();
    if (!(length > 0)) continue;
    for (int i = thread; i < dim; i += kAll) {
      const float moved = g[i] / length;
      g[i] = moved - d[i];
      d[i] = moved;
    }
    __syncthreads();
    for (int i = thread; i < (rows - j - 1) * dim; i += kAll) {
      const int k = j + 1 + i / dim;  // A is symmetric: column j of its rows is a
      misfit[k * dim + i % dim] -= a[k] * g[i % dim];
    }
    __syncthreads();
  }
}

bool in_fours(int count) { return count % 4 == 0; }

constexpr Status kTooMany{1, "sparse: too many for one launch, must be below 2^16 dictionaries"};

// Blocks for `rows` warps of each dictionary. Rows are fewer than 2^31 (sparse.h).
dim3 grid_of(std::int64_t rows, int num_dictionaries) {
  return dim3(static_cast<unsigned>((rows + kWarps - 1) / kWarps),
              static_cast<unsigned>(num_dictionaries));
}

bool is_too_many(int num_dictionaries) { return num_dictionaries > 65535; }

int tiles_of(const SparseProblem& p) {
  return static_cast<int>((p.num_signals * p.max_atoms + kTileSlots - 1) / kTileSlots);
}

}  // namespace

Status sparse_residual(const SparseProblem& p,
                       const float* signals,
                       float* residual,
                       float* signal_norms,
                       float* residual_norms,
                       Stream stream) {
  if (p.num_dictionaries == 0 || p.num_signals == 0) return {};
  if (is_too_many(p.num_dictionaries)) return kTooMany;
  return launch(in_fours(p.dim) ? residual_kernel<4> : residual_kernel<1>,
                grid_of(p.num_signals, p.num_dictionaries),
                dim3(kThreads),
                0,
                stream,
                p,
                signals,
                residual,
                signal_norms,
                residual_norms);
}

std::size_t atom_uses_workspace_bytes(const SparseProblem& p) {
  return static_cast<std::size_t>(p.num_dictionaries) * static_cast<std::size_t>(tiles_of(p)) *
         static_cast<std::size_t>(p.num_atoms) * sizeof(std::int32_t);
}

Status atom_uses(const SparseProblem& p, const AtomUses& uses, void* workspace, Stream stream) {
  if (p.num_dictionaries == 0) return {};
  const Uses u{p, uses, static_cast<std::int32_t*>(workspace), tiles_of(p)};
  if (is_too_many(p.num_dictionaries)) return kTooMany;
  const dim3 grid(static_cast<unsigned>(u.tiles), static_cast<unsigned>(p.num_dictionaries));
  if (u.tiles > 0) {
    const Status counted = launch(count_uses_kernel, grid, dim3(kThreads), 0, stream, u);
    if (!counted.ok()) return counted;
  }
  const Status scanned = launch(scan_uses_kernel,
                                dim3(static_cast<unsigned>(p.num_dictionaries)),
                                dim3(1024),
                                1024 * sizeof(std::int32_t),
                                stream,
                                u);
  if (!scanned.ok() || u.tiles == 0) return scanned;
  int index_bits = 0;
  while (index_bits < 31 && 1 << index_bits < p.num_atoms) ++index_bits;
  return launch(place_uses_kernel, grid, dim3(kWarpSize), 0, stream, u, index_bits);
}

Status sparse_gradient(const SparseProblem& p,
                       const AtomUses& uses,
                       const float* residual,
                       float scale,
                       float* gradient,
                       Stream stream) {
  if (p.num_dictionaries == 0 || p.num_atoms == 0) return {};
  if (is_too_many(p.num_dictionaries)) return kTooMany;
  return launch(in_fours(p.dim) ? gradient_kernel<4> : gradient_kernel<1>,
                grid_of(p.num_atoms, p.num_dictionaries),
                dim3(kThreads),
                0,
                stream,
                p,
                uses,
                residual,
                scale,
                gradient);
}

Status adam_step(const AdamStep& step, Stream stream) {
  if (step.num_dictionaries == 0 || step.num_atoms == 0) return {};
  if (is_too_many(step.num_dictionaries)) return kTooMany;
  const double t = static_cast<double>(step.step);
  const AdamFactors factors{static_cast<float>(step.beta1),
                            static_cast<float>(step.beta2),
                            static_cast<float>(1 - step.beta1),
                            static_cast<float>(1 - step.beta2),
                            static_cast<float>(1 / (1 - std::pow(step.beta2, t))),
                            static_cast<float>(step.rate / (1 - std::pow(step.beta1, t))),
                            static_cast<float>(step.epsilon)};
  return launch(in_fours(step.dim) ? adam_kernel<4> : adam_kernel<1>,
                grid_of(step.num_atoms, step.num_dictionaries),
                dim3(kThreads),
                0,
                stream,
                step,
                factors);
}

Status add_co_occurrence(const SparseProblem& p,
                         const AtomUses& uses,
                         const float* signals,
                         float keep,
                         const CoOccurrence& sums,
                         Stream stream) {
  if (p.num_dictionaries == 0 || p.num_atoms == 0) return {};
  if (is_too_many(p.num_dictionaries)) return kTooMany;
  const auto kernel =
      in_fours(p.dim)
          ? (in_fours(p.num_atoms) ? co_occurrence_kernel<4, 4> : co_occurrence_kernel<4, 1>)
          : (in_fours(p.num_atoms) ? co_occurrence_kernel<1, 4> : co_occurrence_kernel<1, 1>);
  return launch(kernel,
                dim3(static_cast<unsigned>(p.num_atoms), static_cast<unsigned>(p.num_dictionaries)),
                dim3(kThreads),
                0,
                stream,
                p,
                uses,
                signals,
                keep,
                sums);
}

Status descend_atoms(int num_dictionaries,
                     int num_atoms,
                     int dim,
                     const CoOccurrence& sums,
                     float* scratch,
                     float* atoms,
                     Stream stream) {
  constexpr std::size_t kMostShared = 96 << 10;  // any device with at least compute capability 8.0
  if (num_dictionaries == 0 || num_atoms == 0 || dim == 0) return {};
  if (is_too_many(num_dictionaries)) return kTooMany;
  const unsigned P = static_cast<unsigned>(num_dictionaries);
  const std::size_t base = (std::size_t{kDescentBlock} * kDescentBlock + kWarpSize) * sizeof(float);
  const std::size_t with_misfit =
      base + std::size_t{kDescentBlock} * static_cast<std::size_t>(dim) * sizeof(float);
  const bool shared = with_misfit <= kMostShared;
  for (int first = 0; first < num_atoms; first += kDescentBlock) {
    const int rows = num_atoms - first < kDescentBlock ? num_atoms - first : kDescentBlock;
    Status status =
        launch(misfit_kernel,
               dim3(static_cast<unsigned>((dim + kMisfitDims - 1) / kMisfitDims),
                    static_cast<unsigned>((rows + kMisfitRows - 1) / kMisfitRows),
                    P),
               dim3(kMisfitThreads),
               (kMisfitRows * (kMisfitDepth + 4) + kMisfitDepth * kMisfitDims) * sizeof(float),
               stream,
               num_atoms,
               dim,
               first,
               rows,
               sums,
               static_cast<const float*>(atoms),
               scratch);
    if (!status.ok()) return status;
    status = launch(shared ? descend_kernel<true> : descend_kernel<false>,
                    dim3(P),
                    dim3(256),
                    shared ? with_misfit : base,
                    stream,
                    num_atoms,
                    dim,
                    first,
                    rows,
                    static_cast<const float*>(sums.codes),
                    scratch,
                    atoms);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace lexico::kernels::cuda
