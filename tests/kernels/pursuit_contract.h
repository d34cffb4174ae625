#pragma once
// The contract of pursuit as test cases, for any backend. Who includes this, in an unnamed
// namespace, has before: a type Variant with a member `rule`, the fixture PursuitContract with a
// parameter of that type, and encode(case, max_atoms, variant, tolerance = 0, threads = 2, budgets
// = nullptr).

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
