#pragma once
// Random problems for the tests of attention, and what they must give: dense attention in double
// on the vectors that the codes stand for.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kernels/attention/attention.h"

namespace lexico::kernels {

struct AttentionSetting {
  int batch = 1, kv_heads = 2, group = 4, dim = 64, num_atoms = 100;
  int slots = 5;
  CodedWeights weights = CodedWeights::kFloat32;
  int weight_bits = 5;
  int scale_bits = 0;
  std::vector<std::int64_t> coded{300};  // of each sequence in turn
  std::vector<int> exact{20, 7};         // tokens of the runs of every sequence
  ExactType exact_type = ExactType::kFloat32;
  int page_tokens = 128;
  int rotary_dim = 0;  // 0: keys are coded after RoPE
  std::int64_t first_position = 3;
  float attention_scaling = 1;
  bool means = false, maps = false, head_atoms = false, residual = false, relative = false;
  int extra = 0;
  bool head_extra = false;   // extra atoms of each head
  bool trellis = false;      // components by the code of 8 states
  bool interleaved = false;  // rotation
  std::vector<std::int64_t> left_out{};
  float query_size = 1;
  int tile_tokens = 0;         // 0: all values are in rows
  std::vector<int> tiles{-1};  // of each sequence in turn; -1: all that are full
  int hot = 0;                 // percent of the slots that have atom 7
  bool unused = false;         // kLevels: level 0 of each slot is 0, which a slot without use has
  unsigned seed = 1;
};

inline AttentionSetting with(const std::function<void(AttentionSetting&)>& change) {
  AttentionSetting setting;
  change(setting);
  return setting;
}

// What tile `tile` of a sequence's values is packed from; all on the host.
inline ValueTileSource tile_source(const AttentionProblem& p,
                                   const AttentionSequence& sequence,
                                   int tile) {
  ValueTileSource source;
  source.layout = p.values.layout, source.layout_stride = p.values.layout_stride;
  source.kv_heads = p.kv_heads;
  source.num_atoms = p.values.num_atoms + sequence.values.num_extra;
  source.tile_tokens = p.value_tile_tokens;
  source.pages = sequence.values.pages, source.page_tokens = p.page_tokens;
  source.first_token = std::int64_t{tile} * p.value_tile_tokens;
  return source;
}
inline std::vector<std::uint8_t> pack_tile(const ValueTileSource& source) {
  std::vector<std::uint8_t> workspace(value_tile_workspace_bytes(source.num_atoms), 0xa5);
  std::vector<std::uint8_t> tile(value_tile_bytes(source, workspace.data()), 0xa5);
  pack_value_tile(source, workspace.data(), tile.data());
  return tile;
}

// |ours - dense| / |dense|, the largest of all heads.
inline double worst_error(const std::vector<float>& ours,
                          const std::vector<double>& dense,
                          int dim) {
  EXPECT_EQ(ours.size(), dense.size());
  double worst = 0;
  const std::size_t m = static_cast<std::size_t>(dim);
  for (std::size_t head = 0; head * m < dense.size(); ++head) {
    double error = 0, norm = 0;
    for (std::size_t i = head * m; i < (head + 1) * m; ++i) {
      const double d = static_cast<double>(ours[i]) - dense[i];
      error += d * d, norm += dense[i] * dense[i];
    }
    const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
    worst = relative > worst || std::isnan(relative) ? relative : worst;
  }
  return worst;
}

inline float e4m3_value(std::uint32_t byte) {
  const int mantissa = byte & 7, exponent = byte >> 3 & 15;
  const double m =
      exponent == 0 ? mantissa * std::ldexp(1.0, -9) : std::ldexp(1 + mantissa / 8.0, exponent - 7);
  return static_cast<float>((byte & 0x80) != 0 ? -m : m);
}

/// Owns the memory of a problem.
class AttentionCase {
 public:
  explicit AttentionCase(const AttentionSetting& setting) : s(setting), random_(setting.seed) {
    make_space(keys_, s.maps && s.rotary_dim == 0);
    make_space(values_, s.maps);
    problem.batch = s.batch, problem.kv_heads = s.kv_heads, problem.group = s.group;
    problem.dim = s.dim;
    problem.softmax_scale = 1 / std::sqrt(static_cast<float>(s.dim));
    problem.keys = keys_.space, problem.values = values_.space;
    problem.page_tokens = s.page_tokens;
    problem.value_tile_tokens = s.tile_tokens;
    problem.exact_type = s.exact_type;
    if (s.rotary_dim > 0) {
      for (int i = 0; i < s.rotary_dim / 2; ++i)
        frequencies_.push_back(static_cast<float>(std::pow(10000.0, -2.0 * i / s.rotary_dim)));
      rotation_ = {s.rotary_dim, s.interleaved, frequencies_.data(), s.attention_scaling};
      problem.rotation = &rotation_;
    }
    queries = normals(static_cast<std::size_t>(s.batch * heads() * s.dim), s.query_size);
    problem.queries = queries.data();
    sequences_.resize(static_cast<std::size_t>(s.batch));
    problem.sequences = sequences_.data();
    for (int b = 0; b < s.batch; ++b) make_sequence(b);
  }

