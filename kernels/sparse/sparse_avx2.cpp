// Loops over codes for CPUs with AVX2 and FMA.
#include "kernels/sparse/sparse_simd.h"

namespace lexico::kernels::cpu {

const SparseLevel kSparseAvx2 = LEXICO_SPARSE_LEVEL("avx2");

}  // namespace lexico::kernels::cpu
