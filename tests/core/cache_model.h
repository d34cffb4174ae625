#pragma once
// A key-value cache that keeps everything: what a compressed cache must give, token by token, with
// dense attention in double. It codes with Codec alone, a sequence and a layer at a time.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "core/half.h"
#include "lexico/compressed_cache.h"
#include "lexico/rope.h"

namespace lexico {

/// One way to set a cache up.
struct CacheCase {
  std::string name;
  CacheShape shape;
  CacheOptions options;
  DictionarySet set;
  Rope rope;
};

struct CacheCaseSetting {
  std::string name = "plain";
  CodeFormat::Coding coding = CodeFormat::Coding::kPacked;
  KeyStage stage = KeyStage::kPostRope;
  bool transform = false, own_heads = false, interleaved = false;
  int residual_groups = 0, states = 0;
  int layers = 1, kv_heads = 2, group = 2, dim = 16, num_atoms = 40, max_atoms = 4;
};

inline std::vector<float> cache_normals(std::size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& v : x) v = normal(random);
  return x;
}

inline Dictionary cache_dictionary(
    const CacheCaseSetting& s, int layer, Kind kind, int head, std::mt19937& random) {
  const auto at = [](int i) { return static_cast<std::size_t>(i); };
  Dictionary d;
  d.layer = layer;
  d.kind = kind;
  d.head = head;
  d.num_atoms = s.num_atoms;
  d.dim = s.dim;
  d.atoms = cache_normals(at(s.num_atoms * s.dim), random);
  normalize_atoms(d.atoms, s.num_atoms, s.dim);
  const int heads = head == Dictionary::kAllHeads ? s.kv_heads : 1;
  if (s.transform) {
    std::vector<float> metric(at(heads * s.dim * s.dim), 0.0f);
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < s.dim; ++i)
        metric[at((h * s.dim + i) * s.dim + i)] = 0.5f + 0.1f * static_cast<float>((i * 7 + h) % 9);
    for (int h = 0; h < heads; ++h)
      metric[at(h * s.dim * s.dim + 1)] = metric[at(h * s.dim * s.dim + s.dim)] = 0.2f;
    set_metric(d.transform, metric, heads, s.dim, 0.1);
    for (const float x : cache_normals(at(heads * s.dim), random))
      d.transform.mean.push_back(0.3f * x);
  }
  CodeFormat& f = d.format;
  f.coding = s.coding;
  f.max_atoms = s.max_atoms;
  if (s.coding != CodeFormat::Coding::kPacked) return d;
  f.weight_bits = 5;
  f.scale_bits = 8;
  f.scale_low = -4;
  f.scale_step = 0.05f;
  for (int k = 0; k < f.max_atoms; ++k)
    for (int i = 0; i < 32; ++i) f.weight_levels.push_back(static_cast<float>(i - 16) / 14.0f);
  ResidualCode& r = f.residual;
  r.groups = head == Dictionary::kAllHeads ? s.residual_groups : std::min(s.residual_groups, 1);
  r.states = r.groups > 0 ? s.states : 0;
  r.relative = r.groups > 0;
  for (int g = 0; g < r.groups; ++g) {
    for (int i = 0; i < s.dim; ++i) {
      r.mean.push_back(0.02f * static_cast<float>(i % 5 - 2));
      for (int j = 0; j < s.dim; ++j) r.axes.push_back(j == (i + g + 1) % s.dim ? 1.0f : 0.0f);
      const int bits = (i + 4 * g) % 4;
      r.bits.push_back(bits);
      const int levels = r.num_levels(bits);
      for (int l = 0; l < levels; ++l)
        r.levels.push_back(0.6f * (static_cast<float>(2 * l + 1) / static_cast<float>(levels) - 1));
    }
  }
  return d;
}

