// Attention of a layer and of a cache on a GPU, or on one that the CPU emulates.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "core/attention_layers.h"
#include "core/cache_operations.h"
#include "lexico/attention.h"
#include "lexico/error.h"
#include "support/device_memory.h"
#include "support/message_of.h"
#include "support/runtime_faults.h"

namespace lexico {
namespace {

constexpr int kNumbers = kHeads * kGroup * kDim;  // of a sequence's queries

// The same layer on the CPU and on the device; sequences are given to both.
class Both {
 public:
  explicit Both(const Layer& layer, AttentionOptions options = {})
      : cpu_(make(layer, options, "cpu")), device_(make(layer, options, "cuda")) {}

  struct Sequence {
    CodedVectors keys[2], values[2];  // on the CPU, on the device
  };
  Sequence sequence() const {
    return {{cpu_->coded_keys(), device_->coded_keys()},
            {cpu_->coded_values(), device_->coded_values()}};
  }
  /// Any bytes are codes.
  void append(Sequence& to, std::int64_t tokens) {
    for (const bool of_values : {false, true}) {
      CodedVectors* const side = of_values ? to.values : to.keys;
      std::vector<std::uint8_t> codes(
          static_cast<std::size_t>(tokens * kHeads * side[0].record_bytes()));
      for (std::uint8_t& byte : codes) byte = static_cast<std::uint8_t>(random_() % 160);
      for (int i = 0; i < 2; ++i) side[i].append(codes.data(), tokens);
    }
  }
  void add_atom(Sequence& to) {
    std::vector<float> atom = normals(kDim, static_cast<unsigned>(random_()));
    for (CodedVectors* const side : {to.keys, to.values})
      for (int i = 0; i < 2; ++i) side[i].add_atom(atom.data());
  }

  std::unique_ptr<LayerAttention> cpu_, device_;
  std::mt19937 random_{3};

 private:
  static std::unique_ptr<LayerAttention> make(const Layer& layer,
                                              AttentionOptions options,
                                              const char* device) {
    options.kv_heads = kHeads;
    options.group = kGroup;
    options.page_tokens = 128;
    options.half_keys = false;
    options.threads = 1;
    options.device = device;
    return std::make_unique<LayerAttention>(std::vector<const Dictionary*>{&layer.keys},
                                            std::vector<const Dictionary*>{&layer.values},
                                            options,
                                            layer.stage,
                                            layer.rope);
  }
};

class AttentionOnDevice : public test::DeviceTest {
 protected:
  void TearDown() override {
    DeviceTest::TearDown();
#ifdef LEXICO_DEVICE_IS_EMULATED
    EXPECT_EQ(emulated::allocated_bytes(), 0u);
    emulated::device() = {};
#endif
  }

