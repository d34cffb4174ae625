// The options of lexico-eval: what is refused, and how the error names it.
#include "lexico-eval/config.h"

#include <gtest/gtest.h>

#include "common/options.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

/// Of a whole command line.
EvalConfig parsed(std::vector<std::string> words) {
  words.insert(words.begin(), "lexico-eval");
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  EvalConfig config;
  std::vector<Option> options = options_of(config);
  ProgramInfo program;
  program.name = "lexico-eval";
  program.positional = "data";
  parse_command_line(program, options, static_cast<int>(argv.size()), argv.data());
  config.validate();
  return config;
}

std::string error_of(std::vector<std::string> words) {
  try {
    words.insert(words.end(), {"--dictionary", "d.pt", "--data", "x.h5"});
    parsed(words);
    return "no error";
  } catch (const InvalidArgument& error) {
    return error.what();
  }
}

void expect_names(const std::string& error, const std::vector<std::string>& words) {
  for (const std::string& word : words)
    EXPECT_NE(error.find(word), std::string::npos) << word << " is not in: " << error;
}

TEST(EvalConfig, SparsitiesAreSortedAndEachOnce) {
  EXPECT_EQ(parsed({"-c", "/dev/null", "--dictionary", "d", "--data", "x", "--sparsity", "8,4,8"})
                .sparsity,
            (std::vector<int>{4, 8}));
}

TEST(EvalConfig, BareWordsAreData) {
  EXPECT_EQ(parsed({"--ood", "y", "--dictionary=d", "--", "x", "z"}).data,
            (std::vector<std::string>{"x", "z"}));
}

TEST(EvalConfig, MalformedSparsitiesAreNamed) {
  expect_names(error_of({"--sparsity", "0,4"}), {"sparsity is 0", ">= 1"});
  expect_names(error_of({"--sparsity", "4,four"}), {"sparsity", "'four'"});
  expect_names(error_of({"--sparsity", "4.5"}), {"sparsity", "'4.5'"});
  expect_names(error_of({"--sparsity", "4,,8"}), {"sparsity", "''"});
  expect_names(error_of({"--sparsity", "99999999999"}), {"sparsity", "99999999999"});
}

TEST(EvalConfig, ValuesOutOfBoundsAreNamedWithTheBound) {
  expect_names(error_of({"--tolerance", "1.5"}), {"tolerance is 1.5", "[0, 1)"});
  expect_names(error_of({"--tolerance", "nan"}), {"tolerance"});
  expect_names(error_of({"--selection", "best"}), {"selection", "best"});
  expect_names(error_of({"--bos", "maybe"}), {"bos is 'maybe'", "always"});
  expect_names(error_of({"--sequence-length", "-1"}), {"sequence_length is -1", ">= 0"});
  expect_names(error_of({"--max-vectors", "-1"}), {"max_vectors is -1", ">= 0"});
  expect_names(error_of({"--threads", "-2"}), {"threads is -2", ">= 0"});
}

TEST(EvalConfig, ListsOfCachesAreSortedAndBounded) {
  const EvalConfig config = parsed({"--recent-window",
                                    "128,32,32",
                                    "--sink-tokens",
                                    "4,0",
                                    "--adaptive-threshold",
                                    "0.3,0",
                                    "--dictionary",
                                    "d",
                                    "--",
                                    "x"});
  EXPECT_EQ(config.recent_window, (std::vector<int>{32, 128}));
  EXPECT_EQ(config.sink_tokens, (std::vector<int>{0, 4}));
  EXPECT_EQ(config.adaptive_threshold, (std::vector<double>{0, 0.3}));
  expect_names(error_of({"--recent-window", "4,-1"}), {"recent_window is -1", "[0, 2^24]"});
  expect_names(error_of({"--sink-tokens", "-2"}), {"sink_tokens is -2", "[0, 2^24]"});
  expect_names(error_of({"--adaptive-threshold", "-0.1"}), {"adaptive_threshold is -0.1", ">= 0"});
  expect_names(error_of({"--adaptive-threshold", "inf"}), {"adaptive_threshold"});
  expect_names(error_of({"--adaptive-atoms", "0"}), {"adaptive_atoms is 0", "[1, 65536]"});
  expect_names(error_of({"--compress-chunk", "0"}), {"compress_chunk is 0"});
  expect_names(error_of({"--coding", "fp8"}), {"coding is 'fp8'", "fp8-int16"});
}

TEST(EvalConfig, ABudgetIsAPartOfTheWholeAndMeansPerplexity) {
  EXPECT_TRUE(parsed({"--budget", "0.2", "--dictionary", "d", "--", "x"}).perplexity);
  for (const char* bad : {"0", "1", "1.5", "-0.2"})
    expect_names(error_of({"--budget", bad}), {"budget is ", "(0, 1)"});
  expect_names(error_of({"--budget", "0.1,0.2"}), {"budget", "one"});
  expect_names(error_of({"--budget", "0.2", "--sink-tokens", "0,4"}), {"budget", "sink_tokens"});
  expect_names(error_of({"--budget", "0.2", "--adaptive-threshold", "0,0.3"}),
               {"budget", "adaptive_threshold"});
}

TEST(EvalConfig, AnUnknownFlagNamesTheNearest) {
  expect_names(error_of({"--sparcity", "4"}), {"--sparcity", "'--sparsity'"});
  expect_names(error_of({"--sequence-lenght", "4"}), {"'--sequence-length'"});
}

}  // namespace
}  // namespace lexico::apps
