// Dictionaries in memory and in dictionary.safetensors (docs/formats.md).
#include "lexico/dictionary.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <tuple>

#include "check.h"
#include "core/safetensors.h"
#include "lexico/files.h"

namespace lexico {
namespace {

constexpr int kMaxHeads = 1 << 12;
constexpr double kInverseTolerance = 1e-2;  // of map times back_map, in any element

// "layers.00.keys", or "layers.00.keys.head.0": what its tensors' names begin with, and the
// metadata key of its transform and format.
std::string prefix_of(const Dictionary& d) {
  char name[64];
  std::snprintf(name, sizeof name, "layers.%02d.%s", d.layer, name_of(d.kind));
  return d.head == Dictionary::kAllHeads ? name : name + (".head." + std::to_string(d.head));
}

// The dictionary of a tensor name or metadata key, and what follows its prefix; false if it is
// none.
bool parse_name(const std::string& name, Dictionary& dictionary, std::string& rest) {
  int length = 0, more = 0;
  char kind[8] = {};
  if (std::sscanf(name.c_str(), "layers.%9d.%6[a-z]%n", &dictionary.layer, kind, &length) != 2)
    return false;
  dictionary.head = Dictionary::kAllHeads;
  if (std::sscanf(name.c_str() + length, ".head.%9d%n", &dictionary.head, &more) == 1)
    length += more;
  rest = name.substr(static_cast<std::size_t>(length));
  if (dictionary.layer < 0 || dictionary.head < Dictionary::kAllHeads ||
      dictionary.head >= kMaxHeads || (more > 0 && dictionary.head < 0))
    return false;
  for (Kind k : kBothKinds)
    if (std::string(kind) == name_of(k)) {
      dictionary.kind = k;
      return name == prefix_of(dictionary) + rest;  // no second spelling of one place
    }
  return false;
}

using Place = std::tuple<int, Kind, int>;
Place place_of(const Dictionary& d) { return {d.layer, d.kind, d.head}; }

// Throws InvalidArgument; the caller adds whose it is.
void validate_transform(const Transform& t, int dim) {
  if (t.heads < 1 || t.heads > kMaxHeads)
    detail::throw_invalid("heads is ", t.heads, ", must be in [1, ", kMaxHeads, "]");
  const std::size_t row = static_cast<std::size_t>(t.heads) * static_cast<std::size_t>(dim);
  const auto check = [&](const char* name, const std::vector<float>& values, std::size_t want) {
    if (values.empty()) return;
    if (values.size() != want)
      detail::throw_invalid(name, " holds ", values.size(), " numbers, must hold ", want);
    for (std::size_t i = 0; i < values.size(); ++i)
      if (!std::isfinite(values[i]))
        detail::throw_invalid(name, " holds ", values[i], " at ", i, ", must be finite");
  };
  check("mean", t.mean, row);
  check("map", t.map, row * static_cast<std::size_t>(dim));
  check("back_map", t.back_map, row * static_cast<std::size_t>(dim));
  if (t.map.empty() != t.back_map.empty())
    detail::throw_invalid("map and back_map: one is there without the other");
  if (t.map.empty()) return;
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  for (int head = 0; head < t.heads; ++head) {
    const std::ptrdiff_t at = std::ptrdiff_t{head} * dim * dim;
    const Eigen::MatrixXd product =
        Eigen::Map<const Matrix>(t.map.data() + at, dim, dim).cast<double>() *
        Eigen::Map<const Matrix>(t.back_map.data() + at, dim, dim).cast<double>();
    const double off =
        (product - Eigen::MatrixXd::Identity(dim, dim)).cwiseAbs().maxCoeff<Eigen::PropagateNaN>();
    if (!(off < kInverseTolerance))
      detail::throw_invalid("back_map of head ", head, " is not the inverse of map");
  }
}

void validate(const Dictionary& d) {
  validate_transform(d.transform, d.dim);
  d.format.validate(d.num_atoms, d.dim);
  const int groups = d.format.residual.groups;
  if (d.head != Dictionary::kAllHeads && (d.transform.heads > 1 || groups > 1))
    detail::throw_invalid(
        "it serves one head, and its transform or residual code tells heads apart");
  if (d.transform.heads > 1 && groups > 1 && d.transform.heads != groups)
    detail::throw_invalid(
        "the residual code has ", groups, " groups, the transform ", d.transform.heads, " heads");
}

// What the tensors do not say, as JSON; empty if everything is as without a transform and format.
std::string settings_text(const Dictionary& d) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  const CodeFormat& f = d.format;
  if (d.shares_atoms_with >= 0) json["shares_atoms_with"] = d.shares_atoms_with;
  if (d.transform.heads != 1) json["heads"] = d.transform.heads;
  if (d.transform.unit_scale) json["unit_scale"] = true;
  if (f.coding != CodeFormat::Coding::kExact) json["format"] = f.name();
  if (f.max_atoms > 0) json["max_atoms"] = f.max_atoms;
  if (f.coding == CodeFormat::Coding::kPacked) {
    json["weight_bits"] = f.weight_bits;
    json["scale_bits"] = f.scale_bits;
    json["scale_low"] = f.scale_low;
    json["scale_step"] = f.scale_step;
    if (f.residual.groups > 0) {
      json["residual_groups"] = f.residual.groups;
      json["residual_states"] = f.residual.states;
      json["residual_relative"] = f.residual.relative;
    }
  }
  return json.empty() ? "" : json.dump();
}

// Throws nlohmann's exceptions and InvalidArgument; the caller adds file and key.
void read_settings(const std::string& text, Dictionary& d) {
  const nlohmann::json json = nlohmann::json::parse(text);
  if (!json.is_object()) detail::throw_invalid("not a JSON object");
  const auto number = [&](const char* key, int fallback) {
    const auto found = json.find(key);
    if (found == json.end()) return fallback;
    if (!found->is_number_integer() || found->get<double>() < -1e9 || found->get<double>() > 1e9)
      detail::throw_invalid(key, " is ", found->dump(), ", must be a whole number");
    return found->get<int>();
  };
  CodeFormat& f = d.format;
  d.shares_atoms_with = number("shares_atoms_with", -1);
  d.transform.heads = number("heads", 1);
  d.transform.unit_scale = json.value("unit_scale", false);
  f.coding = coding_from(json.value("format", std::string("exact")));
  f.max_atoms = number("max_atoms", 0);
  f.weight_bits = number("weight_bits", f.weight_bits);
  f.scale_bits = number("scale_bits", f.scale_bits);
  f.scale_low = json.value("scale_low", f.scale_low);
  f.scale_step = json.value("scale_step", f.scale_step);
  f.residual.groups = number("residual_groups", 0);
  f.residual.states = number("residual_states", 0);
  f.residual.relative = json.value("residual_relative", false);
}

// One table of a dictionary: what follows the prefix in its tensor's name, and its shape, where 0
// stands for any.
struct Table {
  const char* suffix;
  std::vector<float>* values;
  std::vector<std::int64_t> shape;
};

std::vector<Table> tables_of(Dictionary& d, std::vector<float>& bits) {
  const std::int64_t heads = d.transform.heads, dim = d.dim, groups = d.format.residual.groups;
  const std::int64_t levels = d.format.weight_bits >= 0 && d.format.weight_bits <= 8
                                  ? std::int64_t{1} << d.format.weight_bits
                                  : 0;
  ResidualCode& r = d.format.residual;
  return {{".mean", &d.transform.mean, {heads, dim}},
          {".map", &d.transform.map, {heads, dim, dim}},
          {".back_map", &d.transform.back_map, {heads, dim, dim}},
          {".weight_levels", &d.format.weight_levels, {d.format.max_atoms, levels}},
          {".residual.mean", &r.mean, {groups, dim}},
          {".residual.axes", &r.axes, {groups, dim, dim}},
          {".residual.bits", &bits, {groups, dim}},
          {".residual.levels", &r.levels, {0}}};
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::int64_t extent : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(extent);
  }
  return text + "]";
}

}  // namespace

