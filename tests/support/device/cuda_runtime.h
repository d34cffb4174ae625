#pragma once
// Stands in for CUDA's header where .cu files are compiled as C++: keywords, built-in variables and
// the intrinsics that our kernels use.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda_runtime_api.h"
#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define LEXICO_EMULATED_VECTORS(T, Name)                     \
  struct Name##2 {                                           \
    T x, y;                                                  \
  };                                                         \
  struct alignas(sizeof(T) * 4) Name##4 {                    \
    T x, y, z, w;                                            \
  };                                                         \
  inline Name##2 make_##Name##2(T x, T y) { return {x, y}; } \
  inline Name##4 make_##Name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
LEXICO_EMULATED_VECTORS(float, float)
LEXICO_EMULATED_VECTORS(int, int)
LEXICO_EMULATED_VECTORS(unsigned, uint)
#undef LEXICO_EMULATED_VECTORS

using std::max;
using std::min;

// ------------------------------------------------------------------------------------ arithmetic
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float2int_rz(float x) {  // saturates, and a NaN gives 0, as on a GPU
  if (!(x > -0x1p31f)) return x != x ? 0 : std::numeric_limits<int>::min();
  return x >= 0x1p31f ? std::numeric_limits<int>::max() : static_cast<int>(x);
}
inline int __float2int_rn(float x) { return __float2int_rz(std::nearbyintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }
inline void sincospi(double x, double* s, double* c) {
  *s = std::sin(M_PI * x);
  *c = std::cos(M_PI * x);
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}

// ---------------------------------------------------------------------------------------- memory
template <typename T>
inline T __ldg(const T* from) {
  return *from;
}
template <typename T>
inline T __ldcs(const T* from) {
  return *from;
}
template <typename T>
inline void __stcs(T* to, T value) {
  *to = value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emulated::fail("the kernel trapped"); }

// Threads switch only where they wait, so plain code is atomic.
template <typename T>
inline T atomicAdd(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at = static_cast<T>(before + value);
  return before;
}
template <typename T>
inline T atomicMax(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}
template <typename T>
inline T atomicMin(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}
template <typename T>
inline T atomicOr(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at = before | value;
  return before;
}
template <typename T>
inline T atomicExch(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at = value;
  return before;
}
template <typename T>
inline T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T before = *at;
  if (before == expected) *at = value;
  return before;
}

// ------------------------------------------------------------------------------ waiting for others
inline void __syncthreads(emulated::Where where = emulated::Where::current()) {
  emulated::block_barrier(0, where);
}
inline int __syncthreads_count(int predicate, emulated::Where where = emulated::Where::current()) {
  return emulated::block_barrier(predicate != 0, where);
}
inline int __syncthreads_or(int predicate, emulated::Where where = emulated::Where::current()) {
  return emulated::block_barrier(predicate != 0, where) > 0;
}
inline int __syncthreads_and(int predicate, emulated::Where where = emulated::Where::current()) {
  return emulated::block_barrier(predicate == 0, where) == 0;
}

