// What lexico-eval reads, and whether it fits together.
#include "lexico-eval/inputs.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "common/options.h"
#include "common/program.h"
#include "lexico/error.h"
#include "lexico/pt_file.h"
#include "lexico/sha256.h"

namespace lexico::apps {
namespace {

namespace fs = std::filesystem;
using report::Coder;

/// "name", or "name-2" if that is taken.
std::string unique_name(const std::string& name, std::set<std::string>& taken) {
  std::string candidate = name;
  for (int i = 2; !taken.insert(candidate).second; ++i) candidate = name + "-" + std::to_string(i);
  return candidate;
}

std::string metadata_of(const DictionarySet& set, const std::string& key) {
  const auto found = set.metadata.find(key);
  return found == set.metadata.end() ? "" : found->second;
}

/// A name for a dictionary that was given none: its own, or its folder's if it is called
/// dictionary.*
std::string default_name(const std::string& path) {
  const fs::path full = fs::absolute(path).lexically_normal();
  const fs::path last = full.filename().empty() ? full.parent_path() : full;
  if (!fs::is_directory(path) && last.stem() == "dictionary") return last.parent_path().filename();
  return fs::is_directory(path) ? last.filename() : last.stem();
}

void require_alike(const std::vector<Contender>& contenders) {
  const Contender& a = contenders.front();
  const int dim = a.set.dictionaries.front().dim;
  for (const Contender& b : contenders) {
    for (const Dictionary& d : b.set.dictionaries)
      if (d.dim != dim)
        throw IoError(b.coder.path + ": head_dim is " + std::to_string(d.dim) + " in layer " +
                      std::to_string(d.layer) + ", but " + a.coder.path + " has " +
                      std::to_string(dim));
  }
}

std::string check_fit(const Contender& contender,
                      const NamedSource& source,
                      const std::vector<int>& layers,
                      const EvalConfig& config) {
  const VectorSource::Info& data = source.source->info();
  const std::string& path = source.spec.is_text ? config.model : source.spec.path;
  const int dim = contender.set.dictionaries.front().dim;
  if (data.head_dim != dim)
    throw IoError(path + ": head_dim is " + std::to_string(data.head_dim) + ", but " +
                  contender.coder.path + " has " + std::to_string(dim));
  const std::string its_sha = metadata_of(contender.set, "model_sha256");
  const bool same_model = !its_sha.empty() && its_sha == data.model_sha256;
  const bool layers_were_chosen = config.layers != "all";
  const int num_layers = static_cast<int>(layers.size());
  if (layers.back() >= data.num_layers ||
      (!layers_were_chosen && !same_model && num_layers != data.num_layers))
    throw IoError(path + ": has " + std::to_string(data.num_layers) + " layers, but " +
                  contender.coder.path + " has dictionaries of " + std::to_string(num_layers) +
                  (num_layers == layers.back() + 1
                       ? ""
                       : " (up to layer " + std::to_string(layers.back()) + ")") +
                  "; --layers picks those to compare");
  const bool has_keys = std::any_of(contender.set.dictionaries.begin(),
                                    contender.set.dictionaries.end(),
                                    [](const Dictionary& d) { return d.kind == Kind::kKeys; });
  if (has_keys && data.key_stage != contender.set.key_stage && !data.rope)
    throw IoError(path + ": keys are " + name_of(data.key_stage) + ", but " + contender.coder.path +
                  " was trained on " + name_of(contender.set.key_stage) +
                  ", and the file has no attribute 'rope' to take one to the other");
  if (!its_sha.empty() && !data.model_sha256.empty() && !same_model)
    return source.spec.name + ": its vectors are of another model file (" + data.model + ", " +
           data.model_sha256.substr(0, 12) + ") than " + contender.coder.name +
           " was trained on (" + metadata_of(contender.set, "model") + ", " +
           its_sha.substr(0, 12) + ").";
  return {};
}

}  // namespace

std::vector<Contender> read_contenders(const std::vector<std::string>& arguments) {
  std::vector<Contender> contenders;
  std::set<std::string> taken{"random", "samples"};
  for (const std::string& argument : arguments) {
    const TextSpec split = TextSpec::from(argument);
    Contender contender;
    contender.set = read_dictionaries_any(split.path);
    std::string name = split.path == argument ? default_name(argument) : split.name;
    if (arguments.size() == 1) name = split.path == argument ? "dictionary" : split.name;
    contender.coder = {
        unique_name(name, taken), Coder::Role::kDictionary, 0, split.path, contender.set.metadata};
    for (const Dictionary& d : contender.set.dictionaries)
      contender.coder.num_atoms = std::max(contender.coder.num_atoms, d.num_atoms);
    contenders.push_back(std::move(contender));
  }
  require_alike(contenders);
  return contenders;
}

std::vector<int> choose_layers(const std::string& wanted, std::vector<Contender>& contenders) {
  const std::vector<int> trained = contenders.front().set.layers();
  std::vector<int> layers = trained;
  if (wanted != "all") layers = parse_layers(wanted, trained.back() + 1);
  for (Contender& contender : contenders) {
    const std::vector<int> has = contender.set.layers();
    for (const int layer : layers)
      if (!std::binary_search(has.begin(), has.end(), layer))
        throw InvalidArgument("layers: " + contender.coder.path + " has no dictionary of layer " +
                              std::to_string(layer));
    std::erase_if(contender.set.dictionaries, [&](const Dictionary& d) {
      return !std::binary_search(layers.begin(), layers.end(), d.layer);
    });
  }
  return layers;
}

void require_atoms_for(int sparsity, const std::vector<Contender>& contenders) {
  for (const Contender& contender : contenders)
    for (const Dictionary& d : contender.set.dictionaries) {
      const std::string where = " of " + contender.coder.path + " (layer " +
                                std::to_string(d.layer) + " " + name_of(d.kind) + ")";
      if (sparsity > d.num_atoms)
        throw InvalidArgument("sparsity is " + std::to_string(sparsity) + ", more than the " +
                              std::to_string(d.num_atoms) + " atoms" + where);
      if (sparsity > d.dim)
        throw InvalidArgument("sparsity is " + std::to_string(sparsity) +
                              ", more than the head_dim " + std::to_string(d.dim) + where);
    }
}

std::vector<DataSpec> data_specs(const EvalConfig& config) {
  std::vector<DataSpec> specs;
  std::set<std::string> taken;
  const auto add = [&](DataSpec spec) {
    spec.name = unique_name(spec.name, taken);
    specs.push_back(std::move(spec));
  };
  for (const std::string& argument : config.data) add(DataSpec::from(argument, true));
  for (const std::string& argument : config.text) add(DataSpec::from_text(argument, false));
  for (const std::string& argument : config.token_ids) add(DataSpec::from_text(argument, true));
  for (const std::string& argument : config.ood) add(DataSpec::from(argument, false));
  return specs;
}

void TextTools::load(const EvalConfig& config, const std::vector<DataSpec>& specs) {
  const auto is_text = [](const DataSpec& spec) { return spec.is_text; };
  const auto needs_tokenizer = [](const DataSpec& spec) {
    return spec.is_text && !spec.is_token_ids;
  };
  const auto first = std::find_if(specs.begin(), specs.end(), is_text);
  if (first == specs.end()) return;
  if (config.model.empty())
    throw InvalidArgument("'" + first->path + "' is " +
                          (first->is_token_ids ? "token ids" : "text") +
                          ", which needs --model FILE");
  model.emplace(config.model, config.device, config.threads);
  packing = packing_for(config, model->info());
  if (std::any_of(specs.begin(), specs.end(), needs_tokenizer)) {
    tokenizer_path = find_tokenizer(config);
    tokenizer = load_tokenizer(config, model->info());
  }
  model_sha256 = sha256_of_file(config.model);
}

NamedSource open_source(const EvalConfig& config, const DataSpec& spec, TextTools& tools) {
  const Tokenizer* tokenizer = tools.tokenizer ? &*tools.tokenizer : nullptr;
  return {spec,
          spec.is_text
              ? open_text(
                    spec, config.field, *tools.model, tools.model_sha256, tokenizer, tools.packing)
              : open_activations(spec)};
}

std::vector<NamedSource> open_sources(const EvalConfig& config,
                                      const std::vector<DataSpec>& specs,
                                      TextTools& tools) {
  std::vector<NamedSource> sources;
  for (const DataSpec& spec : specs) {
    if (stop_requested()) throw Interrupted("stopped while reading the data; nothing was written");
    sources.push_back(open_source(config, spec, tools));
  }
  for (std::size_t i = 0, count = sources.size(); i < count; ++i)
    for (const int offset : config.position_offset) {
      if (!sources[i].spec.in_domain) continue;
      NamedSource moved = sources[i];
      moved.spec.name += "+" + std::to_string(offset);
      moved.position_offset = offset;
      sources.push_back(std::move(moved));
    }
  return sources;
}

std::vector<std::string> check_fit(const std::vector<Contender>& contenders,
                                   const std::vector<NamedSource>& sources,
                                   const std::vector<int>& layers,
                                   const EvalConfig& config) {
  std::vector<std::string> notes;
  for (const Contender& contender : contenders)
    for (const NamedSource& source : sources) {
      const std::string note = check_fit(contender, source, layers, config);
      if (!note.empty()) notes.push_back(note);
    }
  return notes;
}

}  // namespace lexico::apps
