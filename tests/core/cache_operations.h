#pragma once
// Random operations on a compressed cache and on the model of one (cache_model.h), side by side.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <string>
#include <utility>

#include "core/cache_model.h"

namespace lexico {

/// Every format, stage and option in some combination.
inline std::vector<CacheCase> cache_cases() {
  using Coding = CodeFormat::Coding;
  const auto options = [](int window, int chunk, int sinks) {
    CacheOptions o;
    o.recent_window = window;
    o.compress_chunk = chunk;
    o.sink_tokens = sinks;
    o.page_tokens = 64;
    return o;
  };
  std::vector<CacheCase> cases;
  CacheCaseSetting s;
  cases.push_back(cache_case(s, options(4, 1, 0), 1));
  s.name = "fp8, layers with coding of their own";
  s.coding = Coding::kFp8Int16, s.layers = 2;
  CacheOptions o = options(0, 1, 3);
  o.keys.max_atoms = 2;
  o.values.relative_tolerance = 0.4f;
  o.layer_values[1] = {6, 0.0f};
  cases.push_back(cache_case(s, o, 2));
  s.name = "exact weights, chunk larger than window, bfloat16";
  s.coding = Coding::kExact, s.layers = 1;
  o = options(3, 8, 1);
  o.exact = ExactNumbers::kBFloat16;
  cases.push_back(cache_case(s, o, 3));
  s.name = "before RoPE, transform, residual code";
  s.coding = Coding::kPacked, s.stage = KeyStage::kPreRope, s.transform = true;
  s.residual_groups = 1;
  cases.push_back(cache_case(s, options(5, 2, 2), 4));
  s.name = "trellis codes of heads, interleaved RoPE";
  s.states = 8, s.residual_groups = 2, s.interleaved = true;
  cases.push_back(cache_case(s, options(2, 3, 0), 5));
  s.name = "trellis codes after RoPE, fewer atoms";
  s.stage = KeyStage::kPostRope, s.states = 64;
  o = options(6, 4, 1);
  o.keys.max_atoms = 3, o.values.max_atoms = 2;
  cases.push_back(cache_case(s, o, 6));
  s = {};
  s.name = "adaptive";
  o = options(4, 2, 1);
  o.adaptive_threshold = 0.5f, o.adaptive_atoms = 12;
  cases.push_back(cache_case(s, o, 7));
  s.name = "adaptive, dictionaries of heads, before RoPE, transform";
  s.stage = KeyStage::kPreRope, s.transform = true, s.own_heads = true, s.residual_groups = 1;
  cases.push_back(cache_case(s, o, 8));
  s.name = "adaptive, transform of heads, before RoPE, exact weights";
  s.own_heads = false, s.residual_groups = 0, s.coding = Coding::kExact, s.interleaved = true;
  s.layers = 2;
  o.exact = ExactNumbers::kFloat32;
  cases.push_back(cache_case(s, o, 9));
  s = {};
  s.name = "adaptive, fp8, ols, odd sizes";
  s.coding = Coding::kFp8Int16, s.kv_heads = 3, s.group = 5, s.dim = 20, s.num_atoms = 33;
  o = options(1, 5, 0);
  o.adaptive_threshold = 0.6f, o.adaptive_atoms = 5;
  o.selection.rule = Selection::Rule::kOls;
  o.softmax_scale = 0.5f;
  cases.push_back(cache_case(s, o, 10));
  return cases;
}

/// How a cache attends over host memory, if it is not of the host.
using CacheAttend = std::function<void(
    CompressedCache&, int layer, const std::vector<int>&, const std::vector<float>&, float* out)>;

class CacheOperations {
 public:
  CacheOperations(const CacheCase& c, unsigned seed, std::string folder, CacheAttend attend)
      : c_(c),
        cache_(c.set, c.shape, c.options),
        model_(c),
        random_(seed),
        folder_(folder),
        attend_(std::move(attend)) {
    c_.shape = cache_.shape();
  }

  void run(int operations) {
    for (int i = 0; i < operations && !testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE(testing::Message() << "operation " << i);
      one();
      check_counts();
      if (below(3) == 0) check_attention();
    }
    check_attention();
    for (const auto& [number, layers] : model_.sequences) check_vectors(number);
  }

