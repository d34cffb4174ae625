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
template <int kDim_, int kWarpsM, int kTilesM, int kUnits, int kStages>
struct MmaScores {
  static constexpr int kThreads = 256, kWorkers = kThreads / kWarpSize, kDim = kDim_;
  static constexpr int kWarpsN = kWorkers / kWarpsM, kRows = kWarpsM * kTilesM * 16;
  static constexpr int kTile = kUnits * kUnit, kColumns = kTile / kWarpsN, kSteps = kDim / 16;
  static constexpr TileShape kShape{kTile, kWarpsN};
  static constexpr int kStageBytes = kTile * kDim * 2, kSharedBytes = kStages * kStageBytes;
  static_assert(kColumns >= 16 && kColumns <= kUnit);

  __device__ explicit MmaScores(unsigned char* shared) : stages_(shared) {}

  __device__ void begin(const unsigned char* atoms16, int tiles) {
    atoms16_ = atoms16;
    tiles_ = tiles;
  }

  __device__ void prefetch() {
    for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
  }

  __device__ void end() { cp_async_wait<0>(); }

  __device__ void run(const unsigned char* rows16,
                      const TensorState* states,
                      int flush,
                      int position_bits,
                      unsigned* segments,
                      int stride) {
    const int lane = lane_id(), first_row = warp_id() % kWarpsM * kTilesM * 16,
              n = warp_id() / kWarpsM;
    bool active = false;
    for (int row = lane; row < kTilesM * 16; row += kWarpSize)
      active = active || states[first_row + row].active;
    active = __any_sync(kWholeWarp, active) != 0;

    std::uint32_t a[kTilesM][kSteps][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        ldmatrix_x4(a[m][step],
                    rows16 + place_of(first_row + m * 16 + lane % 16, 2 * step + lane / 16, kRows));
    }
    unsigned best[kTilesM][2];  // of rows lane / 4 and 8 after it
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) best[m][0] = best[m][1] = 0;

    const unsigned last_bits = (1u << position_bits) - 1, kept_bits = 0x7fffffffu & ~last_bits;
    unsigned code = last_bits;  // of the first column of this thread; counts down
    int segment = n * 4 + lane % 4, left = flush;
    for (int tile = 0; tile < tiles_; ++tile) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      fetch(tile + kStages - 1);
      if (active) {
        // 16 columns of one unit: lanes 0..7 have rows of the first 8 at the step's first chunk,
        // lanes 8..15 at its second; the others those of the next 8 columns.
        const int column = n * kColumns;
        const unsigned char* const unit =
            stages_ + tile % kStages * kStageBytes + column / kUnit * (kUnit * kDim * 2);
#pragma unroll
        for (int block = 0; block < kColumns; block += 16) {
          const int row = column % kUnit + block + lane / 16 * 8 + lane % 8;
          float c[kTilesM][2][4];
#pragma unroll
          for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) c[m][0][i] = c[m][1][i] = 0;
          }
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            std::uint32_t b[4];
            ldmatrix_x4(b, unit + place_of(row, 2 * step + lane / 8 % 2, kUnit));
            const std::uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < kTilesM; ++m) {
              mma_m16n8k16(c[m][0], a[m][step], b0);
              mma_m16n8k16(c[m][1], a[m][step], b1);
            }
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {  // columns of this thread
#pragma unroll
            for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const unsigned bits = __float_as_uint(c[m][j / 2][half * 2 + j % 2]);
                best[m][half] = max(best[m][half], (bits & kept_bits) | (code - j));
              }
            }
          }
          code -= 4;
        }
      }
      if (--left == 0 || tile + 1 == tiles_) {
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            segments[(first_row + m * 16 + half * 8 + lane / 4) * stride + segment] = best[m][half];
            best[m][half] = 0;
          }
        }
        segment += kShape.segments_per_flush();
        left = flush;
        code = last_bits;
      }
    }
  }

 private:
  // Asks for a tile of atoms; beyond the last for nothing.
  __device__ void fetch(int tile) {
    if (tile < tiles_) {
      unsigned char* const to = stages_ + tile % kStages * kStageBytes;
      const unsigned char* const from = atoms16_ + static_cast<std::int64_t>(tile) * kStageBytes;
#pragma unroll
      for (int at = 0; at < kStageBytes; at += kThreads * 16) {
        const int place = at + static_cast<int>(threadIdx.x) * 16;
        cp_async_16(to + place, from + place);
      }
    }
    cp_async_commit();
  }

  unsigned char* stages_;
  const unsigned char* atoms16_ = nullptr;
  int tiles_ = 0;
};

// 128, 64 or 16 signals to a block.
template <int kDim>
using LargeScores =
    MmaScores<kDim, kDim == 256 ? 8 : 4, kDim == 256 ? 1 : 2, 1, kDim == 256 ? 2 : 3>;
template <int kDim>
using MediumScores =
    MmaScores<kDim, kDim == 256 ? 4 : 2, kDim == 256 ? 1 : 2, 1, kDim == 256 ? 2 : 3>;
template <int kDim>
using SmallScores = MmaScores<kDim, 1, 1, 2, kDim == 256 ? 2 : 3>;

// Two blocks on a multiprocessor, so that one multiplies while the other's warps pick.
template <class Scores, bool kOls>
__global__ void __launch_bounds__(Scores::kThreads, Scores::kDim == 256 ? 1 : 2)
    mma_kernel(const TensorTask task) {
  pursue<Scores, kOls>(task);
}

using Kernel = void (*)(TensorTask);

struct Choice {
  Kernel kernel;
  TileShape shape;
  std::size_t (*shared_bytes)(int segments);
};

template <class Scores>
Choice choice_of(bool ols) {
  return {ols ? static_cast<Kernel>(mma_kernel<Scores, true>)
              : static_cast<Kernel>(mma_kernel<Scores, false>),
          Scores::kShape,
          TensorShared<Scores>::bytes};
}

template <int kDim>
Choice choice_of(int signals_per_block, bool ols) {
  return signals_per_block == 128  ? choice_of<LargeScores<kDim>>(ols)
         : signals_per_block == 64 ? choice_of<MediumScores<kDim>>(ols)
                                   : choice_of<SmallScores<kDim>>(ols);
}

Choice choice_of(int dim, int signals_per_block, bool ols) {
  const int wide = padded_dim(dim);
  return wide == 64    ? choice_of<64>(signals_per_block, ols)
         : wide == 128 ? choice_of<128>(signals_per_block, ols)
                       : choice_of<256>(signals_per_block, ols);
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

TileShape mma_shape(const PursuitProblem& p, int signals_per_block) {
  return choice_of(p.dim, signals_per_block, p.rule == PursuitRule::kOls).shape;
}

std::size_t mma_shared_bytes(const PursuitProblem& p, int signals_per_block) {
  const Choice choice = choice_of(p.dim, signals_per_block, p.rule == PursuitRule::kOls);
  return choice.shared_bytes(segments_of(p, choice.shape).count);
}

Status run_mma(const PursuitProblem& p,
               const PursuitPlan& plan,
               const TensorSpace& space,
               Stream stream) {
  const Choice choice = choice_of(p.dim, plan.signals_per_block, p.rule == PursuitRule::kOls);
  const TensorTask task = task_of(p, plan, space, choice.shape);
  return launch(choice.kernel,
                dim3(static_cast<unsigned>(plan.blocks)),
                dim3(256),
                choice.shared_bytes(task.segments),
                stream,
                task);
}

}  // namespace lexico::kernels::cuda
