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

FileReader::FileReader(const std::string& path)
    : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (fd_ < 0) fail();
  struct stat status {};
  if (::fstat(fd_, &status) != 0) fail();
  if (S_ISDIR(status.st_mode)) throw IoError(path + ": is a folder, not a file");
  if (S_ISREG(status.st_mode)) size_ = status.st_size;
}

FileReader::~FileReader() {
  if (fd_ >= 0) ::close(fd_);
}

void FileReader::fail() const {
  throw IoError(path_ + ": cannot be read: " + std::strerror(errno));
}

bool FileReader::append(std::string& bytes, std::size_t count) {
  std::size_t have = bytes.size();
  const std::size_t wanted = have + count;
  bytes.resize(wanted);
  while (have < wanted) {
    const ssize_t got = ::read(fd_, bytes.data() + have, wanted - have);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail();
    if (got == 0) break;
    have += static_cast<std::size_t>(got);
  }
  bytes.resize(have);
  return have == wanted;
}

std::string FileReader::read_at(std::int64_t offset, std::size_t count) const {
  std::string bytes(count, '\0');
  for (std::size_t have = 0; have < count;) {
    const ssize_t got =
        ::pread(fd_, bytes.data() + have, count - have, offset + static_cast<std::int64_t>(have));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail();
    if (got == 0) throw IoError(path_ + ": became shorter while it was read");
    have += static_cast<std::size_t>(got);
  }
  return bytes;
}

std::string read_file(const std::string& path) {
  FileReader file(path);
  std::string bytes;
  // One byte more than a regular file has shows its end without growing the buffer.
  if (file.append(bytes, file.size() >= 0 ? static_cast<std::size_t>(file.size()) + 1 : 65536))
    while (file.append(bytes, std::max<std::size_t>(bytes.size(), 65536))) {
    }
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
