// The two forms of pursuit and gradient that training uses: our kernels, and tensor operations for
// other devices.
#include "training/sparse_ops.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "lexico/error.h"

namespace lexico::detail {
namespace {

struct Case {
  torch::Tensor atoms, signals;
};

Case random_case(std::int64_t P, std::int64_t N, std::int64_t m, std::int64_t B) {
  torch::manual_seed(1);
  torch::Tensor atoms = torch::randn({P, N, m});
  atoms /= atoms.norm(2, 2, true);
  return {atoms.contiguous(), torch::randn({P, B, m})};
}

EncodeOptions options(int s, float tolerance = 0) { return {s, tolerance, {}, 0}; }

TEST(SparseOps, TensorOperationsFindWhatTheKernelsFind) {
  const Case c = random_case(3, 96, 24, 200);
  for (float tolerance : {0.0f, 0.4f}) {
    SparseOps ops(options(6, tolerance), torch::kCPU);
    const CodedBatch ours = ops.code(c.atoms, c.signals);
    const CodedBatch theirs = code_with_tensor_ops(c.atoms, c.signals, options(6, tolerance));
    EXPECT_GT((ours.indices == theirs.indices).to(torch::kFloat32).mean().item<double>(), 0.999);
    EXPECT_LT((ours.residual.norm(2, 2) - theirs.residual.norm(2, 2)).abs().max().item<double>(),
              1e-4);
    EXPECT_LT((ours.weights - theirs.weights).abs().mean().item<double>(), 1e-4);
    const torch::Tensor g = ops.gradient(c.atoms, ours, 0.5),
                        h = gradient_with_tensor_ops(c.atoms, ours, 0.5);
    EXPECT_TRUE(torch::allclose(g, h, 1e-4, 1e-5));
  }
}

TEST(SparseOps, ResidualIsWhatTheCodesLeave) {
  const Case c = random_case(2, 64, 16, 50);
  SparseOps ops(options(4), torch::kCPU);
  const CodedBatch coded = ops.code(c.atoms, c.signals);
  for (std::int64_t p = 0; p < 2; ++p)
    for (std::int64_t b = 0; b < 50; ++b) {
      torch::Tensor x = c.signals[p][b].to(torch::kFloat64);
      for (std::int64_t k = 0; k < 4; ++k) {
        const std::int64_t n = coded.indices[p][b][k].item<std::int32_t>();
        if (n >= 0)
          x = x - coded.weights[p][b][k].item<double>() * c.atoms[p][n].to(torch::kFloat64);
      }
      ASSERT_LT((x - coded.residual[p][b]).abs().max().item<double>(), 1e-5);
    }
}

TEST(SparseOps, GradientIsThatOfTheMeanSquaredError) {
  Case c = random_case(1, 32, 8, 20);
  SparseOps ops(options(3), torch::kCPU);
  const CodedBatch coded = ops.code(c.atoms, c.signals);
  const torch::Tensor y = torch::zeros({20, 32});
  for (std::int64_t b = 0; b < 20; ++b)
    for (std::int64_t k = 0; k < 3; ++k) {
      const std::int64_t n = coded.indices[0][b][k].item<std::int32_t>();
      if (n >= 0) y[b][n] = coded.weights[0][b][k];
    }
  torch::Tensor D = c.atoms[0].clone().requires_grad_(true);
  (c.signals[0] - torch::matmul(y, D)).square().mean().backward();
  const torch::Tensor ours =
      ops.gradient(c.atoms, coded, -2.0 / static_cast<double>(c.signals.numel()));
  EXPECT_TRUE(torch::allclose(ours[0], D.grad(), 1e-4, 1e-6));
}

TEST(SparseOps, TensorOperationsSurviveZeroNanAndExactlySparseSignals) {
  Case c = random_case(1, 32, 8, 6);
  c.signals[0][0].zero_();
  c.signals[0][1][3] = std::numeric_limits<float>::quiet_NaN();
  c.signals[0][2].copy_(2.5 * c.atoms[0][7]);
  c.signals[0][3].copy_(c.atoms[0][1] - c.atoms[0][2]);
  const CodedBatch coded = code_with_tensor_ops(c.atoms, c.signals, options(8));
  EXPECT_EQ((coded.indices[0][0] >= 0).sum().item<std::int64_t>(), 0);
  EXPECT_EQ((coded.indices[0][1] >= 0).sum().item<std::int64_t>(), 0);
  EXPECT_EQ(coded.indices[0][2][0].item<std::int32_t>(), 7);
  EXPECT_NEAR(coded.weights[0][2][0].item<float>(), 2.5f, 1e-5f);
  EXPECT_TRUE(coded.weights.isfinite().all().item<bool>());
  EXPECT_LT(coded.residual[0][3].norm().item<float>(), 1e-4f);
}

TEST(SparseOps, OtherRulesAreRefusedOffTheCpu) {
  const Case c = random_case(1, 32, 8, 6);
  EncodeOptions ols = options(2);
  ols.selection.rule = Selection::Rule::kOls;
  EXPECT_THROW(code_with_tensor_ops(c.atoms, c.signals, ols), InvalidArgument);
}

TEST(SparseOps, TensorOperationsMoveTheAtomsAsTheKernelsDo) {
  const Case c = random_case(3, 130, 24, 300);
  SparseOps ops(options(4), torch::kCPU);
  const CodedBatch coded = ops.code(c.atoms, c.signals, {4, 2, 4});
  EXPECT_TRUE((coded.indices[1].narrow(1, 2, 2) == -1).all().item<bool>());
  EXPECT_TRUE(torch::equal(code_with_tensor_ops(c.atoms, c.signals, options(4), {4, 2, 4}).used,
                           coded.used));

  torch::Tensor A[2], B[2], atoms[2];
  for (int i : {0, 1}) {
    A[i] = torch::full({3, 130, 130}, 0.1f);
    B[i] = torch::full({3, 130, 24}, 0.2f);
    atoms[i] = c.atoms.clone();
  }
  ops.add_co_occurrence(c.atoms, coded, c.signals, 0.5, A[0], B[0]);
  add_co_occurrence_with_tensor_ops(coded, c.signals, 0.5, A[1], B[1]);
  EXPECT_TRUE(torch::allclose(A[0], A[1], 1e-4, 1e-4));
  EXPECT_TRUE(torch::allclose(B[0], B[1], 1e-4, 1e-4));
  ops.descend(atoms[0], A[0], B[0]);
  descend_with_tensor_ops(atoms[1], A[0], B[0]);
  EXPECT_TRUE(torch::allclose(atoms[0], atoms[1], 1e-3, 1e-3));

  const torch::Tensor gradient = ops.gradient(c.atoms, coded, -2.0);
  for (bool normalize_first : {false, true}) {
    AdamMoments moments[2];
    for (int i : {0, 1}) {
      moments[i] = {torch::zeros_like(c.atoms), torch::zeros_like(c.atoms), 0};
      atoms[i] = c.atoms.clone();
    }
    for (int step = 0; step < 3; ++step) {
      ops.adam(atoms[0], moments[0], gradient, {1, 0, 0.1f}, 1e-2, normalize_first);
      adam_with_tensor_ops(atoms[1], moments[1], gradient, {1, 0, 0.1f}, 1e-2, normalize_first);
    }
    EXPECT_TRUE(torch::allclose(atoms[0], atoms[1], 1e-4, 1e-5));
    EXPECT_TRUE(torch::equal(atoms[0][1], c.atoms[1]));
    EXPECT_TRUE(torch::allclose(moments[0].second, moments[1].second, 1e-4, 1e-7));
  }
}

}  // namespace
}  // namespace lexico::detail
