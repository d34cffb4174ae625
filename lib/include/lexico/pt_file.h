#pragma once

#include <string>

#include "lexico/dictionary.h"

namespace lexico {

/// Writes the published layout: one bare float32 tensor [2 * layers, dim, num_atoms], even rows
/// keys, odd rows values, read by Python `torch.load(path, weights_only=True)`. Written aside,
/// synced, renamed.
/// @throws InvalidArgument if the set is not whole (layers 0..L-1, keys and values, one shape) or
/// its keys are pre_rope;
///         ResourceError if it cannot be written.
void write_dictionaries_pt(const DictionarySet& set, const std::string& path);

/// Reads that layout; atoms are scaled to unit norm. Pickled code is never executed.
/// @throws IoError naming the file and what is wrong with it.
DictionarySet read_dictionaries_pt(const std::string& path);

/// read_dictionaries_pt for a name that ends in .pt, else read_dictionaries.
DictionarySet read_dictionaries_any(const std::string& path);

}  // namespace lexico