  int heads() const { return s.kv_heads * s.group; }

  /// [batch, heads, dim]
  std::vector<float> run(int threads = 1, std::vector<float>* log_sums = nullptr) {
    std::vector<float> out(queries.size(), std::numeric_limits<float>::quiet_NaN());
    problem.out = out.data();
    problem.queries = queries.data();
    problem.threads = threads;
    if (log_sums != nullptr) log_sums->resize(static_cast<std::size_t>(s.batch * heads()));
    problem.log_sums = log_sums == nullptr ? nullptr : log_sums->data();
    std::vector<char> workspace(cpu::attention_workspace_bytes(problem));
    EXPECT_TRUE(cpu::attention(problem, workspace.data()).ok());
    return out;
  }

  /// What run() must give, in double.
  std::vector<double> dense(std::vector<double>* log_sums = nullptr) const {
    std::vector<double> out;
    for (int b = 0; b < s.batch; ++b) {
      for (int head = 0; head < heads(); ++head) {
        const std::vector<double> one = dense_head(b, head, log_sums);
        out.insert(out.end(), one.begin(), one.end());
      }
    }
    return out;
  }

  AttentionProblem problem;
  AttentionSetting s;
  std::vector<float> queries;

 private:
  struct Space {
    std::vector<CodeLayout> layouts;
    std::vector<std::vector<std::int32_t>> bits;
    std::vector<std::vector<float>> component_levels;
    std::vector<float> atoms, axes, mean, map, levels, scales;
    CodedSpace space;
  };
  struct Run {
    std::vector<std::vector<std::uint8_t>> pages;
    std::vector<const std::uint8_t*> addresses;
    std::vector<float> extra;
    std::vector<std::vector<double>> vectors;  // [token * kv_heads + head], before rotation
  };
  struct Sequence {
    Run keys, values;
    std::vector<std::vector<float>> exact_keys, exact_values;  // as the kernel's type has them
    std::vector<std::vector<std::uint16_t>> small_keys, small_values;
    std::vector<ExactRun> runs;
    std::vector<std::int64_t> left_out;
  };

  std::vector<float> normals(std::size_t count, float size = 1) {
    std::normal_distribution<float> normal(0, size);
    std::vector<float> x(count);
    for (float& v : x) v = normal(random_);
    return x;
  }
  std::uint32_t bits() { return static_cast<std::uint32_t>(random_()); }
  static std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

