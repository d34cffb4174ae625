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

/// Little-endian values of type T as ids, each checked; `where` names the file (and the tensor).
template <typename T>
Ids ids_from(std::string_view bytes, const std::string& where, int vocab) {
  const std::int64_t bound =
      vocab > 0 ? vocab : std::int64_t{std::numeric_limits<std::int32_t>::max()} + 1;
  Ids ids(bytes.size() / sizeof(T));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    if (std::cmp_less(value, 0) || std::cmp_greater_equal(value, bound)) {
      throw IoError(where + ": token id " + std::to_string(value) + " at index " +
                    std::to_string(i) + " is not in [0, " + std::to_string(bound) + ")");
    }
    ids[i] = static_cast<std::int32_t>(value);
  }
  return ids;
}

struct IntegerType {
  const char* name;
  std::size_t size;
  Ids (*read)(std::string_view, const std::string&, int);
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

std::vector<Ids> read_bin(const std::string& path, int vocab) {
  const std::string bytes = read_file(path);
  if (bytes.size() % 4 != 0) {
    throw IoError(path + ": has " + std::to_string(bytes.size()) +
                  " bytes, want int32 values of 4 bytes each");
  }
  return {ids_from<std::int32_t>(bytes, path, vocab)};
}

/// The part of `data` that holds one tensor; `where` names the file and the tensor.
Ids read_tensor(const Json& entry, std::string_view data, const std::string& where, int vocab) {
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
  if (begin > end || end > data.size()) {
    throw IoError(where + ": data_offsets [" + std::to_string(begin) + ", " + std::to_string(end) +
                  "] are not within the " + std::to_string(data.size()) +
                  " bytes of data (truncated file?)");
  }
  if ((end - begin) % type->size != 0 || (end - begin) / type->size != count) {
    throw IoError(where + ": has " + std::to_string(end - begin) + " bytes, want " +
                  std::to_string(count) + " values of " + std::to_string(type->size) + " bytes");
  }
  return type->read(data.substr(begin, end - begin), where, vocab);
}

std::vector<Ids> read_safetensors(const std::string& path, int vocab) {
  const std::string bytes = read_file(path);
  const auto damaged = [&](const std::string& what) {
    throw IoError(path + ": is not a safetensors file: " + what);
  };
  if (bytes.size() < 8) damaged("has only " + std::to_string(bytes.size()) + " bytes");
  std::uint64_t header_size;
  std::memcpy(&header_size, bytes.data(), 8);
  if (header_size > bytes.size() - 8) {
    damaged("its header claims " + std::to_string(header_size) + " bytes, the file has " +
            std::to_string(bytes.size()));
  }
  Json header;
  try {
    header = Json::parse(std::string_view(bytes).substr(8, header_size));
  } catch (const Json::exception& error) {
    damaged(std::string(error.what()).substr(0, 200));
  }
  if (!header.is_object()) damaged("its header is not an object");
  const std::string_view data = std::string_view(bytes).substr(8 + header_size);
  std::vector<Ids> documents;
  for (const auto& [name, entry] : header.items()) {  // in the order of their names
    if (name == "__metadata__") continue;
    documents.push_back(
        read_tensor(entry, data, path + ": tensor \"" + excerpt(name) + '"', vocab));
  }
  return documents;
}

}  // namespace

std::vector<std::vector<std::int32_t>> read_token_ids(const std::string& path, int vocab) {
  const std::string extension = std::filesystem::path(path).extension();
  if (extension == ".bin") return read_bin(path, vocab);
  if (extension == ".safetensors") return read_safetensors(path, vocab);
  throw IoError(path + ": token ids must be a .bin file (int32) or a .safetensors file");
}

}  // namespace lexico::text
