#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace lexico::text {

/// The documents of a file of token ids, .bin or .safetensors (see pack_text), a piece at a time.
/// @param begin_document  called before the pieces of each; a document may have none.
/// @throws IoError naming the file, the value and its place.
void read_token_ids(const std::string& path,
                    int vocab,
                    const std::function<void()>& begin_document,
                    const std::function<void(const std::vector<std::int32_t>& ids)>& take);

}  // namespace lexico::text