  std::vector<float> on_device(const Both& both,
                               const std::vector<const Both::Sequence*>& of,
                               const std::vector<float>& exact,
                               int exact_tokens,
                               AttentionScratch& scratch) {
    const std::vector<float> queries = normals(of.size() * kNumbers, 60);
    float* const q = upload(queries);
    float* const out = upload(std::vector<float>(queries.size(), -7));
    const float* const numbers = upload(exact);
    std::vector<LayerAttention::Sequence> sequences;
    for (const Both::Sequence* s : of)
      sequences.push_back({&s->keys[1], &s->values[1], 5, runs(numbers, exact_tokens)});
    both.device_->attend(sequences, q, out, scratch);
    return download(out, queries.size());
  }
  std::vector<float> on_cpu(const Both& both,
                            const std::vector<const Both::Sequence*>& of,
                            const std::vector<float>& exact,
                            int exact_tokens) {
    const std::vector<float> queries = normals(of.size() * kNumbers, 60);
    std::vector<float> out(queries.size());
    std::vector<LayerAttention::Sequence> sequences;
    for (const Both::Sequence* s : of)
      sequences.push_back({&s->keys[0], &s->values[0], 5, runs(exact.data(), exact_tokens)});
    AttentionScratch scratch;
    both.cpu_->attend(sequences, queries.data(), out.data(), scratch);
    return out;
  }
  void expect_the_same(const Both& both,
                       const std::vector<const Both::Sequence*>& of,
                       AttentionScratch& scratch) {
    const int exact_tokens = 9;
    const std::vector<float> exact = normals(2 * kHeads * exact_tokens * kDim, 70);
    const std::vector<float> want = on_cpu(both, of, exact, exact_tokens);
    const std::vector<float> ours = on_device(both, of, exact, exact_tokens, scratch);
    for (std::size_t head = 0; head < want.size(); head += kDim) {
      double off = 0, norm = 0;
      for (std::size_t i = head; i < head + kDim; ++i) {
        off += std::pow(static_cast<double>(ours[i]) - static_cast<double>(want[i]), 2);
        norm += std::pow(static_cast<double>(want[i]), 2);
      }
      ASSERT_LE(std::sqrt(off), 2e-5 * std::sqrt(norm)) << "number " << head;
    }
  }
  // Random operations of so many seeds for each case.
  void run_on_device(std::vector<CacheCase> cases, unsigned seeds) {
    for (CacheCase& c : cases) {
      c.options.device = "cuda";
      c.options.value_tile_tokens = 64;
    }
    const auto attend = [this](CompressedCache& cache,
                               int layer,
                               const std::vector<int>& numbers,
                               const std::vector<float>& queries,
                               float* out) {
      float* const result = upload(std::vector<float>(queries.size(), -7));
      cache.attend(layer, numbers, upload(queries), result);
      const std::vector<float> values = download(result, queries.size());
      std::copy(values.begin(), values.end(), out);
      release_all();
    };
    run_cache_operations(0, seeds * static_cast<unsigned>(cases.size()), cases, attend);
  }

