#pragma once
// The screen in fp32: correlations to within rounding errors, on any CPU.
#include "kernels/pursuit/screen.h"

namespace lexico::kernels::cpu {
namespace {

using GramValue = float;
constexpr int kSignalTile = 6;  // signals a correlation tile takes
constexpr bool kCorrelateIsFast = false, kHasFreshCorrelations = false;

inline std::size_t panel_bytes(const PursuitShape& shape) {
  return size(shape.padded_atoms) * size(shape.padded_dim) * sizeof(float);
}
inline std::size_t packed_signal_bytes(const PursuitShape&) { return 0; }
// q of every atom so far, [chunk][atom of the signal][kChunkAtoms]: one stream however many there
// are.
inline std::size_t row_bytes(const PursuitShape& shape) {
  return size(num_chunks(shape)) * size(shape.max_atoms) * kChunkAtoms * sizeof(float);
}

// Standard deviations of the rounding errors: of correlate (for unit vectors), of a Gram value, of
// a stored row.
inline float correlate_deviation(const PursuitShape& shape) {
  return 0.5f * kUlp * __builtin_sqrtf(static_cast<float>(shape.padded_dim));
}
inline float gram_deviation(const PursuitShape& shape) { return correlate_deviation(shape); }
inline float row_deviation() { return 0.5f * kUlp; }

inline void pack_panel(const PursuitShape& shape, const PreparedAtoms& atoms, int panel) {
  const int mp = shape.padded_dim;
  float* to = static_cast<float*>(atoms.panels) + size(panel) * size(mp) * kPanel;
  for (int a = 0; a < kPanel; ++a) {
    const int n = panel * kPanel + a;
    const bool real = n < shape.num_atoms;
    const float* row = atoms.rows + size(real ? n : 0) * size(mp);
    for (int k = 0; k < mp; ++k) to[k * kPanel + a] = real ? row[k] : 0.0f;
  }
}

constexpr int kTileVectors = kLanes == 16 ? 4 : 2;

template <int kSignals>
inline void correlate_tile(const float* panel,
                           int padded_dim,
                           const float* const* signals,
                           float* const* out) {
  for (int first = 0; first < kPanel; first += kTileVectors * kLanes) {
    Vec acc[kSignals][kTileVectors] = {};
    const float* atoms = panel + first;
    for (int k = 0; k < padded_dim; ++k, atoms += kPanel) {
      Vec d[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) d[v] = load(atoms + v * kLanes);
#pragma GCC unroll 6
      for (int b = 0; b < kSignals; ++b) {
        const Vec x = splat(signals[b][k]);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) acc[b][v] += x * d[v];
      }
    }
#pragma GCC unroll 6
    for (int b = 0; b < kSignals; ++b) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) store(out[b] + first + v * kLanes, acc[b][v]);
    }
  }
}

// out[b][n] = d_n . signals[b] for all atoms; each sum is in the order of the dimensions whatever
// the tile, so that the other signals of a block do not matter. The norms, the memory for packed
// signals and fresh correlations are for other screens.
inline void correlate(const PursuitShape& shape,
                      const PreparedAtoms& atoms,
                      const float* const* signals,
                      const float*,
                      int num_signals,
                      float* const* out,
                      const FreshCorrelations*,
                      void*) {
  const std::size_t panel_size = size(shape.padded_dim) * kPanel;
  for (int panel = 0; panel * kPanel < shape.padded_atoms; ++panel) {
    const float* d = static_cast<const float*>(atoms.panels) + size(panel) * panel_size;
    for (int b = 0; b < num_signals; b += kSignalTile) {
      float* to[kSignalTile];
      const int n = num_signals - b < kSignalTile ? num_signals - b : kSignalTile;
      for (int i = 0; i < n; ++i) to[i] = out[b + i] + panel * kPanel;
      switch (n) {
        case 6:
          correlate_tile<6>(d, shape.padded_dim, signals + b, to);
          break;
        case 5:
          correlate_tile<5>(d, shape.padded_dim, signals + b, to);
          break;
        case 4:
          correlate_tile<4>(d, shape.padded_dim, signals + b, to);
          break;
        case 3:
          correlate_tile<3>(d, shape.padded_dim, signals + b, to);
          break;
        case 2:
          correlate_tile<2>(d, shape.padded_dim, signals + b, to);
          break;
        default:
          correlate_tile<1>(d, shape.padded_dim, signals + b, to);
          break;
      }
    }
  }
}

