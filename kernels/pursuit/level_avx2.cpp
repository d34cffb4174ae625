// Pursuit for CPUs with AVX2 and FMA.
#include "kernels/pursuit/pursuit_simd.h"

namespace lexico::kernels::cpu {

const PursuitLevel kAvx2Level = {"avx2",
                                 [](const PursuitShape&) { return std::size_t{0}; },
                                 scratch_size,
                                 pack_panels,
                                 gram_rows,
                                 encode_block};

}  // namespace lexico::kernels::cpu
