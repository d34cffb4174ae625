#pragma once
// The screen with AVX-512 VNNI: atoms and signals in 16 bits like the Gram form (gram_vnni.h).
#include "kernels/pursuit/gram_vnni.h"

namespace lexico::kernels::cpu {
namespace {

constexpr float kOne = kGramOne;  // of an element of an atom or a signal
constexpr int kSignalTile = 6;    // signals a correlation tile takes
constexpr bool kCorrelateIsFast = false, kHasFreshCorrelations = false;

inline std::size_t panel_bytes(const PursuitShape& shape) {
  return size(shape.padded_atoms) * size(shape.padded_dim) * sizeof(std::int16_t);
}
inline std::size_t packed_signal_bytes(const PursuitShape& shape) {
  return size(shape.padded_dim) * sizeof(std::int16_t);
}
inline float correlate_deviation(const PursuitShape&) { return 1.4142136f * kStepDeviation / kOne; }
inline float gram_deviation(const PursuitShape&) { return 1.7320508f * kStepDeviation / kOne; }

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
                      const FreshCorrelations*,
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

}  // namespace
}  // namespace lexico::kernels::cpu