  void make_space(Space& space, bool maps) {
    const int dim = s.dim;
    const int dictionaries = s.head_atoms ? s.kv_heads : 1;
    const float atom_size = 1 / std::sqrt(static_cast<float>(dim));
    space.atoms = normals(at(dictionaries * s.num_atoms * dim), atom_size);
    if (s.means) space.mean = normals(at(s.kv_heads * dim), 0.5f);
    if (maps) space.map = normals(at(s.kv_heads * dim * dim), atom_size);
    space.levels = normals(at(s.slots << s.weight_bits));
    for (int k = 0; k < s.slots && s.unused; ++k) space.levels[at(k << s.weight_bits)] = 0;
    for (int k = 0; k < 1 << s.scale_bits; ++k)
      space.scales.push_back(std::exp2(static_cast<float>(k % 7) * 0.3f - 1));
    const int layouts = s.residual ? s.kv_heads : 1;  // components of heads differ
    if (s.residual) space.axes = normals(at(s.kv_heads * dim * dim), atom_size);
    for (int h = 0; h < layouts; ++h) {
      CodeLayout layout;
      layout.slots = s.slots;
      while (1 << layout.index_bits < s.num_atoms + s.extra) ++layout.index_bits;
      layout.weights = s.weights;
      layout.weight_bits = s.weight_bits;
      layout.scale_bits = s.scale_bits;
      layout.relative = s.relative;
      std::vector<std::int32_t> widths;
      std::vector<float> levels;
      for (int c = 0; c < dim && s.residual; ++c) {
        widths.push_back((c + h * dim / s.kv_heads) % dim * 9 / dim);  // 0..8, the same sum
        const std::vector<float> more =
            normals(widths.back() == 0 ? 0 : at(1 << (widths.back() + (s.trellis ? 1 : 0))), 0.3f);
        levels.insert(levels.end(), more.begin(), more.end());
      }
      layout.components = static_cast<int>(widths.size());
      if (s.trellis) layout.trellis = {013, 04};
      space.bits.push_back(widths);
      space.component_levels.push_back(levels);
      space.layouts.push_back(layout);
    }
    for (std::size_t h = 0; h < space.layouts.size(); ++h) {
      space.layouts[h].levels = space.levels.data();
      space.layouts[h].scales = space.scales.data();
      space.layouts[h].component_bits = space.bits[h].data();
      space.layouts[h].component_levels = space.component_levels[h].data();
    }
    space.space.layout = space.layouts.data();
    space.space.layout_stride = layouts > 1 ? 1 : 0;
    space.space.num_atoms = s.num_atoms;
    space.space.atoms = space.atoms.data();
    space.space.atoms_stride = s.head_atoms ? std::int64_t{s.num_atoms} * dim : 0;
    space.space.axes = space.axes.data();
    space.space.axes_stride = s.residual ? std::int64_t{dim} * dim : 0;
    space.space.mean = s.means ? space.mean.data() : nullptr;
    space.space.back_map = maps ? space.map.data() : nullptr;
  }

  void make_sequence(int b) {
    const std::int64_t tokens = s.coded[at(b) % s.coded.size()];
    owned_.push_back(std::make_unique<Sequence>());
    Sequence& own = *owned_.back();
    AttentionSequence& sequence = sequences_[at(b)];
    sequence.coded_tokens = tokens;
    sequence.first_position = s.first_position;
    sequence.keys = make_run(keys_, own.keys, tokens);
    sequence.values = make_run(values_, own.values, tokens);
    if (s.tile_tokens > 0) {
      const int tiles = s.tiles[at(b) % s.tiles.size()];
      sequence.values.num_tiles = tiles < 0 ? static_cast<int>(tokens / s.tile_tokens) : tiles;
    }
    for (const int count : s.exact) {
      ExactRun run;
      run.tokens = count;
      run.head_stride = std::int64_t{count} * s.dim + 12;
      run.keys = exact(own.exact_keys, own.small_keys, at(s.kv_heads * run.head_stride));
      run.values = exact(own.exact_values, own.small_values, at(s.kv_heads * run.head_stride));
      own.runs.push_back(run);
    }
    for (const std::int64_t t : s.left_out)
      if (t < tokens) own.left_out.push_back(t);
    sequence.left_out = own.left_out.data();
    sequence.num_left_out = static_cast<int>(own.left_out.size());
    sequence.exact = own.runs.data();
    sequence.num_exact = static_cast<int>(own.runs.size());
  }

