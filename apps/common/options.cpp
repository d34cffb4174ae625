// Command line, environment and YAML, all from one list of options.
#include "common/options.h"

#include <yaml-cpp/yaml.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <numeric>
#include <set>
#include <sstream>

#include "lexico/error.h"
#include "lexico/files.h"

namespace lexico::apps {
namespace {

[[noreturn]] void throw_must_be(const std::string& text, const std::string& what) {
  throw InvalidArgument("is '" + text + "', must be " + what);
}

double parse_number(const std::string& text, const char* what) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(value)) throw_must_be(text, what);
  return value;
}

template <typename Int>
Int parse_integer(const std::string& text) {
  std::istringstream exact(text);
  Int value{};
  if (!(std::is_unsigned_v<Int> && text.find('-') != std::string::npos) && exact >> value &&
      exact.eof())
    return value;
  const double number = parse_number(text, "a whole number");
  constexpr double kExact = 9007199254740992.0;  // 2^53: beyond it a double no longer counts
  if (number != std::floor(number) || std::fabs(number) > kExact ||
      number < static_cast<double>(std::numeric_limits<Int>::min()) ||
      number > static_cast<double>(std::numeric_limits<Int>::max()))
    throw_must_be(text,
                  "a whole number in [" + std::to_string(std::numeric_limits<Int>::min()) + ", " +
                      std::to_string(std::numeric_limits<Int>::max()) + "]");
  return static_cast<Int>(number);
}

std::string flag_of(const std::string& key) {
  std::string flag = "--" + key;
  std::replace(flag.begin(), flag.end(), '_', '-');
  return flag;
}

std::string variable_of(const std::string& key) {
  std::string name = "LEXICO_" + key;
  for (char& c : name)
    c = c == '.' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return name;
}

int edit_distance(const std::string& a, const std::string& b) {
  std::vector<int> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (std::size_t i = 1; i <= a.size(); ++i) {
    int diagonal = std::exchange(row[0], static_cast<int>(i));
    for (std::size_t j = 1; j <= b.size(); ++j)
      diagonal = std::exchange(
          row[j], std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])}));
  }
  return row[b.size()];
}

std::string nearest(const std::string& name, const std::vector<std::string>& names) {
  std::string best;
  for (const std::string& candidate : names)
    if (best.empty() || edit_distance(name, candidate) < edit_distance(name, best))
      best = candidate;
  return best;
}

Option& find_option(std::vector<Option>& options,
                    const std::string& key,
                    const std::string& where) {
  std::vector<std::string> keys;
  for (Option& option : options) {
    if (option.key == key) return option;
    keys.push_back(option.key);
  }
  throw InvalidArgument(where + "unknown key '" + key + "'; the nearest is '" + nearest(key, keys) +
                        "'");
}

void assign(Option& option, const std::vector<std::string>& texts, const std::string& where) {
  try {
    option.assign(texts);
  } catch (const InvalidArgument& e) {
    throw InvalidArgument(where + option.key + " " + e.what());
  }
}

std::vector<std::string> texts_of(const YAML::Node& node, const std::string& where) {
  if (node.IsScalar()) return {node.Scalar()};
  std::vector<std::string> texts;
  for (const YAML::Node& item : node) {
    if (!item.IsScalar()) throw InvalidArgument(where + "a list may hold only plain values");
    texts.push_back(item.Scalar());
  }
  return texts;
}

/// Nested maps name nested keys: {a: {b: 1}} sets a.b.
void assign_yaml(std::vector<Option>& options,
                 const YAML::Node& map,
                 const std::string& path,
                 const std::string& prefix) {
  std::set<std::string> seen;
  for (const auto& entry : map) {
    const std::string where = path + ":" + std::to_string(entry.first.Mark().line + 1) + ": ";
    if (!entry.first.IsScalar()) throw InvalidArgument(where + "a key must be plain text");
    const std::string key = prefix + entry.first.Scalar();
    if (!seen.insert(key).second) throw InvalidArgument(where + "key '" + key + "' stands twice");
    if (entry.second.IsMap()) {
      assign_yaml(options, entry.second, path, key + ".");
      continue;
    }
    Option& option = find_option(options, key, where);
    if (entry.second.IsNull()) throw InvalidArgument(where + key + " has no value");
    assign(option, texts_of(entry.second, where), where);
  }
}

void read_yaml(std::vector<Option>& options, const std::string& path) {
  YAML::Node root;
  try {
    root = YAML::Load(read_file(path));
  } catch (const YAML::Exception& e) {
    throw InvalidArgument(path + ":" + std::to_string(e.mark.line + 1) + ": not YAML: " + e.msg);
  }
  if (root.IsNull()) return;
  if (!root.IsMap()) throw InvalidArgument(path + ": must be a map of keys to values");
  assign_yaml(options, root, path, "");
}

