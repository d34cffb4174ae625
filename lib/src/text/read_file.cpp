#include "text/read_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "lexico/error.h"
#include "text/unicode.h"

namespace lexico::text {
namespace {

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

[[noreturn]] void fail(const std::string& path) {
  throw IoError(path + ": cannot be read: " + std::strerror(errno));
}

}  // namespace

std::string read_file(const std::string& path) {
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0) fail(path);
  struct stat status {};
  if (::fstat(file.fd, &status) != 0) fail(path);
  if (S_ISDIR(status.st_mode)) throw IoError(path + ": is a folder, not a file");
  std::string bytes;
  // One byte more than a regular file has shows its end without growing the buffer.
  bytes.resize(S_ISREG(status.st_mode) ? static_cast<std::size_t>(status.st_size) + 1 : 65536);
  std::size_t num_read = 0;
  while (true) {
    if (num_read == bytes.size()) bytes.resize(2 * bytes.size());
    const ssize_t got = ::read(file.fd, bytes.data() + num_read, bytes.size() - num_read);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path);
    if (got == 0) break;
    num_read += static_cast<std::size_t>(got);
  }
  bytes.resize(num_read);
  return bytes;
}

std::string excerpt(std::string_view text) {
  constexpr std::size_t kMaxBytes = 60;
  std::string_view head = text.substr(0, kMaxBytes);
  head = head.substr(0, valid_utf8_prefix(head));
  std::string out(head);
  std::replace_if(
      out.begin(), out.end(), [](char c) { return (c >= 0 && c < 32) || c == 127; }, '?');
  return head.size() < text.size() ? out + "..." : out;
}

}  // namespace lexico::text
