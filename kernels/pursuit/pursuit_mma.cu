// Pursuit on the tensor cores of any GPU since compute capability 8.0: correlations by mma.sync,
// atoms by cp.async. The rest is pursuit_tensor.cuh.
#include "kernels/pursuit/pursuit_tensor.cuh"

namespace lexico::kernels::cuda {
namespace {

constexpr int kPrepareThreads = 256;

// A warp to each atom: fp16 and swizzled, and |d|^2. Atoms behind the last are zero.
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const float* atoms,
                                                                  int num_atoms,
                                                                  int padded_atoms,
                                                                  int dim,
                                                                  int wide,
                                                                  std::int64_t rows,
                                                                  unsigned char* atoms16,
                                                                  float* norms2) {
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * (kPrepareThreads / kWarpSize) + warp_id();
  if (index >= rows) return;
  const std::int64_t dictionary = index / padded_atoms;
  const int atom = static_cast<int>(index % padded_atoms);
  const float* const d = atoms + (dictionary * num_atoms + atom) * dim;
  unsigned char* const unit = atoms16 + (index - atom % kUnit) * wide * 2;
  float norm2 = 0;
  for (int e = 2 * lane_id(); e < wide; e += 2 * kWarpSize) {
    const float x = atom < num_atoms && e < dim ? d[e] : 0.0f,
                y = atom < num_atoms && e + 1 < dim ? d[e + 1] : 0.0f;
    norm2 += x * x + y * y;
    *reinterpret_cast<__half2*>(unit + place_of(atom % kUnit, e / 8, kUnit) + e % 8 * 2) =
        __floats2half2_rn(x, y);
  }
  norm2 = warp_sum(norm2);
  if (lane_id() == 0) norms2[index] = norm2;
}

// kWarpsM x kWarpsN warps: each has kTilesM x 16 signals, kept in registers, and the tile's
// columns / kWarpsN.
template <int kDim_, int kWarpsM, int kTilesM, int kUnits, int kStages, int kKeep_>
struct MmaScores {
  static constexpr int kThreads = 256, kWorkers = kThreads / kWarpSize, kDim = kDim_,
                       kKeep = kKeep_;
  static constexpr int kWarpsN = kWorkers / kWarpsM, kRows = kWarpsM * kTilesM * 16;
  static constexpr int kTile = kUnits * kUnit, kColumns = kTile / kWarpsN, kSteps = kDim / 16;
  static constexpr TileShape kShape{kTile, kWarpsN};
  static constexpr int kStageBytes = kTile * kDim * 2, kSharedBytes = kStages * kStageBytes;
  // Columns at a time, so that a warp has four products under way.
  static constexpr int kBlock = kTilesM == 1 && kColumns >= 32 ? 32 : 16;
  static_assert(kColumns >= 16 && kColumns <= kUnit);

  __device__ explicit MmaScores(unsigned char* shared) : stages_(shared) {}

  __device__ void begin(const unsigned char* atoms16, int tiles) {
    atoms16_ = atoms16;
    tiles_ = tiles;
  }

  __device__ void prefetch() {
    for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile, tile);
  }

  __device__ void end() { cp_async_wait<0>(); }

  __device__ void run(const unsigned char* rows16,
                      const TensorState* states,
                      const TensorTask& task,
                      unsigned* segments,
                      int stride) {
    const int lane = lane_id(), first_row = warp_id() % kWarpsM * kTilesM * 16,
              n = warp_id() / kWarpsM;
    bool active = false;
    for (int row = lane; row < kTilesM * 16; row += kWarpSize)
      active = active || states[first_row + row].active;
    active = __any_sync(kWholeWarp, active) != 0;

    // place_of(), so that all steps and tiles share four addresses: rows of a lane are 8 or more
    // apart, and the swizzle of a step is an xor.
    const unsigned char* const own = rows16 + (first_row + lane % 16) * kRowBytes;
    const int turn = (lane / 16 ^ lane % 8) * 16;
    std::uint32_t a[kTilesM][kSteps][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        ldmatrix_x4(
            a[m][step],
            own + (turn ^ step % 4 * 32) + step / 4 * (kRows * kRowBytes) + m * 16 * kRowBytes);
    }
    Best<kKeep> best[kTilesM][2];  // of rows lane / 4 and 8 after it
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      best[m][0].clear();
      best[m][1].clear();
    }

