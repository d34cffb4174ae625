#pragma once
// Memory of a GPU for what the host keeps: how it is had, and how it is brought up to date.
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/memory/memory.h"

namespace lexico::detail {

/// Number of the device that "cuda" or "cuda:N" names.
/// @throws InvalidArgument naming the text if it is no such name, or there is no such device.
int device_of(const std::string& name);

/// While it lives, a device is the current one of this thread. @throws ResourceError.
class UseDevice {
 public:
  explicit UseDevice(int device);
  ~UseDevice();
  UseDevice(const UseDevice&) = delete;
  UseDevice& operator=(const UseDevice&) = delete;

 private:
  int device_, before_ = 0;
};

/// Memory of the device that was current when it grew. Giving it back waits for all work of the
/// device (cudaFree does), which may still read it.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  ~DeviceBuffer() { release(); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  /// At least so many bytes; what was in it is lost if there were less. Where that fails there are
  /// none.
  kernels::Status reserve(std::size_t bytes);
  void release();
  char* data() const { return static_cast<char*>(memory_); }
  std::size_t size() const { return bytes_; }

 private:
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Device memory in pieces of one size. A piece that is given back is taken again, so all work on
/// them must be in the order of one stream.
class DevicePool {
 public:
  explicit DevicePool(std::size_t piece_bytes);
  /// @throws ResourceError. Begins at a multiple of 256 bytes.
  void* take();
  void give(void* piece) { free_.push_back(piece); }  // there is room: see take

 private:
  std::size_t piece_bytes_, count_ = 0;
  std::vector<std::unique_ptr<DeviceBuffer>> slabs_;
  std::vector<void*> free_;
};

/// Copies from the host, whose memory may change as soon as a call returns: through pinned memory,
/// one half of which is filled while the device copies from the other.
class Uploads {
 public:
  Uploads() = default;
  ~Uploads();
  Uploads(const Uploads&) = delete;
  Uploads& operator=(const Uploads&) = delete;

  /// Copies are made while there is one, in the order of its stream. @throws ResourceError.
  class Session {
   public:
    Session(Uploads& uploads, kernels::Stream stream) : uploads_(uploads) {
      uploads_.begin(stream);
    }
    ~Session() { uploads_.end(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

   private:
    Uploads& uploads_;
  };

  /// @throws ResourceError.
  void copy(void* to, const void* from, std::size_t bytes) { copy_rows(to, 0, from, 0, bytes, 1); }
  /// As kernels::cuda::copy_rows.
  void copy_rows(void* to,
                 std::size_t to_pitch,
                 const void* from,
                 std::size_t from_pitch,
                 std::size_t bytes,
                 std::size_t rows);

 private:
  static constexpr std::size_t kHalf = std::size_t{2} << 20;
  void begin(kernels::Stream stream);
  void end();
  void turn();

  char* pinned_ = nullptr;
  std::array<kernels::cuda::Event, 2> done_{};
  std::size_t half_ = 0, used_ = 0;
  kernels::Stream stream_ = nullptr;
  int sessions_ = 0;
};

/// Bytes of the host, rows of equal length, and a copy on a device where one is asked for. Copies
/// of this have no such copy yet.
class MirroredBytes {
 public:
  MirroredBytes() = default;
  /// Zeros. `slack`: bytes behind the last row, which are not copied.
  MirroredBytes(std::size_t rows, std::size_t row_bytes, std::size_t slack = 0)
      : rows_(rows),
        row_bytes_(row_bytes),
        bytes_(rows * row_bytes + slack),
        stale_end_(row_bytes) {}
  MirroredBytes(const MirroredBytes& other)
      : rows_(other.rows_),
        row_bytes_(other.row_bytes_),
        bytes_(other.bytes_),
        stale_end_(other.row_bytes_) {}
  MirroredBytes(MirroredBytes&& other) noexcept { swap(other); }
  MirroredBytes& operator=(MirroredBytes other) noexcept {
    swap(other);
    return *this;
  }
  ~MirroredBytes() { drop_copy(); }

  std::uint8_t* data() { return bytes_.data(); }
  const std::uint8_t* data() const { return bytes_.data(); }
  std::size_t size() const { return bytes_.size(); }

  /// Bytes [begin, end) of every row change before on_device is called next.
  void touch(std::size_t begin, std::size_t end);
  /// The copy, brought up to date in the order of the stream. Pieces of the pool are of size() or
  /// more. @throws ResourceError.
  const std::uint8_t* on_device(const std::shared_ptr<DevicePool>& pool, Uploads& uploads);
  /// Gives the copy back. Work that reads it must be on the stream already.
  void drop_copy();

 private:
  void swap(MirroredBytes& other) noexcept;

  std::size_t rows_ = 0, row_bytes_ = 0;
  std::vector<std::uint8_t> bytes_;
  std::size_t stale_begin_ = 0, stale_end_ = 0;  // of every row, as the copy goes
  std::shared_ptr<DevicePool> pool_;
  void* copy_ = nullptr;
};

}  // namespace lexico::detail
