#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace lexico::detail {

/// One tensor of a safetensors file (huggingface.co/docs/safetensors): `bytes` points into the
/// file's text.
struct SafeTensor {
  std::string dtype;  ///< "F32", "F16", "BF16", "I32", ...
  std::vector<std::int64_t> shape;
  std::string_view bytes;
};

struct SafeTensors {
  std::string file;  ///< owns the bytes
  std::map<std::string, SafeTensor> tensors;
  std::map<std::string, std::string> metadata;
};

/// @throws IoError naming `path` and what is wrong: truncated, header not JSON, offsets out of
/// bounds or not covering
///         the shape.
SafeTensors read_safetensors(const std::string& path);
/// The same of bytes that were read from `path`.
SafeTensors parse_safetensors(std::string bytes, const std::string& path);

/// To float32. @throws IoError naming `what` if the type is not F32, F16 or BF16.
std::vector<float> to_floats(const SafeTensor& tensor, const std::string& what);

/// The text of a file that holds float32 tensors, in name order.
struct NamedFloats {
  std::vector<std::int64_t> shape;
  const float* data;

  std::string_view bytes() const;
};
std::string safetensors_text(const std::map<std::string, NamedFloats>& tensors,
                             const std::map<std::string, std::string>& metadata);
/// The part of it before the first tensor. With `checksum_bytes` a last tensor "checksum" of as
/// many bytes follows the others, for the caller to fill.
std::string safetensors_header(const std::map<std::string, NamedFloats>& tensors,
                               const std::map<std::string, std::string>& metadata,
                               std::size_t checksum_bytes = 0);

}  // namespace lexico::detail
