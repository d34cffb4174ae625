#pragma once

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "lexico/tokenizer.h"
#include "support/message_of.h"
#include "support/temporary_folder.h"

namespace lexico::test {

inline std::string fixture(const std::string& name) {
  return std::string(LEXICO_SOURCE_DIR) + "/tests/text/fixtures/" + name;
}
inline std::string shared(const std::string& name) {
  return std::string(LEXICO_SOURCE_DIR) + "/../shared/" + name;
}

inline std::string contents(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}
inline std::string write(const TemporaryFolder& folder,
                         const std::string& name,
                         std::string_view bytes) {
  const std::string path = folder.file(name);
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return path;
}

inline nlohmann::json fixture_json(const std::string& name) {
  return nlohmann::json::parse(contents(fixture(name)));
}

}  // namespace lexico::test
