// Pursuit in fp32 with plain loops: for any sizes and any GPU, and what the tensor paths are tested
// against. A block takes kGroup signals of one dictionary: its threads share out the atoms, and
// then each warp goes on with its own signal.
#include "kernels/common/launch.h"
#include "kernels/pursuit/pursuit_signal.cuh"

namespace lexico::kernels::cuda {
namespace {

constexpr int kThreads = 256, kGroup = kThreads / kWarpSize;

// One signal's part of the block's scratch, in global memory.
struct PlainSignal {
  float* residual;         // [dim]
  float* newest;           // [dim]: the basis vector of the last pick
  float* basis;            // [max_atoms, dim]
  float* triangle;         // [max_atoms, max_atoms]: column k of R in row k
  float* amplitude;        // [max_atoms]
  float* outside;          // OLS: |P_perp d|^2 [num_atoms]
  float* size;             // OLS among candidates: |d.r| [num_atoms]; -1 for atoms that are no more
  std::uint32_t* members;  // OLS among candidates: a bit for each atom
  std::int32_t* refused;   // [kMaxRefused]
};

__host__ __device__ inline std::size_t words(int count) { return static_cast<std::size_t>(count); }

// With base == nullptr only counts floats.
__host__ __device__ inline std::size_t carve(const PursuitProblem& p, float* base, PlainSignal* s) {
  const bool ols = p.rule == PursuitRule::kOls;
  const std::size_t dim = words((p.dim + 3) / 4 * 4), picks = words(p.max_atoms),
                    atoms = ols ? words(p.num_atoms) : 0,
                    listed = ols && p.candidates > 0 ? words(p.num_atoms) : 0;
  std::size_t used = 0;
  const auto take = [&](std::size_t count) {
    float* const piece = base == nullptr ? nullptr : base + used;
    used += (count + 3) / 4 * 4;
    return piece;
  };
  s->residual = take(dim);
  s->newest = take(dim);
  s->basis = take(picks * dim);
  s->triangle = take(picks * picks);
  s->amplitude = take(picks);
  s->outside = take(atoms);
  s->size = take(listed);
  s->members = reinterpret_cast<std::uint32_t*>(take((listed + 31) / 32));
  s->refused = reinterpret_cast<std::int32_t*>(take(kMaxRefused));
  return used;
}

// What a block knows of its signals, in shared memory.
struct PlainState {
  unsigned long long best[kGroup][kGroup];  // of each signal, by each warp
  float norm[kGroup], residual_norm[kGroup];
  int exponent[kGroup], limit[kGroup], count[kGroup], refused[kGroup];
  int active[kGroup], fresh[kGroup];  // fresh: `newest` is not yet in `outside`
};

__device__ inline bool is_taken(const PursuitProblem& p,
                                const PlainSignal& s,
                                std::int64_t signal,
                                int count,
                                int refused,
                                int atom) {
  for (int i = 0; i < count; ++i)
    if (p.indices[signal * p.max_atoms + i] == atom) return true;
  for (int i = 0; i < refused; ++i)
    if (s.refused[i] == atom) return true;
  return false;
}

// Brings a signal in; by its warp.
__device__ void start_signal(const PursuitProblem& p,
                             const PlainSignal& s,
                             PlainState& state,
                             int slot,
                             std::int64_t signal) {
  const int lane = lane_id();
  const float* const x = p.signals + signal * p.dim;
  unsigned top = 0;
  for (int e = lane; e < p.dim; e += kWarpSize) top = max(top, __float_as_uint(x[e]) & 0x7fffffffu);
  for (int step = kWarpSize / 2; step > 0; step /= 2)
    top = max(top, __shfl_xor_sync(kWholeWarp, top, step));
  const Scale scale = scale_of(top);
  float norm2 = 0;
  for (int e = lane; e < p.dim; e += kWarpSize) {
    const float r = scale.finite ? scaled(x[e], scale.exponent) : 0.0f;
    s.residual[e] = r;
    s.newest[e] = 0;
    norm2 += r * r;
  }
  const float norm = sqrtf(warp_sum(norm2));
  const int limit = p.budgets == nullptr ? p.max_atoms : min(p.budgets[signal], p.max_atoms);
  const bool active = scale.finite && wants_more(0, limit, norm, norm, p.relative_tolerance);
  if (p.rule == PursuitRule::kOls && p.candidates > 0) {
    for (int i = lane; i < (p.num_atoms + 31) / 32; i += kWarpSize) s.members[i] = 0;
  }
  const float nan = __uint_as_float(0x7fc00000u);
  write_curve(p, signal, 0, scale.finite ? unscaled(norm, scale.exponent) : nan);
  if (lane == 0) {
    state.norm[slot] = state.residual_norm[slot] = norm;
    state.exponent[slot] = scale.exponent;
    state.limit[slot] = limit;
    state.count[slot] = state.refused[slot] = 0;
    state.active[slot] = active;
    state.fresh[slot] = 0;
    p.counts[signal] = 0;
    p.residual_norms[signal] = scale.finite ? unscaled(norm, scale.exponent) : nan;
  }
  clear_slots(p, signal, 0);
  __syncwarp();
}

// Every thread correlates its atoms with all signals of the block.
template <bool kOls>
__device__ void score_atoms(const PursuitProblem& p,
                            const float* atoms,
                            const PlainSignal (&signals)[kGroup],
                            PlainState& state,
                            std::int64_t first_signal,
                            bool first_pass) {
  unsigned long long best[kGroup];
#pragma unroll
  for (int b = 0; b < kGroup; ++b) best[b] = 0;
  for (int n = static_cast<int>(threadIdx.x); n < p.num_atoms; n += kThreads) {
    const float* const d = atoms + static_cast<std::size_t>(n) * words(p.dim);
    float dots[kGroup], newest[kGroup], norm2 = 0;
#pragma unroll
    for (int b = 0; b < kGroup; ++b) dots[b] = newest[b] = 0;
    for (int e = 0; e < p.dim; ++e) {
      const float value = d[e];
      norm2 += value * value;
#pragma unroll
      for (int b = 0; b < kGroup; ++b) {
        dots[b] += value * signals[b].residual[e];
        if (kOls) newest[b] += value * signals[b].newest[e];
      }
    }
#pragma unroll
    for (int b = 0; b < kGroup; ++b) {
      if (!state.active[b]) continue;
      const float size = fabsf(dots[b]);
      float score = size;
      if (kOls) {
        float outside = first_pass ? norm2 : signals[b].outside[n];
        if (state.fresh[b]) outside -= newest[b] * newest[b];
        signals[b].outside[n] = outside;
        score = ols_score(size, outside, norm2);
      }
      if (kOls && p.candidates > 0) {
        const bool taken =
            is_taken(p, signals[b], first_signal + b, state.count[b], state.refused[b], n);
        signals[b].size[n] = taken ? -1.0f : size;
        continue;
      }
      const unsigned long long key = key_of(score, n);
      if (key > best[b] &&
          !is_taken(p, signals[b], first_signal + b, state.count[b], state.refused[b], n))
        best[b] = key;
    }
  }
#pragma unroll
  for (int b = 0; b < kGroup; ++b) {
    const unsigned long long key = warp_best(best[b]);
    if (lane_id() == 0) state.best[b][warp_id()] = key;
  }
}

// OLS among the atoms that are or were among the `candidates` largest |d.r|; by the signal's warp.
__device__ unsigned long long best_candidate(const PursuitProblem& p,
                                             const float* atoms,
                                             const PlainSignal& s) {
  const int lane = lane_id();
  unsigned long long last = ~0ull;
  for (int i = 0; i < p.candidates; ++i) {  // the next largest
    unsigned long long key = 0;
    for (int n = lane; n < p.num_atoms; n += kWarpSize) {
      if (!(s.size[n] > 0)) continue;
      const unsigned long long own = key_of(s.size[n], n);
      if (own < last && own > key) key = own;
    }
    key = warp_best(key);
    if (key == 0) break;
    last = key;
    if (lane == 0) s.members[atom_of(key) / 32] |= 1u << (atom_of(key) % 32);
  }
  __syncwarp();
  unsigned long long best = 0;
  for (int n = lane; n < p.num_atoms; n += kWarpSize) {
    if ((s.members[n / 32] >> (n % 32) & 1u) == 0 || !(s.size[n] > 0)) continue;
    const float* const d = atoms + static_cast<std::size_t>(n) * words(p.dim);
    float norm2 = 0;
    for (int e = 0; e < p.dim; ++e) norm2 += d[e] * d[e];
    const unsigned long long key = key_of(ols_score(s.size[n], s.outside[n], norm2), n);
    best = key > best ? key : best;
  }
  return warp_best(best);
}

// Takes the atom into the basis and its part out of the residual; false if it is in the span. Each
// lane writes and reads the same elements of all vectors. By the signal's warp.
__device__ bool take_atom(
    const PursuitProblem& p, const PlainSignal& s, PlainState& state, int slot, const float* d) {
  const int lane = lane_id(), count = state.count[slot];
  const std::size_t stride = words((p.dim + 3) / 4 * 4);
  float* const u = s.basis + words(count) * stride;
  float* const column = s.triangle + words(count) * words(p.max_atoms);
  float norm2 = 0;
  for (int e = lane; e < p.dim; e += kWarpSize) {
    u[e] = d[e];
    norm2 += d[e] * d[e];
  }
  norm2 = warp_sum(norm2);
  float left2 = norm2;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1 && left2 >= 0.5f * norm2) break;  // once was enough
    left2 = 0;
    for (int i = 0; i < count; ++i) {
      const float* const other = s.basis + words(i) * stride;
      float part = 0;
      for (int e = lane; e < p.dim; e += kWarpSize) part += other[e] * u[e];
      part = warp_sum(part);
      for (int e = lane; e < p.dim; e += kWarpSize) u[e] -= part * other[e];
      if (lane == 0) column[i] = pass == 0 ? part : column[i] + part;
    }
    for (int e = lane; e < p.dim; e += kWarpSize) left2 += u[e] * u[e];
    left2 = warp_sum(left2);
  }
  if (!(left2 > kIndependent * norm2) || !(left2 > 0)) return false;
  const float nu = sqrtf(left2), inverse = 1 / nu;
  float amplitude = 0;
  for (int e = lane; e < p.dim; e += kWarpSize) {
    u[e] *= inverse;
    amplitude += u[e] * s.residual[e];
  }
  amplitude = warp_sum(amplitude);
  float residual2 = 0;
  for (int e = lane; e < p.dim; e += kWarpSize) {
    const float r = s.residual[e] - amplitude * u[e];
    s.residual[e] = r;
    s.newest[e] = u[e];
    residual2 += r * r;
  }
  const float residual_norm = fminf(sqrtf(warp_sum(residual2)), state.residual_norm[slot]);
  __syncwarp();  // all lanes have read the state
  if (lane == 0) {
    column[count] = nu;
    s.amplitude[count] = amplitude;
    state.residual_norm[slot] = residual_norm;
    state.count[slot] = count + 1;
  }
  __syncwarp();
  return true;
}

