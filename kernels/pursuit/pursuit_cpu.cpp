// Pursuit on the CPU: chooses form and sizes, lays out the workspace, spreads blocks of signals
// over threads. The algorithm itself is in pursuit_simd.h, compiled once per instruction set.
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>

#include "kernels/pursuit/levels.h"
#include "kernels/pursuit/pursuit.h"

namespace lexico::kernels::cpu {
namespace {

constexpr std::size_t kAlignment = 64;

std::size_t round_up(std::size_t value, std::size_t unit) {
  return (value + unit - 1) / unit * unit;
}
int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }
std::size_t size(int count) { return static_cast<std::size_t>(count); }

PursuitShape shape_of(const PursuitProblem& p, const PursuitPlan& plan) {
  PursuitShape shape{};
  shape.num_atoms = p.num_atoms;
  shape.padded_atoms = round_up(p.num_atoms, kPanel);
  shape.dim = p.dim;
  shape.padded_dim = round_up(p.dim, 16);
  shape.max_atoms = p.max_atoms;
  shape.ols = p.rule == PursuitRule::kOls;
  shape.candidates = shape.ols ? p.candidates : 0;
  shape.relative_tolerance = p.relative_tolerance;
  shape.gram = plan.form == PursuitForm::kGram;
  shape.block = plan.block;
  return shape;
}

// With base == nullptr only counts.
std::size_t lay_out(const PursuitLevel& level,
                    const PursuitShape& shape,
                    char* base,
                    const float* atoms,
                    PreparedAtoms& prepared,
                    float** padded_rows) {
  std::size_t used = 0;
  const auto take = [&](std::size_t bytes) {
    char* piece = base == nullptr || bytes == 0 ? nullptr : base + used;
    used += round_up(bytes, kAlignment);
    return piece;
  };
  const bool pad = shape.padded_dim != shape.dim;
  *padded_rows = reinterpret_cast<float*>(
      take(pad ? size(shape.num_atoms) * size(shape.padded_dim) * sizeof(float) : 0));
  prepared.rows = pad ? *padded_rows : atoms;
  prepared.norms2 = reinterpret_cast<float*>(take(size(shape.padded_atoms) * sizeof(float)));
  prepared.panels = take(level.panel_bytes(shape));
  prepared.gram = take(shape.gram ? level.gram_bytes(shape) : 0);
  return used;
}

// Rows of a Gram matrix are read at random: with small pages each costs a handful of page walks.
void ask_for_large_pages(void* memory, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::size_t kPage = std::size_t{2} << 20;
  const std::size_t first = round_up(reinterpret_cast<std::size_t>(memory), kPage);
  const std::size_t end = (reinterpret_cast<std::size_t>(memory) + bytes) / kPage * kPage;
  if (end > first)
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // advice: may be refused
#else
  (void)memory, (void)bytes;
#endif
}

bool gram_pays(const PursuitProblem& p, std::int64_t signals_to_come) {
  if (current_level().correlate_is_fast) return false;
  PursuitPlan plan;
  plan.form = PursuitForm::kGram;
  if (current_level().gram_bytes(shape_of(p, plan)) > kMaxGramBytes || p.max_atoms < 2)
    return false;
  // In multiply-adds per atom and signal: every further pick costs dim, or the rows of the picks
  // before it.
  const double m = p.dim, s = p.max_atoms;
  const double correlate = s * m, gram = m + 0.5 * s * (s + 1) + 6 * s;
  return static_cast<double>(signals_to_come) * (correlate - gram) > p.num_atoms * m;
}

PursuitPlan plan_as(const PursuitProblem& p, PursuitForm form) {
  PursuitPlan plan;
  plan.level = &current_level();
  plan.form = form;
  plan.threads = p.threads > 0 ? p.threads : omp_get_num_procs();
  // A block's correlations should stay in the L2 cache beside a panel of atoms.
  const int signal_tile = plan.level->signal_tile;
  constexpr int kBlockBytes = 384 << 10, kMostTiles = 8;
  const int tiles =
      std::clamp(kBlockBytes / (round_up(p.num_atoms, kPanel) * 4 * signal_tile), 1, kMostTiles);
  const std::int64_t share = p.num_dictionaries * p.num_signals / (4 * plan.threads) / signal_tile;
  plan.block = signal_tile * static_cast<int>(std::clamp<std::int64_t>(share, 1, tiles));

  PursuitShape shape = shape_of(p, plan);
  PreparedAtoms prepared{};
  float* padded_rows = nullptr;
  plan.prepared_bytes = lay_out(*plan.level, shape, nullptr, nullptr, prepared, &padded_rows);
  plan.scratch_bytes =
      std::max(plan.level->scratch_bytes(shape),
               size(kPanel) * size(round_up(shape.padded_dim, kPanel)) * sizeof(float));
  constexpr std::size_t kMostPrepared = std::size_t{192} << 20;
  plan.wave = static_cast<int>(std::clamp<std::size_t>(
      kMostPrepared / std::max<std::size_t>(plan.prepared_bytes, 1), 1, size(p.num_dictionaries)));
  plan.workspace_bytes =
      size(plan.wave) * plan.prepared_bytes + size(plan.threads) * plan.scratch_bytes + kAlignment;
  return plan;
}

}  // namespace

