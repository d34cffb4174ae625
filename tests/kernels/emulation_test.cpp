// The emulated device itself: what it must do as a GPU does, and what it must find.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/common/launch.h"
#include "kernels/common/warp.cuh"
#include "kernels/memory/memory.h"
#include "support/runtime_faults.h"

namespace lexico::kernels::cuda {
namespace {

class Emulation : public ::testing::Test {
 protected:
  void TearDown() override {
    emulated::clear_fault();
    for (void* p : owned_) release(p);
    emulated::device() = {};
    (void)runtime().get_last_error();
  }
  template <typename T>
  T* on_device(const std::vector<T>& values) {
    void* pointer = nullptr;
    EXPECT_TRUE(allocate(&pointer, values.size() * sizeof(T)).ok());
    owned_.push_back(pointer);
    EXPECT_TRUE(copy(pointer, values.data(), values.size() * sizeof(T), nullptr).ok());
    EXPECT_TRUE(synchronize(nullptr).ok());
    return static_cast<T*>(pointer);
  }
  template <typename T>
  std::vector<T> on_host(const T* from, std::size_t count) {
    std::vector<T> values(count);
    EXPECT_TRUE(copy(values.data(), from, count * sizeof(T), nullptr).ok());
    EXPECT_TRUE(synchronize(nullptr).ok());
    return values;
  }
  // The fault of a kernel, which the next wait reports.
  std::string fault_of(const Status& launched) {
    EXPECT_TRUE(launched.ok()) << launched.what;
    const Status status = synchronize(nullptr);
    EXPECT_FALSE(status.ok());
    return status.what;
  }

 private:
  std::vector<void*> owned_;
};

__global__ void reverse(int* values) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  const int t = threadIdx.x, n = blockDim.x;
  int* const own = values + blockIdx.x * n;
  shared[t] = own[t];
  __syncthreads();
  own[t] = shared[n - 1 - t];
}

TEST_F(Emulation, BarrierLetsThreadsSeeWhatOthersWrote) {
  for (const unsigned order : {0u, 1u, 2u}) {
    emulated::device().order = order;
    std::vector<int> values(4 * 70);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i);
    int* const device = on_device(values);
    ASSERT_TRUE(launch(reverse, 4, 70, 70 * sizeof(int), nullptr, device).ok());
    EXPECT_EQ(on_host(device, 1)[0], 69);
    const std::vector<int> after = on_host(device, values.size());
    for (std::size_t i = 0; i < values.size(); ++i)
      EXPECT_EQ(after[i], static_cast<int>(i / 70 * 70 + 69 - i % 70));
  }
}

TEST_F(Emulation, WorkIsDoneWhenSomebodyWaitsForIt) {
  int* const device = on_device(std::vector<int>{1, 2});
  ASSERT_TRUE(launch(reverse, 1, 2, 2 * sizeof(int), nullptr, device).ok());
  EXPECT_EQ(device[0], 1);
  EXPECT_TRUE(synchronize(nullptr).ok());
  EXPECT_EQ(device[0], 2);
}

__global__ void shuffles(int* out) {
  const int lane = lane_id();
  int* const own = out + lane * 8;
  own[0] = __shfl_sync(kWholeWarp, lane, 5);
  own[1] = __shfl_xor_sync(kWholeWarp, lane, 9);
  own[2] = __shfl_up_sync(kWholeWarp, lane, 3);
  own[3] = __shfl_down_sync(kWholeWarp, lane, 3);
  own[4] = static_cast<int>(__ballot_sync(kWholeWarp, lane % 3 == 0));
  own[5] = __shfl_sync(kWholeWarp, lane, 1, 4);
  own[6] = static_cast<int>(warp_sum(static_cast<float>(lane)));
  own[7] = __reduce_max_sync(kWholeWarp, (lane * 7) % 32);
  if (lane < 16) own[7] += __any_sync(0xffffu, lane == 3);
}

TEST_F(Emulation, ShufflesBallotsAndReductionsAreThoseOfAWarp) {
  int* const device = on_device(std::vector<int>(32 * 8));
  ASSERT_TRUE(launch(shuffles, 1, 32, 0, nullptr, device).ok());
  const std::vector<int> out = on_host(device, 32 * 8);
  for (int lane = 0; lane < 32; ++lane) {
    const int* const own = out.data() + lane * 8;
    EXPECT_EQ(own[0], 5);
    EXPECT_EQ(own[1], lane ^ 9);
    EXPECT_EQ(own[2], lane < 3 ? lane : lane - 3);
    EXPECT_EQ(own[3], lane > 28 ? lane : lane + 3);
    EXPECT_EQ(static_cast<unsigned>(own[4]), 0x49249249u);
    EXPECT_EQ(own[5], lane / 4 * 4 + 1);
    EXPECT_EQ(own[6], 31 * 16);
    EXPECT_EQ(own[7], lane < 16 ? 32 : 31);
  }
}