 private:
  int below(int bound) { return static_cast<int>(random_() % static_cast<unsigned>(bound)); }
  int some_sequence() {
    auto at = model_.sequences.begin();
    std::advance(at, below(static_cast<int>(model_.sequences.size())));
    return at->first;
  }

  void one() {
    const int count = static_cast<int>(model_.sequences.size());
    const int what = count == 0 ? 0 : below(20);
    if (what == 0 && count < 4) {
      model_.add(cache_.add_sequence());
    } else if (what == 1 && count < 4) {
      const int from = some_sequence();
      const int number = cache_.fork(from);
      const CacheModel::Sequence copy = model_.sequences[from];
      model_.sequences[number] = copy;
    } else if (what == 2) {
      const int number = some_sequence();
      cache_.remove(number);
      model_.sequences.erase(number);
    } else if (what <= 5) {
      const int number = some_sequence();
      const std::int64_t tokens = cache_.tokens(number);
      const std::int64_t keep = below(4) == 0 ? below(static_cast<int>(tokens) + 1)
                                              : std::max<std::int64_t>(0, tokens - below(12));
      cache_.truncate(number, keep);
      model_.truncate(number, keep);
    } else if (what == 6 && count < 4) {
      const int from = some_sequence();
      const std::string path = folder_ + "/sequence.cache";
      cache_.save(from, path);
      model_.loaded(cache_.load(path), from);
    } else if (what <= 9) {
      append(1, 1 + below(90));
    } else {
      append(1 + below(count), 1 + below(4));
    }
  }

  // Vectors that the dictionary has, or that it has not; a few that are no numbers, huge or zero.
  // (Huge keys would make scores that fp32 does not tell apart.)
  std::vector<float> vectors(std::int64_t rows, bool huge) {
    const auto dim = static_cast<std::size_t>(c_.shape.head_dim);
    std::vector<float> x = cache_normals(static_cast<std::size_t>(rows) * dim, random_);
    const Dictionary& d = c_.set.dictionaries[static_cast<std::size_t>(
        below(static_cast<int>(c_.set.dictionaries.size())))];
    for (std::size_t row = 0; row < static_cast<std::size_t>(rows); ++row) {
      float* v = x.data() + row * dim;
      const int kind = below(200);
      if (kind < 120) {
        const float* a = &d.atoms[static_cast<std::size_t>(below(d.num_atoms)) * dim];
        const float* b = &d.atoms[static_cast<std::size_t>(below(d.num_atoms)) * dim];
        for (std::size_t i = 0; i < dim; ++i) v[i] = 2 * a[i] - b[i] + 0.05f * v[i];
      } else if (kind == 120 && bad_) {
        v[dim - 1] = std::numeric_limits<float>::quiet_NaN();
      } else if (kind == 121 && bad_) {
        v[0] = -std::numeric_limits<float>::infinity();
      } else if (kind == 122) {
        std::fill_n(v, dim, 0.0f);
      } else if (kind == 123 && huge) {
        v[1] = 70000;  // half floats end before
      }
    }
    return x;
  }

  void append(int count, int tokens) {
    std::vector<int> numbers;
    for (const auto& [number, layers] : model_.sequences) numbers.push_back(number);
    std::shuffle(numbers.begin(), numbers.end(), random_);
    numbers.resize(static_cast<std::size_t>(count));
    bad_ = below(8) == 0;
    for (int layer = 0; layer < c_.shape.layers; ++layer) {
      const std::int64_t row = std::int64_t{c_.shape.kv_heads} * c_.shape.head_dim;
      const std::vector<float> keys = vectors(count * tokens * c_.shape.kv_heads, false);
      const std::vector<float> values = vectors(count * tokens * c_.shape.kv_heads, true);
      cache_.append(layer, numbers, tokens, keys.data(), values.data());
      for (int i = 0; i < count; ++i)
        model_.append(numbers[static_cast<std::size_t>(i)],
                      layer,
                      tokens,
                      keys.data() + i * tokens * row,
                      values.data() + i * tokens * row);
    }
  }

  void check_counts() {
    for (const auto& [number, layers] : model_.sequences) {
      ASSERT_EQ(cache_.bytes(number), model_.bytes(number)) << "sequence " << number;
      for (int l = 0; l < c_.shape.layers; ++l) {
        const auto& layer = layers[static_cast<std::size_t>(l)];
        ASSERT_EQ(cache_.tokens(number, l), static_cast<std::int64_t>(layer.tokens.size()));
        ASSERT_EQ(cache_.coded_tokens(number, l), model_.num_coded(layer));
      }
    }
    ASSERT_EQ(cache_.bytes(), model_.bytes());
  }

