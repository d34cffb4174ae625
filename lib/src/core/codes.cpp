// Vectors to bytes and back: atoms, quantized weights, and what they leave over.
#include "lexico/codes.h"

#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>

#include "check.h"
#include "core/levels.h"
#include "core/size_of.h"
#include "core/trellis.h"
#include "core/weight_solver.h"
#include "kernels/packing/packing.h"
#include "lexico/dictionary.h"

namespace lexico {

using detail::size_of;
using detail::throw_if_failed;
using detail::throw_invalid;

namespace {

constexpr std::int64_t kBlock = 1024;  // vectors encoded at a time
constexpr int kCountBits = 16, kInt16Bits = 16, kE4m3Bits = 8;
constexpr float kE4m3Max = 448.0f;
constexpr int kMaxFormatAtoms = 4096;

void check_range(const char* field, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high)
    throw_invalid(field, " is ", value, ", must be in [", low, ", ", high, "]");
}

void check_size(const char* table, std::size_t size, std::size_t want) {
  if (size != want) throw_invalid(table, " holds ", size, " numbers, must hold ", want);
}

void check_finite(const char* table, const std::vector<float>& values) {
  for (std::size_t i = 0; i < values.size(); ++i)
    if (!std::isfinite(values[i]))
      throw_invalid(table, " holds ", values[i], " at ", i, ", must be finite");
}

void check_ascending(const char* table, const float* levels, int count) {
  for (int k = 1; k < count; ++k)
    if (levels[k] < levels[k - 1])
      throw_invalid(table, " must ascend, level ", k, " is ", levels[k], " after ", levels[k - 1]);
}

void validate_residual(const ResidualCode& r, int dim) {
  if (r.groups == 0) {
    if (!r.mean.empty() || !r.axes.empty() || !r.bits.empty() || !r.levels.empty())
      throw_invalid("residual: has tables and no groups");
    return;
  }
  check_range("residual.groups", r.groups, 1, 1 << 16);
  check_size("residual.mean", r.mean.size(), size_of(r.groups, dim));
  check_size("residual.axes", r.axes.size(), size_of(r.groups, dim, dim));
  check_size("residual.bits", r.bits.size(), size_of(r.groups, dim));
  check_finite("residual.mean", r.mean);
  check_finite("residual.axes", r.axes);
  check_finite("residual.levels", r.levels);
  if (r.states != 0 && !detail::Trellis::has(r.states))
    throw_invalid("residual.states is ", r.states, ", must be 0 or a power of two in [4, 256]");
  std::size_t num_levels = 0;
  for (int g = 0; g < r.groups; ++g) {
    int sum = 0, first = 0;
    for (int c = 0; c < dim; ++c) {
      const int bits = r.bits[size_of(g, dim) + size_of(c)];
      check_range("residual.bits", bits, 0, ResidualCode::kMaxBits);
      sum += bits;
      first += r.bits[size_of(c)];
      num_levels += size_of(r.num_levels(bits));
    }
    if (sum != first)
      throw_invalid("residual.bits of group ", g, " sum to ", sum, ", those of group 0 to ", first);
  }
  check_size("residual.levels", r.levels.size(), num_levels);
  const float* levels = r.levels.data();
  for (int bits : r.bits) {
    check_ascending("residual.levels", levels, r.num_levels(bits));
    levels += r.num_levels(bits);
  }
  for (int g = 0; g < r.groups; ++g)
    for (int i = 0; i < dim; ++i)
      for (int j = 0; j <= i; ++j) {
        const float* a = r.axes.data() + size_of(g, dim, dim) + size_of(i, dim);
        const float* b = r.axes.data() + size_of(g, dim, dim) + size_of(j, dim);
        double sum = i == j ? -1.0 : 0.0;
        for (int d = 0; d < dim; ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
        if (!(std::fabs(sum) < 1e-3))
          throw_invalid(
              "residual.axes of group ", g, ": rows ", j, " and ", i, " are not orthonormal");
      }
}

}  // namespace

int ResidualCode::total_bits(int dim) const {
  int sum = 0;
  for (int c = 0; c < dim && groups > 0; ++c) sum += bits[static_cast<std::size_t>(c)];
  return sum;
}

const char* CodeFormat::name() const {
  switch (coding) {
    case Coding::kFp8Int16:
      return "fp8-int16";
    case Coding::kPacked:
      return "packed";
    default:
      return "exact";
  }
}

CodeFormat::Coding coding_from(const std::string& name) {
  if (name == "exact") return CodeFormat::Coding::kExact;
  if (name == "fp8-int16") return CodeFormat::Coding::kFp8Int16;
  if (name == "packed") return CodeFormat::Coding::kPacked;
  throw_invalid("format is '", name, "', must be exact, fp8-int16 or packed");
}

int index_bits(int num_atoms) {
  return std::bit_width(static_cast<unsigned>(std::max(num_atoms, 1) - 1));
}

int CodeFormat::bits_per_vector(int num_atoms, int dim) const {
  if (coding == Coding::kExact) return 64 * max_atoms;
  if (coding == Coding::kFp8Int16) return kCountBits + max_atoms * (kInt16Bits + kE4m3Bits);
  return scale_bits + max_atoms * (index_bits(num_atoms) + weight_bits) + residual.total_bits(dim);
}

void CodeFormat::validate(int num_atoms, int dim) const {
  check_range("dim", dim, 1, 1 << 16);
  check_range("num_atoms", num_atoms, 1, 1 << 24);
  check_range("max_atoms",
              max_atoms,
              coding == Coding::kFp8Int16 ? 1 : 0,
              std::min({num_atoms, dim, kMaxFormatAtoms}));
  if (coding != Coding::kPacked) {
    if (residual.groups != 0) throw_invalid(name(), " has no residual code");
    if (coding == Coding::kFp8Int16 && num_atoms > 1 << 15)
      throw_invalid("fp8-int16: num_atoms is ", num_atoms, ", must be <= ", 1 << 15);
    return;
  }
  check_range("weight_bits", weight_bits, 2, 8);
  check_range("scale_bits", scale_bits, 0, 8);
  if (scale_bits > 0) {
    const float top = scale_low + scale_step * static_cast<float>((1 << scale_bits) - 1);
    if (!(scale_low >= -120 && scale_step > 0 && top <= 120))
      throw_invalid("scales go from 2^", scale_low, " to 2^", top, ", must lie in 2^[-120, 120]");
  }
  check_size("weight_levels", weight_levels.size(), size_of(max_atoms) << weight_bits);
  check_finite("weight_levels", weight_levels);
  for (int k = 0; k < max_atoms; ++k) {
    const float* levels = weight_levels.data() + (size_of(k) << weight_bits);
    check_ascending("weight_levels", levels, 1 << weight_bits);
    if (std::find(levels, levels + (1 << weight_bits), 0.0f) == levels + (1 << weight_bits))
      throw_invalid("weight_levels: those of position ", k, " lack a 0");
  }
  validate_residual(residual, dim);
  if (residual.groups > 0 && residual.relative && scale_bits == 0)
    throw_invalid("residual: relative levels need a scale, scale_bits is 0");
}

struct Codec::Impl {
  CodeFormat format;
  const float* atoms = nullptr;
  int num_atoms = 0, most_atoms = 0, dim = 0, bits = 0, bytes = 0, threads = 0;
  std::optional<Encoder> own_encoder;
  Encoder* encoder = nullptr;  // none if max_atoms is 0
  std::optional<detail::Trellis> trellis;
  CodeCounts counts;