void read_environment(std::vector<Option>& options) {
  for (Option& option : options) {
    const std::string name = variable_of(option.key);
    const char* text = std::getenv(name.c_str());
    if (text != nullptr && *text != '\0') assign(option, {text}, name + ": ");
  }
}

void assign_set(std::vector<Option>& options, const std::string& text) {
  const std::size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0)
    throw InvalidArgument("--set " + text + ": want key=value");
  Option& option = find_option(options, text.substr(0, equals), "--set: ");
  const std::string value = text.substr(equals + 1);
  const bool is_yaml_list = !value.empty() && value.front() == '[';
  try {
    assign(option,
           is_yaml_list ? texts_of(YAML::Load(value), "--set: ") : std::vector<std::string>{value},
           "--set: ");
  } catch (const YAML::Exception& e) {
    throw InvalidArgument("--set " + text + ": " + e.msg);
  }
}

std::string quoted(const std::string& text, bool is_text) {
  if (!is_text) return text;
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (c == '\n')
      out += "\\n";
    else
      out += c;
  }
  return out + "\"";
}

std::string yaml_value(const Option& option) {
  const std::vector<std::string> values = option.values();
  if (option.shape != Option::Shape::kList) return quoted(values.front(), option.is_text);
  std::string text = "[";
  for (const std::string& value : values)
    text += (text.size() > 1 ? ", " : "") + quoted(value, option.is_text);
  return text + "]";
}

std::string default_text(const Option& option) {
  if (option.shape == Option::Shape::kFlag) return {};
  std::string text;
  for (const std::string& value : option.values()) text += (text.empty() ? "" : ",") + value;
  return text.empty() ? std::string{} : " [" + text + "]";
}

}  // namespace

void parse_value(const std::string& text, bool& out) {
  if (text != "true" && text != "false") throw_must_be(text, "true or false");
  out = text == "true";
}
void parse_value(const std::string& text, int& out) { out = parse_integer<int>(text); }
void parse_value(const std::string& text, std::int64_t& out) {
  out = parse_integer<std::int64_t>(text);
}
void parse_value(const std::string& text, std::uint64_t& out) {
  out = parse_integer<std::uint64_t>(text);
}
void parse_value(const std::string& text, double& out) { out = parse_number(text, "a number"); }
void parse_value(const std::string& text, std::string& out) { out = text; }

std::string value_text(bool value) { return value ? "true" : "false"; }
std::string value_text(int value) { return std::to_string(value); }
std::string value_text(std::int64_t value) { return std::to_string(value); }
std::string value_text(std::uint64_t value) { return std::to_string(value); }
std::string value_text(double value) {
  for (int digits : {6, 9, 17}) {  // the shortest that reads back as the same number
    std::ostringstream out;
    out.precision(digits);
    out << value;
    if (std::strtod(out.str().c_str(), nullptr) == value) return out.str();
  }
  return "nan";
}
std::string value_text(const std::string& value) { return value; }

const std::string& only_value(const std::vector<std::string>& texts) {
  if (texts.size() != 1)
    throw InvalidArgument("has " + std::to_string(texts.size()) + " values, must have one");
  return texts.front();
}

std::vector<std::string> split_commas(const std::vector<std::string>& texts) {
  std::vector<std::string> parts;
  for (const std::string& text : texts) {
    std::istringstream in(text);
    for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  }
  return parts;
}

