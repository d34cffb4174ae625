#pragma once
// The screen with AMX: atoms and signals in 16 bits, as a high and a low byte each, v = 256 high +
// low. d.x = 65536 high.high + 256 (high.low + low.high) + low.low, and the last is left out: three
// byte products. The Gram form is that of VNNI. Tiles come from the file that includes this
// (tiles_amx.h).
#include "kernels/pursuit/gram_vnni.h"

namespace lexico::kernels::cpu {
namespace {

constexpr float kOne = 127 * 256;  // of an element of an atom or a signal: its high byte is 127
constexpr float kSumOne = kOne * kOne / 256;  // of 256 high.high + high.low + low.high
constexpr int kSignalTile = 2 * kTileRows;
constexpr bool kCorrelateIsFast = true, kCorrelateKeepsBest = true;
constexpr int kStepDims = kTileRowBytes;  // dimensions that one tile product takes
constexpr int kTileAtoms = 16;

inline int steps_of(const PursuitShape& shape) {
  return (shape.padded_dim + kStepDims - 1) / kStepDims;
}
// A step is a tile of high bytes, then one of low bytes.
inline std::size_t rows_bytes(const PursuitShape& shape) {
  return size(steps_of(shape)) * 2 * kTileBytes;
}
inline std::size_t panel_bytes(const PursuitShape& shape) {
  return size(shape.padded_atoms / kTileAtoms) * rows_bytes(shape);
}
inline std::size_t packed_signal_bytes(const PursuitShape& shape) {
  return rows_bytes(shape) / kTileRows;
}

// Rounding atoms and signals, and low.low. By Cauchy-Schwarz that is at most the product of the
// lengths of the low bytes, which it reaches where signal and atom are the same; so a sixth of it
// counts as a deviation, no less than that of independent bytes (65536 / 12 is the variance of a
// low byte).
inline float correlate_deviation(const PursuitShape& shape) {
  const float m = static_cast<float>(shape.padded_dim), same = m / 6,
              independent = __builtin_sqrtf(m);
  const float low = (same > independent ? same : independent) * (65536.0f / 12) / (kOne * kOne);
  const float rounding = 1.4142136f * kStepDeviation / kOne;
  return __builtin_sqrtf(rounding * rounding + low * low);
}
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

// [step][high, low][16 signals][64 dimensions]; `v` is nullptr for a signal of zeros.
inline void pack_signal(
    const PursuitShape& shape, const float* v, float norm, int row, std::int8_t* to) {
  const __m512 scale = _mm512_set1_ps(norm > 0 ? kOne / norm : 0);
  to += row * kTileRowBytes;
  for (int first = 0; first < shape.padded_dim; first += kStepDims, to += 2 * kTileBytes) {
    for (int k = 0; k < kStepDims; k += 16) {
      const bool there = v != nullptr && first + k < shape.padded_dim;
      const Bytes bytes = to_bytes(there ? _mm512_mul_ps(_mm512_loadu_ps(v + first + k), scale)
                                         : _mm512_setzero_ps());
      _mm_store_si128(reinterpret_cast<__m128i*>(to + k), bytes.high);
      _mm_store_si128(reinterpret_cast<__m128i*>(to + kTileBytes + k), bytes.low);
    }
  }
}

inline std::int8_t* pack_signals(const PursuitShape& shape,
                                 const float* const* signals,
                                 const float* norms,
                                 int count,
                                 void* memory) {
  std::int8_t* const packed = static_cast<std::int8_t*>(memory);
  for (int b = 0; b % kTileRows != 0 || b < count; ++b) {
    const bool there = b < count;
    pack_signal(shape,
                there ? signals[b] : nullptr,
                !there             ? 0
                : norms == nullptr ? 1
                                   : norms[b],
                b % kTileRows,
                packed + size(b / kTileRows) * rows_bytes(shape));
  }
  return packed;
}

// [16 atoms of the panel][step][high, low][4 dimensions][16 atoms][4]
inline void pack_panel(const PursuitShape& shape, const PreparedAtoms& atoms, int panel) {
  std::int8_t* to = static_cast<std::int8_t*>(atoms.panels) +
                    size(panel) * (kPanel / kTileAtoms) * rows_bytes(shape);
  for (int first = panel * kPanel; first < (panel + 1) * kPanel; first += kTileAtoms) {
    for (int step = 0; step < steps_of(shape); ++step, to += 2 * kTileBytes) {
      for (int a = 0; a < kTileAtoms; ++a) {
        const float* row = atoms.rows + size(first + a) * size(shape.padded_dim);
        for (int k = 0; k < kStepDims; k += 16) {
          const int dim = step * kStepDims + k;
          const bool there = first + a < shape.num_atoms && dim < shape.padded_dim;
          const Bytes bytes =
              to_bytes(there ? _mm512_mul_ps(_mm512_loadu_ps(row + dim), _mm512_set1_ps(kOne))
                             : _mm512_setzero_ps());
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
  }
}

// Tiles: sums of high.high and of the mixed products for one or two groups of 16 signals (0 to 3),
// bytes of the atoms (4, 5) and of one group of signals (6, 7).
template <bool kTwo>
inline void multiply_tiles(const std::int8_t* atoms,
                           const std::int8_t* signals,
                           std::size_t group_bytes,
                           int steps) {
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (kTwo) {
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int step = 0; step < steps; ++step, atoms += 2 * kTileBytes, signals += 2 * kTileBytes) {
    tile_load<4>(atoms);
    tile_load<6>(signals);
    tile_add_products<0, 6, 4>();
    tile_load<5>(atoms + kTileBytes);
    tile_add_products<1, 6, 5>();
    tile_load<7>(signals + kTileBytes);
    tile_add_products<1, 7, 4>();
    if constexpr (kTwo) {
      tile_load<6>(signals + group_bytes);
      tile_add_products<2, 6, 4>();
      tile_add_products<3, 6, 5>();
      tile_load<7>(signals + group_bytes + kTileBytes);
      tile_add_products<3, 7, 4>();
    }
  }
}

struct TileSums {
  alignas(64) std::int32_t high[kTileRows][kTileAtoms], mixed[kTileRows][kTileAtoms];
};

template <bool kTwo>
inline void store_tiles(TileSums* sums) {
  tile_store<0>(sums[0].high[0]);
  tile_store<1>(sums[0].mixed[0]);
  if constexpr (kTwo) {
    tile_store<2>(sums[1].high[0]);
    tile_store<3>(sums[1].mixed[0]);
  }
}

// Atoms whose sums wait to be written, so that a signal's are side by side: kAhead tiles of them.
constexpr int kAhead = 2;

// emit(signal, first atom, sums) gets d.v in units of 1 / kSumOne for kAhead vectors of atoms, the
// signals from `base` on.
template <bool kTwo, typename Emit>
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
        all[v] = (load_int(one.high[i % kTileRows]) << 8) + load_int(one.mixed[i % kTileRows]);
      }
      emit(base + i, n, all);
    }
  };
  // While the tiles multiply, a share of the sums before theirs is written.
  for (int n = 0; n < shape.padded_atoms; n += kAhead * kTileAtoms, side = 1 - side) {
    for (int v = 0; v < kAhead; ++v, atoms += group_bytes) {
      multiply_tiles<kTwo>(atoms, signals, group_bytes, steps);
      if (n > 0) emit_sums(n - kAhead * kTileAtoms, v * kShare, (v + 1) * kShare);
      store_tiles<kTwo>(sums[side][v]);
    }
  }
  emit_sums(shape.padded_atoms - kAhead * kTileAtoms, 0, count);
}

template <typename Emit>
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
      correlate_groups<true>(
          shape, panels, packed, b, left < kSignalTile ? left : kSignalTile, emit);
    } else {
      correlate_groups<false>(shape, panels, packed, b, left, emit);
    }
  }
}

