#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lexico::apps {

/// A file without a name: what is too much for memory and of no use after the process, however that
/// ends. Any number of threads may read at the same time.
class ScratchFile {
 public:
  /// In the folder of `output`, or the nearest one above it that exists; where that cannot be
  /// written, in the system's folder for temporary files. @throws ResourceError naming the folder.
  explicit ScratchFile(const std::string& output);
  ~ScratchFile();
  ScratchFile(ScratchFile&&) noexcept;
  ScratchFile& operator=(ScratchFile&&) = delete;

  /// @throws ResourceError if the disk is full.
  void append(const void* bytes, std::size_t count);
  /// @throws ResourceError if they cannot be read.
  void read(std::int64_t offset, void* bytes, std::size_t count) const;

 private:
  std::string folder_;
  int fd_ = -1;
  std::int64_t size_ = 0;
};

}  // namespace lexico::apps
