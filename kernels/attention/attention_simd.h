#pragma once
// The hot loops of attention on codes, compiled once per instruction set level. Only internal
// linkage (see level.h). docs/attention.md has the algorithm and the figures.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/attention/level.h"
#include "kernels/pursuit/simd.h"

namespace lexico::kernels::cpu {
namespace {

// ---- fields of a block -------------------------------------------------------------------------

// How 16 neighbouring fields of each width become 32-bit lanes: of every four fields 16 bytes are
// loaded, and lane i takes the four bytes at control[i], shifted right.
struct FieldTables {
  std::uint8_t control[25][64];
  std::int32_t shift[25][16];
};
constexpr FieldTables make_field_tables() {
  FieldTables t{};
  for (int bits = 0; bits <= 24; ++bits) {
    for (int i = 0; i < 16; ++i) {
      const int first_byte = (i & ~3) * bits / 8;
      const int bit = i * bits - first_byte * 8;
      for (int b = 0; b < 4; ++b)
        t.control[bits][i * 4 + b] = static_cast<std::uint8_t>(bit / 8 + b);
      t.shift[bits][i] = bit % 8;
    }
  }
  return t;
}
alignas(64) constexpr FieldTables kFields = make_field_tables();

// Reads 16 neighbouring fields of one width, and up to 15 bytes behind them; or what a table of at
// least kLeastTable entries has for them.
#if defined(__AVX512F__)
class FieldReader {
 public:
  explicit FieldReader(int bits)
      : bits_(bits),
        control_(_mm512_load_si512(kFields.control[bits])),
        shift_(_mm512_load_si512(kFields.shift[bits])),
        mask_(_mm512_set1_epi32((1 << bits) - 1)) {}
  void fields(const std::uint8_t* from, std::int32_t* out) const {
    _mm512_storeu_si512(out, read(from));
  }
  void look_up(const std::uint8_t* from, const float* table, float* out) const {
    const __m512i at = read(from);
    const auto part = [&](int i) { return _mm512_loadu_ps(table + 16 * i); };
    __m512 v;
    if (bits_ == 5) {
      v = _mm512_permutex2var_ps(part(0), at, part(1));
    } else if (bits_ <= 4) {
      v = _mm512_permutexvar_ps(at, part(0));
    } else if (bits_ == 6) {
      const __mmask16 high = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
      v = _mm512_mask_blend_ps(high,
                               _mm512_permutex2var_ps(part(0), at, part(1)),
                               _mm512_permutex2var_ps(part(2), at, part(3)));
    } else {
      v = _mm512_i32gather_ps(at, table, 4);
    }
    _mm512_storeu_ps(out, v);
  }

 private:
  __m512i read(const std::uint8_t* from) const {
    const auto at = [&](int byte) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + byte));
    };
    __m512i v = _mm512_castsi128_si512(at(0));
    v = _mm512_inserti32x4(v, at(bits_ >> 1), 1);
    v = _mm512_inserti32x4(v, at(bits_), 2);
    v = _mm512_inserti32x4(v, at(3 * bits_ >> 1), 3);
    v = _mm512_shuffle_epi8(v, control_);
    return _mm512_and_si512(_mm512_srlv_epi32(v, shift_), mask_);
  }
  int bits_;
  __m512i control_, shift_, mask_;
};
#elif defined(__AVX2__)
class FieldReader {
 public:
  explicit FieldReader(int bits) : bits_(bits), mask_(_mm256_set1_epi32((1 << bits) - 1)) {}
  void fields(const std::uint8_t* from, std::int32_t* out) const {
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * half), read(from, half));
  }
  void look_up(const std::uint8_t* from, const float* table, float* out) const {
    for (int half = 0; half < 2; ++half) {
      const __m256i at = read(from, half);
      __m256 v;
      if (bits_ <= 3) {
        v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
      } else if (bits_ == 4) {
        v = _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at),
                             _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), at),
                             _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
      } else {
        v = _mm256_i32gather_ps(table, at, 4);
      }
      _mm256_storeu_ps(out + 8 * half, v);
    }
  }

 private:
  __m256i read(const std::uint8_t* from, int half) const {
    const auto at = [&](int quad) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (quad * bits_ >> 1)));
    };
    __m256i v = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2 * half)), at(2 * half + 1), 1);
    v = _mm256_shuffle_epi8(
        v, _mm256_load_si256(reinterpret_cast<const __m256i*>(kFields.control[bits_] + 32 * half)));
    v = _mm256_srlv_epi32(
        v, _mm256_load_si256(reinterpret_cast<const __m256i*>(kFields.shift[bits_] + 8 * half)));
    return _mm256_and_si256(v, mask_);
  }
  int bits_;
  __m256i mask_;
};
#else
class FieldReader {
 public:
  explicit FieldReader(int bits) : bits_(bits) {}
  void fields(const std::uint8_t* from, std::int32_t* out) const {
    for (int i = 0; i < kStep; ++i) out[i] = read(from, i);
  }
  void look_up(const std::uint8_t* from, const float* table, float* out) const {
    for (int i = 0; i < kStep; ++i) out[i] = table[read(from, i)];
  }

