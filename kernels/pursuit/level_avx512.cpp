// Pursuit for CPUs with AVX-512.
#include "kernels/pursuit/pursuit_simd.h"

namespace lexico::kernels::cpu {

const PursuitLevel kAvx512Level = {"avx512",
                                   [](const PursuitShape&) { return std::size_t{0}; },
                                   scratch_size,
                                   pack_panels,
                                   gram_rows,
                                   encode_block};

}  // namespace lexico::kernels::cpu
