#pragma once
// The Gram form in 16 bits, for the screens of CPUs with AVX-512 VNNI: two multiply-adds per lane
// and instruction, half the bytes of fp32. All sums are of products of unit vectors, so by
// Cauchy-Schwarz they stay below 1 and 32 bits hold them exactly.
#include "kernels/pursuit/screen.h"

namespace lexico::kernels::cpu {
namespace {

using GramValue = std::int16_t;

constexpr float kGramOne = 32768;  // of an element of the Gram matrix: 1 saturates
constexpr float kRowOne = 23170;   // of q
constexpr float kColumnOne =
    536870912.0f / kRowOne;  // of R, so that products are in units of 2^-29

// q of the atoms so far in pairs, [chunk][pair][kChunkAtoms][2]: one stream however many there are.
inline int row_pairs(const PursuitShape& shape) { return (shape.max_atoms + 1) / 2; }
inline std::size_t row_bytes(const PursuitShape& shape) {
  return size(num_chunks(shape)) * size(row_pairs(shape)) * kChunkAtoms * sizeof(std::int32_t);
}

// Rounding to a step spreads errors evenly over it: its standard deviation is the step by sqrt(12).
constexpr float kStepDeviation = 0.2886752f;
inline float row_deviation() { return 1.4142136f * kStepDeviation / kRowOne; }  // of q, and of R

inline __m512i to_int16_range(__m512 v) {
  return _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(32767)),
                          _mm512_set1_epi32(-32767));
}

// Products of pairs of 16 bit numbers, summed. (VecInt, not __m512i: GCC 12 keeps arrays of those
// in memory.)
inline VecInt add_products(VecInt sum, VecInt x, VecInt y) {
  return (VecInt)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)y);
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

// The sum of q^2 of the atoms taken as number `first` to `end` - 1, of 16 atoms. `first` is 0 or
// end
// - 1.
inline Vec rows_squared(
    const PursuitShape& shape, const void* rows, VecInt atoms, int first, int end) {
  constexpr float kUnit = 1 / kRowOne / kRowOne;
  const int chunk_size = row_pairs(shape) * kChunkAtoms;
  const VecInt chunk = atoms >> kChunkBits,
               place = chunk * chunk_size + (atoms & (kChunkAtoms - 1));
  const auto pair = [&](int i) {
    return (VecInt)_mm512_i32gather_epi32(
        (__m512i)place, static_cast<const std::int32_t*>(rows) + size(i / 2) * kChunkAtoms, 4);
  };
  if (first > 0) {
    const VecInt both = pair(first), one = first % 2 != 0 ? both >> 16 : (both << 16) >> 16;
    const Vec q = (Vec)_mm512_cvtepi32_ps((__m512i)one);
    return q * q * kUnit;
  }
  VecInt sum{};
  for (int i = 0; i < end; i += 2) {  // the last may be one, beside a 0
    const VecInt both = pair(i);
    sum = add_products(sum, both, both);
  }
  return (Vec)_mm512_cvtepi32_ps((__m512i)sum) * kUnit;
}

}  // namespace
}  // namespace lexico::kernels::cpu
