#pragma once
// What the driver (attention_cpu.cpp) and the instruction set levels (level_*.cpp) agree on. Plain
// structs only: see kernels/pursuit/level.h.
#include <cstddef>
#include <cstdint>

#include "kernels/attention/attention.h"

namespace lexico::kernels::cpu {

constexpr int kStep = 16;        // tokens whose fields are unpacked at a time
constexpr int kLeastTable = 16;  // floats: tables of levels are padded to as many

// Query heads of one KV head go together in groups of `width` 4 or 8 lanes: rows of tables, of
// scores and of sums have as many floats.
struct CodePlanes {
  int slots, index_bits;
  CodedWeights weights;
  int weight_bits;
  const float* levels;  // [slots, level_stride], level_stride = max(2^weight_bits, kLeastTable)
  int scale_bits;
  const float* scales;  // padded likewise
  int components;       // those that have bits
  const std::int32_t* component_bits;
  const float* const* component_levels;  // [components], each padded
  TrellisTaps trellis;
  bool relative;
};

struct RotationTable {
  int pairs;  // 0: none
  bool interleaved;
  const float *cos, *sin;  // [tokens, pairs], times the scaling
};

struct AttentionLevel {
  const char* name;
  // tables[g][n][0..width) = atoms[n] . queries, for rows [first, last) of the atoms.
  // queries [dim, groups * width padded to a multiple of 16]
  void (*dot_atoms)(const float* atoms,
                    int first,
                    int last,
                    int dim,
                    const float* queries,
                    int groups,
                    int width,
                    float* tables,
                    std::int64_t table_stride);
  // out [width, dim] += sum of sums[n][lane] * atoms[n].
  void (*sum_atoms)(
      const float* atoms, int count, int dim, const float* sums, int width, float* out);
  // scores [tokens, width] = what the table gives a block's first tokens; table rows from
  // `residual_row` on are the components'.
  void (*score_codes)(const CodePlanes& code,
                      const std::uint8_t* block,
                      int tokens,
                      const float* table,
                      int residual_row,
                      int width,
                      void* scratch,
                      float* scores);
  // cos and sin [tokens, pairs] of float32 angles at `position` and after, times scaling. base: of
  // position * frequency, step [tokens, pairs]: of t * frequency, both without rounding of the
  // angle.
  void (*turn)(const float* base_cos,
               const float* base_sin,
               const float* step_cos,
               const float* step_sin,
               const float* frequencies,
               int pairs,
               std::int64_t position,
               int tokens,
               float scaling,
               float* cos,
               float* sin);
  // The same for keys before RoPE, rebuilt from atoms (of which those from num_atoms on are
  // `extra`). queries [width, dim].
  void (*score_rebuilt)(const CodePlanes& code,
                        const std::uint8_t* block,
                        int tokens,
                        const float* atoms,
                        const std::uint16_t* half_atoms,  // or nullptr
                        int num_atoms,
                        const float* extra,
                        const float* const* axes,  // [components]
                        const float* mean,         // or nullptr
                        int dim,
                        const RotationTable& rotation,
                        const float* queries,
                        int width,
                        void* scratch,
                        float* scores);
  // sums[atom] += weight * scale * p[token].
  void (*add_values)(const CodePlanes& code,
                     const std::uint8_t* block,
                     int tokens,
                     const float* p,
                     int residual_row,
                     int width,
                     void* scratch,
                     float* sums);
  // Half floats, or bfloat16, to floats.
  void (*widen)(const std::uint16_t* from, std::int64_t count, bool half, float* to);
  // Exact tokens: scores [tokens, width] of rows [tokens, dim] and queries [width, dim]; tokens <=
  // kStep.
  void (*score_rows)(
      const float* rows, int tokens, int dim, const float* queries, int width, float* scores);
  // scores[t][lane] * scale + shift[lane], and the largest into most[lane] (NaN is left out).
  void (*scale_scores)(
      float* scores, std::int64_t tokens, float scale, const float* shift, int width, float* most);
  // scores = e^(scores - most), their sum is added to total[lane].
  void (*exponentiate)(
      float* scores, std::int64_t tokens, const float* most, int width, float* total);
  // rows[n][lane] *= factor[lane].
  void (*scale_rows)(float* rows, std::int64_t count, const float* factor, int width);
  // to[n][lane] = (add ? to : 0) + factor[lane] * from[n][lane].
  void (*add_rows)(
      float* to, const float* from, std::int64_t count, const float* factor, int width, bool add);
};

extern const AttentionLevel kGenericAttention;                 // any CPU
extern const AttentionLevel kAvx2Attention, kAvx512Attention;  // x86-64 only

}  // namespace lexico::kernels::cpu
