// Pursuit for any CPU: the compiler's baseline.
#include "kernels/pursuit/pursuit_simd.h"

namespace lexico::kernels::cpu {

const PursuitLevel kGenericLevel = {"generic",
                                    [](const PursuitShape&) { return std::size_t{0}; },
                                    scratch_size,
                                    pack_panels,
                                    gram_rows,
                                    encode_block};

}  // namespace lexico::kernels::cpu
