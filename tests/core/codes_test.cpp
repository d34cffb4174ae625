// The contracts of lexico/codes.h and lexico/fit_codes.h.
#include "lexico/codes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "core/levels.h"
#include "core/random.h"
#include "core/trellis.h"
#include "lexico/error.h"
#include "lexico/evaluation.h"
#include "lexico/fit_codes.h"
#include "support/message_of.h"

namespace lexico {
namespace {

constexpr int kDim = 16, kHeads = 2;

std::size_t size_of(std::int64_t n) { return static_cast<std::size_t>(n); }

// A few atoms of `dictionary`, some noise, and another scale of the axes for each head.
std::vector<float> sample(const Dictionary& dictionary, std::int64_t rows, std::uint64_t seed) {
  detail::Random random({seed});
  std::vector<float> vectors(size_of(rows * dictionary.dim));
  for (std::int64_t r = 0; r < rows; ++r)
    for (int k = 0; k < 4; ++k) {
      const float* atom =
          dictionary.atoms.data() +
          random.below(static_cast<std::uint64_t>(dictionary.num_atoms)) * size_of(dictionary.dim);
      const auto weight = static_cast<float>(random.normal() * (4.0 / (k + 1)));
      for (int d = 0; d < dictionary.dim; ++d)
        vectors[size_of(r * dictionary.dim + d)] +=
            weight * atom[d] +
            0.1f * static_cast<float>(random.normal()) * static_cast<float>(1 + (d + r) % 2);
    }
  return vectors;
}

double error_of(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    sum += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    norm += std::pow(static_cast<double>(a[i]), 2);
  }
  return std::sqrt(sum / norm);
}

std::vector<float> reconstructed(const Dictionary& d, const std::vector<float>& vectors) {
  EncodeOptions options;
  options.threads = 1;
  Codec codec(d, options);
  std::vector<float> out(vectors.size());
  codec.reconstruct(vectors.data(), static_cast<std::int64_t>(vectors.size()) / d.dim, out.data());
  return out;
}

TEST(Formats, BitsAreThoseOfTheirParts) {
  CodeFormat f;
  EXPECT_EQ(f.bits_per_vector(1024, 64), 0);
  f.max_atoms = 8;
  EXPECT_EQ(f.bits_per_vector(1024, 64), 512);
  f.coding = CodeFormat::Coding::kFp8Int16;
  EXPECT_EQ(f.bytes_per_vector(1024, 64), 26);  // 3 s + 2
  f.coding = CodeFormat::Coding::kPacked;
  EXPECT_EQ(f.bits_per_vector(1024, 64), 8 + 8 * (10 + 5));
  EXPECT_EQ(f.bits_per_vector(1025, 64), 8 + 8 * (11 + 5));
  EXPECT_EQ(index_bits(1), 0);
  EXPECT_EQ(index_bits(2), 1);
  EXPECT_EQ(index_bits(4096), 12);
  for (const char* name : {"exact", "fp8-int16", "packed"}) {
    CodeFormat g;
    g.coding = coding_from(name);
    EXPECT_STREQ(g.name(), name);
  }
  EXPECT_NE(test::message_of<InvalidArgument>([] { coding_from("int4"); }).find("'int4'"),
            std::string::npos);
}

TEST(Codec, ExactReconstructsWithFullWeightsAndHasNoBytes) {
  Dictionary d = random_dictionary(0, Kind::kKeys, 40, kDim, 1);
  const std::vector<float> x = sample(d, 50, 2);
  d.format.max_atoms = kDim;  // as many atoms as dimensions span everything
  EXPECT_LT(error_of(x, reconstructed(d, x)), 1e-5);
  std::uint8_t byte = 0;
  Codec codec(d);
  EXPECT_THROW(codec.encode(x.data(), 1, &byte), InvalidArgument);
  EXPECT_THROW(codec.decode(&byte, 1, nullptr), InvalidArgument);
  d.format.max_atoms = 0;
  EXPECT_THROW(Codec{d}, InvalidArgument);
}

// Every width of index and weight, atoms with and without a residual code, both quantizers.
TEST(Codec, BytesDecodeToWhatReconstructGives) {
  for (int num_atoms : {1, 2, 3, 16, 17, 64, 200, 1000})
    for (int weight_bits = 2; weight_bits <= 8; ++weight_bits) {
      Dictionary d = random_dictionary(0, Kind::kKeys, num_atoms, kDim, 3);
      const std::vector<float> x = sample(d, 61, 4);
      CodeFitOptions options;
      options.threads = 1;
      options.max_atoms = std::min(3, num_atoms);
      options.weight_bits = weight_bits;
      options.scale_bits = num_atoms % 9;
      options.residual_bits = weight_bits % 3 == 0 ? 0 : 21;
      options.states = num_atoms % 2 == 0 ? 8 : 0;
      options.relative = options.scale_bits > 3;
      d.format = fit_codes(d, x.data(), 60, kHeads, options);
      Codec codec(d);
      EXPECT_EQ(codec.bits_per_vector(),
                options.scale_bits + options.max_atoms * (index_bits(num_atoms) + weight_bits) +
                    options.residual_bits);
      EXPECT_EQ(codec.bytes_per_vector(), (codec.bits_per_vector() + 7) / 8);
      for (int first_head : {0, 1}) {
        std::vector<std::uint8_t> bytes(size_of(61 * codec.bytes_per_vector()));
        std::vector<float> decoded(x.size()), direct = x;
        codec.encode(x.data(), 61, bytes.data(), first_head);
        codec.decode(bytes.data(), 61, decoded.data(), first_head);
        codec.reconstruct(direct.data(), 61, direct.data(), first_head);  // in place
        ASSERT_EQ(decoded, direct) << num_atoms << " atoms, " << weight_bits << " bits";
      }
    }
}

TEST(Codec, PublishedFormatRoundsWeightsToE4m3) {
  Dictionary d = random_dictionary(0, Kind::kKeys, 100, kDim, 5);
  const std::vector<float> x = sample(d, 300, 6);
  d.format.coding = CodeFormat::Coding::kFp8Int16;
  d.format.max_atoms = 4;
  Codec codec(d);
  EXPECT_EQ(codec.bytes_per_vector(), 14);
  std::vector<std::uint8_t> bytes(300 * 14);
  codec.encode(x.data(), 300, bytes.data());
  EXPECT_EQ(bytes[0], 4);  // the count comes first
  std::vector<float> decoded(x.size());
  codec.decode(bytes.data(), 300, decoded.data());
  EXPECT_EQ(decoded, reconstructed(d, x));
  Dictionary exact = d;
  exact.format.coding = CodeFormat::Coding::kExact;
  const double with = error_of(x, decoded), without = error_of(x, reconstructed(exact, x));
  EXPECT_GT(with, without);
  EXPECT_LT(with, without + 0.03);  // E4M3 keeps 3 bits: 1/32 of a weight at most, in the mean less
}

TEST(Codec, ZeroNanAndOutliersLeaveTheirNeighboursAlone) {
  Dictionary d = random_dictionary(0, Kind::kKeys, 100, kDim, 5);
  const std::vector<float> clean = sample(d, 400, 6);
  for (const bool published : {true, false})
    for (int scale_bits : {0, 8}) {
      CodeFitOptions options;
      options.threads = 1;
      options.max_atoms = 3;
      options.scale_bits = scale_bits;
      options.residual_bits = 30;
      d.format = fit_codes(d, clean.data(), 400, kHeads, options);
      if (published) {
        d.format = {};
        d.format.coding = CodeFormat::Coding::kFp8Int16;
        d.format.max_atoms = 3;
      }
      const std::vector<float> before = reconstructed(d, clean);
      std::vector<float> x = clean;
      for (int c = 0; c < kDim; ++c) {
        x[size_of(4 * kDim + c)] = 0;
        x[size_of(8 * kDim + c)] *= 1e6f;
      }
      x[size_of(2 * kDim)] = std::numeric_limits<float>::quiet_NaN();
      x[size_of(6 * kDim)] = std::numeric_limits<float>::infinity();
      Codec codec(d);
      std::vector<float> out(x.size());
      codec.reconstruct(x.data(), 400, out.data());
      EXPECT_EQ(codec.counts().vectors, 400);
      EXPECT_EQ(codec.counts().not_finite, 2);
      EXPECT_GE(codec.counts().saturated, 1);
      for (float v : out) ASSERT_TRUE(std::isfinite(v));
      for (int c = 0; c < kDim; ++c) {  // NaN and Inf are encoded as zero vectors of that head
        EXPECT_EQ(out[size_of(2 * kDim + c)], out[size_of(4 * kDim + c)]);
        EXPECT_EQ(out[size_of(6 * kDim + c)], out[size_of(4 * kDim + c)]);
        if (published) {
          EXPECT_EQ(out[size_of(4 * kDim + c)], 0.0f);
        }
        EXPECT_LT(std::fabs(out[size_of(4 * kDim + c)]), 3.0f);
      }
      for (int row : {1, 3, 5, 7, 9, 399})
        for (int c = 0; c < kDim; ++c)
          EXPECT_EQ(out[size_of(row * kDim + c)], before[size_of(row * kDim + c)]);
    }
}

TEST(Codec, BytesDependNeitherOnThreadsNorOnBatches) {
  Dictionary d = random_dictionary(0, Kind::kKeys, 100, kDim, 5);
  const std::vector<float> x = sample(d, 2500, 6);
  CodeFitOptions options;
  options.max_atoms = 3;
  options.residual_bits = 30;
  options.threads = 1;
  d.format = fit_codes(d, x.data(), 2500, kHeads, options);
  options.threads = 3;
  const CodeFormat again = fit_codes(d, x.data(), 2500, kHeads, options);
  EXPECT_EQ(again.residual.levels, d.format.residual.levels);
  EXPECT_EQ(again.residual.axes, d.format.residual.axes);
  EXPECT_EQ(again.weight_levels, d.format.weight_levels);
  EncodeOptions one, three;
  one.threads = 1;
  three.threads = 3;
  Codec whole(d, one), pieces(d, three);
  const auto stride = size_of(whole.bytes_per_vector());
  std::vector<std::uint8_t> a(2500 * stride), b(a.size());
  whole.encode(x.data(), 2500, a.data());
  for (std::int64_t first = 0, n = 1; first < 2500; first += n, n = std::min(3 * n, 2500 - first))
    pieces.encode(x.data() + first * kDim,
                  n,
                  b.data() + size_of(first) * stride,
                  static_cast<int>(first % kHeads));
  EXPECT_EQ(a, b);
}

TEST(Codec, AnyBytesDecodeToFiniteNumbers) {
  Dictionary d = random_dictionary(0, Kind::kKeys, 100, kDim, 5);  // 7 bits reach beyond 100
  const std::vector<float> x = sample(d, 200, 6);
  CodeFitOptions options;
  options.threads = 1;
  options.max_atoms = 3;
  options.residual_bits = 30;
  detail::Random random({9});
  for (int i = 0; i < 3; ++i) {
    options.states = i == 1 ? 16 : 0;
    d.format = fit_codes(d, x.data(), 200, kHeads, options);
    if (i == 2) {
      d.format = {};
      d.format.coding = CodeFormat::Coding::kFp8Int16;
      d.format.max_atoms = 3;
    }
    const Codec codec(d);
    std::vector<std::uint8_t> bytes(size_of(1000 * codec.bytes_per_vector()));
    for (auto& b : bytes) b = static_cast<std::uint8_t>(random.next());
    std::vector<float> out(1000 * kDim);
    codec.decode(bytes.data(), 1000, out.data());
    for (float v : out) ASSERT_TRUE(std::isfinite(v));
  }
}

TEST(Codec, WeightsAreSolvedAgainAfterEachIsQuantized) {
  // Two atoms at 25 degrees; coarse levels. Against each weight rounded for itself.
  Dictionary d;
  d.num_atoms = 2;
  d.dim = 2;
  d.atoms = {1, 0, 0.9f, std::sqrt(1 - 0.81f)};
  d.format.coding = CodeFormat::Coding::kPacked;
  d.format.max_atoms = 2;
  d.format.weight_bits = 4;
  d.format.scale_bits = 0;
  for (int k = 0; k < 2; ++k)
    for (int level = 0; level < 16; ++level)
      d.format.weight_levels.push_back(0.5f * static_cast<float>(level - 7));
  detail::Random random({1});
  double ours = 0, rounded = 0;
  for (int i = 0; i < 200; ++i) {
    const std::vector<float> x = {static_cast<float>(random.normal()),
                                  static_cast<float>(random.normal()) * 0.5f};
    ours += std::pow(error_of(x, reconstructed(d, x)), 2);
    Dictionary exact = d;
    exact.format = {};
    exact.format.max_atoms = 2;
    const float b = x[1] / d.atoms[3], a = x[0] - b * d.atoms[2];
    const auto round = [](float w) { return std::clamp(std::round(w * 2) / 2, -3.5f, 4.0f); };
    const std::vector<float> y = {round(a) + round(b) * d.atoms[2], round(b) * d.atoms[3]};
    rounded += std::pow(error_of(x, y), 2);
  }
  EXPECT_LT(ours, 0.8 * rounded);
}

TEST(Codec, MoreBitsErrLess) {
  Dictionary d = random_dictionary(0, Kind::kKeys, 64, kDim, 5);
  const std::vector<float> x = sample(d, 4000, 6);
  for (const bool with_atoms : {true, false})
    for (int states : {0, 8}) {
      double before = 2;
      for (int bits : {8, 16, 32, 64, 96, 128}) {
        CodeFitOptions options;
        options.threads = 1;
        options.max_atoms = with_atoms ? 2 : 0;
        options.scale_bits = 0;
        options.residual_bits = bits;
        options.states = states;
        d.format = fit_codes(d, x.data(), 4000, kHeads, options);
        const double error = error_of(x, reconstructed(d, x));
        EXPECT_LT(error, before) << bits;
        before = error;
      }
      EXPECT_LT(before, with_atoms ? 0.012 : 0.03);
    }
}

TEST(Codec, EveryFieldOutOfBoundsIsNamed) {
  Dictionary d = random_dictionary(0, Kind::kKeys, 64, kDim, 5);
  const std::vector<float> x = sample(d, 200, 6);
  CodeFitOptions options;
  options.threads = 1;
  options.max_atoms = 2;
  options.residual_bits = 20;
  const CodeFormat good = fit_codes(d, x.data(), 200, kHeads, options);
  good.validate(64, kDim);
  const auto expect = [&](const char* part, auto&& change) {
    CodeFormat bad = good;
    change(bad);
    const std::string message = test::message_of<InvalidArgument>([&] { bad.validate(64, kDim); });
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  expect("max_atoms is 17", [](CodeFormat& f) { f.max_atoms = 17; });
  expect("max_atoms is -1", [](CodeFormat& f) { f.max_atoms = -1; });
  expect("weight_bits is 9", [](CodeFormat& f) { f.weight_bits = 9; });
  expect("scale_bits is 9", [](CodeFormat& f) { f.scale_bits = 9; });
  expect("scales", [&](CodeFormat& f) { f.scale_low = nan; });
  expect("scales", [&](CodeFormat& f) { f.scale_step = 10; });
  expect("weight_levels holds", [](CodeFormat& f) { f.weight_levels.pop_back(); });
  expect("weight_levels holds nan", [&](CodeFormat& f) { f.weight_levels[3] = nan; });
  expect("must ascend", [](CodeFormat& f) { f.weight_levels[0] = 1e6f; });
  expect("lack a 0", [](CodeFormat& f) {
    for (float& level : f.weight_levels)
      if (level == 0) level = 1e-9f;
  });
  expect("residual.groups", [](CodeFormat& f) { f.residual.groups = -2; });
  expect("residual: has tables", [](CodeFormat& f) { f.residual.groups = 0; });
  expect("residual.mean holds", [](CodeFormat& f) { f.residual.mean.pop_back(); });
  expect("residual.axes", [](CodeFormat& f) { f.residual.axes[5] += 0.5f; });
  expect("residual.bits is 9", [](CodeFormat& f) { f.residual.bits[0] = 9; });
  expect("sum to", [](CodeFormat& f) { --f.residual.bits[kDim]; });
  expect("residual.levels holds", [](CodeFormat& f) { f.residual.levels.push_back(0); });
  expect("must ascend", [](CodeFormat& f) { f.residual.levels[0] = 1e6f; });
  expect("residual.states is 5", [](CodeFormat& f) { f.residual.states = 5; });
  expect("relative", [](CodeFormat& f) {
    f.residual.relative = true;
    f.scale_bits = 0;
  });
  expect("has no residual", [](CodeFormat& f) { f.coding = CodeFormat::Coding::kFp8Int16; });
}

TEST(FitCodes, OptionsOutOfBoundsAreNamed) {
  const Dictionary d = random_dictionary(0, Kind::kKeys, 64, kDim, 5);
  std::vector<float> x = sample(d, 200, 6);
  const auto message = [&](auto&& change) {
    CodeFitOptions options;
    options.threads = 1;
    change(options);
    return test::message_of<InvalidArgument>([&] { fit_codes(d, x.data(), 200, kHeads, options); });
  };
  EXPECT_EQ(message([](auto& o) { o.max_atoms = 17; }), "max_atoms is 17, must be in [0, 16]");
  EXPECT_EQ(message([](auto& o) { o.weight_bits = 1; }), "weight_bits is 1, must be in [2, 8]");
  EXPECT_EQ(message([](auto& o) { o.residual_bits = 129; }),
            "residual_bits is 129, must be in [0, 128]");
  EXPECT_EQ(message([](auto& o) { o.groups = 3; }), "groups is 3, must be 1 or 2 (0: the latter)");
  EXPECT_NE(message([](auto& o) { o.states = 3; }).find("states is 3"), std::string::npos);
  for (std::size_t i = 0; i < x.size(); i += kDim) x[i] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(message([](auto&) {}).find("vectors without NaN"), std::string::npos);
}

TEST(FitCodes, RowsWithNanAreLeftOut) {
  const Dictionary d = random_dictionary(0, Kind::kKeys, 64, kDim, 5);
  std::vector<float> x = sample(d, 400, 6);
  x[7] = std::numeric_limits<float>::infinity();
  x[1000] = std::numeric_limits<float>::quiet_NaN();
  CodeFitOptions options;
  options.threads = 1;
  options.max_atoms = 2;
  options.residual_bits = 20;
  fit_codes(d, x.data(), 400, kHeads, options).validate(64, kDim);
}

TEST(FitCodes, EqualAndZeroVectorsGiveValidTables) {
  const Dictionary d = random_dictionary(0, Kind::kKeys, 64, kDim, 5);
  for (float value : {0.0f, 1.0f}) {
    const std::vector<float> x(100 * kDim, value);
    CodeFitOptions options;
    options.threads = 1;
    options.max_atoms = 2;
    options.residual_bits = 20;
    Dictionary e = d;
    e.format = fit_codes(d, x.data(), 100, kHeads, options);
    e.format.validate(64, kDim);
    EXPECT_LT(std::fabs(static_cast<double>(reconstructed(e, x)[0]) - static_cast<double>(value)),
              1e-3);
  }
}

TEST(FitCodes, ChoosesFormatsOfExactlyTheBitsAskedFor) {
  const Dictionary d = random_dictionary(0, Kind::kKeys, 64, kDim, 5);
  const std::vector<float> x = sample(d, 3000, 6);
  CodeFitOptions options;
  options.threads = 1;
  options.max_atoms = 4;
  options.weight_bits = 0;
  options.scale_bits = -1;
  double before = 2;
  for (int bits : {13, 32, 48, 64}) {
    const CodeChoice choice = choose_codes(d, x.data(), 3000, kHeads, bits, options);
    EXPECT_EQ(choice.format.bits_per_vector(64, kDim), bits);
    EXPECT_LT(choice.error, before);
    before = choice.error;
    // Never worse than transform coding alone, which is one of the choices, by more than noise.
    CodeFitOptions pca = options;
    pca.max_atoms = 0;
    pca.scale_bits = 0;
    pca.residual_bits = bits;
    pca.weight_bits = 5;
    Dictionary e = d;
    e.format = fit_codes(d, x.data(), 3000, kHeads, pca);
    EXPECT_LT(choice.error, 1.05 * code_error(e, x.data(), 3000));
  }
  EXPECT_NE(test::message_of<InvalidArgument>([&] {
              choose_codes(d, x.data(), 3000, kHeads, 10000, options);
            }).find("must be in [0, "),
            std::string::npos);
}

TEST(Levels, LloydMaxOfAGaussianAreThePublishedOnes) {  // Max 1960, table I
  EXPECT_NEAR(detail::gaussian_distortion(1), 0.3634, 5e-4);
  EXPECT_NEAR(detail::gaussian_distortion(2), 0.1175, 5e-4);
  EXPECT_NEAR(detail::gaussian_distortion(3), 0.03454, 3e-4);
  EXPECT_NEAR(detail::gaussian_distortion(4), 0.009497, 1e-4);
  EXPECT_NEAR(static_cast<double>(detail::gaussian_levels(2)[3]), 1.510, 5e-3);
}

TEST(Levels, NearestIsNearest) {
  const float levels[] = {-1, 0, 0, 2};
  EXPECT_EQ(detail::nearest_level(levels, 4, -9), 0);
  EXPECT_EQ(detail::nearest_level(levels, 4, -0.4f), 1);
  EXPECT_EQ(detail::nearest_level(levels, 4, 0.9f), 2);
  EXPECT_EQ(detail::nearest_level(levels, 4, 1.1f), 3);
  EXPECT_EQ(detail::nearest_level(levels, 4, 9), 3);
}

// All sequences of codes, against Viterbi's algorithm.
TEST(Trellis, EncodesTheNearestOfAllSequences) {
  detail::Random random({4});
  for (int states : {4, 8, 16, 32, 64, 128, 256}) {
    const detail::Trellis trellis(states);
    detail::Trellis::Scratch scratch;
    for (int trial = 0; trial < 20; ++trial) {
      const std::vector<int> bits = {2, 1, 2, 1, 1, 2};  // 9 in all
      std::vector<std::vector<float>> levels;
      std::vector<detail::Trellis::Number> numbers;
      for (int b : bits) {
        levels.emplace_back();
        for (int k = 0; k < 2 << b; ++k)
          levels.back().push_back(static_cast<float>(random.normal()));
        std::sort(levels.back().begin(), levels.back().end());
      }
      for (std::size_t t = 0; t < bits.size(); ++t)
        numbers.push_back({static_cast<float>(random.normal()), bits[t], levels[t].data()});
      const auto error_of_codes = [&](const std::vector<std::uint32_t>& codes) {
        double error = 0;
        std::uint32_t history = 0;
        for (std::size_t t = 0; t < codes.size(); ++t) {
          const float level = levels[t][size_of(trellis.level(codes[t], history))];
          error += std::pow(static_cast<double>(level - numbers[t].value), 2);
        }
        return error;
      };
      double least = 1e9;
      for (std::uint32_t all = 0; all < 1u << 9; ++all) {
        std::vector<std::uint32_t> codes;
        std::uint32_t rest = all;
        for (int b : bits) {
          codes.push_back(rest & ((1u << b) - 1));
          rest >>= b;
        }
        least = std::min(least, error_of_codes(codes));
      }
      std::vector<std::uint32_t> codes(bits.size());
      trellis.encode(numbers, codes.data(), scratch);
      for (std::size_t t = 0; t < codes.size(); ++t) ASSERT_LT(codes[t], 1u << bits[t]);
      ASSERT_NEAR(error_of_codes(codes), least, 1e-5) << states;
    }
  }
}

TEST(Trellis, ErrsLessThanScalarLevelsOfTheSameBits) {
  // Gaussian components, 2 bits each: 9.3 dB with scalar levels, 10.5 and more with 8 states
  // (Marcellin and Fischer 1990, table IV).
  detail::Random random({5});
  constexpr int dim = 64;  // the register's start at 0 takes the first components' choice
  std::vector<float> x(4000 * dim);
  for (float& v : x) v = static_cast<float>(random.normal());
  Dictionary d = random_dictionary(0, Kind::kKeys, 4, dim, 5);
  CodeFitOptions options;
  options.threads = 1;
  options.max_atoms = 0;
  options.scale_bits = 0;
  options.residual_bits = 2 * dim;
  const auto decibels = [&](int states) {
    options.states = states;
    d.format = fit_codes(d, x.data(), 4000, 1, options);
    return -20 * std::log10(error_of(x, reconstructed(d, x)));
  };
  const double scalar = decibels(0), eight = decibels(8);
  EXPECT_NEAR(scalar, 9.3, 0.15);
  EXPECT_GT(eight, 10.3);
}

}  // namespace
}  // namespace lexico
