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
  // Sizes that a path does not take go where a caller's would.
  const bool takes = v.path == cuda::PursuitPath::kPlain || max_atoms <= cuda::kMaxTensorPicks;
  Status status = cuda::plan_pursuit(p, takes ? v.path : cuda::PursuitPath::kAuto, &plan);
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

bool is_available(cuda::PursuitPath path) {
  PursuitProblem p;
  p.num_signals = p.num_atoms = p.dim = p.max_atoms = 1;
  cuda::PursuitPlan plan;
  return cuda::plan_pursuit(p, path, &plan).ok();
}

class PursuitContract : public ::testing::TestWithParam<Variant> {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device here";
    if (!is_available(GetParam().path)) GTEST_SKIP() << "not on this device";
    const std::string test = ::testing::UnitTest::GetInstance()->current_test_info()->name();
    const auto is = [&](const char* name) { return test.find(name) != std::string::npos; };
    if (GetParam().path != cuda::PursuitPath::kPlain && GetParam().rule.candidates > 0 &&
        (is("OfEqualAtoms") || is("ErrorOnCoherent")))
      GTEST_SKIP() << "of few atoms, many of the largest share a segment with two larger ones";
  }
};

#include "tests/kernels/pursuit_contract.h"

std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const Rule rule : {Rule{"omp", PursuitRule::kOmp, 0},
                          Rule{"ols", PursuitRule::kOls, 0},
                          Rule{"ols16", PursuitRule::kOls, 16}}) {
    all.push_back({cuda::PursuitPath::kPlain, rule});
    if (rule.rule == PursuitRule::kOmp || rule.candidates > 0)
      all.push_back({cuda::PursuitPath::kTensor, rule});
    if (rule.rule == PursuitRule::kOmp) all.push_back({cuda::PursuitPath::kHopper, rule});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Paths,
                         PursuitContract,
                         ::testing::ValuesIn(variants()),
                         [](const auto& test) { return test.param.name(); });

// ------------------------------------------------------------------ beyond the contract of the CPU

class PursuitOnDevice : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device here";
  }
#ifdef LEXICO_DEVICE_IS_EMULATED
  void TearDown() override { emulated::device() = {}; }
#endif
};

const Rule kOmp{"omp", PursuitRule::kOmp, 0}, kOls16{"ols16", PursuitRule::kOls, 16};

Codes encode_on_cpu(const Case& c, int max_atoms, const Rule& rule) {
  PursuitProblem p = problem_of(c, max_atoms, rule, 0);
  const auto signals = static_cast<std::size_t>(c.num_signals() * c.dictionaries),
             slots = signals * static_cast<std::size_t>(max_atoms);
  Codes codes{max_atoms,
              std::vector<std::int32_t>(slots),
              std::vector<std::int32_t>(signals),
              std::vector<float>(slots),
              std::vector<float>(signals),
              std::vector<float>(slots)};
  p.threads = 2;
  p.atoms = c.rows.data();
  p.signals = c.signals.data();
  p.indices = codes.indices.data();
  p.weights = codes.weights.data();
  p.counts = codes.counts.data();
  p.residual_norms = codes.residual_norms.data();
  p.curve = codes.curve.data();
  const cpu::PursuitPlan plan = cpu::plan_pursuit(p, p.num_signals);
  std::vector<char> workspace(plan.workspace_bytes);
  EXPECT_TRUE(cpu::pursuit(p, plan, workspace.data(), false).ok());
  return codes;
}

// How many signals got other atoms than those of `want`, and the ratio of the mean errors.
struct Difference {
  int other = 0;
  double ratio = 0;
};
Difference difference(const Codes& codes, const Codes& want) {
  Difference d;
  double ours = 0, theirs = 0;
  for (std::size_t b = 0; b < want.counts.size(); ++b) {
    d.other +=
        codes.picks(static_cast<std::int64_t>(b)) != want.picks(static_cast<std::int64_t>(b));
    ours += codes.residual_norms[b];
    theirs += want.residual_norms[b];
  }
  d.ratio = ours / theirs;
  return d;
}

TEST_F(PursuitOnDevice, SameAtomsAsOnTheCpu) {
  const Case c = isotropic(512, 64, 400, 7);
  const Codes want = encode_on_cpu(c, 8, kOmp);
  for (const auto path :
       {cuda::PursuitPath::kPlain, cuda::PursuitPath::kTensor, cuda::PursuitPath::kHopper}) {
    if (!is_available(path)) continue;
    const Variant v{path, kOmp};
    const Difference d = difference(encode(c, 8, v), want);
    EXPECT_LE(d.other, 2) << v;  // 99.5 %
    EXPECT_NEAR(d.ratio, 1, 1e-4) << v;
  }
}

