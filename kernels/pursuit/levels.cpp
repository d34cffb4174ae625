// Which instruction set level pursuit runs at.
#include "kernels/pursuit/levels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/common/cpu_features.h"
#include "kernels/pursuit/pursuit.h"

namespace lexico::kernels::cpu {
namespace {

const PursuitLevel* offered = nullptr;

// Worst first.
const std::vector<const PursuitLevel*>& levels_here() {
  static const std::vector<const PursuitLevel*> levels = [] {
    std::vector<const PursuitLevel*> here = {&kGenericLevel};
#if defined(__x86_64__)
    const CpuFeatures& cpu = cpu_features();
    if (cpu.avx2) here.push_back(&kAvx2Level);
    if (cpu.avx512) here.push_back(&kAvx512Level);
    if (cpu.avx512_vnni) here.push_back(&kAvx512VnniLevel);
    if (cpu.avx512_vnni && cpu.amx && agrees(kAmxLevel, kAvx512Level)) here.push_back(&kAmxLevel);
#endif
    if (offered != nullptr) here.insert(here.begin(), offered);
    return here;
  }();
  return levels;
}

const std::string& names_here() {
  static const std::string names = [] {
    std::string joined;
    for (const PursuitLevel* level : levels_here()) {
      if (!joined.empty()) joined += '|';
      joined += level->name;
    }
    return joined;
  }();
  return names;
}

const PursuitLevel* find(const std::string& name) {
  for (const PursuitLevel* level : levels_here()) {
    if (name == level->name) return level;
  }
  return nullptr;
}

std::atomic<const PursuitLevel*> chosen = nullptr;

// A small case that has atoms and signals beyond a full tile, and dimensions too.
constexpr int kTrialAtoms = 192, kTrialDim = 80, kTrialSignals = 39, kTrialPicks = 6;

struct TrialCodes {
  std::vector<std::int32_t> indices, counts;
  std::vector<float> weights, norms;
};

TrialCodes encode_trial(const PursuitLevel& level,
                        const std::vector<float>& rows,
                        const std::vector<float>& signals,
                        bool ols,
                        bool gram) {
  PursuitShape shape{};
  shape.num_atoms = shape.padded_atoms = kTrialAtoms;
  shape.dim = shape.padded_dim = kTrialDim;
  shape.max_atoms = kTrialPicks;
  shape.ols = ols;
  shape.gram = gram;
  shape.block = (kTrialSignals + level.signal_tile - 1) / level.signal_tile * level.signal_tile;
  constexpr std::size_t kLine = 64;
  const auto aligned = [](std::vector<char>& memory, std::size_t bytes) {
    memory.resize(bytes + kLine);
    void* start = memory.data();
    std::size_t space = memory.size();
    return std::align(kLine, bytes, start, space);
  };
  std::vector<char> panels, gram_memory, scratch_memory;
  std::vector<float> norms2(kTrialAtoms);
  PreparedAtoms atoms{
      rows.data(), aligned(panels, level.panel_bytes(shape)), norms2.data(), nullptr};
  if (gram) atoms.gram = aligned(gram_memory, level.gram_bytes(shape));
  void* const scratch = aligned(
      scratch_memory, std::max<std::size_t>(level.scratch_bytes(shape), kPanel * 2 * kPanel * 4));
  for (int panel = 0; panel < kTrialAtoms / kPanel; ++panel)
    level.prepare_panel(shape, atoms, panel);
  for (int panel = 0; gram && panel < kTrialAtoms / kPanel; ++panel)
    level.prepare_gram(shape, atoms, panel, scratch);
  constexpr std::size_t kSlots = std::size_t{kTrialSignals} * kTrialPicks;
  TrialCodes codes{std::vector<std::int32_t>(kSlots),
                   std::vector<std::int32_t>(kTrialSignals),
                   std::vector<float>(kSlots),
                   std::vector<float>(kTrialSignals)};
  PursuitBlock block{};
  block.num_signals = kTrialSignals;
  block.signals = signals.data();
  block.indices = codes.indices.data();
  block.weights = codes.weights.data();
  block.counts = codes.counts.data();
  block.residual_norms = codes.norms.data();
  level.encode(shape, atoms, block, scratch);
  return codes;
}

}  // namespace

bool agrees(const PursuitLevel& level, const PursuitLevel& with) {
  std::uint32_t state = 1;
  const auto next = [&state] {  // -1 to 1
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / 8388608.0f - 1;
  };
  std::vector<float> rows(kTrialAtoms * kTrialDim), signals(kTrialSignals * kTrialDim);
  for (float& x : rows) x = next();
  for (float& x : signals) x = next();
  for (std::size_t n = 0; n < kTrialAtoms; ++n) {
    float norm2 = 0;
    for (std::size_t k = 0; k < kTrialDim; ++k)
      norm2 += rows[n * kTrialDim + k] * rows[n * kTrialDim + k];
    for (std::size_t k = 0; k < kTrialDim; ++k) rows[n * kTrialDim + k] /= std::sqrt(norm2);
  }
  for (const bool ols : {false, true}) {
    for (const bool gram : {false, true}) {
      const TrialCodes got = encode_trial(level, rows, signals, ols, gram),
                       want = encode_trial(with, rows, signals, ols, gram);
      if (got.indices != want.indices || got.counts != want.counts) return false;
      for (std::size_t i = 0; i < want.weights.size(); ++i) {
        if (!(std::abs(got.weights[i] - want.weights[i]) < 1e-4f)) return false;
      }
    }
  }
  return true;
}

void offer_level(const PursuitLevel& level) { offered = &level; }

const PursuitLevel& current_level() {
  if (chosen.load() == nullptr && !set_pursuit_level(nullptr).ok()) chosen = levels_here().back();
  return *chosen.load();
}

const char* pursuit_level() { return current_level().name; }
const char* pursuit_levels() { return names_here().c_str(); }

Status set_pursuit_level(const char* name) {
  if (name == nullptr) name = std::getenv("LEXICO_CPU");
  if (name == nullptr || *name == '\0') {
    chosen = levels_here().back();
    return {};
  }
  const PursuitLevel* level = find(name);
  if (level == nullptr) {
    constexpr std::string_view kAll[] = {"generic", "avx2", "avx512", "avx512vnni", "amx"};
    const bool known = std::find(std::begin(kAll), std::end(kAll), name) != std::end(kAll);
    thread_local std::string message;
    message = "LEXICO_CPU is '" + std::string(name) + "', " +
              (known ? "which this CPU cannot run" : "which is no speed level") +
              "; this CPU has " + names_here();
    return {1, message.c_str()};
  }
  chosen = level;
  return {};
}

}  // namespace lexico::kernels::cpu
