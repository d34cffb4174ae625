// The functions of the CUDA runtime, on the CPU. Work is put on one queue, in the order of the
// calls, and done when somebody waits for it: a missing wait is seen.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <string>

#include "cuda_runtime_api.h"
#include "engine.h"

struct CUstream_st {};
struct CUevent_st {
  bool recorded = false;
};

namespace emulated {

std::function<void()> take_next_call();

namespace {

constexpr std::size_t kMargin = 256;  // on both sides of every allocation
constexpr unsigned char kMarginByte = 0xa5;

struct Memory {
  std::map<void*, std::size_t> blocks;
  std::size_t bytes = 0;
};
struct Queue {
  std::deque<std::function<void()>> work;
  cudaError_t failed = cudaSuccess;  // stays, as on a GPU
  cudaError_t last = cudaSuccess;
  std::map<const void*, int> shared_limits;
  std::set<cudaStream_t> streams;
  std::set<cudaEvent_t> events;
};
Memory& memory() {
  static Memory one;
  return one;
}
Queue& queue() {
  static Queue one;
  return one;
}

cudaError_t said(cudaError_t error) {
  if (error != cudaSuccess) queue().last = error;
  return error;
}

// What a kernel that failed has left behind, until a test forgets the fault.
cudaError_t failed_kernel() {
  if (fault().empty()) queue().failed = cudaSuccess;
  return queue().failed;
}

cudaError_t finish_work() {
  Queue& q = queue();
  (void)failed_kernel();
  while (!q.work.empty()) {
    const std::function<void()> work = std::move(q.work.front());
    q.work.pop_front();
    if (q.failed == cudaSuccess) work();
  }
  return said(q.failed);
}

bool is_stream(cudaStream_t stream) {
  return stream == nullptr || queue().streams.contains(stream);
}

bool margins_are_whole(const unsigned char* begin, std::size_t bytes) {
  for (std::size_t i = 0; i < kMargin; ++i) {
    if (begin[i] != kMarginByte || begin[kMargin + bytes + i] != kMarginByte) return false;
  }
  return true;
}

}  // namespace

std::size_t allocated_bytes() { return memory().bytes; }

}  // namespace emulated