TEST_F(PursuitOnDevice, CandidatesOfSegmentsAreWorthThoseOfAllAtoms) {
  const Case c = coherent(1024, 64, 60, 7);
  const Codes want = encode_on_cpu(c, 8, kOls16);
  const Difference plain = difference(encode(c, 8, {cuda::PursuitPath::kPlain, kOls16}), want);
  EXPECT_LE(plain.other, 1);
  if (!is_available(cuda::PursuitPath::kTensor)) return;
  const Difference d = difference(encode(c, 8, {cuda::PursuitPath::kTensor, kOls16}), want);
  EXPECT_LE(d.ratio, 1.002);
  EXPECT_GE(d.ratio, 0.998);
}

TEST_F(PursuitOnDevice, PicksAmongManyAtomsAreThoseOfDouble) {
  const Case c = isotropic(9000, 32, 6, 4);
  for (const auto path : {cuda::PursuitPath::kPlain, cuda::PursuitPath::kAuto}) {
    const Codes codes = encode(c, 6, {path, kOmp});
    for (std::int64_t b = 0; b < c.num_signals(); ++b) {
      const Reference want = reference(c, c.signal(b), 6, kOmp);
      EXPECT_EQ(codes.picks(b), std::vector<std::int32_t>(want.picks.begin(), want.picks.end()));
    }
  }
}

// More of a score's bits go to the column than with few atoms.
TEST_F(PursuitOnDevice, SixtyFiveThousandAtomsAreTold) {
  const Case c = isotropic(65536, 16, 3, 5);
  const Codes codes = encode(c, 3, {cuda::PursuitPath::kAuto, kOmp});
  for (std::int64_t b = 0; b < c.num_signals(); ++b) {
    const Reference want = reference(c, c.signal(b), 3, kOmp);
    EXPECT_EQ(codes.picks(b), std::vector<std::int32_t>(want.picks.begin(), want.picks.end()));
  }
}

TEST_F(PursuitOnDevice, SameBitsFromRunToRun) {
  const Case c = isotropic(150, 40, 30, 9);
  for (const Variant& v : variants()) {
    if (!is_available(v.path)) continue;
    const Codes codes = encode(c, 8, v);
    for (unsigned run = 1; run < 3; ++run) {
#ifdef LEXICO_DEVICE_IS_EMULATED
      emulated::device().order = run;  // threads and blocks take turns otherwise
#endif
      EXPECT_TRUE(codes == encode(c, 8, v)) << v;
    }
#ifdef LEXICO_DEVICE_IS_EMULATED
    emulated::device().order = 0;
#endif
  }
}

#ifdef LEXICO_DEVICE_IS_EMULATED
TEST_F(PursuitOnDevice, BlocksOfEverySizeGiveTheSameAtoms) {
  emulated::device().multiprocessors = 1;
  for (const int dim : {40, 128, 200}) {
    for (const Rule& rule : {kOmp, kOls16}) {
      const Case all = isotropic(150, dim, 120, 2);
      const Codes want = encode_on_cpu(all, 5, rule);
      for (const std::int64_t signals : {5, 40, 120}) {
        Case c = all;
        c.signals.resize(static_cast<std::size_t>(signals * dim));
        PursuitProblem p = problem_of(c, 5, rule, 0);
        cuda::PursuitPlan plan;
        ASSERT_TRUE(cuda::plan_pursuit(p, cuda::PursuitPath::kTensor, &plan).ok());
        EXPECT_EQ(plan.signals_per_block,
                  signals == 5                                      ? 16
                  : signals == 40 || rule.rule == PursuitRule::kOls ? 64
                                                                    : 128);
        const Codes codes = encode(c, 5, {cuda::PursuitPath::kTensor, rule});
        int other = 0;
        for (std::int64_t b = 0; b < signals; ++b) other += codes.picks(b) != want.picks(b);
        EXPECT_LE(other, 1) << dim << " dimensions, " << signals << " signals, " << rule.name;
      }
    }
  }
}

TEST_F(PursuitOnDevice, OldDeviceTakesThePlainPath) {
  emulated::device().major = 7;
  PursuitProblem p = problem_of(isotropic(64, 32, 1, 1), 4, kOmp, 0);
  cuda::PursuitPlan plan;
  ASSERT_TRUE(cuda::plan_pursuit(p, cuda::PursuitPath::kAuto, &plan).ok());
  EXPECT_EQ(plan.path, cuda::PursuitPath::kPlain);
  const Status status = cuda::plan_pursuit(p, cuda::PursuitPath::kTensor, &plan);
  EXPECT_STREQ(status.what, "the tensor paths need compute capability 8.0");
}
#endif

