// Attention on codes on the CPU: lays out the workspace, splits sequences into ranges, spreads
// them over threads and puts the parts together. The hot loops are in attention_simd.h.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "kernels/attention/level.h"
#include "kernels/pursuit/pursuit.h"

namespace lexico::kernels {

namespace cpu {
namespace {

constexpr std::int64_t kTile = 1024;  // tokens whose scores wait for their values
// Tokens of a range: at least these and 2 N, since its N sums are zeroed and joined, which should
// cost little beside making them. N where a range has all KV heads, to have enough of them.
constexpr std::int64_t kLeastRange = 2048;
constexpr std::int64_t kMostRanges = 16;
constexpr int kAtomRange = 256;  // atoms that one thread multiplies at a time
constexpr float kLowest = -std::numeric_limits<float>::infinity();
// Scores of tokens left out: finite, for the largest score may be theirs. It is below kNoToken
// then, whatever the scale.
constexpr float kLeftOut = -1e36f, kNoToken = -1e24f;

const AttentionLevel& level_in_use() {
  // One setting for all kernels: pursuit's level, or the best one here that needs no more.
#if defined(__x86_64__)
  const std::string_view name = pursuit_level();
  if (name.starts_with("avx512") || name == "amx") return kAvx512Attention;
  if (name == "avx2") return kAvx2Attention;
#endif
  return kGenericAttention;
}

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

// Hands out pieces of the workspace; without one it only counts.
class Pieces {
 public:
  explicit Pieces(void* memory) {
    if (memory != nullptr)
      base_ = reinterpret_cast<char*>((reinterpret_cast<std::size_t>(memory) + 63) / 64 * 64);
  }
  template <typename T>
  T* take(std::int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (size(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  std::size_t bytes() const { return used_ + 64; }

 private:
  char* base_ = nullptr;
  std::size_t used_ = 0;
};

// Layouts as the levels want them: tables padded, components without bits left out.
struct Planes {
  CodePlanes code;
  std::size_t block_bytes;
  const float** axes;  // [components]
};

void prepare(const CodedSpace& space, int head, int dim, Pieces& pieces, Planes& out) {
  const CodeLayout& layout = space.layout[head * space.layout_stride];
  const auto padded = [&](const float* from, int rows, int count) {
    const int stride = std::max(count, kLeastTable);
    float* to = pieces.take<float>(std::int64_t{rows} * stride);
    for (int row = 0; row < rows && to != nullptr; ++row) {
      std::copy_n(from + row * count, count, to + row * stride);
      std::fill_n(to + row * stride + count, stride - count, 0.0f);
    }
    return to;
  };
  CodePlanes& code = out.code;
  code = {};
  code.slots = layout.slots;
  code.index_bits = layout.index_bits;
  code.weights = layout.weights;
  if (layout.weights == CodedWeights::kLevels) {
    code.weight_bits = layout.weight_bits;
    code.levels = padded(layout.levels, layout.slots, 1 << layout.weight_bits);
  }
  code.scale_bits = layout.scale_bits;
  if (layout.scale_bits > 0) code.scales = padded(layout.scales, 1, 1 << layout.scale_bits);
  code.relative = layout.relative;
  code.trellis = layout.trellis;
  std::int32_t* bits = pieces.take<std::int32_t>(layout.components);
  const float** levels = pieces.take<const float*>(layout.components);
  out.axes = pieces.take<const float*>(layout.components);
  const float* from = layout.component_levels;
  for (int c = 0; c < layout.components; ++c) {
    if (layout.component_bits[c] == 0) continue;
    const int count = 1 << (layout.component_bits[c] + (layout.trellis.high != 0 ? 1 : 0));
    float* table = padded(from, 1, count);
    from += count;
    const int i = code.components++;
    if (bits == nullptr) continue;
    bits[i] = layout.component_bits[c];
    levels[i] = table;
    out.axes[i] = space.axes + head * space.axes_stride + std::ptrdiff_t{c} * dim;
  }
  code.component_bits = bits;
  code.component_levels = levels;
  out.block_bytes = block_bytes(layout);
}

// What a range of coded tokens, or the exact ones, leave: softmax weights relative to their largest
// score.
struct Part {
  float *most, *total;  // [width]
  float* sums;          // coded: [rows, width]; exact: [width, dim]
};

// The whole of one call, for sequences [first, first + count) at a time.
class Attention {
 public:
  Attention(const AttentionProblem& problem, void* workspace)
      : p_(problem),
        level_(level_in_use()),
        threads_(problem.threads > 0 ? problem.threads : omp_get_num_procs()),
        width_(problem.group <= 4 ? 4 : 8),
        chunks_((problem.group + width_ - 1) / width_),
        pairs_(problem.rotation != nullptr ? problem.rotation->rotary_dim / 2 : 0),
        least_range_(std::max(
            kLeastRange,
            (problem.rotation != nullptr ? 1 : 2) * std::int64_t{problem.values.num_atoms})),
        pieces_(workspace) {
    for (int b = 0; b < p_.batch; ++b) {
      const AttentionSequence& s = p_.sequences[b];
      key_extra_ = std::max(key_extra_, s.keys.num_extra);
      value_extra_ = std::max(value_extra_, s.values.num_extra);
      most_ranges_ = std::max(most_ranges_, ranges_of(s.coded_tokens));
    }
    planes_ = pieces_.take<Planes>(2 * p_.kv_heads);
    int key_components = 0, value_components = 0, slots = 0;
    for (int h = 0; h < p_.kv_heads; ++h) {
      Planes keys, values;
      prepare(p_.keys, h, p_.dim, pieces_, keys);
      prepare(p_.values, h, p_.dim, pieces_, values);
      key_components = std::max(key_components, keys.code.components);
      value_components = std::max(value_components, values.code.components);
      slots = std::max({slots, keys.code.slots, values.code.slots});
      if (planes_ != nullptr) planes_[2 * h] = keys, planes_[2 * h + 1] = values;
    }
    key_rows_ = p_.keys.num_atoms + key_extra_ + key_components;
    value_rows_ = p_.values.num_atoms + value_extra_ + value_components;
    value_ranges_ = (p_.values.num_atoms + kAtomRange - 1) / kAtomRange;
    heads_together_ = p_.rotation != nullptr ? p_.kv_heads : 1;
    scratch_floats_ = (slots * 2 + 2 + std::max(p_.dim, 8)) * kStep;
    score_floats_ = heads_together_ * chunks_ * kTile * width_;

    const std::int64_t per_sequence = bytes_of_wave(1);
    wave_ = static_cast<int>(std::clamp<std::int64_t>(
        kWaveBytes / std::max<std::int64_t>(per_sequence, 1), 1, std::max(p_.batch, 1)));
    lay_out(pieces_, wave_);
    // Rounded up, so that threads share no cache line.
    thread_floats_ = scratch_floats_ + score_floats_ + 2 * (kBlockTokens + 1) * pairs_ +
                     kAtomRange * width_ + kStep * p_.dim;
    thread_floats_ = (thread_floats_ + 31) / 16 * 16;
    thread_scratch_ = pieces_.take<float>(threads_ * thread_floats_);
    thread_turns_ = pieces_.take<double>(threads_ * 2 * std::int64_t{pairs_});
    block_turn_ = pieces_.take<double>(2 * std::int64_t{pairs_});
    steps_ = pieces_.take<float>(2 * kBlockTokens * std::int64_t{pairs_});
  }

  std::size_t workspace_bytes() const { return pieces_.bytes(); }

  void run() {
    make_steps();
    for (first_ = 0; first_ < p_.batch; first_ += wave_) {
      count_ = std::min(wave_, p_.batch - first_);
      map_queries();
      make_tables();
      attend();
      combine();
    }
  }

 private:
  static constexpr std::int64_t kWaveBytes = std::int64_t{96} << 20;

  std::int64_t ranges_of(std::int64_t tokens) const {
    return std::min(kMostRanges, (tokens + least_range_ - 1) / least_range_);
  }
  std::int64_t range_tokens(std::int64_t tokens) const {
    const std::int64_t ranges = ranges_of(tokens);
    if (ranges == 0) return 0;
    const std::int64_t blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
    return (blocks + ranges - 1) / ranges * kBlockTokens;
  }

  // Groups of query heads, in this order: the groups that read one dictionary are neighbours.
  std::int64_t group_index(int h, int b, int chunk) const {
    return (std::int64_t{h} * count_ + b) * chunks_ + chunk;
  }
  std::int64_t groups() const { return std::int64_t{p_.kv_heads} * count_ * chunks_; }
  int padded_heads(std::int64_t groups) const {
    return static_cast<int>((groups * width_ + 15) / 16 * 16);
  }
  const AttentionSequence& sequence(int b) const { return p_.sequences[first_ + b]; }
  const Planes& key_planes(int h) const { return planes_[2 * h]; }
  const Planes& value_planes(int h) const { return planes_[2 * h + 1]; }
  int lanes(int chunk) const { return std::min(width_, p_.group - chunk * width_); }
  const float* query(int h, int b, int chunk, int lane) const {
    return p_.queries + ((std::int64_t{first_} + b) * p_.kv_heads * p_.group + h * p_.group +
                         chunk * width_ + lane) *
                            p_.dim;
  }
  std::int64_t part_floats() const { return 2 * width_ + value_rows_ * std::int64_t{width_}; }
  Part part(std::int64_t group, std::int64_t range) const {
    float* at = parts_ + (group * most_ranges_ + range) * part_floats();
    return {at, at + width_, at + 2 * width_};
  }
  Part exact_part(std::int64_t group) const {
    float* at = exact_parts_ + group * (2 * width_ + std::int64_t{width_} * p_.dim);
    return {at, at + width_, at + 2 * width_};
  }

  void lay_out(Pieces& pieces, int sequences) {
    const std::int64_t groups = std::int64_t{p_.kv_heads} * sequences * chunks_;
    const std::int64_t heads = groups * width_;
    queries_ = pieces.take<float>(heads * p_.dim);
    mapped_ = pieces.take<float>(heads * p_.dim);
    // Per dictionary, padded: transposed.
    transposed_ = pieces.take<float>((heads + 16 * std::int64_t{p_.kv_heads}) * p_.dim);
    shifts_ = pieces.take<float>(heads);
    tables_ = pieces.take<float>(p_.rotation != nullptr ? 0 : groups * key_rows_ * width_);
    parts_ = pieces.take<float>(groups * most_ranges_ * part_floats());
    exact_parts_ = pieces.take<float>(groups * (2 * width_ + std::int64_t{width_} * p_.dim));
    factors_ = pieces.take<float>(groups * (most_ranges_ + 1) * width_);
    products_ = pieces.take<float>(groups * (value_ranges_ + 1) * width_ * p_.dim);
  }
  std::int64_t bytes_of_wave(int sequences) {
    Pieces counter(nullptr);
    lay_out(counter, sequences);
    return static_cast<std::int64_t>(counter.bytes());
  }

  // Rows of queries [width, dim] per group, as they came and mapped by B^T; what the mean adds to
  // every score.
  void map_queries() {
    const int dim = p_.dim;
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads_)
    for (int h = 0; h < p_.kv_heads; ++h) {
      for (int b = 0; b < count_; ++b) {
        for (int chunk = 0; chunk < chunks_; ++chunk) {
          const std::int64_t at = group_index(h, b, chunk);
          float* plain = queries_ + at * width_ * dim;
          float* mapped = mapped_ + at * width_ * dim;
          float* shift = shifts_ + at * width_;
          std::fill_n(plain, width_ * dim, 0.0f);
          std::fill_n(shift, width_, 0.0f);
          for (int lane = 0; lane < lanes(chunk); ++lane)
            std::copy_n(query(h, b, chunk, lane), dim, plain + lane * dim);
          std::copy_n(plain, width_ * dim, mapped);
          if (p_.rotation != nullptr) continue;
          const float* map = p_.keys.back_map == nullptr
                                 ? nullptr
                                 : p_.keys.back_map + std::ptrdiff_t{h} * dim * dim;
          const float* mean =
              p_.keys.mean == nullptr ? nullptr : p_.keys.mean + std::ptrdiff_t{h} * dim;
          for (int lane = 0; lane < lanes(chunk); ++lane) {
            const float* q = plain + lane * dim;
            float* to = mapped + lane * dim;
            if (map != nullptr) std::fill_n(to, dim, 0.0f);
            for (int i = 0; i < dim && map != nullptr; ++i) {
              for (int j = 0; j < dim; ++j) to[j] += q[i] * map[i * dim + j];
            }
            double sum = 0;
            for (int i = 0; i < dim && mean != nullptr; ++i) sum += double{q[i]} * double{mean[i]};
            shift[lane] = static_cast<float>(sum * double{p_.softmax_scale});
          }
        }
      }
    }
  }

  // tables_[group][n] = atoms[n] . q, then the sequence's own atoms, then the residual's axes.
  void make_tables() {
    if (p_.rotation != nullptr) return;
    const int dim = p_.dim;
    const bool shared = p_.keys.atoms_stride == 0;
    const int dictionaries = shared ? 1 : p_.kv_heads;
    const std::int64_t share = groups() / dictionaries;  // groups that read one dictionary
    const int padded = padded_heads(share);
    for (int d = 0; d < dictionaries; ++d) {
      float* to = transposed_ + std::int64_t{d} * padded * dim;
      for (std::int64_t i = 0; i < padded; ++i) {
        const float* from = mapped_ + (d * share * width_ + i) * dim;
        for (int k = 0; k < dim; ++k) to[k * padded + i] = i < share * width_ ? from[k] : 0.0f;
      }
    }
    const std::int64_t stride = key_rows_ * std::int64_t{width_};
    const int ranges = (p_.keys.num_atoms + kAtomRange - 1) / kAtomRange;
#pragma omp parallel num_threads(threads_)
    {
#pragma omp for collapse(2) schedule(dynamic) nowait
      for (int d = 0; d < dictionaries; ++d) {
        for (int range = 0; range < ranges; ++range) {
          level_.dot_atoms(p_.keys.atoms + d * p_.keys.atoms_stride,
                           range * kAtomRange,
                           std::min((range + 1) * kAtomRange, p_.keys.num_atoms),
                           dim,
                           transposed_ + std::int64_t{d} * padded * dim,
                           static_cast<int>(share),
                           width_,
                           tables_ + d * share * stride,
                           stride);
        }
      }
#pragma omp for collapse(2) schedule(static)
      for (int h = 0; h < p_.kv_heads; ++h) {
        for (int b = 0; b < count_; ++b) {
          const CodedRun& keys = sequence(b).keys;
          const Planes& planes = key_planes(h);
          for (int chunk = 0; chunk < chunks_; ++chunk) {
            const std::int64_t at = group_index(h, b, chunk);
            const float* q = mapped_ + at * width_ * dim;
            float* row = tables_ + at * stride + std::int64_t{p_.keys.num_atoms} * width_;
            for (int n = 0; n < keys.num_extra; ++n, row += width_)
              level_.score_rows(
                  extra_atoms(keys, h) + std::ptrdiff_t{n} * dim, 1, dim, q, width_, row);
            row = tables_ + at * stride + residual_row(p_.keys, key_extra_) * width_;
            for (int c = 0; c < planes.code.components; ++c, row += width_)
              level_.score_rows(planes.axes[c], 1, dim, q, width_, row);
          }
        }
      }
    }
  }
  static const float* extra_atoms(const CodedRun& run, int h) {
    return run.num_extra == 0 ? nullptr : run.extra_atoms + h * run.extra_stride;
  }
  static std::int64_t residual_row(const CodedSpace& space, int extra) {
    return std::int64_t{space.num_atoms} + extra;
  }

  // All ranges of coded tokens, and the exact tokens of each head.
  void attend() {
    const int head_sets = p_.kv_heads / heads_together_;
    const std::int64_t of_sequence = head_sets * (most_ranges_ + 1);
#pragma omp parallel for schedule(dynamic) num_threads(threads_)
    for (std::int64_t task = 0; task < count_ * of_sequence; ++task) {
      const int b = static_cast<int>(task / of_sequence);
      const int first_head =
          static_cast<int>(task % of_sequence / (most_ranges_ + 1)) * heads_together_;
      const std::int64_t range = task % (most_ranges_ + 1);
      float* scratch = thread_scratch_ + omp_get_thread_num() * thread_floats_;
      if (range < ranges_of(sequence(b).coded_tokens)) {
        attend_range(b, first_head, range, scratch);
      } else if (range == most_ranges_) {
        for (int h = first_head; h < first_head + heads_together_; ++h) {
          for (int chunk = 0; chunk < chunks_; ++chunk) attend_exact(h, b, chunk, scratch);
        }
      }
    }
  }

  void attend_range(int b, int first_head, std::int64_t range, float* scratch) {
    const AttentionSequence& s = sequence(b);
    const std::int64_t first = range * range_tokens(s.coded_tokens);
    const std::int64_t last = std::min(s.coded_tokens, first + range_tokens(s.coded_tokens));
    for (int h = first_head; h < first_head + heads_together_; ++h) {
      for (int chunk = 0; chunk < chunks_; ++chunk) {
        const Part to = part(group_index(h, b, chunk), range);
        std::fill_n(to.most, width_, kLowest);
        std::fill_n(to.total, width_, 0.0f);
        std::fill_n(to.sums, value_rows_ * width_, 0.0f);
      }
    }
    if (first >= last) return;
    float* step = scratch;
    float* all_scores = step + scratch_floats_;
    float* turns = all_scores + score_floats_;
    float* base = turns + 2 * kBlockTokens * pairs_;
    double* state = thread_turns_ + omp_get_thread_num() * 2 * std::int64_t{pairs_};
    start_turning(s.first_position + first, state, base);
    for (std::int64_t tile = first; tile < last; tile += kTile) {
      const std::int64_t end = std::min(last, tile + kTile);
      for (std::int64_t block = tile; block < end; block += kBlockTokens) {
        const int tokens = static_cast<int>(std::min<std::int64_t>(kBlockTokens, end - block));
        RotationTable table{
            pairs_, pairs_ > 0 && p_.rotation->interleaved, turns, turns + kBlockTokens * pairs_};
        if (pairs_ > 0) {
          level_.turn(base,
                      base + pairs_,
                      steps_,
                      steps_ + kBlockTokens * pairs_,
                      p_.rotation->inverse_frequencies,
                      pairs_,
                      s.first_position + block,
                      tokens,
                      p_.rotation->attention_scaling,
                      turns,
                      turns + kBlockTokens * pairs_);
          turn_on(state, base);
        }
        float* scores = all_scores + (block - tile) * width_;
        for (int h = first_head; h < first_head + heads_together_; ++h) {
          const std::uint8_t* codes = block_at(s.keys, h, block, key_planes(h).block_bytes);
          for (int chunk = 0; chunk < chunks_; ++chunk, scores += kTile * width_)
            score_block(b, h, chunk, codes, tokens, table, step, scores);
        }
      }
      leave_out(s, tile, end, all_scores);
      float* scores = all_scores;
      for (int h = first_head; h < first_head + heads_together_; ++h) {
        for (int chunk = 0; chunk < chunks_; ++chunk, scores += kTile * width_)
          add_tile(b, h, chunk, part(group_index(h, b, chunk), range), tile, end, step, scores);
      }
    }
  }

  // Scores of tokens that do not count, in all heads of a tile.
  void leave_out(const AttentionSequence& s,
                 std::int64_t first,
                 std::int64_t last,
                 float* scores) const {
    const std::int64_t* const end = s.left_out + s.num_left_out;
    for (const std::int64_t* t = std::lower_bound(s.left_out, end, first); t < end && *t < last;
         ++t) {
      for (int i = 0; i < heads_together_ * chunks_; ++i)
        std::fill_n(scores + (i * kTile + *t - first) * width_, width_, kLeftOut);
    }
  }

  const std::uint8_t* block_at(const CodedRun& run,
                               int head,
                               std::int64_t token,
                               std::size_t bytes) const {
    const std::int64_t blocks = p_.page_tokens / kBlockTokens;
    const std::int64_t block = token % p_.page_tokens / kBlockTokens;
    return run.pages[token / p_.page_tokens] + size(head * blocks + block) * bytes;
  }

  // cos and sin of t * frequency, t = 0 .. kBlockTokens - 1, and of kBlockTokens * frequency.
  void make_steps() {
    for (int i = 0; i < pairs_; ++i) {
      const double f = static_cast<double>(p_.rotation->inverse_frequencies[i]);
      const double c1 = std::cos(f), s1 = std::sin(f);
      double c = 1, s = 0;
      for (int t = 0; t < kBlockTokens; ++t) {
        steps_[t * pairs_ + i] = static_cast<float>(c);
        steps_[(kBlockTokens + t) * pairs_ + i] = static_cast<float>(s);
        const double next = c * c1 - s * s1;
        s = s * c1 + c * s1;
        c = next;
      }
      block_turn_[i] = c;
      block_turn_[pairs_ + i] = s;
    }
  }

  // cos and sin at the first position of a range, in double.
  void start_turning(std::int64_t position, double* state, float* base) const {
    for (int i = 0; i < pairs_; ++i) {
      const double f = static_cast<double>(p_.rotation->inverse_frequencies[i]);
      const double angle = static_cast<double>(position) * f;
      state[i] = std::cos(angle);
      state[pairs_ + i] = std::sin(angle);
    }
    for (int i = 0; i < 2 * pairs_; ++i) base[i] = static_cast<float>(state[i]);
  }
  // One block further.
  void turn_on(double* state, float* base) const {
    for (int i = 0; i < pairs_; ++i) {
      const double c = state[i], s = state[pairs_ + i];
      const double c1 = block_turn_[i], s1 = block_turn_[pairs_ + i];
      state[i] = c * c1 - s * s1;
      state[pairs_ + i] = s * c1 + c * s1;
    }
    for (int i = 0; i < 2 * pairs_; ++i) base[i] = static_cast<float>(state[i]);
  }

  void score_block(int b,
                   int h,
                   int chunk,
                   const std::uint8_t* codes,
                   int tokens,
                   const RotationTable& rotation,
                   float* step,
                   float* scores) const {
    const std::int64_t at = group_index(h, b, chunk);
    const Planes& planes = key_planes(h);
    const int dim = p_.dim;
    if (p_.rotation == nullptr) {
      level_.score_codes(planes.code,
                         codes,
                         tokens,
                         tables_ + at * key_rows_ * width_,
                         static_cast<int>(residual_row(p_.keys, key_extra_)),
                         width_,
                         step,
                         scores);
      return;
    }
    level_.score_rebuilt(
        planes.code,
        codes,
        tokens,
        p_.keys.atoms + h * p_.keys.atoms_stride,
        p_.keys.half_atoms == nullptr ? nullptr : p_.keys.half_atoms + h * p_.keys.atoms_stride,
        p_.keys.num_atoms,
        extra_atoms(sequence(b).keys, h),
        planes.axes,
        p_.keys.mean == nullptr ? nullptr : p_.keys.mean + h * dim,
        dim,
        rotation,
        queries_ + at * width_ * dim,
        width_,
        step,
        scores);
  }

  // Softmax weights of a tile relative to the largest score so far, and their sums per atom.
  void add_tile(int b,
                int h,
                int chunk,
                const Part& to,
                std::int64_t first,
                std::int64_t last,
                float* step,
                float* scores) const {
    raise_to(to,
             shifts_ + group_index(h, b, chunk) * width_,
             scores,
             last - first,
             [&](const float* factor) { level_.scale_rows(to.sums, value_rows_, factor, width_); });
    const Planes& planes = value_planes(h);
    for (std::int64_t block = first; block < last; block += kBlockTokens) {
      level_.add_values(planes.code,
                        block_at(sequence(b).values, h, block, planes.block_bytes),
                        static_cast<int>(std::min<std::int64_t>(kBlockTokens, last - block)),
                        scores + (block - first) * width_,
                        static_cast<int>(residual_row(p_.values, value_extra_)),
                        width_,
                        step,
                        to.sums);
    }
  }

  // scores become softmax weights; if they hold a new largest one, what came before is scaled.
  template <typename Scale>
  void raise_to(const Part& to,
                const float* shift,
                float* scores,
                std::int64_t tokens,
                Scale&& scale_sums) const {
    float before[8], factor[8];
    std::copy_n(to.most, width_, before);
    level_.scale_scores(scores, tokens, p_.softmax_scale, shift, width_, to.most);
    bool raised = false, empty = true;
    for (int lane = 0; lane < width_; ++lane) {
      factor[lane] = before[lane] == to.most[lane] ? 1.0f : std::exp(before[lane] - to.most[lane]);
      raised = raised || factor[lane] != 1.0f;
      empty = empty && before[lane] == kLowest;
      to.total[lane] *= factor[lane];
    }
    if (raised && !empty) scale_sums(factor);
    level_.exponentiate(scores, tokens, to.most, width_, to.total);
  }

  // kStep rows at most of an exact run as floats.
  const float* exact_rows(
      const void* base, const ExactRun& run, int h, int first, int count, float* copy) const {
    const std::int64_t at = h * run.head_stride + std::int64_t{first} * p_.dim;
    if (p_.exact_type == ExactType::kFloat32) return static_cast<const float*>(base) + at;
    level_.widen(static_cast<const std::uint16_t*>(base) + at,
                 std::int64_t{count} * p_.dim,
                 p_.exact_type == ExactType::kFloat16,
                 copy);
    return copy;
  }

  void attend_exact(int h, int b, int chunk, float* scratch) const {
    const AttentionSequence& s = sequence(b);
    const std::int64_t at = group_index(h, b, chunk);
    const Part to = exact_part(at);
    const int dim = p_.dim;
    const float no_shift[8] = {};
    std::fill_n(to.most, width_, kLowest);
    std::fill_n(to.total, width_, 0.0f);
    std::fill_n(to.sums, width_ * dim, 0.0f);
    float* scores = scratch;
    float* copy = scratch + score_floats_;
    for (int r = 0; r < s.num_exact; ++r) {
      const ExactRun& run = s.exact[r];
      for (int tile = 0; tile < run.tokens; tile += static_cast<int>(kTile)) {
        const int count = std::min(static_cast<int>(kTile), run.tokens - tile);
        for (int t = 0; t < count; t += kStep) {
          const int rows = std::min(kStep, count - t);
          level_.score_rows(exact_rows(run.keys, run, h, tile + t, rows, copy),
                            rows,
                            dim,
                            queries_ + at * width_ * dim,
                            width_,
                            scores + t * width_);
        }
        raise_to(to, no_shift, scores, count, [&](const float* factor) {
          for (int lane = 0; lane < width_; ++lane) {
            for (int i = 0; i < dim; ++i) to.sums[lane * dim + i] *= factor[lane];
          }
        });
        for (int t = 0; t < count; t += kStep) {
          const int rows = std::min(kStep, count - t);
          level_.sum_atoms(exact_rows(run.values, run, h, tile + t, rows, copy),
                           rows,
                           dim,
                           scores + t * width_,
                           width_,
                           to.sums);
        }
      }
    }
  }

  // Every part counts e^(its largest - the largest of all) / (sum of all).
  void combine() {
    const int dim = p_.dim;
    const std::int64_t product = std::int64_t{width_} * dim;
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads_)
    for (int h = 0; h < p_.kv_heads; ++h) {
      for (int b = 0; b < count_; ++b) {
        for (int chunk = 0; chunk < chunks_; ++chunk) weigh_parts(h, b, chunk);
      }
    }
    const bool shared = p_.values.atoms_stride == 0;
#pragma omp parallel num_threads(threads_)
    {
      float* sums = thread_scratch_ + omp_get_thread_num() * thread_floats_;  // of some atoms
#pragma omp for collapse(2) schedule(dynamic)
      for (int d = 0; d < (shared ? 1 : p_.kv_heads); ++d) {
        for (int range = 0; range < value_ranges_; ++range) {
          const int first = range * kAtomRange;
          const int count = std::min(kAtomRange, p_.values.num_atoms - first);
          for (int h = shared ? 0 : d; h < (shared ? p_.kv_heads : d + 1); ++h) {
            for (int b = 0; b < count_; ++b) {
              for (int chunk = 0; chunk < chunks_; ++chunk) {
                const std::int64_t at = group_index(h, b, chunk);
                float* to = products_ + (at * (value_ranges_ + 1) + range) * product;
                std::fill_n(to, product, 0.0f);
                if (!join_rows(b, at, first, count, sums)) continue;
                level_.sum_atoms(
                    p_.values.atoms + h * p_.values.atoms_stride + std::ptrdiff_t{first} * dim,
                    count,
                    dim,
                    sums,
                    width_,
                    to);
              }
            }
          }
        }
      }
#pragma omp for collapse(3) schedule(static)
      for (int h = 0; h < p_.kv_heads; ++h) {
        for (int b = 0; b < count_; ++b) {
          for (int chunk = 0; chunk < chunks_; ++chunk) finish(h, b, chunk, sums);
        }
      }
    }
  }

  float* factor(std::int64_t group, std::int64_t range) const {
    return factors_ + (group * (most_ranges_ + 1) + range) * width_;
  }

  void weigh_parts(int h, int b, int chunk) const {
    const std::int64_t at = group_index(h, b, chunk);
    const std::int64_t ranges = ranges_of(sequence(b).coded_tokens);
    const Part exact = exact_part(at);
    for (int lane = 0; lane < width_; ++lane) {
      float most = exact.most[lane];
      for (std::int64_t r = 0; r < ranges; ++r) most = std::max(most, part(at, r).most[lane]);
      // A part without tokens has most = -inf and total = 0, or only tokens that are left out.
      const auto share = [&](const Part& of) {
        return of.total[lane] == 0 || of.most[lane] < kNoToken ? 0.0f
                                                               : std::exp(of.most[lane] - most);
      };
      double total = double{exact.total[lane]} * double{share(exact)};
      for (std::int64_t r = 0; r < ranges; ++r)
        total += double{part(at, r).total[lane]} * double{share(part(at, r))};
      // Exact tokens alone, all with a score of -inf: no softmax.
      const float nothing = exact.total[lane] == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      const float whole = total == 0 ? nothing : static_cast<float>(1 / total);
      for (std::int64_t r = 0; r < ranges; ++r) factor(at, r)[lane] = share(part(at, r)) * whole;
      factor(at, most_ranges_)[lane] = share(exact) * whole;
      if (p_.log_sums != nullptr && lane < lanes(chunk))
        p_.log_sums[((std::int64_t{first_} + b) * p_.kv_heads + h) * p_.group + chunk * width_ +
                    lane] =
            total == 0 ? kLowest : static_cast<float>(double{most} + std::log(total));
    }
  }

  // sums [count, width] = rows [first, first + count) of all ranges of a group, each by its factor.
  bool join_rows(
      int b, std::int64_t group, std::int64_t first, std::int64_t count, float* sums) const {
    const std::int64_t ranges = ranges_of(sequence(b).coded_tokens);
    for (std::int64_t r = 0; r < ranges; ++r)
      level_.add_rows(
          sums, part(group, r).sums + first * width_, count, factor(group, r), width_, r > 0);
    return ranges > 0;
  }

  void finish(int h, int b, int chunk, float* scratch) const {
    const std::int64_t at = group_index(h, b, chunk);
    const int dim = p_.dim;
    const std::int64_t product = std::int64_t{width_} * dim;
    float* coded =
        products_ + at * (value_ranges_ + 1) * product;  // [width, dim], in the frame of z
    float* sum = coded + value_ranges_ * product;
    std::fill_n(sum, product, 0.0f);
    for (int range = 0; range < value_ranges_; ++range) {
      for (std::int64_t i = 0; i < product; ++i) sum[i] += coded[range * product + i];
    }
    const CodedRun& run = sequence(b).values;
    const auto add_atom = [&](std::int64_t row, const float* atom) {
      if (join_rows(b, at, row, 1, scratch)) level_.sum_atoms(atom, 1, dim, scratch, width_, sum);
    };
    for (int n = 0; n < run.num_extra; ++n)
      add_atom(p_.values.num_atoms + n, extra_atoms(run, h) + std::ptrdiff_t{n} * dim);
    const Planes& planes = value_planes(h);
    for (int c = 0; c < planes.code.components; ++c)
      add_atom(residual_row(p_.values, value_extra_) + c, planes.axes[c]);

    const std::ptrdiff_t square = std::ptrdiff_t{dim} * dim;
    const Part exact = exact_part(at);
    const std::int64_t ranges = ranges_of(sequence(b).coded_tokens);
    for (int lane = 0; lane < lanes(chunk); ++lane) {
      float mass = 0;  // of the coded tokens
      for (std::int64_t r = 0; r < ranges; ++r)
        mass += part(at, r).total[lane] * factor(at, r)[lane];
      const float exact_factor = factor(at, most_ranges_)[lane];
      const float* z = sum + lane * dim;
      float* out = p_.out + (query(h, b, chunk, lane) - p_.queries);
      for (int i = 0; i < dim; ++i) {
        float x = z[i];
        if (p_.values.back_map != nullptr) {
          const float* row = p_.values.back_map + h * square + std::ptrdiff_t{i} * dim;
          x = 0;
          for (int j = 0; j < dim; ++j) x += row[j] * z[j];
        }
        if (p_.values.mean != nullptr && mass != 0) x += mass * p_.values.mean[h * dim + i];
        out[i] = x + exact_factor * exact.sums[lane * dim + i];
      }
    }
  }

  const AttentionProblem& p_;
  const AttentionLevel& level_;
  const int threads_, width_, chunks_, pairs_;
  const std::int64_t least_range_;
  Pieces pieces_;
  int key_extra_ = 0, value_extra_ = 0;
  std::int64_t most_ranges_ = 0;
  std::int64_t key_rows_ = 0, value_rows_ = 0;  // atoms, extra atoms, components
  int value_ranges_ = 0, heads_together_ = 1, wave_ = 1, first_ = 0, count_ = 0;
  std::int64_t scratch_floats_ = 0, score_floats_ = 0, thread_floats_ = 0;
  Planes* planes_ = nullptr;
  float *queries_ = nullptr, *mapped_ = nullptr, *transposed_ = nullptr, *shifts_ = nullptr,
        *tables_ = nullptr, *parts_ = nullptr, *exact_parts_ = nullptr, *factors_ = nullptr,
        *products_ = nullptr, *thread_scratch_ = nullptr;
  double *thread_turns_ = nullptr, *block_turn_ = nullptr;
  float* steps_ = nullptr;
};

}  // namespace

std::size_t attention_workspace_bytes(const AttentionProblem& problem) {
  return Attention(problem, nullptr).workspace_bytes();
}

Status attention(const AttentionProblem& problem, void* workspace) {
  if (problem.batch == 0 || problem.kv_heads == 0 || problem.group == 0) return {};
  for (int b = 0; b < problem.batch; ++b) {
    if (problem.sequences[b].values.num_tiles != 0)
      return {1, "attention: the CPU backend takes no value tiles"};
  }
  Attention(problem, workspace).run();
  return {};
}

}  // namespace cpu
}  // namespace lexico::kernels
