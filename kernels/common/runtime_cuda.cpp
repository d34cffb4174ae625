#include "kernels/common/runtime.h"

namespace lexico::kernels::cuda {
namespace {

// As functions of our own: some of the runtime's are overloaded or have default arguments.
Runtime real_runtime() {
  Runtime r{};
  r.get_device_count = [](int* count) { return cudaGetDeviceCount(count); };
  r.get_device = [](int* device) { return cudaGetDevice(device); };
  r.set_device = [](int device) { return cudaSetDevice(device); };
  r.device_get_attribute = [](int* value, cudaDeviceAttr attribute, int device) {
    return cudaDeviceGetAttribute(value, attribute, device);
  };
  r.mem_get_info = [](std::size_t* free_bytes, std::size_t* total_bytes) {
    return cudaMemGetInfo(free_bytes, total_bytes);
  };
  r.malloc = [](void** pointer, std::size_t bytes) { return cudaMalloc(pointer, bytes); };
  r.free = [](void* pointer) { return cudaFree(pointer); };
  r.malloc_host = [](void** pointer, std::size_t bytes) { return cudaMallocHost(pointer, bytes); };
  r.free_host = [](void* pointer) { return cudaFreeHost(pointer); };
  r.memcpy_async =
      [](void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
        return cudaMemcpyAsync(to, from, bytes, kind, stream);
      };
  r.memcpy_2d_async = [](void* to,
                         std::size_t to_pitch,
                         const void* from,
                         std::size_t from_pitch,
                         std::size_t width,
                         std::size_t height,
                         cudaMemcpyKind kind,
                         cudaStream_t stream) {
    return cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, height, kind, stream);
  };
  r.memset_async = [](void* to, int value, std::size_t bytes, cudaStream_t stream) {
    return cudaMemsetAsync(to, value, bytes, stream);
  };
  r.stream_create_with_flags = [](cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithFlags(stream, flags);
  };
  r.stream_destroy = [](cudaStream_t stream) { return cudaStreamDestroy(stream); };
  r.stream_synchronize = [](cudaStream_t stream) { return cudaStreamSynchronize(stream); };
  r.stream_wait_event = [](cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    return cudaStreamWaitEvent(stream, event, flags);
  };
  r.event_create_with_flags = [](cudaEvent_t* event, unsigned flags) {
    return cudaEventCreateWithFlags(event, flags);
  };
  r.event_destroy = [](cudaEvent_t event) { return cudaEventDestroy(event); };
  r.event_record = [](cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecord(event, stream);
  };
  r.event_synchronize = [](cudaEvent_t event) { return cudaEventSynchronize(event); };
  r.event_elapsed_time = [](float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
    return cudaEventElapsedTime(milliseconds, start, end);
  };
  r.func_set_attribute = [](const void* kernel, cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(kernel, attribute, value);
  };
  r.launch_kernel = [](const void* kernel,
                       dim3 grid,
                       dim3 block,
                       void** arguments,
                       std::size_t shared_bytes,
                       cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
  };
  r.get_last_error = [] { return cudaGetLastError(); };
  return r;
}

}  // namespace

Runtime& runtime() {
  static Runtime table = real_runtime();
  return table;
}

Status as_status(cudaError_t error) {
  if (error == cudaSuccess) return {};
  (void)runtime().get_last_error();  // it is told here: no later check must report it again
  return {static_cast<int>(error), cudaGetErrorString(error)};
}

Status device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0, found = 0;
  Status status = as_status(runtime().get_device(&device));
  if (!status.ok()) return status;
  status = as_status(runtime().device_get_attribute(&found, attribute, device));
  if (status.ok()) *value = found;
  return status;
}

}  // namespace lexico::kernels::cuda
