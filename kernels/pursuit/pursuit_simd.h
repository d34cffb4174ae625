#pragma once
// Pursuit on one block of signals, at the vector width of the translation unit that includes this
// (level_*.cpp). The algorithm and its bounds: docs/encoder.md. Only internal linkage here (see
// level.h): no std function templates.
#if defined(__AVX512VNNI__)
#include "kernels/pursuit/screen_vnni.h"
#else
#include "kernels/pursuit/screen_fp32.h"
#endif

namespace lexico::kernels::cpu {
namespace {

// Norms below this share of |x| are rounding noise of the fp32 residual: the signal is in the span
// of its atoms.
constexpr float kResidualFloor = 1e-6f;
constexpr float kCorrelationFloor = 5e-7f;
constexpr int kMaxRefused = 16;
// A screen's errors are taken to stay below this many of their standard deviations: an atom missed
// in 1e9.
constexpr float kDeviations = 6;
// Signals that the Gram form works on in turn: while one is updated, the Gram row of the other
// comes from memory.
constexpr int kGramSlots = 2;

// A signal x (scaled so that its largest element is in [1, 2)), its atoms so far as D_S = U R with
// orthonormal rows of U, and its residual r = x - U^T a.
struct Signal {
  float* residual;       // [padded_dim]
  float* correlations;   // p [padded_atoms]
  float* basis;          // U [max_atoms, padded_dim]
  float* triangle;       // R [max_atoms, max_atoms], column k in row k
  float* amplitudes;     // a [max_atoms]
  std::int32_t* chosen;  // [max_atoms]
  float* spread;         // n [padded_atoms]: |P_perp d|^2, OLS only
  void* rows;            // q = D u of each atom so far (Gram), or of the newest (OLS)
  float* row_variances;  // [max_atoms]: of the errors of q
  std::int32_t refused[kMaxRefused];
  int num_refused, count, limit;
  double unscale;
  float norm, residual_norm, inverse_nu;
  float variance_p, variance_q;  // of the errors of p; of all q together
  float error_p, error_n;        // what p and n are off by at most
  bool active, finite;
};

struct Scratch {
  Signal* signals;       // [block]
  Signal* slots;         // [kGramSlots]: buffers that the signals of a block share in the Gram form
  float* group_best;     // [chunks * kLanes]
  float* coefficients;   // [max_atoms]
  const float** inputs;  // [block]: what to correlate the atoms with, its norms, where to
  float* norms;
  float** outputs;
  void* packed;             // the inputs as the screen packs them
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

inline bool is_full_ols(const PursuitShape& shape) { return shape.ols && shape.candidates == 0; }

inline std::size_t carve(const PursuitShape& shape, char* base, Scratch& s) {
  const std::size_t block = size(shape.block), mp = size(shape.padded_dim),
                    np = size(shape.padded_atoms), atoms = size(shape.max_atoms);
  Carver carver{base, 0};
  s.signals = carver.take<Signal>(block);
  s.slots = carver.take<Signal>(kGramSlots);
  s.group_best = carver.take<float>(size(num_chunks(shape)) * kLanes);
  s.coefficients = carver.take<float>(atoms);
  s.inputs = carver.take<const float*>(block);
  s.norms = carver.take<float>(block);
  s.outputs = carver.take<float*>(block);
  s.packed = carver.take<char>(block * packed_signal_bytes(shape));
  const bool listed = shape.ols && shape.candidates > 0;
  s.shortlist = carver.take<std::int32_t>(listed ? np : 0);
  s.shortlist_scores = carver.take<float>(listed ? np : 0);
  for (std::size_t i = 0; i < block; ++i) {
    Signal unused;
    Signal& signal = base == nullptr ? unused : s.signals[i];
    signal.residual = carver.take<float>(mp);
    signal.correlations = carver.take<float>(np);
  }
  const std::size_t states = shape.gram ? kGramSlots : block;
  for (std::size_t i = 0; i < states; ++i) {
    Signal unused;
    Signal& signal = base == nullptr ? unused : shape.gram ? s.slots[i] : s.signals[i];
    signal.basis = carver.take<float>(atoms * mp);
    signal.triangle = carver.take<float>(atoms * atoms);
    signal.amplitudes = carver.take<float>(atoms);
    signal.row_variances = carver.take<float>(atoms);
    signal.chosen = carver.take<std::int32_t>(atoms);
    signal.spread = carver.take<float>(is_full_ols(shape) ? np : 0);
    signal.rows = carver.take<char>(shape.gram           ? row_bytes(shape)
                                    : is_full_ols(shape) ? np * sizeof(float)
                                                         : 0);
  }
  return carver.used;
}

inline double power_of_two(int exponent) {
  const std::int64_t bits = static_cast<std::int64_t>(exponent + 1023) << 52;
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Copies and scales x.
inline void load_signal(const PursuitShape& shape, const float* x, int budget, Signal& s) {
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
  s.finite = top < 0x7f800000;
  if (!s.finite) return;
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
  const bool full_ols = is_full_ols(shape);
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

inline void set_errors(Signal& s) {
  s.error_p = kDeviations * __builtin_sqrtf(s.variance_p);
  // |n - true n| <= 2 |q| |error of q| over all atoms taken, and |q| <= 1 over them
  s.error_n = 2 * kDeviations * __builtin_sqrtf(s.variance_q) + 4 * kUlp;
}

// p was made anew, from a vector of this norm.
inline void restart_errors(const PursuitShape& shape, Signal& s, float norm) {
  const float deviation = correlate_deviation(shape) * norm;
  s.variance_p = deviation * deviation;
  set_errors(s);
}

// p and n take in a q with this variance.
inline void add_errors(Signal& s, float variance) {
  const float a = s.amplitudes[s.count - 1], rounding = 0.5f * kUlp * s.norm;
  s.variance_p += a * a * variance + rounding * rounding;
  s.variance_q += variance;
  set_errors(s);
}

inline void start_ols(const PursuitShape& shape, const PreparedAtoms& atoms, Signal& s) {
  for (int n = 0; n < shape.padded_atoms; n += kLanes) store(s.spread + n, load(atoms.norms2 + n));
}

// Brings p (and n) of a signal up to date with the atom just taken.
inline void follow_gram(const PursuitShape& shape,
                        const PreparedAtoms& atoms,
                        Scratch& scratch,
                        Signal& s) {
  const int k = s.count - 1;
  const float* column = s.triangle + size(k) * size(shape.max_atoms);
  // Independent errors add up in their squares: of the Gram row, of the rows before it, of storing
  // them.
  const float gram = gram_deviation(shape), stored = row_deviation();
  float variance = gram * gram + stored * stored;
  for (int i = 0; i < k; ++i) variance += column[i] * column[i] * s.row_variances[i];
  variance *= s.inverse_nu * s.inverse_nu;
  s.row_variances[k] = variance + stored * stored;
  add_errors(s, variance);

  GramStep step;
  step.gram_row =
      static_cast<const GramValue*>(atoms.gram) + size(s.chosen[k]) * size(shape.padded_atoms);
  step.rows = s.rows;
  step.k = k;
  step.keep = s.count + 1 < s.limit;
  step.column = column;
  step.inverse_nu = s.inverse_nu;
  step.amplitude = s.amplitudes[k];
  step.correlations = s.correlations;
  step.spread = s.spread;
  step.error_p = s.error_p;
  step.error_n = s.error_n;
  step.group_best = scratch.group_best;
  if (is_full_ols(shape)) {
    gram_step<true>(shape, step);
  } else {
    gram_step<false>(shape, step);
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

inline void prefetch_gram_row(const PursuitShape& shape,
                              const PreparedAtoms& atoms,
                              const Signal& s) {
  const GramValue* row = static_cast<const GramValue*>(atoms.gram) +
                         size(s.chosen[s.count - 1]) * size(shape.padded_atoms);
  constexpr int kPerLine = 64 / sizeof(GramValue);
  for (int n = 0; n < shape.padded_atoms; n += kPerLine) __builtin_prefetch(row + n, 0, 2);
}

inline void take_slot(const Signal& slot, Signal& s) {
  s.basis = slot.basis;
  s.triangle = slot.triangle;
  s.amplitudes = slot.amplitudes;
  s.row_variances = slot.row_variances;
  s.chosen = slot.chosen;
  s.spread = slot.spread;
  s.rows = slot.rows;
}

inline void first_bounds(const PursuitShape& shape,
                         const PreparedAtoms& atoms,
                         Scratch& scratch,
                         Signal& s,
                         float norm) {
  s.variance_q = 0;
  restart_errors(shape, s, norm);
  if (is_full_ols(shape)) {
    start_ols(shape, atoms, s);
    group_ols_bounds(shape, scratch, s);
  } else {
    group_correlations(shape, scratch, s);
  }
}

// All first correlations of the block, then each signal alone: its p stays in cache, and follows
// the picks by Gram rows.
inline void encode_gram(const PursuitShape& shape,
                        const PreparedAtoms& atoms,
                        const PursuitBlock& block,
                        Scratch& scratch) {
  int count = 0;
  for (int b = 0; b < block.num_signals; ++b) {
    Signal& s = scratch.signals[b];
    if (!wants_more(shape, s)) continue;
    scratch.inputs[count] = s.residual;
    scratch.norms[count] = s.norm;
    scratch.outputs[count++] = s.correlations;
  }
  correlate(shape, atoms, scratch.inputs, scratch.norms, count, scratch.outputs, scratch.packed);
  int working[kGramSlots];  // signal in each slot, or -1
  for (int& w : working) w = -1;
  int next = 0, busy = 0;
  do {
    busy = 0;
    for (int slot = 0; slot < kGramSlots; ++slot) {
      if (working[slot] < 0) {
        while (next < block.num_signals && !scratch.signals[next].finite) ++next;
        if (next == block.num_signals) continue;
        working[slot] = next++;
        Signal& s = scratch.signals[working[slot]];
        take_slot(scratch.slots[slot], s);
        if (wants_more(shape, s)) first_bounds(shape, atoms, scratch, s, s.norm);
      } else {
        follow_gram(shape, atoms, scratch, scratch.signals[working[slot]]);
      }
      ++busy;
      const int b = working[slot];
      Signal& s = scratch.signals[b];
      if (wants_more(shape, s) && take_next(shape, atoms, scratch, s)) {
        write_curve(shape, block, b, s, s.count - 1);
        if (wants_more(shape, s)) {
          prefetch_gram_row(shape, atoms, s);
          continue;
        }
      }
      finish_signal(shape, block, b, s);
      working[slot] = -1;
    }
  } while (busy > 0);
}

// Atoms times residuals again for every pick, all signals of the block in step.
inline void encode_correlate(const PursuitShape& shape,
                             const PreparedAtoms& atoms,
                             const PursuitBlock& block,
                             Scratch& scratch) {
  for (int k = 0; k < shape.max_atoms; ++k) {
    // Later picks of OLS take the newest basis vector in place of the residual: p and n both follow
    // from it.
    const bool update = is_full_ols(shape) && k > 0;
    int count = 0;
    for (int b = 0; b < block.num_signals; ++b) {
      Signal& s = scratch.signals[b];
      if (!s.active) continue;
      if (!wants_more(shape, s)) {
        finish_signal(shape, block, b, s);
        continue;
      }
      scratch.inputs[count] = update ? s.basis + size(k - 1) * size(shape.padded_dim) : s.residual;
      scratch.norms[count] = update ? 1.0f : s.residual_norm;
      scratch.outputs[count++] = update ? static_cast<float*>(s.rows) : s.correlations;
    }
    if (count == 0) break;
    correlate(shape, atoms, scratch.inputs, scratch.norms, count, scratch.outputs, scratch.packed);
    for (int b = 0; b < block.num_signals; ++b) {
      Signal& s = scratch.signals[b];
      if (!s.active) continue;
      if (update) {
        const float deviation = correlate_deviation(shape);
        add_errors(s, deviation * deviation);
        update_ols(shape, static_cast<const float*>(s.rows), s.amplitudes[k - 1], s);
        group_ols_bounds(shape, scratch, s);
      } else {
        first_bounds(shape, atoms, scratch, s, s.residual_norm);
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
    load_signal(shape, block.signals + size(b) * size(shape.dim), budget, s);
    if (!s.finite) {
      write_not_finite(shape, block, b);
    } else {
      write_curve(shape, block, b, s, 0);
      if (!s.active && !shape.gram) finish_signal(shape, block, b, s);
    }
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

// --------------------------------------------------------------------------------------------------------
// preparation

inline void prepare_panel(const PursuitShape& shape, const PreparedAtoms& atoms, int panel) {
  pack_panel(shape, atoms, panel);
  for (int n = panel * kPanel; n < (panel + 1) * kPanel; ++n) {
    const float* row = atom_row(shape, atoms, n < shape.num_atoms ? n : 0);
    atoms.norms2[n] = n < shape.num_atoms ? dot(row, row, shape.padded_dim) : 0.0f;
  }
}

inline void prepare_gram(const PursuitShape& shape,
                         const PreparedAtoms& atoms,
                         int panel,
                         void* packed) {
  const int first = panel * kPanel;
  const int count = shape.num_atoms - first < kPanel ? shape.num_atoms - first : kPanel;
  const float* rows[kPanel];
  for (int i = 0; i < count; ++i) rows[i] = atom_row(shape, atoms, first + i);
  gram_rows(shape, atoms, rows, first, count, packed);
}

inline std::size_t gram_size(const PursuitShape& shape) {
  return size(shape.num_atoms) * size(shape.padded_atoms) * sizeof(GramValue);
}

}  // namespace

#define LEXICO_PURSUIT_LEVEL(name) \
  { name, panel_bytes, gram_size, scratch_size, prepare_panel, prepare_gram, encode_block }

}  // namespace lexico::kernels::cpu
