#include "lexico/device_array.h"

#include "check.h"
#include "core/device_memory.h"

namespace lexico {

struct DeviceArray::Impl {
  int device;
  std::size_t count;
  detail::DeviceBuffer memory;

  void copy(void* to, const void* from) const {
    const detail::UseDevice use(device);
    detail::throw_if_failed(kernels::cuda::copy(to, from, count * sizeof(float), nullptr),
                            "copying between host and device");
    wait();
  }
  void wait() const {
    const detail::UseDevice use(device);
    detail::throw_if_failed(kernels::cuda::synchronize(nullptr), "waiting for the device");
  }
};

DeviceArray::DeviceArray(const std::string& device, std::size_t count)
    : impl_(std::make_unique<Impl>()) {
  impl_->device = detail::device_of(device);
  impl_->count = count;
  const detail::UseDevice use(impl_->device);
  detail::throw_if_failed(impl_->memory.reserve(count * sizeof(float)), "device memory");
}
DeviceArray::~DeviceArray() = default;
DeviceArray::DeviceArray(DeviceArray&&) noexcept = default;
DeviceArray& DeviceArray::operator=(DeviceArray&&) noexcept = default;

float* DeviceArray::data() { return reinterpret_cast<float*>(impl_->memory.data()); }
std::size_t DeviceArray::size() const { return impl_->count; }
void DeviceArray::write(const float* from) { impl_->copy(impl_->memory.data(), from); }
void DeviceArray::read(float* to) const { impl_->copy(to, impl_->memory.data()); }

void DeviceArray::wait() const { impl_->wait(); }

}  // namespace lexico
