// The forms that scores and sums of codes can take, side by side on unpacked codes:
// nanoseconds per vector for four query heads. docs/attention.md says what came of it.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

namespace {

constexpr int kHeads = 4, kTokens = 4096;

struct Codes {
  int s, atoms;
  std::vector<std::int32_t> index;  // [kTokens / 16, s, 16]
  std::vector<float> weight;
  std::vector<std::int32_t> token, first;  // the same sorted by atom; first [atoms + 1]
  std::vector<float> sorted;
  std::vector<float> table, columns;      // [atoms, 4], [4, atoms]
  std::vector<std::uint32_t> half_pairs;  // [2, atoms] of two half floats
  std::vector<float> p, sums, scores;
};

Codes make(int s, int atoms) {
  Codes c{s, atoms, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const std::size_t count = static_cast<std::size_t>(s) * kTokens;
  for (std::size_t i = 0; i < count; ++i) {
    c.index.push_back(static_cast<int>(random() % static_cast<unsigned>(atoms)));
    c.weight.push_back(normal(random));
  }
  const std::size_t size = static_cast<std::size_t>(atoms) * kHeads;
  for (std::size_t i = 0; i < size; ++i) c.table.push_back(normal(random));
  c.columns.resize(size), c.half_pairs.resize(size / 2), c.sums.resize(size);
  for (int n = 0; n < atoms; ++n) {
    for (int h = 0; h < kHeads; ++h)
      c.columns[static_cast<std::size_t>(h * atoms + n)] =
          c.table[static_cast<std::size_t>(n * kHeads + h)];
    for (int pair = 0; pair < 2; ++pair)
      c.half_pairs[static_cast<std::size_t>(pair * atoms + n)] =
          _cvtss_sh(c.table[static_cast<std::size_t>(n * kHeads + 2 * pair)], 0) |
          static_cast<std::uint32_t>(
              _cvtss_sh(c.table[static_cast<std::size_t>(n * kHeads + 2 * pair + 1)], 0))
              << 16;
  }
  c.first.assign(static_cast<std::size_t>(atoms) + 1, 0);
  for (const std::int32_t n : c.index) ++c.first[static_cast<std::size_t>(n) + 1];
  for (std::size_t n = 0; n < static_cast<std::size_t>(atoms); ++n) c.first[n + 1] += c.first[n];
  std::vector<std::int32_t> at = c.first;
  c.token.resize(count), c.sorted.resize(count);
  for (int block = 0; block < kTokens / 16; ++block)
    for (int t = 0; t < 16; ++t)
      for (int k = 0; k < s; ++k) {
        const std::size_t i = static_cast<std::size_t>((block * s + k) * 16 + t);
        const std::size_t to = static_cast<std::size_t>(at[static_cast<std::size_t>(c.index[i])]++);
        c.token[to] = block * 16 + t;
        c.sorted[to] = c.weight[i];
      }
  for (int i = 0; i < kTokens * kHeads; ++i) c.p.push_back(0.5f + 0.1f * normal(random));
  c.scores.resize(c.p.size());
  return c;
}

void scores_by_rows(Codes& c) {
  for (int block = 0; block < kTokens / 16; ++block) {
    for (int half = 0; half < 16; half += 8) {
      __m128 sum[8] = {};
      for (int k = 0; k < c.s; ++k) {
        const std::ptrdiff_t at = (block * c.s + k) * 16 + half;
        for (int t = 0; t < 8; ++t)
          sum[t] = _mm_fmadd_ps(_mm_set1_ps(c.weight.data()[at + t]),
                                _mm_loadu_ps(c.table.data() + c.index.data()[at + t] * kHeads),
                                sum[t]);
      }
      for (int t = 0; t < 8; ++t)
        _mm_storeu_ps(c.scores.data() + (block * 16 + half + t) * kHeads, sum[t]);
    }
  }
}

void scores_by_gather(Codes& c) {
  for (int block = 0; block < kTokens / 16; ++block) {
    __m512 sum[kHeads] = {};
    for (int k = 0; k < c.s; ++k) {
      const std::ptrdiff_t at = (block * c.s + k) * 16;
      const __m512i index = _mm512_loadu_si512(c.index.data() + at);
      const __m512 weight = _mm512_loadu_ps(c.weight.data() + at);
      for (int h = 0; h < kHeads; ++h)
        sum[h] = _mm512_fmadd_ps(
            weight, _mm512_i32gather_ps(index, c.columns.data() + h * c.atoms, 4), sum[h]);
    }
    for (int h = 0; h < kHeads; ++h)
      _mm512_storeu_ps(c.scores.data() + (block * kHeads + h) * 16, sum[h]);
  }
}

void scores_by_half_gather(Codes& c) {
  for (int block = 0; block < kTokens / 16; ++block) {
    __m512 sum[kHeads] = {};
    for (int k = 0; k < c.s; ++k) {
      const std::ptrdiff_t at = (block * c.s + k) * 16;
      const __m512i index = _mm512_loadu_si512(c.index.data() + at);
      const __m512 weight = _mm512_loadu_ps(c.weight.data() + at);
      for (int pair = 0; pair < 2; ++pair) {
        const __m512i two = _mm512_i32gather_epi32(index, c.half_pairs.data() + pair * c.atoms, 4);
        sum[2 * pair] =
            _mm512_fmadd_ps(weight, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(two)), sum[2 * pair]);
        sum[2 * pair + 1] =
            _mm512_fmadd_ps(weight,
                            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(two, 16))),
                            sum[2 * pair + 1]);
      }
    }
    for (int h = 0; h < kHeads; ++h)
      _mm512_storeu_ps(c.scores.data() + (block * kHeads + h) * 16, sum[h]);
  }
}

