// Whole files in and out; writing never leaves half a file under its final name.
#include "lexico/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
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

bool write_all(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    bytes.remove_prefix(static_cast<std::size_t>(written));
  }
  return true;
}

[[noreturn]] void throw_cannot_write(const std::string& path, int error) {
  throw ResourceError(path + ": cannot write: " + std::strerror(error));
}

void sync_folder_of(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  const FileDescriptor fd(::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY));
  if (fd.get() >= 0) (void)::fsync(fd.get());  // some file systems cannot sync a folder
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

void write_file(const std::string& path, std::string_view bytes) {
  struct stat status {};
  const bool special = ::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode);
  if (special && S_ISDIR(status.st_mode)) throw_cannot_write(path, EISDIR);
  const std::string target = special ? path : path + ".partial";
  FileDescriptor fd(::open(target.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (fd.get() < 0) throw_cannot_write(path, errno);
  const bool written = write_all(fd.get(), bytes) && (special || ::fsync(fd.get()) == 0);
  int error = errno;
  const bool closed = fd.close();
  if (written && !closed) error = errno;
  if (special) {
    if (!written || !closed) throw_cannot_write(path, error);
    return;
  }
  if (!written || !closed || ::rename(target.c_str(), path.c_str()) != 0) {
    if (written && closed) error = errno;
    ::unlink(target.c_str());
    throw_cannot_write(path, error);
  }
  sync_folder_of(path);
}

}  // namespace lexico