 private:
  std::int32_t read(const std::uint8_t* from, int i) const {
    std::uint32_t word;
    std::memcpy(&word, from + i * bits_ / 8, sizeof word);
    return static_cast<std::int32_t>(word >> (i * bits_ % 8) & ((1u << bits_) - 1));
  }
  int bits_;
};
#endif

inline void look_up(
    const std::uint8_t* plane, int bits, int first, const float* table, float* out) {
  FieldReader(bits).look_up(plane + first / 8 * bits, table, out);
}

inline void decode_e4m3(const std::uint8_t* bytes, float* out) {
#if defined(__AVX2__)
  // As half floats: the same fields, an exponent bias larger by 8.
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m256i half =
      _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8),
                      _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7));
#if defined(__AVX512F__)
  _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f)));
#else
  const __m256 scale = _mm256_set1_ps(256.0f);
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), scale));
  _mm256_storeu_ps(out + 8,
                   _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), scale));
#endif
#else
  for (int i = 0; i < kStep; ++i) {
    const int mantissa = bytes[i] & 7, exponent = bytes[i] >> 3 & 15;
    const float magnitude = exponent == 0
                                ? static_cast<float>(mantissa) * 0x1p-9f
                                : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    out[i] = (bytes[i] & 0x80) != 0 ? -magnitude : magnitude;
  }
#endif
}

// 16 tokens of a block, slot after slot.
struct Step {
  std::int32_t* atoms;  // [slots, kStep]
  float* weights;       // [slots, kStep]
  float* scale;         // [kStep]
  float* components;    // [kStep]: of one component at a time
  float* rest;          // what else a loop needs
  Step(void* scratch, int slots) {
    atoms = static_cast<std::int32_t*>(scratch);
    weights = reinterpret_cast<float*>(atoms + slots * kStep);
    scale = weights + slots * kStep;
    components = scale + kStep;
    rest = components + kStep;
  }
};

inline const std::uint8_t* plane_after(const std::uint8_t* plane, int bits) {
  return plane + bits * (kBlockTokens / 8);
}

inline int weight_bits(const CodePlanes& code) {
  switch (code.weights) {
    case CodedWeights::kFloat32:
      return 32;
    case CodedWeights::kE4m3:
      return 8;
    default:
      return code.weight_bits;
  }
}

// Returns the plane of the first component.
inline const std::uint8_t* unpack_step(const CodePlanes& code,
                                       const std::uint8_t* block,
                                       int first,
                                       const Step& step) {
  const std::uint8_t* plane = block;
  const FieldReader atoms(code.index_bits);
  const int from = first / 8;  // times the width of a field: bytes
  for (int k = 0; k < code.slots; ++k, plane = plane_after(plane, code.index_bits))
    atoms.fields(plane + from * code.index_bits, step.atoms + k * kStep);
  const int level_stride = std::max(1 << code.weight_bits, kLeastTable);
  const int bits = weight_bits(code);
  const FieldReader levels(code.weight_bits);
  for (int k = 0; k < code.slots; ++k, plane = plane_after(plane, bits)) {
    float* weights = step.weights + k * kStep;
    if (code.weights == CodedWeights::kLevels)
      levels.look_up(plane + from * bits, code.levels + k * level_stride, weights);
    else if (code.weights == CodedWeights::kE4m3)
      decode_e4m3(plane + first, weights);
    else
      std::memcpy(weights, plane + first * 4, kStep * sizeof(float));
  }
  if (code.scale_bits > 0)
    look_up(plane, code.scale_bits, first, code.scales, step.scale);
  else
    std::fill_n(step.scale, kStep, 1.0f);
  return plane_after(plane, code.scale_bits);
}

