#pragma once
// Pursuit with correlations from tensor cores: everything but the correlations themselves, which
// the Scores type of each path brings (pursuit_mma.cu, pursuit_wgmma.cu).
//
// A block owns kRows signals of one dictionary for all their picks. For each pick it
//  1. streams the fp16 atoms through shared memory and multiplies them with the fp16 residuals; no
//     correlation leaves the registers: each thread keeps the largest |d.r| of its columns, with
//     the column in the last bits, and hands it over once for each segment of `flush` tiles;
//  2. gives each signal to a warp, which scores again in fp32 what rounding cannot tell from the
//     best, takes the atom (Gram-Schmidt), and writes the new residual back as fp16, scaled to 1.
// Each lane reads and writes the same elements of all vectors of a signal: element kPerLane * lane
// and the next ones.
#include "kernels/common/launch.h"
#include "kernels/pursuit/pursuit_signal.cuh"

namespace lexico::kernels::cuda {

// Prepared atoms: units of 64 atoms, zeros behind the last; of a unit first the 64 halves of all
// its rows from element 0 on, then those from element 64 on, and so forth: slabs of 64 rows of 128
// bytes, 16-byte chunk c of row i at place c ^ (i % 8). That is wgmma's 128-byte swizzle, and
// ldmatrix reads it without bank conflicts. Residuals in shared memory are the same, kRows a slab.
constexpr int kUnit = 64, kSlab = 64, kRowBytes = 128;

__host__ __device__ inline int padded_dim(int dim) {
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

// Where 16-byte chunk `chunk` of row `row` is, in bytes, with `rows` rows to a slab.
__host__ __device__ inline int place_of(int row, int chunk, int rows) {
  return chunk / 8 * rows * kRowBytes + row * kRowBytes + ((chunk % 8) ^ (row % 8)) * 16;
}

struct TensorTask {
  PursuitProblem p;
  const unsigned char* atoms16;  // [P, padded_atoms * kDim * 2 bytes]
  const float* norms2;           // [P, padded_atoms]
  unsigned char* scratch;        // [blocks, block_bytes]
  std::int64_t block_bytes, signal_bytes;
  int groups, groups_of_one;  // blocks of signals: of all dictionaries, of each
  int padded_atoms;
  int flush;          // tiles of atoms in a segment
  int segments;       // of a signal; OLS has as many values again, the second largest of each
  int position_bits;  // of a column in its segment
  unsigned last_bits, kept_bits;  // of a score's bits, for the column; for its size
};

// One signal's part of the block's scratch, in global memory.
struct TensorSignal {
  float* residual;         // [kDim]
  float* basis;            // [max_atoms, kDim]
  float* triangle;         // [max_atoms, max_atoms]: column k of R in row k
  std::int32_t* refused;   // [kMaxRefused]
  std::int32_t* pool;      // OLS: candidates so far [pool_size]
  float* outside;          // OLS: their |P_perp d|^2; 1e30 once taken or refused
  std::uint32_t* members;  // OLS: a bit for each atom
};

__host__ __device__ inline int pool_size(const PursuitProblem& p) {
  const int most = p.candidates * (p.max_atoms + 1);
  return (most < p.num_atoms ? most : p.num_atoms) + kWarpSize;
}

__host__ __device__ inline std::size_t carve(const PursuitProblem& p,
                                             unsigned char* base,
                                             TensorSignal* s) {
  const std::size_t dim = static_cast<std::size_t>(padded_dim(p.dim)),
                    picks = static_cast<std::size_t>(p.max_atoms);
  const bool ols = p.rule == PursuitRule::kOls;
  const std::size_t pool = ols ? static_cast<std::size_t>(pool_size(p)) : 0,
                    bits = ols ? static_cast<std::size_t>((p.num_atoms + 31) / 32) : 0;
  std::size_t used = 0;
  const auto take = [&](std::size_t count) {
    unsigned char* const piece = base == nullptr ? nullptr : base + used;
    used += (count * sizeof(float) + 31) / 32 * 32;
    return piece;
  };
  s->residual = reinterpret_cast<float*>(take(dim));
  s->basis = reinterpret_cast<float*>(take(picks * dim));
  s->triangle = reinterpret_cast<float*>(take(picks * picks));
  s->refused = reinterpret_cast<std::int32_t*>(take(kMaxRefused));
  s->pool = reinterpret_cast<std::int32_t*>(take(pool));
  s->outside = reinterpret_cast<float*>(take(pool));
  s->members = reinterpret_cast<std::uint32_t*>(take(bits));
  return used;
}

// What a block knows of one of its signals, in shared memory.
struct TensorState {
  float norm, residual_norm;
  int exponent, limit, count, refused, pool;
  int active, fresh;  // fresh: the newest basis vector is not yet in `outside`
};

// How the threads of a path share out the atoms of a tile: warps_n warps side by side, each with
// tile / warps_n columns in blocks of 8, of which the lanes of a quad have 2 each.
struct TileShape {
  int tile, warps_n;
  __host__ __device__ constexpr int segments_per_flush() const { return 4 * warps_n; }
  __host__ __device__ constexpr int columns_per_thread() const { return tile / warps_n / 4; }
};

// ------------------------------------------------------------------------ what the driver asks for

// The parts of the workspace.
struct TensorSpace {
  unsigned char* atoms16;
  float* norms2;
  unsigned char* scratch;
};

inline int padded_atoms(const PursuitProblem& p) { return (p.num_atoms + 127) / 128 * 128; }

constexpr int kOmpSegments = 32, kMostSegments = 128;  // OLS has the most
constexpr int kGoodPositionBits = 10;                  // 13 bits of the size are left
struct Segments {
  int flush, count, position_bits;
};
Segments segments_of(const PursuitProblem& p, TileShape shape);

TensorTask task_of(const PursuitProblem& p,
                   const PursuitPlan& plan,
                   const TensorSpace& space,
                   TileShape shape);

// For all tensor paths: fp16 atoms and norms.
Status prepare_atoms(const PursuitProblem& p, const TensorSpace& space, Stream stream);

std::size_t mma_shared_bytes(const PursuitProblem& p, int signals_per_block);
Status run_mma(const PursuitProblem& p,
               const PursuitPlan& plan,
               const TensorSpace& space,
               Stream stream);

// OMP with 128 signals to a block, compute capability 9.0 only. `has_wgmma`: this build has it.
bool has_wgmma();
std::size_t wgmma_shared_bytes(const PursuitProblem& p);
Status run_wgmma(const PursuitProblem& p,
                 const PursuitPlan& plan,
                 const TensorSpace& space,
                 Stream stream);

// ------------------------------------------------------------------------------------ on the
// device

// The errors of a correlation of unit vectors in fp16: six standard deviations for vectors without
// a few large elements, and for those and for equal elements the relative error of one product.
constexpr float kScreenError = 2e-4f, kScreenRelativeError = 6e-4f;

template <int kPerLane>
__device__ inline float dot_part(const float (&a)[kPerLane], const float (&b)[kPerLane]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += a[i] * b[i];
  return sum;
}

// A lane's part of a vector that is aligned and padded.
template <int kPerLane>
__device__ inline void load_part(const float* from, float (&x)[kPerLane]) {
  from += lane_id() * kPerLane;
  if constexpr (kPerLane == 2) {
    const float2 v = *reinterpret_cast<const float2*>(from);
    x[0] = v.x;
    x[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + i);
      x[i] = v.x;
      x[i + 1] = v.y;
      x[i + 2] = v.z;
      x[i + 3] = v.w;
    }
  }
}
template <int kPerLane>
__device__ inline void store_part(float* to, const float (&x)[kPerLane]) {
  to += lane_id() * kPerLane;
  if constexpr (kPerLane == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4)
      *reinterpret_cast<float4*>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
}
// A lane's part of a row of the caller's, which may be shorter and lie anywhere.
template <int kPerLane>
__device__ inline void load_row(const float* row, int dim, float (&x)[kPerLane]) {
  if (dim == kPerLane * kWarpSize && reinterpret_cast<std::size_t>(row) % 16 == 0) {
    load_part(row, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane_id() * kPerLane + i;
    x[i] = e < dim ? row[e] : 0.0f;
  }
}

// The largest, or the two largest, of a thread's scores in a segment.
template <int kKeep>
struct Best {
  unsigned values[kKeep];
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kKeep; ++i) values[i] = 0;
  }
  __device__ void offer(unsigned value) {
    if constexpr (kKeep == 2) values[1] = max(values[1], min(values[0], value));
    values[0] = max(values[0], value);
  }
  __device__ void store(unsigned* to, int segments) const {
#pragma unroll
    for (int i = 0; i < kKeep; ++i) to[i * segments] = values[i];
  }
};

