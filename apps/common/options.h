#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

namespace lexico::apps {

/// One setting of a program: flag, YAML key, environment variable, --help and the record in the
/// output are made from it.
struct Option {
  std::string key;  ///< snake_case; the flag is --kebab-case
  std::string help;
  enum class Shape { kFlag, kScalar, kList } shape = Shape::kScalar;
  bool is_text = false;  ///< its values are quoted in YAML
  std::function<void(const std::vector<std::string>&)>
      assign;  ///< @throws InvalidArgument without saying where
  std::function<std::vector<std::string>()> values;
};

// Text to value; each throws InvalidArgument "is 'x', must be ..." . Whole numbers may be written
// 1e6.
void parse_value(const std::string& text, bool& out);
void parse_value(const std::string& text, int& out);
void parse_value(const std::string& text, std::int64_t& out);
void parse_value(const std::string& text, std::uint64_t& out);
void parse_value(const std::string& text, double& out);
void parse_value(const std::string& text, std::string& out);
std::string value_text(bool value);
std::string value_text(int value);
std::string value_text(std::int64_t value);
std::string value_text(std::uint64_t value);
std::string value_text(double value);
std::string value_text(const std::string& value);

const std::string& only_value(
    const std::vector<std::string>& texts);  ///< @throws InvalidArgument unless there is one
/// "4,8,16" and {"4", "8"} alike: numbers of a list may also be separated by commas.
std::vector<std::string> split_commas(const std::vector<std::string>& texts);

template <typename T>
Option make_option(const char* key, T& field, const char* help) {
  Option option{key, help, Option::Shape::kScalar, std::is_same_v<T, std::string>, {}, {}};
  if constexpr (std::is_same_v<T, bool>) option.shape = Option::Shape::kFlag;
  option.assign = [&field](const std::vector<std::string>& texts) {
    parse_value(only_value(texts), field);
  };
  option.values = [&field] { return std::vector<std::string>{value_text(field)}; };
  return option;
}

template <typename T>
Option make_option(const char* key, std::vector<T>& field, const char* help) {
  constexpr bool kIsText = std::is_same_v<T, std::string>;
  Option option{key, help, Option::Shape::kList, kIsText, {}, {}};
  option.assign = [&field](const std::vector<std::string>& texts) {
    std::vector<T> values;
    for (const std::string& text : kIsText ? texts : split_commas(texts))
      parse_value(text, values.emplace_back());
    field = values;
  };
  option.values = [&field] {
    std::vector<std::string> texts;
    for (const T& value : field) texts.push_back(value_text(value));
    return texts;
  };
  return option;
}

/// The options of a config struct, which lists its fields once:
///   template <typename Self, typename Visitor> static void for_each_field(Self& self, Visitor&&
///   visit) {
///     visit("num_atoms", self.num_atoms, "atoms per dictionary (the paper's N)"); ...
template <typename Config>
std::vector<Option> options_of(Config& config) {
  std::vector<Option> options;
  Config::for_each_field(config, [&](const char* key, auto& field, const char* help) {
    options.push_back(make_option(key, field, help));
  });
  return options;
}

/// What --help shows around the options.
struct ProgramInfo {
  std::string name;
  std::string purpose;     ///< first lines of --help
  std::string examples;    ///< last lines of --help
  std::string positional;  ///< key of the list that bare arguments go to; empty: none are taken
  std::map<std::string, std::string>
      extra_names;       ///< key -> more flags, as "-o" or "--out-of-domain"
  std::string versions;  ///< of the libraries in use, for --version
};

/// Fills the options in this order: defaults < -c/--config FILE.yaml < environment LEXICO_<KEY> <
/// flags and --set k=v.
/// @returns false when the program is done (--help, --version, --print-config have printed to
/// stdout).
/// @throws InvalidArgument naming the place (file:line, variable or flag), the value, and the
/// nearest key if unknown.
bool parse_command_line(const ProgramInfo& program,
                        std::vector<Option>& options,
                        int argc,
                        char** argv);

/// All options as YAML, each with its help as a comment; what --print-config prints and -c reads.
std::string to_yaml(const std::vector<Option>& options);

/// The version of lexico itself, "0.1.0".
const char* lexico_version();

/// @throws InvalidArgument "KEY is VALUE, must be >= LEAST" if it is less.
void at_least(const char* key, std::int64_t value, std::int64_t least);

/// "all", "3", "0,2,5-7" -> ascending layer numbers below num_layers. @throws InvalidArgument
/// naming text and bound.
std::vector<int> parse_layers(const std::string& text, int num_layers);

}  // namespace lexico::apps