void sums_by_rows(Codes& c) {
  for (int block = 0; block < kTokens / 16; ++block) {
    for (int t = 0; t < 16; ++t) {
      const __m128 p = _mm_loadu_ps(c.p.data() + (block * 16 + t) * kHeads);
      for (int k = 0; k < c.s; ++k) {
        const std::ptrdiff_t at = (block * c.s + k) * 16 + t;
        float* sum = c.sums.data() + c.index.data()[at] * kHeads;
        _mm_storeu_ps(sum, _mm_fmadd_ps(_mm_set1_ps(c.weight.data()[at]), p, _mm_loadu_ps(sum)));
      }
    }
  }
}

void sums_by_atoms(Codes& c) {
  for (int n = 0; n < c.atoms; ++n) {
    __m128 sum = _mm_loadu_ps(c.sums.data() + n * kHeads);
    for (std::int32_t i = c.first.data()[n]; i < c.first.data()[n + 1]; ++i)
      sum = _mm_fmadd_ps(_mm_set1_ps(c.sorted.data()[i]),
                         _mm_loadu_ps(c.p.data() + c.token.data()[i] * kHeads),
                         sum);
    _mm_storeu_ps(c.sums.data() + n * kHeads, sum);
  }
}

// The fastest of many runs: what else runs on the machine can only make it slower.
double ns_per_vector(void (*form)(Codes&), Codes& c) {
  double best = 1e30;
  for (int run = 0; run < 200; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    form(c);
    best = std::min(
        best,
        std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count());
  }
  return best / kTokens;
}

}  // namespace

int main() {
  std::printf(
      "ns per vector, 4 query heads      scores: rows  gather  half pairs    sums: rows  by "
      "atom\n");
  for (const int atoms : {1024, 4096}) {
    for (const int s : {4, 8, 16, 32}) {
      Codes c = make(s, atoms);
      std::printf("N = %4d, s = %2d %30.2f %7.2f %11.2f %13.2f %8.2f\n",
                  atoms,
                  s,
                  ns_per_vector(scores_by_rows, c),
                  ns_per_vector(scores_by_gather, c),
                  ns_per_vector(scores_by_half_gather, c),
                  ns_per_vector(sums_by_rows, c),
                  ns_per_vector(sums_by_atoms, c));
    }
  }
  return 0;
}
