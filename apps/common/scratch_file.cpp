#include "common/scratch_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "lexico/error.h"

namespace lexico::apps {
namespace fs = std::filesystem;
namespace {

/// A descriptor of a file in `folder` that has no name (any more); -1: errno says why.
int open_unnamed(const std::string& folder) {
  const int fd = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0) return fd;
  std::string name = folder + "/.lexico-XXXXXX";  // not every file system knows O_TMPFILE
  const int named = ::mkostemp(name.data(), O_CLOEXEC);
  if (named >= 0) ::unlink(name.c_str());
  return named;
}

[[noreturn]] void fail(const std::string& folder, const char* doing) {
  throw ResourceError(folder + ": a temporary file for token ids cannot be " + doing + ": " +
                      std::strerror(errno));
}

}  // namespace

ScratchFile::ScratchFile(const std::string& output) {
  std::error_code error;
  fs::path folder = fs::absolute(output, error);
  while (!fs::is_directory(folder, error) && folder.has_relative_path())
    folder = folder.parent_path();
  folder_ = folder.string();
  fd_ = open_unnamed(folder_);
  if (fd_ >= 0) return;
  folder_ = fs::temp_directory_path(error).string();
  fd_ = open_unnamed(folder_);
  if (fd_ < 0) fail(folder_, "made");
}

ScratchFile::~ScratchFile() {
  if (fd_ >= 0) ::close(fd_);
}

ScratchFile::ScratchFile(ScratchFile&& other) noexcept
    : folder_(std::move(other.folder_)),
      fd_(std::exchange(other.fd_, -1)),
      size_(std::exchange(other.size_, 0)) {}

void ScratchFile::append(const void* bytes, std::size_t count) {
  for (const char* from = static_cast<const char*>(bytes); count > 0;) {
    const ssize_t wrote = ::pwrite(fd_, from, count, size_);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) fail(folder_, "written");
    from += wrote;
    size_ += wrote;
    count -= static_cast<std::size_t>(wrote);
  }
}

void ScratchFile::read(std::int64_t offset, void* bytes, std::size_t count) const {
  for (char* to = static_cast<char*>(bytes); count > 0;) {
    const ssize_t got = ::pread(fd_, to, count, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got == 0) errno = EIO;
    if (got <= 0) fail(folder_, "read");
    to += got;
    offset += got;
    count -= static_cast<std::size_t>(got);
  }
}

}  // namespace lexico::apps
