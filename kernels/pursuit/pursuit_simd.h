#pragma once
// Pursuit on one block of signals, at the vector width of the translation unit that includes this
// (level_*.cpp). The algorithm and its bounds: docs/encoder.md. Only internal linkage here (see
// level.h): no std function templates.
#include "kernels/pursuit/level.h"
#include "kernels/pursuit/simd.h"

namespace lexico::kernels::cpu {
namespace {

constexpr float kUlp = 5.9604645e-8f;  // 2^-24: relative rounding error of one fp32 operation
// Norms below this share of |x| are rounding noise of the fp32 residual: the signal is in the span
// of its atoms.
constexpr float kResidualFloor = 1e-6f;
constexpr float kCorrelationFloor = 5e-7f;
// |P_perp d|^2 / |d|^2 an atom must keep to be taken: its weight would be noise otherwise (1e-5:
// 0.2 degrees off the span).
constexpr float kIndependent = 1e-5f;
constexpr int kMaxRefused = 16;
// Screens keep the best bound of each group: one lane of a chunk of this many vectors.
constexpr int kChunkVectors = 16;
constexpr int kChunkAtoms = kChunkVectors * kLanes;

// What an fp32 dot product of unit vectors may be off by (four standard deviations of its rounding
// errors).
inline float dot_error(const PursuitShape& shape) {
  return 2 * kUlp * __builtin_sqrtf(static_cast<float>(shape.padded_dim));
}
inline float magnitude(float x) { return __builtin_fabsf(x); }
inline int num_chunks(const PursuitShape& shape) {
  return (shape.padded_atoms + kChunkAtoms - 1) / kChunkAtoms;
}

inline float dot(const float* a, const float* b, int n) {
  Vec s0{}, s1{};
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + kLanes) * load(b + i + kLanes);
  }
  for (; i < n; i += kLanes) s0 += load(a + i) * load(b + i);
  return sum(s0 + s1);
}

// ----------------------------------------------------------------------------------------------
// atoms times vectors

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

