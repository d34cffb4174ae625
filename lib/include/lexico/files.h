#pragma once

#include <string>
#include <string_view>

namespace lexico {

/// The whole file. @throws IoError naming the path and the reason: missing, a folder, not readable.
std::string read_file(const std::string& path);

/// Writes `bytes` to "<path>.partial", syncs it, renames it to `path` and syncs the folder: after a
/// crash the path holds the old content or the new, never a part. A path that is not a regular file
/// (/dev/stdout) is written directly.
/// @throws ResourceError naming the path and the reason; the partial file is removed.
void write_file(const std::string& path, std::string_view bytes);

}  // namespace lexico
