// The table that ends a run on the terminal.
#include <algorithm>
#include <cmath>

#include "common/report/report.h"
#include "common/report/text.h"
#include "lexico/evaluation.h"

namespace lexico::report {
namespace {

constexpr std::size_t kMaxWidth = 110;  // beyond it values go below the keys, not beside them

/// Cells that become aligned columns: the first is left-aligned.
struct Table {
  std::vector<std::vector<std::string>> lines;

  std::vector<std::size_t> widths() const {
    std::vector<std::size_t> widths;
    for (const auto& line : lines) {
      widths.resize(std::max(widths.size(), line.size()));
      for (std::size_t i = 0; i < line.size(); ++i)
        widths[i] = std::max(widths[i], columns(line[i]));
    }
    return widths;
  }
  std::size_t width() const {
    std::size_t sum = 0;
    for (const std::size_t width : widths()) sum += width + 2;
    return sum;
  }
  std::string text_of(std::size_t line) const {
    const std::vector<std::size_t> all = widths();
    std::string text = "  ";
    for (std::size_t i = 0; i < lines[line].size(); ++i)
      text += i == 0 ? pad_right(lines[line][i], all[i]) : "  " + pad_left(lines[line][i], all[i]);
    return text;
  }
};

/// Layers down, datasets across, one kind; baselines below the mean.
Table layer_table(const EvaluationReport& report,
                  const Coder& dictionary,
                  Kind kind,
                  int sparsity,
                  bool has_ratio) {
  Table table;
  std::vector<std::string> head{"layer"};
  for (const Dataset& dataset : report.datasets)
    head.push_back(dataset.name + (dataset.in_domain ? "" : "*"));
  if (has_ratio) head.push_back("out/in");
  table.lines.push_back(head);

  const auto add = [&](const std::string& name, const Coder& coder, std::optional<int> layer) {
    std::vector<std::string> line{name};
    for (const Dataset& dataset : report.datasets)
      line.push_back(
          table_error(mean_error(report, {coder.name, sparsity, kind, {}, dataset.name, layer})));
    if (has_ratio)
      line.push_back(ratio_text(out_over_in(report, coder.name, sparsity, kind, layer)));
    table.lines.push_back(line);
  };
  for (const int layer : report.layers) add(std::to_string(layer), dictionary, layer);
  add("mean", dictionary, {});
  for (const Coder& coder : report.coders)
    if (coder.role != Coder::Role::kDictionary) add(coder.name, coder, {});
  return table;
}

std::string side_by_side(const Table& keys, const Table& values) {
  const std::size_t left = keys.width();
  std::string text = "  " + pad_right("keys", left - 2) + "     values\n";
  for (std::size_t i = 0; i < keys.lines.size(); ++i)
    text += pad_right(keys.text_of(i), left) + "   " + values.text_of(i) + "\n";
  return text;
}

std::string stacked(const Table& keys, const Table& values) {
  std::string text;
  for (const Table* table : {&keys, &values}) {
    text += table == &keys ? "  keys\n" : "  values\n";
    for (std::size_t i = 0; i < table->lines.size(); ++i) text += table->text_of(i) + "\n";
  }
  return text;
}

/// One line per coder and sparsity: what it costs and what it gives.
Table summary_table(const EvaluationReport& report, bool has_in, bool has_out) {
  Table table;
  std::vector<std::string> head{"", "s", "bytes", "of fp16"};
  for (const Kind kind : kBothKinds) {
    const std::string name = name_of(kind);
    if (has_in) head.push_back(name + " in");
    if (has_out) head.push_back(name + " out");
    if (has_in && has_out) head.push_back("out/in");
  }
  table.lines.push_back(head);
  for (const Coder& coder : report.coders) {
    for (const int s : report.sparsities) {
      const double bytes = mean_bytes(report, {coder.name, s, {}, {}, {}, {}});
      std::vector<std::string> line{coder.name,
                                    std::to_string(s),
                                    short_number(bytes),
                                    print("%.1f %%", 100 * bytes / fp16_bytes(report.dim))};
      for (const Kind kind : kBothKinds) {
        if (has_in)
          line.push_back(table_error(mean_error(report, {coder.name, s, kind, true, {}, {}})));
        if (has_out)
          line.push_back(table_error(mean_error(report, {coder.name, s, kind, false, {}, {}})));
        if (has_in && has_out) line.push_back(ratio_text(out_over_in(report, coder.name, s, kind)));
      }
      table.lines.push_back(line);
    }
  }
  return table;
}

/// Kilobytes and the like are left to people: whole bytes compare.
std::string effects_text(const EvaluationReport& report) {
  const auto with = [&](auto&& has) {
    return std::any_of(report.cache_effects.begin(), report.cache_effects.end(), has);
  };
  const bool sinks = with([](const CacheEffectRow& row) { return row.sink_tokens > 0; });
  const bool adaptive = with([](const CacheEffectRow& row) { return row.adaptive_threshold > 0; });
  const bool split = with([](const CacheEffectRow& row) { return !row.split.empty(); });
  Table table;
  std::vector<std::string> head{"set", "coder", "rate"};
  if (split) head.push_back("split");
  head.push_back("window");
  if (sinks) head.push_back("sinks");
  if (adaptive) head.push_back("adaptive");
  for (const char* name : {"bytes", "of fp16", "perplexity", "ratio", "mean KL", "p99 KL"})
    head.push_back(name);
  table.lines.push_back(head);
  for (const CacheEffectRow& row : report.cache_effects) {
    std::vector<std::string> line{row.dataset, row.coder, rate_text(row)};
    if (split) line.push_back(row.split);
    line.push_back(std::to_string(row.recent_window));
    if (sinks) line.push_back(std::to_string(row.sink_tokens));
    if (adaptive)
      line.push_back(row.adaptive_threshold > 0 ? print("%g", row.adaptive_threshold) : "-");
    line.push_back(grouped(std::llround(row.bytes)));
    line.push_back(print("%.2f %%", 100 * row.share()));
    line.push_back(print("%.5g", row.perplexity));
    line.push_back(print("%.4fx", row.perplexity_ratio()));
    line.push_back(print("%.3g", row.mean_kl));
    line.push_back(print("%.3g", row.p99_kl));
    table.lines.push_back(line);
  }
  std::string text = print(
      "\nThe model with a compressed cache: full perplexity %.5g%s; KL of the next token in nats; "
      "bytes of all sequences at their ends\n",
      report.cache_effects.front().full_perplexity,
      report.datasets.size() > 1 ? " on the first set" : "");
  for (std::size_t i = 0; i < table.lines.size(); ++i) text += table.text_of(i) + "\n";
  for (const std::string& sentence : effect_sentences(report)) text += "  " + sentence + "\n";
  return text;
}

}  // namespace

std::string console_table(const EvaluationReport& report) {
  bool has_in = false, has_out = false;
  for (const Dataset& dataset : report.datasets) (dataset.in_domain ? has_in : has_out) = true;

  std::string text = report.title + "\n";
  text += "Relative error |x - D y| / |x|, mean over vectors, before the weights are quantized.\n";
  for (const Coder& coder : report.coders) {
    if (coder.role != Coder::Role::kDictionary) continue;
    for (const int s : report.sparsities) {
      const double bytes = mean_bytes(report, {coder.name, s, {}, {}, {}, {}});
      text += print("\n%s, N = %d, s = %d: %s bytes a vector, %.1f %% of fp16\n",
                    coder.name.c_str(),
                    coder.num_atoms,
                    s,
                    short_number(bytes).c_str(),
                    100 * bytes / fp16_bytes(report.dim));
      const Table keys = layer_table(report, coder, Kind::kKeys, s, has_in && has_out);
      const Table values = layer_table(report, coder, Kind::kValues, s, has_in && has_out);
      text += keys.width() + values.width() + 3 <= kMaxWidth ? side_by_side(keys, values)
                                                             : stacked(keys, values);
    }
  }
  if (has_out) text += "  * out of domain\n";

  text += "\nMeans over layers\n";
  const Table summary = summary_table(report, has_in, has_out);
  for (std::size_t i = 0; i < summary.lines.size(); ++i) text += summary.text_of(i) + "\n";
  if (!report.rates.empty()) {
    text += "\nAt equal bits, after quantization: mean relative error, means over layers" +
            std::string(has_in ? ", in domain" : "") + "\n";
    for (const Kind kind : kBothKinds)
      for (const std::string& coder : rate_coders(report)) {
        const std::vector<RatePoint> line = rate_line(report, coder, kind, has_in);
        if (line.empty()) continue;
        std::vector<std::string> points;
        for (const RatePoint& point : line)
          points.push_back(table_error(point.error) + " at " + std::to_string(point.bits));
        text += "  " + pad_right(name_of(kind), 7) + pad_right(coder, 26) + join(points, ", ") +
                " bits\n";
      }
    for (const std::string& sentence : crossings(report)) text += "  " + sentence + "\n";
  }
  if (!report.cache_effects.empty()) text += effects_text(report);
  for (const std::string& note : report.notes) text += "\nNote: " + note;
  text += (report.notes.empty() ? "\n" : "\n\n") + verdict(report) + "\n";
  return text;
}

}  // namespace lexico::report
