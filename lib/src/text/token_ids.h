#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lexico::text {

/// The documents of a file of token ids, .bin or .safetensors (see read_packed). May be empty ones.
/// @throws IoError naming the file, the value and its place.
std::vector<std::vector<std::int32_t>> read_token_ids(const std::string& path, int vocab);

}  // namespace lexico::text
