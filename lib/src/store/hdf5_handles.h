#pragma once

#include <hdf5.h>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

// What reader and writer need of the HDF5 C library: handles that close themselves, attributes, the
// reason of a failure.
namespace lexico::store {

/// Debian's HDF5 is not thread-safe: whoever calls it holds one of these. Also keeps HDF5 from
/// printing its error stack.
class Hdf5Session {
 public:
  Hdf5Session();
  ~Hdf5Session();
  Hdf5Session(const Hdf5Session&) = delete;
  Hdf5Session& operator=(const Hdf5Session&) = delete;

 private:
  std::lock_guard<std::mutex> lock_;
  H5E_auto2_t print_ = nullptr;
  void* print_data_ = nullptr;
};

/// Owns an identifier. Negative: none.
class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle() = default;
  Handle(hid_t id, Close with) : id_(id), close_(with) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(close_, other.close_);
    return *this;
  }
  ~Handle() { close(); }

  explicit operator bool() const { return id_ >= 0; }
  hid_t get() const { return id_; }
  /// @returns whether it could be closed; the handle is empty afterwards in any case.
  bool close() { return id_ < 0 || close_(std::exchange(id_, -1)) >= 0; }

 private:
  hid_t id_ = -1;
  Close close_ = nullptr;
};

/// The innermost message of HDF5's error stack, then clears it.
std::string hdf5_reason();

Handle half_type();  ///< IEEE binary16, little-endian: h5py says float16

void write_attribute(hid_t object, const char* name, const std::string& value);
void write_attribute(hid_t object, const char* name, const std::vector<std::string>& values);
void write_attribute(hid_t object, const char* name, std::int64_t value);
void write_attribute(hid_t object, const char* name, std::uint64_t value);
void write_attribute(hid_t object, const char* name, const std::vector<std::int64_t>& values);

// Nothing if there is no such attribute. @throws IoError (without the file's name) if it is of
// another type.
std::optional<std::string> read_text(hid_t object, const char* name);
std::optional<std::vector<std::string>> read_texts(hid_t object, const char* name);
std::optional<std::int64_t> read_integer(hid_t object, const char* name);
std::optional<std::vector<std::int64_t>> read_integers(hid_t object, const char* name);

}  // namespace lexico::store
