// What this machine can do at most: the rates and bandwidths that docs/encoder.md measures the
// encoder against. Built for the machine it is compiled on; prints one line per limit, per thread.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename Body>
double best_of(int repeats, Body&& body) {
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    const double begin = seconds();
    body();
    best = std::min(best, seconds() - begin);
  }
  return best;
}

volatile float sink_f;
volatile int sink_i;

void bandwidth(const char* name, std::size_t bytes) {
  std::vector<char> memory(bytes + 64, 1);
  const char* p =
      reinterpret_cast<const char*>((reinterpret_cast<std::size_t>(memory.data()) + 63) / 64 * 64);
  const std::size_t rounds = std::max<std::size_t>(1, (std::size_t{256} << 20) / bytes);
  const double time = best_of(5, [&] {
    __m256i a{}, b{}, c{}, d{};
    for (std::size_t r = 0; r < rounds; ++r) {
      for (std::size_t i = 0; i + 128 <= bytes; i += 128) {
        a = _mm256_or_si256(a, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + i)));
        b = _mm256_or_si256(b, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + i + 32)));
        c = _mm256_or_si256(c, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + i + 64)));
        d = _mm256_or_si256(d, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + i + 96)));
      }
      __asm__ volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d) : : "memory");
    }
    sink_i = _mm256_extract_epi32(_mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d)), 0);
  });
  std::printf("%-28s %8.1f GB/s\n", name, static_cast<double>(rounds * bytes) / time * 1e-9);
}

#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

}  // namespace

int main() {
  constexpr long kRounds = 20'000'000;
  {
    unsigned long x = 1;
    const double time = best_of(3, [&] {
      for (long i = 0; i < kRounds * 5; ++i) __asm__ volatile("add $1, %0" : "+r"(x));
    });
    std::printf("%-28s %8.2f GHz\n", "clock (dependent adds)", 5e-9 * kRounds / time);
  }
#define DECLARE(i) auto acc##i = zero;
#define KEEP(i) __asm__ volatile("" : "+v"(acc##i));
#define RATE(name, type, init, step, per_instruction)              \
  {                                                                \
    const type zero = init;                                        \
    type x = init, y = init;                                       \
    __asm__ volatile("" : "+v"(x), "+v"(y));                       \
    TWELVE(DECLARE)                                                \
    const double time = best_of(3, [&] {                           \
      for (long r = 0; r < kRounds; ++r) {                         \
        TWELVE(step)                                               \
        TWELVE(KEEP)                                               \
      }                                                            \
    });                                                            \
    std::printf("%-28s %8.1f G multiply-adds/s\n",                 \
                name,                                              \
                12.0 * kRounds * (per_instruction) / time * 1e-9); \
  }
#if defined(__FMA__)
#define FMA256(i) acc##i = _mm256_fmadd_ps(x, y, acc##i);
  RATE("fp32 FMA, AVX2", __m256, _mm256_setzero_ps(), FMA256, 8)
#endif
#if defined(__AVX512F__)
#define FMA512(i) acc##i = _mm512_fmadd_ps(x, y, acc##i);
  RATE("fp32 FMA, AVX-512", __m512, _mm512_setzero_ps(), FMA512, 16)
#endif
#if defined(__AVX512BF16__)
#define BF16(i) acc##i = _mm512_dpbf16_ps(acc##i, (__m512bh)x, (__m512bh)y);
  RATE("bf16 dot, AVX-512", __m512, _mm512_setzero_ps(), BF16, 32)
#endif
#if defined(__AVX512VNNI__)
#define VNNI(i) acc##i = _mm512_dpbusd_epi32(acc##i, x, y);
#define VNNI16(i) acc##i = _mm512_dpwssd_epi32(acc##i, x, y);
  RATE("int16 dot, AVX-512 VNNI", __m512i, _mm512_setzero_si512(), VNNI16, 32)
  RATE("int8 dot, AVX-512 VNNI", __m512i, _mm512_setzero_si512(), VNNI, 64)
#endif
  bandwidth("read, L1 (24 KiB)", 24 << 10);
  bandwidth("read, L2 (512 KiB)", 512 << 10);
  bandwidth("read, L3 (8 MiB)", 8 << 20);
  bandwidth("read, 24 MiB", 24 << 20);
  bandwidth("read, 64 MiB", 64 << 20);
  bandwidth("read, DRAM (256 MiB)", 256 << 20);
  return 0;
}
