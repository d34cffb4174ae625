#pragma once
// Pursuit on one block of signals, at the vector width of the translation unit that includes this
// (level_*.cpp). The algorithm and its bounds: docs/encoder.md. Only internal linkage here (see
// level.h): no std function templates.
#if defined(__AMX_INT8__) || defined(LEXICO_TILES_ARE_EMULATED)  // the level brings the tiles
#include "kernels/pursuit/screen_amx.h"
#elif defined(__AVX512VNNI__)
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
// The largest singular value of T is estimated by all of them together; beyond this many atoms by
// their fourth powers, which is closer.
constexpr int kFewAtoms = 16;
// Signals that the Gram form works on in turn: while one is updated, the Gram row of the other
// comes from memory. A Gram matrix that is near anyway leaves the first-level cache to one.
constexpr int kGramSlots = 2;
constexpr std::size_t kNearGram = std::size_t{2} << 20;
// Candidates of one pick are often those of the next: what is known of |P_perp d|^2, by the last
// bits of the index.
constexpr int kKnown = 512;
// An atom is near the span once |P_perp d|^2 is below so many times its error; so many are
// followed.
constexpr float kNearSpan = 16;
constexpr std::size_t kMaxNearSpan = 1024;

struct Known {
  std::uint32_t signal;      // of all that this memory served
  std::int32_t atom, count;  // after `count` atoms were taken
  float outside;             // |P_perp d|^2, from fp32 atoms
};

// Atoms whose |P_perp d|^2 is followed by itself. OLS among candidates: the candidates, all atoms
// that were among the largest |d.r| at some pick of this signal. OLS among all: those so near the
// span that the screen, which knows it to within error_n, says nothing.
struct Pool {
  std::int32_t* atoms;     // [pool_size]
  float* outside;          // [pool_size]: |P_perp d|^2 after `seen` atoms were taken
  float* sizes;            // [pool_size]: |d.r|; this and the next among candidates only
  std::uint64_t* members;  // a bit for each atom
  int count, seen;
};

