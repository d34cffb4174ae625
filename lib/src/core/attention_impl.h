#pragma once
// What attention on codes is made of; shared by attention.cpp and attention_device.cpp.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/device_memory.h"
#include "core/size_of.h"
#include "kernels/attention/attention.h"
#include "kernels/packing/packing.h"
#include "lexico/attention.h"

namespace lexico {

// The keys, or the values: what the kernel wants, and how codes become planes.
struct CodedVectors::Frame {
  int kv_heads = 0, dim = 0, num_atoms = 0, page_tokens = 0;
  int num_dictionaries = 1;
  int own_atoms = 0;                   // of each dictionary, at most
  int tile_tokens = 0;                 // on the device; 0: no tiles
  bool folds = false;                  // atoms are a copy of each head, with its map in them
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
    return layouts[layouts.size() > 1 ? detail::size_of(head) : 0];
  }
  bool is_packed() const { return format->coding == CodeFormat::Coding::kPacked; }
  bool is_exact() const { return format->coding == CodeFormat::Coding::kExact; }
  int dictionary_of(int head) const { return num_dictionaries > 1 ? head : 0; }
  kernels::RecordLayout record_layout(int head) const {
    return {num_fields,
            record_bytes,
            widths[layouts.size() > 1 ? detail::size_of(head) : 0].data(),
            std::int64_t{kv_heads}};
  }
  std::int64_t blocks() const { return page_tokens / kernels::kBlockTokens; }
  std::size_t page_bytes() const {
    return detail::size_of(kv_heads, blocks()) * block_bytes + kernels::kPageSlack;
  }
  std::size_t pages_for(std::int64_t tokens) const {
    return detail::size_of((tokens + page_tokens - 1) / page_tokens);
  }
  // Records of `tokens` tokens to fields [tokens, kv_heads, num_fields] and back.
  void unpack(const std::uint8_t* records, std::int64_t tokens, std::uint32_t* fields) const;
  void pack(const std::uint32_t* fields, std::int64_t tokens, std::uint8_t* records) const;
  // A slot that does not exist becomes an unused one.
  void correct(int head, std::uint32_t num_atoms_and_own, std::uint32_t* fields) const;
  // Own atoms as the kernel wants them, of each dictionary or, where maps are folded in, head:
  // added to `memory`, where extra_atoms is to point.
  kernels::CodedRun run_of(const std::vector<std::vector<std::uint16_t>>& own,
                           std::vector<float>& memory) const;

  Frame(const std::vector<const Dictionary*>& dictionaries,
        const AttentionOptions& options,
        bool fold_map,
        bool half);
  void add_layout(const Dictionary& dictionary, int group);
  void take_tiles(int tokens);
};

namespace detail {

/// What the kernel reads of a call beside queries. Arrays of all sequences lie one after another.
struct AttentionCall {
  std::vector<kernels::AttentionSequence> sequences;
  std::vector<const std::uint8_t*> pages;       // of a sequence's keys, then of its values
  std::vector<float> own;                       // atoms: likewise
  std::vector<std::size_t> num_pages, num_own;  // likewise: pointers, numbers
  std::vector<const std::uint8_t*> tiles;       // of a sequence's values
  std::vector<kernels::ExactRun> exact;
  std::vector<std::int64_t> left_out;

  /// Has the sequences point to where the arrays lie, here or on a device.
  void point_to(const std::uint8_t* const* its_pages,
                const std::uint8_t* const* its_tiles,
                const kernels::ExactRun* its_exact,
                const std::int64_t* its_left_out,
                const float* its_own);
};

/// What attention works in on a GPU. Of one stream at a time.
struct DeviceScratch {
  Uploads uploads;
  DeviceBuffer memory;
};
DeviceScratch& device_scratch(AttentionScratch& scratch);

/// Attention on a GPU: what does not change lies there.
class DeviceAttention {
 public:
  /// @param problem  with keys, values and rotation of the host.
  /// @throws ResourceError.
  DeviceAttention(int device,
                  const kernels::AttentionProblem& problem,
                  std::size_t key_layouts,
                  std::size_t value_layouts,
                  const AttentionOptions& options);

  int device() const { return device_; }
  const std::shared_ptr<DevicePool>& pages(bool of_values) const {
    return (of_values ? values_ : keys_).pages;
  }

  /// @param problem  of the host, but for queries, out, log_sums, pages and exact tokens.
  /// @throws ResourceError.
  void attend(kernels::AttentionProblem problem,
              AttentionCall& call,
              DeviceScratch& scratch,
              kernels::Stream stream) const;

 private:
  struct Side {
    kernels::CodedSpace space;
    std::vector<kernels::CodeLayout> layouts;  // for the device; must outlive what copies them
    DeviceBuffer memory;
    std::shared_ptr<DevicePool> pages;
  };
  void set_up(Side& side,
              const kernels::CodedSpace& of,
              std::size_t layouts,
              const kernels::AttentionProblem& problem);

  int device_;
  kernels::cuda::AttentionBounds bounds_;
  Side keys_, values_;
  DeviceBuffer frequencies_;
  kernels::KeyRotation rotation_;
};

}  // namespace detail

struct LayerAttention::Impl {
  AttentionOptions options;
  std::shared_ptr<const CodedVectors::Frame> keys, values;
  std::vector<float> frequencies;
  kernels::KeyRotation rotation;
  bool rotates = false;
  std::unique_ptr<detail::DeviceAttention> device;  // or nullptr: the CPU

  void set_rotation(const Rope& rope, int layer);
  void make_tiles(const CodedVectors& coded, detail::Uploads& uploads) const;
  kernels::AttentionProblem problem() const;  // without a batch
  detail::AttentionCall collect(const std::vector<Sequence>& sequences,
                                detail::Uploads* uploads) const;
};

}  // namespace lexico
