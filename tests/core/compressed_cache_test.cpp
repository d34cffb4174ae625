// A compressed cache, against one that keeps everything (cache_model.h), and at its limits.
#include "lexico/compressed_cache.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <new>

#include "core/cache_operations.h"
#include "lexico/error.h"
#include "lexico/files.h"

// Memory that operator new gave, and a way to let it fail.
namespace {
constexpr std::size_t kLarge = 300;  // smaller allocations never fail
std::atomic<std::int64_t> g_allocated{0}, g_most{0};
std::atomic<std::int64_t> g_until_failure{-1};  // large allocations; < 0: none fails
}  // namespace

void* operator new(std::size_t bytes) {
  if (bytes >= kLarge && g_until_failure >= 0 && g_until_failure-- == 0) throw std::bad_alloc();
  void* memory = std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  g_allocated += static_cast<std::int64_t>(malloc_usable_size(memory));
  if (g_allocated > g_most) g_most = g_allocated.load();
  return memory;
}
void operator delete(void* memory) noexcept {
  g_allocated -= static_cast<std::int64_t>(malloc_usable_size(memory));
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }

namespace lexico {
namespace {

using Coding = CodeFormat::Coding;

template <typename T>
std::size_t at(T i) {
  return static_cast<std::size_t>(i);
}

CacheOptions small_options(int window, int chunk, int sinks) {
  CacheOptions o;
  o.recent_window = window;
  o.compress_chunk = chunk;
  o.sink_tokens = sinks;
  o.page_tokens = 64;
  return o;
}

/// Numbers for the keys and values of `tokens` tokens.
struct Tokens {
  std::vector<float> keys, values;
  Tokens(const CacheShape& shape, std::int64_t tokens, unsigned seed) {
    std::mt19937 random(seed + 5000);  // not what made the dictionaries
    keys = cache_normals(at(tokens * shape.kv_heads * shape.head_dim), random);
    values = cache_normals(keys.size(), random);
  }
};

void add(CompressedCache& cache, int sequence, std::int64_t tokens, unsigned seed) {
  for (int layer = 0; layer < cache.shape().layers; ++layer) {
    const Tokens t(cache.shape(), tokens, seed + 100 * static_cast<unsigned>(layer));
    cache.append(layer, {sequence}, tokens, t.keys.data(), t.values.data());
  }
}

std::vector<float> attend(CompressedCache& cache, int sequence) {
  std::mt19937 random(99);
  const CacheShape& shape = cache.shape();
  const auto size = at(shape.kv_heads * shape.group * shape.head_dim);
  const std::vector<float> queries = cache_normals(size, random);
  std::vector<float> all;
  for (int layer = 0; layer < shape.layers; ++layer) {
    std::vector<float> out(size);
    cache.attend(layer, {sequence}, queries.data(), out.data());
    all.insert(all.end(), out.begin(), out.end());
  }
  return all;
}

/// The message of the exception of type E that `work` throws.
template <typename E, typename Work>
std::string refusal(Work&& work) {
  try {
    work();
  } catch (const E& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

#define EXPECT_REFUSED(type, statement, text)                      \
  do {                                                             \
    const std::string message = refusal<type>([&] { statement; }); \
    EXPECT_NE(message.find(text), std::string::npos) << message;   \
  } while (false)

TEST(CompressedCache, RandomOperationsAgreeWithTheModel) { run_cache_operations(0, 300); }

TEST(CompressedCache, WindowChunkAndSinksDecideWhatIsCoded) {
  const CacheCase c = cache_case({}, small_options(4, 3, 2), 1);
  CompressedCache cache(c.set, c.shape, c.options);
  const int s = cache.add_sequence();
  // 2 sinks; 4 to 6 tokens of the window are exact.
  const std::int64_t want[] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 3, 6, 6, 6, 9};
  for (std::int64_t tokens = 1; tokens < 16; ++tokens) {
    add(cache, s, 1, static_cast<unsigned>(tokens));
    EXPECT_EQ(cache.coded_tokens(s, 0), want[tokens]) << tokens << " tokens";
    EXPECT_EQ(cache.tokens(s), tokens);
  }
  const int prompt = cache.add_sequence();
  add(cache, prompt, 100, 1);
  EXPECT_EQ(cache.coded_tokens(prompt, 0), 94);
  add(cache, prompt, 100, 1);
  EXPECT_EQ(cache.coded_tokens(prompt, 0), 194);
}

TEST(CompressedCache, WithoutWindowEveryTokenIsCodedAtOnce) {
  const CacheCase c = cache_case({}, small_options(0, 1, 0), 1);
  CompressedCache cache(c.set, c.shape, c.options);
  const int s = cache.add_sequence();
  for (int tokens = 1; tokens < 5; ++tokens) {
    add(cache, s, 1, 1);
    EXPECT_EQ(cache.coded_tokens(s, 0), tokens);
  }
}

TEST(CompressedCache, CuttingBackLeavesCompressedTokensCompressed) {
  const CacheCase c = cache_case({}, small_options(10, 1, 2), 1);
  CompressedCache cache(c.set, c.shape, c.options);
  const int s = cache.add_sequence(), whole = cache.fork(s);
  add(cache, s, 50, 1);
  add(cache, whole, 50, 1);
  cache.truncate(s, 30);  // 2 sinks, 38 coded, 10 recent
  EXPECT_EQ(cache.coded_tokens(s, 0), 28);
  const auto row = at(c.shape.kv_heads * c.shape.head_dim);
  std::vector<float> keys[2], values[2];
  for (int i = 0; i < 2; ++i) {
    keys[i].resize(30 * row), values[i].resize(30 * row);
    cache.reconstruct(0, i == 0 ? s : whole, 0, 30, keys[i].data(), values[i].data());
  }
  EXPECT_EQ(keys[0], keys[1]);
  EXPECT_EQ(values[0], values[1]);
  for (int tokens = 1; tokens <= 10; ++tokens) {  // the window fills first
    add(cache, s, 1, 5);
    EXPECT_EQ(cache.coded_tokens(s, 0), 28);
  }
  add(cache, s, 1, 5);
  EXPECT_EQ(cache.coded_tokens(s, 0), 29);
  cache.truncate(s, 1);
  EXPECT_EQ(cache.coded_tokens(s, 0), 0);
  EXPECT_EQ(cache.tokens(s), 1);
  EXPECT_REFUSED(InvalidArgument, cache.truncate(s, 2), "tokens to keep are 2, must be in [0, 1]");
}

TEST(CompressedCache, NothingToDoIsFine) {
  const CacheCase c = cache_case({}, small_options(4, 1, 0), 1);
  CompressedCache cache(c.set, c.shape, c.options);
  const int s = cache.add_sequence();
  cache.append(0, {});
  cache.append(0, {NewTokens{s, 0, nullptr, nullptr, 0, 0}});
  cache.append(0, {s}, 0, nullptr, nullptr);
  cache.attend(0, {}, nullptr, nullptr);
  cache.reconstruct(0, s, 0, 0, nullptr, nullptr);
  EXPECT_EQ(cache.tokens(s), 0);
  for (const float x : attend(cache, s)) EXPECT_EQ(x, 0.0f);
}

TEST(CompressedCache, ResultsDependOnNeitherThreadsNorBatchNorStrides) {
  for (const CacheCase& c : cache_cases()) {
    SCOPED_TRACE(c.name);
    CacheOptions two = c.options;
    two.threads = 2;
    CompressedCache one(c.set, c.shape, c.options), other(c.set, c.shape, two);
    const std::int64_t tokens = 150;
    const int d = c.shape.head_dim;
    const int a = one.add_sequence(), b = one.add_sequence();
    const int other_a = other.add_sequence(), other_b = other.add_sequence();
    for (int layer = 0; layer < c.shape.layers; ++layer) {
      const Tokens of_a(c.shape, tokens, 1), of_b(c.shape, tokens, 2);
      one.append(layer, {a}, tokens, of_a.keys.data(), of_a.values.data());
      one.append(layer, {b}, tokens, of_b.keys.data(), of_b.values.data());
      // [kv_heads, tokens, dim], as models have it.
      const auto turned = [&](const std::vector<float>& x) {
        std::vector<float> y(x.size());
        for (std::int64_t t = 0; t < tokens; ++t)
          for (int h = 0; h < c.shape.kv_heads; ++h)
            std::copy_n(&x[at((t * c.shape.kv_heads + h) * d)], d, &y[at((h * tokens + t) * d)]);
        return y;
      };
      const std::vector<float> keys = turned(of_a.keys), values = turned(of_a.values);
      other.append(layer,
                   {{other_b, tokens, of_b.keys.data(), of_b.values.data(), 0, 0},
                    {other_a, tokens, keys.data(), values.data(), d, tokens * d}});
    }
    EXPECT_EQ(attend(one, a), attend(other, other_a));
    EXPECT_EQ(attend(one, b), attend(other, other_b));
  }
}

TEST(CompressedCache, NotANumberIsCountedAndKept) {
  const CacheCase c = cache_case({}, small_options(2, 1, 0), 1);
  CompressedCache cache(c.set, c.shape, c.options);
  const int s = cache.add_sequence();
  Tokens t(c.shape, 40, 1);
  const auto row = at(c.shape.kv_heads * c.shape.head_dim);
  t.values[7 * row + 3] = std::numeric_limits<float>::quiet_NaN();  // head 0
  cache.append(0, {s}, 40, t.keys.data(), t.values.data());
  EXPECT_EQ(cache.counts().not_finite, 1);
  EXPECT_EQ(cache.bytes(s) - cache.bytes_for(40), 2 * row * 2);
  std::vector<float> keys(row), values(row);
  cache.reconstruct(0, s, 7, 1, keys.data(), values.data());
  for (std::size_t i = 0; i < row; ++i) {  // to 11 bits
    EXPECT_NEAR(keys[i], t.keys[7 * row + i], 5e-4f * std::abs(keys[i]));
    if (i == 3) {
      EXPECT_TRUE(std::isnan(values[i]));
    } else {
      EXPECT_NEAR(values[i], t.values[7 * row + i], 5e-4f * std::abs(values[i]));
    }
  }
  const std::vector<float> out = attend(cache, s);
  const std::size_t head = at(c.shape.group * c.shape.head_dim);
  for (std::size_t i = 0; i < out.size(); ++i)
    EXPECT_EQ(std::isnan(out[i]), i < head && i % at(c.shape.head_dim) == 3) << i;
  cache.truncate(s, 7);
  EXPECT_EQ(cache.bytes(s), cache.bytes_for(9));  // 7 coded tokens
  for (const float x : attend(cache, s)) EXPECT_TRUE(std::isfinite(x));
}

TEST(CompressedCache, NumbersBeyondHalfFloatsSaturate) {
  CacheCase c = cache_case({}, small_options(2, 1, 0), 1);
  for (const ExactNumbers exact :
       {ExactNumbers::kFloat16, ExactNumbers::kBFloat16, ExactNumbers::kFloat32}) {
    c.options.exact = exact;
    CompressedCache cache(c.set, c.shape, c.options);
    const int s = cache.add_sequence();
    Tokens t(c.shape, 5, 1);
    for (const std::size_t token : {0, 4})
      t.keys[token * at(c.shape.kv_heads * c.shape.head_dim)] = -1e5f;
    cache.append(0, {s}, 5, t.keys.data(), t.values.data());
    EXPECT_EQ(cache.counts().exact_saturated, exact == ExactNumbers::kFloat16 ? 2 : 0);
    EXPECT_EQ(cache.counts().not_finite, 0);
    std::vector<float> keys(t.keys.size()), values(t.keys.size());
    cache.reconstruct(0, s, 0, 5, keys.data(), values.data());
    const float found = keys[4 * at(c.shape.kv_heads * c.shape.head_dim)];
    EXPECT_NEAR(found, exact == ExactNumbers::kFloat16 ? -65504.0f : -1e5f, 300.0f);
  }
}

TEST(CompressedCache, OwnAtomsReachTheVectorsThatBroughtThem) {
  CacheCaseSetting setting;
  setting.coding = Coding::kExact;
  CacheOptions options = small_options(0, 1, 0);
  const CacheCase plain = cache_case(setting, options, 1);
  options.adaptive_threshold = 0.2f;
  options.adaptive_atoms = 10;
  const CacheCase c = cache_case(setting, options, 1);
  CompressedCache cache(c.set, c.shape, c.options), without(plain.set, plain.shape, plain.options);
  const int s = cache.add_sequence(), other = without.add_sequence();
  const Tokens t(c.shape, 5, 1);  // 10 vectors that the dictionary does not have
  cache.append(0, {s}, 5, t.keys.data(), t.values.data());
  EXPECT_EQ(cache.counts().own_atoms, 20);
  EXPECT_EQ(cache.bytes(s), cache.bytes_for(5));
  std::vector<float> keys(t.keys.size()), values(t.keys.size());
  cache.reconstruct(0, s, 0, 5, keys.data(), values.data());
  for (std::size_t i = 0; i < keys.size(); ++i) EXPECT_NEAR(keys[i], t.keys[i], 3e-3f);
  const std::vector<float> before = attend(cache, s);
  // More vectors find no room; the first ones again find their atoms.
  add(cache, s, 20, 7);
  EXPECT_EQ(cache.counts().own_atoms, 20);
  cache.append(0, {s}, 5, t.keys.data(), t.values.data());
  cache.reconstruct(0, s, 25, 5, keys.data(), values.data());
  for (std::size_t i = 0; i < keys.size(); ++i) EXPECT_NEAR(keys[i], t.keys[i], 3e-3f);
  cache.truncate(s, 5);
  EXPECT_EQ(attend(cache, s), before);
  // Another sequence knows nothing of them: vectors that the dictionary has bring none.
  Tokens known(c.shape, 1, 1);
  const auto dim = at(c.shape.head_dim);
  for (int h = 0; h < c.shape.kv_heads; ++h) {
    std::copy_n(c.set.dictionaries[0].atoms.begin(),
                dim,
                known.keys.begin() + h * std::ssize(known.keys) / 2);
    std::copy_n(c.set.dictionaries[1].atoms.begin(),
                dim,
                known.values.begin() + h * std::ssize(known.keys) / 2);
  }
  const int fresh = cache.add_sequence();
  cache.append(0, {fresh}, 1, known.keys.data(), known.values.data());
  without.append(0, {other}, 1, known.keys.data(), known.values.data());
  EXPECT_EQ(cache.counts().own_atoms, 20);
  EXPECT_EQ(attend(cache, fresh), attend(without, other));
  cache.truncate(s, 2);  // those of three tokens go
  EXPECT_EQ(cache.bytes(fresh) + 8 * dim * 2, cache.bytes(s));
}

TEST(CompressedCache, BytesAreThosePromised) {
  for (const CacheCase& c : cache_cases()) {
    SCOPED_TRACE(c.name);
    CompressedCache cache(c.set, c.shape, c.options);
    for (const std::int64_t tokens : {0, 1, 5, 12, 63, 64, 65, 80, 200}) {
      const int s = cache.add_sequence();
      add(cache, s, tokens, 1);
      if (c.options.adaptive_threshold > 0)
        EXPECT_LE(cache.bytes(s), cache.bytes_for(tokens));
      else
        EXPECT_EQ(cache.bytes(s), cache.bytes_for(tokens));
      cache.remove(s);
      EXPECT_EQ(cache.bytes(), 0u);
    }
  }
}

// A model of 32 layers with 8 KV heads of 128 numbers: a layer of it.
TEST(CompressedCache, LongSequencesTakeTheBytesOfTheFormat) {
  CacheCaseSetting setting;
  setting.kv_heads = 8, setting.group = 4, setting.dim = 128;
  setting.num_atoms = 4096, setting.max_atoms = 8;
  for (const Coding coding : {Coding::kPacked, Coding::kFp8Int16}) {
    setting.coding = coding;
    const CacheCase c = cache_case(setting, {}, 1);
    CompressedCache cache(c.set, c.shape, {});
    const std::int64_t tokens = 128 * 1024;
    const CodeFormat& format = c.set.dictionaries[0].format;
    const double promised = static_cast<double>(2 * tokens * setting.kv_heads) *
                            format.bits_per_vector(setting.num_atoms, setting.dim) / 8;
    const double exact = static_cast<double>(cache.bytes_for(0));
    EXPECT_EQ(exact, 2.0 * 32 * 8 * 128 * 2);  // the window
    EXPECT_LE(static_cast<double>(cache.bytes_for(tokens + 32)) - exact, 1.01 * promised);
  }
}

TEST(CompressedCache, MemoryIsWhatBytesSayAndAttentionMakesNothingDense) {
  CacheCaseSetting setting;
  setting.kv_heads = 8, setting.dim = 32;
  CacheCase c = cache_case(setting, {}, 1);
  c.options.page_tokens = 256;
  c.options.threads = 2;
  CompressedCache cache(c.set, c.shape, c.options);
  const std::int64_t piece = 500, tokens = 40 * piece;
  const Tokens t(c.shape, piece, 1);
  {  // scratch that stays
    const int warm = cache.add_sequence();
    for (int i = 0; i < 4; ++i) cache.append(0, {warm}, piece, t.keys.data(), t.values.data());
    cache.clear();
  }
  const std::int64_t before = g_allocated;
  const int s = cache.add_sequence();
  for (std::int64_t done = 0; done < tokens; done += piece)
    cache.append(0, {s}, piece, t.keys.data(), t.values.data());
  const double taken = static_cast<double>(g_allocated - before);
  EXPECT_EQ(cache.bytes(), cache.bytes_for(tokens));
  EXPECT_NEAR(taken, static_cast<double>(cache.bytes()), 0.02 * static_cast<double>(cache.bytes()));
  const double promised = static_cast<double>(2 * (tokens - 32) * setting.kv_heads) *
                          c.set.dictionaries[0].format.bits_per_vector(40, 32) / 8;
  const double exact = static_cast<double>(cache.bytes_for(0));
  EXPECT_LE(static_cast<double>(cache.bytes()) - exact, 1.02 * promised);  // 1.01 from 128k on

  const double dense = static_cast<double>(tokens) * setting.kv_heads * setting.dim * 2 * 4;
  g_most = g_allocated.load();
  const std::int64_t at_rest = g_allocated;
  attend(cache, s);
  EXPECT_LE(static_cast<double>(g_most - at_rest), 0.1 * dense);
  // Nor does one more token copy what is there.
  add(cache, s, 1, 1);
  g_most = g_allocated.load();
  const std::int64_t then = g_allocated;
  add(cache, s, 1, 2);
  EXPECT_LE(static_cast<double>(g_most - then), 0.02 * dense);
}

TEST(CompressedCache, OutOfMemoryChangesNothing) {
  CacheCase c = cache_cases()[6];  // adaptive
  c.set.dictionaries.insert(c.set.dictionaries.end(),
                            {c.set.dictionaries[0], c.set.dictionaries[1]});
  c.set.dictionaries[2].layer = c.set.dictionaries[3].layer = 1;
  c.shape.layers = 2;
  CompressedCache cache(c.set, c.shape, c.options);
  const std::string path = testing::TempDir() + "/out_of_memory.cache";
  const int s = cache.add_sequence();
  add(cache, s, 120, 1);
  cache.save(s, path);
  const int shared = cache.fork(s);
  const std::vector<float> before = attend(cache, s);
  const auto same = [&] {
    EXPECT_EQ(cache.tokens(s), 120);
    EXPECT_EQ(cache.bytes(s), cache.bytes(shared));
    EXPECT_EQ(attend(cache, s), before);
  };
  Tokens more(c.shape, 150, 2);
  more.keys[3] = std::numeric_limits<float>::infinity();
  int failures = 0;
  // Tries with the first, the second, ... large allocation failing until none does.
  const auto every_failure = [&](auto&& work, auto&& undo) {
    for (int n = 0;; ++n) {
      g_until_failure = n;
      try {
        work();
        g_until_failure = -1;
        undo();
        break;
      } catch (const ResourceError&) {
        g_until_failure = -1;
        ++failures;
        same();
      }
    }
  };
  int made = -1;
  every_failure([&] { made = cache.add_sequence(); }, [&] { cache.remove(made); });
  every_failure([&] { made = cache.fork(s); }, [&] { cache.remove(made); });
  every_failure([&] { made = cache.load(path); }, [&] { cache.remove(made); });
  every_failure([&] { cache.save(s, path); }, [&] {});
  const int first_failures = failures;
  EXPECT_GT(first_failures, 8);
  every_failure([&] { cache.append(0, {s}, 150, more.keys.data(), more.values.data()); },
                [&] { cache.truncate(s, 120); });
  EXPECT_GT(failures, first_failures + 5);
  cache.truncate(s, 120);
  EXPECT_EQ(attend(cache, shared), before);
}

TEST(CompressedCache, BytesHaveABound) {
  CacheCase c = cache_case({}, small_options(4, 1, 0), 1);
  CompressedCache sizes(c.set, c.shape, c.options);
  c.options.max_bytes = sizes.bytes_for(100);
  CompressedCache cache(c.set, c.shape, c.options);
  const int s = cache.add_sequence();
  add(cache, s, 100, 1);
  EXPECT_REFUSED(ResourceError, add(cache, s, 60, 1), "max_bytes");
  EXPECT_REFUSED(ResourceError, cache.fork(s), "max_bytes");
  EXPECT_REFUSED(ResourceError, cache.add_sequence(), "max_bytes");
  EXPECT_EQ(cache.tokens(s), 100);
  add(cache, s, 20, 1);  // in the page that there is
  EXPECT_EQ(cache.tokens(s), 120);
}

TEST(CompressedCache, WhatIsNotThereIsNamed) {
  CacheCase c = cache_case({}, small_options(4, 1, 0), 1);
  c.shape.max_positions = 50;
  CompressedCache cache(c.set, c.shape, c.options);
  const int s = cache.add_sequence();
  const Tokens t(c.shape, 51, 1);
  const auto append = [&](int layer, const std::vector<int>& sequences, std::int64_t tokens) {
    cache.append(layer, sequences, tokens, t.keys.data(), t.values.data());
  };
  EXPECT_REFUSED(InvalidArgument, append(0, {s}, 51), "beyond max_positions = 50");
  append(0, {s}, 50);
  EXPECT_REFUSED(InvalidArgument, append(0, {s}, 1), "1 tokens after 50");
  EXPECT_REFUSED(InvalidArgument, append(1, {s}, 1), "layer is 1, must be in [0, 1)");
  EXPECT_REFUSED(InvalidArgument, append(0, {s + 1}, 1), "no sequence 1");
  EXPECT_REFUSED(InvalidArgument, append(0, {s, s}, 0), "named twice");
  EXPECT_REFUSED(InvalidArgument, append(0, {s}, -1), "tokens are -1");
  EXPECT_REFUSED(InvalidArgument, cache.fork(-1), "no sequence -1");
  EXPECT_REFUSED(InvalidArgument, cache.attend(-1, {s}, nullptr, nullptr), "layer is -1");
  EXPECT_REFUSED(InvalidArgument, cache.reconstruct(0, s, 40, 11, nullptr, nullptr), "of 50");
  EXPECT_EQ(cache.tokens(s), 50);
  cache.remove(s);
  EXPECT_FALSE(cache.has(s));
  EXPECT_REFUSED(InvalidArgument, cache.tokens(s), "no sequence 0");
  EXPECT_EQ(cache.add_sequence(), s);
}

TEST(CompressedCache, DictionariesThatDoNotFitAreRefused) {
  CacheCaseSetting setting;
  setting.layers = 2;
  const CacheCase good = cache_case(setting, small_options(4, 1, 0), 1);
  const auto refused = [&](auto&& change) {
    CacheCase c = good;
    change(c);
    return refusal<InvalidArgument>([&] { CompressedCache(c.set, c.shape, c.options); });
  };
  const auto expect = [&](auto&& change, const std::string& text) {
    const std::string message = refused(change);
    EXPECT_NE(message.find(text), std::string::npos) << message;
  };
  expect([](CacheCase& c) { c.shape.head_dim = 32; }, "dim 16, the model head_dim 32");
  expect([](CacheCase& c) { c.shape.layers = 1; }, "of layer 1, the model has 1");
  expect([](CacheCase& c) { c.shape.layers = 3; }, "layer 2, keys: there is no dictionary");
  expect([](CacheCase& c) { c.set.dictionaries.pop_back(); }, "layer 1, values: there is no");
  expect([](CacheCase& c) { c.set.dictionaries[0].head = 5; }, "KV head 5, the model has 2");
  expect([](CacheCase& c) { c.set.dictionaries[0].head = 0; }, "no dictionary of KV head 1");
  expect(
      [](CacheCase& c) {
        c.set.key_stage = KeyStage::kPreRope;
        c.set.metadata.clear();
      },
      "no metadata 'rope'");
  expect([](CacheCase& c) { c.set.dictionaries[0].format = {}; }, "layer 0, keys: max_atoms is 0");
  expect([](CacheCase& c) { c.options.values.max_atoms = 5; }, "the packed format has at most 4");
  expect([](CacheCase& c) { c.options.layer_keys[2] = {}; }, "layer 2, the model has 2");
  expect([](CacheCase& c) { c.options.layer_keys[1] = {-1, 0}; }, "max_atoms is -1");
  expect([](CacheCase& c) { c.options.keys.relative_tolerance = -1; }, "relative_tolerance is -1");
  expect([](CacheCase& c) { c.options.compress_chunk = 0; }, "compress_chunk is 0, must be in [1");
  expect([](CacheCase& c) { c.options.recent_window = -1; }, "recent_window is -1");
  expect([](CacheCase& c) { c.options.page_tokens = 100; }, "page_tokens is 100");
  expect([](CacheCase& c) { c.options.adaptive_threshold = -1; }, "adaptive_threshold is -1");
  expect([](CacheCase& c) { c.shape.kv_heads = 0; }, "kv_heads is 0");
  const CacheCase heads = [&] {
    CacheCaseSetting s = setting;
    s.transform = true, s.kv_heads = 4;
    return cache_case(s, {}, 1);
  }();
  EXPECT_REFUSED(InvalidArgument,
                 CompressedCache(heads.set, good.shape, good.options),
                 "transform.heads is 4, must be kv_heads = 2");
  CacheCase bad_rope = good;
  bad_rope.set.key_stage = KeyStage::kPreRope;
  bad_rope.set.metadata["rope"] = "{";
  EXPECT_REFUSED(
      IoError, CompressedCache(bad_rope.set, good.shape, good.options), "rope of the dictionaries");
}

TEST(CompressedCache, FilesContinueWhereTheSequenceWas) {
  const std::string path = testing::TempDir() + "/continues.cache";
  for (const CacheCase& c : cache_cases()) {
    SCOPED_TRACE(c.name);
    CompressedCache cache(c.set, c.shape, c.options), other(c.set, c.shape, c.options);
    const int s = cache.add_sequence();
    add(cache, s, 90, 1);
    cache.save(s, path);
    const int loaded = other.load(path);
    EXPECT_EQ(other.bytes(loaded), cache.bytes(s));
    add(cache, s, 30, 2);
    add(other, loaded, 30, 2);
    EXPECT_EQ(attend(cache, s), attend(other, loaded));
  }
}

TEST(CompressedCache, DamagedFilesAreRefused) {
  const std::string path = testing::TempDir() + "/damaged.cache";
  CacheCase c = cache_cases()[6];
  CompressedCache cache(c.set, c.shape, c.options);
  const int s = cache.add_sequence();
  add(cache, s, 20, 1);
  cache.save(s, path);
  const std::string good = read_file(path);
  const auto refused = [&](const std::string& bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
    try {
      cache.remove(cache.load(path));
    } catch (const IoError& error) {
      return std::string(error.what()).find(path) != std::string::npos;
    }
    return false;
  };
  for (std::size_t i = 0; i < good.size(); ++i) {
    std::string bytes = good;
    bytes[i] = static_cast<char>(bytes[i] ^ 1 << i % 8);
    ASSERT_TRUE(refused(bytes)) << "byte " << i;
  }
  for (std::size_t length = 0; length < good.size(); length += length < 100 ? 1 : 7)
    ASSERT_TRUE(refused(good.substr(0, length))) << length << " bytes";
  EXPECT_TRUE(refused(good + "x"));
  EXPECT_TRUE(refused(good + good));
  EXPECT_EQ(refused(good), false);  // it is not
  EXPECT_REFUSED(IoError, cache.load(path + ".none"), path + ".none");
  EXPECT_EQ(cache.tokens(s), 20);

  const auto with = [&](auto&& change) {
    CacheCase changed = c;
    change(changed);
    CompressedCache another(changed.set, changed.shape, changed.options);
    return refusal<IoError>([&] { another.load(path); });
  };
  EXPECT_NE(with([](CacheCase& o) {
              o.options.recent_window = 5;
            }).find("saved with recent_window = 4, the cache has 5"),
            std::string::npos);
  EXPECT_NE(with([](CacheCase& o) {
              o.set.dictionaries[1].atoms[0] += 0.001f;
            }).find("saved with dictionaries = "),
            std::string::npos);
  EXPECT_NE(with([](CacheCase& o) { o.options.values.max_atoms = 3; }).find("dictionaries = "),
            std::string::npos);
}

}  // namespace
}  // namespace lexico
