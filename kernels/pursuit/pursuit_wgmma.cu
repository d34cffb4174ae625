// Pursuit on the tensor cores of compute capability 9.0: correlations by wgmma, atoms by bulk
// copies that complete on barriers in shared memory. Only the products differ from pursuit_mma.cu;
// the rest is pursuit_tensor.cuh. Built for sm_90a alone.
#include "kernels/pursuit/pursuit_tensor.cuh"

namespace lexico::kernels::cuda {
namespace {

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier in shared memory whose phases end when `arrivals` threads arrived and the bytes that
// were announced have come.
__device__ inline void barrier_init(std::uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ inline void barrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ inline void barrier_arrive_and_expect(std::uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity has ended.
__device__ inline void barrier_wait(std::uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra DONE;\n"
      "bra AGAIN;\n"
      "DONE:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ inline void copy_bulk(void* to_shared,
                                 const void* from,
                                 int bytes,
                                 std::uint64_t* full) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to_shared)),
      "l"(from),
      "r"(bytes),
      "r"(shared_address(full))
      : "memory");
}

// What wgmma wants to know of 64 rows of 128 bytes with the 128-byte swizzle: the address, 1024
// bytes from 8 rows to the next 8. Later elements of the rows: 2 more for every 16.
__device__ inline std::uint64_t descriptor(const void* rows) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62,
                          kEightRows = std::uint64_t{64} << 32, kUnused = std::uint64_t{1} << 16;
  return kSwizzle128 | kEightRows | kUnused | (shared_address(rows) & 0x3ffff) >> 4;
}

// c [64, 64] = (first ? 0 : c) + a b, by the four warps of a warpgroup: a [64, 16] from registers,
// as mma.m16n8k16 has it for each warp's 16 rows, b [64, 16] from shared memory. c as mma has it, 8
// columns after 8.
__device__ inline void wgmma(float (&c)[8][4],
                             const std::uint32_t (&a)[4],
                             std::uint64_t b,
                             bool first) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.eq.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n"
      "}\n"
      : "+f"(c[0][0]),
        "+f"(c[0][1]),
        "+f"(c[0][2]),
        "+f"(c[0][3]),
        "+f"(c[1][0]),
        "+f"(c[1][1]),
        "+f"(c[1][2]),
        "+f"(c[1][3]),
        "+f"(c[2][0]),
        "+f"(c[2][1]),
        "+f"(c[2][2]),
        "+f"(c[2][3]),
        "+f"(c[3][0]),
        "+f"(c[3][1]),
        "+f"(c[3][2]),
        "+f"(c[3][3]),
        "+f"(c[4][0]),
        "+f"(c[4][1]),
        "+f"(c[4][2]),
        "+f"(c[4][3]),
        "+f"(c[5][0]),
        "+f"(c[5][1]),
        "+f"(c[5][2]),
        "+f"(c[5][3]),
        "+f"(c[6][0]),
        "+f"(c[6][1]),
        "+f"(c[6][2]),
        "+f"(c[6][3]),
        "+f"(c[7][0]),
        "+f"(c[7][1]),
        "+f"(c[7][2]),
        "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(first ? 1 : 0));
}
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all products are there. For the compiler c has its values from here on: it must not move
// what reads c, which is no memory, before the wait.
__device__ inline void wgmma_wait(float (&c)[8][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(c[i / 4][i % 4]));
}

// Two warpgroups with 64 signals each, in registers; a tile is one unit of atoms. Thread 0 asks for
// tiles: the one that takes a stage is asked for a tile after all warps are done with the stage.
template <int kDim_>
struct WgmmaScores {
  static constexpr int kThreads = 256, kWorkers = kThreads / kWarpSize, kDim = kDim_, kKeep = 1;
  static constexpr int kRows = 128, kSteps = kDim / 16, kSlabBytes = kUnit * kRowBytes;
  static constexpr int kStages = kDim == 64 ? 4 : kDim == 128 ? 3 : 2;
  static constexpr TileShape kShape{kUnit, 1};
  static constexpr int kStageBytes = kUnit * kDim * 2,
                       kSharedBytes = kStages * kStageBytes + 2 * kStages * 8;