// Solves R w = a from the last row up and writes the codes; by the signal's warp.
__device__ void finish_signal(const PursuitProblem& p,
                              const PlainSignal& s,
                              PlainState& state,
                              int slot,
                              std::int64_t signal) {
  const int lane = lane_id(), count = state.count[slot], exponent = state.exponent[slot];
  for (int k = count - 1; k >= 0; --k) {
    const float* const column = s.triangle + words(k) * words(p.max_atoms);
    const float weight = s.amplitude[k] / column[k];
    if (lane == 0) p.weights[signal * p.max_atoms + k] = unscaled(weight, exponent);
    for (int i = lane; i < k; i += kWarpSize) s.amplitude[i] -= weight * column[i];
    __syncwarp();
  }
  if (lane == 0) {
    p.counts[signal] = count;
    p.residual_norms[signal] = unscaled(state.residual_norm[slot], exponent);
    state.active[slot] = 0;
  }
  __syncwarp();
}

// One pick of one signal; by its warp.
__device__ void pick_next(const PursuitProblem& p,
                          const float* atoms,
                          const PlainSignal& s,
                          PlainState& state,
                          int slot,
                          std::int64_t signal) {
  const int lane = lane_id();
  const bool ols = p.rule == PursuitRule::kOls;
  unsigned long long key = 0;
  if (ols && p.candidates > 0) {
    key = best_candidate(p, atoms, s);
  } else {
    key = warp_best(lane < kGroup ? state.best[slot][lane] : 0);
  }
  const float correlation = kCorrelationFloor * state.norm[slot],
              floor = ols ? correlation * correlation : correlation;
  if (key == 0 || !(score_of(key) > floor)) {
    finish_signal(p, s, state, slot, signal);
    return;
  }
  const int atom = atom_of(key), count = state.count[slot], refused = state.refused[slot];
  const bool taken =
      take_atom(p, s, state, slot, atoms + static_cast<std::size_t>(atom) * words(p.dim));
  if (taken) {
    if (lane == 0) p.indices[signal * p.max_atoms + count] = atom;
    write_curve(p, signal, count, unscaled(state.residual_norm[slot], state.exponent[slot]));
  } else {
    if (refused < kMaxRefused && lane == 0) s.refused[refused] = atom;
  }
  __syncwarp();
  if (lane == 0) {
    state.fresh[slot] = taken;
    if (!taken) state.refused[slot] = refused + 1;
  }
  __syncwarp();
  const bool more = taken ? wants_more(state.count[slot],
                                       state.limit[slot],
                                       state.residual_norm[slot],
                                       state.norm[slot],
                                       p.relative_tolerance)
                          : refused < kMaxRefused;
  if (!more) finish_signal(p, s, state, slot, signal);
}

