// The report writers, on a report made up here. The page can be looked at:
//   test_apps_eval_report, then open <build>/tests/report_example/report.html
#include "common/report/report.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <sstream>

#include "common/report/chart.h"
#include "common/report/text.h"
#include "lexico/error.h"

namespace lexico::report {
namespace {

EvaluationReport example() {
  EvaluationReport report;
  report.title = "Evaluation of runs/wikillama <demo> & co";
  report.command =
      "lexico-eval runs/wikillama --data wikitext=wikitext-test.h5 --ood code=code.h5 \"a b.txt\"";
  report.version = "lexico 0.1.0";
  report.created = "2025-01-31 12:00:00 UTC";
  report.model = "wikillama-5m";
  report.dim = 64;
  report.layers = {0, 1, 2, 3, 4, 5};
  report.sparsities = {4, 8, 16};
  report.coders = {{"dictionary",
                    Coder::Role::kDictionary,
                    1024,
                    "runs/wikillama/dictionary.safetensors",
                    {{"recipe", "sgd"}, {"model_sha256", "0123456789abcdef"}}},
                   {"samples", Coder::Role::kSamples, 1024, "", {}},
                   {"random", Coder::Role::kRandom, 1024, "", {}}};
  report.datasets = {
      {"wikitext", "wikitext-test.h5", true, 280000, 65536, 0, "32,768 tokens, evenly spread"},
      {"code", "code.h5", false, 50000, 65536, 3, "32,768 tokens, evenly spread"},
      {"german", "german.txt", false, 30000, 60000, 0, "all"}};
  const std::map<std::string, double> domain{{"wikitext", 1.0}, {"code", 1.14}, {"german", 1.06}};
  const std::map<std::string, double> coder{
      {"dictionary", 1.0}, {"samples", 1.45}, {"random", 2.4}};
  for (const Dataset& dataset : report.datasets)
    for (const Coder& c : report.coders)
      for (const int layer : report.layers)
        for (const Kind kind : kBothKinds)
          for (const int s : report.sparsities) {
            const double shape =
                kind == Kind::kKeys ? 0.2 + 0.03 * std::sin(layer) : 0.08 + 0.02 * layer;
            const double mean = std::min(
                0.97, shape * std::pow(8.0 / s, 0.8) * domain.at(dataset.name) * coder.at(c.name));
            report.rows.push_back({dataset.name,
                                   layer,
                                   kind,
                                   c.name,
                                   s,
                                   mean,
                                   mean * 0.97,
                                   mean * 1.9,
                                   static_cast<double>(s),
                                   dataset.vectors});
          }
  report.notes = {"code: 3 vectors hold NaN or Inf and were left out"};
  report.settings = {{"threads", "2"}, {"seed", "1"}};
  return report;
}

EvaluationReport training_example() {
  EvaluationReport report = example();
  report.title = "Training of wikillama-5m";
  report.sparsities = {8};
  report.datasets.resize(1);
  report.datasets[0].name = "held-out";
  report.coders.resize(1);
  std::erase_if(report.rows, [](const Row& row) {
    return row.sparsity != 8 || row.coder != "dictionary" || row.dataset != "wikitext";
  });
  for (Row& row : report.rows) row.dataset = "held-out";
  Training training{"sgd", "recipe: sgd\nnum_atoms: 1024\n# <comment>\n", 812.5, {}};
  for (const int layer : report.layers)
    for (const Kind kind : kBothKinds) {
      TrainingSeries series{layer, kind, {}, layer == 2 ? 3 : 0};
      for (int step = 1; step <= 1200; ++step) {
        const double progress = step / 1200.0;
        const double error =
            (kind == Kind::kKeys ? 0.2 : 0.1) * (1 + 0.05 * layer + std::exp(-9 * progress));
        series.points.push_back({step * 1024,
                                 error * error * 12,
                                 error,
                                 0.02 * 0.5 * (1 + std::cos(3.14159 * progress))});
      }
      training.series.push_back(series);
    }
  report.training = training;
  return report;
}

/// Two windows of a dictionary and a rival at equal bytes; with `budget` a sweep in their place.
EvaluationReport with_effects(bool budget) {
  EvaluationReport report = example();
  for (const std::string dataset : {"wikitext", "code"})
    for (const bool by_dictionary : {true, false})
      for (const int window : {8, 32})
        for (const int atoms : {4, 8}) {
          CacheEffectRow row;
          row.dataset = dataset;
          row.coder = by_dictionary ? "dictionary, fp8-int16" : "rotation + Lloyd-Max";
          row.by_dictionary = by_dictionary;
          if (budget)
            row.split = by_dictionary ? (atoms == 4 ? "keys 1/4" : "keys 3/4") : row.coder;
          row.key_bits = 18 * atoms;
          row.value_bits = by_dictionary && budget ? 18 * (12 - atoms) : 18 * atoms;
          row.key_atoms = by_dictionary ? atoms : 0;
          row.value_atoms = by_dictionary ? (budget ? 12 - atoms : atoms) : 0;
          row.recent_window = window;
          row.sink_tokens = budget ? 0 : 4;
          row.chunk = 8;
          row.bytes = budget ? 199000 : 1000.0 * (atoms + window);
          row.full_bytes = 1e6;
          row.tokens = 511;
          row.full_perplexity = 20;
          row.mean_kl = 0.09 / atoms / window * (by_dictionary ? 1 : 4);
          row.p99_kl = 20 * row.mean_kl;
          row.perplexity = 20 * (1 + row.mean_kl);
          report.cache_effects.push_back(row);
        }
  return report;
}

/// RFC 4180, for what follows the header line.
std::vector<std::vector<std::string>> parse_csv(const std::string& text) {
  std::vector<std::vector<std::string>> lines(1, std::vector<std::string>(1));
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '"' && i + 1 < text.size() && text[i + 1] == '"')
        lines.back().back() += text[++i];
      else if (c == '"')
        quoted = false;
      else
        lines.back().back() += c;
    } else if (c == '"') {
      quoted = true;
    } else if (c == ',') {
      lines.back().emplace_back();
    } else if (c == '\n') {
      lines.emplace_back(1);
    } else {
      lines.back().back() += c;
    }
  }
  lines.pop_back();
  return lines;
}