// One signal of a block, with the warp that works on it.
template <int kDim, int kRows>
struct Worker {
  static constexpr int kPerLane = kDim / kWarpSize;

  const TensorTask& task;
  const TileShape shape;
  const float* atoms;     // fp32, of the dictionary
  const float* norms2;    // of the dictionary
  unsigned char* rows16;  // fp16 residuals of the block, in shared memory
  TensorState& state;
  TensorSignal scratch;
  std::int64_t signal;  // of all
  int row;              // in the block

  __device__ void load_atom(int atom, float (&d)[kPerLane]) const {
    load_row(atoms + static_cast<std::int64_t>(atom) * task.p.dim, task.p.dim, d);
  }

  // The residual for the tensor cores: fp16, of norm 1.
  __device__ void store_rows16(const float (&r)[kPerLane], float norm) const {
    const float inverse = norm > 0 ? 1 / norm : 0.0f;
    const int element = lane_id() * kPerLane;
    unsigned char* const to = rows16 + place_of(row, element / 8, kRows) + element % 8 * 2;
    __half2 pairs[kPerLane / 2];
#pragma unroll
    for (int i = 0; i < kPerLane / 2; ++i)
      pairs[i] = __floats2half2_rn(r[2 * i] * inverse, r[2 * i + 1] * inverse);
    if constexpr (kPerLane == 2) {
      *reinterpret_cast<__half2*>(to) = pairs[0];
    } else if constexpr (kPerLane == 4) {
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
    } else {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(pairs);
    }
  }

