// Attention on codes for any CPU.
#include "kernels/attention/attention_simd.h"

namespace lexico::kernels::cpu {

const AttentionLevel kGenericAttention = LEXICO_ATTENTION_LEVEL("generic");

}  // namespace lexico::kernels::cpu