inline CacheCase cache_case(const CacheCaseSetting& s, const CacheOptions& options, unsigned seed) {
  std::mt19937 random(seed);
  CacheCase c;
  c.name = s.name;
  c.shape.layers = s.layers;
  c.shape.kv_heads = s.kv_heads;
  c.shape.group = s.group;
  c.shape.head_dim = s.dim;
  c.options = options;
  c.options.half_keys = false;
  c.options.threads = 1;
  c.set.key_stage = s.stage;
  c.rope.kind = "default";
  c.rope.layout = s.interleaved ? "interleaved" : "half";
  c.rope.rotary_dim = s.dim / 2;
  for (int i = 0; i < s.dim / 4; ++i)
    c.rope.inverse_frequencies.push_back(std::pow(100.0, -4.0 * i / s.dim));
  c.set.metadata["rope"] = c.rope.to_json();
  for (int layer = 0; layer < s.layers; ++layer)
    for (const Kind kind : kBothKinds)
      for (int h = 0; h < (s.own_heads ? s.kv_heads : 1); ++h)
        c.set.dictionaries.push_back(
            cache_dictionary(s, layer, kind, s.own_heads ? h : Dictionary::kAllHeads, random));
  return c;
}

/// The naive cache. Its sequences have the numbers of the real one.
class CacheModel {
 public:
  explicit CacheModel(const CacheCase& c) : c_(c) {
    if (c_.options.adaptive_threshold == 0) c_.options.adaptive_atoms = 0;
    for (Dictionary& d : c_.set.dictionaries) {
      const auto& own = d.kind == Kind::kKeys ? c.options.layer_keys : c.options.layer_values;
      const auto of = own.find(d.layer);
      const CacheCoding coding = of != own.end()         ? of->second
                                 : d.kind == Kind::kKeys ? c.options.keys
                                                         : c.options.values;
      tolerance_[{d.layer, d.kind}] = coding.relative_tolerance;
      if (coding.max_atoms == 0) continue;
      d.format.max_atoms = coding.max_atoms;
      if (d.format.coding == CodeFormat::Coding::kPacked)
        d.format.weight_levels.resize(at(coding.max_atoms) << d.format.weight_bits);
    }
  }

  struct Vector {
    std::vector<float> exact;  // rounded, keys after RoPE
    std::vector<float> coded;  // what codes stand for
  };
  struct Token {
    std::array<std::vector<Vector>, 2> vectors;  // [keys and values][head]
    bool is_coded = false, is_kept = false;
    int kept_id = 0;
  };
  struct OwnAtom {
    std::vector<float> row;
    std::int64_t token;
  };
  struct Layer {
    std::vector<Token> tokens;
    std::array<std::vector<std::vector<OwnAtom>>, 2> own;  // [kind][dictionary]
    std::array<std::vector<int>, 2> pages;                 // ids
  };
  using Sequence = std::vector<Layer>;
  std::map<int, Sequence> sequences;

  void add(int number) {
    Sequence s(at(c_.shape.layers));
    for (int l = 0; l < c_.shape.layers; ++l)
      for (const Kind kind : kBothKinds)
        s[at(l)].own[at(static_cast<int>(kind))].resize(
            c_.set.find(l, kind) != nullptr ? 1 : at(c_.shape.kv_heads));
    sequences[number] = std::move(s);
  }

