#pragma once
// The screen with AMX: atoms and signals in 16 bits, as a high and a low byte each, v = 256 high +
// low, so d.x = 65536 high.high + 256 (high.low + low.high) + low.low. Where p is made anew for
// every pick (OMP, ols-N), low.low is left out and bounded by the lengths of both; where errors
// would add up (OLS, Gram form) all four are made. The Gram form is that of VNNI. Tiles come from
// the file that includes this (tiles_amx.h).
#include "kernels/pursuit/gram_vnni.h"

namespace lexico::kernels::cpu {
namespace {

constexpr float kOne = 127 * 256;  // of an element of an atom or a signal: its high byte is 127
constexpr int kSignalTile = 2 * kTileRows;
constexpr bool kCorrelateIsFast = true, kHasFreshCorrelations = true;
constexpr int kStepDims = kTileRowBytes;  // dimensions that one tile product takes
constexpr int kTileAtoms = 16;

inline int steps_of(const PursuitShape& shape) {
  return (shape.padded_dim + kStepDims - 1) / kStepDims;
}
// A step is a tile of high bytes, then one of low bytes.
inline std::size_t rows_bytes(const PursuitShape& shape) {
  return size(steps_of(shape)) * 2 * kTileBytes;
}
// The tiles, then for each panel the largest |low|^2 of its atoms.
inline std::size_t tile_bytes(const PursuitShape& shape) {
  return size(shape.padded_atoms / kTileAtoms) * rows_bytes(shape);
}
inline std::size_t panel_bytes(const PursuitShape& shape) {
  return tile_bytes(shape) + size(shape.padded_atoms / kPanel) * sizeof(std::int32_t);
}
inline std::int32_t* low_squares(const PursuitShape& shape, const PreparedAtoms& atoms) {
  return reinterpret_cast<std::int32_t*>(static_cast<char*>(atoms.panels) + tile_bytes(shape));
}
inline std::size_t packed_signal_bytes(const PursuitShape& shape) {
  return rows_bytes(shape) / kTileRows;
}

// Of rounding atoms and signals.
inline float correlate_deviation(const PursuitShape&) { return 1.4142136f * kStepDeviation / kOne; }
inline float gram_deviation(const PursuitShape& shape) {
  const float made = correlate_deviation(shape), stored = kStepDeviation / kGramOne;
  return __builtin_sqrtf(made * made + stored * stored);
}

struct Bytes {
  __m128i high, low;
};
inline Bytes to_bytes(__m512 v) {
  // A norm may be a rounding error above 1.
  const __m512i most = _mm512_set1_epi32(static_cast<int>(kOne));
  const __m512i value = _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(v), most),
                                         _mm512_sub_epi32(_mm512_setzero_si512(), most));
  const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
  // In -128..127; only the last byte is kept, and that is the value's own.
  return {_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(value)};
}
inline VecInt squares(__m128i bytes) {
  const VecInt x = (VecInt)_mm512_cvtepi8_epi32(bytes);
  return x * x;
}

// [step][high, low][16 signals][64 dimensions]; `v` is nullptr for a signal of zeros. Returns
// |low|^2.
inline std::int32_t pack_signal(
    const PursuitShape& shape, const float* v, float norm, int row, std::int8_t* to) {
  const __m512 scale = _mm512_set1_ps(norm > 0 ? kOne / norm : 0);
  to += row * kTileRowBytes;
  VecInt low2{};
  for (int first = 0; first < shape.padded_dim; first += kStepDims, to += 2 * kTileBytes) {
    for (int k = 0; k < kStepDims; k += 16) {
      const bool there = v != nullptr && first + k < shape.padded_dim;
      const Bytes bytes = to_bytes(there ? _mm512_mul_ps(_mm512_loadu_ps(v + first + k), scale)
                                         : _mm512_setzero_ps());
      _mm_store_si128(reinterpret_cast<__m128i*>(to + k), bytes.high);
      _mm_store_si128(reinterpret_cast<__m128i*>(to + kTileBytes + k), bytes.low);
      low2 += squares(bytes.low);
    }
  }
  return _mm512_reduce_add_epi32((__m512i)low2);
}

