// The training step on the device against the CPU backend, whose contract it shares.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "kernels/sparse_cases.h"
#include "support/device_memory.h"
#include "support/runtime_faults.h"

namespace lexico::kernels {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

class SparseCuda : public test::DeviceTest {
 protected:
  // Rows that are read 16 bytes at a time and rows that are not, more slots than a warp has lanes,
  // more than one tile of slots, a dictionary without signals.
  static std::vector<SparseCase> cases() {
    std::vector<SparseCase> all;
    all.emplace_back();
    all.emplace_back(2, 200, 130, 33, 8);
    all.emplace_back(1, 40, 100, 128, 40);
    all.emplace_back(2, 150, 5, 260, 7);
    all.emplace_back(1, 9, 1, 1, 3);
    all.emplace_back(2, 0, 10, 8, 4);
    return all;
  }

  SparseProblem on_device(const SparseCase& c) {
    SparseProblem p = c.problem(0);
    p.atoms = upload(c.atoms);
    p.indices = upload(c.indices);
    p.weights = upload(c.weights);
    return p;
  }
  AtomUses uses_of(const SparseProblem& p) {
    const AtomUses uses{
        upload(std::vector<std::int32_t>(size(p.num_dictionaries * (p.num_atoms + 1)), -7)),
        upload(
            std::vector<std::int32_t>(size(p.num_dictionaries * p.num_signals * p.max_atoms), -7))};
    char* workspace = upload(std::vector<char>(cuda::atom_uses_workspace_bytes(p)));
    EXPECT_TRUE(cuda::atom_uses(p, uses, workspace, nullptr).ok());
    wait();
    return uses;
  }
  static AtomUses host_uses(const SparseProblem& p,
                            std::vector<std::int32_t>& offsets,
                            std::vector<std::int32_t>& slots) {
    offsets.assign(size(p.num_dictionaries * (p.num_atoms + 1)), 0);
    slots.assign(size(p.num_dictionaries * p.num_signals * p.max_atoms), -7);
    const AtomUses uses{offsets.data(), slots.data()};
    EXPECT_TRUE(cpu::atom_uses(p, uses).ok());
    return uses;
  }
};

void expect_near(const std::vector<float>& ours, const std::vector<float>& want, float bound) {
  ASSERT_EQ(ours.size(), want.size());
  for (std::size_t i = 0; i < ours.size(); ++i)
    ASSERT_NEAR(ours[i], want[i], bound * (1 + std::fabs(want[i]))) << i;
}

TEST_F(SparseCuda, ResidualIsThatOfTheCpu) {
  for (const SparseCase& c : cases()) {
    const std::size_t rows = size(c.P * c.B);
    std::vector<float> residual(c.signals.size()), x(rows), r(rows);
    ASSERT_TRUE(
        cpu::sparse_residual(c.problem(0), c.signals.data(), residual.data(), x.data(), r.data())
            .ok());
    const SparseProblem p = on_device(c);
    float* got = upload(std::vector<float>(residual.size(), NAN));
    float *got_x = upload(std::vector<float>(rows, NAN)), *got_r = upload(x);
    ASSERT_TRUE(cuda::sparse_residual(p, upload(c.signals), got, got_x, got_r, nullptr).ok());
    expect_near(download(got, residual.size()), residual, 1e-5f);
    expect_near(download(got_x, rows), x, 1e-5f);
    expect_near(download(got_r, rows), r, 1e-5f);
  }
}

TEST_F(SparseCuda, UsesAreSortedByAtomAndThenBySlot) {
  for (const SparseCase& c : cases()) {
    std::vector<std::int32_t> offsets, slots;
    host_uses(c.problem(0), offsets, slots);
    const AtomUses uses = uses_of(on_device(c));
    EXPECT_EQ(download(uses.offsets, offsets.size()), offsets);
    EXPECT_EQ(download(uses.slots, slots.size()), slots);
  }
}

TEST_F(SparseCuda, GradientAndSumsAreThoseOfTheCpuAndTheSameEachTime) {
  for (const SparseCase& c : cases()) {
    std::vector<std::int32_t> offsets, slots;
    const AtomUses host = host_uses(c.problem(0), offsets, slots);
    std::vector<float> gradient(c.atoms.size());
    ASSERT_TRUE(
        cpu::sparse_gradient(c.problem(0), host, c.signals.data(), -0.5f, gradient.data()).ok());
    const SparseProblem p = on_device(c);
    const AtomUses uses = uses_of(p);
    const float* signals = upload(c.signals);
    std::vector<float> first;
    test::in_several_orders([&] {
      float* got = upload(std::vector<float>(gradient.size(), NAN));
      ASSERT_TRUE(cuda::sparse_gradient(p, uses_of(p), signals, -0.5f, got, nullptr).ok());
      const std::vector<float> now = download(got, gradient.size());
      expect_near(now, gradient, 1e-5f);
      if (!first.empty()) {
        EXPECT_EQ(now, first);
      }
      first = now;
    });
    for (const float keep : {1.0f, 0.75f, 0.0f}) {
      std::vector<float> A(size(std::int64_t{c.P} * c.N * c.N), 2.0f), B(c.atoms.size(), -4.0f);
      const std::vector<float> A0 = A, B0 = B;
      ASSERT_TRUE(
          cpu::add_co_occurrence(c.problem(0), host, c.signals.data(), keep, {A.data(), B.data()})
              .ok());
      test::in_several_orders([&] {
        const CoOccurrence sums{upload(A0), upload(B0)};
        ASSERT_TRUE(cuda::add_co_occurrence(p, uses, signals, keep, sums, nullptr).ok());
        expect_near(download(sums.codes, A.size()), A, 1e-4f);
        expect_near(download(sums.signals, B.size()), B, 1e-4f);
      });
    }
    release_all();
  }
}

TEST_F(SparseCuda, AdamIsThatOfTheCpu) {
  for (const bool normalize_first : {false, true}) {
    for (const int dim : {20, 33, 300}) {
      SparseCase c(3, 1, 11, dim, 1);
      std::fill_n(c.atoms.begin(), dim, 0.0f);  // no direction: stays what it is, but for the step
      const std::vector<float> scales = {0.5f, 0.0f, 2.0f};
      SparseCase other(3, 1, 11, dim, 1);
      std::vector<float> atoms = c.atoms, gradient = other.atoms, first(atoms.size(), 0.25f),
                         second(atoms.size(), 0.5f);
      for (float& g : gradient) g *= 0.3f;
      const auto step = [&](const float* s, const float* g, float* d, float* m1, float* m2) {
        return AdamStep{3, 11, dim, 1, 0.01, 0.9, 0.999, 1e-8, 3, normalize_first, s, g, d, m1, m2};
      };
      float *d = upload(atoms), *m1 = upload(first), *m2 = upload(second);
      ASSERT_TRUE(cuda::adam_step(step(upload(scales), upload(gradient), d, m1, m2), nullptr).ok());
      ASSERT_TRUE(
          cpu::adam_step(
              step(scales.data(), gradient.data(), atoms.data(), first.data(), second.data()))
              .ok());
      expect_near(download(d, atoms.size()), atoms, 1e-5f);
      expect_near(download(m1, atoms.size()), first, 1e-5f);
      expect_near(download(m2, atoms.size()), second, 1e-5f);
    }
  }
}

TEST_F(SparseCuda, DescentIsThatOfTheCpu) {
  // 70: a block that is not full; 400 dims: more than shared memory has room for.
  for (const auto& [num_atoms, dim] :
       std::vector<std::pair<int, int>>{{70, 20}, {150, 64}, {66, 400}}) {
    SparseCase c(2, 60, num_atoms, dim, 5);
    for (std::int32_t& i : c.indices)
      if (i == num_atoms - 1) i = 0;  // the last atom is in no code
    std::vector<std::int32_t> offsets, slots;
    const AtomUses host = host_uses(c.problem(0), offsets, slots);
    std::vector<float> A(size(std::int64_t{c.P} * c.N * c.N)), B(c.atoms.size());
    const CoOccurrence sums{A.data(), B.data()};
    ASSERT_TRUE(cpu::add_co_occurrence(c.problem(0), host, c.signals.data(), 0.0f, sums).ok());
    std::vector<float> scratch(size(std::int64_t{c.P} * kDescentBlock * dim));
    float *got = upload(c.atoms), *room = upload(scratch);
    ASSERT_TRUE(
        cuda::descend_atoms(c.P, c.N, dim, {upload(A), upload(B)}, room, got, nullptr).ok());
    ASSERT_TRUE(cpu::descend_atoms(c.P, c.N, dim, 1, sums, scratch.data(), c.atoms.data()).ok());
    // An ill-conditioned sweep: what rounds differently grows from atom to atom.
    expect_near(download(got, c.atoms.size()), c.atoms, 2e-3f);
  }
}

TEST_F(SparseCuda, NanStaysInItsSignal) {
  SparseCase c(1, 20, 30, 16, 3);
  std::vector<float> signals = c.signals;
  signals[16 * 4 + 2] = NAN;
  const SparseProblem p = on_device(c);
  float *residual = upload(signals), *x = upload(std::vector<float>(20)),
        *r = upload(std::vector<float>(20));
  ASSERT_TRUE(cuda::sparse_residual(p, upload(signals), residual, x, r, nullptr).ok());
  const std::vector<float> norms = download(x, 20), rests = download(r, 20);
  for (std::size_t i = 0; i < 20; ++i) {
    EXPECT_EQ(std::isnan(norms[i]), i == 4);
    EXPECT_EQ(std::isnan(rests[i]), i == 4);
  }
}

TEST_F(SparseCuda, EveryFailingCallIsReported) {
  const SparseCase c(2, 300, 70, 400, 5);
  const SparseProblem p = on_device(c);
  const AtomUses uses = uses_of(p);
  float *residual = upload(c.signals), *norms = upload(std::vector<float>(600)),
        *gradient = upload(c.atoms), *A = upload(std::vector<float>(2 * 70 * 70)),
        *atoms = upload(c.atoms), *scratch = upload(std::vector<float>(2 * 64 * 400));
  char* workspace = upload(std::vector<char>(cuda::atom_uses_workspace_bytes(p)));
  const float* scales = upload(std::vector<float>{1, 1});
  const std::vector<std::pair<const char*, std::function<Status()>>> calls = {
      {"residual",
       [&] { return cuda::sparse_residual(p, residual, residual, norms, norms, nullptr); }},
      {"uses", [&] { return cuda::atom_uses(p, uses, workspace, nullptr); }},
      {"gradient",
       [&] { return cuda::sparse_gradient(p, uses, residual, 1.0f, gradient, nullptr); }},
      {"adam",
       [&] {
         return cuda::adam_step({2,
                                 70,
                                 400,
                                 0,
                                 0.01,
                                 0.9,
                                 0.999,
                                 1e-8,
                                 1,
                                 false,
                                 scales,
                                 gradient,
                                 atoms,
                                 gradient,
                                 gradient},
                                nullptr);
       }},
      {"sums",
       [&] {
         return cuda::add_co_occurrence(p, uses, residual, 0.5f, {A, gradient}, nullptr);
       }},
      {"descent",
       [&] {
         return cuda::descend_atoms(2, 70, 400, {A, gradient}, scratch, atoms, nullptr);
       }},
  };
  for (const auto& [name, call] : calls) {
    int count = 1;
    for (int fail_at = -1; fail_at < count; ++fail_at) {
      SCOPED_TRACE(std::string(name) + ", call " + std::to_string(fail_at));
      test::RuntimeFaults faults(fail_at);
      const Status status = call();
      EXPECT_EQ(status.ok(), fail_at < 0);
      if (fail_at < 0) count = faults.calls();
    }
    wait();
  }
}

}  // namespace
}  // namespace lexico::kernels