  /// keys and values [tokens, kv_heads, dim].
  void append(int number, int l, std::int64_t tokens, const float* keys, const float* values) {
    Layer& layer = sequences[number][at(l)];
    for (std::int64_t t = 0; t < tokens; ++t) {
      Token token;
      for (int kind = 0; kind < 2; ++kind)
        for (int h = 0; h < c_.shape.kv_heads; ++h) {
          const float* from = (kind == 0 ? keys : values) + (t * c_.shape.kv_heads + h) * dim();
          Vector v;
          for (int i = 0; i < dim(); ++i) v.exact.push_back(rounded(from[i]));
          token.vectors[at(kind)].push_back(v);
        }
      layer.tokens.push_back(token);
    }
    const std::int64_t first = c_.options.sink_tokens + num_coded(layer);
    const std::int64_t waiting = static_cast<std::int64_t>(layer.tokens.size()) - first;
    if (waiting < c_.options.recent_window + c_.options.compress_chunk) return;
    const std::int64_t due = waiting - c_.options.recent_window;
    for (const Kind kind : kBothKinds) compress(l, layer, kind, first, due);
    for (std::int64_t t = first; t < first + due; ++t) {
      Token& token = layer.tokens[at(t)];
      for (const auto& of_kind : token.vectors)
        for (const Vector& v : of_kind)
          for (const float x : v.exact) token.is_kept = token.is_kept || !std::isfinite(x);
      token.is_coded = true;
      if (token.is_kept) token.kept_id = next_id_++;
    }
    const std::int64_t page = c_.options.page_tokens;
    for (auto& pages : layer.pages) {
      const std::int64_t before = first - c_.options.sink_tokens;
      if (before % page != 0 && users(pages.back()) > 1) pages.back() = next_id_++;
      while (static_cast<std::int64_t>(pages.size()) * page < before + due)
        pages.push_back(next_id_++);
    }
  }

  void truncate(int number, std::int64_t tokens) {
    for (Layer& layer : sequences[number]) {
      layer.tokens.resize(std::min(layer.tokens.size(), at(tokens)));
      for (auto& of_kind : layer.own)
        for (auto& atoms : of_kind)
          while (!atoms.empty() && atoms.back().token >= tokens) atoms.pop_back();
      for (auto& pages : layer.pages)
        pages.resize(at((num_coded(layer) + c_.options.page_tokens - 1) / c_.options.page_tokens));
    }
  }

  /// A sequence read from a file has pages of its own.
  void loaded(int number, int from) {
    sequences[number] = sequences[from];
    for (Layer& layer : sequences[number]) {
      for (auto& pages : layer.pages)
        for (int& page : pages) page = next_id_++;
      for (Token& token : layer.tokens)
        if (token.is_kept) token.kept_id = next_id_++;
    }
  }

  /// As attention sees it.
  const std::vector<float>& vector(const Token& token, int kind, int head) const {
    const Vector& v = token.vectors[at(kind)][at(head)];
    return token.is_coded && !token.is_kept ? v.coded : v.exact;
  }

  /// Of one query head, in double; `size` becomes the weighted mean length of the values.
  std::vector<double> attend(
      int number, int l, int query_head, const float* q, double* size) const {
    const Layer& layer = sequences.at(number)[at(l)];
    const int h = query_head / c_.shape.group;
    std::vector<double> scores, out(at(dim()), 0.0);
    double most = -std::numeric_limits<double>::infinity(), total = 0;
    const double scale = c_.options.softmax_scale > 0
                             ? static_cast<double>(c_.options.softmax_scale)
                             : 1 / std::sqrt(static_cast<double>(dim()));
    for (const Token& token : layer.tokens) {
      const std::vector<float>& k = vector(token, 0, h);
      double score = 0;
      for (int i = 0; i < dim(); ++i)
        score += static_cast<double>(q[i]) * static_cast<double>(k[at(i)]);
      scores.push_back(score * scale);
      most = std::max(most, scores.back());
    }
    *size = 0;
    for (std::size_t t = 0; t < scores.size(); ++t) {
      const std::vector<float>& v = vector(layer.tokens[t], 1, h);
      const double weight = std::exp(scores[t] - most);
      double norm = 0;
      total += weight;
      for (int i = 0; i < dim(); ++i) {
        const double x = static_cast<double>(v[at(i)]);
        out[at(i)] += weight * x;
        norm += x * x;
      }
      *size += weight * std::sqrt(norm);
    }
    *size = scores.empty() ? 0 : *size / total;
    for (double& x : out) x = scores.empty() ? 0 : x / total;
    return out;
  }

