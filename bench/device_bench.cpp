// What the kernels of the CUDA backend do on this machine's device:
//   device_bench [--rounds N] [--turns] [--tiny]
// Prints how many settings there are, then a JSON object for each setting and round: its name,
// milliseconds, and what that is a second or in bytes. --turns waits for a line before every round,
// so that another program can take turns (bench/device_against_torch.py). --tiny: sizes that an
// emulated device does in a moment. Needs nothing but the kernels, so it can be built and run where
// only CUDA is.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/common/runtime.h"
#include "kernels/memory/memory.h"
#include "kernels/pursuit/pursuit.h"
#include "kernels/sparse/sparse.h"

namespace lexico::kernels {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

void check(const Status& status, const std::string& what) {
  if (!status.ok()) throw std::runtime_error(what + ": " + status.what);
}

/// Device memory that lives as long as its setting.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (void* p : owned_) cuda::release(p);
  }
  template <typename T>
  T* make(std::size_t count) {
    void* p = nullptr;
    check(cuda::allocate(&p, count * sizeof(T)), std::to_string(count * sizeof(T)) + " bytes");
    owned_.push_back(p);
    return static_cast<T*>(p);
  }
  template <typename T>
  T* upload(const std::vector<T>& values) {
    return upload(values, values.size());
  }
  /// `count` values: these over and over.
  template <typename T>
  T* upload(const std::vector<T>& values, std::size_t count) {
    T* const p = make<T>(count);
    for (std::size_t done = 0; done < count; done += values.size()) {
      const std::size_t part = std::min(values.size(), count - done);
      check(cuda::copy(p + done, values.data(), part * sizeof(T), nullptr), "copy");
    }
    check(cuda::synchronize(nullptr), "copy");
    return p;
  }

 private:
  std::vector<void*> owned_;
};

