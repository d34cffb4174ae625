#pragma once

#include <string>

namespace lexico::store {

/// Checks the heaps that hold a file's variable-length texts. They are the one part of our files
/// without a checksum, and HDF5 1.10 follows a damaged one out of its buffers or in circles.
/// @throws IoError (without the file's name) if one is damaged.
void check_text_heaps(const std::string& path);

}  // namespace lexico::store
