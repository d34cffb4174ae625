#include "core/device_memory.h"

#include <algorithm>
#include <charconv>
#include <cstring>

#include "check.h"

namespace lexico::detail {

namespace cuda = kernels::cuda;
using kernels::Status;

int device_of(const std::string& name) {
  int device = 0;
  if (name != "cuda") {
    const bool named = name.starts_with("cuda:");
    const char* const end = name.data() + name.size();
    const auto [stop, error] = std::from_chars(name.data() + (named ? 5 : 0), end, device);
    if (!named || error != std::errc() || stop != end || device < 0)
      throw_invalid("device is '", name, "', must be cpu, cuda or cuda:N");
  }
  const int count = cuda::device_count();
  if (device >= count) {
    throw_invalid("device is '",
                  name,
                  "', but ",
                  count == 0 ? "no" : std::to_string(count),
                  count == 1 ? " CUDA device is" : " CUDA devices are",
                  " here, or this build has no CUDA backend");
  }
  return device;
}

UseDevice::UseDevice(int device) : device_(device) {
  throw_if_failed(cuda::current_device(&before_), "device");
  if (before_ != device_) throw_if_failed(cuda::use_device(device_), "device");
}
UseDevice::~UseDevice() {
  if (before_ != device_) (void)cuda::use_device(before_);
}

Status DeviceBuffer::reserve(std::size_t bytes) {
  if (bytes <= bytes_) return {};
  release();
  const Status status = cuda::allocate(&memory_, bytes);
  if (status.ok())
    bytes_ = bytes;
  else
    memory_ = nullptr;
  return status;
}
void DeviceBuffer::release() {
  if (memory_ != nullptr) cuda::release(memory_);
  memory_ = nullptr;
  bytes_ = 0;
}

DevicePool::DevicePool(std::size_t piece_bytes)
    : piece_bytes_((std::max<std::size_t>(piece_bytes, 1) + 255) / 256 * 256) {}

void* DevicePool::take() {
  constexpr std::size_t kSlab = std::size_t{1} << 20;
  if (free_.empty()) {
    const std::size_t more = std::max<std::size_t>(kSlab / piece_bytes_, 1);
    auto slab = std::make_unique<DeviceBuffer>();
    throw_if_failed(slab->reserve(more * piece_bytes_), "device memory");
    free_.reserve(count_ + more);  // so that none fails to come back
    slabs_.reserve(slabs_.size() + 1);
    count_ += more;
    for (std::size_t i = more; i-- > 0;) free_.push_back(slab->data() + i * piece_bytes_);
    slabs_.push_back(std::move(slab));
  }
  void* const piece = free_.back();
  free_.pop_back();
  return piece;
}

Uploads::~Uploads() {
  for (const cuda::Event event : done_) {
    if (event == nullptr) continue;
    (void)cuda::wait(event);
    cuda::destroy_event(event);
  }
  if (pinned_ != nullptr) cuda::release_pinned(pinned_);
}

void Uploads::begin(kernels::Stream stream) {
  if (sessions_ > 0) {  // of the same stream
    ++sessions_;
    return;
  }
  for (cuda::Event& event : done_)
    if (event == nullptr) throw_if_failed(cuda::create_event(&event), "copying to the device");
  if (pinned_ == nullptr) {
    void* memory = nullptr;
    throw_if_failed(cuda::allocate_pinned(&memory, 2 * kHalf), "copying to the device");
    pinned_ = static_cast<char*>(memory);
  }
  if (stream != stream_ && used_ > 0) turn();
  stream_ = stream;
  sessions_ = 1;
}

void Uploads::end() {
  if (--sessions_ > 0) return;
  // An event that is not recorded would not be waited for.
  if (!cuda::record(done_[half_], stream_).ok()) (void)cuda::synchronize(stream_);
}

// To the other half, once the device has what it holds.
void Uploads::turn() {
  half_ = 1 - half_;
  throw_if_failed(cuda::wait(done_[half_]), "copying to the device");
  used_ = 0;
}

void Uploads::copy_rows(void* to,
                        std::size_t to_pitch,
                        const void* from,
                        std::size_t from_pitch,
                        std::size_t bytes,
                        std::size_t rows) {
  if (bytes == 0) return;
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  if (bytes > kHalf) {  // a row in parts
    for (std::size_t row = 0; row < rows; ++row)
      for (std::size_t at = 0; at < bytes; at += kHalf)
        copy(target + row * to_pitch + at,
             source + row * from_pitch + at,
             std::min(kHalf, bytes - at));
    return;
  }
  for (std::size_t row = 0; row < rows;) {
    if (kHalf - used_ < bytes) {
      throw_if_failed(cuda::record(done_[half_], stream_), "copying to the device");
      turn();
    }
    const std::size_t count = std::min(rows - row, (kHalf - used_) / bytes);
    char* const staged = pinned_ + half_ * kHalf + used_;
    for (std::size_t i = 0; i < count; ++i)
      std::memcpy(staged + i * bytes, source + (row + i) * from_pitch, bytes);
    used_ += count * bytes;
    throw_if_failed(
        count == 1 ? cuda::copy(target + row * to_pitch, staged, bytes, stream_)
                   : cuda::copy_rows(
                         target + row * to_pitch, to_pitch, staged, bytes, bytes, count, stream_),
        "copying to the device");
    row += count;
  }
}

void MirroredBytes::touch(std::size_t begin, std::size_t end) {
  if (stale_begin_ >= stale_end_) {
    stale_begin_ = begin;
    stale_end_ = end;
    return;
  }
  stale_begin_ = std::min(stale_begin_, begin);
  stale_end_ = std::max(stale_end_, end);
}

const std::uint8_t* MirroredBytes::on_device(const std::shared_ptr<DevicePool>& pool,
                                             Uploads& uploads) {
  if (copy_ == nullptr) {
    copy_ = pool->take();
    pool_ = pool;
    touch(0, row_bytes_);
  }
  if (stale_begin_ < stale_end_) {
    uploads.copy_rows(static_cast<char*>(copy_) + stale_begin_,
                      row_bytes_,
                      bytes_.data() + stale_begin_,
                      row_bytes_,
                      stale_end_ - stale_begin_,
                      rows_);
    stale_begin_ = stale_end_ = 0;
  }
  return static_cast<const std::uint8_t*>(copy_);
}

void MirroredBytes::drop_copy() {
  if (copy_ != nullptr) pool_->give(copy_);
  copy_ = nullptr;
}

void MirroredBytes::swap(MirroredBytes& other) noexcept {
  std::swap(rows_, other.rows_);
  std::swap(row_bytes_, other.row_bytes_);
  bytes_.swap(other.bytes_);
  std::swap(stale_begin_, other.stale_begin_);
  std::swap(stale_end_, other.stale_end_);
  pool_.swap(other.pool_);
  std::swap(copy_, other.copy_);
}

}  // namespace lexico::detail