inline std::int32_t parity(std::int32_t x) {  // of 9 bits
  x ^= x >> 8;
  x ^= x >> 4;
  x ^= x >> 2;
  return (x ^ x >> 1) & 1;
}

// The levels of one component after another, of 16 tokens.
class ComponentReader {
 public:
  ComponentReader(const CodePlanes& code, const std::uint8_t* plane, int first)
      : code_(code), plane_(plane), first_(first) {}
  void next(float* out) {
    const int bits = code_.component_bits[component_];
    const float* levels = code_.component_levels[component_++];
    const std::uint8_t* plane = plane_;
    plane_ = plane_after(plane, bits);
    if (code_.trellis.high == 0) {
      look_up(plane, bits, first_, levels, out);
      return;
    }
    const std::int32_t high = static_cast<std::int32_t>(code_.trellis.high);
    const std::int32_t low = static_cast<std::int32_t>(code_.trellis.low);
    alignas(64) std::int32_t field[kStep];
    FieldReader(bits).fields(plane + first_ / 8 * bits, field);
    for (int i = 0; i < kStep; ++i) {
      history_[i] = (history_[i] << 1 | (field[i] & 1)) & 0x1ff;
      field[i] = 4 * (field[i] >> 1) + 2 * parity(history_[i] & high) + parity(history_[i] & low);
    }
    for (int i = 0; i < kStep; ++i) out[i] = levels[field[i]];
  }

 private:
  const CodePlanes& code_;
  const std::uint8_t* plane_;
  int first_, component_ = 0;
  alignas(64) std::int32_t history_[kStep] = {};
};

// ---- lanes of query heads ----------------------------------------------------------------------

template <int W>
struct LanesOf;
template <>
struct LanesOf<4> {
  typedef float type __attribute__((vector_size(16)));
};
template <>
struct LanesOf<8> {
  typedef float type __attribute__((vector_size(32)));
};
template <int W>
using Lanes = typename LanesOf<W>::type;

