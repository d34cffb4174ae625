#pragma once

namespace lexico::kernels {

/// What this CPU and its operating system let a program use. All false where the CPU is not x86-64.
struct CpuFeatures {
  bool avx2 = false;         ///< AVX2, FMA and F16C
  bool avx512 = false;       ///< AVX-512 F, BW, DQ, VL
  bool avx512_bf16 = false;  ///< BF16 dot products
  bool avx512_vbmi = false;  ///< byte permutations
  bool avx512_vnni = false;  ///< int8 and int16 dot products
  bool amx = false;  ///< AMX tiles with int8 products, and the kernel lets this process use them
};

/// Asked once; on Linux this also asks the kernel for the AMX tile state of this process.
const CpuFeatures& cpu_features();

}  // namespace lexico::kernels