// The fragments by hand, as PTX has them: the emulation's own reading is not asked.
__global__ void product_by_hand(const __half* a, const __half* b, float* c) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const auto pair = [](__half low, __half high) {
    return static_cast<std::uint32_t>(__half_as_ushort(low)) |
           static_cast<std::uint32_t>(__half_as_ushort(high)) << 16;
  };
  const auto of_a = [&](int row, int k) { return pair(a[row * 16 + k], a[row * 16 + k + 1]); };
  const auto of_b = [&](int k, int column) {
    return pair(b[k * 8 + column], b[(k + 1) * 8 + column]);
  };
  const std::uint32_t fa[4] = {
      of_a(g, 2 * t), of_a(g + 8, 2 * t), of_a(g, 2 * t + 8), of_a(g + 8, 2 * t + 8)};
  const std::uint32_t fb[2] = {of_b(2 * t, g), of_b(2 * t + 8, g)};
  float fc[4] = {1, 1, 1, 1};
  mma_m16n8k16(fc, fa, fb);
  c[g * 8 + 2 * t] = fc[0];
  c[g * 8 + 2 * t + 1] = fc[1];
  c[(g + 8) * 8 + 2 * t] = fc[2];
  c[(g + 8) * 8 + 2 * t + 1] = fc[3];
}

// As kernels do it: copies to shared memory, ldmatrix of rows of a and of columns of b.
__global__ void product_by_ldmatrix(const __half* a, const __half* b_columns, float* c) {
  __half* const shared = reinterpret_cast<__half*>(dynamic_shared());  // a, then columns of b
  const int lane = lane_id();
  cp_async_16(shared + lane * 8, a + lane * 8);
  cp_async_16(shared + 256 + lane * 8, b_columns + lane * 8, lane < 16);  // zeros behind b
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  std::uint32_t fa[4], fb4[4];
  ldmatrix_x4(fa, shared + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x4(fb4, shared + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  const std::uint32_t fb[2] = {fb4[0], fb4[1]};
  float fc[4] = {1, 1, 1, 1};
  mma_m16n8k16(fc, fa, fb);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

TEST_F(Emulation, TensorCoreProductIsThatOfPlainLoops) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<__half> a(256), b(128), b_columns(128);
  for (__half& x : a) x = __half(normal(random));
  for (__half& x : b) x = __half(normal(random));
  for (std::size_t k = 0; k < 16; ++k)
    for (std::size_t n = 0; n < 8; ++n) b_columns[n * 16 + k] = b[k * 8 + n];
  const auto expect = [&](const std::vector<float>& c) {
    for (std::size_t i = 0; i < 16; ++i) {
      for (std::size_t j = 0; j < 8; ++j) {
        double want = 1;
        for (std::size_t k = 0; k < 16; ++k)
          want += double{float{a[i * 16 + k]}} * float{b[k * 8 + j]};
        EXPECT_NEAR(c[i * 8 + j], want, 1e-5);
      }
    }
  };
  const __half *da = on_device(a), *db = on_device(b), *dbc = on_device(b_columns);
  float* const c = on_device(std::vector<float>(128));
  ASSERT_TRUE(launch(product_by_hand, 1, 32, 0, nullptr, da, db, c).ok());
  expect(on_host(c, 128));
  ASSERT_TRUE(launch(product_by_ldmatrix, 1, 32, 512 * sizeof(__half), nullptr, da, dbc, c).ok());
  expect(on_host(c, 128));
}

TEST_F(Emulation, HalvesAreRoundedToNearestEven) {
  for (int i = 0; i < 65536; ++i) {
    const __half h = __ushort_as_half(static_cast<unsigned short>(i));
    const float x = __half2float(h);
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(float{__half(x)}));
    } else {
      EXPECT_EQ(__half_as_ushort(__half(x)), i);
    }
  }
  EXPECT_EQ(float{__half(1 + 0x1p-11f)}, 1);
  EXPECT_EQ(float{__half(1 + 0x1.8p-10f)}, 1 + 0x1p-9f);
  EXPECT_EQ(float{__half(65519.0f)}, 65504);
  EXPECT_TRUE(std::isinf(float{__half(65520.0f)}));
  EXPECT_EQ(float{__half(0x1p-25f)}, 0);
  EXPECT_EQ(float{__half(0x1.8p-25f)}, 0x1p-24f);
}

