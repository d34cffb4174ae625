// Loops over codes for any CPU.
#include "kernels/sparse/sparse_simd.h"

namespace lexico::kernels::cpu {

const SparseLevel kSparseGeneric = LEXICO_SPARSE_LEVEL("generic");

}  // namespace lexico::kernels::cpu
