#pragma once
// AMX tiles in plain C++, with the functions of kernels/pursuit/tiles_amx.h: integer sums, so every
// bit is that of the hardware. Using a tile outside of a session ends the program, as it would
// there.
#include <cstdint>

namespace lexico::kernels::cpu {
namespace {

constexpr int kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;

struct EmulatedTiles {
  std::int8_t bytes[8][kTileBytes];
  bool in_session;
};
thread_local EmulatedTiles emulated_tiles{};

template <int kTile>
inline std::int8_t* emulated_tile() {
  static_assert(kTile >= 0 && kTile < 8);
  if (!emulated_tiles.in_session) __builtin_trap();
  return emulated_tiles.bytes[kTile];
}

class TileSession {
 public:
  TileSession() {
    if (emulated_tiles.in_session) __builtin_trap();  // its end would release the outer one's tiles
    __builtin_memset(emulated_tiles.bytes, 0, sizeof emulated_tiles.bytes);
    emulated_tiles.in_session = true;
  }
  ~TileSession() { emulated_tiles.in_session = false; }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

template <int kTile>
inline void tile_zero() {
  __builtin_memset(emulated_tile<kTile>(), 0, kTileBytes);
}
template <int kTile>
inline void tile_load(const std::int8_t* from) {
  __builtin_memcpy(emulated_tile<kTile>(), from, kTileBytes);
}
template <int kTile>
inline void tile_store(std::int32_t* to) {
  __builtin_memcpy(to, emulated_tile<kTile>(), kTileBytes);
}
template <int kSum, int kX, int kY>
inline void tile_add_products() {
  static_assert(kSum != kX && kSum != kY && kX != kY, "the instruction faults on these");
  const std::int8_t *const x = emulated_tile<kX>(), *const y = emulated_tile<kY>();
  std::int32_t sums[kTileRows][16];
  __builtin_memcpy(sums, emulated_tile<kSum>(), sizeof sums);
  for (int i = 0; i < kTileRows; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int b = 0; b < 4; ++b) {
        const int factor = x[i * kTileRowBytes + 4 * k + b];
        for (int j = 0; j < 16; ++j) sums[i][j] += factor * y[k * kTileRowBytes + 4 * j + b];
      }
    }
  }
  __builtin_memcpy(emulated_tile<kSum>(), sums, sizeof sums);
}

}  // namespace
}  // namespace lexico::kernels::cpu
