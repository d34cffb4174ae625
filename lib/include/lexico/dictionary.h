#pragma once

#include <map>
#include <string>
#include <vector>

#include "lexico/codes.h"
#include "lexico/kind.h"
#include "lexico/transform.h"

namespace lexico {

/// The atoms that one layer's keys (or values) are written in: [num_atoms, dim], rows of unit L2
/// norm. This is the paper's D (dim x num_atoms) transposed, so that an atom is contiguous.
struct Dictionary {
  static constexpr int kAllHeads = -1;

  int layer = 0;
  Kind kind = Kind::kKeys;
  int num_atoms = 0, dim = 0;
  std::vector<float> atoms;
  int head = kAllHeads;        ///< the one KV head it serves, or all
  Transform transform = {};    ///< the frame the atoms live in; of one head if `head` is one
  CodeFormat format = {};      ///< how codes become bytes; max_atoms is the budget of this layer
  int shares_atoms_with = -1;  ///< layer of an equal kind and head with the same atoms, which a
                               ///< file holds once; -1: its own
};

/// The dictionaries of a model: for each trained layer one for keys and one for values (or only one
/// kind), or one for each KV head.
struct DictionarySet {
  std::vector<Dictionary> dictionaries;      ///< sorted by layer, keys before values, by head
  KeyStage key_stage = KeyStage::kPostRope;  ///< of the keys they were trained on
  std::map<std::string, std::string>
      metadata;  ///< provenance: model, model_sha256, recipe, sparsity, config, ...; "rope": the
                 ///< object of that name in lexico.json, which undoes and redoes the rotation

  /// The one that serves KV head `head` of a layer (kAllHeads: one that serves all); nullptr if
  /// there is none. One that serves all heads serves each.
  const Dictionary* find(int layer, Kind kind, int head = Dictionary::kAllHeads) const;
  std::vector<int> layers() const;  ///< distinct, ascending
};

/// Scales each row of `atoms` [num_atoms, dim] to unit L2 norm (computed in double).
/// @throws InvalidArgument naming the atom if a row is zero or not finite.
void normalize_atoms(std::vector<float>& atoms, int num_atoms, int dim);

/// Reads `dictionary.safetensors` (docs/formats.md), or the file of that name in a run folder;
/// atoms may be float32, float16 or bfloat16 and are scaled to unit norm. Nothing in the file is
/// executed.
/// @throws IoError naming the file and the tensor: missing, truncated, wrong rank, type or name,
/// NaN, a table or bit width out of bounds.
DictionarySet read_dictionaries(const std::string& file_or_run_folder);

/// Writes float32 atoms and tables to a temporary file beside `path`, syncs it and renames it.
/// @throws ResourceError naming the path if it cannot be written; nothing is left behind then.
/// InvalidArgument naming the dictionary whose transform, format or sharing is not in order.
void write_dictionaries(const DictionarySet& set, const std::string& path);

}  // namespace lexico