  struct Component {
    int index;
    int bits;
    const float* levels;
    int num_levels;
  };
  struct Group {
    std::vector<Component> components;  // that have bits
    std::vector<float> forward;         // [dim, components]: axes of those, transposed
    const float* mean;
    const float* axes;
    std::vector<std::uint8_t> widths;  // of all fields
    kernels::RecordLayout layout;
  };
  std::vector<Group> groups;  // at least one
  int num_fields = 0, first_component = 0;

  // Scratch of a block.
  SparseCodes codes;
  std::vector<float> signals;
  std::vector<std::uint32_t> fields;
  std::vector<std::uint8_t> one_group;

  const float* weight_levels(int position) const {
    return format.weight_levels.data() + (size_of(position) << format.weight_bits);
  }
  const float* atom(std::int64_t n) const { return atoms + n * dim; }
  int group_of(std::int64_t row, int first_head) const {
    return static_cast<int>((first_head + row) % static_cast<std::int64_t>(groups.size()));
  }
  bool is_packed() const { return format.coding == CodeFormat::Coding::kPacked; }

  void start(const Dictionary& dictionary, int more_atoms, int num_threads);
  void lay_out() {
    const ResidualCode& residual = format.residual;
    std::vector<std::uint8_t> before;
    if (is_packed()) {
      before.push_back(static_cast<std::uint8_t>(format.scale_bits));
      before.insert(before.end(),
                    size_of(format.max_atoms),
                    static_cast<std::uint8_t>(index_bits(most_atoms)));
      before.insert(
          before.end(), size_of(format.max_atoms), static_cast<std::uint8_t>(format.weight_bits));
    } else {
      before.push_back(kCountBits);
      before.insert(before.end(), size_of(format.max_atoms), kInt16Bits);
      before.insert(before.end(), size_of(format.max_atoms), kE4m3Bits);
    }
    first_component = static_cast<int>(before.size());
    groups.resize(size_of(std::max(1, residual.groups)));
    const float* levels = residual.levels.data();
    for (std::size_t g = 0; g < groups.size(); ++g) {
      Group& group = groups[g];
      group.widths = before;
      if (residual.groups == 0) continue;
      group.mean = residual.mean.data() + g * size_of(dim);
      group.axes = residual.axes.data() + g * size_of(dim, dim);
      for (int c = 0; c < dim; ++c) {
        const int width = residual.bits[g * size_of(dim) + size_of(c)];
        if (width == 0) continue;
        const int num_levels = residual.num_levels(width);
        group.components.push_back({c, width, levels, num_levels});
        group.widths.push_back(static_cast<std::uint8_t>(width));
        levels += num_levels;
      }
      for (int d = 0; d < dim; ++d)
        for (const Component& c : group.components)
          group.forward.push_back(group.axes[c.index * dim + d]);
    }
    for (const Group& group : groups)
      num_fields = std::max(num_fields, static_cast<int>(group.widths.size()));
    for (Group& group : groups) {
      group.widths.resize(size_of(num_fields));
      group.layout = {
          num_fields, bytes, group.widths.data(), static_cast<std::int64_t>(groups.size())};
    }
  }

