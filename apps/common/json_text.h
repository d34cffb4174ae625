#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace lexico::apps {

/// As programs print and write it, a newline at its end; bytes that are not UTF-8 (names of files
/// may hold them) are replaced. @param indent  -1: one line.
inline std::string json_text(const nlohmann::ordered_json& json, int indent = 2) {
  return json.dump(indent, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace lexico::apps
