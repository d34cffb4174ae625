#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/common/status.h"
#include "kernels/common/stream.h"

namespace lexico::kernels {

enum class PursuitRule : int { kOmp = 0, kOls = 1 };

/// How correlations are kept up to date between picks (docs/encoder.md says which pays where). The
/// codes do not depend on it: a form only proposes atoms, the pick is settled on fp32 atoms.
enum class PursuitForm : int {
  kAuto = 0,       ///< the cheapest for these sizes
  kCorrelate = 1,  ///< atoms times residual again for every pick: no memory beyond the packed atoms
  kGram = 2,  ///< correlations updated from rows of the atoms' Gram matrix: 4 N^2 bytes for each
              ///< dictionary, 2 N^2 with VNNI
};

/// One batched pursuit over P dictionaries of one shape. Every pointer is on the backend's device;
/// all arrays are row-major. See lexico/encoder.h for what happens to zero, NaN and exactly sparse
/// signals.
struct PursuitProblem {
  int num_dictionaries = 1;      // P
  std::int64_t num_signals = 0;  // B, per dictionary
  int num_atoms = 0, dim = 0, max_atoms = 0;
  PursuitRule rule = PursuitRule::kOmp;
  int candidates = 0;  // OLS among the best this many by |d.r| at any pick so far; 0: all atoms
  float relative_tolerance = 0;    // stop once |r| <= relative_tolerance * |x|
  int threads = 0;                 // CPU: 0 = all
  const float* atoms = nullptr;    // [P, num_atoms, dim], rows of unit L2 norm
  const float* signals = nullptr;  // [P, B, dim]
  const std::int32_t* budgets =
      nullptr;                      // nullptr, or [P, B]: at most this many atoms for the signal
  std::int32_t* indices = nullptr;  // out [P, B, max_atoms]; -1 in unused slots
  float* weights = nullptr;         // out [P, B, max_atoms]; 0 in unused slots
  std::int32_t* counts = nullptr;   // out [P, B]
  float* residual_norms = nullptr;  // out [P, B], L2; NaN if the signal holds NaN or Inf
  float* curve =
      nullptr;  // nullptr, or out [P, B, max_atoms]: |r| after each atom, the last value repeated

  PursuitForm form = PursuitForm::kAuto;  // CPU
};

namespace cpu {

struct PursuitLevel;  // kernels/pursuit/level.h

/// What one call of `pursuit` does and holds; made by `plan_pursuit`, valid for problems of the
/// same sizes and options.
struct PursuitPlan {
  const PursuitLevel* level = nullptr;         // the one in use when the plan was made
  PursuitForm form = PursuitForm::kCorrelate;  // never kAuto
  int threads = 1;
  int wave = 1;                     // dictionaries prepared at a time
  int block = 1;                    // signals that one thread takes at a time
  std::size_t prepared_bytes = 0;   // of one dictionary: packed atoms, Gram matrix
  std::size_t scratch_bytes = 0;    // of one thread
  std::size_t workspace_bytes = 0;  // all of it
};

/// Chooses the form (unless the problem names one) by sizes and number of signals.
/// `signals_to_come`: how many signals per dictionary, this call's included, the atoms are expected
/// to serve before they change. The Gram form is chosen only where its matrices stay within
/// kMaxGramBytes.
PursuitPlan plan_pursuit(const PursuitProblem& problem, std::int64_t signals_to_come);

constexpr std::size_t kMaxGramBytes = std::size_t{160} << 20;

/// Encodes. `workspace` has plan.workspace_bytes.
/// @param prepared  the workspace holds what an earlier call with this plan and these atoms left in
/// it, and
///                  plan.wave == num_dictionaries: packing and Gram are not made again.
Status pursuit(const PursuitProblem& problem,
               const PursuitPlan& plan,
               void* workspace,
               bool prepared);

/// Name of the instruction set level in use ("generic", "avx2", ...), or the names there are,
/// separated by '|'.
const char* pursuit_level();
const char* pursuit_levels();

/// Sets the level by name for all later calls; nullptr: LEXICO_CPU, else the best there is.
/// Fails on a name that is unknown or that this machine cannot run; `what` then says what is wrong.
Status set_pursuit_level(const char* name);

}  // namespace cpu

namespace cuda {

/// How the next atom is found. All paths re-fit in fp32 from the fp32 atoms, so weights and
/// residual norms have the same accuracy on each.
enum class PursuitPath : int {
  kAuto = 0,   ///< the fastest that this device and these sizes allow
  kPlain = 1,  ///< all correlations in fp32; any sizes and rules
  /// Correlations on tensor cores in fp16 (residuals scaled to unit norm); of the best atoms of
  /// many segments those that rounding cannot tell from the best are scored again in fp32. Two
  /// atoms of one segment with scores closer than about 2e-4 |r| (5e-4 above
  /// 131072 atoms) may be taken one for the other.
  /// OLS needs `candidates` <= 64; they come from the two best of each of up to 128 segments, so
  /// one of the largest |d.r| is missing where it shares a segment with two larger ones. At most
  /// kMaxTensorDim, kMaxTensorPicks, kMaxTensorAtoms; compute capability 8.0 and later.
  kTensor = 2,
  kHopper = 3,  ///< the same with the tensor cores of compute capability 9.0 (wgmma)
};

/// Sizes of the tensor paths.
constexpr int kMaxTensorDim = 256, kMaxTensorPicks = 64, kMaxTensorAtoms = 1 << 19;

/// What one call of `pursuit` does and holds; made by `plan_pursuit` on the current device, valid
/// for problems of the same sizes and options on it, and for fewer signals.
struct PursuitPlan {
  PursuitPath path = PursuitPath::kPlain;  // never kAuto
  int signals_per_block = 1;
  int blocks = 1;                   // resident ones; each takes groups of signals in turn
  std::size_t prepared_bytes = 0;   // of all dictionaries: fp16 atoms, norms
  std::size_t scratch_bytes = 0;    // of one block
  std::size_t workspace_bytes = 0;  // all of it, on the device
};

/// Chooses a path and sizes. Fails, and says why, if `wanted` cannot run here.
Status plan_pursuit(const PursuitProblem& problem, PursuitPath wanted, PursuitPlan* plan);

/// Encodes: all picks in one launch, after one that prepares the atoms. Waits for nothing; needs no
/// memory but the workspace of plan.workspace_bytes, aligned to 256 bytes. The same bits in every
/// run with the same plan. Where it fails nothing, or nothing but the workspace, was written.
/// @param prepared  the workspace holds what an earlier call with this path, signals_per_block and
/// these atoms left in its first plan.prepared_bytes.
/// @param apart     nullptr, or memory of its own for these; the workspace has then so many less.
Status pursuit(const PursuitProblem& problem,
               const PursuitPlan& plan,
               void* workspace,
               bool prepared,
               Stream stream,
               void* apart = nullptr);

}  // namespace cuda

}  // namespace lexico::kernels