// `low2`, unless it is nullptr, gets |low|^2 of each.
inline std::int8_t* pack_signals(const PursuitShape& shape,
                                 const float* const* signals,
                                 const float* norms,
                                 int count,
                                 float* low2,
                                 void* memory) {
  std::int8_t* const packed = static_cast<std::int8_t*>(memory);
  for (int b = 0; b % kTileRows != 0 || b < count; ++b) {
    const bool there = b < count;
    const std::int32_t low = pack_signal(shape,
                                         there ? signals[b] : nullptr,
                                         !there             ? 0
                                         : norms == nullptr ? 1
                                                            : norms[b],
                                         b % kTileRows,
                                         packed + size(b / kTileRows) * rows_bytes(shape));
    if (there && low2 != nullptr) low2[b] = static_cast<float>(low);
  }
  return packed;
}

// [16 atoms of the panel][step][high, low][4 dimensions][16 atoms][4]
inline void pack_panel(const PursuitShape& shape, const PreparedAtoms& atoms, int panel) {
  std::int8_t* to = static_cast<std::int8_t*>(atoms.panels) +
                    size(panel) * (kPanel / kTileAtoms) * rows_bytes(shape);
  std::int32_t most = 0;
  for (int first = panel * kPanel; first < (panel + 1) * kPanel; first += kTileAtoms) {
    std::int32_t low2[kTileAtoms] = {};
    for (int step = 0; step < steps_of(shape); ++step, to += 2 * kTileBytes) {
      for (int a = 0; a < kTileAtoms; ++a) {
        const float* row = atoms.rows + size(first + a) * size(shape.padded_dim);
        for (int k = 0; k < kStepDims; k += 16) {
          const int dim = step * kStepDims + k;
          const bool there = first + a < shape.num_atoms && dim < shape.padded_dim;
          const Bytes bytes =
              to_bytes(there ? _mm512_mul_ps(_mm512_loadu_ps(row + dim), _mm512_set1_ps(kOne))
                             : _mm512_setzero_ps());
          low2[a] += _mm512_reduce_add_epi32((__m512i)squares(bytes.low));
          alignas(16) std::int32_t high[4], low[4];  // of four dimensions each
          _mm_store_si128(reinterpret_cast<__m128i*>(high), bytes.high);
          _mm_store_si128(reinterpret_cast<__m128i*>(low), bytes.low);
          for (int i = 0; i < 4; ++i) {
            std::int8_t* const out = to + (k / 4 + i) * kTileRowBytes + 4 * a;
            __builtin_memcpy(out, high + i, 4);
            __builtin_memcpy(out + kTileBytes, low + i, 4);
          }
        }
      }
    }
    for (const std::int32_t x : low2) most = x > most ? x : most;
  }
  low_squares(shape, atoms)[panel] = most;
}

// At most |low.low| of any atom and any signal, by Cauchy-Schwarz, for |low|^2 = 1 of the signal;
// in units of d.x.
inline float left_out_by_atoms(const PursuitShape& shape, const PreparedAtoms& atoms) {
  const std::int32_t* const low2 = low_squares(shape, atoms);
  std::int32_t most = 0;
  for (int panel = 0; panel * kPanel < shape.padded_atoms; ++panel)
    most = low2[panel] > most ? low2[panel] : most;
  return __builtin_sqrtf(static_cast<float>(most)) * (1.00001f / (kOne * kOne));
}

enum class Products { kThree, kFour };  // without low.low, and with it

