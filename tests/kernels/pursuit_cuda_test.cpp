// The contract of pursuit on a GPU, or on one that the CPU emulates, for each path and rule.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "kernels/memory/memory.h"
#include "kernels/pursuit/pursuit.h"
#include "support/runtime_faults.h"
#include "tests/kernels/pursuit_cases.h"

#ifdef LEXICO_DEVICE_IS_EMULATED
#include "engine.h"
#endif

namespace lexico::kernels {
namespace {

struct Variant {
  cuda::PursuitPath path;
  Rule rule;
  std::string name() const {
    const char* const paths[] = {"auto", "plain", "tensor", "hopper"};
    return std::string(paths[static_cast<int>(path)]) + "_" + rule.name;
  }
};
std::ostream& operator<<(std::ostream& out, const Variant& v) { return out << v.name(); }

// Memory of the device that ends with the scope.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) {
    const Status status = cuda::allocate(&pointer_, bytes);
    EXPECT_TRUE(status.ok()) << status.what;
  }
  ~DeviceMemory() { cuda::release(pointer_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* get() const { return pointer_; }

 private:
  void* pointer_ = nullptr;
};

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values)
      : memory_(values.size() * sizeof(T)), count_(values.size()) {
    if (count_ > 0) {
      EXPECT_TRUE(cuda::copy(memory_.get(), values.data(), count_ * sizeof(T), nullptr).ok());
      EXPECT_TRUE(cuda::synchronize(nullptr).ok());
    }
  }
  T* get() const { return static_cast<T*>(memory_.get()); }
  std::vector<T> values() const {
    std::vector<T> values(count_);
    if (count_ == 0) return values;
    EXPECT_TRUE(cuda::copy(values.data(), memory_.get(), count_ * sizeof(T), nullptr).ok());
    const Status status = cuda::synchronize(nullptr);
    EXPECT_TRUE(status.ok()) << status.what;
    return values;
  }

 private:
  DeviceMemory memory_;
  std::size_t count_;
};

PursuitProblem problem_of(const Case& c, int max_atoms, const Rule& rule, float tolerance) {
  PursuitProblem p;
  p.num_dictionaries = c.dictionaries;
  p.num_signals = c.num_signals();
  p.num_atoms = c.atoms;
  p.dim = c.dim;
  p.max_atoms = max_atoms;
  p.rule = rule.rule;
  p.candidates = rule.candidates;
  p.relative_tolerance = tolerance;
  return p;
}

Codes encode(const Case& c,
             int max_atoms,
             const Variant& v,
             float tolerance = 0,
             int = 0,
             const std::int32_t* budgets = nullptr) {
  PursuitProblem p = problem_of(c, max_atoms, v.rule, tolerance);
  const std::size_t signals = c.signals.size() / static_cast<std::size_t>(c.dim);
  const std::size_t slots = signals * static_cast<std::size_t>(max_atoms);
  const DeviceArray<float> rows(c.rows), x(c.signals), weights(std::vector<float>(slots, 77)),
      residual_norms(std::vector<float>(signals, 77)), curve(std::vector<float>(slots, 77));
  const DeviceArray<std::int32_t> indices(std::vector<std::int32_t>(slots, 77)),
      counts(std::vector<std::int32_t>(signals, 77)),
      limits(budgets == nullptr ? std::vector<std::int32_t>()
                                : std::vector<std::int32_t>(budgets, budgets + signals));
  p.atoms = rows.get();
  p.signals = x.get();
  p.budgets = budgets == nullptr ? nullptr : limits.get();
  p.indices = indices.get();
  p.weights = weights.get();
  p.counts = counts.get();
  p.residual_norms = residual_norms.get();
  p.curve = curve.get();
  cuda::PursuitPlan plan;
  Status status = cuda::plan_pursuit(p, v.path, &plan);
  EXPECT_TRUE(status.ok()) << status.what;
  const DeviceMemory workspace(plan.workspace_bytes);
  status = cuda::pursuit(p, plan, workspace.get(), false, nullptr);
  EXPECT_TRUE(status.ok()) << status.what;
  return {max_atoms,
          indices.values(),
          counts.values(),
          weights.values(),
          residual_norms.values(),
          curve.values()};
}

class PursuitContract : public ::testing::TestWithParam<Variant> {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device here";
  }
};

#include "tests/kernels/pursuit_contract.h"

std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const Rule rule : {Rule{"omp", PursuitRule::kOmp, 0},
                          Rule{"ols", PursuitRule::kOls, 0},
                          Rule{"ols16", PursuitRule::kOls, 16}}) {
    all.push_back({cuda::PursuitPath::kPlain, rule});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Paths,
                         PursuitContract,
                         ::testing::ValuesIn(variants()),
                         [](const auto& test) { return test.param.name(); });

}  // namespace
}  // namespace lexico::kernels
