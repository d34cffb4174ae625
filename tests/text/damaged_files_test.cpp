// Thousands of damaged files, made by changing good ones: each is read, or refused with an Error
// that names it; never a crash, a hang or another exception. LEXICO_FUZZ=N tries N of each kind,
// others for another N.
#include <gtest/gtest.h>

#include <cstdlib>
#include <random>

#include "lexico/error.h"
#include "lexico/text_source.h"
#include "text/fixtures.h"

namespace lexico {
namespace {

using test::contents;
using test::fixture;

int num_tries() {
  const char* wanted = std::getenv("LEXICO_FUZZ");
  return wanted ? std::atoi(wanted) : 500;
}

/// `bytes` with one to four changes: bytes set, removed, repeated, cut off; numbers and words
/// replaced.
std::string damaged(std::string bytes, std::mt19937& random) {
  static const char* const kWords[] = {"null",
                                       "-1",
                                       "1e999",
                                       "18446744073709551616",
                                       "\"\"",
                                       "[]",
                                       "{}",
                                       "true",
                                       "\\ud800",
                                       "\xFF",
                                       "\"type\"",
                                       "\\\\p{",
                                       "(?",
                                       "[^",
                                       "{9,",
                                       "4294967295"};
  const auto below = [&](std::size_t n) { return n == 0 ? 0 : random() % n; };
  for (std::size_t changes = 1 + below(4); changes > 0; --changes) {
    const std::size_t at = below(bytes.size()), length = std::min(1 + below(12), bytes.size() - at);
    switch (below(7)) {
      case 0:
        bytes[at] = static_cast<char>(random());
        break;
      case 1:
        bytes.erase(at, length);
        break;
      case 2:
        bytes.insert(at, bytes.substr(below(bytes.size()), length));
        break;
      case 3:
        bytes.replace(at, length, kWords[below(std::size(kWords))]);
        break;
      case 4: {  // a value of the JSON, most likely
        const std::size_t colon = bytes.find(':', at);
        if (colon == bytes.npos) break;
        const std::size_t end = std::min(bytes.find_first_of(",}]", colon), bytes.size());
        bytes.replace(colon + 1, end - colon - 1, kWords[below(std::size(kWords))]);
        break;
      }
      case 5:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      default:
        if (below(4) == 0) bytes.resize(at + 1);
    }
    if (bytes.empty()) break;
  }
  return bytes;
}

/// Reads `num_tries()` damaged files called `name`; `read` is to throw nothing but an Error that
/// names it.
template <typename Read>
void expect_no_crash(const std::string& name, const std::vector<std::string>& good, Read&& read) {
  const test::TemporaryFolder folder;
  std::mt19937 random(static_cast<unsigned>(num_tries()));
  int num_refused = 0;
  for (int i = 0; i < num_tries(); ++i) {
    const std::string path =
        test::write(folder, name, damaged(good[random() % good.size()], random));
    try {
      read(path);
    } catch (const Error& error) {
      ++num_refused;
      const std::string message = error.what();
      EXPECT_TRUE(message.find(path) != message.npos || dynamic_cast<const ResourceError*>(&error))
          << message;
      EXPECT_LT(message.size(), 1000u);
    }
  }
  EXPECT_GT(num_refused, num_tries() / 20);
}

constexpr PackOptions kOptions{
    .sequence_length = 16, .bos = PackOptions::Bos::kAlways, .bos_id = 0};

TEST(DamagedFiles, TokenizerJson) {
  std::vector<std::string> good;
  for (const char* name : {"gpt2", "llama3", "qwen2", "unknown", "steps"}) {
    good.push_back(contents(fixture(std::string(name) + ".json")));
    // Most of a file is its vocabulary; the rest deserves as many changes.
    nlohmann::json json = nlohmann::json::parse(good.back());
    json["model"]["vocab"] = {{"a", 0}, {"b", 1}, {"ab", 2}, {"<unk>", 3}};
    json["model"]["merges"] = {{"a", "b"}};
    for (int i = 0; i < 4; ++i) good.push_back(json.dump());
  }
  const std::string text = contents(fixture("text.txt"));
  expect_no_crash("tokenizer.json", good, [&](const std::string& path) {
    const Tokenizer tokenizer = Tokenizer::from_file(path);
    for (const std::int32_t id : tokenizer.encode(text))
      ASSERT_TRUE(id >= 0 && id < tokenizer.vocab_size());
  });
}

TEST(DamagedFiles, Jsonl) {
  const Tokenizer tokenizer = Tokenizer::from_file(fixture("gpt2.json"));
  const std::vector<std::string> good{
      "{\"text\":\"one\"}\n{\"id\":[1,{\"a\":null}],\"text\":\"two "
      "\\u00e9\"}\n\n{\"text\":\"three\"}\n"};
  expect_no_crash("a.jsonl", good, [&](const std::string& path) {
    read_packed(TextSpec::from(path), &tokenizer, kOptions, 1000);
  });
}

TEST(DamagedFiles, Txt) {
  std::string utf16 = "\xFF\xFE";
  for (const char c : contents(fixture("text.txt"))) utf16 += {c, '\0'};
  const std::vector<std::string> good{contents(fixture("text.txt")),
                                      "e\u0301 \u1100\u1161 <|endoftext|> \U0001F680",
                                      std::string(40, '\xC3') + std::string(140, 'a'),
                                      std::string(17, '\0') + std::string(160, ' '),
                                      utf16};
  for (const char* name : {"gpt2.json", "qwen2.json", "steps.json"}) {
    const Tokenizer tokenizer = Tokenizer::from_file(fixture(name));
    expect_no_crash("a.txt", good, [&](const std::string& path) {
      read_packed(TextSpec::from(path), &tokenizer, kOptions, tokenizer.vocab_size());
    });
  }
}

TEST(DamagedFiles, Safetensors) {
  const std::string header = R"({"a":{"dtype":"I32","shape":[4],"data_offsets":[0,16]},)"
                             R"("b":{"dtype":"U16","shape":[3],"data_offsets":[16,22]},)"
                             R"("__metadata__":{"x":"y"}})";
  std::string good(8, '\0');
  good[0] = static_cast<char>(header.size());
  good += header + std::string(22, '\1');
  expect_no_crash("a.safetensors", {good}, [&](const std::string& path) {
    TextSpec spec = TextSpec::from(path);
    spec.is_token_ids = true;
    read_packed(spec, nullptr, kOptions, 0);
  });
}

}  // namespace
}  // namespace lexico
