// Dictionaries and codes as the attention kernel reads them.
#include "lexico/attention.h"

#include <omp.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <new>
#include <string>

#include "check.h"
#include "core/attention_impl.h"
#include "core/half.h"
#include "core/size_of.h"
#include "core/trellis.h"

namespace lexico {

using detail::size_of;
using detail::throw_if_failed;
using detail::throw_invalid;

namespace {

using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Matrix = Eigen::Map<const RowMatrix>;

constexpr int kE4m3Bits = 8, kCountBits = 16, kInt16Bits = 16;

}  // namespace

void CodedVectors::Frame::add_layout(const Dictionary& dictionary, int group) {
  const CodeFormat& f = dictionary.format;
  kernels::CodeLayout layout;
  layout.slots = f.max_atoms;
  layout.index_bits = index_bits(num_atoms + own_atoms);
  layout.weights = is_packed()  ? kernels::CodedWeights::kLevels
                   : is_exact() ? kernels::CodedWeights::kFloat32
                                : kernels::CodedWeights::kE4m3;
  std::vector<std::uint8_t> width;
  const auto add = [&](int count, int bits) {
    width.insert(width.end(), size_of(count), static_cast<std::uint8_t>(bits));
  };
  levels.push_back(f.weight_levels);
  scales.emplace_back();
  component_bits.emplace_back();
  component_levels.emplace_back();
  if (is_exact()) {
    add(1 + 2 * f.max_atoms, 0);  // its records are no bit fields
  } else if (!is_packed()) {
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
    if (r.states > 0) {
      const detail::Trellis trellis(r.states);
      layout.trellis = {trellis.high_mask(), trellis.low_mask()};
    }
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
    : kv_heads(options.kv_heads), page_tokens(options.page_tokens), own_atoms(options.own_atoms) {
  const Dictionary& first = *dictionaries.front();
  const std::string what = name_of(first.kind);
  if (dictionaries.size() != 1 && dictionaries.size() != size_of(kv_heads))
    throw_invalid(
        what, ": ", dictionaries.size(), " dictionaries, must be 1 or kv_heads = ", kv_heads);
  dim = first.dim;
  num_atoms = first.num_atoms;
  format = &first.format;
  const bool own = dictionaries.size() > 1;
  num_dictionaries = static_cast<int>(dictionaries.size());
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
    if (d->format.coding == CodeFormat::Coding::kExact && d->format.max_atoms < 1)
      throw_invalid(
          what, ": the format is exact and max_atoms ", d->format.max_atoms, ", must be >= 1");
    if (d->format.coding == CodeFormat::Coding::kFp8Int16 && num_atoms + own_atoms > 1 << 15)
      throw_invalid(what,
                    ": ",
                    num_atoms,
                    " atoms and own_atoms = ",
                    own_atoms,
                    ", fp8-int16 has indices below ",
                    1 << 15);
    if (d->format.coding != format->coding ||
        d->format.bits_per_vector(num_atoms, dim) != format->bits_per_vector(num_atoms, dim))
      throw_invalid(what, ": the codes of KV heads differ in size");
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
  record_bytes = format->bytes_per_vector(num_atoms + own_atoms, dim);
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
  folds = fold_map && has_map;
  const bool copies = own || folds;
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
    std::transform(
        space.atoms, space.atoms + half_atoms.size(), half_atoms.begin(), detail::half_from_float);
    space.half_atoms = half_atoms.data();
  }
}

// Where codes of values have that form.
void CodedVectors::Frame::take_tiles(int tokens) {
  const bool fit = std::all_of(layouts.begin(), layouts.end(), [&](const auto& of) {
    return kernels::value_tiles_fit(of, tokens, num_atoms + own_atoms);
  });
  tile_tokens = tokens > 0 && fit ? tokens : 0;
}

void CodedVectors::Frame::unpack(const std::uint8_t* records,
                                 std::int64_t tokens,
                                 std::uint32_t* fields) const {
  if (is_exact()) {
    const std::size_t words = size_of(2 * format->max_atoms);
    for (std::int64_t row = 0; row < tokens * kv_heads; ++row) {
      std::uint32_t* to = fields + row * num_fields;
      to[0] = 0;
      std::memcpy(to + 1, records + row * record_bytes, words * sizeof *to);
    }
    return;
  }
  for (int h = 0; h < kv_heads; ++h)
    throw_if_failed(
        kernels::cpu::unpack_fields(
            record_layout(h), records + h * record_bytes, tokens, fields + h * num_fields),
        "unpacking codes");
}

void CodedVectors::Frame::pack(const std::uint32_t* fields,
                               std::int64_t tokens,
                               std::uint8_t* records) const {
  if (is_exact()) {
    const std::size_t words = size_of(2 * format->max_atoms);
    for (std::int64_t row = 0; row < tokens * kv_heads; ++row)
      std::memcpy(
          records + row * record_bytes, fields + row * num_fields + 1, words * sizeof *fields);
    return;
  }
  for (int h = 0; h < kv_heads; ++h)
    throw_if_failed(
        kernels::cpu::pack_fields(
            record_layout(h), fields + h * num_fields, tokens, records + h * record_bytes),
        "packing codes");
}

void CodedVectors::Frame::correct(int head,
                                  std::uint32_t num_atoms_and_own,
                                  std::uint32_t* fields) const {
  const kernels::CodeLayout& of = layout(head);
  std::uint32_t* atom = fields + 1;
  std::uint32_t* weight = atom + of.slots;
  const std::uint32_t used =
      is_packed() || is_exact() ? static_cast<std::uint32_t>(of.slots) : fields[0];
  for (int k = 0; k < of.slots; ++k) {
    const bool is_number = is_packed()  ? true
                           : is_exact() ? (weight[k] & 0x7f800000u) != 0x7f800000u
                                        : (weight[k] & 0x7f) != 0x7f;
    if (static_cast<std::uint32_t>(k) < used && is_number && atom[k] < num_atoms_and_own) continue;
    atom[k] = 0;
    weight[k] = 0;
    if (is_packed()) {
      const float* levels_of_slot = of.levels + (size_of(k) << of.weight_bits);
      weight[k] = static_cast<std::uint32_t>(
          std::find(levels_of_slot, levels_of_slot + (1 << of.weight_bits), 0.0f) - levels_of_slot);
    }
  }
}

kernels::CodedRun CodedVectors::Frame::run_of(const std::vector<std::vector<std::uint16_t>>& own,
                                              std::vector<float>& memory) const {
  kernels::CodedRun run;
  std::size_t most = 0;
  for (const auto& rows : own) most = std::max(most, rows.size());
  if (most == 0) return run;
  run.num_extra = static_cast<int>(most / size_of(dim));
  const bool of_heads = folds || num_dictionaries > 1;
  const std::size_t first = memory.size();
  memory.resize(first + most * size_of(of_heads ? kv_heads : 1), 0.0f);
  for (int h = 0; h < (of_heads ? kv_heads : 1); ++h) {
    const auto& rows = own[size_of(dictionary_of(h))];
    float* to = memory.data() + first + size_of(h) * most;
    std::transform(rows.begin(), rows.end(), to, detail::float_from_half);
    if (!folds) continue;
    Eigen::Map<RowMatrix> atoms_of_head(to, run.num_extra, dim);
    const Matrix map(back_map.data() + size_of(h) * size_of(dim, dim), dim, dim);
    atoms_of_head = (atoms_of_head * map.transpose()).eval();
  }
  run.extra_stride = of_heads ? static_cast<std::int64_t>(most) : 0;
  return run;
}

CodedVectors::CodedVectors(std::shared_ptr<const Frame> frame)
    : frame_(std::move(frame)), own_(size_of(frame_->num_dictionaries)) {}

int CodedVectors::record_bytes() const { return frame_->record_bytes; }

std::size_t CodedVectors::bytes() const {
  std::size_t sum = pages_.size() * frame_->page_bytes();
  for (const auto& rows : own_) sum += rows.size() * sizeof(std::uint16_t);
  return sum;
}

std::size_t CodedVectors::bytes_for(std::int64_t tokens) const {
  return frame_->pages_for(tokens) * frame_->page_bytes();
}

std::size_t CodedVectors::dim() const { return size_of(frame_->dim); }

void CodedVectors::for_each_page(
    const std::function<void(const void* address, std::size_t bytes)>& visit) const {
  for (const auto& page : pages_) visit(page->data(), page->size());
}

void CodedVectors::pages_to_write(std::int64_t first, std::int64_t tokens) {
  const Frame& f = *frame_;
  for (std::size_t index = size_of(first / f.page_tokens); index < f.pages_for(first + tokens);
       ++index) {
    if (index == pages_.size())
      pages_.push_back(std::make_shared<detail::MirroredBytes>(
          size_of(f.kv_heads), size_of(f.blocks()) * f.block_bytes, kernels::kPageSlack));
    std::shared_ptr<detail::MirroredBytes>& page = pages_[index];
    if (page.use_count() > 1) page = std::make_shared<detail::MirroredBytes>(*page);
    const std::int64_t start = static_cast<std::int64_t>(index) * f.page_tokens;
    const std::int64_t from = std::max<std::int64_t>(first - start, 0);
    const std::int64_t to = std::min<std::int64_t>(first + tokens - start, f.page_tokens);
    page->touch(size_of(from / kernels::kBlockTokens) * f.block_bytes,
                size_of((to + kernels::kBlockTokens - 1) / kernels::kBlockTokens) * f.block_bytes);
  }
}

void CodedVectors::append(const std::uint8_t* records, std::int64_t tokens) {
  if (tokens <= 0) return;
  const Frame& f = *frame_;
  constexpr std::int64_t kPiece = 64;  // tokens
  std::vector<std::uint32_t> fields(
      size_of(std::min(kPiece, tokens), f.kv_heads, std::max(f.num_fields, 1)));
  std::vector<std::uint32_t> components(size_of(f.dim));
  const std::size_t pages_before = pages_.size();
  try {
    pages_to_write(tokens_, tokens);
  } catch (...) {
    pages_.resize(pages_before);
    throw;
  }
  for (std::int64_t done = 0; done < tokens; done += kPiece) {
    const std::int64_t count = std::min(kPiece, tokens - done);
    f.unpack(records + done * f.kv_heads * f.record_bytes, count, fields.data());
    for (int h = 0; h < f.kv_heads; ++h) {
      const kernels::CodeLayout& layout = f.layout(h);
      const auto num_atoms =
          static_cast<std::uint32_t>(f.num_atoms + own_atoms(f.dictionary_of(h)));
      for (std::int64_t t = 0; t < count; ++t) {
        std::uint32_t* of = fields.data() + (t * f.kv_heads + h) * f.num_fields;
        f.correct(h, num_atoms, of);
        const std::uint32_t* coded = of + 1 + 2 * layout.slots;
        for (int c = 0; c < layout.components; ++c) {
          if (layout.component_bits[c] > 0) components[size_of(c)] = *coded++;
        }
        const std::int64_t at = tokens_ + done + t;
        const std::int64_t block = at % f.page_tokens / kernels::kBlockTokens;
        kernels::write_fields(layout,
                              pages_[size_of(at / f.page_tokens)]->data() +
                                  size_of(h * f.blocks() + block) * f.block_bytes,
                              static_cast<int>(at % kernels::kBlockTokens),
                              {of + 1, of + 1 + layout.slots, of[0], components.data()});
      }
    }
  }
  tokens_ += tokens;
}

void CodedVectors::read(std::int64_t first, std::int64_t tokens, std::uint8_t* records) const {
  if (first < 0 || tokens < 0 || first > tokens_ - tokens)
    throw_invalid("tokens ", first, " to ", first + tokens, " of ", tokens_);
  const Frame& f = *frame_;
  constexpr std::int64_t kPiece = 64;
  std::vector<std::uint32_t> fields(size_of(kPiece, f.kv_heads, std::max(f.num_fields, 1)));
  std::vector<std::uint32_t> components(size_of(f.dim));
  for (std::int64_t done = 0; done < tokens; done += kPiece) {
    const std::int64_t count = std::min(kPiece, tokens - done);
    for (int h = 0; h < f.kv_heads; ++h) {
      const kernels::CodeLayout& layout = f.layout(h);
      for (std::int64_t t = 0; t < count; ++t) {
        const std::int64_t at = first + done + t;
        const std::int64_t block = at % f.page_tokens / kernels::kBlockTokens;
        std::uint32_t* to = fields.data() + (t * f.kv_heads + h) * f.num_fields;
        kernels::CodedFields of{to + 1, to + 1 + layout.slots, 0, components.data()};
        kernels::read_fields(layout,
                             pages_[size_of(at / f.page_tokens)]->data() +
                                 size_of(h * f.blocks() + block) * f.block_bytes,
                             static_cast<int>(at % kernels::kBlockTokens),
                             of);
        to[0] = of.scale;
        if (!f.is_packed()) {  // slots up to the last with a weight
          to[0] = static_cast<std::uint32_t>(layout.slots);
          while (to[0] > 0 && of.weights[to[0] - 1] == 0) --to[0];
        }
        std::uint32_t* coded = to + 1 + 2 * layout.slots;
        for (int c = 0; c < layout.components; ++c) {
          if (layout.component_bits[c] > 0) *coded++ = components[size_of(c)];
        }
      }
    }
    f.pack(fields.data(), count, records + done * f.kv_heads * f.record_bytes);
  }
}

void CodedVectors::truncate(std::int64_t tokens) {
  if (tokens < 0 || tokens > tokens_)
    throw_invalid("tokens to keep are ", tokens, ", must be in [0, ", tokens_, "]");
  tokens_ = tokens;
  pages_.resize(frame_->pages_for(tokens));
  if (frame_->tile_tokens > 0)
    tiles_.resize(std::min(tiles_.size(), size_of(tokens / frame_->tile_tokens)));
}

void CodedVectors::add_atom(const float* atom, int dictionary) {
  if (own_atoms(dictionary) >= frame_->own_atoms)
    throw_invalid("a sequence has ", own_atoms(dictionary), " own atoms, no more may join");
  std::vector<std::uint16_t>& rows = own_[size_of(dictionary)];
  rows.reserve(rows.size() + dim());
  std::transform(atom, atom + dim(), std::back_inserter(rows), detail::half_from_float);
}

std::vector<float> CodedVectors::own_atom_rows(int dictionary) const {
  const std::vector<std::uint16_t>& rows = own_[size_of(dictionary)];
  std::vector<float> out(rows.size());
  std::transform(rows.begin(), rows.end(), out.begin(), detail::float_from_half);
  return out;
}

void CodedVectors::drop_atoms(int keep, int dictionary) {
  std::vector<std::uint16_t>& rows = own_[size_of(dictionary)];
  rows.resize(std::min(rows.size(), size_of(keep) * dim()));
}

void LayerAttention::Impl::set_rotation(const Rope& rope, int layer) {
  if (rope.layout != "half" && rope.layout != "interleaved")
    throw_invalid("rope: layout is '", rope.layout, "', must be half or interleaved");
  const bool own = !rope.layer_inverse_frequencies.empty();
  if (own && (layer < 0 || layer >= static_cast<int>(rope.layer_inverse_frequencies.size())))
    throw_invalid(
        "rope: layer is ", layer, ", must be in [0, ", rope.layer_inverse_frequencies.size(), ")");
  for (const double f :
       own ? rope.layer_inverse_frequencies[size_of(layer)] : rope.inverse_frequencies)
    frequencies.push_back(static_cast<float>(f));
  if (size_of(rope.rotary_dim) != 2 * frequencies.size() || rope.rotary_dim > keys->dim)
    throw_invalid("rope: rotary_dim is ",
                  rope.rotary_dim,
                  " with ",
                  frequencies.size(),
                  " frequencies, of dim ",
                  keys->dim);
  rotation = {rope.rotary_dim,
              rope.layout == "interleaved",
              frequencies.data(),
              static_cast<float>(rope.attention_scaling)};
}

LayerAttention::LayerAttention(std::vector<const Dictionary*> keys,
                               std::vector<const Dictionary*> values,
                               const AttentionOptions& options,
                               KeyStage stage,
                               const Rope& rope)
    : impl_(std::make_unique<Impl>()) {
  if (options.kv_heads < 1) throw_invalid("kv_heads is ", options.kv_heads, ", must be >= 1");
  if (options.group < 1) throw_invalid("group is ", options.group, ", must be >= 1");
  if (options.own_atoms < 0 || options.own_atoms > 1 << 20)
    throw_invalid("own_atoms is ", options.own_atoms, ", must be in [0, ", 1 << 20, "]");
  if (options.threads < 0) throw_invalid("threads is ", options.threads, ", must be >= 0");
  if (options.page_tokens < kernels::kBlockTokens ||
      options.page_tokens % kernels::kBlockTokens != 0)
    throw_invalid(
        "page_tokens is ", options.page_tokens, ", must be a multiple of ", kernels::kBlockTokens);
  if (options.value_tile_tokens < 0 || options.value_tile_tokens > kernels::kMostTileTokens ||
      options.value_tile_tokens % kernels::kBlockTokens != 0)
    throw_invalid("value_tile_tokens is ",
                  options.value_tile_tokens,
                  ", must be a multiple of ",
                  kernels::kBlockTokens,
                  " in [0, ",
                  kernels::kMostTileTokens,
                  "]");
  if (keys.empty() || values.empty())
    throw_invalid(keys.empty() ? "keys" : "values", ": no dictionary");
  Impl& impl = *impl_;
  impl.options = options;
  impl.rotates = stage == KeyStage::kPreRope && rope.rotates();
  const int device = options.device == "cpu" ? -1 : detail::device_of(options.device);
  impl.keys = std::make_shared<CodedVectors::Frame>(
      keys, options, impl.rotates, impl.rotates && options.half_keys);
  const auto of_values = std::make_shared<CodedVectors::Frame>(values, options, false, false);
  if (device >= 0) of_values->take_tiles(options.value_tile_tokens);
  impl.values = of_values;
  if (impl.keys->dim != impl.values->dim)
    throw_invalid(
        "keys have dim ", impl.keys->dim, ", values ", impl.values->dim, ", must be equal");
  if (!(options.softmax_scale > 0))
    impl.options.softmax_scale = 1 / std::sqrt(static_cast<float>(impl.keys->dim));
  if (impl.rotates) impl.set_rotation(rope, keys.front()->layer);
  if (device >= 0)
    impl.device = std::make_unique<detail::DeviceAttention>(
        device, impl.problem(), impl.keys->layouts.size(), impl.values->layouts.size(), options);
}

LayerAttention::~LayerAttention() = default;

CodedVectors LayerAttention::coded_keys() const { return CodedVectors(impl_->keys); }
CodedVectors LayerAttention::coded_values() const { return CodedVectors(impl_->values); }

void detail::AttentionCall::point_to(const std::uint8_t* const* its_pages,
                                     const std::uint8_t* const* its_tiles,
                                     const kernels::ExactRun* its_exact,
                                     const std::int64_t* its_left_out,
                                     const float* its_own) {
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    kernels::AttentionSequence& s = sequences[i];
    std::size_t at = 2 * i;
    for (kernels::CodedRun* run : {&s.keys, &s.values}) {
      run->pages = its_pages;
      its_pages += num_pages[at];
      run->extra_atoms = its_own;
      its_own += num_own[at++];
    }
    s.values.tiles = its_tiles;
    its_tiles += s.values.num_tiles;
    s.exact = its_exact;
    its_exact += s.num_exact;
    s.left_out = its_left_out;
    its_left_out += s.num_left_out;
  }
}

// Pages that were on the device before their tile was full.
void CodedVectors::drop_copies_in_tiles() const {
  const std::size_t tokens = tiles_.size() * size_of(frame_->tile_tokens);
  const std::size_t count = tokens / size_of(frame_->page_tokens);
  for (std::size_t i = 0; i < count; ++i) pages_[i]->drop_copy();
}

// Values of full tiles that are not on the device yet.
void LayerAttention::Impl::make_tiles(const CodedVectors& coded, detail::Uploads& uploads) const {
  const CodedVectors::Frame& f = *values;
  const std::size_t first = coded.tiles_.size();
  const std::size_t count = size_of(coded.tokens() / f.tile_tokens) - first;
  if (count == 0) return;
  std::vector<const std::uint8_t*> pages;
  for (const auto& page : coded.pages_) pages.push_back(page->data());
  kernels::ValueTileSource source;
  source.layout = f.layouts.data();
  source.layout_stride = f.layouts.size() > 1 ? 1 : 0;
  source.kv_heads = f.kv_heads;
  source.num_atoms = f.num_atoms + f.own_atoms;
  source.tile_tokens = f.tile_tokens;
  source.pages = pages.data();
  source.page_tokens = f.page_tokens;
  const int threads = options.threads > 0 ? options.threads : omp_get_num_procs();
  std::vector<std::vector<std::uint32_t>> scratch(count);
  for (auto& numbers : scratch)
    numbers.resize(kernels::value_tile_workspace_bytes(source.num_atoms) / sizeof(std::uint32_t));
  std::vector<std::size_t> sizes(count);
  std::vector<std::vector<std::uint8_t>> packed(count);
  const auto each_tile = [&](auto&& make) {  // which must not allocate
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (count > 1)
    for (std::size_t i = 0; i < count; ++i) {
      kernels::ValueTileSource tile = source;
      tile.first_token = static_cast<std::int64_t>(first + i) * f.tile_tokens;
      make(tile, i);
    }
  };
  each_tile([&](const kernels::ValueTileSource& tile, std::size_t i) {
    sizes[i] = kernels::value_tile_bytes(tile, scratch[i].data());
  });
  for (std::size_t i = 0; i < count; ++i) packed[i].resize(sizes[i]);
  each_tile([&](const kernels::ValueTileSource& tile, std::size_t i) {
    kernels::pack_value_tile(tile, scratch[i].data(), packed[i].data());
  });
  for (const std::vector<std::uint8_t>& bytes : packed) {
    auto tile = std::make_shared<detail::DeviceBuffer>();
    throw_if_failed(tile->reserve(bytes.size()), "attention: device memory for a tile of values");
    uploads.copy(tile->data(), bytes.data(), bytes.size());
    coded.tiles_.push_back(std::move(tile));
  }
}

// `uploads`: nullptr for the CPU.
detail::AttentionCall LayerAttention::Impl::collect(const std::vector<Sequence>& sequences,
                                                    detail::Uploads* uploads) const {
  detail::AttentionCall call;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = sequences[i];
    if (s.keys == nullptr || s.values == nullptr || s.keys->frame_ != keys ||
        s.values->frame_ != values)
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
    for (const ExactTokens& run : s.exact) {
      if (run.tokens < 0)
        throw_invalid("sequence ", i, ": ", run.tokens, " exact tokens, must be >= 0");
      call.exact.push_back({run.keys, run.values, run.head_stride, run.tokens});
    }
    for (std::size_t j = 0; j < s.left_out.size(); ++j) {
      const std::int64_t least = j == 0 ? 0 : s.left_out[j - 1] + 1;
      if (s.left_out[j] < least || s.left_out[j] >= s.keys->tokens())
        throw_invalid("sequence ",
                      i,
                      ": token ",
                      s.left_out[j],
                      " is left out, must be in [",
                      least,
                      ", ",
                      s.keys->tokens(),
                      ")");
      call.left_out.push_back(s.left_out[j]);
    }
    kernels::AttentionSequence coded;
    coded.coded_tokens = s.keys->tokens();
    coded.first_position = s.first_position;
    coded.num_exact = static_cast<int>(s.exact.size());
    coded.num_left_out = static_cast<int>(s.left_out.size());
    for (const bool of_values : {false, true}) {
      const CodedVectors& from = of_values ? *s.values : *s.keys;
      const std::size_t own_before = call.own.size();
      (of_values ? coded.values : coded.keys) = from.frame_->run_of(from.own_, call.own);
      call.num_own.push_back(call.own.size() - own_before);
      call.num_pages.push_back(from.pages_.size());
      std::int64_t in_tiles = 0;
      if (from.frame_->tile_tokens > 0 && uploads != nullptr) {
        make_tiles(from, *uploads);
        for (const auto& tile : from.tiles_)
          call.tiles.push_back(reinterpret_cast<const std::uint8_t*>(tile->data()));
        coded.values.num_tiles = static_cast<int>(from.tiles_.size());
        in_tiles = coded.values.num_tiles * std::int64_t{from.frame_->tile_tokens};
      }
      std::int64_t end = 0;  // of a page's tokens
      for (const auto& page : from.pages_) {
        end += from.frame_->page_tokens;
        call.pages.push_back(uploads == nullptr ? page->data()
                             : end <= in_tiles
                                 ? nullptr
                                 : page->on_device(device->pages(of_values), *uploads));
      }
    }
    call.sequences.push_back(coded);
  }
  return call;
}

