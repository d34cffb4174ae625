#include "lexico-train/tensorboard.h"

#include <unistd.h>

#include <array>
#include <ctime>

#include "lexico/files.h"

namespace lexico::apps {
namespace {

std::uint32_t crc32c(const std::string& bytes) {
  static const auto table = [] {
    std::array<std::uint32_t, 256> t{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      t[i] = i;
      for (int bit = 0; bit < 8; ++bit) t[i] = (t[i] >> 1) ^ ((t[i] & 1u) ? 0x82f63b78u : 0u);
    }
    return t;
  }();
  std::uint32_t crc = ~0u;
  for (char c : bytes) crc = table[(crc ^ static_cast<unsigned char>(c)) & 0xffu] ^ (crc >> 8);
  return ~crc;
}

template <typename T>
std::string raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

std::string masked_crc(const std::string& bytes) {  // the mask of TFRecord
  const std::uint32_t crc = crc32c(bytes);
  return raw(((crc >> 15) | (crc << 17)) + 0xa282ead8u);
}

// Protocol buffer fields: (number << 3 | wire type), then the value.
std::string varint(std::uint64_t value) {
  std::string out;
  for (; value >= 128; value >>= 7) out += static_cast<char>((value & 127u) | 128u);
  return out + static_cast<char>(value);
}
std::string bytes_field(int number, const std::string& bytes) {
  return varint(static_cast<std::uint64_t>(number) << 3 | 2u) + varint(bytes.size()) + bytes;
}
std::string wall_time() {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  return varint(1u << 3 | 1u) +
         raw(static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec));
}

std::string framed(const std::string& event) {
  const std::string length = raw(static_cast<std::uint64_t>(event.size()));
  return length + masked_crc(length) + event + masked_crc(event);
}

}  // namespace

TensorBoard::TensorBoard(const std::string& folder) {
  char host[256] = "localhost";
  gethostname(host, sizeof host - 1);
  path_ = folder + "/events.out.tfevents." + std::to_string(std::time(nullptr)) + "." + host + "." +
          std::to_string(getpid());
  // The first record names the format.
  append_file(path_, framed(wall_time() + bytes_field(3, "brain.Event:2")));
}

void TensorBoard::scalars(const std::vector<std::pair<std::string, double>>& values,
                          std::int64_t step) {
  std::string events;
  for (const auto& [tag, value] : values) {
    const std::string point =
        bytes_field(1, tag) + varint(2u << 3 | 5u) + raw(static_cast<float>(value));
    events += framed(wall_time() + varint(2u << 3) + varint(static_cast<std::uint64_t>(step)) +
                     bytes_field(5, bytes_field(1, point)));
  }
  append_file(path_, events);
}

}  // namespace lexico::apps
