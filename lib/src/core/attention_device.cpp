// Attention on codes on a GPU: copies of what the kernels read, and the call.
#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "check.h"
#include "core/attention_impl.h"

namespace lexico {

namespace cuda = kernels::cuda;

std::size_t AttentionScratch::bytes() const {
  return device != nullptr ? device->memory.size() : memory.size();
}

namespace detail {
namespace {

// Arrays that go into one piece of device memory, each at a multiple of 256 bytes.
class Arrays {
 public:
  template <typename T>
  std::size_t add(const T* from, std::size_t count) {
    const std::size_t at = bytes_;
    parts_.push_back({from, count * sizeof(T), at});
    bytes_ += (count * sizeof(T) + 255) / 256 * 256;
    return at;
  }
  std::size_t bytes() const { return bytes_; }
  template <typename Put>
  void for_each(Put&& put) const {
    for (const Part& part : parts_)
      if (part.bytes > 0) put(part.from, part.bytes, part.at);
  }

 private:
  struct Part {
    const void* from;
    std::size_t bytes, at;
  };
  std::vector<Part> parts_;
  std::size_t bytes_ = 0;
};

template <typename T>
const T* at(const DeviceBuffer& memory, std::size_t offset) {
  return reinterpret_cast<const T*>(memory.data() + offset);
}

void reserve(DeviceBuffer& memory, std::size_t bytes, const char* what) {
  const kernels::Status status = memory.reserve(bytes);
  if (!status.ok())
    throw ResourceError("attention: no memory for " + std::to_string(bytes) + " bytes of " + what +
                        " on the device: " + status.what);
}

int components_with_bits(const kernels::CodeLayout& layout) {
  return static_cast<int>(std::count_if(layout.component_bits,
                                        layout.component_bits + layout.components,
                                        [](std::int32_t bits) { return bits > 0; }));
}

std::size_t component_level_count(const kernels::CodeLayout& layout) {
  const int more = layout.trellis.high != 0 || layout.trellis.low != 0 ? 1 : 0;
  std::size_t count = 0;
  for (int c = 0; c < layout.components; ++c)
    if (layout.component_bits[c] > 0) count += std::size_t{1} << (layout.component_bits[c] + more);
  return count;
}

}  // namespace

DeviceScratch& device_scratch(AttentionScratch& scratch) {
  if (scratch.device == nullptr) scratch.device = std::make_shared<DeviceScratch>();
  return *scratch.device;
}

void DeviceAttention::set_up(Side& side,
                             const kernels::CodedSpace& of,
                             std::size_t layouts,
                             const kernels::AttentionProblem& problem) {
  const std::size_t dim = size_of(problem.dim), heads = size_of(problem.kv_heads);
  const std::size_t rows = (of.atoms_stride != 0 ? heads : 1) * size_of(of.num_atoms) * dim;
  const bool has_axes = of.layout->components > 0;
  Arrays arrays;
  const std::size_t atoms = arrays.add(of.atoms, rows);
  const std::size_t halfs = arrays.add(of.half_atoms, of.half_atoms != nullptr ? rows : 0);
  const std::size_t axes =
      arrays.add(of.axes, has_axes ? (of.axes_stride != 0 ? heads : 1) * dim * dim : 0);
  const std::size_t mean = arrays.add(of.mean, of.mean != nullptr ? heads * dim : 0);
  const std::size_t map = arrays.add(of.back_map, of.back_map != nullptr ? heads * dim * dim : 0);
  std::vector<kernels::CodeLayout>& copies = side.layouts;
  copies.assign(of.layout, of.layout + layouts);
  const std::size_t layouts_at = arrays.add(copies.data(), layouts);
  struct Tables {
    std::size_t levels, scales, bits, component_levels;
  };
  std::vector<Tables> tables;
  for (const kernels::CodeLayout& l : copies) {
    const std::size_t levels =
        l.weights == kernels::CodedWeights::kLevels ? size_of(l.slots) << l.weight_bits : 0;
    tables.push_back({arrays.add(l.levels, levels),
                      arrays.add(l.scales, l.scale_bits > 0 ? std::size_t{1} << l.scale_bits : 0),
                      arrays.add(l.component_bits, size_of(l.components)),
                      arrays.add(l.component_levels, component_level_count(l))});
  }
  reserve(side.memory, arrays.bytes(), "dictionaries");
  for (std::size_t i = 0; i < layouts; ++i) {
    copies[i].levels = at<float>(side.memory, tables[i].levels);
    copies[i].scales = at<float>(side.memory, tables[i].scales);
    copies[i].component_bits = at<std::int32_t>(side.memory, tables[i].bits);
    copies[i].component_levels = at<float>(side.memory, tables[i].component_levels);
  }
  arrays.for_each([&](const void* from, std::size_t bytes, std::size_t offset) {
    throw_if_failed(cuda::copy(side.memory.data() + offset, from, bytes, nullptr),
                    "copying dictionaries to the device");
  });
  throw_if_failed(cuda::synchronize(nullptr), "copying dictionaries to the device");
  side.space = of;
  side.space.layout = at<kernels::CodeLayout>(side.memory, layouts_at);
  side.space.atoms = at<float>(side.memory, atoms);
  if (of.half_atoms != nullptr) side.space.half_atoms = at<std::uint16_t>(side.memory, halfs);
  side.space.axes = has_axes ? at<float>(side.memory, axes) : nullptr;
  if (of.mean != nullptr) side.space.mean = at<float>(side.memory, mean);
  if (of.back_map != nullptr) side.space.back_map = at<float>(side.memory, map);
  side.pages = std::make_shared<DevicePool>(
      size_of(problem.kv_heads) * size_of(problem.page_tokens / kernels::kBlockTokens) *
          kernels::block_bytes(*of.layout) +
      kernels::kPageSlack);
}

DeviceAttention::DeviceAttention(int device,
                                 const kernels::AttentionProblem& problem,
                                 std::size_t key_layouts,
                                 std::size_t value_layouts,
                                 const AttentionOptions& options)
    : device_(device) {
  const UseDevice use(device);
  const auto most_components = [](const kernels::CodedSpace& space, std::size_t layouts) {
    int most = 0;
    for (std::size_t i = 0; i < layouts; ++i)
      most = std::max(most, components_with_bits(space.layout[i]));
    return most;
  };
  bounds_.key_components = most_components(problem.keys, key_layouts);
  bounds_.value_components = most_components(problem.values, value_layouts);
  bounds_.key_block_bytes = kernels::block_bytes(*problem.keys.layout);
  bounds_.value_block_bytes = kernels::block_bytes(*problem.values.layout);
  bounds_.key_weights = problem.keys.layout->weights;
  bounds_.value_weights = problem.values.layout->weights;
  bounds_.half_tables = options.half_tables;
  // The most there may be, not the most of a call: results do not depend on its other sequences.
  bounds_.key_extra = bounds_.value_extra = options.own_atoms;
  throw_if_failed(cuda::attention_device(&bounds_), "attention on the device");
  set_up(keys_, problem.keys, key_layouts, problem);
  set_up(values_, problem.values, value_layouts, problem);
  if (problem.rotation == nullptr) return;
  rotation_ = *problem.rotation;
  const std::size_t bytes = size_of(rotation_.rotary_dim / 2) * sizeof(float);
  reserve(frequencies_, bytes, "frequencies");
  throw_if_failed(cuda::copy(frequencies_.data(), rotation_.inverse_frequencies, bytes, nullptr),
                  "copying frequencies to the device");
  throw_if_failed(cuda::synchronize(nullptr), "copying frequencies to the device");
  rotation_.inverse_frequencies = at<float>(frequencies_, 0);
}

void DeviceAttention::attend(kernels::AttentionProblem problem,
                             AttentionCall& call,
                             DeviceScratch& scratch,
                             kernels::Stream stream) const {
  if (call.sequences.empty()) return;
  cuda::AttentionBounds bounds = bounds_;
  for (const kernels::AttentionSequence& s : call.sequences)
    bounds.coded_tokens = std::max(bounds.coded_tokens, s.coded_tokens);
  // Scratch of a sequence that grows need not grow with every token.
  if (bounds.coded_tokens > 0)
    bounds.coded_tokens =
        static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(bounds.coded_tokens)));
  problem.keys = keys_.space;
  problem.values = values_.space;
  if (problem.rotation != nullptr) problem.rotation = &rotation_;