// Tiles 0 to 2: sums of high.high, of the mixed products and of low.low for one group of 16
// signals; 3 to 5 for another. 6 and 7: bytes of atoms and of signals.
template <bool kTwo, Products kProducts>
inline void multiply_tiles(const std::int8_t* atoms,
                           const std::int8_t* signals,
                           std::size_t group_bytes,
                           int steps) {
  constexpr bool kLow = kProducts == Products::kFour;
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (kLow) tile_zero<2>();
  if constexpr (kTwo) {
    tile_zero<3>();
    tile_zero<4>();
    if constexpr (kLow) tile_zero<5>();
  }
  for (int step = 0; step < steps; ++step, atoms += 2 * kTileBytes, signals += 2 * kTileBytes) {
    tile_load<6>(atoms);
    tile_load<7>(signals);
    tile_add_products<0, 7, 6>();
    if constexpr (kTwo) {
      tile_load<7>(signals + group_bytes);
      tile_add_products<3, 7, 6>();
    }
    tile_load<7>(signals + kTileBytes);
    tile_add_products<1, 7, 6>();
    if constexpr (kTwo) {
      tile_load<7>(signals + group_bytes + kTileBytes);
      tile_add_products<4, 7, 6>();
    }
    tile_load<6>(atoms + kTileBytes);
    if constexpr (kLow) {
      if constexpr (kTwo) {
        tile_add_products<5, 7, 6>();
        tile_load<7>(signals + kTileBytes);
      }
      tile_add_products<2, 7, 6>();
    }
    tile_load<7>(signals);
    tile_add_products<1, 7, 6>();
    if constexpr (kTwo) {
      tile_load<7>(signals + group_bytes);
      tile_add_products<4, 7, 6>();
    }
  }
}

struct TileSums {
  alignas(64) std::int32_t high[kTileRows][kTileAtoms], mixed[kTileRows][kTileAtoms],
      low[kTileRows][kTileAtoms];
};

template <bool kTwo, Products kProducts>
inline void store_tiles(TileSums* sums) {
  tile_store<0>(sums[0].high[0]);
  tile_store<1>(sums[0].mixed[0]);
  if constexpr (kProducts == Products::kFour) tile_store<2>(sums[0].low[0]);
  if constexpr (kTwo) {
    tile_store<3>(sums[1].high[0]);
    tile_store<4>(sums[1].mixed[0]);
    if constexpr (kProducts == Products::kFour) tile_store<5>(sums[1].low[0]);
  }
}

// Atoms whose sums wait to be written, so that a signal's are side by side: kAhead tiles of them.
constexpr int kAhead = 2;

// emit(signal, first atom, sums) gets d.v in units of 1 / kOne^2 for kAhead vectors of atoms, the
// signals from `base` on.
template <bool kTwo, Products kProducts, typename Emit>
inline void correlate_groups(const PursuitShape& shape,
                             const std::int8_t* atoms,
                             const std::int8_t* signals,
                             int base,
                             int count,
                             Emit&& emit) {
  constexpr int kGroups = kTwo ? 2 : 1, kShare = kGroups * kTileRows / kAhead;
  const std::size_t group_bytes = rows_bytes(shape);
  const int steps = steps_of(shape);
  TileSums sums[2][kAhead][kGroups];
  int side = 0;
  const auto emit_sums = [&](int n, int begin, int end) {
    for (int i = begin; i < end && i < count; ++i) {
      VecInt all[kAhead];
#pragma GCC unroll 4
      for (int v = 0; v < kAhead; ++v) {
        const TileSums& one = sums[1 - side][v][i / kTileRows];
        const int row = i % kTileRows;
        all[v] = ((load_int(one.high[row]) << 8) + load_int(one.mixed[row])) << 8;
        if constexpr (kProducts == Products::kFour) all[v] += load_int(one.low[row]);
      }
      emit(base + i, n, all);
    }
  };
  // While the tiles multiply, a share of the sums before theirs is written.
  for (int n = 0; n < shape.padded_atoms; n += kAhead * kTileAtoms, side = 1 - side) {
    for (int v = 0; v < kAhead; ++v, atoms += group_bytes) {
      multiply_tiles<kTwo, kProducts>(atoms, signals, group_bytes, steps);
      if (n > 0) emit_sums(n - kAhead * kTileAtoms, v * kShare, (v + 1) * kShare);
      store_tiles<kTwo, kProducts>(sums[side][v]);
    }
  }
  emit_sums(shape.padded_atoms - kAhead * kTileAtoms, 0, count);
}