TEST_F(PursuitOnDevice, PathThatCannotTakeAProblemSaysWhy) {
  PursuitProblem p;
  p.num_atoms = 4096;
  p.dim = 128;
  p.max_atoms = 8;
  p.num_signals = 1 << 20;
  cuda::PursuitPlan plan;
  const auto why = [&] { return cuda::plan_pursuit(p, cuda::PursuitPath::kTensor, &plan).what; };
  if (is_available(cuda::PursuitPath::kTensor)) {
    EXPECT_STREQ(why(), "ok");
    EXPECT_LT(plan.workspace_bytes, std::size_t{1} << 30);
    p.dim = 257;
    EXPECT_STREQ(why(), "the tensor paths take at most 256 dimensions");
    p.dim = 128;
    p.max_atoms = 65;
    EXPECT_STREQ(why(), "the tensor paths take at most 64 picks");
    p.max_atoms = 8;
    p.rule = PursuitRule::kOls;
    EXPECT_STREQ(why(), "OLS among all atoms is on the plain path only");
  }
  ASSERT_TRUE(cuda::plan_pursuit(p, cuda::PursuitPath::kAuto, &plan).ok());
}

// Device arrays of a problem, filled with 77 where it writes.
struct OnDevice {
  OnDevice(const Case& c, int max_atoms)
      : rows(c.rows),
        x(c.signals),
        indices(std::vector<std::int32_t>(count(c) * static_cast<std::size_t>(max_atoms), 77)),
        counts(std::vector<std::int32_t>(count(c), 77)),
        weights(std::vector<float>(indices.values().size(), 77)),
        residual_norms(std::vector<float>(count(c), 77)) {}
  static std::size_t count(const Case& c) {
    return c.signals.size() / static_cast<std::size_t>(c.dim);
  }
  void fill(PursuitProblem* p) const {
    p->atoms = rows.get();
    p->signals = x.get();
    p->indices = indices.get();
    p->weights = weights.get();
    p->counts = counts.get();
    p->residual_norms = residual_norms.get();
  }
  DeviceArray<float> rows, x;
  DeviceArray<std::int32_t> indices, counts;
  DeviceArray<float> weights, residual_norms;
};

TEST_F(PursuitOnDevice, PreparedAtomsServeTheNextCall) {
  if (!is_available(cuda::PursuitPath::kTensor)) GTEST_SKIP() << "nothing is prepared";
  const Case c = isotropic(200, 64, 20, 3);
  PursuitProblem p = problem_of(c, 4, kOmp, 0);
  const OnDevice arrays(c, 4);
  arrays.fill(&p);
  cuda::PursuitPlan plan;
  ASSERT_TRUE(cuda::plan_pursuit(p, cuda::PursuitPath::kTensor, &plan).ok());
  const DeviceMemory workspace(plan.workspace_bytes);
  const OnDevice first(c, 4);
  first.fill(&p);
  ASSERT_TRUE(cuda::pursuit(p, plan, workspace.get(), false, nullptr).ok());
  const OnDevice second(c, 4);
  second.fill(&p);
  test::RuntimeFaults calls(-1);
  ASSERT_TRUE(cuda::pursuit(p, plan, workspace.get(), true, nullptr).ok());
  EXPECT_LE(calls.calls(), 2) << "one launch, and one question for its shared memory";
  EXPECT_EQ(first.indices.values(), second.indices.values());
  EXPECT_EQ(first.weights.values(), second.weights.values());
}

TEST_F(PursuitOnDevice, CallOfTheRuntimeThatFailsIsReportedAndNothingIsWritten) {
  const Case c = isotropic(128, 64, 10, 3);
  for (const auto path : {cuda::PursuitPath::kPlain, cuda::PursuitPath::kAuto}) {
    for (int fail_at = 0;; ++fail_at) {
      PursuitProblem p = problem_of(c, 4, kOmp, 0);
      const OnDevice arrays(c, 4);
      arrays.fill(&p);
      cuda::PursuitPlan needed;
      ASSERT_TRUE(cuda::plan_pursuit(p, path, &needed).ok());
      const DeviceMemory workspace(needed.workspace_bytes);
      bool ok = false, all_made = false;
      {
        test::RuntimeFaults faults(fail_at);
        cuda::PursuitPlan plan;
        const std::size_t none = plan.workspace_bytes;
        Status status = cuda::plan_pursuit(p, path, &plan);
        if (!status.ok()) {
          EXPECT_EQ(plan.workspace_bytes, none) << "a plan that failed was written";
        }
        if (status.ok()) status = cuda::pursuit(p, plan, workspace.get(), false, nullptr);
        ok = status.ok();
        all_made = fail_at >= faults.calls();
        EXPECT_EQ(ok, all_made) << faults.failed() << ": " << status.what;
        EXPECT_GT(std::string(status.what).size(), 1u);
      }
      if (all_made) break;
      EXPECT_EQ(arrays.indices.values(), std::vector<std::int32_t>(40, 77));
      EXPECT_EQ(arrays.counts.values(), std::vector<std::int32_t>(10, 77));
      EXPECT_EQ(arrays.weights.values(), std::vector<float>(40, 77));
      EXPECT_EQ(arrays.residual_norms.values(), std::vector<float>(10, 77));
    }
  }
}

}  // namespace
}  // namespace lexico::kernels
