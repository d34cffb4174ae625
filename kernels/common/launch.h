#pragma once
// Starts a kernel through the table of runtime functions. For .cu files.
#include <cuda_runtime.h>

#include <cstddef>

#include "kernels/common/runtime.h"

namespace lexico::kernels::cuda {

/// Starts kernel(arguments...) on a grid that is not empty. Arguments are converted to the kernel's
/// parameter types. More than 48 KiB of shared memory are asked for where needed.
template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...),
              dim3 grid,
              dim3 block,
              std::size_t shared_bytes,
              Stream stream,
              const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  constexpr std::size_t kWithoutAsking = 48 << 10;
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kWithoutAsking) {
    const Status status = as_status(runtime().func_set_attribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    if (!status.ok()) return status;
  }
  const auto start = [&](Parameters... parameters) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))..., nullptr};
#ifdef LEXICO_DEVICE_IS_EMULATED
    emulated::next_call([kernel, parameters...] { kernel(parameters...); });
#endif
    return runtime().launch_kernel(function, grid, block, pointers, shared_bytes, stream);
  };
  return as_status(start(arguments...));
}

}  // namespace lexico::kernels::cuda