inline void gram_rows(const PursuitShape& shape,
                      const PreparedAtoms& atoms,
                      const float* const* rows,
                      int first,
                      int count,
                      void*) {
  float* out[kPanel];
  for (int i = 0; i < count; ++i)
    out[i] = static_cast<float*>(atoms.gram) + size(first + i) * size(shape.padded_atoms);
  correlate(shape, atoms, rows, nullptr, count, out, nullptr, nullptr);
}

template <bool kOls, bool kKeep>
inline void gram_step(const PursuitShape& shape, const GramStep& step) {
  const float* const gram = static_cast<const float*>(step.gram_row);
  const float* const column = step.column;
  float* const correlations = step.correlations;
  float* const spread = step.spread;
  const int padded_atoms = shape.padded_atoms, k = step.k;
  const std::size_t chunk_size = size(shape.max_atoms) * kChunkAtoms;
  const float error_p = step.error_p, error_n = step.error_n;
  const Vec a = splat(step.amplitude), inverse = splat(step.inverse_nu);
  constexpr int kStep = kLanes == 16 ? 16 : 8;  // vectors held in registers
  for (int chunk = 0, n = 0; n < padded_atoms; ++chunk) {
    Vec best{};
    float* const rows = static_cast<float*>(step.rows) + size(chunk) * chunk_size;
    for (int first = 0; first < kChunkAtoms && n < padded_atoms; first += kStep * kLanes) {
      const int left = (padded_atoms - n) / kLanes, vectors = left < kStep ? left : kStep;
      float* const added = rows + k * kChunkAtoms + first;
      const auto finish = [&](int v, Vec sums) {
        const int offset = v * kLanes;
        const Vec q = sums * inverse;
        if constexpr (kKeep) store(added + offset, q);
        const Vec p = load(correlations + n + offset) - a * q;
        store(correlations + n + offset, p);
        if constexpr (kOls) {
          const Vec outside = load(spread + n + offset) - q * q;
          store(spread + n + offset, outside);
          best = max(best, vector_bound(p, outside, error_p, error_n));
        } else {
          best = max_magnitude(best, p);
        }
      };
      if (vectors == kStep) {
        Vec acc[kStep];
#pragma GCC unroll 16
        for (int v = 0; v < kStep; ++v) acc[v] = load(gram + n + v * kLanes);
        const float* row = rows + first;
        for (int i = 0; i < k; ++i, row += kChunkAtoms) {
          const Vec c = splat(column[i]);
#pragma GCC unroll 16
          for (int v = 0; v < kStep; ++v) acc[v] -= c * load(row + v * kLanes);
        }
#pragma GCC unroll 16
        for (int v = 0; v < kStep; ++v) finish(v, acc[v]);
      } else {
        for (int v = 0; v < vectors; ++v) {
          Vec acc = load(gram + n + v * kLanes);
          const float* row = rows + first + v * kLanes;
          for (int i = 0; i < k; ++i, row += kChunkAtoms) acc -= splat(column[i]) * load(row);
          finish(v, acc);
        }
      }
      n += vectors * kLanes;
    }
    store(step.group_best + chunk * kLanes, best);
  }
}

// The sum of q^2 of the atoms taken as number `first` to `end` - 1, of kLanes atoms.
inline Vec rows_squared(
    const PursuitShape& shape, const void* rows, VecInt atoms, int first, int end) {
  const int chunk_size = shape.max_atoms * kChunkAtoms;
  const VecInt chunk = atoms >> kChunkBits,
               place = chunk * chunk_size + (atoms & (kChunkAtoms - 1));
  Vec sum{};
  for (int i = first; i < end; ++i) {
    const Vec q = load_at(static_cast<const float*>(rows) + size(i) * kChunkAtoms, place);
    sum += q * q;
  }
  return sum;
}

}  // namespace
}  // namespace lexico::kernels::cpu