  void check_attention() {
    if (model_.sequences.empty()) return;
    std::vector<int> numbers;
    for (int i = 0; i <= below(3); ++i) numbers.push_back(some_sequence());
    const std::int64_t heads = std::int64_t{c_.shape.kv_heads} * c_.shape.group;
    const int dim = c_.shape.head_dim, layer = below(c_.shape.layers);
    const auto total = static_cast<std::size_t>(std::ssize(numbers) * heads * dim);
    const std::vector<float> queries = cache_normals(total, random_);
    std::vector<float> out(total);
    if (attend_)
      attend_(cache_, layer, numbers, queries, out.data());
    else
      cache_.attend(layer, numbers, queries.data(), out.data());
    for (std::int64_t i = 0; i < std::ssize(numbers) * heads; ++i) {
      double size = 0;
      const std::vector<double> want = model_.attend(numbers[static_cast<std::size_t>(i / heads)],
                                                     layer,
                                                     static_cast<int>(i % heads),
                                                     queries.data() + i * dim,
                                                     &size);
      double off = 0, norm = 0;
      bool finite = true, ours_finite = true;
      for (int d = 0; d < dim; ++d) {
        const double x = want[static_cast<std::size_t>(d)];
        const double ours = static_cast<double>(out[static_cast<std::size_t>(i * dim + d)]);
        finite = finite && std::isfinite(x);
        ours_finite = ours_finite && std::isfinite(ours);
        off += (ours - x) * (ours - x), norm += x * x;
      }
      ASSERT_EQ(finite, ours_finite) << "query " << i;
      // Relative to the output, or to what it is the mean of, where that cancels.
      if (!finite) continue;
      ASSERT_LE(std::sqrt(off), 1e-5 * std::max(std::sqrt(norm), 0.1 * size));
    }
  }

  void check_vectors(int number) {
    const std::int64_t row = std::int64_t{c_.shape.kv_heads} * c_.shape.head_dim;
    for (int l = 0; l < c_.shape.layers; ++l) {
      const auto& layer = model_.sequences[number][static_cast<std::size_t>(l)];
      const std::int64_t first = below(static_cast<int>(layer.tokens.size()) + 1);
      const std::int64_t count =
          below(static_cast<int>(layer.tokens.size() - static_cast<std::size_t>(first)) + 1);
      std::vector<float> found[2];
      for (auto& f : found) f.resize(static_cast<std::size_t>(count * row));
      cache_.reconstruct(l, number, first, count, found[0].data(), found[1].data());
      for (std::int64_t i = 0; i < 2 * count * row; ++i) {
        const auto& token = layer.tokens[static_cast<std::size_t>(first + i / 2 / row)];
        const int kind = static_cast<int>(i % 2);
        const std::int64_t at = i / 2 % row;
        const float want = model_.vector(
            token,
            kind,
            static_cast<int>(at /
                             c_.shape.head_dim))[static_cast<std::size_t>(at % c_.shape.head_dim)];
        const float ours = found[kind][static_cast<std::size_t>(i / 2)];
        if (std::isnan(want) && std::isnan(ours)) continue;
        ASSERT_EQ(ours, want) << "token " << first + i / 2 / row << " of layer " << l;
      }
    }
  }

  CacheCase c_;
  CompressedCache cache_;
  CacheModel model_;
  std::mt19937 random_;
  std::string folder_;
  CacheAttend attend_;
  bool bad_ = false;
};

/// Runs of a range of seeds, the cases in turn.
inline void run_cache_operations(unsigned first,
                                 unsigned last,
                                 const std::vector<CacheCase>& cases = cache_cases(),
                                 const CacheAttend& attend = {}) {
  const std::string folder = testing::TempDir() + "/cache_" + std::to_string(getpid());
  std::filesystem::create_directories(folder);
  for (unsigned seed = first; seed < last && !testing::Test::HasFailure(); ++seed) {
    const CacheCase& c = cases[seed % cases.size()];
    SCOPED_TRACE(testing::Message() << "seed " << seed << ", " << c.name);
    CacheOperations(c, seed, folder, attend).run(20);
  }
  std::filesystem::remove_all(folder);
}

}  // namespace lexico