  Arrays arrays;
  const std::size_t sequences = arrays.add(call.sequences.data(), call.sequences.size());
  const std::size_t pages = arrays.add(call.pages.data(), call.pages.size());
  const std::size_t tiles = arrays.add(call.tiles.data(), call.tiles.size());
  const std::size_t exact = arrays.add(call.exact.data(), call.exact.size());
  const std::size_t left_out = arrays.add(call.left_out.data(), call.left_out.size());
  const std::size_t own = arrays.add(call.own.data(), call.own.size());
  const std::size_t bytes = arrays.bytes() + cuda::attention_workspace_bytes(problem, bounds);
  if (bytes > scratch.memory.size()) reserve(scratch.memory, bytes + bytes / 8, "scratch");
  call.point_to(at<const std::uint8_t*>(scratch.memory, pages),
                at<const std::uint8_t*>(scratch.memory, tiles),
                at<kernels::ExactRun>(scratch.memory, exact),
                at<std::int64_t>(scratch.memory, left_out),
                at<float>(scratch.memory, own));
  std::vector<char> together(arrays.bytes());  // one copy for all
  arrays.for_each([&](const void* from, std::size_t size, std::size_t offset) {
    std::memcpy(together.data() + offset, from, size);
  });
  scratch.uploads.copy(scratch.memory.data(), together.data(), together.size());
  problem.sequences = at<kernels::AttentionSequence>(scratch.memory, sequences);
  throw_if_failed(cuda::attention(problem, bounds, scratch.memory.data() + arrays.bytes(), stream),
                  "attention on the device");
}

}  // namespace detail
}  // namespace lexico
