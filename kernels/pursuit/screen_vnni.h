#pragma once
// The screen with AVX-512 VNNI: atoms, signals, Gram rows and q in 16 bits, two multiply-adds per
// lane and instruction, half the bytes of fp32. All sums are of products of unit vectors, so by
// Cauchy-Schwarz they stay below 1 and 32 bits hold them exactly.
#include "kernels/pursuit/screen.h"

namespace lexico::kernels::cpu {
namespace {

using GramValue = std::int16_t;

constexpr float kOne = 32768;  // of an element of an atom, a signal or the Gram matrix: 1 saturates
constexpr float kRowOne = 23170;  // of q
constexpr float kColumnOne =
    536870912.0f / kRowOne;  // of R, so that products are in units of 2^-29

inline std::size_t panel_bytes(const PursuitShape& shape) {
  return size(shape.padded_atoms) * size(shape.padded_dim) * sizeof(std::int16_t);
}
inline std::size_t packed_signal_bytes(const PursuitShape& shape) {
  return size(shape.padded_dim) * sizeof(std::int16_t);
}
// q of the atoms so far in pairs, [chunk][pair][kChunkAtoms][2]: one stream however many there are.
inline int row_pairs(const PursuitShape& shape) { return (shape.max_atoms + 1) / 2; }
inline std::size_t row_bytes(const PursuitShape& shape) {
  return size(num_chunks(shape)) * size(row_pairs(shape)) * kChunkAtoms * sizeof(std::int32_t);
}

// Rounding to a step spreads errors evenly over it: its standard deviation is the step by sqrt(12).
constexpr float kStepDeviation = 0.2886752f;
inline float correlate_deviation(const PursuitShape&) { return 1.4142136f * kStepDeviation / kOne; }
inline float gram_deviation(const PursuitShape&) { return 1.7320508f * kStepDeviation / kOne; }
inline float row_deviation() { return 1.4142136f * kStepDeviation / kRowOne; }  // of q, and of R

inline __m512i to_int16_range(__m512 v) {
  return _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(32767)),
                          _mm512_set1_epi32(-32767));
}

inline VecInt load_int(const std::int32_t* from) {
  VecInt v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
inline void store_int(std::int32_t* to, VecInt v) { __builtin_memcpy(to, &v, sizeof v); }
// Products of pairs of 16 bit numbers, summed. (VecInt, not __m512i: GCC 12 keeps arrays of those
// in memory.)
inline VecInt add_products(VecInt sum, VecInt x, VecInt y) {
  return (VecInt)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)y);
}

inline void pack_signal(const PursuitShape& shape, const float* v, float norm, std::int16_t* to) {
  const __m512 scale = _mm512_set1_ps(norm > 0 ? kOne / norm : 0);
  for (int k = 0; k < shape.padded_dim; k += 16) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to + k),
        _mm512_cvtepi32_epi16(to_int16_range(_mm512_mul_ps(_mm512_loadu_ps(v + k), scale))));
  }
}

// [panel][pair of dimensions][kPanel][2]
inline void pack_panel(const PursuitShape& shape, const PreparedAtoms& atoms, int panel) {
  const int mp = shape.padded_dim;
  std::int32_t* to = static_cast<std::int32_t*>(atoms.panels) + size(panel) * size(mp / 2) * kPanel;
  alignas(64) std::int32_t pairs[16][8];  // of 16 atoms and 16 dimensions
  for (int first = 0; first < kPanel; first += 16) {
    for (int k = 0; k < mp; k += 16) {
      for (int a = 0; a < 16; ++a) {
        const int n = panel * kPanel + first + a;
        const __m512 row = n < shape.num_atoms
                               ? _mm512_loadu_ps(atoms.rows + size(n) * size(mp) + k)
                               : _mm512_setzero_ps();
        const __m512i values = to_int16_range(_mm512_mul_ps(row, _mm512_set1_ps(kOne)));
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs[a]), _mm512_cvtepi32_epi16(values));
      }
      for (int pair = 0; pair < 8; ++pair) {
        std::int32_t* out = to + (k / 2 + pair) * kPanel + first;
        for (int a = 0; a < 16; ++a) out[a] = pairs[a][pair];
      }
    }
  }
}

