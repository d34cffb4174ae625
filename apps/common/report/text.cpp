#include "common/report/text.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>

namespace lexico::report {

std::string print(const char* format, ...) {
  va_list arguments, again;
  va_start(arguments, format);
  va_copy(again, arguments);
  const int size = std::vsnprintf(nullptr, 0, format, arguments);
  va_end(arguments);
  std::string text(size > 0 ? static_cast<std::size_t>(size) : 0, '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  return text;
}

std::string join(const std::vector<std::string>& parts, const std::string& between) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : between) + part;
  return text;
}

namespace {
std::string error_text(double error, int decimals) {
  if (!std::isfinite(error)) return "-";
  if (error != 0 && std::abs(error) < 0.001) return print("%.1e", error);
  return print("%.*f", decimals, error);
}
}  // namespace

std::string short_error(double error) { return error_text(error, 3); }
std::string table_error(double error) { return error_text(error, 4); }
std::string ratio_text(double ratio) { return std::isfinite(ratio) ? print("%.2fx", ratio) : "-"; }

std::string short_number(double number) {
  if (!std::isfinite(number)) return "-";
  if (std::abs(number - std::round(number)) < 0.05) return grouped(std::llround(number));
  return print("%.1f", number);
}

std::string grouped(long long number) {
  std::string text = std::to_string(number);
  for (auto at = static_cast<std::ptrdiff_t>(text.size()) - 3; at > (number < 0 ? 1 : 0); at -= 3)
    text.insert(static_cast<std::size_t>(at), ",");
  return text;
}

std::string compact(double number) {
  static constexpr const char* kUnits[] = {"", "k", "M", "G", "T"};
  int unit = 0;
  while (std::abs(number) >= 999.5 && unit < 4) number /= 1000, ++unit;
  const bool whole = std::abs(number - std::round(number)) < 0.05 || unit == 0;
  return print(whole ? "%.0f%s" : "%.1f%s", number, kUnits[unit]);
}

std::size_t columns(const std::string& text) {
  std::size_t count = 0;
  for (const char c : text) count += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  return count;
}

std::string pad_left(const std::string& text, std::size_t width) {
  const std::size_t used = columns(text);
  return used < width ? std::string(width - used, ' ') + text : text;
}

std::string pad_right(const std::string& text, std::size_t width) {
  const std::size_t used = columns(text);
  return used < width ? text + std::string(width - used, ' ') : text;
}

}  // namespace lexico::report