PursuitPlan plan_pursuit(const PursuitProblem& p, std::int64_t signals_to_come) {
  if (p.form != PursuitForm::kAuto) return plan_as(p, p.form);
  if (gram_pays(p, signals_to_come)) {
    const PursuitPlan plan = plan_as(p, PursuitForm::kGram);
    // Dictionaries that do not all fit are prepared anew in each call, so it has to pay within one.
    if (plan.wave == p.num_dictionaries || gram_pays(p, p.num_signals)) return plan;
  }
  return plan_as(p, PursuitForm::kCorrelate);
}

Status pursuit(const PursuitProblem& p, const PursuitPlan& plan, void* memory, bool prepared) {
  if (p.num_signals == 0) return {};
  char* const workspace =
      reinterpret_cast<char*>(round_up(reinterpret_cast<std::size_t>(memory), kAlignment));
  const PursuitLevel& level = *plan.level;
  const PursuitShape shape = shape_of(p, plan);
  char* const scratch = workspace + size(plan.wave) * plan.prepared_bytes;
  const std::int64_t blocks = (p.num_signals + plan.block - 1) / plan.block;
  const int panels = shape.padded_atoms / kPanel;

  const auto atoms_of = [&](int dictionary, int slot, float** padded_rows) {
    PreparedAtoms atoms{};
    lay_out(level,
            shape,
            workspace + size(slot) * plan.prepared_bytes,
            p.atoms + size(dictionary) * size(p.num_atoms) * size(p.dim),
            atoms,
            padded_rows);
    return atoms;
  };
  const auto pack = [&](int dictionary, int slot, int panel) {
    float* padded_rows = nullptr;
    const PreparedAtoms atoms = atoms_of(dictionary, slot, &padded_rows);
    const int first = panel * kPanel, last = first + kPanel;
    if (padded_rows != nullptr) {
      const float* rows = p.atoms + size(dictionary) * size(p.num_atoms) * size(p.dim);
      for (int n = first; n < std::min(last, p.num_atoms); ++n) {
        float* to = padded_rows + size(n) * size(shape.padded_dim);
        std::memcpy(to, rows + size(n) * size(p.dim), size(p.dim) * sizeof(float));
        std::fill(to + p.dim, to + shape.padded_dim, 0.0f);
      }
    }
    level.prepare_panel(shape, atoms, panel);
  };
  const auto encode = [&](int dictionary, int slot, std::int64_t index, int thread) {
    float* padded_rows = nullptr;
    const PreparedAtoms atoms = atoms_of(dictionary, slot, &padded_rows);
    const std::int64_t begin = index * plan.block;
    const std::size_t first = size(dictionary) * static_cast<std::size_t>(p.num_signals) +
                              static_cast<std::size_t>(begin);
    PursuitBlock block{};
    block.num_signals = static_cast<int>(std::min<std::int64_t>(plan.block, p.num_signals - begin));
    block.signals = p.signals + first * size(p.dim);
    block.budgets = p.budgets == nullptr ? nullptr : p.budgets + first;
    block.indices = p.indices + first * size(p.max_atoms);
    block.weights = p.weights + first * size(p.max_atoms);
    block.counts = p.counts + first;
    block.residual_norms = p.residual_norms + first;
    block.curve = p.curve == nullptr ? nullptr : p.curve + first * size(p.max_atoms);
    level.encode(shape, atoms, block, scratch + size(thread) * plan.scratch_bytes);
  };

  if (!prepared) ask_for_large_pages(memory, plan.workspace_bytes);
  for (int start = 0; start < p.num_dictionaries; start += plan.wave) {
    const int count = std::min(plan.wave, p.num_dictionaries - start);
#pragma omp parallel num_threads(plan.threads)
    {
      if (!prepared) {
#pragma omp for schedule(static)
        for (int i = 0; i < count * panels; ++i) pack(start + i / panels, i / panels, i % panels);
        if (shape.gram) {
#pragma omp for schedule(dynamic)
          for (int i = 0; i < count * panels; ++i) {
            float* padded_rows = nullptr;
            const PreparedAtoms atoms = atoms_of(start + i / panels, i / panels, &padded_rows);
            level.prepare_gram(shape,
                               atoms,
                               i % panels,
                               scratch + size(omp_get_thread_num()) * plan.scratch_bytes);
          }
        }
      }
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < count * blocks; ++i) {
        const int slot = static_cast<int>(i / blocks);
        encode(start + slot, slot, i % blocks, omp_get_thread_num());
      }
    }
  }
  return {};
}

}  // namespace lexico::kernels::cpu
