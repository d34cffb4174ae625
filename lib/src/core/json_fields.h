#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>

#include "lexico/error.h"

namespace lexico::detail {

/// One object of a JSON file; every accessor names the key and its value when it refuses.
class JsonFields {
 public:
  /// @param where  put before every message.
  JsonFields(const nlohmann::json& object, std::string where)
      : object_(object), where_(std::move(where)) {}

  [[noreturn]] void refuse(const std::string& key, const std::string& want) const {
    std::string value = object_.at(key).dump();
    if (value.size() > 60) value = value.substr(0, 57) + "...";
    throw IoError(where_ + "'" + key + "' is " + value + ", must be " + want);
  }

  const nlohmann::json& required(const std::string& key) const {
    const auto at = object_.find(key);
    if (at == object_.end()) throw IoError(where_ + "'" + key + "' is missing");
    return *at;
  }

  std::string text(const std::string& key) const {
    const nlohmann::json& value = required(key);
    if (!value.is_string()) refuse(key, "a text");
    return value.get<std::string>();
  }

  int integer(const std::string& key, std::int64_t least) const {
    constexpr std::int64_t kMost = std::numeric_limits<int>::max();
    const nlohmann::json& value = required(key);
    if (!value.is_number_integer() ||
        (value.is_number_unsigned() && value.get<std::uint64_t>() > kMost) ||
        value.get<std::int64_t>() < least || value.get<std::int64_t>() > kMost)
      refuse(key, "a whole number, at least " + std::to_string(least));
    return value.get<int>();
  }

  double finite(const std::string& key) const {
    const nlohmann::json& value = required(key);
    if (!value.is_number() || !std::isfinite(value.get<double>())) refuse(key, "a finite number");
    return value.get<double>();
  }

 private:
  const nlohmann::json& object_;
  std::string where_;
};

}  // namespace lexico::detail
