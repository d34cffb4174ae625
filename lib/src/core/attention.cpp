// Dictionaries and codes as the attention kernel reads them.
#include "lexico/attention.h"

#include <Eigen/Dense>
#include <algorithm>
#include <bit>
#include <cmath>
#include <new>
#include <string>

#include "check.h"
#include "kernels/attention/attention.h"
#include "kernels/packing/packing.h"

namespace lexico {

using detail::throw_if_failed;
using detail::throw_invalid;

namespace {

using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Matrix = Eigen::Map<const RowMatrix>;

std::size_t size_of(std::int64_t a, std::int64_t b = 1, std::int64_t c = 1) {
  return static_cast<std::size_t>(a * b * c);
}

constexpr int kE4m3Bits = 8, kCountBits = 16, kInt16Bits = 16;

std::uint16_t half_from(float x) {
  const std::uint32_t word = std::bit_cast<std::uint32_t>(x);
  const std::uint16_t sign = static_cast<std::uint16_t>(word >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (magnitude < 0x1p-14f)  // subnormal: a multiple of 2^-24
    return static_cast<std::uint16_t>(sign | std::lrint(magnitude * 0x1p24f));
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(magnitude);
  const std::uint32_t rounded = (bits + 0xfff + (bits >> 13 & 1)) >> 13;  // to nearest even
  return static_cast<std::uint16_t>(sign | std::min(rounded - (112u << 10), 0x7bffu));
}

}  // namespace

// The keys, or the values: what the kernel wants, and how codes become planes.
struct CodedVectors::Frame {
  int kv_heads = 0, dim = 0, num_atoms = 0, page_tokens = 0;
  const CodeFormat* format = nullptr;  // sizes are those of every head
  std::size_t block_bytes = 0;

  std::vector<kernels::CodeLayout> layouts;               // one, or one per head
  std::vector<std::vector<float>> levels, scales;         // of each
  std::vector<std::vector<std::int32_t>> component_bits;  // of each
  std::vector<std::vector<float>> component_levels;
  std::vector<float> atoms, axes, mean, back_map;  // empty: the dictionary's own, or none
  std::vector<std::uint16_t> half_atoms;
  kernels::CodedSpace space;

  // Fields of a record, as Codec writes it.
  std::vector<std::vector<std::uint8_t>> widths;  // of each layout
  int num_fields = 0, record_bytes = 0;

  const kernels::CodeLayout& layout(int head) const {
    return layouts[layouts.size() > 1 ? size_of(head) : 0];
  }
  std::size_t page_bytes() const {
    return size_of(kv_heads, page_tokens / kernels::kBlockTokens) * block_bytes +
           kernels::kPageSlack;
  }