  float scale_of(std::uint32_t code) const {
    if (format.scale_bits == 0) return 1.0f;
    return std::exp2(format.scale_low + format.scale_step * static_cast<float>(code));
  }

  std::uint32_t scale_code(double norm, std::int64_t& saturated) const {
    if (format.scale_bits == 0 || norm == 0) return 0;
    const double top = (1 << format.scale_bits) - 1;
    const double at = (std::log2(norm) - static_cast<double>(format.scale_low)) /
                      static_cast<double>(format.scale_step);
    saturated += at < -0.5 || at > top + 0.5;
    return static_cast<std::uint32_t>(std::lround(std::clamp(at, 0.0, top)));
  }

  struct Scratch {
    std::vector<double> gram, inner;
    std::vector<float> residual, components;
    std::vector<detail::Trellis::Number> numbers;
    std::vector<std::uint32_t> numbers_codes;
    detail::WeightSolver solver;
    detail::Trellis::Scratch trellis;
  };

  // The signal's code as fields. `z` holds no NaN.
  void quantize(const float* z,
                std::int64_t row,
                const Group& group,
                std::uint32_t* out,
                Scratch& scratch,
                std::int64_t& saturated) const {
    const int s = format.max_atoms;
    const std::int32_t* indices = codes.indices.data() + row * s;
    const int count = s > 0 ? codes.counts[static_cast<std::size_t>(row)] : 0;
    std::fill(out, out + num_fields, 0u);
    if (!is_packed()) {
      out[0] = static_cast<std::uint32_t>(count);
      for (int k = 0; k < count; ++k) {
        const float weight = codes.weights[size_of(row, s) + size_of(k)];
        saturated += std::fabs(weight) > kE4m3Max;
        std::uint8_t code = 0;
        kernels::cpu::e4m3_from_floats(&weight, 1, &code);
        out[1 + k] = static_cast<std::uint32_t>(indices[k]);
        out[1 + s + k] = code;
      }
      return;
    }
    double norm2 = 0;
    for (int d = 0; d < dim; ++d) norm2 += static_cast<double>(z[d]) * static_cast<double>(z[d]);
    out[0] = scale_code(std::sqrt(norm2), saturated);
    const float scale = scale_of(out[0]);
    scratch.residual.assign(z, z + dim);
    if (count > 0) {
      scratch.gram.resize(size_of(count, count));
      scratch.inner.resize(size_of(count));
      detail::gram_of(
          atoms, dim, indices, count, z, count, scratch.gram.data(), scratch.inner.data());
      scratch.solver.start(scratch.gram.data(), count, scratch.inner.data(), count);
    }
    const int num_levels = 1 << format.weight_bits;
    for (int k = 0; k < s; ++k) {
      const float* levels = weight_levels(k);
      const float want =
          k < count ? static_cast<float>(scratch.solver.best(k) / static_cast<double>(scale))
                    : 0.0f;
      const int level = detail::nearest_level(levels, num_levels, want);
      const float weight = levels[level] * scale;
      out[1 + s + k] = static_cast<std::uint32_t>(level);
      if (k >= count) continue;
      const float reach = num_levels > 1 ? 0.5f : 0.0f;
      saturated +=
          want < levels[0] - reach * (levels[1] - levels[0]) ||
          want > levels[num_levels - 1] + reach * (levels[num_levels - 1] - levels[num_levels - 2]);
      out[1 + k] = static_cast<std::uint32_t>(indices[k]);
      scratch.solver.fix(k, static_cast<double>(weight));
      const float* a = atom(indices[k]);
      for (int d = 0; d < dim; ++d) scratch.residual[size_of(d)] -= weight * a[d];
    }
    const std::size_t num_components = group.components.size();
    if (num_components == 0) return;
    scratch.components.assign(num_components, 0.0f);
    float* const components = scratch.components.data();
    for (int d = 0; d < dim; ++d) {  // one row of the axes after another: a fixed order of sums
      const float r = scratch.residual[size_of(d)] - group.mean[d];
      const float* axes = group.forward.data() + size_of(d) * num_components;
      for (std::size_t c = 0; c < num_components; ++c) components[c] += r * axes[c];
    }
    const float unit = format.residual.relative ? 1.0f / scale : 1.0f;
    std::uint32_t* const to = out + first_component;
    if (!trellis) {
      for (std::size_t c = 0; c < num_components; ++c)
        to[c] = static_cast<std::uint32_t>(detail::nearest_level(
            group.components[c].levels, group.components[c].num_levels, components[c] * unit));
      return;
    }
    scratch.numbers.resize(num_components);
    for (std::size_t c = 0; c < num_components; ++c)
      scratch.numbers[c] = {
          components[c] * unit, group.components[c].bits, group.components[c].levels};
    trellis->encode(scratch.numbers, to, scratch.trellis);
  }

