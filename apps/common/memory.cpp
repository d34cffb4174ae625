#include "common/memory.h"

#include <algorithm>
#include <fstream>
#include <sstream>

#include "common/program.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

/// The number after a name in a file of lines "name: number kB" or "name number"; -1: none.
std::int64_t field_of(const std::string& path, const std::string& name) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string first, unit;
    std::int64_t number = -1;
    words >> first;
    if (first != name && first != name + ":") continue;
    if (!(words >> number)) return -1;
    words >> unit;
    return unit == "kB" ? number * 1024 : number;
  }
  return -1;
}

std::int64_t number_in(const std::string& path) {
  std::ifstream in(path);
  std::int64_t number = -1;
  return in >> number ? number : -1;  // "max": no limit
}

/// What the control group of this process (version 2) leaves it, or -1. Its files in memory that
/// nobody uses are given up when memory is short.
std::int64_t left_in_group() {
  std::ifstream in("/proc/self/cgroup");
  std::int64_t least = -1;
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with("0::")) continue;
    for (std::string group = line.substr(3); !group.empty();
         group = group.substr(0, group.find_last_of('/'))) {
      const std::string folder = "/sys/fs/cgroup" + (group == "/" ? "" : group);
      const std::int64_t limit = number_in(folder + "/memory.max"),
                         used = number_in(folder + "/memory.current"),
                         files = field_of(folder + "/memory.stat", "inactive_file");
      if (limit < 0 || used < 0) continue;
      const std::int64_t left =
          std::max<std::int64_t>(0, limit - used + std::max<std::int64_t>(0, files));
      least = least < 0 ? left : std::min(least, left);
    }
  }
  return least;
}

}  // namespace

std::int64_t resident_bytes() {
  return std::max<std::int64_t>(0, field_of("/proc/self/status", "VmRSS"));
}
std::int64_t peak_resident_bytes() {
  return std::max<std::int64_t>(0, field_of("/proc/self/status", "VmHWM"));
}

std::int64_t available_memory_bytes() {
  const std::int64_t machine = field_of("/proc/meminfo", "MemAvailable"), group = left_in_group();
  if (machine < 0 || group < 0) return std::max(machine, group);
  return std::min(machine, group);
}

bool fits_memory(double bytes) {
  const std::int64_t available = available_memory_bytes();
  return available < 0 || bytes <= static_cast<double>(available + resident_bytes());
}

void require_memory(double bytes, const std::string& advice) {
  if (fits_memory(bytes)) return;
  throw ResourceError(
      "needs about " + format_bytes(bytes) + " of memory, but " +
      format_bytes(static_cast<double>(available_memory_bytes() + resident_bytes())) +
      " are there: " + advice);
}

void require_disk(const std::string& path, double bytes, const std::string& advice) {
  const std::int64_t free = free_bytes(path);
  if (free < 0 || bytes <= static_cast<double>(free)) return;
  throw ResourceError(path + ": needs " + format_bytes(bytes) + ", but " +
                      format_bytes(static_cast<double>(free)) + " are free (" + advice + ")");
}

}  // namespace lexico::apps