kernels::AttentionProblem LayerAttention::Impl::problem() const {
  kernels::AttentionProblem p;
  p.kv_heads = options.kv_heads;
  p.group = options.group;
  p.dim = keys->dim;
  p.softmax_scale = options.softmax_scale;
  p.keys = keys->space;
  p.values = values->space;
  p.rotation = rotates ? &rotation : nullptr;
  p.page_tokens = options.page_tokens;
  p.value_tile_tokens = values->tile_tokens;
  p.exact_type = options.exact == ExactNumbers::kFloat32   ? kernels::ExactType::kFloat32
                 : options.exact == ExactNumbers::kFloat16 ? kernels::ExactType::kFloat16
                                                           : kernels::ExactType::kBFloat16;
  p.threads = options.threads;
  return p;
}

void LayerAttention::attend(const std::vector<Sequence>& sequences,
                            const float* queries,
                            float* out,
                            AttentionScratch& scratch,
                            float* log_sums,
                            void* stream) const {
  kernels::AttentionProblem p = impl_->problem();
  p.batch = static_cast<int>(sequences.size());
  p.queries = queries;
  p.out = out;
  p.log_sums = log_sums;
  if (impl_->device) {
    const detail::UseDevice use(impl_->device->device());
    detail::DeviceScratch& on_device = detail::device_scratch(scratch);
    const detail::Uploads::Session session(on_device.uploads, static_cast<kernels::Stream>(stream));
    detail::AttentionCall call = impl_->collect(sequences, &on_device.uploads);
    impl_->device->attend(p, call, on_device, static_cast<kernels::Stream>(stream));
    for (const Sequence& s : sequences) s.values->drop_copies_in_tiles();
    return;
  }
  detail::AttentionCall call = impl_->collect(sequences, nullptr);
  call.point_to(
      call.pages.data(), nullptr, call.exact.data(), call.left_out.data(), call.own.data());
  p.sequences = call.sequences.data();
  const std::size_t bytes = kernels::cpu::attention_workspace_bytes(p);
  try {
    if (scratch.memory.size() < bytes) scratch.memory.resize(bytes);
  } catch (const std::bad_alloc&) {
    throw ResourceError("attention: no memory for " + std::to_string(bytes) + " bytes of scratch");
  }
  throw_if_failed(kernels::cpu::attention(p, scratch.memory.data()), "attention");
}

}  // namespace lexico