std::vector<float> normals(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

std::vector<float> unit_rows(std::int64_t rows, int dim, unsigned seed) {
  std::vector<float> values = normals(size(rows * dim), seed);
  for (std::int64_t n = 0; n < rows; ++n) {
    float norm2 = 0;
    for (int k = 0; k < dim; ++k) norm2 += values[size(n * dim + k)] * values[size(n * dim + k)];
    for (int k = 0; k < dim; ++k) values[size(n * dim + k)] /= std::sqrt(norm2);
  }
  return values;
}

/// Something to time. `run` puts work on the default stream and does not wait.
struct Setting {
  std::string name;
  double vectors = 0;  ///< done by one call
  double bytes = 0;    ///< read by one call at least
  std::function<void()> run;
  std::shared_ptr<Memory> memory;
};

Setting pursuit_setting(
    int dim, int num_atoms, int max_atoms, std::int64_t signals, const char* rule) {
  auto memory = std::make_shared<Memory>();
  PursuitProblem p;
  p.num_signals = signals;
  p.num_atoms = num_atoms, p.dim = dim, p.max_atoms = max_atoms;
  p.rule = rule[1] == 'l' ? PursuitRule::kOls : PursuitRule::kOmp;
  p.candidates = std::strlen(rule) > 4 ? std::atoi(rule + 4) : 0;
  p.atoms = memory->upload(unit_rows(num_atoms, dim, 1));
  const std::int64_t distinct = std::min<std::int64_t>(signals, 1 << 16);
  p.signals = memory->upload(normals(size(distinct * dim), 2), size(signals * dim));
  p.indices = memory->make<std::int32_t>(size(signals * max_atoms));
  p.weights = memory->make<float>(size(signals * max_atoms));
  p.counts = memory->make<std::int32_t>(size(signals));
  p.residual_norms = memory->make<float>(size(signals));
  cuda::PursuitPlan plan;
  check(cuda::plan_pursuit(p, cuda::PursuitPath::kAuto, &plan), "plan_pursuit");
  char* const workspace = memory->make<char>(plan.workspace_bytes);
  const char* const paths[] = {"auto", "plain", "tensor", "hopper"};
  const std::string name = std::string("pursuit ") + rule + " m" + std::to_string(dim) + " N" +
                           std::to_string(num_atoms) + " s" + std::to_string(max_atoms) + ", " +
                           paths[static_cast<int>(plan.path)];
  return {
      name,
      static_cast<double>(signals),
      0,
      [p, plan, workspace] { check(cuda::pursuit(p, plan, workspace, false, nullptr), "pursuit"); },
      memory};
}

/// A step of the published recipe: encode, residual, gradient, Adam.
Setting training_setting(
    int dictionaries, int num_atoms, int dim, std::int64_t batch, int max_atoms) {
  auto memory = std::make_shared<Memory>();
  const std::size_t atoms = size(std::int64_t{dictionaries} * num_atoms * dim);
  const std::size_t signals = size(dictionaries * batch), slots = signals * size(max_atoms);
  PursuitProblem p;
  p.num_dictionaries = dictionaries, p.num_signals = batch;
  p.num_atoms = num_atoms, p.dim = dim, p.max_atoms = max_atoms;
  const std::vector<float> one = unit_rows(num_atoms, dim, 1);
  float* const dictionary = memory->upload(one, atoms);
  p.atoms = dictionary;
  p.signals = memory->upload(normals(signals * size(dim), 2));
  p.indices = memory->make<std::int32_t>(slots);
  p.weights = memory->make<float>(slots);
  p.counts = memory->make<std::int32_t>(signals);
  p.residual_norms = memory->make<float>(signals);
  cuda::PursuitPlan plan;
  check(cuda::plan_pursuit(p, cuda::PursuitPath::kAuto, &plan), "plan_pursuit");
  char* const workspace = memory->make<char>(plan.workspace_bytes);

  const SparseProblem codes{
      dictionaries, batch, num_atoms, dim, max_atoms, 0, dictionary, p.indices, p.weights};
  const AtomUses uses{
      memory->make<std::int32_t>(size(std::int64_t{dictionaries} * (num_atoms + 1))),
      memory->make<std::int32_t>(slots)};
  char* const sorting = memory->make<char>(cuda::atom_uses_workspace_bytes(codes));
  float* const residual = memory->make<float>(signals * size(dim));
  float* const norms = memory->make<float>(2 * signals);
  float* const gradient = memory->make<float>(atoms);
  const std::vector<float> zeros(one.size(), 0.0f);
  AdamStep adam{dictionaries,
                num_atoms,
                dim,
                0,
                1e-4,
                0.9,
                0.999,
                1e-8,
                1,
                true,
                nullptr,
                gradient,
                dictionary,
                memory->upload(zeros, atoms),
                memory->upload(zeros, atoms)};
  adam.scales = memory->upload(std::vector<float>(size(dictionaries), 1.0f));
  const float scale = -2.0f / static_cast<float>(signals * size(dim));
  const std::string name = "training step P" + std::to_string(dictionaries) + " m" +
                           std::to_string(dim) + " N" + std::to_string(num_atoms) + " s" +
                           std::to_string(max_atoms) + " batch " + std::to_string(batch);
  return {
      name,
      static_cast<double>(signals),
      0,
      [=]() mutable {
        check(cuda::pursuit(p, plan, workspace, false, nullptr), "pursuit");
        check(cuda::sparse_residual(codes, p.signals, residual, norms, norms + signals, nullptr),
              "residual");
        check(cuda::atom_uses(codes, uses, sorting, nullptr), "atom_uses");
        check(cuda::sparse_gradient(codes, uses, residual, scale, gradient, nullptr), "gradient");
        check(cuda::adam_step(adam, nullptr), "adam_step");
        ++adam.step;
      },
      memory};
}

/// A decode step over random codes; every call is of another layer, so that no cache holds the
/// codes of the last one.
struct AttentionSizes {
  std::int64_t tokens = 0;
  int kv_heads = 8, group = 4, dim = 128, num_atoms = 4096, slots = 8;
  bool fp8 = false;        ///< E4M3 weights; else "packed": 5 bits a weight, 8 of scale
  int tile_tokens = 4096;  ///< of the values; 0: all are in rows
  bool half_tables = false;
  int layers = 8;
};

Setting attention_setting(const AttentionSizes& sizes) {
  auto memory = std::make_shared<Memory>();
  const int kv_heads = sizes.kv_heads, dim = sizes.dim, slots = sizes.slots;
  CodeLayout layout;
  layout.slots = slots;
  layout.index_bits = static_cast<int>(std::lround(std::log2(sizes.num_atoms)));
  layout.weights = sizes.fp8 ? CodedWeights::kE4m3 : CodedWeights::kLevels;
  if (!sizes.fp8) layout.weight_bits = 5, layout.scale_bits = 8;
  const std::size_t block = block_bytes(layout);

  AttentionProblem p;
  p.batch = 1, p.kv_heads = kv_heads, p.group = sizes.group, p.dim = dim;
  p.softmax_scale = 1 / std::sqrt(static_cast<float>(dim));
  p.page_tokens = 1024;
  p.value_tile_tokens = sizes.tile_tokens;
  const std::vector<float> levels = normals(size(slots) * 32, 3);
  CodeLayout on_device = layout;
  on_device.levels = memory->upload(levels);
  on_device.scales = memory->upload(std::vector<float>(256, 1.0f));
  CodedSpace space;
  space.layout = memory->upload(std::vector<CodeLayout>{on_device});
  space.num_atoms = sizes.num_atoms;
  space.atoms = memory->upload(unit_rows(sizes.num_atoms, dim, 4));
  p.keys = p.values = space;
  p.queries = memory->upload(normals(size(kv_heads * sizes.group * dim), 5));
  p.out = memory->make<float>(size(kv_heads * sizes.group * dim));

  // The same few pages over and over, and the tiles that these make.
  constexpr int kPages = 8;
  const std::int64_t pages = (sizes.tokens + p.page_tokens - 1) / p.page_tokens;
  const std::size_t page_blocks = size(kv_heads * (p.page_tokens / kBlockTokens));
  const std::size_t page_bytes = (page_blocks * block + kPageSlack + 255) / 256 * 256;
  std::mt19937 random(6);
  std::vector<std::uint8_t> bytes(page_bytes * kPages);
  for (std::uint8_t& b : bytes) b = static_cast<std::uint8_t>(random());
  for (std::size_t i = 0; i < kPages * page_blocks && sizes.fp8; ++i) {  // no NaN
    std::uint8_t* const weights = &bytes[i / page_blocks * page_bytes + i % page_blocks * block] +
                                  slots * layout.index_bits * (kBlockTokens / 8);
    for (int k = 0; k < slots * kBlockTokens; ++k) weights[k] &= 0xbf;
  }
  const int tiles = sizes.tile_tokens == 0 ? 0 : static_cast<int>(sizes.tokens / sizes.tile_tokens);
  std::vector<std::vector<std::uint8_t>> packed;
  for (int j = 0; j < std::min(tiles, kPages * p.page_tokens / std::max(1, sizes.tile_tokens));
       ++j) {
    layout.levels = levels.data();
    const std::uint8_t* of_host[kPages];
    for (int i = 0; i < kPages; ++i) of_host[i] = &bytes[size(i) * page_bytes];
    const ValueTileSource source{&layout,
                                 0,
                                 kv_heads,
                                 sizes.num_atoms,
                                 sizes.tile_tokens,
                                 of_host,
                                 p.page_tokens,
                                 std::int64_t{j} * sizes.tile_tokens};
    if (!value_tiles_fit(layout, source.tile_tokens, source.num_atoms))
      throw std::runtime_error("attention: tiles do not take these codes");
    std::vector<std::uint32_t> workspace(value_tile_workspace_bytes(source.num_atoms) / 4);
    packed.emplace_back(value_tile_bytes(source, workspace.data()));
    pack_value_tile(source, workspace.data(), packed.back().data());
  }
  std::vector<const AttentionSequence*> sequences;
  double read = 0;
  for (int layer = 0; layer < sizes.layers; ++layer) {
    AttentionSequence sequence;
    sequence.coded_tokens = sizes.tokens;
    read = 0;
    for (CodedRun* run : {&sequence.keys, &sequence.values}) {
      const std::int64_t in_tiles =
          run == &sequence.values ? std::int64_t{tiles} * sizes.tile_tokens : 0;
      const std::int64_t first = in_tiles / p.page_tokens;  // page that is needed
      const std::uint8_t* const codes =
          memory->upload(bytes, page_bytes * size(std::max<std::int64_t>(1, pages - first)));
      std::vector<const std::uint8_t*> addresses(size(pages), nullptr);
      for (std::int64_t j = first; j < pages; ++j)
        addresses[size(j)] = codes + size(j - first) * page_bytes;
      run->pages = memory->upload(addresses);
      read += static_cast<double>(page_bytes) * static_cast<double>(pages - first);
    }
    std::vector<const std::uint8_t*> addresses;
    for (int j = 0; j < tiles; ++j) {
      addresses.push_back(memory->upload(packed[size(j) % packed.size()]));
      read += static_cast<double>(packed[size(j) % packed.size()].size());
    }
    if (tiles > 0) sequence.values.tiles = memory->upload(addresses);
    sequence.values.num_tiles = tiles;
    sequences.push_back(memory->upload(std::vector<AttentionSequence>{sequence}));
  }
  p.sequences = sequences[0];
  cuda::AttentionBounds bounds;
  check(cuda::attention_device(&bounds), "attention_device");
  bounds.coded_tokens = sizes.tokens;
  bounds.key_block_bytes = bounds.value_block_bytes = block;
  bounds.key_weights = bounds.value_weights = layout.weights;
  bounds.half_tables = sizes.half_tables;
  char* const workspace = memory->make<char>(cuda::attention_workspace_bytes(p, bounds));
  const std::string name =
      "attention " + std::to_string(kv_heads) + "x" + std::to_string(sizes.group) + " m" +
      std::to_string(dim) + " N" + std::to_string(sizes.num_atoms) + " s" + std::to_string(slots) +
      " context " + std::to_string(sizes.tokens) + (sizes.fp8 ? ", fp8" : ", packed") +
      (tiles == 0 ? ", rows" : ", tiles of " + std::to_string(sizes.tile_tokens)) +
      (sizes.half_tables ? ", half tables" : "");
  return {name,
          1,
          read,
          [=, turn = std::size_t{0}]() mutable {
            p.sequences = sequences[turn++ % sequences.size()];
            check(cuda::attention(p, bounds, workspace, nullptr), "attention");
          },
          memory};
}

/// Milliseconds a call: of as many as take `least_ms`, by events of the device.
class Clock {
 public:
  Clock() {
    for (cudaEvent_t* event : {&start_, &end_})
      check(cuda::as_status(cuda::runtime().event_create_with_flags(event, 0)), "event");
  }
  double ms(const std::function<void()>& run, int calls) {
    check(cuda::as_status(cuda::runtime().event_record(start_, nullptr)), "event");
    for (int i = 0; i < calls; ++i) run();
    check(cuda::as_status(cuda::runtime().event_record(end_, nullptr)), "event");
    check(cuda::as_status(cuda::runtime().event_synchronize(end_)), "run");
    float total = 0;
    check(cuda::as_status(cuda::runtime().event_elapsed_time(&total, start_, end_)), "event");
    return static_cast<double>(total) / calls;
  }

 private:
  cudaEvent_t start_ = nullptr, end_ = nullptr;
};

int run(int rounds, bool turns, bool tiny) {
  if (cuda::device_count() == 0) {
    std::fprintf(stderr, "device_bench: no CUDA device here\n");
    return 77;
  }
  std::vector<std::function<Setting()>> makers;
  if (tiny) {
    makers = {[] { return pursuit_setting(32, 128, 4, 40, "omp"); },
              [] { return pursuit_setting(32, 128, 4, 40, "ols-8"); },
              [] { return training_setting(2, 128, 32, 16, 4); },
              [] {
                return attention_setting({1100, 2, 4, 32, 128, 4, false, 0, false, 2});
              },
              [] {
                return attention_setting({1100, 2, 4, 32, 128, 4, true, 512, false, 2});
              },
              [] {
                return attention_setting({1100, 2, 4, 32, 128, 4, false, 512, true, 2});
              }};
  } else {
    for (const char* rule : {"omp", "ols-16"}) {
      makers.push_back([=] { return pursuit_setting(128, 4096, 8, 1 << 20, rule); });
      makers.push_back([=] { return pursuit_setting(128, 4096, 32, 1 << 18, rule); });
    }
    // Of so few atoms the library weighs all (Selection::candidates_among).
    for (const char* rule : {"omp", "ols"})
      makers.push_back([=] { return pursuit_setting(64, 1024, 8, 1 << 21, rule); });
    makers.push_back([] { return training_setting(64, 4096, 128, 64, 8); });
    std::vector<AttentionSizes> decodes;
    for (const std::int64_t tokens : {4096, 32768, 131072}) {
      for (const int slots : {8, 16}) {
        for (const bool half : {false, true}) {
          decodes.push_back({tokens});
          decodes.back().slots = slots, decodes.back().half_tables = half;
        }
      }
    }
    for (const int slots : {8, 16}) {
      decodes.push_back({131072});
      decodes.back().slots = slots, decodes.back().half_tables = decodes.back().fp8 = true;
    }
    for (const int tile_tokens : {8192, 0}) {
      decodes.push_back({131072});
      decodes.back().half_tables = true, decodes.back().tile_tokens = tile_tokens;
    }
    for (const AttentionSizes& sizes : decodes)
      makers.push_back([=] { return attention_setting(sizes); });
  }
  std::vector<Setting> settings;
  for (const auto& make : makers) settings.push_back(make());
  std::printf("{\"settings\": %zu}\n", settings.size());
  std::fflush(stdout);
  Clock clock;
  const double least_ms = tiny ? 0 : 50;
  std::string line;
  for (int round = 0; round < rounds; ++round) {
    if (turns && !std::getline(std::cin, line)) return 1;
    for (const Setting& setting : settings) {
      const double once = clock.ms(setting.run, 1);  // the first call loads code
      const double left = least_ms / std::max(clock.ms(setting.run, 1), 1e-3);
      const double ms = clock.ms(setting.run, static_cast<int>(std::clamp(left, 1.0, 2000.0)));
      std::printf(
          "{\"name\": \"%s\", \"round\": %d, \"ms\": %.6f, \"first_ms\": %.6f, \"vectors_per_s\": "
          "%.1f, \"bytes\": %.0f}\n",
          setting.name.c_str(),
          round,
          ms,
          once,
          setting.vectors / ms * 1e3,
          setting.bytes);
    }
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace lexico::kernels

int main(int argc, char** argv) {
  int rounds = 3;
  bool turns = false, tiny = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--rounds" && i + 1 < argc) {
      rounds = std::atoi(argv[++i]);
    } else if (word == "--turns") {
      turns = true;
    } else if (word == "--tiny") {
      tiny = true;
    } else {
      std::fprintf(stderr, "usage: device_bench [--rounds N] [--turns] [--tiny]\n");
      return 2;
    }
  }
  try {
    return lexico::kernels::run(rounds, turns, tiny);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "device_bench: %s\n", e.what());
    return 1;
  }
}