  // Any fields, also those of damaged bytes.
  void dequantize(const std::uint32_t* in, const Group& group, float* z) const {
    const int s = format.max_atoms;
    std::fill(z, z + dim, 0.0f);
    if (!is_packed()) {
      const int count = std::min(static_cast<int>(in[0]), s);
      for (int k = 0; k < count; ++k) {
        const auto code = static_cast<std::uint8_t>(in[1 + s + k]);
        float weight = 0;
        kernels::cpu::floats_from_e4m3(&code, 1, &weight);
        if (in[1 + k] >= static_cast<std::uint32_t>(num_atoms) || std::isnan(weight)) continue;
        add(atom(in[1 + k]), weight, z);
      }
      return;
    }
    const float scale = scale_of(in[0]);
    for (int k = 0; k < s; ++k) {
      const float weight = weight_levels(k)[in[1 + s + k]] * scale;
      if (weight == 0 || in[1 + k] >= static_cast<std::uint32_t>(num_atoms)) continue;
      add(atom(in[1 + k]), weight, z);
    }
    if (format.residual.groups == 0) return;
    add(group.mean, 1.0f, z);
    const float unit = format.residual.relative ? scale : 1.0f;
    std::uint32_t history = 0;
    for (std::size_t c = 0; c < group.components.size(); ++c) {
      const Component& component = group.components[c];
      const std::uint32_t code = in[first_component + static_cast<std::ptrdiff_t>(c)];
      const int level = trellis ? trellis->level(code, history) : static_cast<int>(code);
      add(group.axes + size_of(component.index, dim), component.levels[level] * unit, z);
    }
  }