namespace emulated {

// Every lane gets result = value of the lane that `from(lane, argument)` names, or its own.
template <typename T, int (*kFrom)(int lane, int argument, int width)>
inline T exchange(const char* name, unsigned mask, T value, int argument, int width, Where where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  struct Data {
    T value, result;
    int argument, width;
  } data{value, value, argument, width};
  warp_collective(
      name,
      mask,
      &data,
      [](void* const* lanes, unsigned among) {
        for (int lane = 0; lane < 32; ++lane) {
          if ((among >> lane & 1u) == 0) continue;
          Data& own = *static_cast<Data*>(lanes[lane]);
          const int from = kFrom(lane, own.argument, own.width);
          if ((among >> from & 1u) == 0) fail("a shuffle reads a lane that is not in its mask");
          own.result = static_cast<Data*>(lanes[from])->value;
        }
      },
      where);
  return data.result;
}

template <typename T>
inline T reduce(const char* name, unsigned mask, T value, T (*join)(T, T), Where where) {
  struct Data {
    T value, result;
    T (*join)(T, T);
  } data{value, value, join};
  warp_collective(
      name,
      mask,
      &data,
      [](void* const* lanes, unsigned among) {
        bool first = true;
        T all{};
        for (int lane = 0; lane < 32; ++lane) {
          if ((among >> lane & 1u) == 0) continue;
          const Data& own = *static_cast<Data*>(lanes[lane]);
          all = first ? own.value : own.join(all, own.value);
          first = false;
        }
        for (int lane = 0; lane < 32; ++lane)
          if ((among >> lane & 1u) != 0) static_cast<Data*>(lanes[lane])->result = all;
      },
      where);
  return data.result;
}

inline int from_xor(int lane, int argument, int width) {
  const int from = lane ^ argument;
  return from / width <= lane / width ? from : lane;  // not from a later part, as in CUDA
}
inline int from_index(int lane, int argument, int width) {
  return lane / width * width + (argument & (width - 1));
}
inline int from_below(int lane, int argument, int width) {
  return lane - argument < lane / width * width ? lane : lane - argument;
}
inline int from_above(int lane, int argument, int width) {
  return lane % width + argument >= width ? lane : lane + argument;
}

int lane_of_this_thread();

}  // namespace emulated

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emulated::Where where = emulated::Where::current()) {
  int none = 0;
  emulated::warp_collective(
      "__syncwarp", mask, &none, [](void* const*, unsigned) {}, where);
}
template <typename T>
inline T __shfl_sync(unsigned mask,
                     T value,
                     int lane,
                     int width = 32,
                     emulated::Where where = emulated::Where::current()) {
  return emulated::exchange<T, emulated::from_index>(
      "__shfl_sync", mask, value, lane, width, where);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask,
                         T value,
                         int lane_mask,
                         int width = 32,
                         emulated::Where where = emulated::Where::current()) {
  return emulated::exchange<T, emulated::from_xor>(
      "__shfl_xor_sync", mask, value, lane_mask, width, where);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask,
                        T value,
                        int delta,
                        int width = 32,
                        emulated::Where where = emulated::Where::current()) {
  return emulated::exchange<T, emulated::from_below>(
      "__shfl_up_sync", mask, value, delta, width, where);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask,
                          T value,
                          int delta,
                          int width = 32,
                          emulated::Where where = emulated::Where::current()) {
  return emulated::exchange<T, emulated::from_above>(
      "__shfl_down_sync", mask, value, delta, width, where);
}
inline unsigned __ballot_sync(unsigned mask,
                              int predicate,
                              emulated::Where where = emulated::Where::current()) {
  return emulated::reduce<unsigned>(
      "__ballot_sync",
      mask,
      predicate != 0 ? 1u << emulated::lane_of_this_thread() : 0u,
      [](unsigned a, unsigned b) { return a | b; },
      where);
}
inline int __any_sync(unsigned mask,
                      int predicate,
                      emulated::Where where = emulated::Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask,
                      int predicate,
                      emulated::Where where = emulated::Where::current()) {
  return __ballot_sync(mask, predicate == 0, where) == 0;
}
template <typename T>
inline T __reduce_max_sync(unsigned mask,
                           T value,
                           emulated::Where where = emulated::Where::current()) {
  return emulated::reduce<T>(
      "__reduce_max_sync", mask, value, [](T a, T b) { return std::max(a, b); }, where);
}
template <typename T>
inline T __reduce_min_sync(unsigned mask,
                           T value,
                           emulated::Where where = emulated::Where::current()) {
  return emulated::reduce<T>(
      "__reduce_min_sync", mask, value, [](T a, T b) { return std::min(a, b); }, where);
}
template <typename T>
inline T __reduce_add_sync(unsigned mask,
                           T value,
                           emulated::Where where = emulated::Where::current()) {
  return emulated::reduce<T>(
      "__reduce_add_sync", mask, value, [](T a, T b) { return static_cast<T>(a + b); }, where);
}