    // 16 columns of one unit: lanes 0..7 have rows of the first 8 at a step's first chunk, lanes
    // 8..15 at its second; the others those of the next 8 columns.
    const int column = n * kColumns, row = column % kUnit + lane / 16 * 8 + lane % 8;
    const int swizzle = (lane / 8 % 2 ^ lane % 8) * 16,
              at = column / kUnit * (kUnit * kDim * 2) + row * kRowBytes;
    int left = task.flush, stage = 0;
    for (int tile = 0; tile < tiles_; ++tile) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      fetch(tile + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
      if (active) {
        // Counts columns of this thread down, from the first of the segment.
        unsigned code =
            task.last_bits - static_cast<unsigned>((task.flush - left) * (kColumns / 4));
        const unsigned char* const rows = stages_ + stage * kStageBytes + at;
#pragma unroll 1
        for (int block = 0; block < kColumns; block += kBlock) {
          float c[kTilesM][kBlock / 8][4];
#pragma unroll
          for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
            for (int i = 0; i < kBlock / 2; ++i) c[m][i / 4][i % 4] = 0;
          }
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int pair = 0; pair < kBlock / 16; ++pair) {
              std::uint32_t b[4];
              ldmatrix_x4(b,
                          rows + (swizzle ^ step % 4 * 32) + (block + pair * 16) * kRowBytes +
                              step / 4 * (kUnit * kRowBytes));
              const std::uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
              for (int m = 0; m < kTilesM; ++m) {
                mma_m16n8k16(c[m][2 * pair], a[m][step], b0);
                mma_m16n8k16(c[m][2 * pair + 1], a[m][step], b1);
              }
            }
          }
#pragma unroll
          for (int j = 0; j < kBlock / 4; ++j) {  // columns of this thread
#pragma unroll
            for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const unsigned bits = __float_as_uint(c[m][j / 2][half * 2 + j % 2]);
                best[m][half].offer((bits & task.kept_bits) | (code - j));
              }
            }
          }
          code -= kBlock / 4;
        }
      }
      if (--left == 0 || tile + 1 == tiles_) {
        const int segment = tile / task.flush * kShape.segments_per_flush() + n * 4 + lane % 4;
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int signal = first_row + m * 16 + half * 8 + lane / 4;
            best[m][half].store(segments + signal * stride + segment, task.segments);
            best[m][half].clear();
          }
        }
        left = task.flush;
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
  }

 private:
  // Asks for a tile of atoms; beyond the last for nothing.
  __device__ void fetch(int tile, int stage) {
    if (tile < tiles_) {
      const int first = static_cast<int>(threadIdx.x) * 16;
      unsigned char* const to = stages_ + stage * kStageBytes + first;
      const unsigned char* const from =
          atoms16_ + static_cast<std::int64_t>(tile) * kStageBytes + first;
#pragma unroll
      for (int at = 0; at < kStageBytes; at += kThreads * 16) cp_async_16(to + at, from + at);
    }
    cp_async_commit();
  }

  unsigned char* stages_;
  const unsigned char* atoms16_ = nullptr;
  int tiles_ = 0;
};

// 128, 64 or 16 signals to a block; OLS, with twice as many values, does without 128.
template <int kDim, int kKeep>
using LargeScores =
    MmaScores<kDim, kDim == 64 ? 4 : 8, kDim == 64 ? 2 : 1, 1, kDim == 256 ? 2 : 3, kKeep>;
template <int kDim, int kKeep>
using MediumScores = MmaScores<kDim, 4, 1, 1, kDim == 256 ? 2 : 3, kKeep>;
template <int kDim, int kKeep>
using SmallScores = MmaScores<kDim, 1, 1, 2, kDim == 256 ? 2 : 3, kKeep>;

// Two blocks on a multiprocessor, so that one multiplies while the other's warps pick.
template <class Scores>
__global__ void __launch_bounds__(Scores::kThreads, Scores::kDim == 256 ? 1 : 2)
    mma_kernel(const TensorTask task) {
  pursue<Scores>(task);
}

struct Choice {
  void (*kernel)(TensorTask);
  TileShape shape;
  std::size_t (*shared_bytes)(int segments);
};

template <class Scores>
Choice choice_of() {
  return {mma_kernel<Scores>, Scores::kShape, TensorShared<Scores>::bytes};
}

template <int kDim>
Choice choice_of(int signals_per_block, bool ols) {
  switch (signals_per_block) {
    case 128:
      return choice_of<LargeScores<kDim, 1>>();
    case 64:
      return ols ? choice_of<MediumScores<kDim, 2>>() : choice_of<MediumScores<kDim, 1>>();
    default:
      return ols ? choice_of<SmallScores<kDim, 2>>() : choice_of<SmallScores<kDim, 1>>();
  }
}

Choice choice_of(const PursuitProblem& p, int signals_per_block) {
  const bool ols = p.rule == PursuitRule::kOls;
  switch (padded_dim(p.dim)) {
    case 64:
      return choice_of<64>(signals_per_block, ols);
    case 128:
      return choice_of<128>(signals_per_block, ols);
    default:
      return choice_of<256>(signals_per_block, ols);
  }
}

}  // namespace

Status prepare_atoms(const PursuitProblem& p, const TensorSpace& space, Stream stream) {
  const std::int64_t rows = static_cast<std::int64_t>(p.num_dictionaries) * padded_atoms(p);
  constexpr int kWarps = kPrepareThreads / kWarpSize;
  return launch(prepare_kernel,
                dim3(static_cast<unsigned>((rows + kWarps - 1) / kWarps)),
                dim3(kPrepareThreads),
                0,
                stream,
                p.atoms,
                p.num_atoms,
                padded_atoms(p),
                p.dim,
                padded_dim(p.dim),
                rows,
                space.atoms16,
                space.norms2);
}

std::size_t mma_shared_bytes(const PursuitProblem& p, int signals_per_block) {
  const Choice choice = choice_of(p, signals_per_block);
  return choice.shared_bytes(segments_of(p, choice.shape).count);
}

Status run_mma(const PursuitProblem& p,
               const PursuitPlan& plan,
               const TensorSpace& space,
               Stream stream) {
  const Choice choice = choice_of(p, plan.signals_per_block);
  const TensorTask task = task_of(p, plan, space, choice.shape);
  return launch(choice.kernel,
                dim3(static_cast<unsigned>(plan.blocks)),
                dim3(256),
                choice.shared_bytes(task.segments),
                stream,
                task);
}

}  // namespace lexico::kernels::cuda