// out[b][n] = d_n . signals[b] for all atoms, each sum in the order of the dimensions whatever the
// tile.
inline void correlate(const PursuitShape& shape,
                      const PreparedAtoms& atoms,
                      const float* const* signals,
                      int num_signals,
                      float* const* out) {
  const std::size_t panel_size = static_cast<std::size_t>(shape.padded_dim) * kPanel;
  for (int panel = 0; panel * kPanel < shape.padded_atoms; ++panel) {
    const float* d = atoms.panels + static_cast<std::size_t>(panel) * panel_size;
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

inline void pack_panels(const PursuitShape& shape,
                        const PreparedAtoms& atoms,
                        int first,
                        int last) {
  const int m = shape.dim, mp = shape.padded_dim;
  const std::size_t stride = static_cast<std::size_t>(mp == m ? m : mp);
  for (int panel = first / kPanel; panel * kPanel < last; ++panel) {
    float* to =
        atoms.panels + static_cast<std::size_t>(panel) * static_cast<std::size_t>(mp) * kPanel;
    for (int a = 0; a < kPanel; ++a) {
      const int n = panel * kPanel + a;
      const bool real = n < shape.num_atoms;
      const float* row = atoms.rows + static_cast<std::size_t>(real ? n : 0) * stride;
      for (int k = 0; k < mp; ++k) to[k * kPanel + a] = real ? row[k] : 0.0f;
      atoms.norms2[n] = real ? dot(row, row, mp) : 0.0f;
    }
  }
}

inline void gram_rows(const PursuitShape& shape, const PreparedAtoms& atoms, int first, int last) {
  const std::size_t np = static_cast<std::size_t>(shape.padded_atoms);
  const float* rows[kPanel];
  float* out[kPanel];
  for (int n = first; n < last && n < shape.num_atoms;) {
    int count = 0;
    for (; count < kPanel && n < last && n < shape.num_atoms; ++count, ++n) {
      rows[count] =
          atoms.rows + static_cast<std::size_t>(n) * static_cast<std::size_t>(shape.padded_dim);
      out[count] = atoms.gram + static_cast<std::size_t>(n) * np;
    }
    correlate(shape, atoms, rows, count, out);
  }
}

// -------------------------------------------------------------------------------------------------
// state of a signal

// A signal x (scaled so that its largest element is in [1, 2)), its atoms so far as D_S = U R with
// orthonormal rows of U, and its residual r = x - U^T a.
struct Signal {
  float* residual;       // [padded_dim]
  float* basis;          // U [max_atoms, padded_dim]
  float* triangle;       // R [max_atoms, max_atoms], column k in row k
  float* amplitudes;     // a [max_atoms]
  std::int32_t* chosen;  // [max_atoms]
  float* correlations;   // p [padded_atoms]
  float* spread;         // n [padded_atoms]: |P_perp d|^2, OLS among all atoms only
  std::int32_t refused[kMaxRefused];
  int num_refused, count, limit;
  double unscale;
  float norm, residual_norm, inverse_nu;
  float error_p, error_n;  // bounds of what p and n are off by
  bool active;
};

struct Scratch {
  Signal* signals;      // [block]
  float* group_best;    // [chunks * kLanes]
  float* atom;          // [padded_dim]
  float* coefficients;  // [2 * max_atoms]
  float* row_errors;    // [max_atoms]
  float* rows;  // q [max_atoms, padded_atoms] (Gram), or D u of each signal [block, padded_atoms]
                // (OLS)
  const float** inputs;     // [block]
  float** outputs;          // [block]
  std::int32_t* shortlist;  // [padded_atoms], ols-N only
  float* shortlist_scores;  // [padded_atoms], ols-N only
};

// Hands out pieces of the scratch; with base == nullptr it only counts.
struct Carver {
  char* base;
  std::size_t used;
  template <typename T>
  T* take(std::size_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

inline std::size_t carve(const PursuitShape& shape, char* base, Scratch& s) {
  const std::size_t block = static_cast<std::size_t>(shape.block),
                    mp = static_cast<std::size_t>(shape.padded_dim),
                    np = static_cast<std::size_t>(shape.padded_atoms),
                    atoms = static_cast<std::size_t>(shape.max_atoms);
  const bool full_ols = shape.ols && shape.candidates == 0;
  Carver carver{base, 0};
  s.signals = carver.take<Signal>(block);
  s.group_best = carver.take<float>(static_cast<std::size_t>(num_chunks(shape)) * kLanes);
  s.atom = carver.take<float>(mp);
  s.coefficients = carver.take<float>(2 * atoms);
  s.row_errors = carver.take<float>(atoms);
  s.inputs = carver.take<const float*>(block);
  s.outputs = carver.take<float*>(block);
  s.rows = carver.take<float>(np * (shape.gram ? atoms : full_ols ? block : 0));
  const bool listed = shape.ols && shape.candidates > 0;
  s.shortlist = carver.take<std::int32_t>(listed ? np : 0);
  s.shortlist_scores = carver.take<float>(listed ? np : 0);
  // In the Gram form a block shares only the first correlations; then each signal is done before
  // the next.
  const std::size_t states = shape.gram ? 1 : block;
  for (std::size_t i = 0; i < block; ++i) {
    Signal* signal = base == nullptr ? nullptr : &s.signals[i];
    float* residual = carver.take<float>(mp);
    float* correlations = carver.take<float>(np);
    if (signal != nullptr) {
      signal->residual = residual;
      signal->correlations = correlations;
    }
  }
  for (std::size_t i = 0; i < states; ++i) {
    float* basis = carver.take<float>(atoms * mp);
    float* triangle = carver.take<float>(atoms * atoms);
    float* amplitudes = carver.take<float>(atoms);
    std::int32_t* chosen = carver.take<std::int32_t>(atoms);
    float* spread = carver.take<float>(full_ols ? np : 0);
    if (base == nullptr) continue;
    for (std::size_t j = i; j < (states == 1 ? block : i + 1); ++j) {
      s.signals[j].basis = basis;
      s.signals[j].triangle = triangle;
      s.signals[j].amplitudes = amplitudes;
      s.signals[j].chosen = chosen;
      s.signals[j].spread = spread;
    }
  }
  return carver.used;
}

inline double power_of_two(int exponent) {
  const std::int64_t bits = static_cast<std::int64_t>(exponent + 1023) << 52;
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Copies and scales x. False if it holds a NaN or Inf.
inline bool load_signal(const PursuitShape& shape, const float* x, int budget, Signal& s) {
  std::int32_t top = 0;
  for (int k = 0; k < shape.dim; ++k) {
    std::int32_t bits;
    __builtin_memcpy(&bits, x + k, sizeof bits);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  s.count = s.num_refused = 0;
  s.active = false;
  s.norm = s.residual_norm = 0;
  s.unscale = 1;
  if (top >= 0x7f800000) return false;
  if (top != 0) {
    // Subnormals have no exponent of their own; as doubles they do.
    float largest_element;
    __builtin_memcpy(&largest_element, &top, sizeof top);
    const double as_double = largest_element;
    std::int64_t bits;
    __builtin_memcpy(&bits, &as_double, sizeof bits);
    const int exponent = static_cast<int>((bits >> 52) & 0x7ff) - 1023;
    const double scale = power_of_two(-exponent);
    s.unscale = power_of_two(exponent);
    for (int k = 0; k < shape.dim; ++k) s.residual[k] = static_cast<float>(x[k] * scale);
    for (int k = shape.dim; k < shape.padded_dim; ++k) s.residual[k] = 0;
    s.norm = s.residual_norm = __builtin_sqrtf(dot(s.residual, s.residual, shape.padded_dim));
  }
  s.limit = budget < shape.max_atoms ? budget : shape.max_atoms;
  s.active = top != 0;
  return true;
}

inline bool wants_more(const PursuitShape& shape, const Signal& s) {
  return s.active && s.count < s.limit && s.residual_norm > shape.relative_tolerance * s.norm &&
         s.residual_norm > kResidualFloor * s.norm;
}

inline float clamp_to_float(double x) {
  constexpr double kMax = 3.4028234663852886e38;
  return static_cast<float>(x > kMax ? kMax : x < -kMax ? -kMax : x);
}

inline bool is_taken(const Signal& s, int atom) {
  for (int i = 0; i < s.count; ++i) {
    if (s.chosen[i] == atom) return true;
  }
  for (int i = 0; i < s.num_refused; ++i) {
    if (s.refused[i] == atom) return true;
  }
  return false;
}

// c_i = u_i . v
inline void project(const Signal& s, const float* v, int padded_dim, float* c) {
  int i = 0;
  for (; i + 4 <= s.count; i += 4) {
    const float* u = s.basis + static_cast<std::size_t>(i) * static_cast<std::size_t>(padded_dim);
    Vec s0{}, s1{}, s2{}, s3{};
    for (int k = 0; k < padded_dim; k += kLanes) {
      const Vec x = load(v + k);
      s0 += load(u + k) * x;
      s1 += load(u + padded_dim + k) * x;
      s2 += load(u + 2 * padded_dim + k) * x;
      s3 += load(u + 3 * padded_dim + k) * x;
    }
    c[i] = sum(s0), c[i + 1] = sum(s1), c[i + 2] = sum(s2), c[i + 3] = sum(s3);
  }
  for (; i < s.count; ++i) {
    const float* u = s.basis + static_cast<std::size_t>(i) * static_cast<std::size_t>(padded_dim);
    Vec s0{};
    for (int k = 0; k < padded_dim; k += kLanes) s0 += load(u + k) * load(v + k);
    c[i] = sum(s0);
  }
}

// v -= U^T c
inline void remove_span(const Signal& s, const float* c, int padded_dim, float* v) {
  for (int k = 0; k < padded_dim; k += kLanes) {
    Vec x = load(v + k);
    const float* u = s.basis + k;
    for (int i = 0; i < s.count; ++i, u += padded_dim) x -= splat(c[i]) * load(u);
    store(v + k, x);
  }
}

inline const float* atom_row(const PursuitShape& shape, const PreparedAtoms& atoms, int atom) {
  return atoms.rows + static_cast<std::size_t>(atom) * static_cast<std::size_t>(shape.padded_dim);
}

// Takes the atom into the basis and its part out of the residual. False, and nothing changed, if it
// is in the span.
inline bool add_atom(
    const PursuitShape& shape, const PreparedAtoms& atoms, Scratch& scratch, Signal& s, int atom) {
  const int mp = shape.padded_dim, k = s.count;
  const float* d = atom_row(shape, atoms, atom);
  float* u = s.basis + static_cast<std::size_t>(k) * static_cast<std::size_t>(mp);
  float* column =
      s.triangle + static_cast<std::size_t>(k) * static_cast<std::size_t>(shape.max_atoms);
  float* c = scratch.coefficients;
  for (int i = 0; i < mp; i += kLanes) store(u + i, load(d + i));
  if (k > 0) {  // twice: once leaves rounding errors of size kUlp / nu in the basis
    project(s, d, mp, column);
    remove_span(s, column, mp, u);
    project(s, u, mp, c);
    remove_span(s, c, mp, u);
    for (int i = 0; i < k; ++i) column[i] += c[i];
  }
  const float nu2 = dot(u, u, mp);
  if (!(nu2 > kIndependent * atoms.norms2[atom]) || !(nu2 > 0)) return false;
  const float nu = __builtin_sqrtf(nu2), inverse = 1 / nu;
  column[k] = nu;
  for (int i = 0; i < mp; i += kLanes) store(u + i, load(u + i) * inverse);
  const float a = dot(u, s.residual, mp);
  Vec norm2{};
  for (int i = 0; i < mp; i += kLanes) {
    const Vec r = load(s.residual + i) - a * load(u + i);
    store(s.residual + i, r);
    norm2 += r * r;
  }
  const float norm = __builtin_sqrtf(sum(norm2));
  s.residual_norm = norm < s.residual_norm ? norm : s.residual_norm;
  s.amplitudes[k] = a;
  s.inverse_nu = inverse;
  s.chosen[k] = atom;
  s.count = k + 1;
  return true;
}

// R w = a
inline void write_codes(const PursuitShape& shape,
                        const PursuitBlock& block,
                        int index,
                        Signal& s) {
  const std::size_t first =
      static_cast<std::size_t>(index) * static_cast<std::size_t>(shape.max_atoms);
  std::int32_t* indices = block.indices + first;
  float* weights = block.weights + first;
  float* w = s.amplitudes;
  for (int k = s.count - 1; k >= 0; --k) {
    const float* column =
        s.triangle + static_cast<std::size_t>(k) * static_cast<std::size_t>(shape.max_atoms);
    w[k] /= column[k];
    for (int i = 0; i < k; ++i) w[i] -= column[i] * w[k];
  }
  for (int k = 0; k < shape.max_atoms; ++k) {
    indices[k] = k < s.count ? s.chosen[k] : -1;
    weights[k] = k < s.count ? clamp_to_float(w[k] * s.unscale) : 0;
  }
  block.counts[index] = s.count;
  block.residual_norms[index] = clamp_to_float(s.residual_norm * s.unscale);
}

inline void write_curve(
    const PursuitShape& shape, const PursuitBlock& block, int index, const Signal& s, int from) {
  if (block.curve == nullptr) return;
  float* curve =
      block.curve + static_cast<std::size_t>(index) * static_cast<std::size_t>(shape.max_atoms);
  const float value = clamp_to_float(s.residual_norm * s.unscale);
  for (int k = from; k < shape.max_atoms; ++k) curve[k] = value;
}

inline void write_not_finite(const PursuitShape& shape, const PursuitBlock& block, int index) {
  const std::size_t first =
      static_cast<std::size_t>(index) * static_cast<std::size_t>(shape.max_atoms);
  for (int k = 0; k < shape.max_atoms; ++k) {
    block.indices[first + static_cast<std::size_t>(k)] = -1;
    block.weights[first + static_cast<std::size_t>(k)] = 0;
    if (block.curve != nullptr)
      block.curve[first + static_cast<std::size_t>(k)] = __builtin_nanf("");
  }
  block.counts[index] = 0;
  block.residual_norms[index] = __builtin_nanf("");
}

// ------------------------------------------------------------------------------------- which atom
// next: screen, settle

// An upper bound of an atom's true score: |d.r| for OMP, (d.r)^2 / |P_perp d|^2 for OLS; 0 for
// atoms in the span.
inline float bound(const Signal& s, bool full_ols, int atom) {
  const float p = magnitude(s.correlations[atom]) + s.error_p;
  if (!full_ols) return p;
  const float n = s.spread[atom] - s.error_n;
  if (s.spread[atom] + s.error_n < kIndependent) return 0;
  return p * p / (n > 0.5f * kIndependent ? n : 0.5f * kIndependent);
}

// The exact score of an atom, in fp32 from its fp32 row; 0 for atoms in the span.
inline float score(const PursuitShape& shape,
                   const PreparedAtoms& atoms,
                   Scratch& scratch,
                   const Signal& s,
                   int atom) {
  const float* d = atom_row(shape, atoms, atom);
  const float p = dot(d, s.residual, shape.padded_dim);
  if (!shape.ols) return magnitude(p);
  project(s, d, shape.padded_dim, scratch.coefficients);
  float n = atoms.norms2[atom];
  const float least = kIndependent * n;
  for (int i = 0; i < s.count; ++i) n -= scratch.coefficients[i] * scratch.coefficients[i];
  return n > least && n > 0 ? p * p / n : 0;
}

struct Pick {
  int atom = -1;
  float score = 0;
  void offer(int other, float other_score) {
    if (other_score > score || (other_score == score && other_score > 0 && other < atom)) {
      atom = other;
      score = other_score;
    }
  }
};

// The atom with the largest exact score (lowest index of equals). Only atoms whose bound reaches
// the best exact score so far are evaluated, beginning with the one of the largest bound.
inline Pick settle(const PursuitShape& shape,
                   const PreparedAtoms& atoms,
                   Scratch& scratch,
                   const Signal& s) {
  const bool full_ols = shape.ols;
  const int groups = num_chunks(shape) * kLanes;
  // group_best holds what the vector pass found: |p| without its error (OMP), the bound within 1e-3
  // (OLS)
  const float slack = full_ols ? 1.001f : 1.0f, shift = full_ols ? 0.0f : s.error_p;
  const auto grouped = [&](int atom) {
    return full_ols ? bound(s, true, atom) * slack : magnitude(s.correlations[atom]);
  };
  Vec top = load(scratch.group_best);
  for (int g = kLanes; g < groups; g += kLanes) top = max(top, load(scratch.group_best + g));
  const float peak = largest(top);
  Pick pick;
  bool peak_found = false;
  for (int pass = 0; pass < 2;
       ++pass) {  // first the atom of the largest bound, then those that may beat it
    for (int g = 0; g < groups && !(pass == 0 && peak_found); g += kLanes) {
      const Vec bounds = load(scratch.group_best + g);
      unsigned mask = mask_ge(bounds, splat(pass == 0 ? peak : (pick.score - shift) / slack));
      for (; mask != 0 && !(pass == 0 && peak_found); mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        for (int i = 0; i < kChunkVectors; ++i) {
          const int atom = g * kChunkVectors + i * kLanes + lane;
          if (atom >= shape.num_atoms) break;
          if (pass == 0) {
            if (grouped(atom) < peak) continue;
            peak_found = true;
          } else if (bound(s, full_ols, atom) < pick.score || atom == pick.atom) {
            continue;
          }
          if (!is_taken(s, atom)) pick.offer(atom, score(shape, atoms, scratch, s, atom));
          if (pass == 0) break;
        }
      }
    }
  }
  return pick;
}

// OLS among the atoms of largest |d.r|: the best exact correlations are settled first, then the
// rule.
inline Pick settle_among(const PursuitShape& shape,
                         const PreparedAtoms& atoms,
                         Scratch& scratch,
                         const Signal& s) {
  const int groups = num_chunks(shape) * kLanes, wanted = shape.candidates;
  // At least `wanted` + taken groups reach the threshold, so that many atoms do: raise it while
  // that holds.
  const int enough = wanted + s.count + s.num_refused;
  Vec top = load(scratch.group_best);
  for (int g = kLanes; g < groups; g += kLanes) top = max(top, load(scratch.group_best + g));
  float low = 0, high = largest(top);
  for (int step = 0; step < 12; ++step) {
    const float middle = 0.5f * (low + high);
    int reached = 0;
    for (int g = 0; g < groups; g += kLanes) {
      reached += __builtin_popcount(mask_ge(load(scratch.group_best + g), splat(middle)));
    }
    if (reached >= enough) {
      low = middle;
    } else {
      high = middle;
    }
    if (reached >= enough && reached <= enough + 2) break;
  }
  const float threshold = low - 2 * s.error_p;
  int listed = 0;
  for (int g = 0; g < groups; g += kLanes) {
    unsigned mask = mask_ge(load(scratch.group_best + g), splat(threshold));
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      for (int i = 0; i < kChunkVectors; ++i) {
        const int atom = g * kChunkVectors + i * kLanes + lane;
        if (atom >= shape.num_atoms) break;
        if (magnitude(s.correlations[atom]) < threshold || is_taken(s, atom)) continue;
        scratch.shortlist[listed] = atom;
        scratch.shortlist_scores[listed++] =
            magnitude(dot(atom_row(shape, atoms, atom), s.residual, shape.padded_dim));
      }
    }
  }
  Pick pick;
  for (int taken = 0; taken < wanted && taken < listed; ++taken) {
    int best = taken;
    for (int i = taken + 1; i < listed; ++i) {
      const float a = scratch.shortlist_scores[i], b = scratch.shortlist_scores[best];
      if (a > b || (a == b && scratch.shortlist[i] < scratch.shortlist[best])) best = i;
    }
    const std::int32_t atom = scratch.shortlist[best];
    scratch.shortlist[best] = scratch.shortlist[taken];
    scratch.shortlist_scores[best] = scratch.shortlist_scores[taken];
    pick.offer(atom, score(shape, atoms, scratch, s, atom));
  }
  return pick;
}

// Picks and adds one atom. False if there is none left worth taking.
inline bool take_next(const PursuitShape& shape,
                      const PreparedAtoms& atoms,
                      Scratch& scratch,
                      Signal& s) {
  const bool full_ols = shape.ols && shape.candidates == 0;
  for (;;) {
    const Pick pick = shape.ols && shape.candidates > 0 ? settle_among(shape, atoms, scratch, s)
                                                        : settle(shape, atoms, scratch, s);
    const float floor = kCorrelationFloor * s.norm;
    if (pick.atom < 0 || pick.score <= (shape.ols ? floor * floor : floor)) return false;
    const bool added = add_atom(shape, atoms, scratch, s, pick.atom);
    if (full_ols) s.spread[pick.atom] = 1e30f;  // its bound is 0 from here on
    if (added) return true;
    if (s.num_refused == kMaxRefused) return false;
    s.refused[s.num_refused++] = pick.atom;
  }
}

// ------------------------------------------------------------------------------------------------------
// vector passes

inline void group_correlations(const PursuitShape& shape, Scratch& scratch, const Signal& s) {
  for (int chunk = 0, n = 0; n < shape.padded_atoms; ++chunk) {
    Vec best{};
    for (int i = 0; i < kChunkVectors && n < shape.padded_atoms; ++i, n += kLanes) {
      best = max(best, abs(load(s.correlations + n)));
    }
    store(scratch.group_best + chunk * kLanes, best);
  }
}

inline Vec vector_bound(Vec p, Vec n, float error_p, float error_n) {
  const Vec wide = abs(p) + error_p, least = splat(0.5f * kIndependent);
  const Vec value = wide * wide * rough_reciprocal(max(n - error_n, least));
  return n + error_n < kIndependent ? Vec{} : value;
}

inline void group_ols_bounds(const PursuitShape& shape, Scratch& scratch, const Signal& s) {
  for (int chunk = 0, n = 0; n < shape.padded_atoms; ++chunk) {
    Vec best{};
    for (int i = 0; i < kChunkVectors && n < shape.padded_atoms; ++i, n += kLanes) {
      best = max(best,
                 vector_bound(load(s.correlations + n), load(s.spread + n), s.error_p, s.error_n));
    }
    store(scratch.group_best + chunk * kLanes, best);
  }
}

// p -= a q, n -= q^2, with q = D u of the atom just taken.
inline void update_ols(const PursuitShape& shape, const float* q, float a, Signal& s) {
  for (int n = 0; n < shape.padded_atoms; n += kLanes) {
    const Vec x = load(q + n);
    store(s.correlations + n, load(s.correlations + n) - a * x);
    store(s.spread + n, load(s.spread + n) - x * x);
  }
}

inline void start_ols(const PursuitShape& shape, const PreparedAtoms& atoms, Signal& s) {
  for (int n = 0; n < shape.padded_atoms; n += kLanes) store(s.spread + n, load(atoms.norms2 + n));
  s.error_n = 4 * kUlp;
}

// q of the newest atom from its Gram row: D u_k = (G_j - sum_i R_ik q_i) / nu; then p -= a q, and n
// -= q^2 for OLS.
template <bool kFullOls>
inline void gram_step(const PursuitShape& shape,
                      const PreparedAtoms& atoms,
                      Scratch& scratch,
                      Signal& s) {
  const int k = s.count - 1;
  const std::size_t np = static_cast<std::size_t>(shape.padded_atoms);
  const float* column =
      s.triangle + static_cast<std::size_t>(k) * static_cast<std::size_t>(shape.max_atoms);
  const float* gram = atoms.gram + static_cast<std::size_t>(s.chosen[k]) * np;
  float* q = scratch.rows + static_cast<std::size_t>(k) * np;
  const Vec a = splat(s.amplitudes[k]), inverse = splat(s.inverse_nu);

  // Errors of the rows add up like independent ones; 4 of their standard deviations bound them.
  float variance = dot_error(shape) * dot_error(shape);
  for (int i = 0; i < k; ++i)
    variance += column[i] * column[i] * scratch.row_errors[i] * scratch.row_errors[i];
  const float row_error = __builtin_sqrtf(variance) * s.inverse_nu;
  scratch.row_errors[k] = row_error;
  s.error_p += 4 * magnitude(s.amplitudes[k]) * row_error + kUlp * s.norm;
  s.error_n += 8 * row_error;

  constexpr int kStep = kLanes == 16 ? 16 : 8;
  for (int chunk = 0, n = 0; n < shape.padded_atoms; ++chunk) {
    Vec best{};
    for (int part = 0; part < kChunkVectors && n < shape.padded_atoms; part += kStep) {
      const int vectors =
          (shape.padded_atoms - n) / kLanes < kStep ? (shape.padded_atoms - n) / kLanes : kStep;
      const auto finish = [&](int offset, Vec x) {
        x *= inverse;
        store(q + n + offset, x);
        const Vec p = load(s.correlations + n + offset) - a * x;
        store(s.correlations + n + offset, p);
        if constexpr (kFullOls) {
          const Vec spread = load(s.spread + n + offset) - x * x;
          store(s.spread + n + offset, spread);
          best = max(best, vector_bound(p, spread, s.error_p, s.error_n));
        } else {
          best = max(best, abs(p));
        }
      };
      if (vectors == kStep) {
        Vec acc[kStep];
#pragma GCC unroll 16
        for (int v = 0; v < kStep; ++v) acc[v] = load(gram + n + v * kLanes);
        const float* row = scratch.rows + n;
        for (int i = 0; i < k; ++i, row += np) {
          const Vec c = splat(column[i]);
#pragma GCC unroll 16
          for (int v = 0; v < kStep; ++v) acc[v] -= c * load(row + v * kLanes);
        }
#pragma GCC unroll 16
        for (int v = 0; v < kStep; ++v) finish(v * kLanes, acc[v]);
      } else {
        for (int v = 0; v < vectors; ++v) {
          Vec x = load(gram + n + v * kLanes);
          const float* row = scratch.rows + n + v * kLanes;
          for (int i = 0; i < k; ++i, row += np) x -= splat(column[i]) * load(row);
          finish(v * kLanes, x);
        }
      }
      n += vectors * kLanes;
    }
    store(scratch.group_best + chunk * kLanes, best);
  }
}

// ------------------------------------------------------------------------------------------------------
// the two forms

inline void finish_signal(const PursuitShape& shape,
                          const PursuitBlock& block,
                          int index,
                          Signal& s) {
  write_curve(shape, block, index, s, s.count);
  write_codes(shape, block, index, s);
  s.active = false;
}

inline void encode_gram(const PursuitShape& shape,
                        const PreparedAtoms& atoms,
                        const PursuitBlock& block,
                        Scratch& scratch) {
  int count = 0;
  for (int b = 0; b < block.num_signals; ++b) {
    if (!wants_more(shape, scratch.signals[b])) continue;
    scratch.inputs[count] = scratch.signals[b].residual;
    scratch.outputs[count++] = scratch.signals[b].correlations;
  }
  correlate(shape, atoms, scratch.inputs, count, scratch.outputs);
  const bool full_ols = shape.ols && shape.candidates == 0;
  for (int b = 0; b < block.num_signals; ++b) {
    Signal& s = scratch.signals[b];
    if (s.norm != s.norm) continue;  // not finite: written already
    s.error_p = dot_error(shape) * s.norm;
    if (wants_more(shape, s)) {
      if (full_ols) {
        start_ols(shape, atoms, s);
        group_ols_bounds(shape, scratch, s);
      } else {
        group_correlations(shape, scratch, s);
      }
    }
    while (wants_more(shape, s) && take_next(shape, atoms, scratch, s)) {
      write_curve(shape, block, b, s, s.count - 1);
      if (!wants_more(shape, s)) break;
      if (full_ols) {
        gram_step<true>(shape, atoms, scratch, s);
      } else {
        gram_step<false>(shape, atoms, scratch, s);
      }
    }
    finish_signal(shape, block, b, s);
  }
}

inline void encode_correlate(const PursuitShape& shape,
                             const PreparedAtoms& atoms,
                             const PursuitBlock& block,
                             Scratch& scratch) {
  const bool full_ols = shape.ols && shape.candidates == 0;
  const int mp = shape.padded_dim;
  for (int k = 0; k < shape.max_atoms; ++k) {
    // Atoms times residuals; later picks of OLS: times the newest basis vector, which n needs as
    // well.
    const bool update = full_ols && k > 0;
    int count = 0;
    for (int b = 0; b < block.num_signals; ++b) {
      Signal& s = scratch.signals[b];
      if (!s.active) continue;
      if (!wants_more(shape, s)) {
        finish_signal(shape, block, b, s);
        continue;
      }
      scratch.inputs[count] =
          update ? s.basis + static_cast<std::size_t>(k - 1) * static_cast<std::size_t>(mp)
                 : s.residual;
      scratch.outputs[count] = update
                                   ? scratch.rows + static_cast<std::size_t>(b) *
                                                        static_cast<std::size_t>(shape.padded_atoms)
                                   : s.correlations;
      ++count;
    }
    if (count == 0) break;
    correlate(shape, atoms, scratch.inputs, count, scratch.outputs);
    for (int b = 0; b < block.num_signals; ++b) {
      Signal& s = scratch.signals[b];
      if (!s.active) continue;
      if (update) {
        update_ols(shape,
                   scratch.rows +
                       static_cast<std::size_t>(b) * static_cast<std::size_t>(shape.padded_atoms),
                   s.amplitudes[k - 1],
                   s);
        s.error_p += dot_error(shape) * magnitude(s.amplitudes[k - 1]) + kUlp * s.norm;
        s.error_n += 2 * dot_error(shape);
      } else {
        s.error_p = dot_error(shape) * s.residual_norm;
        if (full_ols) start_ols(shape, atoms, s);
      }
      if (full_ols) {
        group_ols_bounds(shape, scratch, s);
      } else {
        group_correlations(shape, scratch, s);
      }
      if (take_next(shape, atoms, scratch, s)) {
        write_curve(shape, block, b, s, s.count - 1);
      } else {
        finish_signal(shape, block, b, s);
      }
    }
  }
  for (int b = 0; b < block.num_signals; ++b) {
    if (scratch.signals[b].active) finish_signal(shape, block, b, scratch.signals[b]);
  }
}

inline void encode_block(const PursuitShape& shape,
                         const PreparedAtoms& atoms,
                         const PursuitBlock& block,
                         void* memory) {
  Scratch scratch;
  carve(shape, static_cast<char*>(memory), scratch);
  for (int b = 0; b < block.num_signals; ++b) {
    Signal& s = scratch.signals[b];
    const int budget = block.budgets == nullptr ? shape.max_atoms : block.budgets[b];
    if (!load_signal(
            shape,
            block.signals + static_cast<std::size_t>(b) * static_cast<std::size_t>(shape.dim),
            budget,
            s)) {
      write_not_finite(shape, block, b);
      s.norm = __builtin_nanf("");
      continue;
    }
    write_curve(shape, block, b, s, 0);
    if (!s.active) finish_signal(shape, block, b, s);
  }
  if (shape.gram) {
    encode_gram(shape, atoms, block, scratch);
  } else {
    encode_correlate(shape, atoms, block, scratch);
  }
}

inline std::size_t scratch_size(const PursuitShape& shape) {
  Scratch scratch;
  return carve(shape, nullptr, scratch);
}

}  // namespace
}  // namespace lexico::kernels::cpu