  __device__ explicit WgmmaScores(unsigned char* shared)
      : stages_(shared),
        full_(reinterpret_cast<std::uint64_t*>(shared + kStages * kStageBytes)),
        empty_(full_ + kStages) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(full_ + i, 1);
        barrier_init(empty_ + i, kWorkers);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
  }

  __device__ void begin(const unsigned char* atoms16, int tiles) {
    atoms16_ = atoms16;
    tiles_ = tiles;
  }

  __device__ void prefetch() {
    if (threadIdx.x != 0) return;
    for (int tile = 0; tile < kStages - 1 && tile < tiles_; ++tile) fetch(tile);
  }

  __device__ void end() {
    const unsigned asked = static_cast<unsigned>(min(kStages - 1, tiles_));
    for (unsigned i = 0; i < asked; ++i) {
      wait_for(done_ + i);
      leave(done_ + i);
    }
    done_ += asked;
  }

  __device__ void run(const unsigned char* rows16,
                      const TensorState*,
                      const TensorTask& task,
                      unsigned* segments,
                      int stride) {
    const int lane = lane_id(), first_row = warp_id() * 16;
    // As in pursuit_mma.cu.
    const unsigned char* const own = rows16 + (first_row + lane % 16) * kRowBytes;
    const int turn = (lane / 16 ^ lane % 8) * 16;
    std::uint32_t a[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      ldmatrix_x4(a[step], own + (turn ^ step % 4 * 32) + step / 4 * (kRows * kRowBytes));
    Best<kKeep> best[2];  // of rows lane / 4 and 8 after it
    best[0].clear();
    best[1].clear();

    int left = task.flush;
    for (int tile = 0; tile < tiles_; ++tile) {
      const unsigned index = done_ + static_cast<unsigned>(tile);
      wait_for(index);
      // Products of signals that are done are made all the same: wgmma in a branch is not
      // overlapped.
      float c[8][4];
      const std::uint64_t b = descriptor(stages_ + index % kStages * kStageBytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        wgmma(c, a[step], b + (step / 4 * kSlabBytes + step % 4 * 32) / 16, step == 0);
      wgmma_commit();
      wgmma_wait(c);
      leave(index);
      if (threadIdx.x == 0 && tile + kStages - 1 < tiles_) {
        if (tile > 0) barrier_wait(empty_ + (index - 1) % kStages, (index - 1) / kStages & 1);
        fetch(tile + kStages - 1);
      }
      __syncwarp();
      const unsigned code = task.last_bits - static_cast<unsigned>((task.flush - left) * 16);
#pragma unroll
      for (int j = 0; j < 16; ++j) {  // columns of this thread
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const unsigned bits = __float_as_uint(c[j / 2][half * 2 + j % 2]);
          best[half].offer((bits & task.kept_bits) | (code - j));
        }
      }
      if (--left == 0 || tile + 1 == tiles_) {
        const int segment = tile / task.flush * kShape.segments_per_flush() + lane % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int signal = first_row + half * 8 + lane / 4;
          best[half].store(segments + signal * stride + segment, task.segments);
          best[half].clear();
        }
        left = task.flush;
      }
    }
    done_ += static_cast<unsigned>(tiles_);
  }

 private:
  // Asks for a tile of this pass, in the stage that is its turn. By thread 0.
  __device__ void fetch(int tile) const {
    const unsigned stage = (done_ + static_cast<unsigned>(tile)) % kStages;
    barrier_arrive_and_expect(full_ + stage, kStageBytes);
    copy_bulk(stages_ + stage * kStageBytes,
              atoms16_ + static_cast<std::int64_t>(tile) * kStageBytes,
              kStageBytes,
              full_ + stage);
  }
  __device__ void wait_for(unsigned index) const {
    barrier_wait(full_ + index % kStages, index / kStages & 1);
  }
  // This warp is done with a tile.
  __device__ void leave(unsigned index) const {
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(empty_ + index % kStages);
  }

  unsigned char* stages_;
  std::uint64_t *full_, *empty_;
  const unsigned char* atoms16_ = nullptr;
  int tiles_ = 0;
  unsigned done_ = 0;  // tiles of earlier passes
};

template <int kDim>
__global__ void __launch_bounds__(256, kDim == 256 ? 1 : 2) wgmma_kernel(const TensorTask task) {
  pursue<WgmmaScores<kDim>>(task);
}

struct Choice {
  void (*kernel)(TensorTask);
  std::size_t (*shared_bytes)(int segments);
};

template <int kDim>
Choice choice_of() {
  return {wgmma_kernel<kDim>, TensorShared<WgmmaScores<kDim>>::bytes};
}

Choice choice_of(int dim) {
  switch (padded_dim(dim)) {
    case 64:
      return choice_of<64>();
    case 128:
      return choice_of<128>();
    default:
      return choice_of<256>();
  }
}

constexpr TileShape kShape{kUnit, 1};

}  // namespace

bool has_wgmma() { return true; }

std::size_t wgmma_shared_bytes(const PursuitProblem& p) {
  return choice_of(p.dim).shared_bytes(segments_of(p, kShape).count);
}

Status run_wgmma(const PursuitProblem& p,
                 const PursuitPlan& plan,
                 const TensorSpace& space,
                 Stream stream) {
  const Choice choice = choice_of(p.dim);
  const TensorTask task = task_of(p, plan, space, kShape);
  return launch(choice.kernel,
                dim3(static_cast<unsigned>(plan.blocks)),
                dim3(256),
                choice.shared_bytes(task.segments),
                stream,
                task);
}

}  // namespace lexico::kernels::cuda
