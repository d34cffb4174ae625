// dictionary.pt: the layout of the published code, through torch's own pickle format.
#include "lexico/pt_file.h"

#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/torch.h>

#include "lexico/error.h"
#include "lexico/files.h"

namespace lexico {

void write_dictionaries_pt(const DictionarySet& set, const std::string& path) {
  const int layers = static_cast<int>(set.layers().size());
  if (set.key_stage != KeyStage::kPostRope)
    throw InvalidArgument(path + ": the published layout has no place for the key stage pre_rope");
  for (const Dictionary& d : set.dictionaries)
    if (d.head != Dictionary::kAllHeads)
      throw InvalidArgument(
          path + ": the published layout has no place for dictionaries of single heads, as the " +
          name_of(d.kind) + " of layer " + std::to_string(d.layer) + " have");
  for (int layer = 0; layer < layers; ++layer)
    for (Kind kind : kBothKinds) {
      const Dictionary* d = set.find(layer, kind);
      if (d == nullptr)
        throw InvalidArgument(path + ": the published layout needs every layer; layer " +
                              std::to_string(layer) + " has no " + name_of(kind) + " dictionary");
      const Dictionary& like = set.dictionaries.front();
      if (d->num_atoms != like.num_atoms || d->dim != like.dim)
        throw InvalidArgument(path + ": the published layout needs dictionaries of one shape");
    }
  if (layers == 0) throw InvalidArgument(path + ": no dictionaries to write");
  for (const Dictionary& d : set.dictionaries)
    if (!d.transform.is_identity())
      throw InvalidArgument(path + ": the published layout has no place for the transform of the " +
                            name_of(d.kind) + " of layer " + std::to_string(d.layer));
  const Dictionary& like = set.dictionaries.front();
  torch::Tensor all = torch::empty({2 * layers, like.dim, like.num_atoms});
  for (int layer = 0; layer < layers; ++layer)
    for (Kind kind : kBothKinds) {
      const Dictionary& d = *set.find(layer, kind);
      const torch::Tensor atoms =
          torch::from_blob(const_cast<float*>(d.atoms.data()), {d.num_atoms, d.dim});
      all[2 * layer + static_cast<int>(kind)].copy_(atoms.t());
    }
  const std::vector<char> bytes = torch::jit::pickle_save(all);
  write_file(path, {bytes.data(), bytes.size()});
}

DictionarySet read_dictionaries_pt(const std::string& path) {
  const std::string bytes = read_file(path);
  torch::Tensor all;
  try {
    const torch::IValue value =
        torch::jit::pickle_load(std::vector<char>(bytes.begin(), bytes.end()));
    if (!value.isTensor())
      throw IoError(path + ": holds a " + value.tagKind() +
                    ", want one tensor [2 * layers, dim, num_atoms]");
    all = value.toTensor();
  } catch (const IoError&) {
    throw;
  } catch (const std::exception& e) {
    const std::string what = e.what();
    throw IoError(path + ": not a tensor saved by torch.save, or damaged: " +
                  what.substr(0, what.find('\n')));
  }
  if (all.dim() != 3 || all.size(0) < 2 || all.size(0) % 2 != 0 || all.size(1) < 1 ||
      all.size(2) < 1 || !all.is_floating_point())
    throw IoError(path + ": the tensor is " + c10::str(all.sizes()) + " " +
                  c10::str(all.scalar_type()) +
                  ", want a floating-point [2 * layers, dim, num_atoms]");
  all = all.to(torch::kCPU, torch::kFloat32);
  DictionarySet set;
  for (std::int64_t row = 0; row < all.size(0); ++row) {
    const torch::Tensor atoms = all[row].t().contiguous();
    Dictionary d{static_cast<int>(row / 2),
                 row % 2 == 0 ? Kind::kKeys : Kind::kValues,
                 static_cast<int>(all.size(2)),
                 static_cast<int>(all.size(1)),
                 {atoms.data_ptr<float>(), atoms.data_ptr<float>() + atoms.numel()}};
    try {
      normalize_atoms(d.atoms, d.num_atoms, d.dim);
    } catch (const InvalidArgument& e) {
      throw IoError(path + ": row " + std::to_string(row) + ": " + e.what());
    }
    set.dictionaries.push_back(std::move(d));
  }
  return set;
}

DictionarySet read_dictionaries_any(const std::string& path) {
  return path.ends_with(".pt") ? read_dictionaries_pt(path) : read_dictionaries(path);
}

}  // namespace lexico
