#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace lexico {

/// Numbers in the memory of a GPU, for programs that have nothing else to put them there.
class DeviceArray {
 public:
  /// @param device  cuda or cuda:N.
  /// @throws InvalidArgument if there is no such device, ResourceError if it has no memory for it.
  DeviceArray(const std::string& device, std::size_t count);
  ~DeviceArray();
  DeviceArray(DeviceArray&&) noexcept;
  DeviceArray& operator=(DeviceArray&&) noexcept;

  float* data();  ///< on the device
  std::size_t size() const;
  /// All wait until the default stream is done. @throws ResourceError.
  void write(const float* from);
  void read(float* to) const;
  void wait() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lexico
