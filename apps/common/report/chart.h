#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

// Line and dot charts as inline SVG. Colours are CSS values, so that the page's style sheet rules
// light and dark.
namespace lexico::report {

std::string html_escape(const std::string& text);

struct Point {
  double x = 0, y = 0;
  std::string tip;  ///< shown while the pointer is over it; lines are separated by '\n'
};

struct Style {
  std::string color = "var(--c0)";
  std::string dark_color;  ///< empty: as `color`
  bool dashed = false;
  bool line = true;
  int marker = -1;  ///< 0 circle, 1 square, 2 triangle, 3 diamond; -1 none
  bool hollow = false;
  double size = 3.4;  ///< of the marker, in pixels
};

struct Series {
  std::string name;
  Style style;
  std::vector<Point> points;  ///< those that are not finite are left out
};

struct Axis {
  std::string label;
  bool log = false;
  bool from_zero = false;
  bool grid = true;
  std::vector<std::pair<double, std::string>> ticks;  ///< empty: round numbers
  std::optional<double> low, high;                    ///< otherwise from the data
};

struct Panel {
  std::string title;
  std::string description;  ///< for screen readers
  Axis x, y;
  std::vector<Series> series;
  int width = 520, height = 300;
};

/// The range of all y (or x) in several panels, so that they can share an axis. Empty if there is
/// no point.
std::optional<std::pair<double, double>> range_of(const std::vector<Panel>& panels, bool y);

std::string to_svg(const Panel& panel);
/// A small line with its marker, for legends.
std::string swatch(const Style& style);

/// The colour of step `i` of `count` on a ramp that keeps its order when seen without colour:
/// {light page, dark page}.
std::pair<std::string, std::string> ramp_color(int i, int count);

}  // namespace lexico::report