  const void* exact(std::vector<std::vector<float>>& all,
                    std::vector<std::vector<std::uint16_t>>& small,
                    std::size_t count) {
    all.push_back(normals(count));
    small.emplace_back(count);
    for (std::size_t i = 0; i < count && s.exact_type != ExactType::kFloat32; ++i) {
      // Numbers that both 16-bit types have: 8 bits of mantissa, a few of them tiny or zero.
      float& x = all.back()[i];
      std::uint32_t word;
      x = i % 31 == 0 ? 0.0f : i % 37 == 0 ? 0x1p-20f * static_cast<float>(i % 5) : x;
      std::memcpy(&word, &x, sizeof word);
      word &= 0xffff0000u;
      std::memcpy(&x, &word, sizeof word);
      small.back()[i] = static_cast<std::uint16_t>(word >> 16);
      if (s.exact_type == ExactType::kFloat16) {
        const int exponent = static_cast<int>(word >> 23 & 255) - 127;
        std::uint16_t half = static_cast<std::uint16_t>(word >> 16 & 0x8000);
        if (x != 0 && exponent >= -14)
          half = static_cast<std::uint16_t>(half | ((exponent + 15) << 10 | (word >> 13 & 1023)));
        else if (x != 0)
          half = static_cast<std::uint16_t>(half | std::lround(std::fabs(std::ldexp(x, 24))));
        if (x != 0 && exponent < -14)
          x = std::copysign(std::ldexp(static_cast<float>(half & 1023), -24), x);
        small.back()[i] = half;
      }
    }
    if (s.exact_type == ExactType::kFloat32) return all.back().data();
    return small.back().data();
  }

  CodedRun make_run(const Space& space, Run& run, std::int64_t tokens) {
    const int dim = s.dim;
    run.extra = normals(at((s.head_extra ? s.kv_heads : 1) * s.extra * dim), 0.2f);
    const std::size_t bytes = block_bytes(space.layouts[0]);
    const std::int64_t blocks = s.page_tokens / kBlockTokens;
    for (std::int64_t first = 0; first < tokens; first += s.page_tokens) {
      run.pages.emplace_back(at(s.kv_heads * blocks) * bytes + kPageSlack);
      // What lies beyond the last token does not matter.
      for (std::uint8_t& byte : run.pages.back()) byte = static_cast<std::uint8_t>(bits());
    }
    for (const auto& page : run.pages) run.addresses.push_back(page.data());
    std::vector<std::uint32_t> atoms(at(s.slots)), weights(at(s.slots)), components(at(dim));
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (int h = 0; h < s.kv_heads; ++h) {
        const CodeLayout& layout = space.layouts[at(space.space.layout_stride * h)];
        CodedFields fields{atoms.data(), weights.data(), 0, components.data()};
        std::vector<double> z(at(dim), 0.0);
        fields.scale = bits() & ((1u << s.scale_bits) - 1);
        const double scale = s.scale_bits == 0 ? 1.0 : space.scales[fields.scale];
        for (int k = 0; k < s.slots; ++k) {
          atoms[at(k)] = bits() % static_cast<unsigned>(s.num_atoms + s.extra);
          if (s.hot > 0 && bits() % 100 < static_cast<unsigned>(s.hot)) atoms[at(k)] = 7;
          double weight = 0;
          if (s.weights == CodedWeights::kFloat32) {
            const float w = (bits() % 8 == 0) ? 0.0f : normals(1)[0];
            std::memcpy(&weights[at(k)], &w, sizeof w);
            weight = w;
          } else if (s.weights == CodedWeights::kE4m3) {
            weights[at(k)] = bits() % 256;
            if ((weights[at(k)] & 0x7f) > 0x48) weights[at(k)] &= 0x87;
            weight = e4m3_value(weights[at(k)]);
          } else {
            weights[at(k)] = bits() & ((1u << s.weight_bits) - 1);
            weight = space.levels[at(k << s.weight_bits) + weights[at(k)]];
          }
          const int n = static_cast<int>(atoms[at(k)]);
          const float* atom =
              n < s.num_atoms
                  ? space.space.atoms + space.space.atoms_stride * h + std::ptrdiff_t{n} * dim
                  : &run.extra[at((n - s.num_atoms + (s.head_extra ? h * s.extra : 0)) * dim)];
          for (int i = 0; i < dim; ++i) z[at(i)] += scale * weight * double{atom[i]};
        }
        const float* levels = layout.component_levels;
        unsigned last = 0;  // low bits of components, the newest lowest
        for (int c = 0; c < layout.components; ++c) {
          const int width = layout.component_bits[c];
          if (width == 0) continue;
          components[at(c)] = bits() & ((1u << width) - 1);
          unsigned number = components[at(c)];
          if (s.trellis) {
            last = last << 1 | (number & 1);
            number = 4 * (number >> 1) + 2 * ((last ^ last >> 1 ^ last >> 3) & 1) + (last >> 2 & 1);
          }
          const double level = double{levels[number]} * (s.relative ? scale : 1.0);
          levels += 1 << (width + (s.trellis ? 1 : 0));
          const float* axis =
              space.space.axes + space.space.axes_stride * h + std::ptrdiff_t{c} * dim;
          for (int i = 0; i < dim; ++i) z[at(i)] += level * double{axis[i]};
        }
        write_fields(layout,
                     &run.pages[at(t / s.page_tokens)]
                               [at(h * blocks + t % s.page_tokens / kBlockTokens) * bytes],
                     static_cast<int>(t % kBlockTokens),
                     fields);
        std::vector<double> x = z;
        for (int i = 0; i < dim; ++i) {
          if (space.space.back_map != nullptr) {
            x[at(i)] = 0;
            for (int j = 0; j < dim; ++j)
              x[at(i)] += double{space.space.back_map[(h * dim + i) * dim + j]} * z[at(j)];
          }
          if (space.space.mean != nullptr) x[at(i)] += double{space.space.mean[h * dim + i]};
        }
        run.vectors.push_back(x);
      }
    }
    return {run.addresses.data(),
            run.extra.data(),
            s.head_extra ? std::int64_t{s.extra} * dim : 0,
            s.extra,
            nullptr,
            0};
  }