using namespace emulated;

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device().count;
  return said(device().count > 0 ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* which) {
  *which = 0;
  return said(device().count > 0 ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int which) {
  return said(which >= 0 && which < device().count ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int which) {
  if (which < 0 || which >= device().count) return said(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = device().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 40 << 20;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device().major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device().minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(device().shared_bytes_per_block + 1024);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(device().shared_bytes_per_block);
      return cudaSuccess;
  }
  return said(cudaErrorInvalidValue);
}
cudaError_t cudaMemGetInfo(std::size_t* free_bytes, std::size_t* total_bytes) {
  *total_bytes = device().memory_bytes;
  *free_bytes = device().memory_bytes - memory().bytes;
  return said(failed_kernel());
}

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  Memory& m = memory();
  if (m.bytes + bytes > device().memory_bytes) return said(cudaErrorMemoryAllocation);
  const std::size_t rounded = (bytes + 2 * kMargin + 255) / 256 * 256;
  auto* const begin = static_cast<unsigned char*>(std::aligned_alloc(256, rounded));
  if (begin == nullptr) return said(cudaErrorMemoryAllocation);
  std::memset(begin, kMarginByte, kMargin);
  std::memset(begin + kMargin, 0xff, bytes);
  std::memset(begin + kMargin + bytes, kMarginByte, kMargin);
  *pointer = begin + kMargin;
  m.blocks[*pointer] = bytes;
  m.bytes += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  (void)finish_work();
  Memory& m = memory();
  const auto found = m.blocks.find(pointer);
  if (found == m.blocks.end()) return said(cudaErrorInvalidValue);
  auto* const begin = static_cast<unsigned char*>(pointer) - kMargin;
  const bool whole = margins_are_whole(begin, found->second);
  m.bytes -= found->second;
  m.blocks.erase(found);
  std::free(begin);
  return said(whole ? cudaSuccess : cudaErrorIllegalAddress);
}
cudaError_t cudaMallocHost(void** pointer, std::size_t bytes) {
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return said(*pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* pointer) {
  (void)finish_work();
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(
    void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (!is_stream(stream)) return said(cudaErrorInvalidResourceHandle);
  queue().work.push_back([=] {
    if (bytes > 0) std::memmove(to, from, bytes);
  });
  return said(failed_kernel());
}
cudaError_t cudaMemcpy2DAsync(void* to,
                              std::size_t to_pitch,
                              const void* from,
                              std::size_t from_pitch,
                              std::size_t width,
                              std::size_t height,
                              cudaMemcpyKind,
                              cudaStream_t stream) {
  if (!is_stream(stream)) return said(cudaErrorInvalidResourceHandle);
  if (width > to_pitch || width > from_pitch) return said(cudaErrorInvalidValue);
  queue().work.push_back([=] {
    for (std::size_t row = 0; row < height; ++row)
      std::memmove(static_cast<char*>(to) + row * to_pitch,
                   static_cast<const char*>(from) + row * from_pitch,
                   width);
  });
  return said(failed_kernel());
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  if (!is_stream(stream)) return said(cudaErrorInvalidResourceHandle);
  queue().work.push_back([=] {
    if (bytes > 0) std::memset(to, value, bytes);
  });
  return said(failed_kernel());
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  queue().streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (queue().streams.erase(stream) == 0) return said(cudaErrorInvalidResourceHandle);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (!is_stream(stream)) return said(cudaErrorInvalidResourceHandle);
  return finish_work();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const bool known = is_stream(stream) && queue().events.contains(event);
  return said(known ? cudaSuccess : cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  queue().events.insert(*event);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (queue().events.erase(event) == 0) return said(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (!is_stream(stream) || !queue().events.contains(event))
    return said(cudaErrorInvalidResourceHandle);
  event->recorded = true;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (!queue().events.contains(event)) return said(cudaErrorInvalidResourceHandle);
  return event->recorded ? finish_work() : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (!queue().events.contains(start) || !queue().events.contains(end))
    return said(cudaErrorInvalidResourceHandle);
  *milliseconds = 1;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<std::size_t>(value) > device().shared_bytes_per_block)
    return said(cudaErrorInvalidValue);
  queue().shared_limits[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel,
                             dim3 grid,
                             dim3 block,
                             void**,
                             std::size_t shared_bytes,
                             cudaStream_t stream) {
  const std::function<void()> call = take_next_call();
  if (!is_stream(stream) || !call) return said(cudaErrorInvalidResourceHandle);
  const auto asked = queue().shared_limits.find(kernel);
  const std::size_t limit =
      asked == queue().shared_limits.end() ? 48 << 10 : static_cast<std::size_t>(asked->second);
  if (shared_bytes > std::max<std::size_t>(limit, 48 << 10)) return said(cudaErrorInvalidValue);
  const bool is_empty = grid.x * grid.y * grid.z == 0 || block.x * block.y * block.z == 0;
  if (is_empty || block.x * block.y * block.z > 1024 || grid.y > 65535 || grid.z > 65535 ||
      grid.x > 0x7fffffffu)
    return said(cudaErrorInvalidConfiguration);
  queue().work.push_back([=] {
    if (!run_grid(grid, block, shared_bytes, call)) queue().failed = cudaErrorLaunchFailure;
  });
  return said(failed_kernel());
}
cudaError_t cudaGetLastError() {
  const cudaError_t last = queue().last;
  queue().last = failed_kernel();
  return last;
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorLaunchFailure:
      return fault().c_str();
    case cudaErrorUnknown:
      return "unknown error";
  }
  return "unrecognized error code";
}
