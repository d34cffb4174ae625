#pragma once
// AMX tiles: eight registers of 16 rows of 64 bytes. In assembly, since the intrinsics of GCC 12
// take no template arguments for tile numbers and do not tell the compiler that a tile load reads
// memory. tests/kernels/tiles_emulated.h has the same functions for CPUs without them.
#include <cstddef>
#include <cstdint>

namespace lexico::kernels::cpu {
namespace {

constexpr int kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;

// Tiles can be used while one of these lives, in its thread. They are given back after, since a
// context switch has 8 KiB more to save while they are in use.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) Configuration {
      std::uint8_t palette, start_row, reserved[14];
      std::uint16_t row_bytes[16];
      std::uint8_t rows[16];
    } all{};
    static_assert(sizeof all == 64);
    all.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      all.row_bytes[tile] = kTileRowBytes;
      all.rows[tile] = kTileRows;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(all));
  }
  ~TileSession() { __asm__ volatile("tilerelease" : : : "memory"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

template <int kTile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Rows follow each other in memory.
template <int kTile>
inline void tile_load(const std::int8_t* from) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0"
                   :
                   : "i"(kTile), "r"(from), "r"(std::ptrdiff_t{kTileRowBytes})
                   : "memory");
}
template <int kTile>
inline void tile_store(std::int32_t* to) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)"
                   :
                   : "i"(kTile), "r"(to), "r"(std::ptrdiff_t{kTileRowBytes})
                   : "memory");
}
// sum[i][j] += the products of 64 signed bytes: 4 k + b of row i of x, 4 j + b of row k of y.
template <int kSum, int kX, int kY>
inline void tile_add_products() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kY));
}

}  // namespace
}  // namespace lexico::kernels::cpu
