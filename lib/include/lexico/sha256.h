#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace lexico {

/// SHA-256 (FIPS 180-4) of bytes that come in pieces.
class Sha256 {
 public:
  Sha256();
  void update(const void* data, std::size_t bytes);
  void update(std::string_view text) { update(text.data(), text.size()); }
  /// 64 lower-case hex digits. The object can be used no further.
  std::string finish();

 private:
  std::array<std::uint32_t, 8> state_;
  std::array<unsigned char, 64> block_{};
  std::uint64_t total_ = 0;
};

/// @throws IoError naming the file if it is missing or cannot be read.
std::string sha256_of_file(const std::string& path);

}  // namespace lexico
