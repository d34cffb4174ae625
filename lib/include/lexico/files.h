#pragma once

#include <span>
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
/// The same for bytes that lie in several places.
void write_file(const std::string& path, std::span<const std::string_view> pieces);

/// What a file is called until it is whole: its name and this.
inline constexpr const char* kPartialSuffix = ".partial";

/// Puts `bytes` at the end of a file, which is made if it is missing. @throws ResourceError naming
/// it and the reason.
void append_file(const std::string& path, std::string_view bytes);

/// What was written survives a loss of power from now on. @throws ResourceError.
void sync_file(const std::string& path);
/// The same for the names of files in a folder; nothing where the file system cannot do that.
void sync_folder(const std::string& folder);

}  // namespace lexico
