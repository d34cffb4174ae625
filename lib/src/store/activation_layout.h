#pragma once

#include <cstdint>
#include <string>

#include "hdf5_handles.h"
#include "lexico/activations.h"

// "lexico-activations 1": names, chunk sizes and attributes, for reader and writer alike
// (docs/formats.md).
namespace lexico::store {

inline constexpr const char* kContract = "lexico-activations 1";
inline constexpr std::int64_t kChunkRows = 2048;  ///< vectors
inline constexpr std::int64_t kChunkTokens = 16384;
inline constexpr const char* kTokenFields[] = {"id", "position", "document"};

std::string layer_group(int layer);  ///< "/layers/07"
std::string vectors_name(int layer, Kind kind);
std::string moment_name(int layer);
std::string tokens_name(const char* field);

/// All attributes of the root group but `complete`.
void write_info(hid_t file, const ActivationInfo& info);
/// @throws IoError (without the file's name) if one is missing, of the wrong type or out of range.
ActivationInfo read_info(hid_t file);

}  // namespace lexico::store