/// Every tag closes the one that it should; void elements and the raw text of style and script
/// aside.
std::string unbalanced(std::string html) {
  html = std::regex_replace(html, std::regex("<(style|script)>[^]*?</\\1>"), "");
  static const std::set<std::string> kVoid{"meta", "input", "br", "!DOCTYPE"};
  std::vector<std::string> open;
  for (std::size_t at = html.find('<'); at != std::string::npos; at = html.find('<', at + 1)) {
    const std::size_t end = html.find('>', at);
    if (end == std::string::npos) return "unclosed tag " + html.substr(at, 40);
    const bool closes = html[at + 1] == '/';
    std::string name;
    for (std::size_t i = at + 1 + closes;
         i < end && (std::isalnum(static_cast<unsigned char>(html[i])) || html[i] == '!');
         ++i)
      name += html[i];
    if (name.empty()) return "stray < in " + html.substr(at, 40);
    if (kVoid.contains(name) || html[end - 1] == '/') continue;
    if (!closes)
      open.push_back(name);
    else if (open.empty() || open.back() != name)
      return "unexpected </" + name + "> before " + html.substr(end, 60);
    else
      open.pop_back();
  }
  return open.empty() ? "" : "unclosed <" + open.back() + ">";
}

TEST(Report, MeansAreTakenOverLayersAndNarrowedDown) {
  EvaluationReport report = example();
  report.rows = {{"wikitext", 0, Kind::kKeys, "dictionary", 8, 0.1, 0, 0, 8, 5},
                 {"wikitext", 1, Kind::kKeys, "dictionary", 8, 0.3, 0, 0, 6, 5},
                 {"code", 0, Kind::kKeys, "dictionary", 8, 0.4, 0, 0, 8, 5},
                 {"code", 1, Kind::kKeys, "dictionary", 8, std::nan(""), 0, 0, std::nan(""), 0}};
  EXPECT_DOUBLE_EQ(mean_error(report, {"dictionary", 8, Kind::kKeys, true, {}, {}}), 0.2);
  EXPECT_DOUBLE_EQ(mean_error(report, {"dictionary", 8, Kind::kKeys, false, {}, {}}),
                   0.4);  // no vectors: not counted
  EXPECT_DOUBLE_EQ(mean_error(report, {"dictionary", 8, {}, {}, {}, 1}), 0.3);
  EXPECT_DOUBLE_EQ(out_over_in(report, "dictionary", 8), 2.0);
  EXPECT_DOUBLE_EQ(mean_bytes(report, {"dictionary", 8, {}, true, {}, {}}), 3 * 7 + 2);
  EXPECT_TRUE(std::isnan(mean_error(report, {"dictionary", 8, Kind::kValues, {}, {}, {}})));
}

