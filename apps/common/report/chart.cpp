#include "common/report/chart.h"

#include <algorithm>
#include <cmath>

#include "common/report/text.h"

namespace lexico::report {
namespace {

constexpr double kCharacter = 6.4;  // width of one at 12 px, generous

/// Maps values to pixels along one axis.
class Scale {
 public:
  Scale(double low, double high, double from, double to, bool log)
      : low_(place(low, log)), high_(place(high, log)), from_(from), to_(to), log_(log) {}
  double operator()(double value) const {
    return from_ + (place(value, log_) - low_) / (high_ - low_) * (to_ - from_);
  }

 private:
  static double place(double value, bool log) { return log ? std::log10(value) : value; }
  double low_, high_, from_, to_;
  bool log_;
};

bool usable(const Point& point, const Axis& x, const Axis& y) {
  return std::isfinite(point.x) && std::isfinite(point.y) && (!x.log || point.x > 0) &&
         (!y.log || point.y > 0);
}

using Range = std::pair<double, double>;

std::optional<Range> data_range(const Panel& panel, bool want_y) {
  std::optional<Range> range;
  for (const Series& series : panel.series) {
    for (const Point& point : series.points) {
      if (!usable(point, panel.x, panel.y)) continue;
      const double value = want_y ? point.y : point.x;
      if (!range) range = Range(value, value);
      range->first = std::min(range->first, value);
      range->second = std::max(range->second, value);
    }
  }
  return range;
}

/// 1, 2 or 5 times a power of ten, so that about `count` steps cover the range.
double round_step(double range, int count) {
  const double rough = range / count;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (rough <= factor * power * 1.0001) return factor * power;
  return 10 * power;
}

std::string tick_text(double value, double step) {
  if (std::abs(value) < step * 1e-6) return "0";
  if (std::abs(value) >= 10000) return compact(value);
  if (std::abs(value) < 0.001) return print("%.0e", value);
  return print("%.*f", std::max(0, static_cast<int>(std::ceil(-std::log10(step) - 1e-9))), value);
}

/// The axis' end points and its ticks.
struct Layout {
  double low, high;
  std::vector<std::pair<double, std::string>> ticks;
};

/// Round numbers on a log axis: as few kinds of them as still give three.
std::vector<std::pair<double, std::string>> log_ticks(double low, double high) {
  std::vector<std::pair<double, std::string>> ticks;
  for (const auto& factors : std::vector<std::vector<double>>{
           {1}, {1, 2, 5}, {1, 2, 3, 5, 7}, {1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8}}) {
    ticks.clear();
    for (int power = static_cast<int>(std::floor(std::log10(low))); power <= std::log10(high);
         ++power) {
      for (const double factor : factors) {
        const double unit = std::pow(10, power), value = factor * unit;
        if (value < low * 0.999 || value > high * 1.001) continue;
        const bool is_whole = factor == std::floor(factor);
        ticks.emplace_back(value, tick_text(value, is_whole ? unit : unit / 10));
      }
    }
    if (ticks.size() >= 3) break;
  }
  return ticks;
}

Layout lay_out(const Axis& axis, Range range, int wanted_ticks) {
  double low = axis.low.value_or(range.first), high = axis.high.value_or(range.second);
  if (axis.log) {
    low *= axis.low ? 1 : 0.9, high *= axis.high ? 1 : 1.1;
    Layout layout{low, high, axis.ticks};
    if (!layout.ticks.empty()) return layout;
    layout.ticks = log_ticks(low, high);
    return layout;
  }
  if (axis.from_zero) low = std::min(low, 0.0);
  if (high <= low) high = low + (low == 0 ? 1 : std::abs(low) * 0.1);
  Layout layout{low, high, axis.ticks};
  if (!layout.ticks.empty()) return layout;
  const double step = round_step(high - low, wanted_ticks);
  if (!axis.low) layout.low = std::floor(low / step + 1e-9) * step;
  if (!axis.high) layout.high = std::ceil(high / step - 1e-9) * step;
  for (double k = std::ceil(layout.low / step - 1e-9); k * step <= layout.high + step * 1e-6; ++k)
    layout.ticks.emplace_back(k * step, tick_text(k * step, step));
  return layout;
}

std::string color_style(const Style& style) {
  std::string text = "--l:" + style.color;
  return text + ";--d:" + (style.dark_color.empty() ? style.color : style.dark_color);
}

std::string marker(const Style& style, double x, double y, double size) {
  const char* fill = style.hollow ? "mk ho" : "mk";
  switch (style.marker) {
    case 0:
      return print("<circle class=\"%s\" cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\"/>", fill, x, y, size);
    case 1:
      return print("<rect class=\"%s\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/>",
                   fill,
                   x - size * 0.9,
                   y - size * 0.9,
                   size * 1.8,
                   size * 1.8);
    case 2:
      return print("<path class=\"%s\" d=\"M%.1f %.1fL%.1f %.1fL%.1f %.1fZ\"/>",
                   fill,
                   x,
                   y - size * 1.2,
                   x + size * 1.1,
                   y + size * 0.8,
                   x - size * 1.1,
                   y + size * 0.8);
    case 3:
      return print("<path class=\"%s\" d=\"M%.1f %.1fL%.1f %.1fL%.1f %.1fL%.1f %.1fZ\"/>",
                   fill,
                   x,
                   y - size * 1.3,
                   x + size * 1.3,
                   y,
                   x,
                   y + size * 1.3,
                   x - size * 1.3,
                   y);
    default:
      return "";
  }
}

struct Frame {
  double left, right, top, bottom;
};

std::string draw_axes(const Panel& panel,
                      const Frame& frame,
                      const Layout& x,
                      const Layout& y,
                      const Scale& to_x,
                      const Scale& to_y) {
  std::string svg;
  double last_y = 1e9;
  for (const auto& [value, text] : y.ticks) {
    const double at = to_y(value);
    if (panel.y.grid)
      svg += print("<line class=\"gr\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>",
                   frame.left,
                   frame.right,
                   at,
                   at);
    if (std::abs(last_y - at) < 13) continue;  // labels would touch
    svg += print("<text class=\"tk\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%s</text>",
                 frame.left - 8,
                 at + 4,
                 html_escape(text).c_str());
    last_y = at;
  }
  double free_from = -1e9;
  for (const auto& [value, text] : x.ticks) {
    const double at = to_x(value), half = 0.5 * kCharacter * static_cast<double>(columns(text));
    if (panel.x.grid)
      svg += print("<line class=\"gr\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>",
                   at,
                   at,
                   frame.top,
                   frame.bottom);
    if (at - half < free_from) continue;
    svg += print("<text class=\"tk\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%s</text>",
                 at,
                 frame.bottom + 18,
                 html_escape(text).c_str());
    free_from = at + half + 6;
  }
  svg += print("<line class=\"ax\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>",
               frame.left,
               frame.right,
               frame.bottom,
               frame.bottom);
  svg += print("<text class=\"lb\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%s</text>",
               (frame.left + frame.right) / 2,
               frame.bottom + 38,
               html_escape(panel.x.label).c_str());
  return svg;
}

std::string draw_series(const Panel& panel,
                        const Series& series,
                        const Scale& to_x,
                        const Scale& to_y) {
  std::string path, markers, hits;
  for (const Point& point : series.points) {
    if (!usable(point, panel.x, panel.y)) continue;
    const double x = to_x(point.x), y = to_y(point.y);
    path += print("%s%.1f %.1f", path.empty() ? "M" : "L", x, y);
    markers += marker(series.style, x, y, series.style.size);
    if (!point.tip.empty())
      hits +=
          print("<circle class=\"hit\" cx=\"%.1f\" cy=\"%.1f\" r=\"8\"><title>%s</title></circle>",
                x,
                y,
                html_escape(point.tip).c_str());
  }
  std::string svg = "<g style=\"" + color_style(series.style) + "\">";
  if (series.style.line)
    svg += "<path class=\"ln" + std::string(series.style.dashed ? " da" : "") + "\" d=\"" + path +
           "\"/>";
  return svg + markers + hits + "</g>";
}

}  // namespace

std::string html_escape(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

std::optional<Range> range_of(const std::vector<Panel>& panels, bool y) {
  std::optional<Range> all;
  for (const Panel& panel : panels) {
    const std::optional<Range> range = data_range(panel, y);
    if (!range) continue;
    if (!all) all = range;
    all = Range(std::min(all->first, range->first), std::max(all->second, range->second));
  }
  return all;
}

std::string to_svg(const Panel& panel) {
  std::string svg = print("<svg viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"%s\">",
                          panel.width,
                          panel.height,
                          html_escape(panel.description).c_str());
  const bool has_data = data_range(panel, true).has_value();
  const Layout y = lay_out(panel.y, data_range(panel, true).value_or(Range(0.1, 1)), 5);
  const Layout x = lay_out(panel.x, data_range(panel, false).value_or(Range(0.1, 1)), 6);
  std::size_t longest = 0;
  for (const auto& tick : y.ticks) longest = std::max(longest, columns(tick.second));
  const double left = std::max(36.0, kCharacter * static_cast<double>(longest) + 16);
  const Frame frame{left, panel.width - 16.0, 34, panel.height - 46.0};
  svg += print("<text class=\"ti\" x=\"0\" y=\"14\">%s <tspan class=\"lb\">%s</tspan></text>",
               html_escape(panel.title).c_str(),
               html_escape(panel.y.label).c_str());
  const Scale to_x(x.low, x.high, frame.left + 6, frame.right - 6, panel.x.log);
  const Scale to_y(y.low, y.high, frame.bottom, frame.top, panel.y.log);
  if (has_data) {
    svg += draw_axes(panel, frame, x, y, to_x, to_y);
    for (const Series& series : panel.series) svg += draw_series(panel, series, to_x, to_y);
  } else {
    svg += print("<text class=\"lb\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">no data</text>",
                 panel.width / 2.0,
                 panel.height / 2.0);
  }
  return svg + "</svg>";
}

std::string swatch(const Style& style) {
  std::string svg = "<svg class=\"sw\" viewBox=\"0 0 28 12\" aria-hidden=\"true\"><g style=\"" +
                    color_style(style) + "\">";
  if (style.line)
    svg += "<path class=\"ln" + std::string(style.dashed ? " da" : "") + "\" d=\"M1 6L27 6\"/>";
  return svg + marker(style, 14, 6, style.size) + "</g></svg>";
}

std::pair<std::string, std::string> ramp_color(int i, int count) {
  // Viridis without its palest end on white and without its darkest end on black.
  static constexpr int kStops[][3] = {{68, 1, 84},
                                      {72, 40, 120},
                                      {62, 74, 137},
                                      {49, 104, 142},
                                      {38, 130, 142},
                                      {31, 158, 137},
                                      {53, 183, 121},
                                      {109, 205, 89},
                                      {180, 222, 44},
                                      {253, 231, 37}};
  const double share = count > 1 ? static_cast<double>(i) / (count - 1) : 0.5;
  const auto color = [](double place) {
    const auto below = std::min<std::size_t>(static_cast<std::size_t>(place), 8);
    const double rest = place - static_cast<double>(below);
    int rgb[3];
    for (std::size_t c = 0; c < 3; ++c)
      rgb[c] = static_cast<int>(
          std::lround(kStops[below][c] + rest * (kStops[below + 1][c] - kStops[below][c])));
    return print("#%02x%02x%02x",
                 static_cast<unsigned>(rgb[0]),
                 static_cast<unsigned>(rgb[1]),
                 static_cast<unsigned>(rgb[2]));
  };
  return {color(share * 7.6), color(2.6 + share * 6.4)};
}

}  // namespace lexico::report
