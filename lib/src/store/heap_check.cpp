#include "heap_check.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string_view>
#include <vector>

#include "lexico/error.h"

namespace lexico::store {
namespace {

// "Global heap collection" of the HDF5 file format: "GCOL", version 1, three zeros, the
// collection's size, then objects of: index (2 bytes), references (2), zeros (4), size (8), data
// padded to 8. Index 0 is the free rest.
constexpr std::string_view kMark{"GCOL\1\0\0\0", 8};
constexpr std::uint64_t kHeader = 16, kObjectHeader = 16, kLeastSize = 4096, kMostHeap = 1 << 26;
constexpr std::uint64_t kIndicesTried = 64;  // more than our files have texts

// The texts are written first, so their heaps come early.
constexpr std::size_t kSearched = 1 << 20;

std::uint64_t little_endian(const char* at, std::size_t bytes) {
  std::uint64_t value = 0;
  std::memcpy(&value, at, bytes);
  return value;
}

/// @param wanted  ascending: indices that the file seems to refer to.
bool is_sound(std::string_view heap, const std::vector<std::uint64_t>& wanted) {
  std::vector<std::uint64_t> indices;
  std::uint64_t at = kHeader;
  while (at + kObjectHeader <= heap.size()) {
    const std::uint64_t index = little_endian(heap.data() + at, 2);
    const std::uint64_t size = little_endian(heap.data() + at + 8, 8);
    if (index == 0) {
      if (size != heap.size() - at) return false;
      break;
    }
    if (little_endian(heap.data() + at + 4, 4) != 0 || size > heap.size() - at - kObjectHeader)
      return false;
    indices.push_back(index);
    at += kObjectHeader + (size + 7) / 8 * 8;
  }
  std::sort(indices.begin(), indices.end());
  if (std::adjacent_find(indices.begin(), indices.end()) != indices.end()) return false;
  // An object whose index was damaged is missing where it is referred to; one that was deleted is
  // not referred to.
  return std::includes(indices.begin(), indices.end(), wanted.begin(), wanted.end());
}

/// References are a length (4 bytes), the heap's address (8) and an index (4): the indices of what
/// looks like one.
std::vector<std::uint64_t> indices_wanted(std::string_view start,
                                          std::uint64_t address,
                                          std::uint64_t heap_size) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &address, 8);
  std::vector<std::uint64_t> wanted;
  for (auto at = start.find(bytes, 4); at != std::string_view::npos && at + 12 <= start.size();
       at = start.find(bytes, at + 1)) {
    const std::uint64_t length = little_endian(start.data() + at - 4, 4);
    const std::uint64_t index = little_endian(start.data() + at + 8, 4);
    if (length >= 1 && length < heap_size && index >= 1 && index <= kIndicesTried)
      wanted.push_back(index);
  }
  std::sort(wanted.begin(), wanted.end());
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
  return wanted;
}

}  // namespace

void check_text_heaps(const std::string& path) {
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  const auto file_size = static_cast<std::uint64_t>(std::max<std::streamoff>(in.tellg(), 0));
  std::string start(std::min<std::uint64_t>(file_size, kSearched), '\0');
  in.seekg(0);
  in.read(start.data(), static_cast<std::streamsize>(start.size()));
  for (auto at = start.find(kMark); at != std::string::npos; at = start.find(kMark, at + 1)) {
    const std::uint64_t size =
        at + kHeader <= start.size() ? little_endian(start.data() + at + 8, 8) : 0;
    bool sound = size >= kLeastSize && size <= std::min(kMostHeap, file_size - at);
    if (sound) {
      std::string heap(size, '\0');
      in.seekg(static_cast<std::streamoff>(at));
      in.read(heap.data(), static_cast<std::streamsize>(size));
      sound = in.good() && is_sound(heap, indices_wanted(start, at, size));
    }
    if (!sound)
      throw IoError("is damaged: the texts at byte " + std::to_string(at) + " cannot be read");
  }
}

}  // namespace lexico::store