const Dictionary* DictionarySet::find(int layer, Kind kind, int head) const {
  for (const Dictionary& d : dictionaries)
    if (d.layer == layer && d.kind == kind && (d.head == head || d.head == Dictionary::kAllHeads))
      return &d;
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
  std::map<Place, Dictionary> found;
  const auto at = [&](const Dictionary& d) -> Dictionary& {
    return found.try_emplace(place_of(d), d).first->second;
  };
  for (const auto& [name, text] : file.metadata) {
    Dictionary dictionary;
    std::string rest;
    if (!parse_name(name, dictionary, rest) || !rest.empty()) continue;
    try {
      read_settings(text, at(dictionary));
    } catch (const std::exception& e) {
      throw IoError(path + ": metadata '" + name + "': " + e.what());
    }
    set.metadata.erase(name);
  }
  for (const auto& [name, tensor] : file.tensors) {
    Dictionary dictionary;
    std::string rest;
    if (!parse_name(name, dictionary, rest) || rest.empty())
      throw IoError(path + ": tensor '" + name +
                    "' is not a dictionary; want layers.NN.keys.atoms or layers.NN.values.atoms");
    if (rest != ".atoms") continue;
    if (tensor.shape.size() != 2 || tensor.shape[0] < 1 || tensor.shape[1] < 1 ||
        tensor.shape[0] > 1 << 24 || tensor.shape[1] > 1 << 16)
      throw IoError(path + ": tensor '" + name + "' must be [num_atoms, head_dim]");
    Dictionary& d = at(dictionary);
    if (d.shares_atoms_with >= 0)
      throw IoError(path + ": tensor '" + name + "': shares_atoms_with is " +
                    std::to_string(d.shares_atoms_with) + ", which leaves it without atoms");
    d.num_atoms = static_cast<int>(tensor.shape[0]);
    d.dim = static_cast<int>(tensor.shape[1]);
    d.atoms = detail::to_floats(tensor, path + ": tensor '" + name + "'");
    try {
      normalize_atoms(d.atoms, d.num_atoms, d.dim);
    } catch (const InvalidArgument& e) {
      throw IoError(path + ": tensor '" + name + "': " + e.what());
    }
  }
  std::map<Place, std::vector<float>> bits;
  for (auto& [place, d] : found) {  // an owner shares with no other, so one look is enough
    if (d.shares_atoms_with < 0) continue;
    const auto owner = found.find({d.shares_atoms_with, d.kind, d.head});
    if (owner == found.end() || owner->second.shares_atoms_with >= 0)
      throw IoError(path + ": metadata '" + prefix_of(d) + "': shares_atoms_with is " +
                    std::to_string(d.shares_atoms_with) + ", a layer without " + name_of(d.kind) +
                    " atoms of its own");
    d.num_atoms = owner->second.num_atoms;
    d.dim = owner->second.dim;
    d.atoms = owner->second.atoms;
  }
  for (const auto& [name, tensor] : file.tensors) {
    Dictionary dictionary;
    std::string rest;
    parse_name(name, dictionary, rest);
    if (rest == ".atoms") continue;
    const std::string what = path + ": tensor '" + name + "'";
    const auto owner = found.find(place_of(dictionary));
    if (owner == found.end()) throw IoError(what + ": there are no atoms " + prefix_of(dictionary));
    Dictionary& d = owner->second;
    bool known = false;
    for (const Table& table : tables_of(d, bits[owner->first])) {
      if (rest != table.suffix) continue;
      known = true;
      const bool any = table.shape == std::vector<std::int64_t>{0};
      if (any ? tensor.shape.size() != 1 : tensor.shape != table.shape)
        throw IoError(what + ": its shape is " + shape_text(tensor.shape) + ", must be " +
                      (any ? "[any number]" : shape_text(table.shape)));
      *table.values = detail::to_floats(tensor, what);
    }
    if (!known) throw IoError(what + ": '" + rest + "' is no table of a dictionary");
  }
  for (auto& [place, d] : found) {
    const std::string what = path + ": " + prefix_of(d) + ": ";
    if (d.num_atoms == 0) throw IoError(what + "tensor '" + prefix_of(d) + ".atoms' is missing");
    for (float value : bits[place]) {
      if (!(value >= 0 && value <= ResidualCode::kMaxBits && value == std::floor(value)))
        throw IoError(what + "residual.bits holds " + std::to_string(value) +
                      ", must be whole numbers in [0, " + std::to_string(ResidualCode::kMaxBits) +
                      "]");
      d.format.residual.bits.push_back(static_cast<int>(value));
    }
    try {
      validate(d);
    } catch (const InvalidArgument& e) {
      throw IoError(what + e.what());
    }
    if (d.head != Dictionary::kAllHeads && found.contains({d.layer, d.kind, Dictionary::kAllHeads}))
      throw IoError(what + "there is one for all heads too");
    set.dictionaries.push_back(std::move(d));  // in the order of the map
  }
  if (set.dictionaries.empty()) throw IoError(path + ": holds no dictionary");
  return set;
}

