// Token ids from .bin and .safetensors files.
#include "text/token_ids.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>

#include "lexico/error.h"
#include "text/read_file.h"

namespace lexico::text {
namespace {

using Json = nlohmann::json;
using Ids = std::vector<std::int32_t>;

constexpr std::size_t kPieceBytes = 1 << 20;

/// Little-endian values of type T as ids, each checked; `where` names the file (and the tensor).
/// @param first  index of the first one.
template <typename T>
Ids ids_from(std::string_view bytes, std::int64_t first, const std::string& where, int vocab) {
  const std::int64_t bound =
      vocab > 0 ? vocab : std::int64_t{std::numeric_limits<std::int32_t>::max()} + 1;
  Ids ids(bytes.size() / sizeof(T));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    if (std::cmp_less(value, 0) || std::cmp_greater_equal(value, bound)) {
      throw IoError(where + ": token id " + std::to_string(value) + " at index " +
                    std::to_string(first + static_cast<std::int64_t>(i)) + " is not in [0, " +
                    std::to_string(bound) + ")");
    }
    ids[i] = static_cast<std::int32_t>(value);
  }
  return ids;
}

struct IntegerType {
  const char* name;
  std::size_t size;
  Ids (*read)(std::string_view, std::int64_t, const std::string&, int);
};
constexpr IntegerType kIntegerTypes[] = {
    {"I8", 1, ids_from<std::int8_t>},
    {"U8", 1, ids_from<std::uint8_t>},
    {"I16", 2, ids_from<std::int16_t>},
    {"U16", 2, ids_from<std::uint16_t>},
    {"I32", 4, ids_from<std::int32_t>},
    {"U32", 4, ids_from<std::uint32_t>},
    {"I64", 8, ids_from<std::int64_t>},
    {"U64", 8, ids_from<std::uint64_t>},
};

using TakeIds = std::function<void(const Ids&)>;

void read_bin(const std::string& path, int vocab, const TakeIds& take) {
  FileReader file(path);
  std::string bytes;
  const auto damaged = [&](std::int64_t size) {
    throw IoError(path + ": has " + std::to_string(size) +
                  " bytes, want int32 values of 4 bytes each");
  };
  if (file.size() % 4 > 0) damaged(file.size());
  std::int64_t done = 0;
  for (bool more = true; more; bytes.clear()) {
    more = file.append(bytes, kPieceBytes);
    if (bytes.size() % 4 != 0) damaged(done + static_cast<std::int64_t>(bytes.size()));
    take(ids_from<std::int32_t>(bytes, done / 4, path, vocab));
    done += static_cast<std::int64_t>(bytes.size());
  }
}

/// One tensor of a file whose data begins at `start`; `where` names the file and the tensor.
void read_tensor(const Json& entry,
                 const FileReader& file,
                 std::uint64_t start,
                 const std::string& where,
                 int vocab,
                 const TakeIds& take) {
  const auto damaged = [&](const char* what) { throw IoError(where + ": " + what); };
  if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string()) {
    damaged("has no dtype in the header");
  }
  const std::string& dtype = entry["dtype"].get_ref<const std::string&>();
  const auto is_size = [](const Json& value) { return value.is_number_unsigned(); };
  const auto is_sizes = [&](const char* key) {
    return entry.contains(key) && entry[key].is_array() &&
           std::all_of(entry[key].begin(), entry[key].end(), is_size);
  };
  if (!is_sizes("shape")) damaged("has no shape in the header");
  if (!is_sizes("data_offsets") || entry["data_offsets"].size() != 2) {
    damaged("has no data_offsets in the header");
  }
  const auto type = std::find_if(std::begin(kIntegerTypes),
                                 std::end(kIntegerTypes),
                                 [&](const IntegerType& known) { return dtype == known.name; });
  if (type == std::end(kIntegerTypes) || entry["shape"].size() != 1) {
    throw IoError(where + ": is " + excerpt(dtype) + " with " +
                  std::to_string(entry["shape"].size()) +
                  " dimensions, want token ids: integers with 1 dimension");
  }
  const auto count = entry["shape"][0].get<std::uint64_t>();
  const auto begin = entry["data_offsets"][0].get<std::uint64_t>();
  const auto end = entry["data_offsets"][1].get<std::uint64_t>();
  const std::uint64_t data_size = static_cast<std::uint64_t>(file.size()) - start;
  if (begin > end || end > data_size) {
    throw IoError(where + ": data_offsets [" + std::to_string(begin) + ", " + std::to_string(end) +
                  "] are not within the " + std::to_string(data_size) +
                  " bytes of data (truncated file?)");
  }
  if ((end - begin) % type->size != 0 || (end - begin) / type->size != count) {
    throw IoError(where + ": has " + std::to_string(end - begin) + " bytes, want " +
                  std::to_string(count) + " values of " + std::to_string(type->size) + " bytes");
  }
  for (std::uint64_t at = begin; at < end; at += kPieceBytes)
    take(type->read(file.read_at(static_cast<std::int64_t>(start + at),
                                 std::min<std::uint64_t>(kPieceBytes, end - at)),
                    static_cast<std::int64_t>((at - begin) / type->size),
                    where,
                    vocab));
}

void read_safetensors(const std::string& path,
                      int vocab,
                      const std::function<void()>& begin_document,
                      const TakeIds& take) {
  const FileReader file(path);
  const auto damaged = [&](const std::string& what) {
    throw IoError(path + ": is not a safetensors file: " + what);
  };
  if (file.size() < 0) damaged("is not a regular file");
  const auto size = static_cast<std::uint64_t>(file.size());
  if (size < 8) damaged("has only " + std::to_string(size) + " bytes");
  std::uint64_t header_size;
  std::memcpy(&header_size, file.read_at(0, 8).data(), 8);
  if (header_size > size - 8) {
    damaged("its header claims " + std::to_string(header_size) + " bytes, the file has " +
            std::to_string(size));
  }
  Json header;
  try {
    header = Json::parse(file.read_at(8, header_size));
  } catch (const Json::exception& error) {
    damaged(std::string(error.what()).substr(0, 200));
  }
  if (!header.is_object()) damaged("its header is not an object");
  for (const auto& [name, entry] : header.items()) {  // in the order of their names
    if (name == "__metadata__") continue;
    begin_document();
    read_tensor(
        entry, file, 8 + header_size, path + ": tensor \"" + excerpt(name) + '"', vocab, take);
  }
}

}  // namespace

void read_token_ids(const std::string& path,
                    int vocab,
                    const std::function<void()>& begin_document,
                    const TakeIds& take) {
  const std::string extension = std::filesystem::path(path).extension();
  if (extension == ".safetensors") return read_safetensors(path, vocab, begin_document, take);
  if (extension != ".bin")
    throw IoError(path + ": token ids must be a .bin file (int32) or a .safetensors file");
  begin_document();
  read_bin(path, vocab, take);
}

}  // namespace lexico::text
