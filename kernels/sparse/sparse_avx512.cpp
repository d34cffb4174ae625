// Loops over codes for CPUs with AVX-512.
#include "kernels/sparse/sparse_simd.h"

namespace lexico::kernels::cpu {

const SparseLevel kSparseAvx512 = LEXICO_SPARSE_LEVEL("avx512");

}  // namespace lexico::kernels::cpu
