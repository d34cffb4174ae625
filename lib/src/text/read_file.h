#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace lexico::text {

/// A file, pipe or device, read from its start on. @throws IoError if it is missing, a folder or
/// unreadable.
class FileReader {
 public:
  explicit FileReader(const std::string& path);
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  std::int64_t size() const { return size_; }  ///< -1: not a regular file
  /// Appends up to `count` bytes to `bytes`. @returns whether there may be more.
  bool append(std::string& bytes, std::size_t count);
  /// `count` bytes from `offset` on, which a regular file must have.
  std::string read_at(std::int64_t offset, std::size_t count) const;

 private:
  [[noreturn]] void fail() const;
  std::string path_;
  int fd_;
  std::int64_t size_ = -1;
};

/// All of its bytes.
std::string read_file(const std::string& path);

/// The beginning of `text`, for an error message: at most about 60 bytes, control characters
/// masked.
std::string excerpt(std::string_view text);

}  // namespace lexico::text
