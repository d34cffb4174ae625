// The page that a run is judged by: one file, no external resources, readable without its script
// and on paper.
#include <algorithm>
#include <cmath>

#include "common/report/chart.h"
#include "common/report/page.h"
#include "common/report/report.h"
#include "common/report/text.h"
#include "lexico/evaluation.h"

namespace lexico::report {
namespace {

constexpr int kColors = 6;

std::string color(int i) { return print("var(--c%d)", i % kColors); }
std::string s_equals(int sparsity) { return "s = " + std::to_string(sparsity); }
std::string title_of(Kind kind) { return kind == Kind::kKeys ? "Keys" : "Values"; }

std::string tag(const std::string& name, const std::string& inner, const std::string& css = {}) {
  return "<" + name + (css.empty() ? "" : " class=\"" + css + "\"") + ">" + inner + "</" + name +
         ">";
}

/// Which domains were measured, and the coder that the charts are about.
struct View {
  const EvaluationReport& report;
  const Coder* dictionary;
  bool has_in = false, has_out = false;

  explicit View(const EvaluationReport& r)
      : report(r), dictionary(find_coder(r, Coder::Role::kDictionary)) {
    for (const Dataset& dataset : r.datasets) (dataset.in_domain ? has_in : has_out) = true;
  }
  std::vector<bool> domains() const {
    std::vector<bool> domains;
    if (has_in) domains.push_back(true);
    if (has_out) domains.push_back(false);
    return domains;
  }
  bool has_rows() const { return dictionary && !report.rows.empty(); }
};

const char* domain_name(bool in_domain) { return in_domain ? "in domain" : "out of domain"; }

/// What solid and dashed mean, where both are drawn.
void add_domains(const View& view, std::vector<std::pair<Style, std::string>>& entries) {
  if (view.domains().size() < 2) return;
  entries.emplace_back(Style{"var(--ink)", "", false, true, 0, false}, "in domain");
  entries.emplace_back(Style{"var(--ink)", "", true, true, 0, true}, "out of domain");
}

std::string legend(const std::vector<std::pair<Style, std::string>>& entries) {
  std::string html;
  for (const auto& [style, name] : entries) html += tag("span", swatch(style) + html_escape(name));
  return tag("div", html, "legend");
}

std::string charts(const std::vector<Panel>& panels) {
  std::string html;
  for (const Panel& panel : panels) html += tag("figure", to_svg(panel));
  return tag("div", html, "charts");
}

/// Keys and values on one scale, so that they can be compared by eye.
void share_y(std::vector<Panel>& panels) {
  const auto range = range_of(panels, true);
  if (!range) return;
  for (Panel& panel : panels) {
    if (panel.y.log) {
      panel.y.low = range->first * 0.85, panel.y.high = range->second * 1.15;
    } else {
      // An invisible point makes each panel choose the same round numbers.
      Series extent{"", {"none", "none", false, false, -1, false, 0}, {}};
      const auto x = range_of({panel}, false);
      if (x) extent.points = {{x->first, range->first, ""}, {x->first, range->second, ""}};
      panel.series.push_back(extent);
    }
  }
}

const Row* find_row(const EvaluationReport& report,
                    const std::string& dataset,
                    int layer,
                    Kind kind,
                    const std::string& coder,
                    int sparsity) {
  for (const Row& row : report.rows)
    if (row.layer == layer && row.kind == kind && row.sparsity == sparsity && row.coder == coder &&
        row.dataset == dataset)
      return &row;
  return nullptr;
}

// ---- the parts of the page, from top to bottom ----

std::string tile(const std::string& name, const std::string& number, const std::string& detail) {
  return tag("div",
             tag("span", html_escape(name), "name") + tag("b", html_escape(number)) +
                 tag("span", html_escape(detail)),
             "tile");
}

std::string tiles(const View& view) {
  if (!view.has_rows()) return "";
  const EvaluationReport& report = view.report;
  const std::string& name = view.dictionary->name;
  const int s = headline_sparsity(report);
  std::string html;
  for (const Kind kind : kBothKinds) {
    const double error = mean_error(report, {name, s, kind, view.has_in, {}, {}});
    if (std::isfinite(error))
      html += tile(title_of(kind) + ", " + domain_name(view.has_in),
                   short_error(error),
                   "mean relative error, s\u00a0=\u00a0" + std::to_string(s));
  }
  const double ratio = out_over_in(report, name, s);
  if (std::isfinite(ratio))
    html += tile("Out of domain",
                 print("%.2f\u00d7", ratio),
                 "the in-domain error, s\u00a0=\u00a0" + std::to_string(s));
  const double bytes = mean_bytes(report, {name, s, {}, {}, {}, {}}),
               dense = fp16_bytes(report.dim);
  html += tile(
      "Memory",
      short_number(bytes) + " B",
      print("a vector: %.0f %% of fp16, %.1f\u00d7 smaller", 100 * bytes / dense, dense / bytes));
  if (const Coder* samples = find_coder(report, Coder::Role::kSamples)) {
    const double against = mean_error(report, {name, s, {}, view.has_in, {}, {}}) /
                           mean_error(report, {samples->name, s, {}, view.has_in, {}, {}});
    if (std::isfinite(against))
      html += tile("Against plain samples",
                   print("%.2f\u00d7", against),
                   "their error, s\u00a0=\u00a0" + std::to_string(s));
  }
  return tag("div", html, "tiles");
}

std::string header(const View& view) {
  const EvaluationReport& report = view.report;
  std::vector<std::string> facts;
  if (!report.model.empty()) facts.push_back(report.model);
  if (view.dictionary) facts.push_back("N = " + grouped(view.dictionary->num_atoms) + " atoms");
  if (report.dim > 0) facts.push_back(print("head dimension %d", report.dim));
  facts.push_back(print("%zu layer%s", report.layers.size(), report.layers.size() == 1 ? "" : "s"));
  facts.push_back(report.key_stage == "pre_rope" ? "keys before RoPE" : "keys after RoPE");
  std::string html = tag("div", "lexico report", "eyebrow") + tag("h1", html_escape(report.title)) +
                     tag("div", html_escape(join(facts, " \u00b7 ")), "sub");
  html = tag("header", html) + tag("div", html_escape(verdict(report)), "verdict");
  for (const std::string& note : report.notes) html += tag("div", html_escape(note), "note");
  return html + tiles(view) +
         tag("p",
             "Errors are relative: |x \u2212 Dy| / |x|, 0 is perfect and 1 is as bad as storing "
             "nothing. They are "
             "measured before the weights are quantized; bytes are those of the published format, "
             "(fp8 weight, int16 "
             "index) pairs: 3s + 2 a vector.",
             "cap");
}

Style sparsity_style(int index, bool in_domain) {
  return {color(index), "", !in_domain, true, index % 4, !in_domain};
}

std::string per_layer(const View& view) {
  const EvaluationReport& report = view.report;
  std::vector<Panel> panels;
  std::vector<std::pair<Style, std::string>> entries;
  for (const Kind kind : kBothKinds) {
    Panel panel;
    panel.title = title_of(kind);
    panel.description = "Mean relative error of each layer's " + std::string(name_of(kind));
    panel.x.label = "layer";
    panel.x.grid = false;
    panel.y.label = "mean relative error";
    panel.y.from_zero = true;
    for (const int layer : report.layers) panel.x.ticks.emplace_back(layer, std::to_string(layer));
    for (std::size_t i = 0; i < report.sparsities.size(); ++i) {
      const int s = report.sparsities[i];
      for (const bool in_domain : view.domains()) {
        Series series{s_equals(s), sparsity_style(static_cast<int>(i), in_domain), {}};
        for (const int layer : report.layers) {
          const double error =
              mean_error(report, {view.dictionary->name, s, kind, in_domain, {}, layer});
          series.points.push_back({static_cast<double>(layer),
                                   error,
                                   print("layer %d, %s, s = %d\n%s: %s",
                                         layer,
                                         name_of(kind),
                                         s,
                                         domain_name(in_domain),
                                         table_error(error).c_str())});
        }
        panel.series.push_back(series);
        if (kind == Kind::kKeys && in_domain == view.domains().front())
          entries.emplace_back(series.style, s_equals(s));
      }
    }
    panels.push_back(panel);
  }
  share_y(panels);
  add_domains(view, entries);
  const bool many = std::count_if(report.datasets.begin(),
                                  report.datasets.end(),
                                  [](const Dataset& d) { return !d.in_domain; }) > 1;
  return tag("h2", "Error per layer") +
         tag("p",
             std::string(
                 "How well each layer's dictionary reconstructs vectors it was not trained on.") +
                 (view.has_in && view.has_out
                      ? " A dashed line close to its solid one means that the dictionary carries "
                        "over to other kinds of text."
                      : "") +
                 (many ? " Dashed lines are means over the out-of-domain sets." : ""),
             "cap") +
         legend(entries) + charts(panels);
}

std::string against_bytes(const View& view) {
  const EvaluationReport& report = view.report;
  std::vector<Panel> panels;
  std::vector<std::pair<Style, std::string>> entries;
  for (const Kind kind : kBothKinds) {
    Panel panel;
    panel.title = title_of(kind);
    panel.description =
        "Mean relative error of the " + std::string(name_of(kind)) + " against bytes per vector";
    panel.x.label = "bytes per vector (fp16: " + short_number(fp16_bytes(report.dim)) + ")";
    panel.x.log = true;
    panel.y.label = "mean relative error, log scale";
    panel.y.log = true;
    int dictionaries = 0;
    for (const Coder& coder : report.coders) {
      Style style;
      if (coder.role == Coder::Role::kDictionary)
        style = {color(dictionaries++), "", false, true, 0, false, 3.4};
      else if (coder.role == Coder::Role::kSamples)
        style = {"var(--g0)", "", false, true, 1, false};
      else
        style = {"var(--g1)", "", false, true, 2, false};
      for (const bool in_domain : view.domains()) {
        style.dashed = style.hollow = !in_domain;
        Series series{coder.name, style, {}};
        for (const int s : report.sparsities) {
          const double error = mean_error(report, {coder.name, s, kind, in_domain, {}, {}});
          const double bytes = mean_bytes(report, {coder.name, s, kind, in_domain, {}, {}});
          series.points.push_back({bytes,
                                   error,
                                   print("%s, s = %d, %s\n%s %s\n%s bytes, %.1f %% of fp16",
                                         coder.name.c_str(),
                                         s,
                                         domain_name(in_domain),
                                         name_of(kind),
                                         table_error(error).c_str(),
                                         short_number(bytes).c_str(),
                                         100 * bytes / fp16_bytes(report.dim))});
        }
        panel.series.push_back(series);
        if (kind == Kind::kKeys && in_domain == view.domains().front())
          entries.emplace_back(style, coder.name);
      }
    }
    // Where a tolerance varies the bytes, round numbers; otherwise the bytes that there are.
    if (report.relative_tolerance == 0)
      for (const int s : report.sparsities)
        panel.x.ticks.emplace_back(
            published_bytes(s),
            short_number(published_bytes(s)) + " (s=" + std::to_string(s) + ")");
    panels.push_back(panel);
  }
  share_y(panels);
  add_domains(view, entries);
  return tag("h2", "Error against memory") +
         tag("p",
             "Means over layers. Further left is smaller, further down is better. The baselines "
             "are a dictionary of "
             "random directions and one of plain samples, both with as many atoms: training is "
             "worth the distance "
             "between them and the dictionary.",
             "cap") +
         legend(entries) + charts(panels);
}

std::string at_equal_bits(const View& view) {
  const EvaluationReport& report = view.report;
  const std::vector<std::string> coders = rate_coders(report);
  std::vector<Panel> panels;
  std::vector<std::pair<Style, std::string>> entries;
  for (const Kind kind : kBothKinds) {
    Panel panel;
    panel.title = title_of(kind);
    panel.description = "Mean relative error of the " + std::string(name_of(kind)) +
                        " against bits per number, after quantization";
    panel.x.label = "bits per number (fp16: 16)";
    panel.y.label = "mean relative error, log scale";
    panel.y.log = true;
    for (std::size_t i = 0; i < coders.size(); ++i) {
      Style style{color(static_cast<int>(i)), "", false, true, static_cast<int>(i) % 4, false, 3.4};
      for (const bool in_domain : view.domains()) {
        style.dashed = style.hollow = !in_domain;
        Series series{coders[i], style, {}};
        for (const RatePoint& point : rate_line(report, coders[i], kind, in_domain))
          series.points.push_back({static_cast<double>(point.bits) / report.dim,
                                   point.error,
                                   print("%s, %s\n%s %s\n%d bits a vector",
                                         coders[i].c_str(),
                                         domain_name(in_domain),
                                         name_of(kind),
                                         table_error(point.error).c_str(),
                                         point.bits)});
        panel.series.push_back(series);
        if (kind == Kind::kKeys && in_domain == view.domains().front())
          entries.emplace_back(style, coders[i]);
      }
    }
    panels.push_back(panel);
  }
  share_y(panels);
  add_domains(view, entries);
  std::string html =
      tag("h2", "Error at equal bits") +
      tag("p",
          "After quantization: what a decoder gets back from the bits a vector takes, scales and "
          "norms "
          "included (dictionaries and other tables are not counted). Means over layers.",
          "cap") +
      legend(entries) + charts(panels);
  std::string lines;
  for (const std::string& sentence : crossings(report)) lines += tag("li", html_escape(sentence));
  return html + tag("ul", lines);
}

std::string short_text(const char* format, double number) {
  if (!std::isfinite(number)) return "-";
  char text[32];
  std::snprintf(text, sizeof text, format, number);
  return text;
}

std::vector<std::string> different(const std::vector<CacheEffectRow>& rows,
                                   std::string (*name)(const CacheEffectRow&)) {
  std::vector<std::string> names;
  for (const CacheEffectRow& row : rows)
    if (std::find(names.begin(), names.end(), name(row)) == names.end()) names.push_back(name(row));
  return names;
}

int index_of(const std::vector<std::string>& names, const std::string& name) {
  return static_cast<int>(std::find(names.begin(), names.end(), name) - names.begin());
}

std::string dataset_of(const CacheEffectRow& row) { return row.dataset; }
std::string coder_of(const CacheEffectRow& row) { return row.coder; }
std::string split_of(const CacheEffectRow& row) { return row.split; }

std::string effect_tip(const CacheEffectRow& row) {
  return print(
      "%s, %s\n%s\n%s bytes, %.2f %% of fp16\nKL mean %.3g, p99 %.3g\nperplexity %.5g "
      "(full %.5g)",
      row.coder.c_str(),
      rate_text(row).c_str(),
      exact_part(row).c_str(),
      grouped(std::llround(row.bytes)).c_str(),
      100 * row.share(),
      row.mean_kl,
      row.p99_kl,
      row.perplexity,
      row.full_perplexity);
}

void sort_by_x(Series& series) {
  std::sort(series.points.begin(), series.points.end(), [](const Point& a, const Point& b) {
    return a.x < b.x;
  });
}

/// KL against bytes: a colour for each coder, a marker for each choice of what stays exact.
std::string effects_against_bytes(const std::vector<CacheEffectRow>& rows) {
  const std::vector<std::string> coders = different(rows, coder_of);
  const std::vector<std::string> exact = different(rows, exact_part);
  std::vector<Panel> panels;
  std::vector<std::pair<Style, std::string>> entries;
  for (const std::string& dataset : different(rows, dataset_of)) {
    Panel panel;
    panel.title = dataset;
    panel.description = "KL of the next-token distribution against bytes on " + dataset;
    panel.x.label = "bytes, % of the full cache in fp16, log scale";
    panel.x.log = true;
    panel.y.label = "mean KL of the next token, nats, log scale";
    panel.y.log = true;
    for (std::size_t c = 0; c < coders.size(); ++c)
      for (std::size_t e = 0; e < exact.size(); ++e) {
        const int marker = static_cast<int>(exact.size() > 1 ? e : c) % 4;
        Series series{coders[c] + ", " + exact[e],
                      {color(static_cast<int>(c)), "", false, true, marker, e >= 4, 3.4},
                      {}};
        for (const CacheEffectRow& row : rows)
          if (row.dataset == dataset && row.coder == coders[c] && exact_part(row) == exact[e])
            series.points.push_back({100 * row.share(), row.mean_kl, effect_tip(row)});
        if (series.points.empty()) continue;
        sort_by_x(series);
        if (panels.empty())
          entries.emplace_back(series.style, exact.size() > 1 ? series.name : coders[c]);
        panel.series.push_back(series);
      }
    panels.push_back(panel);
  }
  share_y(panels);
  return legend(entries) + charts(panels);
}

/// A sweep at a fixed budget: KL against the window, a line for each split of keys and values.
std::string effects_of_budget(const std::vector<CacheEffectRow>& rows) {
  const std::vector<std::string> splits = different(rows, split_of);
  std::vector<Panel> panels;
  std::vector<std::pair<Style, std::string>> entries;
  for (const std::string& dataset : different(rows, dataset_of)) {
    std::vector<std::string> coders;
    for (const CacheEffectRow& row : rows)
      if (row.by_dictionary && index_of(coders, row.coder) == static_cast<int>(coders.size()))
        coders.push_back(row.coder);
    for (const std::string& coder : coders) {
      Panel panel;
      panel.title = dataset + ", " + coder;
      panel.description = "KL of the next token against the recent window at a fixed budget";
      panel.x.label = "recent window, tokens";
      panel.y.label = "mean KL of the next token, nats, log scale";
      panel.y.log = true;
      for (const std::string& split : splits) {
        Series series{split, {}, {}};
        const int number = index_of(splits, split);
        series.style = {color(number), "", false, true, number % 4, false, 3.4};
        for (const CacheEffectRow& row : rows) {
          if (row.dataset != dataset || row.split != split) continue;
          if (row.by_dictionary && row.coder != coder) continue;
          series.style.dashed = !row.by_dictionary;
          series.points.push_back(
              {static_cast<double>(row.recent_window), row.mean_kl, effect_tip(row)});
        }
        if (series.points.empty()) continue;
        sort_by_x(series);
        if (std::none_of(entries.begin(), entries.end(), [&](const auto& entry) {
              return entry.second == split;
            }))
          entries.emplace_back(series.style, split);
        panel.series.push_back(series);
      }
      panels.push_back(panel);
    }
  }
  share_y(panels);
  return tag("p",
             "At a fixed part of the full cache's bytes: the more tokens stay exact, the fewer "
             "atoms are left for the others; a line is a share of the codes' bytes that keys get.",
             "cap") +
         legend(entries) + charts(panels);
}

std::string effects_table(const std::vector<CacheEffectRow>& rows) {
  std::string body;
  for (const CacheEffectRow& row : rows)
    body +=
        tag("tr",
            tag("td", html_escape(row.dataset)) + tag("td", html_escape(row.coder), "l") +
                tag("td", rate_text(row), "l") + tag("td", html_escape(row.split), "l") +
                tag("td", std::to_string(row.recent_window)) +
                tag("td", std::to_string(row.sink_tokens)) +
                tag("td", row.adaptive_threshold > 0 ? print("%g", row.adaptive_threshold) : "") +
                tag("td", grouped(std::llround(row.bytes))) +
                tag("td", print("%.2f %%", 100 * row.share())) +
                tag("td", short_text("%.5g", row.perplexity)) +
                tag("td", short_text("%.4f", row.perplexity_ratio())) +
                tag("td", short_text("%.3g", row.mean_kl)) +
                tag("td", short_text("%.3g", row.p99_kl))) +
        "\n";
  return tag("details",
             tag("summary",
                 grouped(static_cast<long long>(rows.size())) +
                     " settings (also in cache_effects.csv and report.json)") +
                 "<div class=\"scroll all\"><table "
                 "class=\"sort\"><thead><tr><th>Set</th><th class=\"l\">Coder</th><th "
                 "class=\"l\">Rate</th><th class=\"l\">Split</th><th>Window</th><th>Sinks</th>"
                 "<th>Adaptive</th><th>Bytes</th><th>Of fp16</th><th>Perplexity</th><th>Ratio</th>"
                 "<th>Mean KL</th><th>p99 KL</th></tr></thead>" +
                 tag("tbody", body) + "</table></div>");
}

std::string effect_on_the_model(const View& view) {
  std::vector<CacheEffectRow> listed, swept;
  for (const CacheEffectRow& row : view.report.cache_effects)
    (row.split.empty() ? listed : swept).push_back(row);
  const CacheEffectRow& first = view.report.cache_effects.front();
  std::string html =
      tag("h2", "What it does to the model") +
      tag("p",
          print(
              "Teacher-forced, read %d tokens at a time with the cache compressed but for the "
              "recent window and the sinks: how far the distribution of the next token moves from "
              "that with the full cache. Bytes are those the caches take at the end of the "
              "sequences, exact tokens included; dictionaries are not counted.",
              first.chunk),
          "cap");
  if (!listed.empty()) html += effects_against_bytes(listed);
  if (!swept.empty()) html += effects_of_budget(swept);
  std::string lines;
  for (const std::string& sentence : effect_sentences(view.report))
    lines += tag("li", html_escape(sentence));
  return html + tag("ul", lines) + effects_table(view.report.cache_effects);
}

std::string side_by_side(const View& view) {
  const EvaluationReport& report = view.report;
  std::vector<Panel> panels;
  std::vector<std::pair<Style, std::string>> entries;
  for (const Kind kind : kBothKinds) {
    Panel panel;
    panel.title = title_of(kind);
    panel.description =
        "Mean relative error of the " + std::string(name_of(kind)) + " on each data set";
    panel.x.label = "mean relative error";
    panel.x.from_zero = true;
    panel.height = 84 + 30 * std::max(2, static_cast<int>(report.datasets.size()));
    panel.y.low = -static_cast<double>(report.datasets.size()) + 0.5;
    panel.y.high = 0.5;
    for (std::size_t d = 0; d < report.datasets.size(); ++d) {
      const Dataset& dataset = report.datasets[d];
      const std::string& name = dataset.name;
      panel.y.ticks.emplace_back(-static_cast<double>(d),
                                 (columns(name) > 22 ? name.substr(0, 20) + ".." : name) +
                                     (dataset.in_domain ? "" : " *"));
    }
    for (std::size_t i = 0; i < report.sparsities.size(); ++i) {
      const int s = report.sparsities[i];
      Style style = sparsity_style(static_cast<int>(i), true);
      style.line = false;
      style.size = 5;
      Series series{s_equals(s), style, {}};
      for (std::size_t d = 0; d < report.datasets.size(); ++d) {
        const Dataset& dataset = report.datasets[d];
        const double error =
            mean_error(report, {view.dictionary->name, s, kind, {}, dataset.name, {}});
        const double in = mean_error(report, {view.dictionary->name, s, kind, true, {}, {}});
        series.points.push_back(
            {error,
             -static_cast<double>(d),
             print("%s (%s), s = %d\n%s %s",
                   dataset.name.c_str(),
                   domain_name(dataset.in_domain),
                   s,
                   name_of(kind),
                   table_error(error).c_str()) +
                 (dataset.in_domain || !std::isfinite(in)
                      ? ""
                      : print("\n%.2f\u00d7 the in-domain error", error / in))});
      }
      panel.series.push_back(series);
      if (kind == Kind::kKeys) entries.emplace_back(style, s_equals(s));
    }
    panels.push_back(panel);
  }
  const auto range = range_of(panels, false);
  if (range)
    for (Panel& panel : panels) {
      Series extent{"", {"none", "none", false, false, -1, false, 0}, {{range->second, 0, ""}}};
      panel.series.push_back(extent);
    }
  return tag("h2", "Domains side by side") +
         tag("p",
             std::string("Means over layers for each data set.") +
                 (view.has_out ? " * out of domain." : ""),
             "cap") +
         legend(entries) + charts(panels);
}

/// One table per sparsity: layers down, data sets across, keys and values apart; darker cells have
/// larger errors.
std::string layer_tables(const View& view) {
  const EvaluationReport& report = view.report;
  const bool has_ratio = view.has_in && view.has_out;
  std::string buttons, tabs;
  std::vector<const Coder*> dictionaries;
  for (const Coder& coder : report.coders)
    if (coder.role == Coder::Role::kDictionary) dictionaries.push_back(&coder);
  for (const Coder* dictionary : dictionaries) {
    for (const int s : report.sparsities) {
      double worst = 0;
      for (const Row& row : report.rows)
        if (row.coder == dictionary->name && row.sparsity == s && std::isfinite(row.mean))
          worst = std::max(worst, row.mean);

      const std::size_t span = report.datasets.size() + (has_ratio ? 1 : 0);
      std::string head = tag("th", ""), names = tag("th", "Layer");
      for (const Kind kind : kBothKinds) {
        head += print("<th class=\"l edge\" colspan=\"%zu\">%s</th>", span, title_of(kind).c_str());
        for (std::size_t d = 0; d < report.datasets.size(); ++d)
          names +=
              tag("th",
                  html_escape(report.datasets[d].name + (report.datasets[d].in_domain ? "" : " *")),
                  d == 0 ? "edge" : "");
        if (has_ratio) names += tag("th", "out/in");
      }
      std::string body;
      const auto add = [&](const std::string& name,
                           const Coder& coder,
                           std::optional<int> layer,
                           const char* css) {
        std::string cells = tag("th", html_escape(name));
        for (const Kind kind : kBothKinds) {
          for (std::size_t d = 0; d < report.datasets.size(); ++d) {
            const Dataset& dataset = report.datasets[d];
            const double error = mean_error(report, {coder.name, s, kind, {}, dataset.name, layer});
            std::string tip;
            if (layer) {
              if (const Row* row = find_row(report, dataset.name, *layer, kind, coder.name, s))
                tip = print(" title=\"median %s, 99 %% below %s, %s vectors\"",
                            table_error(row->median).c_str(),
                            table_error(row->p99).c_str(),
                            grouped(row->vectors).c_str());
            }
            cells += print("<td class=\"h%s\" style=\"--v:%.2f\"%s>",
                           d == 0 ? " edge" : "",
                           layer && std::isfinite(error) && worst > 0 ? error / worst : 0.0,
                           tip.c_str()) +
                     table_error(error) + "</td>";
          }
          if (has_ratio) {
            const double ratio = out_over_in(report, coder.name, s, kind, layer);
            cells += tag("td", std::isfinite(ratio) ? print("%.2f\u00d7", ratio) : "-");
          }
        }
        body += tag("tr", cells, css);
      };
      for (const int layer : report.layers) add(std::to_string(layer), *dictionary, layer, "");
      add("Mean", *dictionary, {}, "mean");
      for (const Coder& coder : report.coders)
        if (coder.role != Coder::Role::kDictionary) add(coder.name, coder, {}, "base");

      const double bytes = mean_bytes(report, {dictionary->name, s, {}, {}, {}, {}});
      std::string label = s_equals(s);
      if (dictionaries.size() > 1) label = dictionary->name + ", " + label;
      const bool first = dictionary == dictionaries.front() && s == headline_sparsity(report);
      buttons += std::string("<button type=\"button\"") + (first ? " data-first" : "") + ">" +
                 html_escape(label) + "</button>";
      tabs +=
          tag("div",
              tag("h3",
                  html_escape(label) + tag("span",
                                           print(" \u00b7 %s bytes a vector, %.1f %% of fp16",
                                                 short_number(bytes).c_str(),
                                                 100 * bytes / fp16_bytes(report.dim)),
                                           "sub")) +
                  tag("div",
                      tag("table",
                          tag("thead", tag("tr", head) + tag("tr", names)) + tag("tbody", body)),
                      "scroll"),
              "tab");
    }
  }
  return tag("h2", "Layer by layer") +
         tag("p",
             std::string("Mean relative error; median and 99th percentile are in each cell's "
                         "tooltip and in the full table below.") +
                 (view.has_out ? " * out of domain." : ""),
             "cap") +
         tag("div", tag("div", buttons, "tabs") + tabs);
}

/// At most `most` points, evenly spread, the last one included.
template <typename T>
std::vector<T> thinned(const std::vector<T>& points, std::size_t most) {
  if (points.size() <= most) return points;
  std::vector<T> kept;
  for (std::size_t i = 0; i < most; ++i)
    kept.push_back(points[i * (points.size() - 1) / (most - 1)]);
  return kept;
}

std::string training_part(const EvaluationReport& report) {
  const Training& training = *report.training;
  struct Measure {
    const char* name;
    double TrainingPoint::*field;
    bool log;
  };
  static constexpr Measure kMeasures[] = {
      {"relative error, log scale", &TrainingPoint::relative_error, true},
      {"loss, log scale", &TrainingPoint::loss, true},
      {"learning rate", &TrainingPoint::learning_rate, false}};
  std::vector<int> layers;
  for (const TrainingSeries& series : training.series) layers.push_back(series.layer);
  std::sort(layers.begin(), layers.end());
  layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
  // Points with a tooltip, per line: they are most of the page's size.
  const std::size_t most =
      std::max<std::size_t>(12, 800 / std::max<std::size_t>(1, training.series.size()));

  std::string html = tag("h2", "Training");
  std::int64_t seen = 0;
  for (const TrainingSeries& series : training.series)
    for (const TrainingPoint& point : series.points) seen = std::max(seen, point.vectors);
  html += tag("p",
              html_escape(print("Recipe %s: %s vectors per dictionary in %.0f s. One line per "
                                "layer; the errors are of the "
                                "batches as they were trained on.",
                                training.recipe.c_str(),
                                grouped(seen).c_str(),
                                training.seconds)),
              "cap");
  std::string light = "linear-gradient(90deg", dark = light;
  for (int i = 0; i < 10; ++i) {
    const auto [on_light, on_dark] = ramp_color(i, 10);
    light += "," + on_light, dark += "," + on_dark;
  }
  if (layers.size() > 1)
    html += tag("div",
                print("<span class=\"is\">layer %d</span><span class=\"ramp\" "
                      "style=\"background:%s)\"></span><span "
                      "class=\"ramp on-dark\" style=\"background:%s)\"></span><span "
                      "class=\"is\">layer %d</span>",
                      layers.front(),
                      light.c_str(),
                      dark.c_str(),
                      layers.back()),
                "legend");
  std::vector<Panel> all;
  for (const Measure& measure : kMeasures) {
    std::vector<Panel> panels;
    for (const Kind kind : kBothKinds) {
      Panel panel;
      panel.title = title_of(kind);
      panel.description = std::string(measure.name) + " while training on " + name_of(kind);
      panel.height = 260;
      panel.x.label = "vectors seen";
      panel.x.grid = false;
      panel.y.label = measure.name;
      panel.y.log = measure.log;
      panel.y.from_zero = !measure.log;
      for (const TrainingSeries& series : training.series) {
        if (series.kind != kind ||
            (measure.field == &TrainingPoint::learning_rate && series.layer != layers.front()))
          continue;  // one schedule for all
        const auto place =
            std::lower_bound(layers.begin(), layers.end(), series.layer) - layers.begin();
        const auto [on_light, on_dark] =
            ramp_color(static_cast<int>(place), static_cast<int>(layers.size()));
        Series line{std::to_string(series.layer), {on_light, on_dark, false, true, -1, false}, {}};
        const std::vector<TrainingPoint> points = thinned(series.points, 250);
        const std::size_t tip_every = points.size() / most + 1;
        for (std::size_t i = 0; i < points.size(); ++i) {
          const TrainingPoint& point = points[i];
          line.points.push_back({static_cast<double>(point.vectors), point.*measure.field, ""});
          if (i % tip_every == 0)
            line.points.back().tip =
                print("layer %d %s, %s vectors\nrelative error %s\nloss %.4g\nlearning rate %.3g",
                      series.layer,
                      name_of(kind),
                      grouped(point.vectors).c_str(),
                      table_error(point.relative_error).c_str(),
                      point.loss,
                      point.learning_rate);
        }
        panel.series.push_back(line);
      }
      if (!panel.series.empty()) panels.push_back(panel);
    }
    if (measure.field == &TrainingPoint::learning_rate) {
      if (panels.size() > 1) panels.resize(1);
      if (!panels.empty()) panels.front().title = "Schedule";
    } else if (measure.field == &TrainingPoint::relative_error) {
      share_y(panels);
    }
    all.insert(all.end(), panels.begin(), panels.end());
  }
  html += charts(all);

  std::string keys, values, head = tag("th", "Layer");
  const bool known =
      std::any_of(training.series.begin(), training.series.end(), [](const TrainingSeries& series) {
        return series.unused_atoms >= 0;
      });
  if (known) {
    for (const int layer : layers) head += tag("th", std::to_string(layer));
    std::string body;
    for (const Kind kind : kBothKinds) {
      std::string cells = tag("th", title_of(kind));
      for (const int layer : layers) {
        std::string cell = "-";
        for (const TrainingSeries& series : training.series)
          if (series.layer == layer && series.kind == kind && series.unused_atoms >= 0)
            cell = grouped(series.unused_atoms);
        cells += tag("td", cell);
      }
      body += tag("tr", cells);
    }
    html += tag("h3", "Atoms that no vector used at the end") +
            tag("div", tag("table", tag("thead", tag("tr", head)) + tag("tbody", body)), "scroll");
  }
  if (!training.config.empty())
    html +=
        tag("details",
            tag("summary", "Resolved configuration") + tag("pre", html_escape(training.config)));
  return html;
}

std::string data_table(const EvaluationReport& report) {
  if (report.datasets.empty()) return "";
  std::string body;
  for (const Dataset& dataset : report.datasets)
    body +=
        tag("tr",
            tag("th", html_escape(dataset.name)) + tag("td", domain_name(dataset.in_domain), "l") +
                tag("td", grouped(dataset.tokens)) + tag("td", grouped(dataset.vectors)) +
                tag("td", grouped(dataset.not_finite)) +
                tag("td", html_escape(dataset.sampling), "l wrap") +
                tag("td", html_escape(dataset.path), "l wrap"));
  return tag("h2", "Data") +
         tag("div",
             tag("table",
                 "<thead><tr><th>Set</th><th class=\"l\">Domain</th><th>Tokens</th><th>Vectors per "
                 "layer and "
                 "kind</th><th>NaN or Inf</th><th class=\"l\">Sampling</th><th "
                 "class=\"l\">From</th></tr></thead>" +
                     tag("tbody", body)),
             "scroll");
}

std::string all_rows(const EvaluationReport& report) {
  if (report.rows.empty()) return "";
  std::string body;
  for (const Row& row : report.rows) {
    const double bytes = published_bytes(row.mean_atoms);
    body += "<tr><td>" + html_escape(row.dataset) + "</td><td class=\"l\">" + name_of(row.kind) +
            "</td><td>" + std::to_string(row.layer) + "</td><td class=\"l\">" +
            html_escape(row.coder) + "</td><td>" + std::to_string(row.sparsity) + "</td><td>" +
            table_error(row.mean) + "</td><td>" + table_error(row.median) + "</td><td>" +
            table_error(row.p99) + "</td><td>" + short_number(bytes) + "</td><td>" +
            grouped(row.vectors) + "</td></tr>\n";
  }
  return tag("h2", "All measurements") +
         tag("details",
             tag("summary",
                 grouped(static_cast<long long>(report.rows.size())) +
                     " rows (also in report.csv and report.json)") +
                 "<input id=\"filter\" type=\"search\" placeholder=\"Filter, as: keys samples\" "
                 "aria-label=\"Filter rows\">"
                 "<div class=\"scroll all\"><table id=\"all\" "
                 "class=\"sort\"><thead><tr><th>Set</th><th class=\"l\">Kind</th>"
                 "<th>Layer</th><th "
                 "class=\"l\">Coder</th><th>s</th><th>Mean</th><th>Median</th><th>p99</"
                 "th><th>Bytes</th>"
                 "<th>Vectors</th></tr></thead>" +
                 tag("tbody", body) + "</table></div>");
}

std::string provenance(const View& view) {
  const EvaluationReport& report = view.report;
  std::string body;
  const auto add = [&](const std::string& key, const std::string& value) {
    if (value.empty()) return;
    const auto lines = 1 + std::count(value.begin(), value.end(), '\n');
    const std::string text = lines == 1 ? html_escape(value)
                                        : tag("details",
                                              tag("summary", std::to_string(lines) + " lines") +
                                                  tag("pre", html_escape(value)));
    body += tag("tr", tag("th", html_escape(key)) + tag("td", text, "l wrap"));
  };
  add("Program", report.version);
  add("Created", report.created);
  add("Model", report.model);
  add("Selection", report.selection);
  if (report.relative_tolerance > 0)
    add("Tolerance", print("stop once |r| <= %g |x|", report.relative_tolerance));
  for (const auto& [key, value] : report.settings) add(key, value);
  for (const Coder& coder : report.coders) {
    if (coder.role != Coder::Role::kDictionary) continue;
    add("Dictionary", coder.path.empty() ? coder.name : coder.path);
    for (const auto& [key, value] : coder.metadata) add("\u2003" + key, value);
  }
  return tag("h2", "Provenance") + tag("div", tag("table", tag("tbody", body), "facts"), "scroll") +
         (report.command.empty() ? ""
                                 : tag("h3", "Command") + tag("pre", html_escape(report.command)));
}

/// Paths may hold any bytes; a page must be UTF-8 without control characters.
std::string clean_utf8(const std::string& text) {
  std::string clean;
  for (std::size_t i = 0; i < text.size();) {
    const auto first = static_cast<unsigned char>(text[i]);
    const std::size_t length = first < 0x80 ? 1 : first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
    bool valid = (first < 0x80 && (first >= 0x20 || first == '\n' || first == '\t')) ||
                 (first >= 0xC2 && first <= 0xF4);
    for (std::size_t k = 1; valid && k < length; ++k)
      valid = i + k < text.size() && (static_cast<unsigned char>(text[i + k]) & 0xC0) == 0x80;
    if (valid && length == 3) {  // overlong forms and surrogates
      const auto second = static_cast<unsigned char>(text[i + 1]);
      valid = !(first == 0xE0 && second < 0xA0) && !(first == 0xED && second >= 0xA0);
    } else if (valid && length == 4) {
      const auto second = static_cast<unsigned char>(text[i + 1]);
      valid = !(first == 0xF0 && second < 0x90) && !(first == 0xF4 && second >= 0x90);
    }
    clean += valid ? text.substr(i, length) : "\uFFFD";
    i += valid ? length : 1;
  }
  return clean;
}

}  // namespace

std::string to_html(const EvaluationReport& report) {
  const View view(report);
  std::string body = header(view);
  if (view.has_rows()) body += per_layer(view) + against_bytes(view) + side_by_side(view);
  if (!report.rates.empty()) body += at_equal_bits(view);
  if (!report.cache_effects.empty()) body += effect_on_the_model(view);
  if (view.has_rows()) body += layer_tables(view);
  if (report.training) body += training_part(report);
  body += data_table(report) + all_rows(report) + provenance(view);
  body += tag(
      "footer",
      "This page is complete in itself: it loads nothing and can be mailed, archived and printed.");
  return clean_utf8(
      std::string("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
                  "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
                  "<meta name=\"generator\" content=\"lexico\"><title>") +
      html_escape(report.title) + "</title><style>" + kStyle + "</style></head>\n<body><main>" +
      body + "</main><script>" + kScript + "</script></body></html>\n");
}

}  // namespace lexico::report