  std::size_t bytes(int number) const {
    std::size_t sum = 0;
    for (int l = 0; l < c_.shape.layers; ++l) {
      const Layer& layer = sequences.at(number)[at(l)];
      sum += exact_bytes();
      for (const Token& token : layer.tokens) sum += token.is_kept ? token_bytes() : 0;
      for (const Kind kind : kBothKinds) {
        const std::size_t k = at(static_cast<int>(kind));
        sum += layer.pages[k].size() * page_bytes(l, kind);
        for (const auto& atoms : layer.own[k]) sum += atoms.size() * at(dim()) * 2;
      }
    }
    return sum;
  }
  /// Pages that sequences share once.
  std::size_t bytes() const {
    std::size_t sum = 0;
    std::set<int> seen;
    for (const auto& [number, layers] : sequences) {
      sum += bytes(number);
      for (int l = 0; l < c_.shape.layers; ++l) {
        for (const Kind kind : kBothKinds)
          for (const int page : layers[at(l)].pages[at(static_cast<int>(kind))])
            if (!seen.insert(page).second) sum -= page_bytes(l, kind);
        for (const Token& token : layers[at(l)].tokens)
          if (token.is_kept && !seen.insert(token.kept_id).second) sum -= token_bytes();
      }
    }
    return sum;
  }

  int dim() const { return c_.shape.head_dim; }
  std::int64_t num_coded(const Layer& layer) const {
    return std::count_if(
        layer.tokens.begin(), layer.tokens.end(), [](const Token& t) { return t.is_coded; });
  }

 private:
  template <typename T>
  static std::size_t at(T i) {
    return static_cast<std::size_t>(i);
  }

  float rounded(float x) const {
    if (c_.options.exact == ExactNumbers::kFloat32) return x;
    if (c_.options.exact == ExactNumbers::kFloat16)
      return detail::float_from_half(
          detail::half_from_float(std::isfinite(x) ? std::clamp(x, -65504.0f, 65504.0f) : x));
    if (!std::isfinite(x)) return x;
    // To 8 significant bits.
    int exponent;
    const float mantissa = std::frexp(x, &exponent);
    return std::ldexp(std::nearbyint(mantissa * 256), exponent - 8);
  }

  int users(int page) const {
    int count = 0;
    for (const auto& [number, layers] : sequences)
      for (const Layer& layer : layers)
        for (const auto& pages : layer.pages)
          count += static_cast<int>(std::count(pages.begin(), pages.end(), page));
    return count;
  }

  std::size_t token_bytes() const {
    return at(2 * c_.shape.kv_heads * dim()) * (c_.options.exact == ExactNumbers::kFloat32 ? 4 : 2);
  }
  std::size_t exact_bytes() const {
    return token_bytes() *
           at(c_.options.sink_tokens + c_.options.recent_window + c_.options.compress_chunk - 1);
  }
  std::size_t page_bytes(int l, Kind kind) const {
    const Dictionary& d = *c_.set.find(l, kind, 0);
    const CodeFormat& f = d.format;
    const int index = index_bits(d.num_atoms + c_.options.adaptive_atoms);
    int bits = 0;
    if (f.coding == CodeFormat::Coding::kPacked)
      bits = f.bits_per_vector(d.num_atoms + c_.options.adaptive_atoms, dim());
    else
      bits = f.max_atoms * (index + (f.coding == CodeFormat::Coding::kExact ? 32 : 8));
    return at(c_.shape.kv_heads * c_.options.page_tokens / 8 * bits + 32);
  }

  void compress(int l, Layer& layer, Kind kind, std::int64_t first, std::int64_t tokens) {
    const bool adaptive = c_.options.adaptive_atoms > 0;
    const std::int64_t block = adaptive ? 64 : tokens;
    const int k = static_cast<int>(kind);
    const int dictionaries = static_cast<int>(layer.own[at(k)].size());
    for (int d = 0; d < dictionaries; ++d)
      for (std::int64_t done = 0; done < tokens; done += block)
        compress_block(
            l, layer, kind, d, first + done, std::min(block, tokens - done), dictionaries > 1);
  }

