// Dictionaries in memory and in dictionary.safetensors (docs/formats.md).
#include "lexico/dictionary.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <tuple>

#include "check.h"
#include "core/safetensors.h"
#include "lexico/files.h"

namespace lexico {
namespace {

std::string tensor_name(int layer, Kind kind) {
  char name[64];
  std::snprintf(name, sizeof name, "layers.%02d.%s.atoms", layer, name_of(kind));
  return name;
}

/// "layers.<number>.<keys|values>.atoms", or false.
bool parse_tensor_name(const std::string& name, Dictionary& dictionary) {
  int layer = 0, length = 0;
  char kind[8] = {};
  if (std::sscanf(name.c_str(), "layers.%d.%6[a-z].atoms%n", &layer, kind, &length) != 2)
    return false;
  if (length != static_cast<int>(name.size()) || layer < 0) return false;
  dictionary.layer = layer;
  for (Kind k : kBothKinds)
    if (std::string(kind) == name_of(k)) {
      dictionary.kind = k;
      return true;
    }
  return false;
}

}  // namespace

const Dictionary* DictionarySet::find(int layer, Kind kind) const {
  for (const Dictionary& d : dictionaries)
    if (d.layer == layer && d.kind == kind) return &d;
  return nullptr;
}

std::vector<int> DictionarySet::layers() const {
  std::vector<int> layers;
  for (const Dictionary& d : dictionaries) layers.push_back(d.layer);
  std::sort(layers.begin(), layers.end());
  layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
  return layers;
}

void normalize_atoms(std::vector<float>& atoms, int num_atoms, int dim) {
  for (int n = 0; n < num_atoms; ++n) {
    float* atom = atoms.data() + static_cast<std::ptrdiff_t>(n) * dim;
    double norm2 = 0;
    for (int d = 0; d < dim; ++d) norm2 += static_cast<double>(atom[d]) * atom[d];
    if (!(norm2 > 0) || !std::isfinite(norm2))
      detail::throw_invalid(
          "atom ", n, " has norm ", std::sqrt(norm2), ", must be positive and finite");
    if (std::fabs(norm2 - 1.0) < 1e-6)
      continue;  // already unit to fp32: reading back what we wrote changes nothing
    const double scale = 1.0 / std::sqrt(norm2);
    for (int d = 0; d < dim; ++d) atom[d] = static_cast<float>(atom[d] * scale);
  }
}

DictionarySet read_dictionaries(const std::string& file_or_run_folder) {
  std::string path = file_or_run_folder;
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    path = (std::filesystem::path(path) / "dictionary.safetensors").string();
    if (!std::filesystem::exists(path, error))
      throw IoError(file_or_run_folder + ": the folder holds no dictionary.safetensors");
  }
  const detail::SafeTensors file = detail::read_safetensors(path);
  DictionarySet set;
  set.metadata = file.metadata;
  const auto stage = file.metadata.find("key_stage");
  if (stage != file.metadata.end()) try {
      set.key_stage = key_stage_from(stage->second);
    } catch (const InvalidArgument& e) {
      throw IoError(path + ": " + e.what());
    }
  for (const auto& [name, tensor] : file.tensors) {
    Dictionary dictionary;
    if (!parse_tensor_name(name, dictionary))
      throw IoError(path + ": tensor '" + name +
                    "' is not a dictionary; want layers.NN.keys.atoms or layers.NN.values.atoms");
    if (tensor.shape.size() != 2 || tensor.shape[0] < 1 || tensor.shape[1] < 1 ||
        tensor.shape[0] > 1 << 24 || tensor.shape[1] > 1 << 16)
      throw IoError(path + ": tensor '" + name + "' must be [num_atoms, head_dim]");
    dictionary.num_atoms = static_cast<int>(tensor.shape[0]);
    dictionary.dim = static_cast<int>(tensor.shape[1]);
    dictionary.atoms = detail::to_floats(tensor, path + ": tensor '" + name + "'");
    try {
      normalize_atoms(dictionary.atoms, dictionary.num_atoms, dictionary.dim);
    } catch (const InvalidArgument& e) {
      throw IoError(path + ": tensor '" + name + "': " + e.what());
    }
    set.dictionaries.push_back(std::move(dictionary));
  }
  if (set.dictionaries.empty()) throw IoError(path + ": holds no dictionary");
  std::sort(set.dictionaries.begin(),
            set.dictionaries.end(),
            [](const Dictionary& a, const Dictionary& b) {
              return std::tie(a.layer, a.kind) < std::tie(b.layer, b.kind);
            });
  return set;
}

void write_dictionaries(const DictionarySet& set, const std::string& path) {
  std::map<std::string, detail::NamedFloats> tensors;
  for (const Dictionary& d : set.dictionaries)
    tensors[tensor_name(d.layer, d.kind)] = {{d.num_atoms, d.dim}, d.atoms.data()};
  std::map<std::string, std::string> metadata = set.metadata;
  metadata["format"] = "lexico-dictionary 1";
  metadata["key_stage"] = name_of(set.key_stage);
  write_file(path, detail::safetensors_text(tensors, metadata));
}

}  // namespace lexico
