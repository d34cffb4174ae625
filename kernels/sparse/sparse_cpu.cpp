// What codes decode to, and where the atoms should move: shares the work out over threads. The
// loops are in sparse_simd.h.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/pursuit/pursuit.h"
#include "kernels/sparse/sparse_level.h"

namespace lexico::kernels::cpu {
namespace {

/// At the level pursuit runs at.
const SparseLevel& level() {
#if defined(__x86_64__)
  const char* name = pursuit_level();
  if (std::strcmp(name, "avx2") == 0) return kSparseAvx2;
  if (std::strncmp(name, "avx512", 6) == 0) return kSparseAvx512;
#endif
  return kSparseGeneric;
}

int thread_count(int threads) { return threads > 0 ? threads : omp_get_max_threads(); }

/// Atoms are shared out in this many ranges, so that one dictionary also keeps several threads
/// busy.
constexpr int kAtomRanges = 16;

/// work(dictionary, first_atom, last_atom)
template <typename Work>
void for_atom_ranges(int num_dictionaries, int num_atoms, int threads, Work&& work) {
#pragma omp parallel for schedule(dynamic) num_threads(thread_count(threads))
  for (int task = 0; task < num_dictionaries * kAtomRanges; ++task) {
    const auto bound = [&](int r) {
      return static_cast<int>(static_cast<std::int64_t>(num_atoms) * r / kAtomRanges);
    };
    const int range = task % kAtomRanges;
    work(task / kAtomRanges, bound(range), bound(range + 1));
  }
}

void list_uses(const SparseProblem& p, int dictionary, const AtomUses& uses) {
  const std::int64_t num_slots = p.num_signals * p.max_atoms;
  const std::int32_t* indices = p.indices + dictionary * num_slots;
  std::int32_t* offsets = uses.offsets + static_cast<std::int64_t>(dictionary) * (p.num_atoms + 1);
  std::int32_t* slots = uses.slots + dictionary * num_slots;
  std::fill_n(offsets, p.num_atoms + 1, 0);
  // Counts one place up, then sums, then each list is filled from its start: offsets end shifted
  // right by one list, and are shifted back.
  for (std::int64_t slot = 0; slot < num_slots; ++slot)
    if (indices[slot] >= 0) ++offsets[indices[slot] + 1];
  for (int n = 0; n < p.num_atoms; ++n) offsets[n + 1] += offsets[n];
  for (std::int64_t slot = 0; slot < num_slots; ++slot)
    if (indices[slot] >= 0) slots[offsets[indices[slot]]++] = static_cast<std::int32_t>(slot);
  for (int n = p.num_atoms; n > 0; --n) offsets[n] = offsets[n - 1];
  offsets[0] = 0;
}

}  // namespace

Status sparse_residual(const SparseProblem& p,
                       const float* signals,
                       float* residual,
                       float* signal_norms,
                       float* residual_norms) {
  constexpr std::int64_t kRows = 256;
  const std::int64_t pieces = (p.num_signals + kRows - 1) / kRows;
  const SparseLevel& loops = level();
#pragma omp parallel for schedule(static) num_threads(thread_count(p.threads))
  for (std::int64_t task = 0; task < p.num_dictionaries * pieces; ++task) {
    const std::int64_t first = task % pieces * kRows;
    loops.residual(p,
                   static_cast<int>(task / pieces),
                   first,
                   std::min(p.num_signals, first + kRows),
                   signals,
                   residual,
                   signal_norms,
                   residual_norms);
  }
  return {};
}

Status atom_uses(const SparseProblem& p, const AtomUses& uses) {
#pragma omp parallel for schedule(dynamic) num_threads(thread_count(p.threads))
  for (int dictionary = 0; dictionary < p.num_dictionaries; ++dictionary)
    list_uses(p, dictionary, uses);
  return {};
}

Status sparse_gradient(const SparseProblem& p,
                       const AtomUses& uses,
                       const float* residual,
                       float scale,
                       float* gradient) {
  const SparseLevel& loops = level();
  for_atom_ranges(
      p.num_dictionaries, p.num_atoms, p.threads, [&](int dictionary, int first, int last) {
        loops.gradient(p, uses, dictionary, first, last, residual, scale, gradient);
      });
  return {};
}

Status adam_step(const AdamStep& step) {
  const SparseLevel& loops = level();
  for_atom_ranges(
      step.num_dictionaries,
      step.num_atoms,
      step.threads,
      [&](int dictionary, int first, int last) { loops.adam(step, dictionary, first, last); });
  return {};
}

Status add_co_occurrence(const SparseProblem& p,
                         const AtomUses& uses,
                         const float* signals,
                         float keep,
                         const CoOccurrence& sums) {
  const SparseLevel& loops = level();
  for_atom_ranges(
      p.num_dictionaries, p.num_atoms, p.threads, [&](int dictionary, int first, int last) {
        loops.co_occurrence(p, uses, dictionary, first, last, signals, keep, sums);
      });
  return {};
}

Status descend_atoms(int num_dictionaries,
                     int num_atoms,
                     int dim,
                     int threads,
                     const CoOccurrence& sums,
                     float* scratch,
                     float* atoms) {
  constexpr int kRows = 16;  // of a block's product that one thread takes at a time
  const SparseLevel& loops = level();
  const int inner =
      num_dictionaries >= thread_count(threads) ? 1 : thread_count(threads) / num_dictionaries;
  const std::int64_t N = num_atoms;
#pragma omp parallel for schedule(dynamic) \
    num_threads(std::min(num_dictionaries, thread_count(threads)))
  for (int p = 0; p < num_dictionaries; ++p) {
    float* D = atoms + p * N * dim;
    float* misfit = scratch + std::ptrdiff_t{p} * kDescentBlock * dim;
    for (int first = 0; first < num_atoms; first += kDescentBlock) {
      const int rows = std::min(kDescentBlock, num_atoms - first);
      const float* A = sums.codes + (p * N + first) * N;
      const float* B = sums.signals + (p * N + first) * dim;
#pragma omp parallel for schedule(static) num_threads(inner) if (inner > 1)
      for (int row = 0; row < rows; row += kRows)
        loops.misfit(std::min(kRows, rows - row),
                     num_atoms,
                     dim,
                     A + row * N,
                     B + std::ptrdiff_t{row} * dim,
                     D,
                     misfit + std::ptrdiff_t{row} * dim);
      loops.descend(rows, num_atoms, dim, A, first, misfit, D + std::ptrdiff_t{first} * dim);
    }
  }
  return {};
}

}  // namespace lexico::kernels::cpu