template <int W>
inline Lanes<W> load_lanes(const float* from) {
  Lanes<W> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename V>
inline void store_lanes(float* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// ---- scores from tables ------------------------------------------------------------------------

// kTogether tokens at a time keep as many chains of additions going.
template <int W, int kTogether>
inline void gather_scores(
    const Step& step, int slots, const float* table, int first, float* scores) {
  Lanes<W> sum[kTogether] = {};
  for (int k = 0; k < slots; ++k) {
    const std::int32_t* atoms = step.atoms + k * kStep + first;
    const float* weights = step.weights + k * kStep + first;
#pragma GCC unroll 8
    for (int t = 0; t < kTogether; ++t)
      sum[t] += weights[t] * load_lanes<W>(table + static_cast<std::ptrdiff_t>(atoms[t]) * W);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTogether; ++t)
    store_lanes(scores + (first + t) * W, sum[t] * step.scale[first + t]);
}

// scores += level * (axis . q) with tokens in the lanes of vectors.
template <int W>
inline void add_component_scores(const CodePlanes& code,
                                 const std::uint8_t* plane,
                                 int first,
                                 const Step& step,
                                 const float* queries,  // [components, W]
                                 float* scores) {
  constexpr int kVecs = kStep / kLanes;
  Vec sum[W][kVecs] = {};
  ComponentReader reader(code, plane, first);
  for (int c = 0; c < code.components; ++c) {
    reader.next(step.components);
    for (int v = 0; v < kVecs; ++v) {
      const Vec level = load(step.components + v * kLanes);
#pragma GCC unroll 8
      for (int lane = 0; lane < W; ++lane) sum[lane][v] += queries[c * W + lane] * level;
    }
  }
  for (int lane = 0; lane < W; ++lane) {
    alignas(64) float s[kStep];
    for (int v = 0; v < kVecs; ++v) store(s + v * kLanes, sum[lane][v]);
    for (int t = 0; t < kStep; ++t)
      scores[t * W + lane] += code.relative ? s[t] * step.scale[t] : s[t];
  }
}

template <int W>
void score_codes_w(const CodePlanes& code,
                   const std::uint8_t* block,
                   int tokens,
                   const float* table,
                   int residual_row,
                   void* scratch,
                   float* scores) {
  const Step step(scratch, code.slots);
  for (int first = 0; first < tokens; first += kStep) {
    const std::uint8_t* residual = unpack_step(code, block, first, step);
    // The last step may be cut short: then its scores go to the scratch first.
    float* to = tokens - first >= kStep ? scores + first * W : step.rest;
    for (int t = 0; t < kStep; t += 8) gather_scores<W, 8>(step, code.slots, table, t, to);
    if (code.components > 0)
      add_component_scores<W>(code, residual, first, step, table + residual_row * W, to);
    if (to == step.rest) std::copy_n(to, (tokens - first) * W, scores + first * W);
  }
}

void score_codes(const CodePlanes& code,
                 const std::uint8_t* block,
                 int tokens,
                 const float* table,
                 int residual_row,
                 int width,
                 void* scratch,
                 float* scores) {
  (width == 4 ? score_codes_w<4>
              : score_codes_w<8>)(code, block, tokens, table, residual_row, scratch, scores);
}

// ---- scores of rebuilt keys --------------------------------------------------------------------

void turn(const float* base_cos,
          const float* base_sin,
          const float* step_cos,
          const float* step_sin,
          const float* frequencies,
          int pairs,
          std::int64_t position,
          int tokens,
          float scaling,
          float* cos,
          float* sin) {
  for (int t = 0; t < tokens; ++t, ++position) {
    const float at = static_cast<float>(position);
#pragma GCC ivdep
    for (int i = 0; i < pairs; ++i) {
      const float c = base_cos[i] * step_cos[t * pairs + i] - base_sin[i] * step_sin[t * pairs + i];
      const float s = base_sin[i] * step_cos[t * pairs + i] + base_cos[i] * step_sin[t * pairs + i];
      // Models take the angle in float32, which far out is another one: by `off`, which is exact.
      const float angle = at * frequencies[i];
      const float off = -__builtin_fmaf(at, frequencies[i], -angle);
      const float near = scaling - 0.5f * scaling * off * off, far = scaling * off;
      cos[t * pairs + i] = c * near - s * far;
      sin[t * pairs + i] = s * near + c * far;
    }
  }
}

// scores[t][lane] = rows[t] . queries[lane], kTogether tokens at once.
template <int W, int kTogether>
inline void dot_rows(const float* rows, int dim, const float* queries, float* scores) {
  for (int half = 0; half < W; half += 4) {
    Vec sum[kTogether][4] = {};
    const float* q = queries + half * dim;
    int i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
#pragma GCC unroll 4
      for (int t = 0; t < kTogether; ++t) {
        const Vec row = load(rows + t * dim + i);
#pragma GCC unroll 4
        for (int lane = 0; lane < 4; ++lane) sum[t][lane] += row * load(q + lane * dim + i);
      }
    }
    for (int t = 0; t < kTogether; ++t) {
      float* to = scores + t * W + half;
      sum4(sum[t][0], sum[t][1], sum[t][2], sum[t][3], to);
      for (int lane = 0; lane < 4; ++lane) {
        for (int j = i; j < dim; ++j) to[lane] += rows[t * dim + j] * q[lane * dim + j];
      }
    }
  }
}

template <int W>
void score_rows_w(const float* rows, int tokens, int dim, const float* queries, float* scores) {
  constexpr int kTogether = kLanes == 16 ? 4 : 2;
  int t = 0;
  for (; t + kTogether <= tokens; t += kTogether)
    dot_rows<W, kTogether>(rows + t * dim, dim, queries, scores + t * W);
  for (; t < tokens; ++t) dot_rows<W, 1>(rows + t * dim, dim, queries, scores + t * W);
}

void score_rows(
    const float* rows, int tokens, int dim, const float* queries, int width, float* scores) {
  (width == 4 ? score_rows_w<4> : score_rows_w<8>)(rows, tokens, dim, queries, scores);
}

void widen(const std::uint16_t* from, std::int64_t count, bool half, float* to) {
  const auto as_float = [](std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  if (!half) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = as_float(std::uint32_t{from[i]} << 16);
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t h = from[i];
    float magnitude = as_float((h & 0x7fffu) << 13) * 0x1p112f;  // moves the exponent
    std::uint32_t bits;
    std::memcpy(&bits, &magnitude, sizeof bits);
    const std::uint32_t special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    to[i] = as_float(bits | special | (h & 0x8000u) << 16);
  }
}

// Where the atoms of rebuilt keys are.
struct AtomRows {
  const float* atoms;
  const std::uint16_t* half;  // or nullptr
  int num_atoms;
  const float* extra;
  int dim;
  const float* row(std::ptrdiff_t n) const {
    return n < num_atoms ? atoms + n * dim : extra + (n - num_atoms) * dim;
  }
};

#if defined(__AVX2__)
constexpr bool kHasHalf = true;
inline Vec load_half(const std::uint16_t* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}
#else
constexpr bool kHasHalf = false;
inline Vec load_half(const std::uint16_t*) { return Vec{}; }
#endif

// row = mean + sum of scale * weight * atom, kVecs vectors from `from` on.
template <int kVecs>
inline void rebuild_part(const Step& step,
                         int slots,
                         int t,
                         const AtomRows& rows,
                         const float* mean,
                         int from,
                         float* to) {
  Vec sum[kVecs] = {};
  for (int k = 0; k < slots; ++k) {
    const std::ptrdiff_t n = step.atoms[k * kStep + t];
    const Vec weight = splat(step.weights[k * kStep + t]);
    if (kHasHalf && rows.half != nullptr && n < rows.num_atoms) {
      const std::uint16_t* atom = rows.half + n * rows.dim + from;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[v] += weight * load_half(atom + v * kLanes);
    } else {
      const float* atom = rows.row(n) + from;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[v] += weight * load(atom + v * kLanes);
    }
  }
  const Vec scale = splat(step.scale[t]);
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    sum[v] *= scale;
    if (mean != nullptr) sum[v] += load(mean + from + v * kLanes);
    store(to + from + v * kLanes, sum[v]);
  }
}