// emit(signal, vector, sums) gets d.v in units of 2^-30 for 16 atoms.
template <int kSignals, typename Emit>
inline void correlate_tile(const std::int32_t* panel,
                           int pairs,
                           const std::int16_t* const* signals,
                           Emit&& emit) {
  VecInt acc[kSignals][4] = {};
  for (int k = 0; k < pairs; ++k, panel += kPanel) {
    VecInt d[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) d[v] = load_int(panel + 16 * v);
#pragma GCC unroll 6
    for (int b = 0; b < kSignals; ++b) {
      std::int32_t pair;
      __builtin_memcpy(&pair, signals[b] + 2 * k, sizeof pair);
      const VecInt x = pair - VecInt{};
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[b][v] = add_products(acc[b][v], x, d[v]);
    }
  }
#pragma GCC unroll 6
  for (int b = 0; b < kSignals; ++b) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) emit(b, v, (__m512i)acc[b][v]);
  }
}

template <typename Emit>
inline void correlate_tiles(const PursuitShape& shape,
                            const PreparedAtoms& atoms,
                            const std::int16_t* packed,
                            int num_signals,
                            Emit&& emit) {
  const std::size_t panel_size = size(shape.padded_dim / 2) * kPanel;
  const std::int32_t* d = static_cast<const std::int32_t*>(atoms.panels);
  for (int first = 0; first < shape.padded_atoms; first += kPanel, d += panel_size) {
    for (int b = 0; b < num_signals; b += kSignalTile) {
      const std::int16_t* signals[kSignalTile];
      const int n = num_signals - b < kSignalTile ? num_signals - b : kSignalTile;
      for (int i = 0; i < n; ++i) signals[i] = packed + size(b + i) * size(shape.padded_dim);
      const auto to = [&](int i, int v, __m512i sums) { emit(b + i, first + 16 * v, sums); };
      const int pairs = shape.padded_dim / 2;
      switch (n) {
        case 6:
          correlate_tile<6>(d, pairs, signals, to);
          break;
        case 5:
          correlate_tile<5>(d, pairs, signals, to);
          break;
        case 4:
          correlate_tile<4>(d, pairs, signals, to);
          break;
        case 3:
          correlate_tile<3>(d, pairs, signals, to);
          break;
        case 2:
          correlate_tile<2>(d, pairs, signals, to);
          break;
        default:
          correlate_tile<1>(d, pairs, signals, to);
          break;
      }
    }
  }
}

// out[b][n] = d_n . signals[b] for all atoms.
inline void correlate(const PursuitShape& shape,
                      const PreparedAtoms& atoms,
                      const float* const* signals,
                      const float* norms,
                      int num_signals,
                      float* const* out,
                      void* packed_memory) {
  std::int16_t* packed = static_cast<std::int16_t*>(packed_memory);
  for (int b = 0; b < num_signals; ++b)
    pack_signal(shape, signals[b], norms[b], packed + size(b) * size(shape.padded_dim));
  correlate_tiles(shape, atoms, packed, num_signals, [&](int b, int n, __m512i sums) {
    const __m512 unit = _mm512_set1_ps(norms[b] * (1 / kOne / kOne));
    _mm512_storeu_ps(out[b] + n, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), unit));
  });
}

inline void gram_rows(const PursuitShape& shape,
                      const PreparedAtoms& atoms,
                      const float* const* rows,
                      int first,
                      int count,
                      void* packed_memory) {
  std::int16_t* packed = static_cast<std::int16_t*>(packed_memory);
  for (int i = 0; i < count; ++i)
    pack_signal(shape, rows[i], 1, packed + size(i) * size(shape.padded_dim));
  std::int16_t* gram =
      static_cast<std::int16_t*>(atoms.gram) + size(first) * size(shape.padded_atoms);
  correlate_tiles(shape, atoms, packed, count, [&](int i, int n, __m512i sums) {
    const __m512i rounded =
        _mm512_srai_epi32(_mm512_add_epi32(sums, _mm512_set1_epi32(1 << 14)), 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(gram + size(i) * size(shape.padded_atoms) + n),
                        _mm512_cvtsepi32_epi16(rounded));
  });
}