bool parse_command_line(const ProgramInfo& program,
                        std::vector<Option>& options,
                        int argc,
                        char** argv) {
  CLI::App app{program.purpose, program.name};
  app.footer(program.examples);
  app.get_formatter()->column_width(34);
  std::string config_path;
  std::vector<std::string> sets;
  bool print_config = false, version = false;
  std::map<std::string, std::vector<std::string>> given;
  std::vector<std::pair<std::string, CLI::Option*>> flags;  // key, as CLI11 sees it

  for (const Option& option : options) {
    std::string names = flag_of(option.key);
    const auto extra = program.extra_names.find(option.key);
    if (extra != program.extra_names.end()) names = extra->second + "," + names;
    if (option.key == program.positional) names += "," + option.key;
    const std::string help = option.help + default_text(option);
    CLI::Option* flag = nullptr;
    if (option.shape == Option::Shape::kFlag) {
      flag = app.add_flag(names, help);
    } else {
      flag = app.add_option_function<std::vector<std::string>>(
          names, [](const std::vector<std::string>&) {}, help);
      if (option.shape == Option::Shape::kScalar) flag->expected(1)->take_last();
      flag->type_name(option.shape == Option::Shape::kList ? "VALUE..." : "VALUE");
    }
    flags.emplace_back(option.key, flag);
  }
  app.add_option("-c,--config",
                 config_path,
                 "YAML file with any of these keys (snake_case); flags win over it")
      ->type_name("FILE");
  app.add_option("--set", sets, "set a key as in the YAML file: --set num_atoms=512 (repeatable)")
      ->type_name("KEY=VALUE")
      ->expected(1);
  app.get_option("--set")->take_all();
  app.add_flag("--print-config", print_config, "print the resolved configuration as YAML and exit");
  app.add_flag("--version", version, "print versions and exit");

  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    return false;
  } catch (const CLI::ExtrasError&) {
    const std::vector<std::string> extras = app.remaining();
    std::vector<std::string> names = {"--config", "--set", "--print-config", "--version", "--help"};
    for (const Option& option : options) names.push_back(flag_of(option.key));
    std::string message = "unexpected argument '" + extras.front() + "'";
    if (extras.front().rfind('-', 0) == 0)
      message += "; the nearest flag is '" + nearest(extras.front(), names) + "'";
    throw InvalidArgument(message + " (see --help)");
  } catch (const CLI::ParseError& e) {
    throw InvalidArgument(std::string(e.what()) + " (see --help)");
  }
  if (version) {
    std::cout << program.name << ' ' << lexico_version()
              << (program.versions.empty() ? "" : "\n" + program.versions) << '\n';
    return false;
  }
  if (!config_path.empty()) read_yaml(options, config_path);
  read_environment(options);
  for (const auto& [key, flag] : flags) {
    if (flag->count() == 0) continue;
    Option& option = find_option(options, key, "");
    std::vector<std::string> texts = flag->results();
    if (option.shape != Option::Shape::kList)
      texts = {texts.back()};  // said twice: the last counts
    assign(option, texts, flag_of(key) + ": ");
  }
  for (const std::string& text : sets) assign_set(options, text);
  if (print_config) {
    std::cout << to_yaml(options);
    return false;
  }
  return true;
}

std::string to_yaml(const std::vector<Option>& options) {
  std::string yaml, group;
  std::size_t widest = 0;
  std::vector<std::string> lines;
  for (const Option& option : options) {
    const std::size_t dot = option.key.rfind('.');
    const std::string parent = dot == std::string::npos ? "" : option.key.substr(0, dot);
    std::string line;
    if (parent != group && !parent.empty()) line = parent + ":\n";
    group = parent;
    line += (parent.empty() ? "" : "  ") +
            option.key.substr(dot == std::string::npos ? 0 : dot + 1) + ": " + yaml_value(option);
    lines.push_back(line);
    if (line.size() <= 40) widest = std::max(widest, line.size());
  }
  for (std::size_t i = 0; i < lines.size(); ++i) {
    const std::size_t padding = lines[i].size() < widest ? widest - lines[i].size() : 0;
    yaml += lines[i] + std::string(padding, ' ') + "  # " + options[i].help + '\n';
  }
  return yaml;
}

const char* lexico_version() { return LEXICO_VERSION; }

void at_least(const char* key, std::int64_t value, std::int64_t least) {
  if (value < least)
    throw InvalidArgument(std::string(key) + " is " + std::to_string(value) +
                          ", must be >= " + std::to_string(least));
}

std::vector<int> parse_layers(const std::string& text, int num_layers) {
  std::vector<int> layers;
  const auto number = [&](const std::string& part) {
    int layer = 0;
    try {
      parse_value(part, layer);
    } catch (const InvalidArgument&) {
      throw InvalidArgument("layers is '" + text + "', must be 'all' or numbers like 0,2,5-7");
    }
    if (layer < 0 || layer >= num_layers)
      throw InvalidArgument("layers is '" + text + "': layer " + part +
                            " does not exist, there are " + std::to_string(num_layers) + " (0 to " +
                            std::to_string(num_layers - 1) + ")");
    return layer;
  };
  if (text == "all") {
    layers.resize(static_cast<std::size_t>(num_layers));
    std::iota(layers.begin(), layers.end(), 0);
    return layers;
  }
  for (const std::string& part : split_commas({text})) {
    const std::size_t dash = part.find('-', 1);
    const int first = number(part.substr(0, dash));
    const int last = dash == std::string::npos ? first : number(part.substr(dash + 1));
    if (last < first)
      throw InvalidArgument("layers is '" + text + "': " + part + " runs backwards");
    for (int layer = first; layer <= last; ++layer) layers.push_back(layer);
  }
  std::sort(layers.begin(), layers.end());
  layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
  if (layers.empty()) throw InvalidArgument("layers is '" + text + "', must name at least one");
  return layers;
}

}  // namespace lexico::apps
