// The contract of apps/common/options.h: one list of fields, four places to set them.
#include "common/options.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "common/program.h"
#include "lexico/error.h"
#include "lexico/files.h"
#include "support/temporary_folder.h"

namespace lexico::apps {
namespace {

struct Config {
  int num_atoms = 10;
  double rate = 0.5;
  std::string name = "plain";
  bool resume = false;
  std::vector<int> sparsity = {4, 8};
  std::vector<std::string> text;
  std::int64_t budget = 0;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("num_atoms", self.num_atoms, "atoms");
    visit("rate", self.rate, "rate");
    visit("name", self.name, "name");
    visit("resume", self.resume, "resume");
    visit("sparsity", self.sparsity, "list of numbers");
    visit("text", self.text, "list of texts");
    visit("nested.budget", self.budget, "nested");
  }
};

const ProgramInfo kProgram{"lexico-test", "A test.", "", "text", {{"name", "-n"}}, ""};

bool parse(Config& config, std::vector<std::string> words) {
  words.insert(words.begin(), "lexico-test");
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  std::vector<Option> options = options_of(config);
  return parse_command_line(kProgram, options, static_cast<int>(argv.size()), argv.data());
}

std::string error_of(const std::vector<std::string>& words) {
  Config config;
  try {
    parse(config, words);
  } catch (const InvalidArgument& e) {
    return e.what();
  } catch (const IoError& e) {
    return e.what();
  }
  return "no error";
}

TEST(Options, FlagsBeatEnvironmentBeatsFileBeatsDefaults) {
  const test::TemporaryFolder folder;
  const std::string file = folder.file("c.yaml");
  write_file(
      file,
      "num_atoms: 1\nrate: 0.1\nname: from file\nnested:\n  budget: 5\nsparsity: [1, 2, 3]\n");
  setenv("LEXICO_NUM_ATOMS", "2", 1);
  setenv("LEXICO_RATE", "0.2", 1);
  Config config;
  EXPECT_TRUE(parse(config, {"-c", file, "--rate", "0.3"}));
  unsetenv("LEXICO_NUM_ATOMS");
  unsetenv("LEXICO_RATE");
  EXPECT_EQ(config.rate, 0.3);
  EXPECT_EQ(config.num_atoms, 2);
  EXPECT_EQ(config.name, "from file");
  EXPECT_EQ(config.budget, 5);
  EXPECT_EQ(config.sparsity, (std::vector<int>{1, 2, 3}));
  EXPECT_FALSE(config.resume);
}

TEST(Options, ListsFlagsSetAndBareArguments) {
  Config config;
  EXPECT_TRUE(parse(config,
                    {"a.txt",
                     "b,c.txt",
                     "--sparsity",
                     "2,16",
                     "--resume",
                     "--set",
                     "nested.budget=1e6",
                     "--set",
                     "name=x=y",
                     "-n",
                     "short"}));
  EXPECT_EQ(config.text, (std::vector<std::string>{"a.txt", "b,c.txt"}));
  EXPECT_EQ(config.sparsity, (std::vector<int>{2, 16}));
  EXPECT_TRUE(config.resume);
  EXPECT_EQ(config.budget, 1000000);
  EXPECT_EQ(config.name, "x=y");  // --set comes last
}

TEST(Options, WhatIsPrintedReadsBack) {
  Config config;
  config.name = "with \"quotes\" and: colon # hash";
  config.text = {"a b", "- c"};
  config.rate = 1.0 / 3;
  config.budget = 123456789012;
  const test::TemporaryFolder folder;
  write_file(folder.file("c.yaml"), to_yaml(options_of(config)));
  Config read;
  EXPECT_TRUE(parse(read, {"-c", folder.file("c.yaml")}));
  EXPECT_EQ(read.name, config.name);
  EXPECT_EQ(read.text, config.text);
  EXPECT_EQ(read.rate, config.rate);
  EXPECT_EQ(read.budget, config.budget);
}

TEST(Options, ErrorsNameThePlaceTheValueAndTheNearestKey) {
  const test::TemporaryFolder folder;
  const std::string file = folder.file("c.yaml");
  const auto with_yaml = [&](const std::string& text) {
    write_file(file, text);
    return error_of({"-c", file});
  };
  EXPECT_EQ(with_yaml("rate: 1\nnum_atomz: 3\n"),
            file + ":2: unknown key 'num_atomz'; the nearest is 'num_atoms'");
  EXPECT_EQ(with_yaml("num_atoms: many\n"),
            file + ":1: num_atoms is 'many', must be a whole number");
  EXPECT_EQ(with_yaml("rate: 1\nrate: 2\n"), file + ":2: key 'rate' stands twice");
  EXPECT_EQ(with_yaml("rate: [1, 2]\n"), file + ":1: rate has 2 values, must have one");
  EXPECT_EQ(with_yaml("rate:\n"), file + ":1: rate has no value");
  EXPECT_EQ(with_yaml("- rate\n"), file + ": must be a map of keys to values");
  EXPECT_NE(with_yaml("rate: [1\n").find(file + ":"), std::string::npos);
  EXPECT_EQ(with_yaml(""), "no error");
  EXPECT_EQ(error_of({"-c", folder.file("none.yaml")}),
            folder.file("none.yaml") + ": cannot read: No such file or directory");
  EXPECT_EQ(error_of({"--num-atoms", "1.5"}),
            "--num-atoms: num_atoms is '1.5', must be a whole number in [-2147483648, 2147483647]");
  EXPECT_EQ(error_of({"--num-atoms", "99999999999"}),
            "--num-atoms: num_atoms is '99999999999', must be a whole number in [-2147483648, "
            "2147483647]");
  EXPECT_EQ(error_of({"--num-atomz", "1"}),
            "unexpected argument '--num-atomz'; the nearest flag is '--num-atoms' (see --help)");
  EXPECT_EQ(error_of({"--set", "rat=1"}), "--set: unknown key 'rat'; the nearest is 'rate'");
  EXPECT_EQ(error_of({"--set", "rate"}), "--set rate: want key=value");
  EXPECT_EQ(error_of({"--rate", "nan"}), "--rate: rate is 'nan', must be a number");
  EXPECT_NE(error_of({"--rate"}).find("--rate"), std::string::npos);
}

TEST(Options, LayersAreNumbersAndRanges) {
  EXPECT_EQ(parse_layers("all", 3), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(parse_layers("2,0,4-6,5", 8), (std::vector<int>{0, 2, 4, 5, 6}));
  for (const char* bad : {"8", "-1", "x", "", "3-1", "1-", "1,,2", "0-8"})
    EXPECT_THROW(parse_layers(bad, 8), InvalidArgument) << bad;
}

TEST(Program, EveryKindOfErrorHasItsExitCode) {
  testing::internal::CaptureStderr();
  EXPECT_EQ(run_program("p", [] { return 0; }), 0);
  EXPECT_EQ(run_program("p", []() -> int { throw InvalidArgument("a"); }), 2);
  EXPECT_EQ(run_program("p", []() -> int { throw IoError("b"); }), 3);
  EXPECT_EQ(run_program("p", []() -> int { throw ResourceError("c"); }), 4);
  EXPECT_EQ(run_program("p", []() -> int { throw std::bad_alloc(); }), 4);
  EXPECT_EQ(run_program("p", []() -> int { throw Interrupted("d"); }), 75);
  EXPECT_EQ(run_program("p", []() -> int { throw std::runtime_error("e"); }), 1);
  EXPECT_EQ(testing::internal::GetCapturedStderr().substr(0, 10), "p: a\np: b\n");
}

TEST(Program, NumbersAreWrittenForPeople) {
  EXPECT_EQ(format_count(950), "950");
  EXPECT_EQ(format_count(36026880), "36M");
  EXPECT_EQ(format_bytes(1234567), "1.2 MB");
  EXPECT_EQ(format_duration(4.25), "4.2 s");
  EXPECT_EQ(format_duration(185), "3 min 05 s");
  EXPECT_EQ(format_duration(7800), "2 h 10 min");
}

}  // namespace
}  // namespace lexico::apps