 private:
  static std::vector<ExactTokens> runs(const float* numbers, int tokens) {
    return {{numbers,
             numbers + std::ptrdiff_t{kHeads} * tokens * kDim,
             std::int64_t{tokens} * kDim,
             tokens}};
  }
};

TEST_F(AttentionOnDevice, IsThatOfTheCpu) {
  using Coding = CodeFormat::Coding;
  for (const Coding coding : {Coding::kExact, Coding::kFp8Int16, Coding::kPacked}) {
    for (const KeyStage stage : {KeyStage::kPostRope, KeyStage::kPreRope}) {
      for (const int groups : {0, 1, kHeads}) {
        if (groups > 0 && coding != Coding::kPacked) continue;
        SCOPED_TRACE(testing::Message() << "coding " << static_cast<int>(coding) << ' '
                                        << name_of(stage) << " groups " << groups);
        const bool transform = groups != 1;
        const Layer layer{dictionary(Kind::kKeys, coding, transform, groups),
                          dictionary(Kind::kValues, coding, transform, groups),
                          a_rope(),
                          stage};
        Both both(layer);
        Both::Sequence a = both.sequence(), b = both.sequence();
        const Both::Sequence none = both.sequence();
        AttentionScratch scratch;
        both.append(a, 300);
        both.append(b, 64);
        expect_the_same(both, {&a, &none, &b, &a}, scratch);
      }
    }
  }
}

// What changed since the last call, and only that, must have come to the device.
TEST_F(AttentionOnDevice, FollowsSequencesThatGrowForkAndAreCutBack) {
  const Layer layer{dictionary(Kind::kKeys, CodeFormat::Coding::kPacked, true, 0),
                    dictionary(Kind::kValues, CodeFormat::Coding::kPacked, true, 0),
                    a_rope(),
                    KeyStage::kPreRope};
  AttentionOptions options;
  options.own_atoms = 6;
  Both both(layer, options);
  Both::Sequence a = both.sequence();
  AttentionScratch scratch;
  both.append(a, 1);
  for (const std::int64_t tokens : {1, 63, 1, 62, 130, 7}) {
    expect_the_same(both, {&a}, scratch);
    both.append(a, tokens);
  }
  Both::Sequence fork = a;
  both.append(fork, 5);
  expect_the_same(both, {&a, &fork}, scratch);
  both.append(a, 3);
  both.add_atom(a), both.add_atom(a), both.add_atom(fork);
  both.append(a, 80);
  expect_the_same(both, {&fork, &a}, scratch);
  for (int i = 0; i < 2; ++i) {
    a.keys[i].truncate(100), a.values[i].truncate(100);
    fork.keys[i].truncate(0), fork.values[i].truncate(0);
  }
  expect_the_same(both, {&a, &fork}, scratch);
  both.append(a, 29);
  both.append(fork, 200);
  expect_the_same(both, {&a, &fork}, scratch);
}

// Not even what other sequences have of their own plays a part.
TEST_F(AttentionOnDevice, ResultsDependOnNoOtherSequence) {
  Layer layer{dictionary(Kind::kKeys, CodeFormat::Coding::kPacked, false, 1),
              dictionary(Kind::kValues, CodeFormat::Coding::kPacked, false, 1),
              {}};
  static_assert(std::has_single_bit(unsigned{kDim}));
  for (unsigned i = 0; i < kDim; ++i)  // orthonormal, and every component is in every dimension
    for (unsigned j = 0; j < kDim; ++j)
      layer.values.format.residual.axes[i * kDim + j] =
          (std::popcount(i & j) % 2 == 0 ? 1.0f : -1.0f) / std::sqrt(float{kDim});
  AttentionOptions options;
  options.own_atoms = 60;  // the kernels go through 128 atoms and components at a time
  Both both(layer, options);
  Both::Sequence alone = both.sequence(), company = both.sequence();
  both.append(alone, 130);
  for (int i = 0; i < 60; ++i) both.add_atom(company);
  both.append(company, 1000);
  AttentionScratch scratch;
  const std::vector<float> want = on_device(both, {&alone}, {}, 0, scratch);
  std::vector<float> found = on_device(both, {&alone, &company}, {}, 0, scratch);
  found.resize(want.size());
  EXPECT_EQ(found, want);
}

TEST_F(AttentionOnDevice, ValuesInTilesAreThoseInRows) {
  using Coding = CodeFormat::Coding;
  for (const Coding coding : {Coding::kExact, Coding::kFp8Int16, Coding::kPacked}) {
    for (const int groups : {0, 1}) {
      if (groups > 0 && coding != Coding::kPacked) continue;
      SCOPED_TRACE(testing::Message()
                   << "coding " << static_cast<int>(coding) << " groups " << groups);
      const Layer layer{dictionary(Kind::kKeys, coding, true, 0),
                        dictionary(Kind::kValues, coding, true, groups),
                        {}};
      AttentionOptions options;
      options.value_tile_tokens = 64;
      options.own_atoms = 3;
      Both both(layer, options);
      Both::Sequence a = both.sequence();
      AttentionScratch scratch;
      for (const std::int64_t tokens : {63, 1, 70, 256}) {
        both.append(a, tokens);
        expect_the_same(both, {&a}, scratch);
        expect_the_same(both, {&a}, scratch);  // without copies of pages that are in tiles
      }
      Both::Sequence fork = a;
      both.add_atom(a);
      both.append(a, 100);
      both.append(fork, 10);
      expect_the_same(both, {&fork, &a}, scratch);
      for (int i = 0; i < 2; ++i) a.keys[i].truncate(200), a.values[i].truncate(200);
      expect_the_same(both, {&a, &fork}, scratch);
      both.append(a, 130);
      expect_the_same(both, {&a, &fork}, scratch);
    }
  }
  const Dictionary d = dictionary(Kind::kKeys, Coding::kPacked, false, 0);
  AttentionOptions options;
  options.kv_heads = kHeads;
  options.value_tile_tokens = 100;
  EXPECT_NE(test::message_of<InvalidArgument>([&] {
              LayerAttention({&d}, {&d}, options);
            }).find("value_tile_tokens is 100"),
            std::string::npos);
}

TEST_F(AttentionOnDevice, HalfTablesAreCloseAndNotTheSame) {
  const Layer layer{dictionary(Kind::kKeys, CodeFormat::Coding::kPacked, false, 0),
                    dictionary(Kind::kValues, CodeFormat::Coding::kPacked, false, 0),
                    {}};
  AttentionOptions options;
  options.half_tables = true;
  Both exact(layer), half(layer, options);
  Both::Sequence of_exact = exact.sequence(), of_half = half.sequence();
  exact.append(of_exact, 200);
  half.append(of_half, 200);
  AttentionScratch scratch;
  const std::vector<float> want = on_device(exact, {&of_exact}, {}, 0, scratch);
  const std::vector<float> ours = on_device(half, {&of_half}, {}, 0, scratch);
  EXPECT_NE(ours, want);
  for (std::size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(ours[i], want[i], 2e-2);
}

TEST_F(AttentionOnDevice, DeviceThatIsNotThereIsNamed) {
  const Dictionary d = dictionary(Kind::kKeys, CodeFormat::Coding::kPacked, false, 0);
  AttentionOptions options;
  options.kv_heads = kHeads;
  options.device = "cuda:7";
  EXPECT_NE(test::message_of<InvalidArgument>([&] {
              LayerAttention({&d}, {&d}, options);
            }).find("device is 'cuda:7'"),
            std::string::npos);
}

TEST_F(AttentionOnDevice, RandomOperationsOnACacheAgreeWithTheModel) {
  const std::vector<CacheCase> all = cache_cases();
  run_on_device({all[0], all[3], all[5], all[6]}, 1);
}

TEST_F(AttentionOnDevice, ManyRandomOperationsOnACacheAgreeWithTheModel) {
  run_on_device(cache_cases(), 10);
}

#ifdef LEXICO_DEVICE_IS_EMULATED
// Whatever call of the runtime fails, it is told, memory comes back, and the next call is right.
TEST_F(AttentionOnDevice, CallsThatFailAreToldAndForgotten) {
  const Layer layer{dictionary(Kind::kKeys, CodeFormat::Coding::kPacked, false, 1),
                    dictionary(Kind::kValues, CodeFormat::Coding::kPacked, false, 1),
                    a_rope(),
                    KeyStage::kPreRope};
  const std::vector<float> queries = normals(kNumbers, 60);
  int calls = 0;
  std::vector<float> want;
  for (int fail_at = -1; fail_at < calls; ++fail_at) {
    SCOPED_TRACE(testing::Message() << "call " << fail_at << " of " << calls);
    std::vector<float> out(kNumbers);  // outlives what a wait that failed left to be done
    std::optional<Both> both;
    AttentionScratch scratch;
    const auto attend = [&] {
      if (!both) both.emplace(layer);
      both->random_.seed(9);
      Both::Sequence a = both->sequence();
      both->append(a, 150);
      both->device_->attend(
          {{&a.keys[1], &a.values[1], 0, {}}}, queries.data(), out.data(), scratch);
      const kernels::Status done = kernels::cuda::synchronize(nullptr);
      if (!done.ok()) throw ResourceError(done.what);
      return out;
    };
    {
      test::RuntimeFaults faults(fail_at);
      if (fail_at < 0) {
        want = attend();
        calls = faults.calls();
        ASSERT_GT(calls, 20);
        continue;
      }
      std::vector<float> found;
      std::string message;
      try {
        found = attend();
      } catch (const Error& error) {
        message = error.what();
      }
      const std::string failed = faults.failed();
      if (failed == "event_record" && message.empty())
        EXPECT_EQ(found, want);  // waited for instead
      else if (failed == "get_device_count")
        EXPECT_NE(message.find("no CUDA device"), std::string::npos) << message;
      else
        EXPECT_NE(message.find("unknown error"), std::string::npos) << failed << ": " << message;
    }
    EXPECT_EQ(attend(), want);
  }
}

TEST_F(AttentionOnDevice, ShortMemoryIsTold) {
  const Layer layer{dictionary(Kind::kKeys, CodeFormat::Coding::kPacked, false, 0),
                    dictionary(Kind::kValues, CodeFormat::Coding::kPacked, false, 0),
                    {}};
  emulated::device().memory_bytes = 4000;
  EXPECT_NE(
      test::message_of<ResourceError>([&] { Both both(layer); }).find("bytes of dictionaries"),
      std::string::npos);
}
#endif

}  // namespace
}  // namespace lexico