// A signal x (scaled so that its largest element is in [1, 2)), its atoms so far as D_S = U R with
// orthonormal rows of U, and its residual r = x - U^T a = x - D_S w.
struct Signal {
  float* residual;       // [padded_dim]
  float* correlations;   // p [padded_atoms]
  float* basis;          // U [max_atoms, padded_dim]
  float* column;         // of R: the newest, [max_atoms]
  float* inverse;        // T = R^-1 [max_atoms, stride], column k in row k, zeros after it
  float* weights;        // w = T a [stride]
  std::int32_t* chosen;  // [max_atoms]
  float* spread;         // n [padded_atoms]: |P_perp d|^2, OLS among all atoms only
  void* rows;            // q = D u of each atom so far (Gram), or of the newest (OLS)
  Known* known;          // [kKnown + 1], OLS only; the last counts signals
  Pool pool;             // OLS only
  float* group_best;     // [chunks * kLanes], with fresh correlations
  std::int32_t refused[kMaxRefused];
  int num_refused, count, limit;
  double unscale;
  float norm, residual_norm;
  float amplitude, inverse_nu;   // a and 1 / R_kk of the newest atom
  float fourth_powers;           // of the singular values of T, their sum
  float largest_spread2;         // no less than the largest of them squared
  float variance_p, variance_q;  // of the errors of p; of all q together
  float left_out;                // of p, at most: not a rounding error
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
  float** bests;            // [block]: with fresh correlations, of the outputs
  float* left_out;          // [block]
  void* packed;             // the inputs as the screen packs them
  std::int32_t* shortlist;  // [padded_atoms]: candidates of one pick
  float* shortlist_scores;  // [padded_atoms]
  std::int32_t* places;     // [padded_atoms]: in one of these lists
  float* exact;             // [padded_atoms]
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

// Floats from one column of T to the next.
inline int stride_of(const PursuitShape& shape) {
  return (shape.max_atoms + kLanes - 1) / kLanes * kLanes;
}

inline bool is_full_ols(const PursuitShape& shape) { return shape.ols && shape.candidates == 0; }

inline std::size_t gram_size(const PursuitShape& shape) {
  return size(shape.num_atoms) * size(shape.padded_atoms) * sizeof(GramValue);
}

inline int gram_slots(const PursuitShape& shape) {
  return gram_size(shape) <= kNearGram ? 1 : kGramSlots;
}

inline bool has_fresh_correlations(const PursuitShape& shape) {
  return kHasFreshCorrelations && !shape.gram && !is_full_ols(shape);
}

// A pick adds no more than `candidates`; one more for each that is refused. Written a vector at a
// time.
inline std::size_t pool_size(const PursuitShape& shape) {
  const std::size_t most = size(shape.candidates) * size(shape.max_atoms) + kMaxRefused,
                    all = size(shape.padded_atoms);
  if (!shape.ols) return 0;
  if (shape.candidates == 0) return (kMaxNearSpan < all ? kMaxNearSpan : all) + 64;
  return (most < all ? most : all) + 64;
}

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
  s.bests = carver.take<float*>(block);
  s.left_out = carver.take<float>(block);
  s.packed = carver.take<char>(block * packed_signal_bytes(shape));
  s.shortlist = carver.take<std::int32_t>(np + kLanes);
  s.shortlist_scores = carver.take<float>(np + kLanes);
  s.places = carver.take<std::int32_t>(np + kLanes);
  s.exact = carver.take<float>(np + kLanes);
  for (std::size_t i = 0; i < block; ++i) {
    Signal unused;
    Signal& signal = base == nullptr ? unused : s.signals[i];
    signal.residual = carver.take<float>(mp);
    signal.correlations = carver.take<float>(np);
    signal.group_best =
        carver.take<float>(has_fresh_correlations(shape) ? size(num_chunks(shape)) * kLanes : 0);
  }
  const std::size_t states = shape.gram ? kGramSlots : block;
  for (std::size_t i = 0; i < states; ++i) {
    Signal unused;
    Signal& signal = base == nullptr ? unused : shape.gram ? s.slots[i] : s.signals[i];
    signal.basis = carver.take<float>(atoms * mp);
    signal.column = carver.take<float>(atoms);
    signal.inverse = carver.take<float>(atoms * size(stride_of(shape)));
    signal.weights = carver.take<float>(size(stride_of(shape)));
    signal.chosen = carver.take<std::int32_t>(atoms);
    signal.known = carver.take<Known>(shape.ols ? kKnown + 1 : 0);
    signal.pool.atoms = carver.take<std::int32_t>(pool_size(shape));
    signal.pool.outside = carver.take<float>(pool_size(shape));
    signal.pool.sizes = carver.take<float>(shape.candidates > 0 ? pool_size(shape) : 0);
    signal.pool.members = carver.take<std::uint64_t>(shape.candidates > 0 ? np / 64 : 0);
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
  s.norm = s.residual_norm = s.left_out = 0;
  s.unscale = 1;
  s.finite = top < 0x7f800000;
  if (!s.finite) return;
  if (top != 0) {
    // Subnormals have no exponent of their own; as doubles they do. Two factors, since one may be
    // no float.
    float largest_element;
    __builtin_memcpy(&largest_element, &top, sizeof top);
    const double as_double = largest_element;
    std::int64_t bits;
    __builtin_memcpy(&bits, &as_double, sizeof bits);
    const int exponent = static_cast<int>((bits >> 52) & 0x7ff) - 1023, half = exponent / 2;
    const float first = static_cast<float>(power_of_two(-half)),
                second = static_cast<float>(power_of_two(half - exponent));
    s.unscale = power_of_two(exponent);
    for (int k = 0; k < shape.dim; ++k) s.residual[k] = x[k] * first * second;
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

inline const float* atom_row(const PursuitShape& shape, const PreparedAtoms& atoms, int atom) {
  return atoms.rows + size(atom) * size(shape.padded_dim);
}

inline void prefetch_row(const PursuitShape& shape, const PreparedAtoms& atoms, int atom) {
  const float* row = atom_row(shape, atoms, atom);
  for (int k = 0; k < shape.padded_dim; k += 16) __builtin_prefetch(row + k);
}

// c_i = u_i . v for the atoms from `from` on.
inline void project(const Signal& s, const float* v, int padded_dim, int from, float* c) {
  for (int i = from; i < s.count; i += 4) {
    const int left = s.count - i;
    const std::size_t row = size(padded_dim);
    const float* u0 = s.basis + size(i) * row;
    const float *u1 = left > 1 ? u0 + row : u0, *u2 = left > 2 ? u1 + row : u0,
                *u3 = left > 3 ? u2 + row : u0;
    Vec s0{}, s1{}, s2{}, s3{};
    for (int k = 0; k < padded_dim; k += kLanes) {
      const Vec x = load(v + k);
      s0 += load(u0 + k) * x;
      s1 += load(u1 + k) * x;
      s2 += load(u2 + k) * x;
      s3 += load(u3 + k) * x;
    }
    float sums[4];
    sum4(s0, s1, s2, s3, sums);
    for (int j = 0; j < 4 && j < left; ++j) c[i + j] = sums[j];
  }
}

// v -= U^T c
template <int kVectors>
inline void remove_span_part(const Signal& s, const float* c, int padded_dim, int first, float* v) {
  Vec x[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) x[i] = load(v + first + i * kLanes);
  const float* u = s.basis + first;
  for (int k = 0; k < s.count; ++k, u += padded_dim) {
    const Vec weight = splat(c[k]);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) x[i] -= weight * load(u + i * kLanes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) store(v + first + i * kLanes, x[i]);
}

inline void remove_span(const Signal& s, const float* c, int padded_dim, float* v) {
  int k = 0;
  for (; k + 8 * kLanes <= padded_dim; k += 8 * kLanes) remove_span_part<8>(s, c, padded_dim, k, v);
  for (; k + 4 * kLanes <= padded_dim; k += 4 * kLanes) remove_span_part<4>(s, c, padded_dim, k, v);
  for (; k < padded_dim; k += kLanes) remove_span_part<1>(s, c, padded_dim, k, v);
}

// T_k = (e_k - T c) / nu, with c the column of R above nu.
inline void extend_inverse(const PursuitShape& shape, Signal& s, float inverse_nu) {
  const int stride = stride_of(shape), k = s.count;
  float* added = s.inverse + size(k) * size(stride);
  Vec sum2{};
  for (int first = 0; first < stride; first += kLanes) {
    Vec v{};
    const float* column =
        s.inverse + size(first) * size(stride) + first;  // shorter ones are zero here
    for (int i = first; i < k; ++i, column += stride)
      v -= splat(s.column[i] * inverse_nu) * load(column);
    store(added + first, v);
    sum2 += v * v;
  }
  added[k] = inverse_nu;
  if (!shape.ols) return;
  const float own = sum(sum2) + inverse_nu * inverse_nu;
  if (shape.max_atoms <= kFewAtoms) {
    s.largest_spread2 = (k == 0 ? 0 : s.largest_spread2) + own;
    return;
  }
  // The sum of fourth powers is that of (T_i.T_j)^2 over all i, j.
  float powers = own * own;
  for (int i = 0; i < k; i += 4) {
    Vec parts[4] = {};
    for (int j = 0; j < 4 && i + j < k; ++j) {
      const float* column = s.inverse + size(i + j) * size(stride);
      for (int n = 0; n <= i + j; n += kLanes) parts[j] += load(column + n) * load(added + n);
    }
    float dots[4];
    sum4(parts[0], parts[1], parts[2], parts[3], dots);
    for (const float x : dots) powers += 2 * x * x;
  }
  s.fourth_powers = (k == 0 ? 0 : s.fourth_powers) + powers;
  s.largest_spread2 = __builtin_sqrtf(s.fourth_powers);
}

// w += a T_k, the newest column.
inline void add_to_weights(const PursuitShape& shape, Signal& s) {
  const int stride = stride_of(shape), k = s.count;
  const float* column = s.inverse + size(k) * size(stride);
  for (int i = 0; i < stride; i += kLanes) {
    const Vec before = k == 0 ? Vec{} : load(s.weights + i);
    store(s.weights + i, before + s.amplitude * load(column + i));
  }
}

// Takes the atom into the basis and its part out of the residual. False, and nothing changed, if it
// is in the span.
inline bool add_atom(
    const PursuitShape& shape, const PreparedAtoms& atoms, Scratch& scratch, Signal& s, int atom) {
  const int mp = shape.padded_dim, k = s.count;
  const float* d = atom_row(shape, atoms, atom);
  float* u = s.basis + static_cast<std::size_t>(k) * static_cast<std::size_t>(mp);
  float *column = s.column, *c = scratch.coefficients;
  for (int i = 0; i < mp; i += kLanes) store(u + i, load(d + i));
  float nu2 = atoms.norms2[atom];
  if (k > 0) {
    project(s, d, mp, 0, column);
    remove_span(s, column, mp, u);
    nu2 = dot(u, u, mp);
    // Once leaves rounding errors of size kUlp / nu in the basis; twice is enough.
    if (nu2 < 0.5f * atoms.norms2[atom]) {
      project(s, u, mp, 0, c);
      remove_span(s, c, mp, u);
      for (int i = 0; i < k; ++i) column[i] += c[i];
      nu2 = dot(u, u, mp);
    }
  }
  if (!(nu2 > kIndependent * atoms.norms2[atom]) || !(nu2 > 0)) return false;
  const float nu = __builtin_sqrtf(nu2), inverse = 1 / nu;
  extend_inverse(shape, s, inverse);
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
  s.amplitude = a;
  s.inverse_nu = inverse;
  add_to_weights(shape, s);
  s.chosen[k] = atom;
  s.count = k + 1;
  return true;
}

inline void write_codes(const PursuitShape& shape,
                        const PursuitBlock& block,
                        int index,
                        const Signal& s) {
  std::int32_t* indices = block.indices + size(index) * size(shape.max_atoms);
  float* weights = block.weights + size(index) * size(shape.max_atoms);
  for (int k = 0; k < shape.max_atoms; ++k) {
    indices[k] = k < s.count ? s.chosen[k] : -1;
    weights[k] = k < s.count ? clamp_to_float(s.weights[k] * s.unscale) : 0;
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

// ------------------------------------------------------------------------------------------------------
// vector passes

inline void group_correlations(const PursuitShape& shape, Scratch& scratch, const Signal& s) {
  for (int chunk = 0, n = 0; n < shape.padded_atoms; ++chunk) {
    Vec best{};
    for (int i = 0; i < kChunkVectors && n < shape.padded_atoms; ++i, n += kLanes) {
      best = max_magnitude(best, load(s.correlations + n));
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

// ------------------------------------------------------------------------------------- which atom
// next: screen, settle

inline void forget_known(const PursuitShape& shape, Signal& s) {
  if (shape.ols) ++s.known[kKnown].signal;
}

inline void forget_all(const PursuitShape& shape, Scratch& scratch) {
  for (int i = 0; shape.ols && i < (shape.gram ? kGramSlots : shape.block); ++i) {
    Known* const known = (shape.gram ? scratch.slots[i] : scratch.signals[i]).known;
    for (int j = 0; j <= kKnown; ++j) known[j] = {0, -1, 0, 0};
  }
}

// |P_perp d|^2 of an atom, in fp32 from its fp32 row: every part that a taken atom removes, in
// their order.
inline float outside(const PursuitShape& shape,
                     const PreparedAtoms& atoms,
                     Scratch& scratch,
                     const Signal& s,
                     int atom) {
  Known& known = s.known[atom % kKnown];
  const std::uint32_t signal = s.known[kKnown].signal;
  if (known.atom != atom || known.signal != signal) known = {signal, atom, 0, atoms.norms2[atom]};
  if (known.count < s.count) {
    float* c = scratch.coefficients;
    project(s, atom_row(shape, atoms, atom), shape.padded_dim, known.count, c);
    for (int i = known.count; i < s.count; ++i) known.outside -= c[i] * c[i];
    known.count = s.count;
  }
  return known.outside;
}

inline float ols_score(float p, float n, float norm2) {
  return n > kIndependent * norm2 && n > 0 ? p * p / n : 0;
}

// The exact score of an atom, in fp32 from its fp32 row: |d.r| for OMP, (d.r)^2 / |P_perp d|^2 for
// OLS; 0 for atoms in the span.
inline float score(const PursuitShape& shape,
                   const PreparedAtoms& atoms,
                   Scratch& scratch,
                   const Signal& s,
                   int atom) {
  const float p = dot(atom_row(shape, atoms, atom), s.residual, shape.padded_dim);
  if (!shape.ols) return magnitude(p);
  return ols_score(p, outside(shape, atoms, scratch, s, atom), atoms.norms2[atom]);
}

// An exact OLS score lies in [low, high].
struct Bounds {
  float low, high;
};
inline Bounds ols_bounds(float p, float n, float error_p, float error_n) {
  const float size = magnitude(p), high = size + error_p, low = size > error_p ? size - error_p : 0;
  const float least = 0.5f * kIndependent, room = n - error_n;
  if (n + error_n < kIndependent) return {0, 0};
  // An atom that may be in the span may score 0.
  return {room < 2 * kIndependent ? 0 : low * low / (n + error_n),
          high * high / (room > least ? room : least)};
}
// As the screen knows it.
inline Bounds bounds_of(const Signal& s, int atom) {
  return ols_bounds(s.correlations[atom], s.spread[atom], s.error_p, s.error_n);
}

// The same for many.
struct VectorBounds {
  Vec low, high;
};
inline VectorBounds ols_bounds(Vec p, Vec n, float error_p, float error_n) {
  const Vec size = abs(p), high = size + error_p, low = max(size - error_p, Vec{}),
            room = n - error_n;
  const VecInt may_be_in_span = room < 2 * kIndependent, is_in_span = n + error_n < kIndependent;
  // The reciprocals are rough.
  const Vec least = low * low * rough_reciprocal(n + error_n) * splat(0.9995f),
            most = high * high * rough_reciprocal(max(room, splat(0.5f * kIndependent))) *
                   splat(1.0005f);
  return {(Vec)((VecInt)least & ~may_be_in_span), (Vec)((VecInt)most & ~is_in_span)};
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

inline float largest_group(const Scratch& scratch, int groups) {
  Vec top = load(scratch.group_best);
  for (int g = kLanes; g < groups; g += kLanes) top = max(top, load(scratch.group_best + g));
  return largest(top);
}

// visit(atom) for all atoms whose value, as the vector passes know it, reaches `least()`: |p|, or
// the OLS bound. A visit may raise it.
template <typename Least, typename Visit>
inline void visit_atoms(const PursuitShape& shape,
                        const Scratch& scratch,
                        const Signal& s,
                        bool ols,
                        Least&& least,
                        Visit&& visit) {
  const int groups = num_chunks(shape) * kLanes;
  for (int g = 0; g < groups; g += kLanes) {
    unsigned lanes = mask_ge(load(scratch.group_best + g), splat(least()));
    for (; lanes != 0; lanes &= lanes - 1) {
      const int first = g * kChunkVectors + __builtin_ctz(lanes),
                left = (shape.padded_atoms - g * kChunkVectors) / kLanes;
      const int vectors = left < kChunkVectors ? left : kChunkVectors;
      for (int i = 0; i < vectors; i += kLanes) {
        const int atom = first + i * kLanes, count = vectors - i < kLanes ? vectors - i : kLanes;
        const Vec p = load_strided(s.correlations + atom, kLanes, count);
        const Vec value =
            ols ? vector_bound(
                      p, load_strided(s.spread + atom, kLanes, count), s.error_p, s.error_n)
                : abs(p);
        unsigned mask = mask_ge(value, splat(least())) & ((2u << (count - 1)) - 1);
        for (; mask != 0; mask &= mask - 1) {
          const int one = atom + __builtin_ctz(mask) * kLanes;
          if (one < shape.num_atoms) visit(one);
        }
      }
    }
  }
}

// The best lower bound of an OLS score. (Atoms that are taken have an infinite spread.)
inline float largest_low(const PursuitShape& shape, const Signal& s) {
  Vec best{};
  for (int n = 0; n < shape.padded_atoms; n += kLanes) {
    const Vec size = max(abs(load(s.correlations + n)) - s.error_p, Vec{}),
              outside = load(s.spread + n);
    const VecInt may_be_in_span = outside < s.error_n + 2 * kIndependent;
    // 1e-3 below what it may be: the reciprocal is rough.
    const Vec low = size * size * rough_reciprocal(outside + s.error_n) * splat(0.999f);
    best = max(best, (Vec)((VecInt)low & ~may_be_in_span));
  }
  return largest(best);
}

// The atom with the largest |d.r| (lowest index of equals). Only atoms whose bound reaches the best
// lower bound are evaluated: most often there is one, and then its score need not be known.
inline Pick settle_omp(const PursuitShape& shape,
                       const PreparedAtoms& atoms,
                       Scratch& scratch,
                       const Signal& s,
                       float floor) {
  const float peak = largest_group(scratch, num_chunks(shape) * kLanes);
  float least = peak > s.error_p ? peak - s.error_p : 0;  // a score that some atom reaches
  int listed = 0, best = -1;
  float best_low = -1;
  const auto list = [&](int atom) {
    const float size = magnitude(s.correlations[atom]), high = size + s.error_p,
                low = size > s.error_p ? size - s.error_p : 0;
    if (high < least || is_taken(s, atom)) return;
    prefetch_row(shape, atoms, atom);
    if (low > best_low) {
      best = listed;
      best_low = low;
    }
    scratch.shortlist[listed] = atom;
    scratch.shortlist_scores[listed++] = high;
    least = low > least ? low : least;
  };
  const auto in_reach = [&] { return least - s.error_p; };
  visit_atoms(shape, scratch, s, false, in_reach, list);
  if (best_low < least) {  // whatever reaches it is taken
    least = 0;
    listed = 0;
    visit_atoms(shape, scratch, s, false, in_reach, list);
  }
  Pick pick;
  if (listed == 0) return pick;
  if (listed == 1 && best_low > floor) return {scratch.shortlist[0], best_low};
  pick.offer(scratch.shortlist[best], score(shape, atoms, scratch, s, scratch.shortlist[best]));
  for (int i = 0; i < listed; ++i) {
    if (i != best && scratch.shortlist_scores[i] >= (pick.score > least ? pick.score : least))
      pick.offer(scratch.shortlist[i], score(shape, atoms, scratch, s, scratch.shortlist[i]));
  }
  return pick;
}

inline void empty_pool(const PursuitShape& shape, Signal& s) {
  s.pool.count = s.pool.seen = 0;
  if (shape.candidates == 0) return;
  for (int i = 0; i < shape.padded_atoms / 64; ++i) s.pool.members[i] = 0;
}

// A value that at least `wanted` atoms reach, and few more: so many of fewer groups do. 0 if there
// are not that many groups.
inline float value_reached_by(const PursuitShape& shape, Scratch& scratch, int wanted) {
  const int groups = num_chunks(shape) * kLanes;
#if defined(__AVX512F__)
  const bool by_network = wanted > 8 && wanted <= 16 && groups >= 64;
#else
  const bool by_network = false;
#endif
  const int most = by_network ? 64 : (2 * wanted + kLanes - 1) / kLanes * kLanes,
            count = groups < most ? groups : most;
  if (count < wanted) return 0;
  float* const best = scratch.shortlist_scores;
  for (int first = 0; first < count; first += kLanes) {
    Vec top = load(scratch.group_best + first);
    for (int g = first + count; g < groups; g += count)
      top = max(top, load(scratch.group_best + g));
    store(best + first, top);
  }
#if defined(__AVX512F__)
  if (by_network) return value_reached_by_16(best);
#endif
  store(best + count, splat(-3e38f));
  return value_of_rank(best, count, wanted);
}

// Lists the atoms outside the pool whose |p| is at least `least`.
inline int list_new(const PursuitShape& shape, Scratch& scratch, const Signal& s, float least) {
  std::int32_t* const list = scratch.shortlist;
  const std::uint64_t* const members = s.pool.members;
  if (shape.padded_atoms <= kMostListed)
    return list_reaching(s.correlations, shape.padded_atoms, least, members, list);
  int listed = 0;
  visit_atoms(
      shape,
      scratch,
      s,
      false,
      [&] { return least; },
      [&](int atom) {
        list[listed] = atom;
        listed += (members[atom / 64] >> (atom % 64) & 1) == 0;
      });
  return listed;
}

// Of the listed atoms, outside the pool and with |p| of `sizes`, leaves those among the
// `candidates` largest |d.r|. Behind their sizes are those of the pool's atoms that may be among
// them, `count` in all, more than there are candidates.
inline int leave_largest(const PursuitShape& shape,
                         const PreparedAtoms& atoms,
                         Scratch& scratch,
                         const Signal& s,
                         int listed,
                         int count) {
  std::int32_t* const list = scratch.shortlist;
  float* const sizes = scratch.shortlist_scores;
  const Pool& pool = s.pool;
  const float last = value_of_rank(sizes, count, shape.candidates);
  // Those that the screen cannot tell from it may have to be told apart.
  // (A size of 0 is that of an atom that is taken, or of the rest of a vector.)
  const Vec low = max(splat(last - 2 * s.error_p), splat(1e-30f)),
            high = splat(last + 2.001f * s.error_p);
  int above = 0, reaching = 0;
  for (int i = 0; i < count; i += kLanes) {
    above += __builtin_popcount(mask_ge(load(sizes + i), high));
    reaching += __builtin_popcount(mask_ge(load(sizes + i), low));
  }
  std::int32_t* const apart = scratch.places;
  const bool all = reaching <= shape.candidates;
  int in = 0, unsure = 0;
  for (int i = 0; i < listed; i += kLanes) {
    const Vec v = load(sizes + i);
    const VecInt which = load_int(list + i);
    const unsigned lanes =
        listed - i < kLanes ? (1u << (listed - i)) - 1 : (2u << (kLanes - 1)) - 1;
    const unsigned sure = mask_ge(v, all ? low : high) & lanes, either = mask_ge(v, low) & lanes;
    unsure += pack_lanes(apart + unsure, either & ~sure, which);
    in += pack_lanes(list + in, sure, which);
  }
  if (unsure == 0) return in;
  const int room = shape.candidates - above, from_list = unsure;
  for (int i = 0; i < pool.count; i += kLanes) {
    const Vec v = load(pool.sizes + i);
    unsure +=
        pack_lanes(apart + unsure, mask_ge(v, low) & ~mask_ge(v, high), load_int(pool.atoms + i));
  }
  float* const exact = scratch.exact;
  for (int i = 0; i < unsure; ++i)
    exact[i] = magnitude(dot(atom_row(shape, atoms, apart[i]), s.residual, shape.padded_dim));
  store(exact + unsure, splat(-3e38f));
  const float least = value_of_rank(exact, unsure, room);
  for (int i = 0; i < from_list; ++i) {
    int before = 0;  // of equals the lowest indices are in
    for (int j = 0; exact[i] == least && j < unsure; ++j)
      before += exact[j] > least || (exact[j] == least && apart[j] < apart[i]);
    if (exact[i] >= least && before < room) list[in++] = apart[i];
  }
  return in;
}

// |P_perp d|^2 of the pool without the parts of the atoms taken since: from the rows of q where
// they are kept, else in fp32 with the same bits as outside(). Of those in it from `first` on,
// nothing was known.
inline void follow_pool(
    const PursuitShape& shape, const PreparedAtoms& atoms, Scratch& scratch, Signal& s, int first) {
  Pool& pool = s.pool;
  for (int i = first; i < pool.count; i += kLanes) {
    if (shape.gram) {
      const VecInt indices = load_int(pool.atoms + i);
      store(pool.outside + i,
            load_at(atoms.norms2, indices) - rows_squared(shape, s.rows, indices, 0, s.count));
      continue;
    }
    for (int j = i; j < i + kLanes && j < pool.count; ++j)
      pool.outside[j] = outside(shape, atoms, scratch, s, pool.atoms[j]);
  }
}

inline void follow_pool(const PursuitShape& shape, const PreparedAtoms& atoms, Signal& s) {
  Pool& pool = s.pool;
  for (; pool.seen < s.count; ++pool.seen) {
    if (shape.gram && shape.candidates > 0) {
      for (int i = 0; i < pool.count; i += kLanes) {
        const Vec part =
            rows_squared(shape, s.rows, load_int(pool.atoms + i), pool.seen, pool.seen + 1);
        store(pool.outside + i, load(pool.outside + i) - part);
      }
      continue;
    }
    const float* const u = s.basis + size(pool.seen) * size(shape.padded_dim);
    for (int i = 0; i < pool.count; i += 4) {
      const float* rows[4];
      for (int j = 0; j < 4; ++j)
        rows[j] = atom_row(shape, atoms, pool.atoms[i + j < pool.count ? i + j : i]);
      Vec sums[4] = {};
      for (int k = 0; k < shape.padded_dim; k += kLanes) {
        const Vec x = load(u + k);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[j] += x * load(rows[j] + k);
      }
      float c[4];
      sum4(sums[0], sums[1], sums[2], sums[3], c);
      for (int j = 0; j < 4 && i + j < pool.count; ++j) pool.outside[i + j] -= c[j] * c[j];
    }
  }
}

// Adds the atoms among the `candidates` largest |d.r|.
inline void add_to_pool(const PursuitShape& shape,
                        const PreparedAtoms& atoms,
                        Scratch& scratch,
                        Signal& s) {
  Pool& pool = s.pool;
  // Atoms that are taken have a correlation of 0; where they might reach the value all the same, as
  // many more are asked for.
  float reached = value_reached_by(shape, scratch, shape.candidates);
  if (reached <= 3 * s.error_p)
    reached = value_reached_by(shape, scratch, shape.candidates + s.count + s.num_refused);
  const float threshold = reached - 2 * s.error_p;
  // A correlation of exactly 0 is that of padding, or useless.
  const float positive = threshold > 0 ? threshold : 1e-30f;
  const int listed = list_new(shape, scratch, s, positive);
  float* const sizes = scratch.shortlist_scores;
  for (int i = 0; i < pool.count; i += kLanes) {
    const Vec p = abs(load_at(s.correlations, load_int(pool.atoms + i)));
    store(pool.sizes + i, load(pool.outside + i) < 1e29f ? p : Vec{});
  }
  if (listed == 0) return;
  store_int(scratch.shortlist + listed, scratch.shortlist[0] - VecInt{});  // the rest of a vector
  for (int i = 0; i < listed; i += kLanes)
    store(sizes + i, abs(load_at(s.correlations, load_int(scratch.shortlist + i))));
  int count = listed;
  for (int i = 0; i < pool.count; i += kLanes) {
    const Vec v = load(pool.sizes + i);
    count += pack_lanes(sizes + count, mask_ge(v, splat(positive)), v);
  }
  store(sizes + count, splat(-3e38f));
  const int left =
      count > shape.candidates ? leave_largest(shape, atoms, scratch, s, listed, count) : listed;
  const int before = pool.count;
  for (int i = 0; i < left; i += kLanes) {
    const VecInt which = load_int(scratch.shortlist + i);
    store_int(pool.atoms + before + i, which);
    store(pool.sizes + before + i, abs(load_at(s.correlations, which)));
  }
  for (int i = 0; i < left; ++i) {
    const int atom = scratch.shortlist[i];
    pool.members[atom / 64] |= std::uint64_t{1} << (atom % 64);
  }
  pool.count += left;
  store_int(pool.atoms + pool.count, pool.atoms[0] - VecInt{});  // the rest of vectors
  store(pool.sizes + pool.count, Vec{});
  follow_pool(shape, atoms, scratch, s, before);
}

// The atom with the largest (d.r)^2 / |P_perp d|^2 (lowest index of equals). Atoms near the span,
// whose bounds are wide, are met once by way of the screen and from then on in the pool.
inline Pick settle_ols(const PursuitShape& shape,
                       const PreparedAtoms& atoms,
                       Scratch& scratch,
                       Signal& s,
                       float floor) {
  follow_pool(shape, atoms, s);
  Pool& pool = s.pool;
  float* const pool_highs = scratch.exact;
  float least = 0;  // a score that some atom reaches
  if (pool.count > 0) {
    store(pool.outside + pool.count, splat(1e30f));  // the rest of a vector
    store_int(pool.atoms + pool.count, pool.atoms[0] - VecInt{});
    Vec lows{};
    for (int i = 0; i < pool.count; i += kLanes) {
      const Vec p = load_at(s.correlations, load_int(pool.atoms + i));
      const VectorBounds bounds = ols_bounds(p, load(pool.outside + i), s.error_p, 4 * kUlp);
      lows = max(lows, bounds.low);
      store(pool_highs + i, bounds.high);
    }
    least = largest(lows);
  }
  const float peak = largest_group(scratch, num_chunks(shape) * kLanes);
  visit_atoms(
      shape,
      scratch,
      s,
      true,
      [&] { return peak; },
      [&](int atom) {
        const float low = bounds_of(s, atom).low;
        if (low > least) least = low;
      });
  // Atoms near the span may have the largest bounds and low scores: then it is better to look at
  // all.
  if (least < 0.5f * peak) {
    const float low = largest_low(shape, s);
    if (low > least) least = low;
  }
  const int room = static_cast<int>(pool_size(shape)) - 64;
  int listed = 0;
  // Vector passes know the bound within 1e-3.
  const auto in_reach = [&] { return least * (1 / 1.001f); };
  const auto list = [&](int atom) {
    const bool is_near_span = s.spread[atom] < kNearSpan * s.error_n && pool.count < room;
    Bounds bounds;
    if (is_near_span) {
      const float n = outside(shape, atoms, scratch, s, atom);
      bounds = ols_bounds(s.correlations[atom], n, s.error_p, 4 * kUlp);
      pool.atoms[pool.count] = atom;
      pool.outside[pool.count] = n;
      pool_highs[pool.count++] = bounds.high;
      s.spread[atom] = 1e30f;  // the screen's bound is 0 from here on
    } else {
      bounds = bounds_of(s, atom);
      if (bounds.high < least) return;
      prefetch_row(shape, atoms, atom);
      scratch.shortlist[listed] = atom;
      scratch.shortlist_scores[listed++] = bounds.high;
    }
    if (bounds.low > least) least = bounds.low;
  };
  visit_atoms(shape, scratch, s, true, in_reach, list);

  Pick pick;
  int place = -1;  // of the pick in the pool
  const auto offer = [&](int atom, float p, float n, int where) {
    pick.offer(atom, ols_score(p, n, atoms.norms2[atom]));
    if (pick.atom == atom) place = where;
  };
  const auto correlation = [&](int atom) {
    return dot(atom_row(shape, atoms, atom), s.residual, shape.padded_dim);
  };
  int from_pool = 0;
  std::int32_t* const places = scratch.places;
  for (int i = 0; i < pool.count; i += kLanes) {
    unsigned lanes = mask_ge(load(pool_highs + i), splat(least));
    if (pool.count - i < kLanes) lanes &= (1u << (pool.count - i)) - 1;
    for (; lanes != 0; lanes &= lanes - 1) {
      const int where = i + __builtin_ctz(lanes);
      if (pool.outside[where] >= 1e29f) continue;  // taken
      places[from_pool++] = where;
      prefetch_row(shape, atoms, pool.atoms[where]);
    }
  }
  for (int i = 0; i < from_pool; ++i) {
    const int atom = pool.atoms[places[i]];
    offer(atom, correlation(atom), pool.outside[places[i]], places[i]);
  }
  if (listed == 1 && from_pool == 0) {
    const int atom = scratch.shortlist[0];
    const float low = bounds_of(s, atom).low;
    if (low > floor) return {atom, low};
  }
  // d.r takes less to know than |P_perp d|^2, and with it the bounds leave fewer.
  float *const exact = scratch.exact, *const highs = scratch.shortlist_scores;
  int best = -1;
  float best_low = -1;
  for (int i = 0; i < listed; ++i) {
    if (highs[i] < pick.score || highs[i] < least) continue;
    const int atom = scratch.shortlist[i];
    exact[i] = correlation(atom);
    const Bounds bounds = ols_bounds(exact[i], s.spread[atom], 0, s.error_n);
    highs[i] = bounds.high;
    if (bounds.low > best_low) {
      best = i;
      best_low = bounds.low;
    }
  }
  const auto evaluate = [&](int i) {
    const int atom = scratch.shortlist[i];
    offer(atom, exact[i], outside(shape, atoms, scratch, s, atom), -1);
  };
  if (best >= 0) evaluate(best);
  for (int i = 0; i < listed; ++i) {
    if (i != best && highs[i] >= pick.score && highs[i] >= least) evaluate(i);
  }
  if (place >= 0) pool.outside[place] = 1e30f;  // its bound is 0 from here on
  return pick;
}

// OLS among the atoms that are or were among the largest |d.r|. The pick will not be one again.
inline Pick settle_among(const PursuitShape& shape,
                         const PreparedAtoms& atoms,
                         Scratch& scratch,
                         Signal& s,
                         float floor) {
  follow_pool(shape, atoms, s);
  add_to_pool(shape, atoms, scratch, s);
  const Pool& pool = s.pool;
  Pick pick;
  if (pool.count == 0) return pick;
  // Bounds first: few are left to be evaluated.
  const float error_n = shape.gram ? s.error_n : 4 * kUlp;
  float* const highs = scratch.shortlist_scores;
  store(pool.outside + pool.count, splat(1e30f));  // the rest of a vector
  Vec least{};
  for (int i = 0; i < pool.count; i += kLanes) {
    const VectorBounds bounds =
        ols_bounds(load(pool.sizes + i), load(pool.outside + i), s.error_p, error_n);
    least = max(least, bounds.low);
    store(highs + i, bounds.high);
  }
  const float enough = largest(least), reach = enough > floor ? enough : floor;
  std::int32_t* const places = scratch.places;
  int left = 0;
  for (int i = 0; i < pool.count; i += kLanes)
    left += pack_lanes(places + left, mask_ge(load(highs + i), splat(reach)), lane_numbers() + i);
  int place = -1;
  if (left == 1 && enough > floor) {
    place = places[0];
    pick = {pool.atoms[place], enough};
  } else {
    for (int i = 0; i < left; ++i) {
      const int atom = pool.atoms[places[i]];
      pick.offer(atom, score(shape, atoms, scratch, s, atom));
      if (pick.atom == atom) place = places[i];
    }
  }
  if (place >= 0) pool.outside[place] = 1e30f;  // its bound is 0 from here on
  return pick;
}

// Picks and adds one atom. False if there is none left worth taking.
inline bool take_next(const PursuitShape& shape,
                      const PreparedAtoms& atoms,
                      Scratch& scratch,
                      Signal& s) {
  for (;;) {
    const float correlation = kCorrelationFloor * s.norm,
                floor = shape.ols ? correlation * correlation : correlation;
    const Pick pick = shape.ols && shape.candidates > 0
                          ? settle_among(shape, atoms, scratch, s, floor)
                      : shape.ols ? settle_ols(shape, atoms, scratch, s, floor)
                                  : settle_omp(shape, atoms, scratch, s, floor);
    if (pick.atom < 0 || pick.score <= floor) return false;
    const bool added = add_atom(shape, atoms, scratch, s, pick.atom);
    if (is_full_ols(shape)) s.spread[pick.atom] = 1e30f;  // its bound is 0 from here on
    if (added) return true;
    if (s.num_refused == kMaxRefused) return false;
    s.refused[s.num_refused++] = pick.atom;
  }
}

// ------------------------------------------------------------------------------------------------------
// following the picks

// p -= a q, n -= q^2, with q = D u of the atom just taken.
inline void update_ols(const PursuitShape& shape, const float* q, float a, Signal& s) {
  for (int n = 0; n < shape.padded_atoms; n += kLanes) {
    const Vec x = load(q + n);
    store(s.correlations + n, load(s.correlations + n) - a * x);
    store(s.spread + n, load(s.spread + n) - x * x);
  }
}

inline void set_errors(Signal& s) {
  s.error_p = kDeviations * __builtin_sqrtf(s.variance_p) + s.left_out;
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
  const float a = s.amplitude, rounding = 0.5f * kUlp * s.norm;
  s.variance_p += a * a * variance + rounding * rounding;
  s.variance_q += variance;
  set_errors(s);
}

inline void start_ols(const PursuitShape& shape, const PreparedAtoms& atoms, Signal& s) {
  for (int n = 0; n < shape.padded_atoms; n += kLanes) store(s.spread + n, load(atoms.norms2 + n));
  for (int n = shape.num_atoms; n < shape.padded_atoms; ++n) s.spread[n] = 1e30f;  // a bound of 0
}

template <bool kOls>
inline void step_by_kept(const PursuitShape& shape, const GramStep& step, bool keep) {
  if (keep) {
    gram_step<kOls, true>(shape, step);
  } else {
    gram_step<kOls, false>(shape, step);
  }
}

// Brings p (and n) of a signal up to date with the atom just taken.
inline void follow_gram(const PursuitShape& shape,
                        const PreparedAtoms& atoms,
                        Scratch& scratch,
                        Signal& s) {
  const int k = s.count - 1;
  // A row is q = T^T (Gram rows of the atoms so far), p lacks w of them: so are the errors. One
  // error of a Gram row: its own, that of the column of R, and that of the stored row.
  const float gram = gram_deviation(shape), stored = row_deviation();
  const float variance = gram * gram + stored * stored, first = correlate_deviation(shape) * s.norm;
  float weights2 = 0;
  for (int i = 0; i <= k; ++i) weights2 += s.weights[i] * s.weights[i];
  const float rounding = 0.5f * kUlp * s.norm;
  s.variance_p =
      first * first + variance * weights2 + static_cast<float>(s.count) * rounding * rounding;
  // The pool takes q from the stored row.
  s.variance_q = variance * s.largest_spread2 + (shape.candidates > 0 ? stored * stored : 0);
  set_errors(s);

  GramStep step;
  step.gram_row =
      static_cast<const GramValue*>(atoms.gram) + size(s.chosen[k]) * size(shape.padded_atoms);
  step.rows = s.rows;
  step.k = k;
  step.column = s.column;
  step.inverse_nu = s.inverse_nu;
  step.amplitude = s.amplitude;
  step.correlations = s.correlations;
  step.spread = s.spread;
  step.error_p = s.error_p;
  step.error_n = s.error_n;
  step.group_best = scratch.group_best;
  // A later step will need its row; the pool does now.
  const bool keep = s.count + 1 < s.limit || shape.candidates > 0;
  if (is_full_ols(shape)) {
    step_by_kept<true>(shape, step, keep);
  } else {
    step_by_kept<false>(shape, step, keep);
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
  s.column = slot.column;
  s.inverse = slot.inverse;
  s.weights = slot.weights;
  s.chosen = slot.chosen;
  s.spread = slot.spread;
  s.rows = slot.rows;
  s.known = slot.known;
  s.pool = slot.pool;
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
  correlate(
      shape, atoms, scratch.inputs, scratch.norms, count, scratch.outputs, nullptr, scratch.packed);
  int working[kGramSlots];  // signal in each slot, or -1
  for (int& w : working) w = -1;
  const int slots = gram_slots(shape);
  int next = 0, busy = 0;
  do {
    busy = 0;
    for (int slot = 0; slot < slots; ++slot) {
      if (working[slot] < 0) {
        while (next < block.num_signals && !scratch.signals[next].finite) ++next;
        if (next == block.num_signals) continue;
        working[slot] = next++;
        Signal& s = scratch.signals[working[slot]];
        take_slot(scratch.slots[slot], s);
        forget_known(shape, s);
        empty_pool(shape, s);
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
      scratch.bests[count] = s.group_best;
      scratch.outputs[count++] = update ? static_cast<float*>(s.rows) : s.correlations;
    }
    if (count == 0) break;
    const FreshCorrelations fresh{scratch.bests, scratch.left_out};
    correlate(shape,
              atoms,
              scratch.inputs,
              scratch.norms,
              count,
              scratch.outputs,
              has_fresh_correlations(shape) ? &fresh : nullptr,
              scratch.packed);
    int input = 0;
    for (int b = 0; b < block.num_signals; ++b) {
      Signal& s = scratch.signals[b];
      if (!s.active) continue;
      if (update) {
        const float deviation = correlate_deviation(shape);
        add_errors(s, deviation * deviation);
        update_ols(shape, static_cast<const float*>(s.rows), s.amplitude, s);
        group_ols_bounds(shape, scratch, s);
      } else if (has_fresh_correlations(shape)) {
        scratch.group_best = s.group_best;
        s.left_out = scratch.left_out[input++];
        s.variance_q = 0;
        restart_errors(shape, s, s.residual_norm);
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
  forget_all(shape, scratch);
  for (int b = 0; b < block.num_signals; ++b) {
    Signal& s = scratch.signals[b];
    const int budget = block.budgets == nullptr ? shape.max_atoms : block.budgets[b];
    load_signal(shape, block.signals + size(b) * size(shape.dim), budget, s);
    if (!s.finite) {
      write_not_finite(shape, block, b);
    } else {
      write_curve(shape, block, b, s, 0);
      if (!shape.gram) {
        forget_known(shape, s);
        empty_pool(shape, s);
      }
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

}  // namespace

#define LEXICO_PURSUIT_LEVEL(name)                                                            \
  {                                                                                           \
    name, kSignalTile, kCorrelateIsFast, panel_bytes, gram_size, scratch_size, prepare_panel, \
        prepare_gram, encode_block                                                            \
  }

}  // namespace lexico::kernels::cpu