template <Products kProducts, typename Emit>
inline void correlate_tiles(const PursuitShape& shape,
                            const PreparedAtoms& atoms,
                            const std::int8_t* packed,
                            int num_signals,
                            Emit&& emit) {
  const TileSession session;
  const std::int8_t* const panels = static_cast<const std::int8_t*>(atoms.panels);
  for (int b = 0; b < num_signals; b += kSignalTile, packed += 2 * rows_bytes(shape)) {
    const int left = num_signals - b;
    if (left > kTileRows) {
      const int count = left < kSignalTile ? left : kSignalTile;
      correlate_groups<true, kProducts>(shape, panels, packed, b, count, emit);
    } else {
      correlate_groups<false, kProducts>(shape, panels, packed, b, left, emit);
    }
  }
}

// out[b][n] = d_n . signals[b] for all atoms; with `fresh`, less a part.
inline void correlate(const PursuitShape& shape,
                      const PreparedAtoms& atoms,
                      const float* const* signals,
                      const float* norms,
                      int num_signals,
                      float* const* out,
                      const FreshCorrelations* fresh,
                      void* packed_memory) {
  const std::int8_t* packed = pack_signals(shape,
                                           signals,
                                           norms,
                                           num_signals,
                                           fresh == nullptr ? nullptr : fresh->left_out,
                                           packed_memory);
  if (fresh == nullptr) {
    correlate_tiles<Products::kFour>(
        shape, atoms, packed, num_signals, [&](int b, int n, const VecInt* sums) {
          const Vec unit = splat(norms[b] * (1 / kOne / kOne));
          for (int v = 0; v < kAhead; ++v) {
            store(out[b] + n + v * kTileAtoms, (Vec)_mm512_cvtepi32_ps((__m512i)sums[v]) * unit);
          }
        });
    return;
  }
  const float by_atoms = left_out_by_atoms(shape, atoms);
  for (int b = 0; b < num_signals; ++b)
    fresh->left_out[b] = norms[b] * by_atoms * __builtin_sqrtf(fresh->left_out[b]);
  correlate_tiles<Products::kThree>(
      shape, atoms, packed, num_signals, [&](int b, int n, const VecInt* sums) {
        const Vec unit = splat(norms[b] * (1 / kOne / kOne));
        float* const to = out[b] + n;
        Vec p[kAhead];
#pragma GCC unroll 4
        for (int v = 0; v < kAhead; ++v) {
          p[v] = (Vec)_mm512_cvtepi32_ps((__m512i)sums[v]) * unit;
          store(to + v * kTileAtoms, p[v]);
        }
        float* const group = fresh->best[b] + n / kChunkAtoms * kLanes;
        Vec most = n % kChunkAtoms == 0 ? Vec{} : load(group);
#pragma GCC unroll 4
        for (int v = 0; v < kAhead; ++v) most = max_magnitude(most, p[v]);
        store(group, most);
      });
}

inline void gram_rows(const PursuitShape& shape,
                      const PreparedAtoms& atoms,
                      const float* const* rows,
                      int first,
                      int count,
                      void* packed_memory) {
  const std::int8_t* packed = pack_signals(shape, rows, nullptr, count, nullptr, packed_memory);
  std::int16_t* gram =
      static_cast<std::int16_t*>(atoms.gram) + size(first) * size(shape.padded_atoms);
  correlate_tiles<Products::kFour>(
      shape, atoms, packed, count, [&](int i, int n, const VecInt* sums) {
        for (int v = 0; v < kAhead; ++v) {
          const Vec value = (Vec)_mm512_cvtepi32_ps((__m512i)sums[v]) * (kGramOne / kOne / kOne);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(gram + size(i) * size(shape.padded_atoms) +
                                                         n + v * kTileAtoms),
                              _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)value)));
        }
      });
}

}  // namespace
}  // namespace lexico::kernels::cpu
