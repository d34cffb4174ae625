#pragma once
// The CUDA runtime as a table of functions: every call of ours goes through it, so that tests can
// make any of them fail. For sources of the CUDA backend only.
#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/common/status.h"
#include "kernels/common/stream.h"

namespace lexico::kernels::cuda {

/// One pointer for each function of the CUDA runtime that we call, under its name there.
struct Runtime {
  cudaError_t (*get_device_count)(int* count);
  cudaError_t (*get_device)(int* device);
  cudaError_t (*set_device)(int device);
  cudaError_t (*device_get_attribute)(int* value, cudaDeviceAttr attribute, int device);
  cudaError_t (*mem_get_info)(std::size_t* free_bytes, std::size_t* total_bytes);

  cudaError_t (*malloc)(void** pointer, std::size_t bytes);
  cudaError_t (*free)(void* pointer);
  cudaError_t (*malloc_host)(void** pointer, std::size_t bytes);
  cudaError_t (*free_host)(void* pointer);
  cudaError_t (*memcpy_async)(
      void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
  cudaError_t (*memcpy_2d_async)(void* to,
                                 std::size_t to_pitch,
                                 const void* from,
                                 std::size_t from_pitch,
                                 std::size_t width,
                                 std::size_t height,
                                 cudaMemcpyKind kind,
                                 cudaStream_t stream);
  cudaError_t (*memset_async)(void* to, int value, std::size_t bytes, cudaStream_t stream);

  cudaError_t (*stream_create_with_flags)(cudaStream_t* stream, unsigned flags);
  cudaError_t (*stream_destroy)(cudaStream_t stream);
  cudaError_t (*stream_synchronize)(cudaStream_t stream);
  cudaError_t (*stream_wait_event)(cudaStream_t stream, cudaEvent_t event, unsigned flags);
  cudaError_t (*event_create_with_flags)(cudaEvent_t* event, unsigned flags);
  cudaError_t (*event_destroy)(cudaEvent_t event);
  cudaError_t (*event_record)(cudaEvent_t event, cudaStream_t stream);
  cudaError_t (*event_synchronize)(cudaEvent_t event);
  cudaError_t (*event_elapsed_time)(float* milliseconds, cudaEvent_t start, cudaEvent_t end);

  cudaError_t (*func_set_attribute)(const void* kernel, cudaFuncAttribute attribute, int value);
  cudaError_t (*launch_kernel)(const void* kernel,
                               dim3 grid,
                               dim3 block,
                               void** arguments,
                               std::size_t shared_bytes,
                               cudaStream_t stream);
  cudaError_t (*get_last_error)();
};

/// The table in use. Only tests write to it, while no other thread calls.
Runtime& runtime();

/// What a call of the runtime said, as the kernels' callers want it.
Status as_status(cudaError_t error);

/// An attribute of the current device; a failing call leaves `*value` as it was.
Status device_attribute(cudaDeviceAttr attribute, int* value);

}  // namespace lexico::kernels::cuda