void write_dictionaries(const DictionarySet& set, const std::string& path) {
  std::map<std::string, detail::NamedFloats> tensors;
  std::map<std::string, std::string> metadata = set.metadata;
  std::map<Place, const Dictionary*> written;
  std::vector<Dictionary> tables(set.dictionaries.size());  // without atoms
  std::vector<std::vector<float>> bits(set.dictionaries.size());
  for (const Dictionary& d : set.dictionaries) {
    const std::string prefix = prefix_of(d);
    try {
      validate(d);
    } catch (const InvalidArgument& e) {
      throw InvalidArgument(path + ": " + prefix + ": " + e.what());
    }
    if (!written.emplace(place_of(d), &d).second)
      throw InvalidArgument(path + ": there are two dictionaries " + prefix);
  }
  for (std::size_t i = 0; i < set.dictionaries.size(); ++i) {
    const Dictionary& d = set.dictionaries[i];
    const std::string prefix = prefix_of(d);
    if (d.shares_atoms_with < 0) {
      tensors[prefix + ".atoms"] = {{d.num_atoms, d.dim}, d.atoms.data()};
    } else {
      const auto owner = written.find({d.shares_atoms_with, d.kind, d.head});
      if (owner == written.end() || owner->second->shares_atoms_with >= 0 ||
          owner->second->atoms != d.atoms)
        throw InvalidArgument(path + ": " + prefix + ": shares_atoms_with is " +
                              std::to_string(d.shares_atoms_with) +
                              ", a layer without these atoms of its own");
    }
    Dictionary& copy = tables[i];
    copy.dim = d.dim;
    copy.transform = d.transform;
    copy.format = d.format;
    bits[i].assign(d.format.residual.bits.begin(), d.format.residual.bits.end());
    for (Table& table : tables_of(copy, bits[i])) {
      if (table.values->empty()) continue;
      if (table.shape == std::vector<std::int64_t>{0})
        table.shape[0] = static_cast<std::int64_t>(table.values->size());
      tensors[prefix + table.suffix] = {table.shape, table.values->data()};
    }
    const std::string settings = settings_text(d);
    if (!settings.empty()) metadata[prefix] = settings;
  }
  metadata["format"] = "lexico-dictionary 1";
  metadata["key_stage"] = name_of(set.key_stage);
  write_file(path, detail::safetensors_text(tensors, metadata));
}

}  // namespace lexico
