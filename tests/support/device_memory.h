#pragma once
// Arrays of the host on a device, real or emulated, for tests of the CUDA backend.
#include <gtest/gtest.h>

#include <vector>

#include "kernels/common/runtime.h"
#ifdef LEXICO_DEVICE_IS_EMULATED
#include "engine.h"
#endif
#include "kernels/memory/memory.h"

namespace lexico::test {

/// Runs `body` a few times; an emulated device runs threads and blocks in another order each time,
/// so that a race gives other results.
template <typename Body>
void in_several_orders(Body&& body) {
#ifdef LEXICO_DEVICE_IS_EMULATED
  for (const unsigned order : {0u, 1u, 2u}) {
    emulated::device().order = order;
    body();
  }
  emulated::device().order = 0;
#else
  for (int run = 0; run < 3; ++run) body();
#endif
}

/// Skips where there is no device; what was uploaded lives as long as the test.
class DeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device here";
  }
  void TearDown() override { release_all(); }

  template <typename T>
  T* upload(const T* from, std::size_t count) {
    void* to = nullptr;
    EXPECT_TRUE(kernels::cuda::allocate(&to, count * sizeof(T)).ok());
    owned_.push_back(to);
    EXPECT_TRUE(kernels::cuda::copy(to, from, count * sizeof(T), nullptr).ok());
    wait();
    return static_cast<T*>(to);
  }
  template <typename T>
  T* upload(const std::vector<T>& values) {
    return upload(values.data(), values.size());
  }
  template <typename T>
  std::vector<T> download(const T* from, std::size_t count) {
    std::vector<T> values(count);
    EXPECT_TRUE(kernels::cuda::copy(values.data(), from, count * sizeof(T), nullptr).ok());
    wait();
    return values;
  }
  /// What kernels did wrong is told here.
  void wait() {
    const kernels::Status status = kernels::cuda::synchronize(nullptr);
    EXPECT_TRUE(status.ok()) << status.what;
  }
  void release_all() {
    for (void* p : owned_) kernels::cuda::release(p);
    owned_.clear();
  }

 private:
  std::vector<void*> owned_;
};

}  // namespace lexico::test