  void rotate(std::vector<double>& x, std::int64_t position) const {
    const int pairs = s.rotary_dim / 2;
    for (int i = 0; i < pairs; ++i) {
      const float angle = static_cast<float>(position) * frequencies_[at(i)];
      const double c = std::cos(double{angle}), sn = std::sin(double{angle});
      const int first = s.interleaved ? 2 * i : i, second = s.interleaved ? 2 * i + 1 : i + pairs;
      const double a = x[at(first)], b = x[at(second)], m = double{s.attention_scaling};
      x[at(first)] = m * (a * c - b * sn);
      x[at(second)] = m * (b * c + a * sn);
    }
  }

  std::vector<double> dense_head(int b, int head, std::vector<double>* log_sums) const {
    const Sequence& own = *owned_[at(b)];
    const AttentionSequence& sequence = sequences_[at(b)];
    const int h = head / s.group, dim = s.dim;
    std::vector<std::vector<double>> keys, values;
    for (std::int64_t t = 0; t < sequence.coded_tokens; ++t) {
      if (std::find(own.left_out.begin(), own.left_out.end(), t) != own.left_out.end()) continue;
      keys.push_back(own.keys.vectors[at(t * s.kv_heads + h)]);
      if (s.rotary_dim > 0) rotate(keys.back(), s.first_position + t);
      values.push_back(own.values.vectors[at(t * s.kv_heads + h)]);
    }
    for (std::size_t r = 0; r < own.runs.size(); ++r) {
      for (int t = 0; t < own.runs[r].tokens; ++t) {
        const std::int64_t from = h * own.runs[r].head_stride + std::int64_t{t} * dim;
        const float* k = own.exact_keys[r].data() + from;
        const float* v = own.exact_values[r].data() + from;
        keys.emplace_back(k, k + dim);
        values.emplace_back(v, v + dim);
      }
    }
    const float* q = &queries[at((b * heads() + head) * dim)];
    std::vector<double> scores, out(at(dim), 0.0);
    double most = -std::numeric_limits<double>::infinity(), total = 0;
    for (const auto& key : keys) {
      double score = 0;
      for (int i = 0; i < dim; ++i) score += double{q[i]} * key[at(i)];
      scores.push_back(score * double{problem.softmax_scale});
      most = std::max(most, scores.back());
    }
    for (std::size_t t = 0; t < keys.size(); ++t) {
      const double weight = std::exp(scores[t] - most);
      total += weight;
      for (int i = 0; i < dim; ++i) out[at(i)] += weight * values[t][at(i)];
    }
    for (double& x : out) x = keys.empty() ? 0 : x / total;
    if (log_sums != nullptr)
      log_sums->push_back(keys.empty() ? -std::numeric_limits<double>::infinity()
                                       : most + std::log(total));
    return out;
  }

  std::mt19937 random_;
  Space keys_, values_;
  std::vector<float> frequencies_;
  KeyRotation rotation_;
  std::vector<AttentionSequence> sequences_;
  std::vector<std::unique_ptr<Sequence>> owned_;
};

}  // namespace lexico::kernels