TEST(Report, VerdictNamesErrorsRatioAndBytes) {
  const std::string line = verdict(example());
  EXPECT_NE(line.find("s=8"), std::string::npos) << line;
  EXPECT_NE(line.find("out of domain 1.10x (worst: code 1.14x)"), std::string::npos) << line;
  EXPECT_NE(line.find("26 bytes a vector = 20 % of fp16"), std::string::npos) << line;
  EXPECT_NE(line.find("0.69x the error of plain samples"), std::string::npos) << line;
  EXPECT_NE(line.find("For less error take s=16"), std::string::npos) << line;
  EXPECT_EQ(line.find('\n'), std::string::npos);
}

TEST(Report, VerdictSaysWhatToDoAboutABadDictionary) {
  EvaluationReport report = example();
  for (Row& row : report.rows)
    if (row.coder == "dictionary") row.mean *= 2;
  EXPECT_NE(verdict(report).find("train longer"), std::string::npos) << verdict(report);
  report = example();
  for (Row& row : report.rows)
    if (row.dataset != "wikitext") row.mean *= 1.5;
  EXPECT_NE(verdict(report).find("more varied text"), std::string::npos) << verdict(report);
}

TEST(Report, ConsoleTableIsAlignedAndSaysThatWeightsAreNotQuantized) {
  const std::string table = console_table(example());
  EXPECT_NE(table.find("before the weights are quantized"), std::string::npos);
  EXPECT_NE(table.find("code*"), std::string::npos);
  EXPECT_NE(table.find("out/in"), std::string::npos);
  EXPECT_EQ(table.substr(table.size() - verdict(example()).size() - 1), verdict(example()) + "\n");
  // Lines of one block are equally wide.
  std::istringstream lines(table);
  std::string line;
  std::set<std::size_t> widths;
  while (std::getline(lines, line)) {
    if (line.starts_with("  layer")) widths.clear();
    if (line.starts_with("  layer") || line.starts_with("  mean") || line.starts_with("  5 ")) {
      widths.insert(line.size());
      EXPECT_EQ(widths.size(), 1u) << line;
    }
  }
}

TEST(Report, JsonHoldsEveryRowAndParses) {
  EvaluationReport report = training_example();
  report.rows[0].mean = std::nan("");
  report.model = "broken \xff name";
  const auto json = nlohmann::json::parse(to_json(report));
  EXPECT_EQ(json["rows"].size(), report.rows.size());
  EXPECT_TRUE(json["rows"][0]["mean"].is_null());
  EXPECT_EQ(json["rows"][1]["mean"], report.rows[1].mean);
  EXPECT_EQ(json["verdict"], verdict(report));
  EXPECT_EQ(json["weights_quantized"], false);
  EXPECT_NE(json["error"].get<std::string>().find("before the weights are quantized"),
            std::string::npos);
  EXPECT_EQ(json["training"]["series"].size(), 12u);
  EXPECT_EQ(json["training"]["series"][0]["points"].size(), 1200u);
  EXPECT_NEAR(json["summary"][0]["share_of_fp16"], 26.0 / 128, 1e-12);
}

