// The contract of pursuit, on every instruction set level this machine has, in both forms and for
// each rule, against a slow reference in double.
#include "kernels/pursuit/pursuit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/common/cpu_features.h"
#include "kernels/pursuit/levels.h"
#include "tests/kernels/level_amx_emulated.h"

namespace lexico::kernels {
namespace {

struct Rule {
  const char* name;
  PursuitRule rule;
  int candidates;
};
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

struct Case {
  int dictionaries = 1, atoms = 0, dim = 0;
  std::vector<float> rows, signals;
  std::int64_t num_signals() const {
    return static_cast<std::int64_t>(signals.size()) / dim / dictionaries;
  }
  const float* row(int n) const { return rows.data() + static_cast<std::size_t>(n * dim); }
  const float* signal(std::int64_t b) const { return signals.data() + b * dim; }
  void append(const std::vector<float>& signal) {
    signals.insert(signals.end(), signal.begin(), signal.end());
  }
};

struct Codes {
  int max_atoms = 0;
  std::vector<std::int32_t> indices, counts;
  std::vector<float> weights, residual_norms, curve;
  bool operator==(const Codes&) const = default;
  std::vector<std::int32_t> picks(std::int64_t b) const {
    const auto first = indices.begin() + b * max_atoms;
    return {first, first + counts[static_cast<std::size_t>(b)]};
  }
};

void normalize(float* row, int dim) {
  double norm2 = 0;
  for (int k = 0; k < dim; ++k) norm2 += double{row[k]} * row[k];
  for (int k = 0; k < dim; ++k) row[k] = static_cast<float>(row[k] / std::sqrt(norm2));
}

// Random unit atoms; signals are sums of a few of them plus noise.
Case isotropic(int atoms, int dim, std::int64_t signals, unsigned seed, int dictionaries = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Case c{dictionaries, atoms, dim, {}, {}};
  c.rows.resize(static_cast<std::size_t>(dictionaries * atoms * dim));
  for (float& x : c.rows) x = normal(random);
  for (int n = 0; n < dictionaries * atoms; ++n) normalize(c.rows.data() + n * dim, dim);
  for (int p = 0; p < dictionaries; ++p) {
    for (std::int64_t b = 0; b < signals; ++b) {
      std::vector<float> x(static_cast<std::size_t>(dim));
      for (float& value : x) value = 0.1f * normal(random);
      for (int i = 0; i < 6; ++i) {
        const float weight = normal(random);
        const int n = p * atoms + static_cast<int>(random() % static_cast<unsigned>(atoms));
        for (int k = 0; k < dim; ++k) x[static_cast<std::size_t>(k)] += weight * c.row(n)[k];
      }
      c.append(x);
    }
  }
  return c;
}

// Atoms around a few centres: neighbours have correlations near 1.
Case coherent(int atoms, int dim, std::int64_t signals, unsigned seed) {
  Case c = isotropic(atoms, dim, signals, seed);
  std::mt19937 random(seed + 1);
  std::normal_distribution<float> normal;
  for (int n = 8; n < atoms; ++n) {
    for (int k = 0; k < dim; ++k) {
      c.rows[static_cast<std::size_t>(n * dim + k)] = c.row(n % 8)[k] + 0.05f * normal(random);
    }
    normalize(c.rows.data() + n * dim, dim);
  }
  return c;
}

Codes encode(const Case& c,
             int max_atoms,
             const Variant& v,
             float tolerance = 0,
             int threads = 2,
             const std::int32_t* budgets = nullptr) {
  PursuitProblem p;
  p.num_dictionaries = c.dictionaries;
  p.num_signals = c.num_signals();
  p.num_atoms = c.atoms;
  p.dim = c.dim;
  p.max_atoms = max_atoms;
  p.rule = v.rule.rule;
  p.candidates = v.rule.candidates;
  p.relative_tolerance = tolerance;
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

struct Reference {
  std::vector<int> picks;
  std::vector<double> weights;
  double residual_norm = 0;
};

// The definition, in double: orthogonalise every atom against the chosen ones for each pick.
Reference reference(const Case& c, const float* signal, int max_atoms, const Rule& rule) {
  const int m = c.dim;
  std::vector<double> r(signal, signal + m);
  std::vector<std::vector<double>> basis, triangle;
  std::vector<double> a;
  std::set<int> candidates;
  Reference result;
  const auto dot = [m](const auto* x, const auto* y) {
    double s = 0;
    for (int k = 0; k < m; ++k) s += double{x[k]} * y[k];
    return s;
  };
  for (int k = 0; k < max_atoms; ++k) {
    std::vector<std::pair<double, int>> by_correlation;
    for (int n = 0; n < c.atoms; ++n) {
      if (std::find(result.picks.begin(), result.picks.end(), n) == result.picks.end()) {
        double s = 0;
        for (int e = 0; e < m; ++e) s += c.row(n)[e] * r[static_cast<std::size_t>(e)];
        by_correlation.push_back({-std::abs(s), n});
      }
    }
    std::sort(by_correlation.begin(), by_correlation.end());
    if (by_correlation.empty()) break;
    int pick = by_correlation[0].second;
    if (rule.rule == PursuitRule::kOls) {
      const std::size_t among =
          rule.candidates > 0 ? std::min<std::size_t>(static_cast<std::size_t>(rule.candidates),
                                                      by_correlation.size())
                              : by_correlation.size();
      for (std::size_t i = 0; i < among; ++i) candidates.insert(by_correlation[i].second);
      double best = -1;
      for (const auto& [minus_correlation, n] : by_correlation) {
        if (!candidates.contains(n)) continue;
        const float* d = c.row(n);
        double n2 = dot(d, d);
        for (const auto& u : basis) {
          double s = 0;
          for (int e = 0; e < m; ++e) s += d[e] * u[static_cast<std::size_t>(e)];
          n2 -= s * s;
        }
        const double score = minus_correlation * minus_correlation / n2;
        if (n2 > 1e-5 && score > best) {
          best = score;
          pick = n;
        }
      }
    }
    std::vector<double> u(c.row(pick), c.row(pick) + m), column(basis.size());
    for (int twice = 0; twice < 2; ++twice) {
      for (std::size_t i = 0; i < basis.size(); ++i) {
        const double s = dot(u.data(), basis[i].data());
        column[i] += s;
        for (int e = 0; e < m; ++e)
          u[static_cast<std::size_t>(e)] -= s * basis[i][static_cast<std::size_t>(e)];
      }
    }
    const double nu = std::sqrt(dot(u.data(), u.data()));
    for (double& x : u) x /= nu;
    const double amplitude = dot(u.data(), r.data());
    for (int e = 0; e < m; ++e)
      r[static_cast<std::size_t>(e)] -= amplitude * u[static_cast<std::size_t>(e)];
    column.push_back(nu);
    basis.push_back(u);
    triangle.push_back(column);
    a.push_back(amplitude);
    result.picks.push_back(pick);
  }
  result.weights = a;
  for (std::size_t k = a.size(); k-- > 0;) {
    result.weights[k] /= triangle[k][k];
    for (std::size_t i = 0; i < k; ++i) result.weights[i] -= triangle[k][i] * result.weights[k];
  }
  result.residual_norm = std::sqrt(dot(r.data(), r.data()));
  return result;
}

// |x - D w|, with what was written out.
double true_residual(const Case& c, const Codes& codes, std::int64_t b) {
  std::vector<double> r(c.signal(b), c.signal(b) + c.dim);
  for (int k = 0; k < codes.counts[static_cast<std::size_t>(b)]; ++k) {
    const std::size_t slot = static_cast<std::size_t>(b * codes.max_atoms + k);
    for (int e = 0; e < c.dim; ++e) {
      r[static_cast<std::size_t>(e)] -= double{codes.weights[slot]} * c.row(codes.indices[slot])[e];
    }
  }
  double norm2 = 0;
  for (double x : r) norm2 += x * x;
  return std::sqrt(norm2);
}

double norm(const float* x, int dim) {
  double norm2 = 0;
  for (int k = 0; k < dim; ++k) norm2 += double{x[k]} * x[k];
  return std::sqrt(norm2);
}

class PursuitContract : public ::testing::TestWithParam<Variant> {
 protected:
  void SetUp() override { ASSERT_TRUE(cpu::set_pursuit_level(GetParam().level.c_str()).ok()); }
  void TearDown() override { ASSERT_TRUE(cpu::set_pursuit_level(nullptr).ok()); }

  // What holds for any input: slots in order, no atom twice, finite, |r| as reported and never
  // growing.
  void expect_sound(const Case& c, const Codes& codes) {
    for (std::int64_t b = 0; b < c.num_signals(); ++b) {
      const std::size_t first = static_cast<std::size_t>(b * codes.max_atoms);
      const int count = codes.counts[static_cast<std::size_t>(b)];
      ASSERT_GE(count, 0);
      ASSERT_LE(count, codes.max_atoms);
      std::vector<std::int32_t> picks = codes.picks(b);
      std::sort(picks.begin(), picks.end());
      EXPECT_EQ(std::adjacent_find(picks.begin(), picks.end()), picks.end()) << "signal " << b;
      for (int k = 0; k < codes.max_atoms; ++k) {
        const std::size_t slot = first + static_cast<std::size_t>(k);
        if (k < count) {
          EXPECT_GE(codes.indices[slot], 0);
          EXPECT_LT(codes.indices[slot], c.atoms);
          EXPECT_TRUE(std::isfinite(codes.weights[slot]));
        } else {
          EXPECT_EQ(codes.indices[slot], -1);
          EXPECT_EQ(codes.weights[slot], 0);
        }
        if (k > 0) {
          EXPECT_FALSE(codes.curve[slot] > codes.curve[slot - 1]);
        }
      }
      const double size = norm(c.signal(b), c.dim);
      if (!std::isfinite(size)) continue;
      const float last = codes.curve[first + static_cast<std::size_t>(codes.max_atoms) - 1];
      EXPECT_EQ(last, codes.residual_norms[static_cast<std::size_t>(b)]);
      EXPECT_LE(codes.residual_norms[static_cast<std::size_t>(b)], size * (1 + 1e-6));
      EXPECT_NEAR(codes.residual_norms[static_cast<std::size_t>(b)],
                  true_residual(c, codes, b),
                  5e-5 * size + 1e-44)
          << "signal " << b;
    }
  }
};

TEST_P(PursuitContract, AgreesWithTheDefinitionInDouble) {
  for (const auto& [atoms, dim, s] :
       {std::tuple{192, 32, 6}, {300, 64, 8}, {1024, 128, 12}, {70, 40, 5}, {64, 200, 16}}) {
    const Case c = isotropic(atoms, dim, 40, 3);
    const Codes codes = encode(c, s, GetParam());
    expect_sound(c, codes);
    int same = 0;
    for (std::int64_t b = 0; b < c.num_signals(); ++b) {
      const Reference want = reference(c, c.signal(b), s, GetParam().rule);
      const std::vector<std::int32_t> picks = codes.picks(b);
      if (!std::equal(picks.begin(), picks.end(), want.picks.begin(), want.picks.end())) continue;
      ++same;
      EXPECT_NEAR(codes.residual_norms[static_cast<std::size_t>(b)], want.residual_norm, 1e-5);
      for (int k = 0; k < s; ++k) {
        EXPECT_NEAR(codes.weights[static_cast<std::size_t>(b * s + k)],
                    want.weights[static_cast<std::size_t>(k)],
                    1e-4);
      }
    }
    EXPECT_EQ(same, c.num_signals()) << atoms << " atoms of dimension " << dim;
  }
}

TEST_P(PursuitContract, ErrorOnCoherentAtomsIsThatOfDouble) {
  const Case c = coherent(256, 64, 60, 5);
  const Codes codes = encode(c, 16, GetParam());
  expect_sound(c, codes);
  double ours = 0, want = 0;
  for (std::int64_t b = 0; b < c.num_signals(); ++b) {
    ours += codes.residual_norms[static_cast<std::size_t>(b)] / norm(c.signal(b), c.dim);
    want += reference(c, c.signal(b), 16, GetParam().rule).residual_norm / norm(c.signal(b), c.dim);
  }
  EXPECT_LE(ours, want * 1.0005);
}

// Where atoms are close to each other, it matters which of them are candidates.
TEST_P(PursuitContract, PicksAmongCoherentAtomsAreThoseOfDouble) {
  const Case c = coherent(256, 64, 60, 5);
  const Codes codes = encode(c, 8, GetParam());
  int same = 0;
  for (std::int64_t b = 0; b < c.num_signals(); ++b) {
    const Reference want = reference(c, c.signal(b), 8, GetParam().rule);
    const std::vector<std::int32_t> picks = codes.picks(b);
    same += std::equal(picks.begin(), picks.end(), want.picks.begin(), want.picks.end());
  }
  EXPECT_GE(same, 58);  // two may have scores that are equal in fp32
}

// All elements of an atom are rounded alike, so errors of a screen add up where others cancel.
TEST_P(PursuitContract, AtomsOfEqualElementsAreScreenedAsWell) {
  for (const int dim : {32, 128}) {
    Case c = isotropic(3 * dim, dim, 0, 3);
    for (int n = 0; n < 2 * dim; ++n) {  // unit vectors, then rows of a Hadamard matrix
      for (int k = 0; k < dim; ++k) {
        const bool minus = __builtin_popcount(static_cast<unsigned>(n & k)) % 2 != 0;
        c.rows[static_cast<std::size_t>(n * dim + k)] =
            n < dim ? (n == k ? 1.0f : 0.0f)
                    : (minus ? -1.0f : 1.0f) / std::sqrt(static_cast<float>(dim));
      }
    }
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (int b = 0; b < 60; ++b) {
      std::vector<float> x(static_cast<std::size_t>(dim));
      for (float& value : x) value = 1e-3f * normal(random);
      for (int i = 0; i < 4; ++i) {
        const float weight = normal(random);
        const int n = static_cast<int>(random() % static_cast<unsigned>(3 * dim));
        for (int k = 0; k < dim; ++k) x[static_cast<std::size_t>(k)] += weight * c.row(n)[k];
      }
      c.append(x);
    }
    const Codes codes = encode(c, 4, GetParam());
    expect_sound(c, codes);
    for (std::int64_t b = 0; b < c.num_signals(); ++b) {
      const Reference want = reference(c, c.signal(b), 4, GetParam().rule);
      EXPECT_EQ(codes.picks(b), std::vector<std::int32_t>(want.picks.begin(), want.picks.end()))
          << "signal " << b << " of dimension " << dim;
    }
  }
}

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

TEST_P(PursuitContract, AllShapesAreSound) {
  struct Sizes {
    int atoms, dim, max_atoms, signals, dictionaries;
  };
  for (const Sizes& z : {Sizes{64, 32, 32, 3, 1},
                         {64, 36, 5, 1, 1},
                         {65, 33, 9, 7, 2},
                         {1000, 100, 64, 2, 1},
                         {300, 256, 64, 2, 3},
                         {2100, 72, 8, 5, 1},
                         {257, 250, 250, 1, 1},
                         {1, 8, 1, 2, 1}}) {
    const Case c = isotropic(z.atoms, z.dim, z.signals, 31, z.dictionaries);
    const Codes codes = encode(c, z.max_atoms, GetParam());
    if (z.dictionaries == 1) expect_sound(c, codes);
    for (const std::int32_t count : codes.counts) {
      // The last direction of all may hold no more than rounding errors.
      EXPECT_GE(count, z.max_atoms == z.dim ? z.dim - 1 : z.max_atoms)
          << z.atoms << " atoms of dimension " << z.dim;
    }
    for (const float w : codes.weights) EXPECT_TRUE(std::isfinite(w));
  }
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

TEST_P(PursuitContract, DictionariesSideBySideAreEncodedAsIfAlone) {
  const Case c = isotropic(128, 32, 30, 21, 3);
  const Codes all = encode(c, 6, GetParam());
  for (int p = 0; p < 3; ++p) {
    Case one{1, 128, 32, {}, {}};
    one.rows.assign(c.rows.begin() + p * 128 * 32, c.rows.begin() + (p + 1) * 128 * 32);
    one.signals.assign(c.signals.begin() + p * 30 * 32, c.signals.begin() + (p + 1) * 30 * 32);
    const Codes codes = encode(one, 6, GetParam());
    EXPECT_TRUE(
        std::equal(codes.indices.begin(), codes.indices.end(), all.indices.begin() + p * 30 * 6));
    EXPECT_TRUE(
        std::equal(codes.weights.begin(), codes.weights.end(), all.weights.begin() + p * 30 * 6));
    EXPECT_TRUE(std::equal(codes.curve.begin(), codes.curve.end(), all.curve.begin() + p * 30 * 6));
  }
}

TEST_P(PursuitContract, CurveIsTheErrorOfEveryShorterRun) {
  const Case c = isotropic(256, 64, 20, 2);
  const Codes codes = encode(c, 8, GetParam());
  for (int s = 1; s < 8; ++s) {
    const Codes shorter = encode(c, s, GetParam());
    for (std::size_t b = 0; b < 20; ++b) {
      EXPECT_EQ(shorter.residual_norms[b], codes.curve[b * 8 + static_cast<std::size_t>(s) - 1]);
    }
  }
}

TEST_P(PursuitContract, ToleranceStopsAtTheFirstErrorBelowIt) {
  const Case c = isotropic(256, 64, 50, 4);
  const Codes full = encode(c, 12, GetParam()), codes = encode(c, 12, GetParam(), 0.3f);
  expect_sound(c, codes);
  for (std::size_t b = 0; b < 50; ++b) {
    const float bound =
        0.3f * static_cast<float>(norm(c.signal(static_cast<std::int64_t>(b)), c.dim));
    int want = 0;
    while (want < 12 &&
           (want == 0 || full.curve[b * 12 + static_cast<std::size_t>(want) - 1] > bound))
      ++want;
    EXPECT_EQ(codes.counts[b], want);
  }
}

TEST_P(PursuitContract, BudgetsHoldPerSignal) {
  const Case c = isotropic(256, 64, 9, 4);
  const std::vector<std::int32_t> budgets = {0, 1, 2, 3, 8, 9, 1000, -5, 4};
  const Codes codes = encode(c, 8, GetParam(), 0, 2, budgets.data());
  expect_sound(c, codes);
  const Codes full = encode(c, 8, GetParam());
  for (std::size_t b = 0; b < 9; ++b) {
    const int want = std::clamp(budgets[b], 0, 8);
    ASSERT_EQ(codes.counts[b], want);
    EXPECT_TRUE(std::equal(codes.indices.begin() + static_cast<std::ptrdiff_t>(b) * 8,
                           codes.indices.begin() + static_cast<std::ptrdiff_t>(b) * 8 + want,
                           full.indices.begin() + static_cast<std::ptrdiff_t>(b) * 8));
  }
}

TEST_P(PursuitContract, ZeroSignalGetsNoAtoms) {
  Case c = isotropic(128, 32, 5, 1);
  std::fill_n(c.signals.begin() + 2 * 32, 32, 0.0f);
  const Codes codes = encode(c, 4, GetParam());
  expect_sound(c, codes);
  EXPECT_EQ(codes.counts[2], 0);
  EXPECT_EQ(codes.residual_norms[2], 0);
  EXPECT_EQ(codes.counts[1], 4);
  EXPECT_EQ(codes.counts[3], 4);
}

TEST_P(PursuitContract, NotFiniteSignalGetsNoAtomsAndLeavesItsNeighboursAlone) {
  const Case clean = isotropic(128, 40, 30, 1);
  const Codes want = encode(clean, 4, GetParam());
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    Case c = clean;
    c.signals[7 * 40 + 39] = bad;
    c.signals[13 * 40] = bad;
    const Codes codes = encode(c, 4, GetParam());
    for (std::size_t b = 0; b < 30; ++b) {
      const bool hit = b == 7 || b == 13;
      EXPECT_EQ(codes.counts[b], hit ? 0 : 4);
      EXPECT_EQ(std::isnan(codes.residual_norms[b]), hit);
      for (std::size_t k = 0; k < 4; ++k) {
        EXPECT_EQ(codes.indices[b * 4 + k], hit ? -1 : want.indices[b * 4 + k]);
        EXPECT_EQ(codes.weights[b * 4 + k], hit ? 0 : want.weights[b * 4 + k]);
        EXPECT_EQ(std::isnan(codes.curve[b * 4 + k]), hit);
      }
    }
  }
}

TEST_P(PursuitContract, ScaleOfASignalDoesNotMatter) {
  const Case c = isotropic(256, 64, 12, 8);
  const Codes want = encode(c, 6, GetParam());
  for (const float scale : {1e30f, 0x1p100f, 0x1p-100f, 0x1p-141f}) {  // the last: subnormal
    Case scaled = c;
    for (float& x : scaled.signals) x *= scale;
    const Codes codes = encode(scaled, 6, GetParam());
    // Of a subnormal only a few bits are left, so its picks may differ.
    if (scale > 1e-40f) {
      expect_sound(scaled, codes);
      EXPECT_EQ(codes.indices, want.indices);
      for (std::size_t i = 0; i < want.weights.size(); ++i) {
        EXPECT_NEAR(codes.weights[i] / scale, want.weights[i], 1e-5);
      }
    } else {
      for (std::size_t b = 0; b < 12; ++b) {
        EXPECT_GE(codes.counts[b], 1);
        EXPECT_LT(true_residual(scaled, codes, static_cast<std::int64_t>(b)),
                  0.9 * norm(scaled.signal(static_cast<std::int64_t>(b)), 64));
      }
    }
  }
  Case huge = c;  // elements near the largest float: |x| itself is not one
  for (float& x : huge.signals) x = x > 0 ? 3e38f : -3e38f;
  for (const float w : encode(huge, 6, GetParam()).weights) EXPECT_TRUE(std::isfinite(w));
}

TEST_P(PursuitContract, SignalThatIsAnAtomTakesThatAtomAlone) {
  Case c = isotropic(200, 48, 0, 6);
  for (int n : {0, 57, 199}) {
    std::vector<float> x(c.row(n), c.row(n) + 48);
    for (float& v : x) v *= -2.5f;
    c.append(x);
  }
  const Codes codes = encode(c, 5, GetParam());
  expect_sound(c, codes);
  for (std::size_t b = 0; b < 3; ++b) {
    EXPECT_EQ(codes.counts[b], 1);
    EXPECT_EQ(codes.indices[b * 5], (std::vector<int>{0, 57, 199})[b]);
    EXPECT_NEAR(codes.weights[b * 5], -2.5f, 1e-5);
  }
}

TEST_P(PursuitContract, ExactlyTwoSparseSignalTakesTwoAtoms) {
  Case c = isotropic(100, 64, 0, 6);
  for (int n = 0; n < 20; ++n) {
    std::vector<float> x(64);
    for (std::size_t k = 0; k < 64; ++k) x[k] = 1.5f * c.row(n)[k] - 0.8f * c.row(n + 40)[k];
    c.append(x);
  }
  const Codes codes = encode(c, 8, GetParam());
  expect_sound(c, codes);
  for (std::size_t b = 0; b < 20; ++b) {
    EXPECT_EQ(codes.counts[b], 2) << b;
    EXPECT_LE(codes.residual_norms[b], 1e-6f * 2);
  }
}

TEST_P(PursuitContract, OfEqualAtomsTheLowestIndexIsTakenAndNoneTwice) {
  Case c = isotropic(90, 32, 25, 12);
  for (int n = 0; n < 30; ++n) {  // atoms 30..89 repeat 0..29, twice
    std::copy_n(c.row(n), 32, c.rows.begin() + (30 + n) * 32);
    std::copy_n(c.row(n), 32, c.rows.begin() + (60 + n) * 32);
  }
  const Codes codes = encode(c, 12, GetParam());
  expect_sound(c, codes);
  for (std::int64_t b = 0; b < c.num_signals(); ++b) {
    EXPECT_EQ(codes.counts[static_cast<std::size_t>(b)], 12);
    for (const std::int32_t pick : codes.picks(b)) EXPECT_LT(pick, 30);
  }
}

TEST_P(PursuitContract, NearlyEqualAtomsDoNotBreakTheWeights) {
  Case c = isotropic(64, 32, 25, 12);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int n = 0; n < 32; ++n) {
    for (int k = 0; k < 32; ++k) {
      c.rows[static_cast<std::size_t>((n + 32) * 32 + k)] = c.row(n)[k] + 1e-6f * normal(random);
    }
    normalize(c.rows.data() + (n + 32) * 32, 32);
  }
  for (const int s : {8, 32}) {
    const Codes codes = encode(c, s, GetParam());
    expect_sound(c, codes);
    for (const float w : codes.weights) EXPECT_LT(std::abs(w), 1e4f);
  }
}

TEST_P(PursuitContract, ZeroAtomIsNeverTaken) {
  Case c = isotropic(40, 32, 10, 12);
  std::fill_n(c.rows.begin() + 7 * 32, 32, 0.0f);
  const Codes codes = encode(c, 32, GetParam());
  expect_sound(c, codes);
  EXPECT_EQ(std::count(codes.indices.begin(), codes.indices.end(), 7), 0);
  Case all_zero = c;
  std::fill(all_zero.rows.begin(), all_zero.rows.end(), 0.0f);
  const Codes none = encode(all_zero, 4, GetParam());
  expect_sound(all_zero, none);
  for (const std::int32_t count : none.counts) EXPECT_EQ(count, 0);
}

TEST_P(PursuitContract, DictionaryOfLowRankGivesNoMoreAtomsThanItsRank) {
  Case c = isotropic(80, 32, 15, 12);
  for (int n = 0; n < 80; ++n) {  // atoms live in 5 dimensions
    std::fill_n(c.rows.begin() + n * 32 + 5, 27, 0.0f);
    normalize(c.rows.data() + n * 32, 32);
  }
  const Codes codes = encode(c, 10, GetParam());
  expect_sound(c, codes);
  for (std::size_t b = 0; b < 15; ++b) {
    EXPECT_LE(codes.counts[b], 5);
    double outside = 0;
    for (std::size_t k = 5; k < 32; ++k) outside += std::pow(c.signals[b * 32 + k], 2);
    EXPECT_NEAR(codes.residual_norms[b], std::sqrt(outside), 2e-2 * std::sqrt(outside));
  }
}

TEST_P(PursuitContract, FewerAtomsThanAskedForAreAllThereIs) {
  const Case c = isotropic(5, 32, 10, 12);
  const Codes codes = encode(c, 9, GetParam());
  expect_sound(c, codes);
  for (const std::int32_t count : codes.counts) EXPECT_EQ(count, 5);
}

TEST_P(PursuitContract, AsManyAtomsAsDimensionsLeaveNoResidual) {
  for (const int dim : {32, 64}) {
    const Case c = isotropic(512, dim, 10, 12);
    const Codes codes = encode(c, dim, GetParam());
    expect_sound(c, codes);
    for (std::int64_t b = 0; b < 10; ++b) {
      EXPECT_LT(codes.residual_norms[static_cast<std::size_t>(b)], 1e-4 * norm(c.signal(b), dim));
    }
  }
}

TEST_P(PursuitContract, NoSignalsIsFine) {
  const Case c = isotropic(64, 32, 0, 12);
  EXPECT_TRUE(encode(c, 4, GetParam()).counts.empty());
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
