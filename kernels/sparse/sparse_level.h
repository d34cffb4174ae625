#pragma once
// What the driver (sparse_cpu.cpp) and the instruction set levels (sparse_<level>.cpp) agree on.
// Plain structs only, as in kernels/pursuit/level.h.
#include "kernels/sparse/sparse.h"

namespace lexico::kernels::cpu {

struct SparseLevel {
  const char* name;
  // Signals [first, last) of one dictionary.
  void (*residual)(const SparseProblem&,
                   int dictionary,
                   std::int64_t first,
                   std::int64_t last,
                   const float* signals,
                   float* residual,
                   float* signal_norms,
                   float* residual_norms);
  // Atoms [first, last) of one dictionary.
  void (*gradient)(const SparseProblem&,
                   const AtomUses&,
                   int dictionary,
                   int first,
                   int last,
                   const float* residual,
                   float scale,
                   float* gradient);
  void (*adam)(const AdamStep&, int dictionary, int first, int last);
  void (*co_occurrence)(const SparseProblem&,
                        const AtomUses&,
                        int dictionary,
                        int first,
                        int last,
                        const float* signals,
                        float keep,
                        const CoOccurrence&);
  // out [rows, dim] = B - A D for `rows` rows of A [rows, num_atoms] and B [rows, dim].
  void (*misfit)(int rows,
                 int num_atoms,
                 int dim,
                 const float* A,
                 const float* B,
                 const float* atoms,
                 float* out);
  // The atoms of one block in turn: `misfit` [rows, dim] is that of the block, A its rows (from
  // column `first` on are the block's own); `atoms` points to its first atom.
  void (*descend)(
      int rows, int num_atoms, int dim, const float* A, int first, float* misfit, float* atoms);
};

extern const SparseLevel kSparseGeneric;
extern const SparseLevel kSparseAvx2, kSparseAvx512;  // x86-64 only

}  // namespace lexico::kernels::cpu
