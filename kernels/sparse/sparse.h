#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/common/status.h"
#include "kernels/common/stream.h"

namespace lexico::kernels {

/// Codes of P dictionaries with B signals each, and the atoms they refer to. All arrays are
/// row-major and on the backend's device; an index of -1 marks an unused slot, and so are those
/// after it.
struct SparseProblem {
  int num_dictionaries;      // P
  std::int64_t num_signals;  // B, per dictionary; num_signals * max_atoms < 2^31
  int num_atoms, dim, max_atoms;
  int threads;                  // CPU: 0 = all
  const float* atoms;           // [P, num_atoms, dim]
  const std::int32_t* indices;  // [P, B, max_atoms]
  const float* weights;         // [P, B, max_atoms]
};

/// The codes seen from the atoms: which slots of a dictionary's codes use atom n, in ascending
/// order: slots[offsets[n]], ... slots[offsets[n + 1] - 1]; slot / max_atoms is the signal.
struct AtomUses {
  std::int32_t* offsets;  // [P, num_atoms + 1]
  std::int32_t* slots;    // [P, B * max_atoms]
};

/// One step of Adam (Kingma and Ba, arXiv:1412.6980) on unit atoms: the gradient loses its part
/// along the atom first.
struct AdamStep {
  int num_dictionaries, num_atoms, dim;
  int threads;
  double rate, beta1, beta2, epsilon;
  std::int64_t step;      // of these moments, from 1
  bool normalize_first;   // the atoms are scaled to unit length before the step (as published), not
                          // after it
  const float* scales;    // [P]: the gradient's factor; 0 leaves the dictionary and its moments
  const float* gradient;  // [P, num_atoms, dim]
  float* atoms;           // [P, num_atoms, dim]
  float *first, *second;  // the moments, likewise
};

/// Sums over codes with forgetting, A = sum y y^T and B = sum y x^T.
struct CoOccurrence {
  float* codes;    // A: [P, num_atoms, num_atoms]
  float* signals;  // B: [P, num_atoms, dim]
};

constexpr int kDescentBlock = 64;  ///< atoms that descend_atoms takes together

namespace cpu {
/// residual [P, B, dim] = signals - D y, and |x|, |r| of each signal [P, B].
Status sparse_residual(const SparseProblem& problem,
                       const float* signals,
                       float* residual,
                       float* signal_norms,
                       float* residual_norms);

Status atom_uses(const SparseProblem& problem, const AtomUses& uses);

// Every atom is summed in the order of the signals, whatever the thread count.

/// gradient [P, num_atoms, dim] = scale * sum over signals of y_n r: with scale = -2 / (number of
/// values), the gradient of the mean of (x - D y)^2 in the atoms, y held fixed.
Status sparse_gradient(const SparseProblem& problem,
                       const AtomUses& uses,
                       const float* residual,
                       float scale,
                       float* gradient);

Status adam_step(const AdamStep& step);

/// A = keep A + sum y y^T, B = keep B + sum y x^T over the signals.
Status add_co_occurrence(const SparseProblem& problem,
                         const AtomUses& uses,
                         const float* signals,
                         float keep,
                         const CoOccurrence& sums);

/// One sweep of block coordinate descent on |x - D y|^2 summed as A and B have it, unit atoms:
/// d_n <- (b_n - sum over k != n of A_nk d_k) / |...|, one after the other (Mairal et al.,
/// arXiv:0908.0050, algorithm 2). Atoms in no code stay. Blocks of kDescentBlock atoms share one
/// matrix product. @param scratch  [P, kDescentBlock, dim].
using kernels::kDescentBlock;
Status descend_atoms(int num_dictionaries,
                     int num_atoms,
                     int dim,
                     int threads,
                     const CoOccurrence& sums,
                     float* scratch,
                     float* atoms);
}  // namespace cpu

/// The same on the device: arrays, also AdamStep::scales, lie there, and `threads` plays no part.
/// The work is put on the stream; launches depend on sizes alone. No atomic additions of floats:
/// results are bit-identical from run to run. Rows of atoms, signals and sums begin at multiples of
/// 16 bytes when dim (for `codes`: num_atoms) is a multiple of 4.
namespace cuda {
Status sparse_residual(const SparseProblem& problem,
                       const float* signals,
                       float* residual,
                       float* signal_norms,
                       float* residual_norms,
                       Stream stream);

/// A counting sort: about 4 num_atoms bytes of scratch for every 1024 slots.
std::size_t atom_uses_workspace_bytes(const SparseProblem& problem);
Status atom_uses(const SparseProblem& problem,
                 const AtomUses& uses,
                 void* workspace,
                 Stream stream);

/// Every atom is summed in the order of the signals.
Status sparse_gradient(const SparseProblem& problem,
                       const AtomUses& uses,
                       const float* residual,
                       float scale,
                       float* gradient,
                       Stream stream);

Status adam_step(const AdamStep& step, Stream stream);

Status add_co_occurrence(const SparseProblem& problem,
                         const AtomUses& uses,
                         const float* signals,
                         float keep,
                         const CoOccurrence& sums,
                         Stream stream);

/// Two launches for each kDescentBlock atoms.
Status descend_atoms(int num_dictionaries,
                     int num_atoms,
                     int dim,
                     const CoOccurrence& sums,
                     float* scratch,
                     float* atoms,
                     Stream stream);
}  // namespace cuda

}  // namespace lexico::kernels