// out[b][n] = d_n . signals[b] for all atoms; unless it is nullptr, best[b] gets the largest
// magnitude of each group (kChunkVectors).
inline void correlate(const PursuitShape& shape,
                      const PreparedAtoms& atoms,
                      const float* const* signals,
                      const float* norms,
                      int num_signals,
                      float* const* out,
                      float* const* best,
                      void* packed_memory) {
  const std::int8_t* packed = pack_signals(shape, signals, norms, num_signals, packed_memory);
  correlate_tiles(shape, atoms, packed, num_signals, [&](int b, int n, const VecInt* sums) {
    const Vec unit = splat(norms[b] * (1 / kSumOne));
    float* const to = out[b] + n;
    Vec p[kAhead];
#pragma GCC unroll 4
    for (int v = 0; v < kAhead; ++v) {
      p[v] = (Vec)_mm512_cvtepi32_ps((__m512i)sums[v]) * unit;
      store(to + v * kTileAtoms, p[v]);
    }
    if (best == nullptr) return;
    float* const group = best[b] + n / kChunkAtoms * kLanes;
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
  const std::int8_t* packed = pack_signals(shape, rows, nullptr, count, packed_memory);
  std::int16_t* gram =
      static_cast<std::int16_t*>(atoms.gram) + size(first) * size(shape.padded_atoms);
  correlate_tiles(shape, atoms, packed, count, [&](int i, int n, const VecInt* sums) {
    for (int v = 0; v < kAhead; ++v) {
      const Vec value = (Vec)_mm512_cvtepi32_ps((__m512i)sums[v]) * (kGramOne / kSumOne);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(gram + size(i) * size(shape.padded_atoms) + n +
                                                     v * kTileAtoms),
                          _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)value)));
    }
  });
}

}  // namespace
}  // namespace lexico::kernels::cpu