__global__ void barrier_of_some() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void shuffle_of_some() {
  if (lane_id() < 7) __shfl_sync(kWholeWarp, 1, 0);
}
__global__ void warps_wait_for_each_other() {
  if (warp_id() == 0) __syncthreads();
  if (lane_id() < 31) __syncwarp();
}
__global__ void writes_at(int offset) { dynamic_shared()[offset] = 1; }

TEST_F(Emulation, DivergenceAtABarrierIsFound) {
  EXPECT_NE(fault_of(launch(barrier_of_some, 1, 64, 0, nullptr)).find("others have left"),
            std::string::npos);
  emulated::clear_fault();
  EXPECT_NE(fault_of(launch(two_barriers, 1, 64, 0, nullptr)).find("another barrier"),
            std::string::npos);
  emulated::clear_fault();
  EXPECT_NE(fault_of(launch(shuffle_of_some, 1, 32, 0, nullptr)).find("__shfl_sync"),
            std::string::npos);
}

TEST_F(Emulation, DeadlockIsFound) {
  const std::string fault = fault_of(launch(warps_wait_for_each_other, 1, 64, 0, nullptr));
  EXPECT_FALSE(fault.empty());
}

TEST_F(Emulation, WriteOutsideSharedMemoryIsFound) {
  ASSERT_TRUE(launch(writes_at, 1, 1, 64, nullptr, 63).ok());
  EXPECT_TRUE(synchronize(nullptr).ok());
  for (const int offset : {64, -1}) {
    EXPECT_NE(fault_of(launch(writes_at, 2, 1, 64, nullptr, offset)).find("outside its 64 bytes"),
              std::string::npos);
    emulated::clear_fault();
  }
}

TEST_F(Emulation, WriteOutsideDeviceMemoryIsFoundWhenItIsFreed) {
  void* pointer = nullptr;
  ASSERT_TRUE(allocate(&pointer, 100).ok());
  static_cast<char*>(pointer)[100] = 0;
  EXPECT_EQ(runtime().free(pointer), cudaErrorIllegalAddress);
}

TEST_F(Emulation, LaunchesThatAGpuRefusesAreRefused) {
  EXPECT_FALSE(launch(barrier_of_some, 0, 64, 0, nullptr).ok());
  EXPECT_FALSE(launch(barrier_of_some, 1, 1025, 0, nullptr).ok());
  EXPECT_FALSE(launch(barrier_of_some, dim3(1, 65536), 32, 0, nullptr).ok());
  EXPECT_FALSE(launch(barrier_of_some, 1, 64, 1 << 20, nullptr).ok());
  EXPECT_EQ(runtime().get_last_error(), cudaSuccess) << "an error that was told is told once";
}

TEST_F(Emulation, FaultStopsLaterWorkAsOnAGpu) {
  int* const device = on_device(std::vector<int>{1, 2});
  ASSERT_TRUE(launch(writes_at, 1, 1, 64, nullptr, 64).ok());
  ASSERT_TRUE(launch(reverse, 1, 2, 2 * sizeof(int), nullptr, device).ok());
  EXPECT_FALSE(synchronize(nullptr).ok());
  EXPECT_EQ(device[0], 1);
  EXPECT_FALSE(synchronize(nullptr).ok());
}

TEST_F(Emulation, MemoryEnds) {
  emulated::device().memory_bytes = emulated::allocated_bytes() + 1000;
  void* pointer = nullptr;
  const Status status = allocate(&pointer, 1001);
  EXPECT_STREQ(status.what, "out of memory");
  EXPECT_EQ(runtime().get_last_error(), cudaSuccess);
}

TEST_F(Emulation, EveryRuntimeCallCanFail) {
  for (int fail_at = 0;; ++fail_at) {
    test::RuntimeFaults faults(fail_at);
    void* pointer = nullptr;
    const bool allocated = allocate(&pointer, 8).ok();
    const bool ok = allocated && launch(shuffle_of_some, 1, 32, 64 << 10, nullptr).ok();
    if (allocated) release(pointer);
    EXPECT_EQ(ok, *faults.failed() == 0) << faults.failed();
    emulated::clear_fault();
    if (fail_at >= faults.calls()) {
      EXPECT_EQ(faults.calls(), 3);
      break;
    }
  }
}

}  // namespace
}  // namespace lexico::kernels::cuda