template <bool kOls>
__global__ void __launch_bounds__(kThreads) plain_kernel(const PursuitProblem p,
                                                         float* scratch,
                                                         std::int64_t block_floats,
                                                         std::int64_t signal_floats) {
  PlainState& state = *reinterpret_cast<PlainState*>(dynamic_shared());
  PlainSignal signals[kGroup];
#pragma unroll
  for (int b = 0; b < kGroup; ++b)
    carve(p, scratch + blockIdx.x * block_floats + b * signal_floats, &signals[b]);
  PlainSignal own;
  const int slot = warp_id();
  carve(p, scratch + blockIdx.x * block_floats + slot * signal_floats, &own);

  const std::int64_t groups = (p.num_signals + kGroup - 1) / kGroup;
  for (std::int64_t group = blockIdx.x; group < groups * p.num_dictionaries; group += gridDim.x) {
    const std::int64_t dictionary = group / groups, begin = group % groups * kGroup,
                       first = dictionary * p.num_signals + begin;
    const float* const atoms =
        p.atoms + dictionary * p.num_atoms * static_cast<std::int64_t>(p.dim);
    if (begin + slot < p.num_signals) {
      start_signal(p, own, state, slot, first + slot);
    } else {
      for (int e = lane_id(); e < p.dim; e += kWarpSize) own.residual[e] = own.newest[e] = 0;
      if (lane_id() == 0) state.active[slot] = 0;
      __syncwarp();
    }
    bool first_pass = true;
    while (__syncthreads_or(state.active[slot])) {
      score_atoms<kOls>(p, atoms, signals, state, first, first_pass);
      first_pass = false;
      __syncthreads();
      if (state.active[slot]) pick_next(p, atoms, own, state, slot, first + slot);
    }
  }
}

}  // namespace