template <bool kOls, bool kKeep, bool kOdd>
inline void gram_step_as(const PursuitShape& shape, const GramStep& step) {
  const std::int16_t* const gram = static_cast<const std::int16_t*>(step.gram_row);
  float* const correlations = step.correlations;
  float* const spread = step.spread;
  const int padded_atoms = shape.padded_atoms, k = step.k, pairs = (k + 1) / 2;
  const std::size_t chunk_size = size(row_pairs(shape)) * kChunkAtoms;
  const float error_p = step.error_p, error_n = step.error_n;
  const float unit = step.inverse_nu * (1.0f / 536870912.0f);
  const Vec a = splat(step.amplitude * unit), to_q = splat(unit), to_row = splat(unit * kRowOne);
  std::int32_t column[128];  // -R in pairs, as 16 bit numbers
  for (int i = 0; i < pairs; ++i) {
    const auto fixed = [&](int j) {
      return j < k ? static_cast<std::uint32_t>(
                         static_cast<std::int32_t>(__builtin_rintf(-step.column[j] * kColumnOne)))
                   : 0u;
    };
    column[i] = static_cast<std::int32_t>((fixed(2 * i + 1) << 16) | (fixed(2 * i) & 0xffffu));
  }
  constexpr int kStep = 16;  // vectors held in registers
  for (int chunk = 0, n = 0; n < padded_atoms; ++chunk) {
    Vec best{};
    std::int32_t* const rows = static_cast<std::int32_t*>(step.rows) + size(chunk) * chunk_size;
    for (int first = 0; first < kChunkAtoms && n < padded_atoms; first += kStep * 16) {
      const int left = (padded_atoms - n) / 16, vectors = left < kStep ? left : kStep;
      std::int32_t* const added = rows + k / 2 * kChunkAtoms + first;
      const auto start = [&](int v) {
        const __m256i values =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(gram + n + v * 16));
        return (VecInt)_mm512_cvtepi16_epi32(values) << 14;
      };
      const auto finish = [&](int v, VecInt sums) {
        const int offset = v * 16;
        const Vec value = (Vec)_mm512_cvtepi32_ps((__m512i)sums);
        if constexpr (kKeep) {
          const VecInt fixed = (VecInt)_mm512_cvtps_epi32((__m512)(value * to_row));
          store_int(added + offset,
                    kOdd ? load_int(added + offset) | (fixed << 16) : fixed & 0xffff);
        }
        const Vec p = load(correlations + n + offset) - a * value;
        store(correlations + n + offset, p);
        if constexpr (kOls) {
          const Vec q = value * to_q;
          const Vec outside = load(spread + n + offset) - q * q;
          store(spread + n + offset, outside);
          best = max(best, vector_bound(p, outside, error_p, error_n));
        } else {
          best = max_magnitude(best, p);
        }
      };
      if (vectors == kStep) {
        VecInt acc[kStep];
#pragma GCC unroll 16
        for (int v = 0; v < kStep; ++v) acc[v] = start(v);
        const std::int32_t* row = rows + first;
        for (int i = 0; i < pairs; ++i, row += kChunkAtoms) {
          const VecInt c = column[i] - VecInt{};
#pragma GCC unroll 16
          for (int v = 0; v < kStep; ++v) acc[v] = add_products(acc[v], c, load_int(row + v * 16));
        }
#pragma GCC unroll 16
        for (int v = 0; v < kStep; ++v) finish(v, acc[v]);
      } else {
        for (int v = 0; v < vectors; ++v) {
          VecInt acc = start(v);
          const std::int32_t* row = rows + first + v * 16;
          for (int i = 0; i < pairs; ++i, row += kChunkAtoms) {
            acc = add_products(acc, column[i] - VecInt{}, load_int(row));
          }
          finish(v, acc);
        }
      }
      n += vectors * 16;
    }
    store(step.group_best + chunk * kLanes, best);
  }
}

template <bool kOls, bool kKeep>
inline void gram_step(const PursuitShape& shape, const GramStep& step) {
  if (step.k % 2 != 0) {
    gram_step_as<kOls, kKeep, true>(shape, step);
  } else {
    gram_step_as<kOls, kKeep, false>(shape, step);
  }
}

}  // namespace
}  // namespace lexico::kernels::cpu