  void compress_block(int l,
                      Layer& layer,
                      Kind kind,
                      int dictionary,
                      std::int64_t first,
                      std::int64_t tokens,
                      bool own_heads) {
    const std::size_t k = at(static_cast<int>(kind));
    const int heads = own_heads ? 1 : c_.shape.kv_heads, first_head = own_heads ? dictionary : 0;
    const bool rotated = kind == Kind::kKeys && c_.set.key_stage == KeyStage::kPreRope;
    std::vector<OwnAtom>& own = layer.own[k][at(dictionary)];
    std::vector<float> x;
    std::vector<std::int32_t> positions;
    for (std::int64_t t = first; t < first + tokens; ++t)
      for (int h = 0; h < heads; ++h) {
        const auto& v = layer.tokens[at(t)].vectors[k][at(first_head + h)].exact;
        x.insert(x.end(), v.begin(), v.end());
        positions.push_back(static_cast<std::int32_t>(t));
      }
    const std::int64_t rows = tokens * heads;
    if (rotated) c_.rope.undo(l, x.data(), dim(), positions.data(), rows);
    std::vector<float> back(x.size());
    const Dictionary& base = *c_.set.find(l, kind, own_heads ? dictionary : Dictionary::kAllHeads);
    const auto code = [&](std::int64_t row, std::int64_t count) {
      Dictionary with_own = base;
      with_own.num_atoms += static_cast<int>(own.size());
      for (const OwnAtom& atom : own)
        with_own.atoms.insert(with_own.atoms.end(), atom.row.begin(), atom.row.end());
      EncodeOptions options;
      options.relative_tolerance = tolerance_.at({l, kind});
      options.selection = c_.options.selection;
      options.threads = 1;
      options.device = c_.options.device;
      const int head = static_cast<int>(row % heads);
      float* to = back.data() + row * dim();
      std::copy_n(x.begin() + row * dim(), count * dim(), to);
      base.transform.forward(to, count, dim(), head);
      options.max_atoms = base.format.max_atoms;
      Codec(with_own, options).reconstruct(to, count, to, head);
      base.transform.backward(to, count, dim(), head);
    };
    const auto error = [&](std::int64_t row) {
      double off = 0, norm = 0;
      for (std::int64_t i = row * dim(); i < (row + 1) * dim(); ++i) {
        const double v = static_cast<double>(x[at(i)]);
        off += (v - static_cast<double>(back[at(i)])) * (v - static_cast<double>(back[at(i)]));
        norm += v * v;
      }
      return std::isfinite(norm) && norm > 0 ? std::sqrt(off / norm) : 0.0;
    };
    code(0, rows);
    const std::size_t before = own.size();
    const auto threshold = static_cast<double>(c_.options.adaptive_threshold);
    for (std::int64_t row = 0; row < rows && c_.options.adaptive_atoms > 0; ++row) {
      if (error(row) <= threshold) continue;
      if (own.size() > before) code(row, 1);
      if (error(row) <= threshold || own.size() == at(c_.options.adaptive_atoms)) continue;
      std::vector<float> z(x.begin() + row * dim(), x.begin() + (row + 1) * dim());
      base.transform.forward(z.data(), 1, dim(), static_cast<int>(row % heads));
      double norm = 0;
      for (const float v : z) norm += static_cast<double>(v) * static_cast<double>(v);
      if (norm == 0) continue;
      for (float& v : z)
        v = detail::float_from_half(
            detail::half_from_float(static_cast<float>(static_cast<double>(v) / std::sqrt(norm))));
      own.push_back({z, first + row / heads});
      code(row, 1);
    }
    if (rotated) c_.rope.apply(l, back.data(), dim(), positions.data(), rows);
    for (std::int64_t row = 0; row < rows; ++row)
      layer.tokens[at(first + row / heads)].vectors[k][at(first_head + row % heads)].coded.assign(
          back.begin() + row * dim(), back.begin() + (row + 1) * dim());
  }

  CacheCase c_;
  std::map<std::pair<int, Kind>, float> tolerance_;
  int next_id_ = 1;
};

}  // namespace lexico
