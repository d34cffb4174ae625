#pragma once

#include <optional>
#include <string>
#include <vector>

#include "lexico-eval/config.h"
#include "lexico-eval/measure.h"

namespace lexico::apps {

/// The dictionaries to compare, each under a name of its own.
/// @throws IoError if one cannot be read, or they are not of one head_dim and key stage.
std::vector<Contender> read_contenders(const std::vector<std::string>& arguments);

/// The layers to measure, of those the first dictionary has; the others are dropped everywhere.
/// @throws InvalidArgument if a dictionary lacks one.
std::vector<int> choose_layers(const std::string& wanted, std::vector<Contender>& contenders);

/// @throws InvalidArgument naming the dictionary that has fewer atoms or dimensions.
void require_atoms_for(int sparsity, const std::vector<Contender>& contenders);

/// What to measure on, each under a name of its own: in-domain data first.
std::vector<DataSpec> data_specs(const EvalConfig& config);

/// What turns text into vectors; without text all of it stays empty.
struct TextTools {
  std::optional<LanguageModel> model;
  std::string model_sha256, tokenizer_path;
  std::optional<Tokenizer> tokenizer;
  PackOptions packing;

  /// @throws InvalidArgument naming the flag that text needs; IoError.
  void load(const EvalConfig& config, const std::vector<DataSpec>& specs);
};

/// The sources refer to `tools`.
NamedSource open_source(const EvalConfig& config, const DataSpec& spec, TextTools& tools);

/// One per spec, then the moved ones.
std::vector<NamedSource> open_sources(const EvalConfig& config,
                                      const std::vector<DataSpec>& specs,
                                      TextTools& tools);

/// @throws IoError naming both files and both values.
/// @returns what is odd, but no reason to stop.
std::vector<std::string> check_fit(const std::vector<Contender>& contenders,
                                   const std::vector<NamedSource>& sources,
                                   const std::vector<int>& layers,
                                   const EvalConfig& config);

}  // namespace lexico::apps
