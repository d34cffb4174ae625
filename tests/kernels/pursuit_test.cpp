// The contract of pursuit, on every instruction set level this machine has, in both forms and for
// each rule, against a slow reference in double.
#include "kernels/pursuit/pursuit.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/common/cpu_features.h"
#include "kernels/pursuit/levels.h"
#include "tests/kernels/level_amx_emulated.h"
#include "tests/kernels/pursuit_cases.h"

namespace lexico::kernels {
namespace {

struct Variant {
  std::string level;
  PursuitForm form;
  Rule rule;
  std::string name() const {
    return level + (form == PursuitForm::kGram ? "_gram_" : "_correlate_") + rule.name;
  }
};
std::ostream& operator<<(std::ostream& out, const Variant& v) { return out << v.name(); }

std::vector<Variant> variants() {
#if defined(__x86_64__)
  if (cpu_features().avx512_vnni) cpu::offer_level(cpu::kEmulatedAmxLevel);
#endif
  std::vector<Variant> all;
  std::istringstream levels(cpu::pursuit_levels());
  for (std::string level; std::getline(levels, level, '|');) {
    for (const PursuitForm form : {PursuitForm::kCorrelate, PursuitForm::kGram}) {
      for (const Rule rule : {Rule{"omp", PursuitRule::kOmp, 0},
                              Rule{"ols", PursuitRule::kOls, 0},
                              Rule{"ols16", PursuitRule::kOls, 16}}) {
        all.push_back({level, form, rule});
      }
    }
  }
  return all;
}

Codes encode(const Case& c,
             int max_atoms,
             const Variant& v,
             float tolerance = 0,
             int threads = 2,
             const std::int32_t* budgets = nullptr) {
  PursuitProblem p = problem_of(c, max_atoms, v.rule, tolerance);
  p.threads = threads;
  p.form = v.form;
  p.atoms = c.rows.data();
  p.signals = c.signals.data();
  p.budgets = budgets;
  const std::size_t signals = c.signals.size() / static_cast<std::size_t>(c.dim);
  const std::size_t slots = signals * static_cast<std::size_t>(max_atoms);
  Codes codes{max_atoms,
              std::vector<std::int32_t>(slots, 77),
              std::vector<std::int32_t>(signals, 77),
              std::vector<float>(slots, 77),
              std::vector<float>(signals, 77),
              std::vector<float>(slots, 77)};
  p.indices = codes.indices.data();
  p.weights = codes.weights.data();
  p.counts = codes.counts.data();
  p.residual_norms = codes.residual_norms.data();
  p.curve = codes.curve.data();
  const cpu::PursuitPlan plan = cpu::plan_pursuit(p, p.num_signals);
  // Not a byte more than it asks for, so that a sanitizer sees a write beyond.
  std::vector<char> workspace(plan.workspace_bytes, 0x7f);
  EXPECT_TRUE(cpu::pursuit(p, plan, workspace.data(), false).ok());
  return codes;
}

class PursuitContract : public ::testing::TestWithParam<Variant> {
 protected:
  void SetUp() override { ASSERT_TRUE(cpu::set_pursuit_level(GetParam().level.c_str()).ok()); }
  void TearDown() override { ASSERT_TRUE(cpu::set_pursuit_level(nullptr).ok()); }
};

#include "tests/kernels/pursuit_contract.h"

TEST_P(PursuitContract, ThreadsAndBatchSplitDoNotChangeABit) {
  const Case c = isotropic(320, 64, 101, 9);
  const Codes whole = encode(c, 8, GetParam());
  EXPECT_TRUE(whole == encode(c, 8, GetParam(), 0, 1));
  EXPECT_TRUE(whole == encode(c, 8, GetParam(), 0, 5));
  Codes joined;
  joined.max_atoms = 8;
  for (std::int64_t first = 0; first < 101;) {
    const std::int64_t count = std::min<std::int64_t>(first == 0 ? 1 : 37, 101 - first);
    Case part = c;
    part.signals.assign(c.signal(first), c.signal(first) + count * c.dim);
    const Codes codes = encode(part, 8, GetParam());
    const auto append = [](auto& to, const auto& from) {
      to.insert(to.end(), from.begin(), from.end());
    };
    append(joined.indices, codes.indices);
    append(joined.counts, codes.counts);
    append(joined.weights, codes.weights);
    append(joined.residual_norms, codes.residual_norms);
    append(joined.curve, codes.curve);
    first += count;
  }
  EXPECT_TRUE(whole == joined);
}

TEST_P(PursuitContract, AnyNumberOfCandidatesGivesTheSameCodesInBothForms) {
  if (GetParam().rule.candidates == 0) return;
  const Case c = coherent(320, 40, 30, 3);
  for (const int candidates : {4, 64}) {
    Variant v = GetParam();
    v.rule.candidates = candidates;
    const Codes codes = encode(c, 10, v);
    expect_sound(c, codes);
    v.form = v.form == PursuitForm::kGram ? PursuitForm::kCorrelate : PursuitForm::kGram;
    EXPECT_TRUE(codes == encode(c, 10, v)) << candidates;
  }
}

TEST_P(PursuitContract, PicksAmongManyAtomsAreThoseOfDouble) {
  if (GetParam().form == PursuitForm::kGram) return;  // its matrix would be too large
  const Case c = isotropic(9000, 32, 6, 4);
  const Codes codes = encode(c, 6, GetParam());
  for (std::int64_t b = 0; b < c.num_signals(); ++b) {
    const Reference want = reference(c, c.signal(b), 6, GetParam().rule);
    EXPECT_EQ(codes.picks(b), std::vector<std::int32_t>(want.picks.begin(), want.picks.end()));
  }
}

TEST_P(PursuitContract, BothFormsGiveTheSameCodes) {
  Variant other = GetParam();
  other.form = other.form == PursuitForm::kGram ? PursuitForm::kCorrelate : PursuitForm::kGram;
  const Case c = isotropic(512, 64, 200, 17);
  EXPECT_TRUE(encode(c, 10, GetParam()) == encode(c, 10, other));
}

// Their screens err differently, most where atoms are nearly dependent: what they propose must not
// depend on it.
TEST_P(PursuitContract, BothFormsGiveTheSameCodesWhereScreensAreWorst) {
  Variant other = GetParam();
  other.form = other.form == PursuitForm::kGram ? PursuitForm::kCorrelate : PursuitForm::kGram;
  Case c = coherent(512, 64, 30, 17);
  for (int n = 256; n < 512; ++n) {  // half of the atoms have a twin 0.5 degrees away
    for (int k = 0; k < 64; ++k) {
      const float step = (n * 31 + k * 17) % 7 < 3 ? 1e-3f : -1e-3f;
      c.rows[static_cast<std::size_t>(n * 64 + k)] = c.row(n - 256)[k] + step;
    }
    normalize(c.rows.data() + n * 64, 64);
  }
  const Codes codes = encode(c, 40, GetParam());
  expect_sound(c, codes);
  EXPECT_TRUE(codes == encode(c, 40, other));
}

TEST_P(PursuitContract, SixtyFiveThousandAtomsNeedNoGramMatrixAndLessThanAGibibyte) {
  if (GetParam().form == PursuitForm::kGram) return;  // that would be a matrix of gibibytes
  Case c = isotropic(65536, 32, 3, 5);
  PursuitProblem p;
  p.num_signals = 1 << 20;
  p.num_atoms = c.atoms;
  p.dim = 256;
  p.max_atoms = 64;
  p.rule = GetParam().rule.rule;
  p.candidates = GetParam().rule.candidates;
  p.threads = 2;
  const cpu::PursuitPlan plan = cpu::plan_pursuit(p, p.num_signals);
  EXPECT_EQ(plan.form, PursuitForm::kCorrelate);
  EXPECT_LT(plan.workspace_bytes, std::size_t{1} << 30);
  expect_sound(c, encode(c, 8, GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Levels,
                         PursuitContract,
                         ::testing::ValuesIn(variants()),
                         [](const auto& test) { return test.param.name(); });

TEST(PursuitPlan, GramMatricesThatCannotBeKeptMustPayWithinOneCall) {
  ASSERT_TRUE(cpu::set_pursuit_level("generic").ok());
  PursuitProblem p;
  p.num_atoms = 4096;
  p.dim = 128;
  p.max_atoms = 8;
  p.num_signals = 64;
  p.num_dictionaries = 1;
  EXPECT_EQ(cpu::plan_pursuit(p, 1 << 20).form, PursuitForm::kGram);
  EXPECT_EQ(cpu::plan_pursuit(p, 64).form, PursuitForm::kCorrelate);
  p.num_dictionaries = 64;
  EXPECT_EQ(cpu::plan_pursuit(p, 1 << 20).form, PursuitForm::kCorrelate);
  p.num_signals = 1 << 20;
  const cpu::PursuitPlan plan = cpu::plan_pursuit(p, 1 << 20);
  EXPECT_EQ(plan.form, PursuitForm::kGram);
  EXPECT_LT(plan.wave, 64);
  EXPECT_LT(plan.workspace_bytes, std::size_t{300} << 20);
}

TEST(PursuitLevels, EnvironmentForcesEveryLevelThereIs) {
  std::istringstream levels(cpu::pursuit_levels());
  std::string level;
  while (std::getline(levels, level, '|')) {
    setenv("LEXICO_CPU", level.c_str(), 1);
    EXPECT_TRUE(cpu::set_pursuit_level(nullptr).ok());
    EXPECT_EQ(cpu::pursuit_level(), level);
  }
  setenv("LEXICO_CPU", "avx3", 1);
  const Status status = cpu::set_pursuit_level(nullptr);
  EXPECT_FALSE(status.ok());
  EXPECT_NE(std::string(status.what).find("'avx3', which is no speed level"), std::string::npos)
      << status.what;
  EXPECT_EQ(cpu::pursuit_level(), level) << "a refused name changes nothing";
  unsetenv("LEXICO_CPU");
  EXPECT_TRUE(cpu::set_pursuit_level(nullptr).ok());
  EXPECT_EQ(cpu::pursuit_level(), level) << "the best comes last";
}

#if defined(__x86_64__)
TEST(PursuitLevels, LevelThatPicksOtherwiseDoesNotAgree) {
  if (!cpu_features().avx512_vnni) GTEST_SKIP() << "the emulation needs AVX-512 VNNI";
  EXPECT_TRUE(cpu::agrees(cpu::kEmulatedAmxLevel, cpu::kGenericLevel));
  cpu::PursuitLevel wrong = cpu::kGenericLevel;
  wrong.prepare_panel =
      [](const cpu::PursuitShape& shape, const cpu::PreparedAtoms& atoms, int panel) {
        cpu::kGenericLevel.prepare_panel(shape, atoms, panel);
        static_cast<float*>(atoms.panels)[0] = 3;  // one number of one atom
      };
  EXPECT_FALSE(cpu::agrees(wrong, cpu::kGenericLevel));
}
#endif

TEST(PursuitLevels, LevelThisCpuLacksIsSaidToBeLacking) {
  const std::string here = cpu::pursuit_levels();
  for (const char* name : {"avx2", "avx512", "avx512vnni", "amx"}) {
    const Status status = cpu::set_pursuit_level(name);
    if (("|" + here + "|").find("|" + std::string(name) + "|") != std::string::npos) {
      EXPECT_TRUE(status.ok()) << name;
    } else {
      EXPECT_NE(std::string(status.what).find("which this CPU cannot run"), std::string::npos)
          << status.what;
    }
  }
  EXPECT_TRUE(cpu::set_pursuit_level(nullptr).ok());
}

TEST(PursuitLevels, UnknownNameIsRefusedWithTheOnesThereAre) {
  const Status status = cpu::set_pursuit_level("sse9");
  EXPECT_FALSE(status.ok());
  EXPECT_NE(std::string(status.what).find("generic"), std::string::npos) << status.what;
  EXPECT_TRUE(cpu::set_pursuit_level(nullptr).ok());
}

}  // namespace
}  // namespace lexico::kernels
