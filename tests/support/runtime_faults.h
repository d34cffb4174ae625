#pragma once
// Makes one call of the CUDA runtime fail, of all those a piece of code makes. For tests of the
// CUDA backend, on an emulated device or a real one.
#include "kernels/common/runtime.h"

namespace lexico::test {

/// While it lives, calls of the runtime are counted, and the one of number `fail_at` fails (none if
/// it is negative) without having done anything.
class RuntimeFaults {
 public:
  explicit RuntimeFaults(int fail_at, cudaError_t error = cudaErrorUnknown)
      : saved_(kernels::cuda::runtime()) {
    state() = {saved_, 0, fail_at, error, ""};
    Runtime& table = kernels::cuda::runtime();
    replace<&Runtime::get_device_count>(table, "get_device_count");
    replace<&Runtime::get_device>(table, "get_device");
    replace<&Runtime::set_device>(table, "set_device");
    replace<&Runtime::device_get_attribute>(table, "device_get_attribute");
    replace<&Runtime::mem_get_info>(table, "mem_get_info");
    replace<&Runtime::malloc>(table, "malloc");
    replace<&Runtime::malloc_host>(table, "malloc_host");
    replace<&Runtime::memcpy_async>(table, "memcpy_async");
    replace<&Runtime::memcpy_2d_async>(table, "memcpy_2d_async");
    replace<&Runtime::memset_async>(table, "memset_async");
    replace<&Runtime::stream_create_with_flags>(table, "stream_create_with_flags");
    replace<&Runtime::stream_synchronize>(table, "stream_synchronize");
    replace<&Runtime::stream_wait_event>(table, "stream_wait_event");
    replace<&Runtime::event_create_with_flags>(table, "event_create_with_flags");
    replace<&Runtime::event_record>(table, "event_record");
    replace<&Runtime::event_synchronize>(table, "event_synchronize");
    replace<&Runtime::event_elapsed_time>(table, "event_elapsed_time");
    replace<&Runtime::func_set_attribute>(table, "func_set_attribute");
    replace<&Runtime::launch_kernel>(table, "launch_kernel");
    // Freeing and get_last_error do not fail: nobody could do anything about it.
  }
  ~RuntimeFaults() { kernels::cuda::runtime() = saved_; }
  RuntimeFaults(const RuntimeFaults&) = delete;
  RuntimeFaults& operator=(const RuntimeFaults&) = delete;

  int calls() const { return state().calls; }
  /// The name of the call that failed; empty if none has.
  const char* failed() const { return state().failed; }

 private:
  using Runtime = kernels::cuda::Runtime;
  struct State {
    Runtime real;
    int calls, fail_at;
    cudaError_t error;
    const char* failed;
  };
  static State& state() {
    static State one{};
    return one;
  }

  template <auto kMember, typename... Arguments>
  static cudaError_t call(Arguments... arguments) {
    State& s = state();
    if (s.calls++ != s.fail_at) return (s.real.*kMember)(arguments...);
    s.failed = name<kMember>;
    return s.error;
  }
  template <auto kMember>
  static inline const char* name = "";

  template <auto kMember, typename... Arguments>
  static void set(cudaError_t (*&entry)(Arguments...)) {
    entry = &call<kMember, Arguments...>;
  }
  template <auto kMember>
  static void replace(Runtime& table, const char* its_name) {
    name<kMember> = its_name;
    set<kMember>(table.*kMember);
  }

  Runtime saved_;
};

}  // namespace lexico::test