inline void rebuild(
    const Step& step, int slots, int t, const AtomRows& rows, const float* mean, float* to) {
  int from = 0;
  for (; from + 8 * kLanes <= rows.dim; from += 8 * kLanes)
    rebuild_part<8>(step, slots, t, rows, mean, from, to);
  for (; from + 2 * kLanes <= rows.dim; from += 2 * kLanes)
    rebuild_part<2>(step, slots, t, rows, mean, from, to);
  for (; from + kLanes <= rows.dim; from += kLanes)
    rebuild_part<1>(step, slots, t, rows, mean, from, to);
  for (; from < rows.dim; ++from) {
    float sum = 0;
    for (int k = 0; k < slots; ++k)
      sum += step.weights[k * kStep + t] * rows.row(step.atoms[k * kStep + t])[from];
    to[from] = sum * step.scale[t] + (mean != nullptr ? mean[from] : 0.0f);
  }
}

inline void rotate_row(float* row, int pairs, const float* cos, const float* sin) {
  float* other = row + pairs;
  int i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    const Vec a = load(row + i), b = load(other + i), c = load(cos + i), s = load(sin + i);
    store(row + i, a * c - b * s);
    store(other + i, b * c + a * s);
  }
  for (; i < pairs; ++i) {
    const float a = row[i], b = other[i];
    row[i] = a * cos[i] - b * sin[i];
    other[i] = b * cos[i] + a * sin[i];
  }
}

