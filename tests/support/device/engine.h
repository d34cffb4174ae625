#pragma once
// Runs CUDA kernels on the CPU, one block after another, every thread of a block a fiber that runs
// until it has to wait for others. Finds what a GPU would hang on or get wrong without a word:
// threads that wait at different places, exits before a barrier, writes outside the block's shared
// memory. Not for speed, and for one thread of the host at a time.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

#include "cuda_runtime_api.h"

namespace emulated {

using Where = std::source_location;

/// The device that programs see, and how threads are run. Tests change it before they allocate.
struct Device {
  int count = 1;
  int major = 8, minor = 0;
  int multiprocessors = 4;
  std::size_t memory_bytes = std::size_t{4} << 30;
  std::size_t shared_bytes_per_block = 163 << 10;
  /// 0: threads and blocks in order of their index. Else another order for each number: results
  /// that differ then have a race in them.
  unsigned order = 0;
};
Device& device();

/// What was wrong with the last kernel that failed; empty if none has since `clear_fault`.
const std::string& fault();
/// Forgets a failed kernel, which all later calls report, as those of a GPU do.
void clear_fault();
/// Device memory that was allocated and is not freed.
std::size_t allocated_bytes();
/// Kernels that were started so far.
std::int64_t launches();

/// What the next cudaLaunchKernel runs in each thread: it sees arguments without their types.
void next_call(std::function<void()> call);

/// Runs a grid; false and a fault if it failed.
bool run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& call);

// ------------------------------------------------------------------- called by threads of kernels

unsigned char* dynamic_shared();

/// Waits for the lanes of `mask` to call the same; then `run` gets what each passed, and all go on.
void warp_collective(const char* name,
                     unsigned mask,
                     void* lane_data,
                     void (*run)(void* const* lanes, unsigned mask),
                     Where where);
/// Waits for all threads of the block. Returns how many of them passed a value other than 0.
int block_barrier(int predicate, Where where);
/// The kernel fails with this message.
[[noreturn]] void fail(std::string message);

/// Each of `count` numbers summed over the warp, by xor shuffles over 16, 8, 4, 2, 1 lanes.
void warp_sum(float* x, int count, Where where = Where::current());
void mma_m16n8k16(float (&c)[4],
                  const std::uint32_t (&a)[4],
                  const std::uint32_t (&b)[2],
                  Where where = Where::current());
void ldmatrix_x4(std::uint32_t (&d)[4], const void* row, Where where = Where::current());
/// Copies are made by the wait, so one that is missing is seen.
void cp_async_16(void* to_shared, const void* from, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);

}  // namespace emulated