void plan_plain(const PursuitProblem& p, const DeviceLimits& device, PursuitPlan* plan) {
  PlainSignal unused;
  plan->signals_per_block = kGroup;
  plan->prepared_bytes = 0;
  plan->scratch_bytes = aligned(kGroup * carve(p, nullptr, &unused) * sizeof(float));
  constexpr std::size_t kMostBytes = std::size_t{512} << 20;
  constexpr int kBlocksPerMultiprocessor = 4;
  const std::int64_t groups = (p.num_signals + kGroup - 1) / kGroup * p.num_dictionaries;
  std::int64_t blocks = kBlocksPerMultiprocessor * device.multiprocessors;
  const auto fit = static_cast<std::int64_t>(kMostBytes / plan->scratch_bytes);
  if (blocks > fit) blocks = fit;
  if (blocks > groups) blocks = groups;
  if (blocks < 1) blocks = 1;
  plan->blocks = static_cast<int>(blocks);
  plan->workspace_bytes = static_cast<std::size_t>(blocks) * plan->scratch_bytes;
}

Status run_plain(const PursuitProblem& p, const PursuitPlan& plan, void* workspace, Stream stream) {
  PlainSignal unused;
  const auto signal_floats = static_cast<std::int64_t>(carve(p, nullptr, &unused));
  const auto block_floats = static_cast<std::int64_t>(plan.scratch_bytes / sizeof(float));
  const auto kernel = p.rule == PursuitRule::kOls ? plain_kernel<true> : plain_kernel<false>;
  return launch(kernel,
                dim3(static_cast<unsigned>(plan.blocks)),
                dim3(kThreads),
                sizeof(PlainState),
                stream,
                p,
                static_cast<float*>(workspace),
                block_floats,
                signal_floats);
}

}  // namespace lexico::kernels::cuda