TEST(Report, CsvHasOneLinePerRowAndQuotesNames) {
  EvaluationReport report = example();
  report.datasets[1].name = "odd, \"name\"\nhere";
  for (Row& row : report.rows)
    if (row.dataset == "code") row.dataset = report.datasets[1].name;
  report.rows[0].p99 = std::nan("");
  const auto lines = parse_csv(to_csv(report));
  ASSERT_EQ(lines.size(), report.rows.size() + 1);
  for (const auto& line : lines) EXPECT_EQ(line.size(), lines[0].size());
  EXPECT_EQ(lines[0][0], "dataset");
  EXPECT_EQ(lines[1][8], "");  // NaN
  EXPECT_NEAR(std::stod(lines[2][6]), report.rows[1].mean, 1e-8);
  EXPECT_EQ(lines[1 + report.rows.size() / 3][0], report.datasets[1].name);
}

TEST(Report, EffectsOfACompressedCacheAreInEveryOutput) {
  EvaluationReport report = with_effects(false);
  report.cache_effects[0].adaptive_threshold = 0.25;
  report.cache_effects[0].own_atoms = 7;
  const std::string table = console_table(report);
  EXPECT_NE(table.find("full perplexity 20"), std::string::npos) << table;
  EXPECT_NE(table.find("0.25"), std::string::npos);
  EXPECT_NE(
      table.find("dictionary, fp8-int16, s = 8, window 32, sinks 4: 0.25x the KL of rotation + "
                 "Lloyd-Max at equal bytes, 4.00 % of fp16."),
      std::string::npos)
      << table;
  const auto rows = nlohmann::json::parse(to_json(report))["cache_effects"];
  ASSERT_EQ(rows.size(), 16u);
  EXPECT_EQ(rows[0]["own_atoms"], 7);
  EXPECT_EQ(rows[0]["sink_tokens"], 4);
  EXPECT_NEAR(rows[1]["share_of_fp16"], 0.016, 1e-12);
  EXPECT_NEAR(rows[1]["perplexity_ratio"], 1 + 0.09 / 8 / 8, 1e-12);
  EXPECT_NEAR(rows[1]["bytes_per_token_and_head"], 36, 1e-12);
  report.cache_effects[1].mean_kl = std::nan("");
  const auto lines = parse_csv(effects_to_csv(report));
  ASSERT_EQ(lines.size(), 17u);
  for (const auto& line : lines) EXPECT_EQ(line.size(), lines[0].size());
  EXPECT_EQ(lines[0].back(), "p99_kl");
  EXPECT_EQ(lines[1][0], "wikitext");
  EXPECT_EQ(lines[2][20], "");  // NaN
  const std::string html = to_html(report);
  EXPECT_EQ(unbalanced(html), "");
  EXPECT_NE(html.find("rotation + Lloyd-Max, window 8, sinks 4"), std::string::npos);
  EXPECT_NE(html.find("16 settings"), std::string::npos);
}

TEST(Report, TheBestOfABudgetIsNamedAndItsCurveDrawn) {
  const EvaluationReport report = with_effects(true);
  const std::vector<std::string> sentences = effect_sentences(report);
  ASSERT_EQ(sentences.size(), 2u);
  EXPECT_EQ(sentences[0],
            "wikitext: the best within the budget is dictionary, fp8-int16, s = 8 + 4, window 32 "
            "(KL 0.000352, perplexity x 1.0004, 19.90 % of fp16): 8 atoms for keys, 4 for values. "
            "Without a dictionary: rotation + Lloyd-Max, 144 bits, window 32 (KL 0.00141, "
            "perplexity x 1.0014, 19.90 % of fp16).");
  EXPECT_NE(console_table(report).find(sentences[1]), std::string::npos);
  const std::string html = to_html(report);
  EXPECT_EQ(unbalanced(html), "");
  EXPECT_NE(html.find("keys 3/4"), std::string::npos);
  EXPECT_NE(html.find("recent window, tokens"), std::string::npos);
  EXPECT_NE(html.find(sentences[0]), std::string::npos);
}

