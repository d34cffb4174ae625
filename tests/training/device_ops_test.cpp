// The training step on the device, as SparseOps takes it, against the CPU's. An emulated device
// shares the host's memory: its tensors are torch's on the CPU.
#include "training/device_ops.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "kernels/common/runtime.h"
#include "kernels/memory/memory.h"
#include "lexico/error.h"
#include "support/runtime_faults.h"

namespace lexico::detail {
namespace {

#ifdef LEXICO_DEVICE_IS_EMULATED
const torch::Device kDevice(torch::kCPU);
#else
const torch::Device kDevice(torch::kCUDA);
#endif

class DeviceOpsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device here";
#ifdef LEXICO_DEVICE_IS_EMULATED
    // Torch frees memory of the CPU at once, on a GPU when the stream's work is done.
    kernels::cuda::Runtime& table = kernels::cuda::runtime();
    static const auto launch = table.launch_kernel;
    table.launch_kernel = [](const void* kernel,
                             dim3 grid,
                             dim3 block,
                             void** arguments,
                             std::size_t shared_bytes,
                             cudaStream_t stream) {
      const cudaError_t error = launch(kernel, grid, block, arguments, shared_bytes, stream);
      return error != cudaSuccess ? error : cudaStreamSynchronize(stream);
    };
#endif
    torch::manual_seed(1);
    atoms = torch::randn({3, 70, 24});
    atoms = (atoms / atoms.norm(2, 2, true)).contiguous();
    signals = torch::randn({3, 50, 24});
  }
  // The default stream is torch's where it was told of no other.
  void wait() { ASSERT_TRUE(kernels::cuda::synchronize(nullptr).ok()); }

  torch::Tensor atoms, signals;
};

EncodeOptions options(int s, float tolerance = 0) { return {s, tolerance, {}, 1}; }

void expect_same(const torch::Tensor& ours, const torch::Tensor& want, double bound = 1e-4) {
  EXPECT_TRUE(torch::allclose(ours.to(torch::kCPU), want, bound, bound))
      << (ours.to(torch::kCPU) - want).abs().max();
}

TEST_F(DeviceOpsTest, CodesAreThoseOfTheCpuHoweverManyDictionariesGoTogether) {
  for (const float tolerance : {0.0f, 0.4f}) {
    for (const std::vector<int>& budgets : {std::vector<int>{}, std::vector<int>{4, 2, 3}}) {
      SparseOps cpu(options(4, tolerance), torch::kCPU);
      const CodedBatch want = cpu.code(atoms, signals, budgets);
      for (const std::size_t scratch : {DeviceOps::kMostScratchBytes, std::size_t{1}}) {
        DeviceOps ops(options(4, tolerance), scratch);
        const CodedBatch ours = ops.code(atoms.to(kDevice), signals.to(kDevice), budgets, nullptr);
        EXPECT_EQ(ops.group(), scratch == 1 ? 1 : 3);
        EXPECT_GT((ours.indices.to(torch::kCPU) == want.indices)
                      .to(torch::kFloat32)
                      .mean()
                      .item<double>(),
                  0.995);
        expect_same(ours.signal_norms, want.signal_norms);
        expect_same(ours.residual_norms, want.residual_norms, 1e-3);
        EXPECT_TRUE(torch::equal(ours.used.to(torch::kCPU), want.used));
      }
    }
  }
}

TEST_F(DeviceOpsTest, AtomsMoveAsOnTheCpu) {
  SparseOps cpu(options(4), torch::kCPU);
  DeviceOps ops(options(4));
  const torch::Tensor D = atoms.to(kDevice), X = signals.to(kDevice);
  const CodedBatch want = cpu.code(atoms, signals), ours = ops.code(D, X, {}, nullptr);
  const torch::Tensor gradient = cpu.gradient(atoms, want, -2.0);
  const torch::Tensor our_gradient = ops.gradient(D, ours, -2.0, nullptr);
  wait();
  expect_same(our_gradient, gradient);

  torch::Tensor A[2], B[2], moved[2];
  for (int i : {0, 1}) {
    const torch::Device device = i == 0 ? torch::Device(torch::kCPU) : kDevice;
    A[i] = torch::full({3, 70, 70}, 0.1f).to(device);
    B[i] = torch::full({3, 70, 24}, 0.2f).to(device);
    moved[i] = atoms.clone().to(device);
  }
  cpu.add_co_occurrence(atoms, want, signals, 0.5, A[0], B[0]);
  ops.add_co_occurrence(D, ours, X, 0.5, A[1], B[1], nullptr);
  wait();
  expect_same(A[1], A[0]);
  expect_same(B[1], B[0]);
  cpu.descend(moved[0], A[0], B[0]);
  ops.descend(moved[1], A[1], B[1], nullptr);
  wait();
  expect_same(moved[1], moved[0], 2e-3);

  AdamMoments moments[2];
  for (int i : {0, 1}) {
    moved[i] = i == 0 ? atoms.clone() : atoms.to(kDevice).clone();
    moments[i] = {torch::zeros_like(moved[i]), torch::zeros_like(moved[i]), 0};
  }
  for (int step = 0; step < 3; ++step) {
    cpu.adam(moved[0], moments[0], gradient, {1, 0, 0.1f}, 1e-2, step == 1);
    ops.adam(moved[1], moments[1], our_gradient, {1, 0, 0.1f}, 1e-2, step == 1, nullptr);
    wait();
  }
  expect_same(moved[1], moved[0]);
  EXPECT_EQ(moments[1].step, 3);
}

TEST_F(DeviceOpsTest, BadVectorsHaveNormsThatSaySo) {
  signals[1][3][2] = std::numeric_limits<float>::quiet_NaN();
  signals[2][5].zero_();
  DeviceOps ops(options(4));
  const CodedBatch coded = ops.code(atoms.to(kDevice), signals.to(kDevice), {}, nullptr);
  EXPECT_TRUE(std::isnan(coded.signal_norms[1][3].item<float>()));
  EXPECT_EQ(coded.signal_norms[2][5].item<float>(), 0.0f);
  EXPECT_EQ((coded.signal_norms.isfinite()).sum().item<std::int64_t>(), 149);
}

TEST_F(DeviceOpsTest, EveryFailingCallIsAnError) {
  DeviceOps ops(options(2));
  const torch::Tensor D = atoms.to(kDevice), X = signals.to(kDevice);
  int count = 1;
  for (int fail_at = -1; fail_at < count; ++fail_at) {
    SCOPED_TRACE(fail_at);
    test::RuntimeFaults faults(fail_at);
    if (fail_at < 0) {
      ops.code(D, X, {}, nullptr);
      count = faults.calls();
    } else {
      EXPECT_THROW(ops.code(D, X, {}, nullptr), ResourceError);
    }
  }
  EXPECT_GT(count, 4);
  wait();
}

}  // namespace
}  // namespace lexico::detail