  __device__ void start() {
    const PursuitProblem& p = task.p;
    const int lane = lane_id();
    float x[kPerLane];
    load_row(p.signals + signal * p.dim, p.dim, x);
    unsigned top = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) top = max(top, __float_as_uint(x[i]) & 0x7fffffffu);
    top = __reduce_max_sync(kWholeWarp, top);
    const Scale scale = scale_of(top);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = scale.finite ? scaled(x[i], scale.exponent) : 0.0f;
    const float norm = sqrtf(warp_sum(dot_part(x, x)));
    const int limit = p.budgets == nullptr ? p.max_atoms : min(p.budgets[signal], p.max_atoms);
    store_part(scratch.residual, x);
    store_rows16(x, norm);
    if (p.rule == PursuitRule::kOls) {
      for (int i = lane; i < (p.num_atoms + 31) / 32; i += kWarpSize) scratch.members[i] = 0;
    }
    const float shown =
        scale.finite ? unscaled(norm, scale.exponent) : __uint_as_float(0x7fc00000u);
    write_curve(p, signal, 0, shown);
    clear_slots(p, signal, 0);
    if (lane == 0) {
      state.norm = state.residual_norm = norm;
      state.exponent = scale.exponent;
      state.limit = limit;
      state.count = state.refused = state.pool = state.fresh = 0;
      state.active = scale.finite && wants_more(0, limit, norm, norm, p.relative_tolerance);
      p.counts[signal] = 0;
      p.residual_norms[signal] = shown;
    }
    __syncwarp();
  }

  // A row of the tile that no signal has.
  __device__ void start_empty() {
    const float zeros[kPerLane] = {};
    store_rows16(zeros, 0);
    if (lane_id() == 0) state.active = 0;
    __syncwarp();
  }

  // The atom whose column in `segment` a best score names; num_atoms and more: padding.
  __device__ int atom_of_best(unsigned best, int segment) const {
    const int position =
        (1 << task.position_bits) - 1 - static_cast<int>(best & ((1u << task.position_bits) - 1));
    const int per_thread = shape.columns_per_thread(), per_flush = shape.segments_per_flush();
    const int tile = segment / per_flush * task.flush + position / per_thread,
              column = position % per_thread;
    return tile * shape.tile + segment % per_flush / 4 * (shape.tile / shape.warps_n) +
           column / 2 * 8 + segment % 4 * 2 + column % 2;
  }

  // An atom that may be taken, with what the warp knows of it.
  struct Candidate {
    unsigned long long key;
    float d[kPerLane], norm2;
  };

  // What was taken and refused so far: lane i has the i-th and the one 32 after it.
  struct Taken {
    int atoms[2];
    __device__ bool has(int atom) const {
      return __any_sync(kWholeWarp, atoms[0] == atom || atoms[1] == atom) != 0;
    }
  };
  __device__ Taken taken() const {
    Taken t;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int i = lane_id() + j * kWarpSize;
      t.atoms[j] = i < state.count ? task.p.indices[signal * task.p.max_atoms + i] : -1;
    }
    return t;
  }
  __device__ bool is_refused(int atom) const {
    return state.refused > 0 &&
           __any_sync(kWholeWarp,
                      lane_id() < state.refused && scratch.refused[lane_id()] == atom) != 0;
  }

  // The best atom by |d.r| in fp32 among the segments' best that are no less than `least`.
  __device__ void find_best(const unsigned* segments,
                            unsigned least,
                            const float (&r)[kPerLane],
                            const Taken& taken_so_far,
                            Candidate* best) const {
    best->key = 0;
    for (int first = 0; first < task.segments; first += kWarpSize) {
      const int segment = first + lane_id();
      const unsigned own = segment < task.segments ? segments[segment] : 0;
      const int own_atom = atom_of_best(own, segment);
      unsigned lanes =
          __ballot_sync(kWholeWarp, own > 0 && own >= least && own_atom < task.p.num_atoms);
      for (; lanes != 0; lanes &= lanes - 1) {
        const int atom = __shfl_sync(kWholeWarp, own_atom, __ffs(static_cast<int>(lanes)) - 1);
        float d[kPerLane];
        load_atom(atom, d);
        if (taken_so_far.has(atom) || is_refused(atom)) continue;
        float sums[2] = {dot_part(d, r), dot_part(d, d)};
        warp_sum(sums);
        const unsigned long long key = key_of(fabsf(sums[0]), atom);
        if (key <= best->key) continue;
        best->key = key;
        best->norm2 = sums[1];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) best->d[i] = d[i];
      }
    }
  }

  __device__ void choose_omp(const unsigned* segments,
                             float floor,
                             const float (&r)[kPerLane],
                             const Taken& taken_so_far,
                             Candidate* best) const {
    unsigned top = 0;
    for (int i = lane_id(); i < task.segments; i += kWarpSize) top = max(top, segments[i]);
    top = __reduce_max_sync(kWholeWarp, top);
    // Those that may be the best: both scores may be off, and so many bits of each were cut.
    const float score = __uint_as_float(top | task.last_bits),
                cut = __uint_as_float((127u - 22 + task.position_bits) << 23);
    const float least = score - 2 * (kScreenError + kScreenRelativeError * score) - cut * score;
    const unsigned bits = least > 0 ? __float_as_uint(least) & task.kept_bits : 0;
    find_best(segments, bits, r, taken_so_far, best);
    if (bits > 0 && !(score_of(best->key) > floor)) find_best(segments, 0, r, taken_so_far, best);
  }

  // OLS: the `candidates` largest of the two best of each segment join the pool; returns how many
  // it has then.
  __device__ int join_pool(const unsigned* segments) const {
    constexpr int kMost = 2 * kMostSegments / kWarpSize;  // values of a lane
    const PursuitProblem& p = task.p;
    const int lane = lane_id();
    unsigned own[kMost];
    const auto atom_at = [&](unsigned value, int j) {
      const int place = j * kWarpSize + lane;
      return atom_of_best(value, place < task.segments ? place : place - task.segments);
    };
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      const int place = j * kWarpSize + lane;
      own[j] = place < 2 * task.segments ? segments[place] : 0;
      const int atom = atom_at(own[j], j);
      bool out = atom >= p.num_atoms;
      for (int i = 0; i < state.count; ++i)
        out = out || p.indices[signal * p.max_atoms + i] == atom;
      for (int i = 0; i < state.refused; ++i) out = out || scratch.refused[i] == atom;
      if (out) own[j] = 0;
    }
    unsigned least = 0;  // the largest value that at least so many reach
    for (int bit = 30; bit >= 0; --bit) {
      const unsigned trial = least | 1u << bit;
      int reached = 0;
#pragma unroll
      for (int j = 0; j < kMost; ++j) reached += __popc(__ballot_sync(kWholeWarp, own[j] >= trial));
      if (reached >= p.candidates) least = trial;
    }
    int count = state.pool;
    const int room = pool_size(p);
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      const int atom = atom_at(own[j], j);
      const bool joins =
          own[j] > 0 && own[j] >= least && (scratch.members[atom / 32] >> (atom % 32) & 1u) == 0;
      const unsigned lanes = __ballot_sync(kWholeWarp, joins);
      const int place = count + __popc(lanes & ((1u << lane) - 1));
      if (joins && place < room) {
        scratch.pool[place] = atom;
        atomicOr(scratch.members + atom / 32, 1u << (atom % 32));
      }
      count = min(count + __popc(lanes), room);
    }
    __syncwarp();
    return count;
  }

  // The best of the pool by (d.r)^2 / |P_perp d|^2. Lane i % 32 has |P_perp d|^2 of its i-th.
  __device__ unsigned long long choose_ols(const unsigned* segments,
                                           const float (&r)[kPerLane]) const {
    const int lane = lane_id(), before = state.pool, count = join_pool(segments);
    unsigned long long best = 0;
    float newest[kPerLane] = {};
    if (state.fresh) load_part(scratch.basis + (state.count - 1) * kDim, newest);
    for (int i = 0; i < count; i += 2) {
      float d[2][kPerLane], sums[4];
      int which[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        which[j] = scratch.pool[min(i + j, count - 1)];
        load_atom(which[j], d[j]);
        sums[j] = dot_part(d[j], r);
        sums[2 + j] = dot_part(d[j], newest);
      }
      warp_sum(sums);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (i + j >= count) break;
        float removed = sums[2 + j] * sums[2 + j];
        if (i + j >= before) {  // of this one nothing was known
          removed = 0;
          for (int k = 0; k < state.count; k += 4) {
            float parts[4];
#pragma unroll
            for (int l = 0; l < 4; ++l) {
              float u[kPerLane];
              load_part(scratch.basis + min(k + l, state.count - 1) * kDim, u);
              parts[l] = k + l < state.count ? dot_part(d[j], u) : 0.0f;
            }
            warp_sum(parts);
#pragma unroll
            for (int l = 0; l < 4; ++l) removed += parts[l] * parts[l];
          }
        }
        if (lane == (i + j) % kWarpSize) {
          const float norm2 = norms2[which[j]];
          const float outside = (i + j < before ? scratch.outside[i + j] : norm2) - removed;
          scratch.outside[i + j] = outside;
          const unsigned long long key = key_of(ols_score(sums[j], outside, norm2), which[j]);
          best = key > best ? key : best;
        }
      }
    }
    __syncwarp();
    if (lane == 0) {
      state.pool = count;
      state.fresh = 0;
    }
    __syncwarp();
    return warp_best(best);
  }

  // Its score is 0 from here on.
  __device__ void leave_pool(int atom) const {
    for (int i = lane_id(); i < state.pool; i += kWarpSize)
      if (scratch.pool[i] == atom) scratch.outside[i] = 1e30f;
  }

  // Four rows of the basis from `first` on; behind the last, the last.
  __device__ void load_basis(int first, float (&q)[4][kPerLane]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      load_part(scratch.basis + max(min(first + j, state.count - 1), 0) * kDim, q[j]);
  }

  // Takes the candidate into the basis and its part out of the residual; false if it is in the
  // span. `q` holds load_basis(0), asked for long before.
  __device__ bool take(Candidate& c, float (&q)[4][kPerLane], float (&r)[kPerLane]) {
    const int lane = lane_id(), count = state.count;
    float column[2] = {0, 0};  // rows lane and lane + 32
    float(&u)[kPerLane] = c.d;
    float sums[2] = {c.norm2, 0};  // |u|^2 and u.r
    if (count == 0) sums[1] = warp_sum(dot_part(u, r));
    for (int pass = 0; pass < 2 && count > 0; ++pass) {
      if (pass == 1) {
        if (sums[0] >= 0.5f * c.norm2) break;  // once was enough
        load_basis(0, q);
      }
      for (int first = 0; first < count; first += 4) {
        float parts[4], next[4][kPerLane] = {};
        if (first + 4 < count) load_basis(first + 4, next);
#pragma unroll
        for (int j = 0; j < 4; ++j) parts[j] = first + j < count ? dot_part(u, q[j]) : 0.0f;
        warp_sum(parts);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < kPerLane; ++i) {
            u[i] -= parts[j] * q[j][i];
            q[j][i] = next[j][i];
          }
          if (lane == (first + j) % kWarpSize) {
            if (first + j < kWarpSize) {
              column[0] += parts[j];
            } else {
              column[1] += parts[j];
            }
          }
        }
      }
      sums[0] = dot_part(u, u);
      sums[1] = dot_part(u, r);
      warp_sum(sums);
    }
    if (!(sums[0] > kIndependent * c.norm2) || !(sums[0] > 0)) return false;
    const float nu = sqrtf(sums[0]), inverse = 1 / nu, amplitude = sums[1] * inverse;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      u[i] *= inverse;
      r[i] -= amplitude * u[i];
    }
    const float residual_norm = fminf(sqrtf(warp_sum(dot_part(r, r))), state.residual_norm);
    store_part(scratch.basis + count * kDim, u);
    store_part(scratch.residual, r);
    float* const triangle = scratch.triangle + count * task.p.max_atoms;
    if (lane < count) triangle[lane] = column[0];
    if (lane + kWarpSize < count) triangle[lane + kWarpSize] = column[1];
    __syncwarp();  // all lanes have read the state
    if (lane == 0) {
      triangle[count] = nu;
      task.p.indices[signal * task.p.max_atoms + count] = atom_of(c.key);
      task.p.weights[signal * task.p.max_atoms + count] = amplitude;  // until the end
      state.residual_norm = residual_norm;
      state.count = count + 1;
      state.fresh = 1;
    }
    __syncwarp();
    return true;
  }

  // Solves R w = a from the last row up and writes the codes.
  __device__ void finish() {
    const int lane = lane_id(), count = state.count, exponent = state.exponent;
    float* const weights = task.p.weights + signal * task.p.max_atoms;
    float a[2];  // rows lane and lane + 32; as they are done, weights
#pragma unroll
    for (int j = 0; j < 2; ++j)
      a[j] = lane + j * kWarpSize < count ? weights[lane + j * kWarpSize] : 0.0f;
    for (int k = count - 1; k >= 0; --k) {
      const float* const column = scratch.triangle + k * task.p.max_atoms;
      const float own = k < kWarpSize ? a[0] : a[1];
      const float weight = __shfl_sync(kWholeWarp, own, k % kWarpSize) / column[k];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int i = lane + j * kWarpSize;
        if (i < k) a[j] -= weight * column[i];
        if (i == k) a[j] = weight;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (lane + j * kWarpSize < count) weights[lane + j * kWarpSize] = unscaled(a[j], exponent);
    }
    __syncwarp();
    if (lane == 0) {
      task.p.counts[signal] = count;
      task.p.residual_norms[signal] = unscaled(state.residual_norm, exponent);
      state.active = 0;
    }
    __syncwarp();
  }

  // One pick, from the best of each segment.
  template <bool kOls>
  __device__ void pick(const unsigned* segments) {
    const int lane = lane_id();
    float r[kPerLane];
    load_part(scratch.residual, r);
    const float correlation = kCorrelationFloor * state.norm,
                floor = kOls ? correlation * correlation : correlation;
    Candidate best;
    float q[4][kPerLane];
    if constexpr (kOls) {
      best.key = choose_ols(segments, r);
      load_basis(0, q);
      if (best.key != 0) {
        best.norm2 = norms2[atom_of(best.key)];
        load_atom(atom_of(best.key), best.d);
      }
    } else {
      load_basis(0, q);
      choose_omp(segments, floor, r, taken(), &best);
    }
    if (best.key == 0 || !(score_of(best.key) > floor)) {
      finish();
      return;
    }
    const int atom = atom_of(best.key), refused = state.refused;
    const bool was_taken = take(best, q, r);
    if (kOls) leave_pool(atom);
    bool more = false;
    if (was_taken) {
      write_curve(task.p, signal, state.count - 1, unscaled(state.residual_norm, state.exponent));
      more = wants_more(
          state.count, state.limit, state.residual_norm, state.norm, task.p.relative_tolerance);
      if (more) store_rows16(r, state.residual_norm);
    } else {
      more = refused < kMaxRefused;
      __syncwarp();
      if (more && lane == 0) {
        scratch.refused[refused] = atom;
        state.refused = refused + 1;
      }
      __syncwarp();
    }
    if (!more) finish();
  }
};

