#pragma once

#include <string>
#include <string_view>

namespace lexico::text {

/// All bytes of a file, pipe or device. @throws IoError if it is missing, a folder or unreadable.
std::string read_file(const std::string& path);

/// The beginning of `text`, for an error message: at most about 60 bytes, control characters
/// masked.
std::string excerpt(std::string_view text);

}  // namespace lexico::text
