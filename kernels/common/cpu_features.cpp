#include "kernels/common/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lexico::kernels {
namespace {

bool has_bit(unsigned word, int bit) { return (word >> bit & 1u) != 0; }

// Which register states the operating system saves: XCR0.
unsigned long long saved_states() {
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
}

// Palette 1 as all CPUs so far have it: eight tiles of 16 rows of 64 bytes.
bool has_full_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(0x1d, 0, &a, &b, &c, &d) == 0 || a < 1) return false;
  if (__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) == 0) return false;
  return (a >> 16) >= 1024 && (b & 0xffff) >= 64 && (b >> 16) >= 8 && (c & 0xffff) >= 16;
}

// Linux hands out the 8 KiB of tile state per thread only to processes that ask.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures f;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !has_bit(c, 27)) return f;  // OSXSAVE
  const bool fma = has_bit(c, 12), f16c = has_bit(c, 29);
  const unsigned long long states = saved_states();
  const bool ymm = (states & 0x6) == 0x6, zmm = (states & 0xe6) == 0xe6,
             tiles = (states & 0x60000) == 0x60000;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return f;
  const unsigned deepest = a;
  f.avx2 = ymm && fma && f16c && has_bit(b, 5);
  f.avx512 = f.avx2 && zmm && has_bit(b, 16) && has_bit(b, 17) && has_bit(b, 30) && has_bit(b, 31);
  f.avx512_vbmi = f.avx512 && has_bit(c, 1);
  f.avx512_vnni = f.avx512 && has_bit(c, 11);
  f.amx =
      f.avx512 && tiles && has_bit(d, 24) && has_bit(d, 25) && has_full_tiles() && tiles_granted();
  if (deepest >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0)
    f.avx512_bf16 = f.avx512 && has_bit(a, 5);
  return f;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace lexico::kernels

#else

namespace lexico::kernels {
const CpuFeatures& cpu_features() {
  static const CpuFeatures none;
  return none;
}
}  // namespace lexico::kernels

#endif
