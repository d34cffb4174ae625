#pragma once
// What kernels need beyond plain CUDA C++: shared memory, reductions over a warp, tensor cores and
// asynchronous copies as PTX has them. Tests run the same kernels on the CPU
// (tests/support/device), where the functions with PTX in them are the emulation's.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lexico::kernels::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// The block's dynamic shared memory, aligned to 1024 bytes. Kernels use no other.
__device__ inline unsigned char* dynamic_shared() {
#ifdef LEXICO_DEVICE_IS_EMULATED
  return emulated::dynamic_shared();
#else
  extern __shared__ __align__(1024) unsigned char lexico_shared_memory[];
  return lexico_shared_memory;
#endif
}

// Reductions over the whole warp; every lane gets the result, whose bits do not depend on the lane.
template <int kCount>  // several at a time, so that their shuffles overlap
__device__ inline void warp_sum(float (&x)[kCount]) {
#ifdef LEXICO_DEVICE_IS_EMULATED
  emulated::warp_sum(x, kCount);  // the same sums, all shuffles in one meeting
#else
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    float other[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) other[j] = __shfl_xor_sync(kWholeWarp, x[j], step);
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] += other[j];
  }
#endif
}
__device__ inline float warp_sum(float x) {
  float one[1] = {x};
  warp_sum(one);
  return one[0];
}
__device__ inline float warp_max(float x) {
  for (int step = kWarpSize / 2; step > 0; step /= 2)
    x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, step));
  return x;
}

// c += a * b with a [16, 16] row-major and b [16, 8] column-major of fp16, c [16, 8] of fp32. Which
// lane holds what: PTX, "Matrix Fragments for mma.m16n8k16". Lane l, g = l / 4, t = l % 4, has of
//   a   (g, 2t..) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..)     two elements each
//   b   (2t.., g) (2t+8.., g)
//   c   (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
__device__ inline void mma_m16n8k16(float (&c)[4],
                                    const std::uint32_t (&a)[4],
                                    const std::uint32_t (&b)[2]) {
#ifdef LEXICO_DEVICE_IS_EMULATED
  emulated::mma_m16n8k16(c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8x8 matrices of 2-byte elements from shared memory. Lane l gives the address of row l % 8 of
// matrix l / 8 (16 bytes, aligned to 16) and gets of each matrix row l / 4, elements 2 (l % 4) and
// the next.
__device__ inline void ldmatrix_x4(std::uint32_t (&d)[4], const void* row) {
#ifdef LEXICO_DEVICE_IS_EMULATED
  emulated::ldmatrix_x4(d, row);
#else
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
#endif
}

// Asks for the 128 bytes around an address, so that they are in L2 when they are read.
__device__ inline void prefetch(const void* from) {
#ifdef LEXICO_DEVICE_IS_EMULATED
  (void)from;
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

// Copies 16 bytes from global to shared memory, both aligned to 16, or stores zeros where !valid
// (then `from` is not read). Done once cp_async_wait says so, and then only for this thread: a
// barrier follows before others read.
__device__ inline void cp_async_16(void* to_shared, const void* from, bool valid = true) {
#ifdef LEXICO_DEVICE_IS_EMULATED
  emulated::cp_async_16(to_shared, from, valid);
#else
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to_shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
#endif
}
// Ends a group of copies of this thread.
__device__ inline void cp_async_commit() {
#ifdef LEXICO_DEVICE_IS_EMULATED
  emulated::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until no more than kPending groups, the newest, are under way.
template <int kPending>
__device__ inline void cp_async_wait() {
#ifdef LEXICO_DEVICE_IS_EMULATED
  emulated::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace lexico::kernels::cuda