  void add(const float* row, float weight, float* z) const {
    for (int d = 0; d < dim; ++d) z[d] += weight * row[d];
  }

  // Fields of a block; `signals` and `codes` are the block's afterwards.
  void quantize_block(const float* vectors, std::int64_t rows, int first_head) {
    signals.assign(vectors, vectors + rows * dim);
    for (std::int64_t row = 0; row < rows; ++row) {
      float* z = signals.data() + row * dim;
      if (std::all_of(z, z + dim, [](float v) { return std::isfinite(v); })) continue;
      std::fill(z, z + dim, 0.0f);
      ++counts.not_finite;
    }
    counts.vectors += rows;
    if (encoder != nullptr) encoder->encode(signals.data(), rows, codes);
    if (format.coding == CodeFormat::Coding::kExact) return;
    fields.resize(size_of(rows, num_fields));
    std::int64_t saturated = 0;
#pragma omp parallel num_threads(threads) reduction(+ : saturated) if (threads > 1)
    {
      Scratch scratch;
#pragma omp for schedule(static)
      for (std::int64_t row = 0; row < rows; ++row)
        quantize(signals.data() + row * dim,
                 row,
                 groups[static_cast<std::size_t>(group_of(row, first_head))],
                 fields.data() + row * num_fields,
                 scratch,
                 saturated);
    }
    counts.saturated += saturated;
  }

