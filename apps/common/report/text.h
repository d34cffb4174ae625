#pragma once

#include <string>
#include <vector>

// How numbers and lists are spelled in reports.
namespace lexico::report {

/// snprintf into a string.
[[gnu::format(printf, 1, 2)]] std::string print(const char* format, ...);
std::string join(const std::vector<std::string>& parts, const std::string& between);

std::string short_error(double error);    ///< three digits: 0.182, 4.1e-05; "-" for NaN
std::string table_error(double error);    ///< four decimals: 0.1823, 4.1e-05; "-" for NaN
std::string ratio_text(double ratio);     ///< "1.09x"; "-" for NaN
std::string short_number(double number);  ///< 26, 25.4, 1,234,567: no decimals if whole
std::string grouped(long long number);    ///< 1,234,567
std::string compact(double number);       ///< 950, 12.5k, 4.5M

/// The width of a text on a terminal, taking each UTF-8 character for one column.
std::size_t columns(const std::string& text);
std::string pad_left(const std::string& text, std::size_t width);   ///< right-aligned
std::string pad_right(const std::string& text, std::size_t width);  ///< left-aligned

}  // namespace lexico::report