// Shared memory of a block: fp16 residuals, what Scores wants, the best of each segment, states.
template <class Scores>
struct TensorShared {
  static constexpr int kRowsBytes = Scores::kRows * Scores::kDim * 2;
  static constexpr int kSegmentsAt = kRowsBytes + Scores::kSharedBytes;

  // One more, so that rows begin in different banks.
  __host__ __device__ static int segment_stride(int segments) {
    return segments * Scores::kKeep + 1;
  }
  __host__ __device__ static std::size_t bytes(int segments) {
    return static_cast<std::size_t>(kSegmentsAt) +
           static_cast<std::size_t>(Scores::kRows) *
               (static_cast<std::size_t>(segment_stride(segments)) * 4 + sizeof(TensorState));
  }
};

// All threads of a block. Scores, made by each thread, has
//   kDim, kRows, kThreads, kWorkers (warps that work on signals), kShape, kSharedBytes, kKeep (how
//   many of a segment: OLS wants two)
//   begin(atoms16, tiles)    before the first pick of some signals, and prefetch() before each pick
//   run(rows16, states, task, segments, stride)  fills the best of each segment
//   end()                    what was prefetched is not wanted
template <class Scores>
__device__ void pursue(const TensorTask& task) {
  constexpr bool kOls = Scores::kKeep == 2;
  constexpr int kDim = Scores::kDim, kRows = Scores::kRows;
  using Shared = TensorShared<Scores>;
  unsigned char* const shared = dynamic_shared();
  unsigned char* const rows16 = shared;
  unsigned* const segments = reinterpret_cast<unsigned*>(shared + Shared::kSegmentsAt);
  const int stride = Shared::segment_stride(task.segments);
  TensorState* const states = reinterpret_cast<TensorState*>(segments + kRows * stride);
  const PursuitProblem& p = task.p;
  Scores scores(shared + Shared::kRowsBytes);

  // What follows from the group is computed again where it is needed: registers are short.
  for (int group = static_cast<int>(blockIdx.x); group < task.groups;
       group += static_cast<int>(gridDim.x)) {
    const auto dictionary = [&] { return static_cast<std::int64_t>(group / task.groups_of_one); };
    const auto begin = [&] {
      return static_cast<std::int64_t>(group % task.groups_of_one) * kRows;
    };
    const auto worker = [&](int row) {
      Worker<kDim, kRows> w{task,
                            Scores::kShape,
                            p.atoms + dictionary() * p.num_atoms * p.dim,
                            task.norms2 + dictionary() * task.padded_atoms,
                            rows16,
                            states[row],
                            {},
                            dictionary() * p.num_signals + begin() + row,
                            row};
      carve(p, task.scratch + blockIdx.x * task.block_bytes + row * task.signal_bytes, &w.scratch);
      return w;
    };
    scores.begin(task.atoms16 + dictionary() * task.padded_atoms * (kDim * 2),
                 task.padded_atoms / Scores::kShape.tile);
    scores.prefetch();
    if (warp_id() < Scores::kWorkers) {
      for (int row = warp_id(); row < kRows; row += Scores::kWorkers) {
        auto w = worker(row);
        if (begin() + row < p.num_signals) {
          w.start();
        } else {
          w.start_empty();
        }
      }
    }
    const auto any_active = [&] {
      int active = 0;
      for (int row = static_cast<int>(threadIdx.x); row < kRows; row += Scores::kThreads)
        active |= states[row].active;
      return active;
    };
    __syncthreads();
    while (__syncthreads_or(any_active())) {
      scores.run(rows16, states, task, segments, stride);
      __syncthreads();
      scores.prefetch();
      if (warp_id() < Scores::kWorkers) {
        for (int row = warp_id(); row < kRows; row += Scores::kWorkers) {
          if (states[row].active) worker(row).template pick<kOls>(segments + row * stride);
        }
      }
      __syncthreads();
    }
    scores.end();
    __syncthreads();
  }
}

}  // namespace lexico::kernels::cuda