  Frame(const std::vector<const Dictionary*>& dictionaries,
        const AttentionOptions& options,
        bool fold_map,
        bool half);
  void add_layout(const Dictionary& dictionary, int group);
};

void CodedVectors::Frame::add_layout(const Dictionary& dictionary, int group) {
  const CodeFormat& f = dictionary.format;
  const bool packed = f.coding == CodeFormat::Coding::kPacked;
  kernels::CodeLayout layout;
  layout.slots = f.max_atoms;
  layout.index_bits = index_bits(num_atoms);
  layout.weights = packed ? kernels::CodedWeights::kLevels : kernels::CodedWeights::kE4m3;
  std::vector<std::uint8_t> width;
  const auto add = [&](int count, int bits) {
    width.insert(width.end(), size_of(count), static_cast<std::uint8_t>(bits));
  };
  levels.push_back(f.weight_levels);
  scales.emplace_back();
  component_bits.emplace_back();
  component_levels.emplace_back();
  if (!packed) {
    add(1, kCountBits), add(f.max_atoms, kInt16Bits), add(f.max_atoms, kE4m3Bits);
  } else {
    layout.weight_bits = f.weight_bits;
    layout.scale_bits = f.scale_bits;
    for (int k = 0; k < 1 << f.scale_bits && f.scale_bits > 0; ++k)
      scales.back().push_back(std::exp2(f.scale_low + f.scale_step * static_cast<float>(k)));
    add(1, f.scale_bits), add(f.max_atoms, layout.index_bits), add(f.max_atoms, f.weight_bits);
    const ResidualCode& r = f.residual;
    layout.relative = r.relative;
    layout.components = r.groups > 0 ? dim : 0;
    std::size_t level = 0;
    for (int g = 0; g < r.groups; ++g) {
      for (int c = 0; c < dim; ++c) {
        const int bits = r.bits[size_of(g, dim) + size_of(c)];
        const std::size_t count = size_of(r.num_levels(bits));
        if (g == group) {
          component_bits.back().push_back(bits);
          if (bits > 0) add(1, bits);
          component_levels.back().insert(
              component_levels.back().end(),
              r.levels.begin() + static_cast<std::ptrdiff_t>(level),
              r.levels.begin() + static_cast<std::ptrdiff_t>(level + count));
        }
        level += count;
      }
    }
  }
  widths.push_back(width);
  layouts.push_back(layout);
}

CodedVectors::Frame::Frame(const std::vector<const Dictionary*>& dictionaries,
                           const AttentionOptions& options,
                           bool fold_map,
                           bool half)
    : kv_heads(options.kv_heads), page_tokens(options.page_tokens) {
  const Dictionary& first = *dictionaries.front();
  const std::string what = name_of(first.kind);
  if (dictionaries.size() != 1 && dictionaries.size() != size_of(kv_heads))
    throw_invalid(
        what, ": ", dictionaries.size(), " dictionaries, must be 1 or kv_heads = ", kv_heads);
  dim = first.dim;
  num_atoms = first.num_atoms;
  format = &first.format;
  const bool own = dictionaries.size() > 1;
  bool residual_heads = false;
  for (const Dictionary* d : dictionaries) {
    if (d->dim != dim || d->num_atoms != num_atoms)
      throw_invalid(what,
                    ": dictionaries of ",
                    d->num_atoms,
                    " atoms of dimension ",
                    d->dim,
                    " and of ",
                    num_atoms,
                    " of dimension ",
                    dim,
                    " in one layer");
    if (d->dim % 4 != 0) throw_invalid(what, ": dim is ", d->dim, ", must be a multiple of 4");
    d->format.validate(d->num_atoms, d->dim);
    if (d->format.coding == CodeFormat::Coding::kExact)
      throw_invalid(what, ": codes in the format exact have no bytes to attend on");
    if (d->format.coding != format->coding ||
        d->format.bits_per_vector(num_atoms, dim) != format->bits_per_vector(num_atoms, dim))
      throw_invalid(what, ": the codes of KV heads differ in size");
    if (d->format.residual.states > 0)
      throw_invalid(what,
                    ": residual.states is ",
                    d->format.residual.states,
                    ", attention reads scalar residual codes only");
    const int groups = d->format.residual.groups;
    if (groups > 1 && (own || groups != kv_heads))
      throw_invalid(what, ": residual.groups is ", groups, ", must be 1 or kv_heads = ", kv_heads);
    residual_heads = residual_heads || groups > 1 || (own && groups > 0);
    const int heads = d->transform.heads;
    if (!d->transform.is_identity() && heads != 1 && heads != kv_heads)
      throw_invalid(what, ": transform.heads is ", heads, ", must be kv_heads = ", kv_heads);
  }
  const auto of_head = [&](int h) -> const Dictionary& {
    return *dictionaries[own ? size_of(h) : 0];
  };
  for (int h = 0; h < (own || residual_heads ? kv_heads : 1); ++h)
    add_layout(of_head(h), own ? 0 : h);
  for (std::size_t i = 0; i < layouts.size(); ++i) {
    layouts[i].levels = levels[i].data();
    layouts[i].scales = scales[i].data();
    layouts[i].component_bits = component_bits[i].data();
    layouts[i].component_levels = component_levels[i].data();
    num_fields = std::max(num_fields, static_cast<int>(widths[i].size()));
  }
  for (auto& width : widths) width.resize(size_of(num_fields));
  record_bytes = format->bytes_per_vector(num_atoms, dim);
  block_bytes = kernels::block_bytes(layouts.front());

  // Means of heads, with what the residual code adds; maps.
  const std::size_t square = size_of(dim, dim);
  bool has_mean = false, has_map = false;
  for (const Dictionary* d : dictionaries) {
    has_mean = has_mean || !d->transform.mean.empty() || d->format.residual.groups > 0;
    has_map = has_map || !d->transform.back_map.empty();
  }
  if (has_mean) mean.assign(size_of(kv_heads, dim), 0.0f);
  if (has_map) back_map.assign(size_of(kv_heads) * square, 0.0f);
  for (int h = 0; h < kv_heads; ++h) {
    const Dictionary& d = of_head(h);
    const Transform& t = d.transform;
    const std::size_t of = size_of(h % t.heads);
    if (has_map) {
      float* map = back_map.data() + size_of(h) * square;
      if (t.back_map.empty())
        for (int i = 0; i < dim; ++i) map[i * dim + i] = 1;
      else
        std::copy_n(t.back_map.data() + of * square, square, map);
    }
    if (!has_mean) continue;
    Eigen::Map<Eigen::VectorXf> to(mean.data() + size_of(h, dim), dim);
    if (d.format.residual.groups > 0) {
      const int group = own ? 0 : h % d.format.residual.groups;
      const Eigen::Map<const Eigen::VectorXf> m(d.format.residual.mean.data() + size_of(group, dim),
                                                dim);
      to = has_map ? (Matrix(back_map.data() + size_of(h) * square, dim, dim) * m).eval() : m;
    }
    if (!t.mean.empty())
      to += Eigen::Map<const Eigen::VectorXf>(t.mean.data() + of * size_of(dim), dim);
  }

  // Atoms and axes: the dictionary's own, or a copy per head.
  const auto times_map = [&](const float* rows, int count, int h, std::vector<float>& to) {
    const std::size_t at = to.size();
    to.resize(at + size_of(count, dim));
    Eigen::Map<RowMatrix> out(to.data() + at, count, dim);
    if (fold_map && has_map)
      out.noalias() = Matrix(rows, count, dim) *
                      Matrix(back_map.data() + size_of(h) * square, dim, dim).transpose();
    else
      out = Matrix(rows, count, dim);
  };
  const bool copies = own || (fold_map && has_map);
  for (int h = 0; h < kv_heads && copies; ++h)
    times_map(of_head(h).atoms.data(), num_atoms, h, atoms);
  const bool has_residual = first.format.residual.groups > 0;
  const bool axes_of_heads = copies || residual_heads;
  for (int h = 0; h < (axes_of_heads ? kv_heads : 1) && has_residual; ++h) {
    const ResidualCode& r = of_head(h).format.residual;
    times_map(r.axes.data() + (own ? 0 : size_of(h % r.groups)) * square, dim, h, axes);
  }
  space.layout = layouts.data();
  space.layout_stride = layouts.size() > 1 ? 1 : 0;
  space.num_atoms = num_atoms;
  space.atoms = copies ? atoms.data() : first.atoms.data();
  space.atoms_stride = copies ? std::int64_t{num_atoms} * dim : 0;
  space.axes = axes.data();
  space.axes_stride = axes_of_heads ? std::int64_t{dim} * dim : 0;
  space.mean = has_mean ? mean.data() : nullptr;
  space.back_map = has_map && !fold_map ? back_map.data() : nullptr;
  if (half) {
    half_atoms.resize(size_of(copies ? kv_heads : 1, num_atoms, dim));
    std::transform(space.atoms, space.atoms + half_atoms.size(), half_atoms.begin(), half_from);
    space.half_atoms = half_atoms.data();
  }
}

std::size_t CodedVectors::bytes() const { return pages_.size() * frame_->page_bytes(); }

std::uint8_t* CodedVectors::page_to_write(std::size_t index) {
  if (index == pages_.size())
    pages_.push_back(std::make_shared<std::vector<std::uint8_t>>(frame_->page_bytes()));
  std::shared_ptr<std::vector<std::uint8_t>>& page = pages_[index];
  if (page.use_count() > 1) page = std::make_shared<std::vector<std::uint8_t>>(*page);
  return page->data();
}

void CodedVectors::append(const std::uint8_t* codes, std::int64_t tokens) {
  const Frame& f = *frame_;
  const bool packed = f.format->coding == CodeFormat::Coding::kPacked;
  const std::int64_t blocks = f.page_tokens / kernels::kBlockTokens;
  std::vector<std::uint32_t> record(size_of(f.num_fields)), components(size_of(f.dim));
  for (std::int64_t t = 0; t < tokens; ++t, ++tokens_) {
    std::uint8_t* page = page_to_write(size_of(tokens_ / f.page_tokens));
    const std::int64_t block = tokens_ % f.page_tokens / kernels::kBlockTokens;
    for (int h = 0; h < f.kv_heads; ++h) {
      const kernels::CodeLayout& layout = f.layout(h);
      const std::size_t of = f.layouts.size() > 1 ? size_of(h) : 0;
      const kernels::RecordLayout fields{f.num_fields, f.record_bytes, f.widths[of].data()};
      throw_if_failed(kernels::cpu::unpack_fields(
                          fields, codes + (t * f.kv_heads + h) * f.record_bytes, 1, record.data()),
                      "unpacking codes");
      std::uint32_t* atoms = record.data() + 1;
      std::uint32_t* weights = atoms + layout.slots;
      const std::uint32_t used = packed ? static_cast<std::uint32_t>(layout.slots) : record[0];
      for (int k = 0; k < layout.slots; ++k) {
        const bool is_nan = !packed && (weights[k] & 0x7f) == 0x7f;
        if (static_cast<std::uint32_t>(k) < used && !is_nan &&
            atoms[k] < static_cast<std::uint32_t>(f.num_atoms))
          continue;
        atoms[k] = 0;
        weights[k] = 0;
        if (packed) {
          const float* levels = layout.levels + (size_of(k) << layout.weight_bits);
          weights[k] = static_cast<std::uint32_t>(
              std::find(levels, levels + (1 << layout.weight_bits), 0.0f) - levels);
        }
      }
      const std::uint32_t* coded = weights + layout.slots;
      for (int c = 0; c < layout.components; ++c) {
        if (layout.component_bits[c] > 0) components[size_of(c)] = *coded++;
      }
      kernels::write_fields(layout,
                            page + size_of(h * blocks + block) * f.block_bytes,
                            static_cast<int>(tokens_ % kernels::kBlockTokens),
                            {atoms, weights, record[0], components.data()});
    }
  }
}

void CodedVectors::truncate(std::int64_t tokens) {
  if (tokens < 0 || tokens > tokens_)
    throw_invalid("tokens to keep are ", tokens, ", must be in [0, ", tokens_, "]");
  tokens_ = tokens;
  pages_.resize(size_of((tokens + frame_->page_tokens - 1) / frame_->page_tokens));
}

struct LayerAttention::Impl {
  AttentionOptions options;
  std::shared_ptr<const CodedVectors::Frame> keys, values;
  std::vector<float> frequencies;
  kernels::KeyRotation rotation;
  bool rotates = false;
};

LayerAttention::LayerAttention(std::vector<const Dictionary*> keys,
                               std::vector<const Dictionary*> values,
                               const AttentionOptions& options,
                               KeyStage stage,
                               const Rope& rope)
    : impl_(std::make_unique<Impl>()) {
  if (options.kv_heads < 1) throw_invalid("kv_heads is ", options.kv_heads, ", must be >= 1");
  if (options.group < 1) throw_invalid("group is ", options.group, ", must be >= 1");
  if (options.threads < 0) throw_invalid("threads is ", options.threads, ", must be >= 0");
  if (options.page_tokens < kernels::kBlockTokens ||
      options.page_tokens % kernels::kBlockTokens != 0)
    throw_invalid(
        "page_tokens is ", options.page_tokens, ", must be a multiple of ", kernels::kBlockTokens);
  if (keys.empty() || values.empty())
    throw_invalid(keys.empty() ? "keys" : "values", ": no dictionary");
  Impl& impl = *impl_;
  impl.options = options;
  impl.rotates = stage == KeyStage::kPreRope && rope.rotates();
  impl.keys = std::make_shared<CodedVectors::Frame>(
      keys, options, impl.rotates, impl.rotates && options.half_keys);
  impl.values = std::make_shared<CodedVectors::Frame>(values, options, false, false);
  if (impl.keys->dim != impl.values->dim)
    throw_invalid(
        "keys have dim ", impl.keys->dim, ", values ", impl.values->dim, ", must be equal");
  if (!(options.softmax_scale > 0))
    impl.options.softmax_scale = 1 / std::sqrt(static_cast<float>(impl.keys->dim));
  if (!impl.rotates) return;
  if (rope.layout != "half")
    throw_invalid("rope: layout is '", rope.layout, "', attention on keys before RoPE knows half");
  const int layer = keys.front()->layer;
  const bool own = !rope.layer_inverse_frequencies.empty();
  if (own && (layer < 0 || layer >= static_cast<int>(rope.layer_inverse_frequencies.size())))
    throw_invalid(
        "rope: layer is ", layer, ", must be in [0, ", rope.layer_inverse_frequencies.size(), ")");
  for (const double f :
       own ? rope.layer_inverse_frequencies[size_of(layer)] : rope.inverse_frequencies)
    impl.frequencies.push_back(static_cast<float>(f));
  if (size_of(rope.rotary_dim) != 2 * impl.frequencies.size() || rope.rotary_dim > impl.keys->dim)
    throw_invalid("rope: rotary_dim is ",
                  rope.rotary_dim,
                  " with ",
                  impl.frequencies.size(),
                  " frequencies, of dim ",
                  impl.keys->dim);
  impl.rotation = {
      rope.rotary_dim, impl.frequencies.data(), static_cast<float>(rope.attention_scaling)};
}

LayerAttention::~LayerAttention() = default;

CodedVectors LayerAttention::coded_keys() const { return CodedVectors(impl_->keys); }
CodedVectors LayerAttention::coded_values() const { return CodedVectors(impl_->values); }

void LayerAttention::attend(const std::vector<Sequence>& sequences,
                            const float* queries,
                            float* out,
                            AttentionScratch& scratch,
                            float* log_sums) const {
  const Impl& impl = *impl_;
  const std::size_t count = sequences.size();
  std::vector<kernels::AttentionSequence> coded(count);
  std::vector<std::vector<const std::uint8_t*>> pages(2 * count);
  std::vector<std::vector<kernels::ExactRun>> exact(count);
  for (std::size_t i = 0; i < count; ++i) {
    const Sequence& s = sequences[i];
    if (s.keys == nullptr || s.values == nullptr || s.keys->frame_ != impl.keys ||
        s.values->frame_ != impl.values)
      throw_invalid("sequence ", i, ": its keys or values are not of this layer");
    if (s.keys->tokens() != s.values->tokens())
      throw_invalid("sequence ",
                    i,
                    ": ",
                    s.keys->tokens(),
                    " coded keys, ",
                    s.values->tokens(),
                    " coded values, must be equal");
    if (s.first_position < 0 || s.first_position + s.keys->tokens() > 1 << 24)
      throw_invalid(
          "sequence ", i, ": positions from ", s.first_position, " on, must be in [0, 2^24)");
    for (const auto& page : s.keys->pages_) pages[2 * i].push_back(page->data());
    for (const auto& page : s.values->pages_) pages[2 * i + 1].push_back(page->data());
    for (const ExactTokens& run : s.exact) {
      if (run.tokens < 0)
        throw_invalid("sequence ", i, ": ", run.tokens, " exact tokens, must be >= 0");
      exact[i].push_back({run.keys, run.values, run.head_stride, run.tokens});
    }
    coded[i].coded_tokens = s.keys->tokens();
    coded[i].keys.pages = pages[2 * i].data();
    coded[i].values.pages = pages[2 * i + 1].data();
    coded[i].first_position = s.first_position;
    coded[i].exact = exact[i].data();
    coded[i].num_exact = static_cast<int>(exact[i].size());
  }
  kernels::AttentionProblem p;
  p.batch = static_cast<int>(count);
  p.kv_heads = impl.options.kv_heads;
  p.group = impl.options.group;
  p.dim = impl.keys->dim;
  p.softmax_scale = impl.options.softmax_scale;
  p.keys = impl.keys->space;
  p.values = impl.values->space;
  p.rotation = impl.rotates ? &impl.rotation : nullptr;
  p.page_tokens = impl.options.page_tokens;
  p.sequences = coded.data();
  p.queries = queries;
  p.out = out;
  p.log_sums = log_sums;
  p.threads = impl.options.threads;
  const std::size_t bytes = kernels::cpu::attention_workspace_bytes(p);
  try {
    if (scratch.memory.size() < bytes) scratch.memory.resize(bytes);
  } catch (const std::bad_alloc&) {
    throw ResourceError("attention: no memory for " + std::to_string(bytes) + " bytes of scratch");
  }
  throw_if_failed(kernels::cpu::attention(p, scratch.memory.data()), "attention");
}

}  // namespace lexico
