// The safetensors format: u64 length of a JSON header, the header, the tensors' bytes.
#include "core/safetensors.h"

#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "core/half.h"
#include "lexico/error.h"
#include "lexico/files.h"

namespace lexico::detail {
namespace {

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own bound

std::int64_t bytes_per_element(const std::string& dtype) {
  if (dtype == "F64" || dtype == "I64" || dtype == "U64") return 8;
  if (dtype == "F32" || dtype == "I32" || dtype == "U32") return 4;
  if (dtype == "F16" || dtype == "BF16" || dtype == "I16" || dtype == "U16") return 2;
  if (dtype == "BOOL" || dtype == "U8" || dtype == "I8" || dtype == "F8_E4M3" || dtype == "F8_E5M2")
    return 1;
  return 0;
}

SafeTensor parse_tensor(const std::string& path,
                        const std::string& name,
                        const nlohmann::json& entry,
                        std::string_view data) {
  const std::string what = path + ": tensor '" + name + "'";
  SafeTensor tensor;
  std::int64_t begin = 0, end = 0, elements = 1;
  try {
    tensor.dtype = entry.at("dtype").get<std::string>();
    tensor.shape = entry.at("shape").get<std::vector<std::int64_t>>();
    begin = entry.at("data_offsets").at(0).get<std::int64_t>();
    end = entry.at("data_offsets").at(1).get<std::int64_t>();
  } catch (const nlohmann::json::exception& e) {
    throw IoError(what + ": " + e.what());
  }
  const std::int64_t size = bytes_per_element(tensor.dtype);
  if (size == 0) throw IoError(what + ": unknown dtype '" + tensor.dtype + "'");
  for (std::int64_t extent : tensor.shape) {
    if (extent < 0 || (extent > 0 && elements > std::int64_t{1} << 50 >>
                                         std::bit_width(static_cast<std::uint64_t>(extent))))
      throw IoError(what + ": impossible shape");
    elements *= extent;
  }
  if (begin < 0 || end < begin || end > static_cast<std::int64_t>(data.size()))
    throw IoError(what + ": bytes [" + std::to_string(begin) + ", " + std::to_string(end) +
                  ") lie outside the " + std::to_string(data.size()) +
                  " in the file; it is truncated or damaged");
  if (end - begin != elements * size)
    throw IoError(what + ": " + std::to_string(end - begin) + " bytes, its shape needs " +
                  std::to_string(elements * size));
  tensor.bytes =
      data.substr(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
  return tensor;
}

}  // namespace

SafeTensors read_safetensors(const std::string& path) {
  return parse_safetensors(read_file(path), path);
}

SafeTensors parse_safetensors(std::string bytes, const std::string& path) {
  SafeTensors result;
  result.file = std::move(bytes);
  std::uint64_t header_bytes = 0;
  if (result.file.size() < sizeof(header_bytes))
    throw IoError(path + ": " + std::to_string(result.file.size()) +
                  " bytes are too few for a safetensors file");
  std::memcpy(&header_bytes, result.file.data(), sizeof(header_bytes));
  if (header_bytes > kMaxHeaderBytes || header_bytes > result.file.size() - sizeof(header_bytes))
    throw IoError(path + ": not a safetensors file, or truncated (header of " +
                  std::to_string(header_bytes) + " bytes)");
  const std::string_view file(result.file);
  const std::string_view header = file.substr(sizeof(header_bytes), header_bytes);
  const std::string_view data = file.substr(sizeof(header_bytes) + header_bytes);
  const nlohmann::json json = nlohmann::json::parse(header, nullptr, false);
  if (!json.is_object()) throw IoError(path + ": the safetensors header is not a JSON object");
  for (const auto& [name, entry] : json.items()) {
    if (name != "__metadata__") {
      result.tensors[name] = parse_tensor(path, name, entry, data);
      continue;
    }
    if (!entry.is_object()) throw IoError(path + ": __metadata__ is not an object");
    for (const auto& [key, value] : entry.items())
      if (value.is_string()) result.metadata[key] = value.get<std::string>();
  }
  return result;
}

std::string_view NamedFloats::bytes() const {
  std::size_t count = sizeof(float);
  for (const std::int64_t extent : shape) count *= static_cast<std::size_t>(extent);
  return {reinterpret_cast<const char*>(data), count};
}

std::vector<float> to_floats(const SafeTensor& tensor, const std::string& what) {
  if (tensor.dtype == "F32") {
    std::vector<float> values(tensor.bytes.size() / sizeof(float));
    std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
    return values;
  }
  if (tensor.dtype != "F16" && tensor.dtype != "BF16")
    throw IoError(what + ": dtype is " + tensor.dtype + ", must be F32, F16 or BF16");
  std::vector<float> values(tensor.bytes.size() / 2);
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, tensor.bytes.data() + 2 * i, 2);
    values[i] = tensor.dtype == "F16"
                    ? float_from_half(bits)
                    : std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  return values;
}

std::string safetensors_header(const std::map<std::string, NamedFloats>& tensors,
                               const std::map<std::string, std::string>& metadata,
                               std::size_t checksum_bytes) {
  nlohmann::ordered_json header;
  header["__metadata__"] = metadata;
  std::size_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    const std::size_t end = offset + tensor.bytes().size();
    header[name] = {{"dtype", "F32"}, {"shape", tensor.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  if (checksum_bytes > 0)
    header["checksum"] = {{"dtype", "U8"},
                          {"shape", {checksum_bytes}},
                          {"data_offsets", {offset, offset + checksum_bytes}}};
  std::string text = header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' ');  // the tensors start 8-byte aligned
  const std::uint64_t header_bytes = text.size();
  text.insert(0, reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));
  return text;
}

std::string safetensors_text(const std::map<std::string, NamedFloats>& tensors,
                             const std::map<std::string, std::string>& metadata) {
  std::string text = safetensors_header(tensors, metadata);
  std::size_t bytes = text.size();
  for (const auto& [name, tensor] : tensors) bytes += tensor.bytes().size();
  text.reserve(bytes);
  for (const auto& [name, tensor] : tensors) text += tensor.bytes();
  return text;
}

}  // namespace lexico::detail