TEST(Report, HtmlIsWellFormedAndLoadsNothing) {
  for (EvaluationReport report : {example(),
                                  training_example(),
                                  with_effects(false),
                                  with_effects(true),
                                  EvaluationReport{}}) {
    report.notes.push_back("a <b> & \"c\" \xff\x01");
    const std::string html = to_html(report);
    EXPECT_EQ(unbalanced(html), "");
    for (const char* load :
         {"http:", "https:", "src=", "href=", "url(", "@import", "<link", "<img", "fetch("})
      EXPECT_EQ(html.find(load), std::string::npos) << load;
    EXPECT_FALSE(std::regex_search(html, std::regex("[^a-zA-Z](nan|inf)[^a-zA-Z]")));
    EXPECT_NE(html.find("a &lt;b&gt; &amp; &quot;c&quot; \uFFFD\uFFFD"), std::string::npos);
    EXPECT_NE(html.find("before the weights are quantized"), std::string::npos);
  }
}

TEST(Report, HtmlShowsEachMeasurementAndTheProvenance) {
  const std::string html = to_html(example());
  EXPECT_NE(html.find("Error per layer"), std::string::npos);
  EXPECT_NE(html.find("Error against memory"), std::string::npos);
  EXPECT_NE(html.find("Domains side by side"), std::string::npos);
  EXPECT_NE(html.find("0123456789abcdef"), std::string::npos);
  EXPECT_NE(html.find("runs/wikillama &lt;demo&gt; &amp; co"), std::string::npos);
  const std::regex row("<tr><td>");
  EXPECT_EQ(
      std::distance(std::sregex_iterator(html.begin(), html.end(), row), std::sregex_iterator()),
      static_cast<std::ptrdiff_t>(example().rows.size()));
}

TEST(Report, OddShapesDoNotBreakThePage) {
  EvaluationReport one =
      example();  // one layer, one kind, one sparsity, out of domain only, errors of zero
  one.layers = {3};
  one.sparsities = {32};
  one.datasets = {one.datasets[1]};
  one.rows = {{"code", 3, Kind::kKeys, "dictionary", 32, 0, 0, 0, 32, 10}};
  EXPECT_EQ(unbalanced(to_html(one)), "");
  EXPECT_NE(verdict(one).find("out of domain"), std::string::npos) << verdict(one);
  EXPECT_FALSE(console_table(one).empty());
  one.rows[0].vectors = 0;  // nothing finite
  one.rows[0].mean = one.rows[0].median = one.rows[0].p99 = one.rows[0].mean_atoms = std::nan("");
  EXPECT_EQ(unbalanced(to_html(one)), "");
  EXPECT_EQ(to_html(one).find(">nan"), std::string::npos);
  EXPECT_TRUE(nlohmann::json::accept(to_json(one)));
}

TEST(Report, ThreeFilesAreWrittenAndNoPartialIsLeft) {
  const std::filesystem::path folder =
      std::filesystem::path(LEXICO_BINARY_DIR) / "tests/report_example";
  std::filesystem::remove_all(folder);
  write_report(example(), folder.string());
  write_report(training_example(), (folder / "training").string());
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    names.insert(entry.path().filename().string());
  EXPECT_EQ(names, (std::set<std::string>{"report.json", "report.csv", "report.html", "training"}));
  write_report(with_effects(true), (folder / "effects").string());
  EXPECT_TRUE(std::filesystem::exists(folder / "effects/cache_effects.csv"));
  write_report(example(), (folder / "effects").string());  // in its place, without effects
  EXPECT_FALSE(std::filesystem::exists(folder / "effects/cache_effects.csv"));
  write_report(with_effects(true), (folder / "budget").string());
  EXPECT_THROW(write_report(example(), "/dev/full"), ResourceError);
  EXPECT_THROW(write_report(example(), "/proc/no/such"), ResourceError);
}

TEST(Report, NumbersAreSpelledForPeople) {
  EXPECT_EQ(grouped(1234567), "1,234,567");
  EXPECT_EQ(grouped(-1234), "-1,234");
  EXPECT_EQ(grouped(-123), "-123");
  EXPECT_EQ(compact(999), "999");
  EXPECT_EQ(compact(12500), "12.5k");
  EXPECT_EQ(compact(4e6), "4M");
  EXPECT_EQ(short_error(0.00004123), "4.1e-05");
  EXPECT_EQ(short_error(std::nan("")), "-");
  EXPECT_EQ(pad_left("\u00d7", 3), "  \u00d7");
}

}  // namespace
}  // namespace lexico::report