  void need_bytes(const char* what) const {
    if (format.coding == CodeFormat::Coding::kExact)
      throw_invalid(what, ": the format is exact, which has no bytes");
  }
};

void Codec::Impl::start(const Dictionary& dictionary, int more_atoms, int num_threads) {
  format = dictionary.format;
  atoms = dictionary.atoms.data();
  num_atoms = dictionary.num_atoms;
  most_atoms = num_atoms + more_atoms;
  dim = dictionary.dim;
  format.validate(num_atoms, dim);
  if (more_atoms < 0) throw_invalid("more_atoms is ", more_atoms, ", must be >= 0");
  if (format.coding == CodeFormat::Coding::kFp8Int16) format.validate(most_atoms, dim);
  if (dictionary.atoms.size() != size_of(num_atoms, dim))
    throw_invalid(
        "dictionary holds ", dictionary.atoms.size(), " numbers, must be ", num_atoms, " x ", dim);
  if (format.coding == CodeFormat::Coding::kExact && format.max_atoms == 0)
    throw_invalid("exact: max_atoms is 0, must be >= 1");
  bits = format.bits_per_vector(most_atoms, dim);
  bytes = format.bytes_per_vector(most_atoms, dim);
  threads = num_threads > 0 ? num_threads : omp_get_num_procs();
  if (format.residual.states > 0) trellis.emplace(format.residual.states);
  lay_out();
}

Codec::Codec(const Dictionary& dictionary, const EncodeOptions& options)
    : impl_(std::make_unique<Impl>()) {
  Impl& impl = *impl_;
  impl.start(dictionary, 0, options.threads);
  if (impl.format.max_atoms == 0) return;
  EncodeOptions encode = options;
  encode.max_atoms = impl.format.max_atoms;
  impl.encoder = &impl.own_encoder.emplace(encode);
  impl.encoder->set_atoms(impl.atoms, 1, impl.num_atoms, impl.dim);
}

Codec::Codec(const Dictionary& dictionary, Encoder& encoder, int more_atoms)
    : impl_(std::make_unique<Impl>()) {
  Impl& impl = *impl_;
  impl.start(dictionary, more_atoms, encoder.options().threads);
  if (impl.format.max_atoms == 0) return;
  if (encoder.options().max_atoms != impl.format.max_atoms)
    throw_invalid("the encoder has max_atoms ",
                  encoder.options().max_atoms,
                  ", the format ",
                  impl.format.max_atoms);
  impl.encoder = &encoder;
}

void Codec::use_atoms(const float* atoms, int count) {
  Impl& impl = *impl_;
  check_range("count of atoms", count, std::max(1, impl.format.max_atoms), impl.most_atoms);
  impl.atoms = atoms;
  impl.num_atoms = count;
  if (impl.encoder != nullptr) impl.encoder->set_atoms(atoms, 1, count, impl.dim);
}

Codec::~Codec() = default;
Codec::Codec(Codec&&) noexcept = default;
Codec& Codec::operator=(Codec&&) noexcept = default;

int Codec::bits_per_vector() const { return impl_->bits; }
int Codec::bytes_per_vector() const { return impl_->bytes; }
const CodeCounts& Codec::counts() const { return impl_->counts; }

void Codec::encode(const float* vectors, std::int64_t rows, std::uint8_t* bytes, int first_head) {
  Impl& impl = *impl_;
  impl.need_bytes("encode");
  const auto num_groups = static_cast<std::int64_t>(impl.groups.size());
  for (std::int64_t first = 0; first < rows; first += kBlock) {
    const std::int64_t n = std::min(kBlock, rows - first);
    impl.quantize_block(
        vectors + first * impl.dim, n, static_cast<int>((first_head + first) % num_groups));
    for (std::int64_t row = 0; row < std::min(n, num_groups); ++row) {
      const int group = impl.group_of(first + row, first_head);
      throw_if_failed(kernels::cpu::pack_fields(impl.groups[static_cast<std::size_t>(group)].layout,
                                                impl.fields.data() + row * impl.num_fields,
                                                (n - row + num_groups - 1) / num_groups,
                                                bytes + (first + row) * impl.bytes),
                      "packing codes");
    }
  }
}

void Codec::decode(const std::uint8_t* bytes,
                   std::int64_t rows,
                   float* vectors,
                   int first_head) const {
  const Impl& impl = *impl_;
  impl.need_bytes("decode");
  const auto num_groups = static_cast<std::int64_t>(impl.groups.size());
  std::vector<std::uint32_t> fields(size_of(std::min(rows, kBlock), impl.num_fields));
  for (std::int64_t first = 0; first < rows; first += kBlock) {
    const std::int64_t n = std::min(kBlock, rows - first);
    for (std::int64_t row = 0; row < std::min(n, num_groups); ++row) {
      const int group = impl.group_of(first + row, first_head);
      throw_if_failed(
          kernels::cpu::unpack_fields(impl.groups[static_cast<std::size_t>(group)].layout,
                                      bytes + (first + row) * impl.bytes,
                                      (n - row + num_groups - 1) / num_groups,
                                      fields.data() + row * impl.num_fields),
          "unpacking codes");
    }
#pragma omp parallel for num_threads(impl.threads) schedule(static) if (impl.threads > 1)
    for (std::int64_t row = 0; row < n; ++row)
      impl.dequantize(fields.data() + row * impl.num_fields,
                      impl.groups[static_cast<std::size_t>(impl.group_of(first + row, first_head))],
                      vectors + (first + row) * impl.dim);
  }
}

void Codec::reconstruct(const float* vectors, std::int64_t rows, float* out, int first_head) {
  Impl& impl = *impl_;
  for (std::int64_t first = 0; first < rows; first += kBlock) {
    const std::int64_t n = std::min(kBlock, rows - first);
    const auto num_groups = static_cast<std::int64_t>(impl.groups.size());
    impl.quantize_block(
        vectors + first * impl.dim, n, static_cast<int>((first_head + first) % num_groups));
    float* const to = out + first * impl.dim;
#pragma omp parallel for num_threads(impl.threads) schedule(static) if (impl.threads > 1)
    for (std::int64_t row = 0; row < n; ++row) {
      float* z = to + row * impl.dim;
      if (impl.format.coding != CodeFormat::Coding::kExact) {
        const int group = impl.group_of(first + row, first_head);
        impl.dequantize(impl.fields.data() + row * impl.num_fields,
                        impl.groups[static_cast<std::size_t>(group)],
                        z);
        continue;
      }
      std::fill(z, z + impl.dim, 0.0f);
      const int s = impl.format.max_atoms;
      for (int k = 0; k < impl.codes.counts[static_cast<std::size_t>(row)]; ++k)
        impl.add(impl.atom(impl.codes.indices[size_of(row, s) + size_of(k)]),
                 impl.codes.weights[size_of(row, s) + size_of(k)],
                 z);
    }
  }
}

}  // namespace lexico