inline void rotate_neighbours(float* row, int pairs, const float* cos, const float* sin) {
  for (int i = 0; i < pairs; ++i) {
    const float a = row[2 * i], b = row[2 * i + 1];
    row[2 * i] = a * cos[i] - b * sin[i];
    row[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

void score_rebuilt(const CodePlanes& code,
                   const std::uint8_t* block,
                   int tokens,
                   const float* atoms,
                   const std::uint16_t* half_atoms,
                   int num_atoms,
                   const float* extra,
                   const float* const* axes,
                   const float* mean,
                   int dim,
                   const RotationTable& rotation,
                   const float* queries,
                   int width,
                   void* scratch,
                   float* scores) {
  const Step step(scratch, code.slots);
  float* rows = step.rest;  // [kStep, dim]
  const AtomRows from{atoms, half_atoms, num_atoms, extra, dim};
  for (int first = 0; first < tokens; first += kStep) {
    const int count = std::min(kStep, tokens - first);
    const std::uint8_t* plane = unpack_step(code, block, first, step);
    for (int t = 0; t < count; ++t) rebuild(step, code.slots, t, from, mean, rows + t * dim);
    ComponentReader reader(code, plane, first);
    for (int c = 0; c < code.components; ++c) {
      reader.next(step.components);
      for (int t = 0; t < count; ++t) {
        const float level = step.components[t] * (code.relative ? step.scale[t] : 1.0f);
        for (int i = 0; i < dim; ++i) rows[t * dim + i] += level * axes[c][i];
      }
    }
    for (int t = 0; t < count && rotation.pairs > 0; ++t) {
      const std::ptrdiff_t at = std::ptrdiff_t{first + t} * rotation.pairs;
      (rotation.interleaved ? rotate_neighbours : rotate_row)(
          rows + t * dim, rotation.pairs, rotation.cos + at, rotation.sin + at);
    }
    score_rows(rows, count, dim, queries, width, scores + first * width);
  }
}

// ---- values ------------------------------------------------------------------------------------

template <int W>
inline void add_component_values(const CodePlanes& code,
                                 const std::uint8_t* plane,
                                 int first,
                                 const Step& step,
                                 const Vec (&p)[W][kStep / kLanes],  // [lane]: of 16 tokens
                                 float* sums) {
  ComponentReader reader(code, plane, first);
  for (int c = 0; c < code.components; ++c) {
    reader.next(step.components);
    for (int lane = 0; lane < W; lane += 4) {
      Vec sum[4] = {};
      for (int v = 0; v < kStep / kLanes; ++v) {
        const Vec level = load(step.components + v * kLanes);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] += p[lane + j][v] * level;
      }
      float four[4];
      sum4(sum[0], sum[1], sum[2], sum[3], four);
      for (int j = 0; j < 4; ++j) sums[c * W + lane + j] += four[j];
    }
  }
}

template <int W>
void add_values_w(const CodePlanes& code,
                  const std::uint8_t* block,
                  int tokens,
                  const float* p,
                  int residual_row,
                  void* scratch,
                  float* sums) {
  const Step step(scratch, code.slots);
  for (int first = 0; first < tokens; first += kStep) {
    const int count = std::min(kStep, tokens - first);
    const std::uint8_t* residual = unpack_step(code, block, first, step);
    for (int t = 0; t < count; ++t) {
      const Lanes<W> weight = load_lanes<W>(p + (first + t) * W) * step.scale[t];
      for (int k = 0; k < code.slots; ++k) {
        float* sum = sums + static_cast<std::ptrdiff_t>(step.atoms[k * kStep + t]) * W;
        store_lanes(sum, load_lanes<W>(sum) + step.weights[k * kStep + t] * weight);
      }
    }
    if (code.components > 0) {
      Vec lanes[W][kStep / kLanes];
      for (int lane = 0; lane < W; ++lane) {
        alignas(64) float of_tokens[kStep] = {};
        for (int t = 0; t < count; ++t)
          of_tokens[t] = p[(first + t) * W + lane] * (code.relative ? step.scale[t] : 1.0f);
        for (int v = 0; v < kStep / kLanes; ++v) lanes[lane][v] = load(of_tokens + v * kLanes);
      }
      add_component_values<W>(code, residual, first, step, lanes, sums + residual_row * W);
    }
  }
}

void add_values(const CodePlanes& code,
                const std::uint8_t* block,
                int tokens,
                const float* p,
                int residual_row,
                int width,
                void* scratch,
                float* sums) {
  (width == 4 ? add_values_w<4>
              : add_values_w<8>)(code, block, tokens, p, residual_row, scratch, sums);
}

// ---- dense algebra -----------------------------------------------------------------------------

template <int kAtoms>
inline void dot_atoms_tile(const float* atoms,
                           int dim,
                           const float* queries,  // of kLanes query heads
                           int padded,
                           float* dots) {  // [kAtoms, kLanes]
  Vec sum[kAtoms] = {};
  for (int d = 0; d < dim; ++d) {
    const Vec q = load(queries + static_cast<std::ptrdiff_t>(d) * padded);
#pragma GCC unroll 12
    for (int a = 0; a < kAtoms; ++a) sum[a] += atoms[a * dim + d] * q;
  }
  for (int a = 0; a < kAtoms; ++a) store(dots + a * kLanes, sum[a]);
}

void dot_atoms(const float* atoms,
               int first,
               int last,
               int dim,
               const float* queries,
               int groups,
               int width,
               float* tables,
               std::int64_t table_stride) {
  constexpr int kAtoms = 12;
  const int heads = groups * width;
  const int padded = (heads + 15) / 16 * 16;
  alignas(64) float dots[kAtoms * kLanes];
  for (int n = first; n < last; n += kAtoms) {
    const int count = std::min(kAtoms, last - n);
    for (int head = 0; head < heads; head += kLanes) {
      const float* from = atoms + static_cast<std::ptrdiff_t>(n) * dim;
      if (count == kAtoms) {
        dot_atoms_tile<kAtoms>(from, dim, queries + head, padded, dots);
      } else {
        for (int a = 0; a < count; ++a)
          dot_atoms_tile<1>(from + a * dim, dim, queries + head, padded, dots + a * kLanes);
      }
      // Lanes that belong to one group make a row of its table.
      const int piece = std::min(width, kLanes);
      for (int lane = 0; lane < kLanes && head + lane < heads; lane += piece) {
        float* table = tables + (head + lane) / width * table_stride + (head + lane) % width;
        for (int a = 0; a < count; ++a)
          std::memcpy(table + static_cast<std::ptrdiff_t>(n + a) * width,
                      dots + a * kLanes + lane,
                      static_cast<std::size_t>(piece) * sizeof(float));
      }
    }
  }
}

template <int kVecs>
inline void sum_atoms_tile(
    const float* atoms, int count, int dim, const float* sums, int width, float* out) {
  Vec sum[4][kVecs];
  for (int lane = 0; lane < 4; ++lane) {
    for (int v = 0; v < kVecs; ++v) sum[lane][v] = load(out + lane * dim + v * kLanes);
  }
  for (int n = 0; n < count; ++n) {
    const float* atom = atoms + static_cast<std::ptrdiff_t>(n) * dim;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Vec x = load(atom + v * kLanes);
#pragma GCC unroll 4
      for (int lane = 0; lane < 4; ++lane) sum[lane][v] += sums[n * width + lane] * x;
    }
  }
  for (int lane = 0; lane < 4; ++lane) {
    for (int v = 0; v < kVecs; ++v) store(out + lane * dim + v * kLanes, sum[lane][v]);
  }
}

void sum_atoms(const float* atoms, int count, int dim, const float* sums, int width, float* out) {
  for (int half = 0; half < width; half += 4, sums += 4, out += 4 * dim) {
    int from = 0;
    constexpr int kVecs = kLanes == 16 ? 4 : 2;
    for (; from + kVecs * kLanes <= dim; from += kVecs * kLanes)
      sum_atoms_tile<kVecs>(atoms + from, count, dim, sums, width, out + from);
    for (; from + kLanes <= dim; from += kLanes)
      sum_atoms_tile<1>(atoms + from, count, dim, sums, width, out + from);
    for (; from < dim; ++from) {
      for (int n = 0; n < count; ++n) {
        for (int lane = 0; lane < 4; ++lane)
          out[lane * dim + from] += sums[n * width + lane] * atoms[std::ptrdiff_t{n} * dim + from];
      }
    }
  }
}

// ---- softmax -----------------------------------------------------------------------------------

template <int W>
void scale_scores_w(
    float* scores, std::int64_t tokens, float scale, const float* shift, float* most) {
  Lanes<W> largest = load_lanes<W>(most);
  const Lanes<W> add = load_lanes<W>(shift);
  const Lanes<W> least = Lanes<W>{} - 3e38f;  // an Inf in a key: -inf would make the largest one
  for (std::int64_t t = 0; t < tokens; ++t) {
    Lanes<W> s = load_lanes<W>(scores + t * W) * scale + add;
    s = s < least ? least : s;
    store_lanes(scores + t * W, s);
    largest = s > largest ? s : largest;
  }
  store_lanes(most, largest);
}

void scale_scores(
    float* scores, std::int64_t tokens, float scale, const float* shift, int width, float* most) {
  (width == 4 ? scale_scores_w<4> : scale_scores_w<8>)(scores, tokens, scale, shift, most);
}

// e^x for x <= 0, to 2 units in the last place; NaN stays NaN, below -87 counts as -87.
inline Vec exp_of(Vec x) {
  const Vec least = splat(-87.0f);
  x = x < least ? least : x;
  // 1.5 * 2^23 rounds to the nearest integer, which is then in the low bits.
  const Vec shifted = x * 1.44269504f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec y = splat(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const VecInt power = ((VecInt)shifted << 23) + 0x3f800000;
  return y * (Vec)power;
}

template <int W>
void exponentiate_w(float* scores, std::int64_t tokens, const float* most, float* total) {
  constexpr int kRow = kLanes > W ? kLanes : W;  // floats at a time
  alignas(64) float largest[kRow], sum[kRow] = {};
  for (int i = 0; i < kRow; ++i) largest[i] = most[i % W];
  const std::int64_t count = tokens * W;
  std::int64_t i = 0;
  for (; i + kRow <= count; i += kRow) {
    for (int v = 0; v < kRow; v += kLanes) {
      const Vec e = exp_of(load(scores + i + v) - load(largest + v));
      store(scores + i + v, e);
      store(sum + v, load(sum + v) + e);
    }
  }
  if (i < count) {
    alignas(64) float tail[kRow] = {};
    std::memcpy(tail, scores + i, static_cast<std::size_t>(count - i) * sizeof(float));
    for (int v = 0; v < kRow; v += kLanes)
      store(tail + v, exp_of(load(tail + v) - load(largest + v)));
    for (int j = 0; j < count - i; ++j) sum[j] += tail[j];
    std::memcpy(scores + i, tail, static_cast<std::size_t>(count - i) * sizeof(float));
  }
  for (int j = 0; j < kRow; ++j) total[j % W] += sum[j];
}

void exponentiate(float* scores, std::int64_t tokens, const float* most, int width, float* total) {
  (width == 4 ? exponentiate_w<4> : exponentiate_w<8>)(scores, tokens, most, total);
}

template <int W>
void add_rows_w(float* to, const float* from, std::int64_t count, const float* factor, bool add) {
  const Lanes<W> f = load_lanes<W>(factor);
  for (std::int64_t n = 0; n < count; ++n) {
    Lanes<W> x = f * load_lanes<W>(from + n * W);
    if (add) x += load_lanes<W>(to + n * W);
    store_lanes(to + n * W, x);
  }
}

void add_rows(
    float* to, const float* from, std::int64_t count, const float* factor, int width, bool add) {
  (width == 4 ? add_rows_w<4> : add_rows_w<8>)(to, from, count, factor, add);
}

void scale_rows(float* rows, std::int64_t count, const float* factor, int width) {
  add_rows(rows, rows, count, factor, width, false);
}

}  // namespace
}  // namespace lexico::kernels::cpu

#define LEXICO_ATTENTION_LEVEL(name)                                                             \
  {                                                                                              \
    name, dot_atoms, sum_atoms, score_codes, turn, score_rebuilt, add_values, widen, score_rows, \
        scale_scores, exponentiate, scale_rows, add_rows                                         \
  }
