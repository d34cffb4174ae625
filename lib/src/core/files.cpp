// Whole files in and out; writing never leaves half a file under its final name.
#include "lexico/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <utility>
#include <vector>

#include "lexico/error.h"

namespace lexico {
namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  bool close() { return ::close(std::exchange(fd_, -1)) == 0; }

 private:
  int fd_;
};

/// @returns 0, or the reason as errno has it.
int write_all(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    if (written == 0) return ENOSPC;
    bytes.remove_prefix(static_cast<std::size_t>(written));
  }
  return 0;
}

/// Whether all that was written has arrived. @returns 0 or the reason.
int check_size(int fd, off_t bytes) {
  struct stat status {};
  if (::fstat(fd, &status) != 0) return errno;
  return status.st_size == bytes ? 0 : EIO;
}

/// @returns 0 or the reason.
int write_partial(const std::string& partial, std::span<const std::string_view> pieces) {
  FileDescriptor fd(::open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (fd.get() < 0) return errno;
  off_t bytes = 0;
  for (const std::string_view piece : pieces) {
    if (const int error = write_all(fd.get(), piece)) return error;
    bytes += static_cast<off_t>(piece.size());
  }
  if (::fsync(fd.get()) != 0) return errno;
  if (const int error = check_size(fd.get(), bytes)) return error;
  return fd.close() ? 0 : errno;
}

[[noreturn]] void throw_cannot_write(const std::string& path, int error) {
  throw ResourceError(path + ": cannot write: " + std::strerror(error));
}

void write_special(const std::string& path, std::span<const std::string_view> pieces) {
  FileDescriptor fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (fd.get() < 0) throw_cannot_write(path, errno);
  for (const std::string_view piece : pieces)
    if (const int error = write_all(fd.get(), piece)) throw_cannot_write(path, error);
  if (!fd.close()) throw_cannot_write(path, errno);
}

}  // namespace

std::string read_file(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) throw IoError(path + ": is a folder, not a file");
  std::ifstream in(path, std::ios::binary);
  if (!in) throw IoError(path + ": cannot read: " + std::strerror(errno));
  const auto size = std::filesystem::file_size(path, error);
  std::string bytes;
  if (!error) bytes.reserve(size);
  std::vector<char> piece(1 << 20);
  while (in.read(piece.data(), static_cast<std::streamsize>(piece.size())), in.gcount() > 0)
    bytes.append(piece.data(), static_cast<std::size_t>(in.gcount()));
  if (in.bad()) throw IoError(path + ": cannot read: " + std::strerror(errno));
  return bytes;
}

void write_file(const std::string& path, std::span<const std::string_view> pieces) {
  struct stat status {};
  if (::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) {
    if (S_ISDIR(status.st_mode)) throw_cannot_write(path, EISDIR);
    write_special(path, pieces);
    return;
  }
  const std::string partial = path + kPartialSuffix;
  int error = write_partial(partial, pieces);
  if (error == 0 && ::rename(partial.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) {
    ::unlink(partial.c_str());
    throw_cannot_write(path, error);
  }
  sync_folder(std::filesystem::path(path).parent_path().string());
}

void write_file(const std::string& path, std::string_view bytes) {
  write_file(path, std::span(&bytes, 1));
}

void append_file(const std::string& path, std::string_view bytes) {
  FileDescriptor fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666));
  if (fd.get() < 0) throw_cannot_write(path, errno);
  struct stat before {};
  int error = ::fstat(fd.get(), &before) == 0 ? 0 : errno;
  if (error == 0) error = write_all(fd.get(), bytes);
  if (error == 0) error = check_size(fd.get(), before.st_size + static_cast<off_t>(bytes.size()));
  if (error == 0 && !fd.close()) error = errno;
  if (error != 0) throw_cannot_write(path, error);
}

void sync_file(const std::string& path) {
  const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0 || ::fsync(fd.get()) != 0)
    throw ResourceError(path + ": cannot be brought to the disk: " + std::strerror(errno));
}

void sync_folder(const std::string& folder) {
  const char* path = folder.empty() ? "." : folder.c_str();
  const FileDescriptor fd(::open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // Some file systems cannot open or sync a folder.
  if (fd.get() < 0 || ::fsync(fd.get()) == 0) return;
  if (errno == EIO || errno == ENOSPC || errno == EDQUOT)
    throw ResourceError(std::string(path) +
                        ": cannot be brought to the disk: " + std::strerror(errno));
}

}  // namespace lexico
