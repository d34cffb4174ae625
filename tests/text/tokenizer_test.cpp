#include "lexico/tokenizer.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "lexico/error.h"
#include "text/fixtures.h"

namespace lexico {
namespace {

using test::contents;
using test::fixture;
using test::fixture_json;
using test::message_of;
using test::shared;
using test::TemporaryFolder;
using Ids = std::vector<std::int32_t>;
using Json = nlohmann::json;

Tokenizer fixture_tokenizer(const std::string& name) {
  return Tokenizer::from_file(fixture(name + ".json"));
}

Tokenizer tokenizer_from(const Json& json) {
  const TemporaryFolder folder;
  return Tokenizer::from_file(test::write(folder, "tokenizer.json", json.dump()));
}

/// fixtures/gpt2.json with the value at `pointer` replaced.
Json changed(const char* pointer, const Json& value) {
  Json json = fixture_json("gpt2.json");
  json[Json::json_pointer(pointer)] = value;
  return json;
}

class Golden : public testing::TestWithParam<const char*> {};

TEST_P(Golden, IdsEqualThoseOfTokenizers) {
  const Tokenizer tokenizer = fixture_tokenizer(GetParam());
  int num_cases = 0;
  for (const Json& c : fixture_json("golden.json")) {
    if (c["tokenizer"] != GetParam()) continue;
    EXPECT_EQ(tokenizer.encode(c["text"].get<std::string>()), c["ids"].get<Ids>()) << c["text"];
    ++num_cases;
  }
  EXPECT_GT(num_cases, 20);
}

TEST_P(Golden, DecodingGivesTheTextBack) {
  const std::string style = GetParam();
  if (style == "unknown" || style == "steps") GTEST_SKIP() << "loses bytes, or adds spaces";
  const Tokenizer tokenizer = fixture_tokenizer(style);
  for (const Json& c : fixture_json("golden.json")) {
    if (c["tokenizer"] != style) continue;
    const std::string text = tokenizer.decode(c["ids"].get<Ids>());
    if (style == "qwen2") {  // whose ids are those of the text in NFC
      EXPECT_EQ(tokenizer.encode(text), c["ids"].get<Ids>()) << c["text"];
    } else {
      EXPECT_EQ(text, c["text"].get<std::string>());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Styles,
                         Golden,
                         testing::Values("gpt2", "llama3", "qwen2", "unknown", "steps"),
                         [](const auto& instance) { return std::string(instance.param); });

// The vectors of llama.cpp for the real vocabularies.
class LlamaCppVectors : public testing::Test {
 protected:
  static void expect_equal(const Tokenizer& tokenizer, const std::string& name) {
    const std::string inputs = contents(shared("tokenizers/llamacpp_vectors/" + name + ".inp"));
    std::istringstream outputs(contents(shared("tokenizers/llamacpp_vectors/" + name + ".out")));
    const std::string separator = "\n__ggml_vocab_test__\n";
    std::string line;
    int num_cases = 0;
    for (std::size_t at = 0; at < inputs.size() && std::getline(outputs, line); ++num_cases) {
      const std::size_t end = std::min(inputs.find(separator, at), inputs.size());
      std::istringstream numbers(line);
      const Ids expected{std::istream_iterator<std::int32_t>(numbers), {}};
      const std::string text = inputs.substr(at, end - at);
      EXPECT_EQ(tokenizer.encode(text), expected) << text;
      at = end + separator.size();
    }
    EXPECT_GT(num_cases, 40);
  }

  static Json lines_of(const std::string& path) {
    std::istringstream in(contents(path));
    Json lines = Json::array();
    for (std::string line; std::getline(in, line);) {
      if (!line.empty() && line.rfind("#version", 0) != 0) lines.push_back(line);
    }
    return lines;
  }
};

TEST_F(LlamaCppVectors, Gpt2) {
  if (!std::filesystem::exists(shared("tokenizers/gpt2")))
    GTEST_SKIP() << "no ../shared/tokenizers";
  Json json = fixture_json("gpt2.json");
  json["added_tokens"] = Json::array();
  json["model"]["vocab"] = Json::parse(contents(shared("tokenizers/gpt2/encoder.json")));
  json["model"]["merges"] = lines_of(shared("tokenizers/gpt2/vocab.bpe"));
  expect_equal(tokenizer_from(json), "gpt-2");
}

TEST_F(LlamaCppVectors, Qwen2) {
  if (!std::filesystem::exists(shared("tokenizers/qwen2.5")))
    GTEST_SKIP() << "no ../shared/tokenizers";
  Json json = fixture_json("qwen2.json");
  json["added_tokens"] = Json::array();
  json["model"]["vocab"] = Json::parse(contents(shared("tokenizers/qwen2.5/vocab.json")));
  json["model"]["merges"] = lines_of(shared("tokenizers/qwen2.5/merges.txt"));
  expect_equal(tokenizer_from(json), "qwen2");
}

TEST(Tokenizer, EncodeAppends) {
  const Tokenizer tokenizer = fixture_tokenizer("gpt2");
  Ids ids{-7};
  tokenizer.encode("the", ids);
  const Ids alone = tokenizer.encode("the");
  ASSERT_EQ(ids.size(), alone.size() + 1);
  EXPECT_EQ(ids[0], -7);
  EXPECT_TRUE(std::equal(alone.begin(), alone.end(), ids.begin() + 1));
}

TEST(Tokenizer, DecodingCutCharactersAndUnknownIds) {
  const Tokenizer tokenizer = fixture_tokenizer("gpt2");
  EXPECT_EQ(tokenizer.decode({}), "");
  EXPECT_EQ(tokenizer.decode({-1, tokenizer.vocab_size(), 1 << 30}), "");
  const std::int32_t first_of_two = *tokenizer.id_of("\u00c3");  // the byte C3
  EXPECT_EQ(tokenizer.decode({first_of_two}), "\uFFFD");
  EXPECT_EQ(tokenizer.decode({first_of_two, *tokenizer.id_of("\u00a9")}), "\u00e9");
}

TEST(Tokenizer, EmptyTextHasNoIds) {
  for (const char* name : {"gpt2", "llama3", "qwen2", "unknown", "steps"}) {
    EXPECT_TRUE(fixture_tokenizer(name).encode("").empty()) << name;
  }
}

TEST(Tokenizer, AddedTokensBecomeTheirIds) {
  const Tokenizer tokenizer = fixture_tokenizer("gpt2");
  const std::int32_t end = tokenizer.id_of("<|endoftext|>").value();
  EXPECT_EQ(tokenizer.encode("<|endoftext|><|endoftext|>"), (Ids{end, end}));
}

TEST(Tokenizer, InvalidUtf8IsReadAsReplacementCharactersLikePython) {
  const Tokenizer tokenizer = fixture_tokenizer("gpt2");
  const std::string r = "\xEF\xBF\xBD";
  const std::pair<std::string, std::string> cases[] = {
      {"a\xFFz", "a" + r + "z"},
      {"\x80\x80", r + r},          // continuation bytes alone
      {"\xC0\x80", r + r},          // overlong
      {"\xE0\x9F\xBF", r + r + r},  // overlong
      {"\xED\xA0\x80", r + r + r},  // surrogate
      {"\xE2\x82", r},              // cut off: one maximal part
      {"\xE2\x82z", r + "z"},       //
      {"\xF0\x9F\x98", r},          //
      {"\xF0\x9F\x98\xF0\x9F\x98\x80", r + "\xF0\x9F\x98\x80"},
      {"\xF4\x90\x80\x80", r + r + r + r},  // beyond U+10FFFF
      {"\xF8\x88\x80\x80\x80", r + r + r + r + r},
      {std::string("ok\0\xC3", 4), std::string("ok\0", 3) + r},
  };
  for (const auto& [bytes, text] : cases)
    EXPECT_EQ(tokenizer.encode(bytes), tokenizer.encode(text));
}

TEST(Tokenizer, NulIsACharacterLikeOthers) {
  const Tokenizer tokenizer = fixture_tokenizer("gpt2");
  const Ids ids = tokenizer.encode(std::string_view("a\0b", 3));
  EXPECT_EQ(ids.size(), 3u);
  EXPECT_EQ(ids[1], tokenizer.id_of("\u0100").value());
}

TEST(Tokenizer, VocabSizeIsTheLargestIdPlusOne) {
  EXPECT_EQ(fixture_tokenizer("llama3").vocab_size(), 605);  // 601 and four added tokens
  Json json = fixture_json("gpt2.json");
  json["model"]["vocab"]["far"] = 5000;
  EXPECT_EQ(tokenizer_from(json).vocab_size(), 5001);
}

TEST(Tokenizer, IdOfKnowsTokensAsWritten) {
  const Tokenizer tokenizer = fixture_tokenizer("llama3");
  EXPECT_EQ(tokenizer.id_of("!"), 0);
  EXPECT_EQ(tokenizer.id_of("\u0120Qqz"), 600);
  EXPECT_EQ(tokenizer.id_of("<|eot_id|>"), 604);
  EXPECT_EQ(tokenizer.id_of(" Qqz"), std::nullopt);
  EXPECT_EQ(tokenizer.id_of(""), std::nullopt);
}

TEST(Tokenizer, BosIsWhatThePostProcessorPutsFirst) {
  EXPECT_EQ(fixture_tokenizer("llama3").bos_id(), 601);
  EXPECT_EQ(fixture_tokenizer("gpt2").bos_id(), std::nullopt);
  EXPECT_EQ(fixture_tokenizer("qwen2").bos_id(), std::nullopt);
  const Json roberta = {{"type", "RobertaProcessing"},
                        {"sep", {"</s>", 2}},
                        {"cls", {"<s>", 3}},
                        {"trim_offsets", true},
                        {"add_prefix_space", false}};
  EXPECT_EQ(tokenizer_from(changed("/post_processor", roberta)).bos_id(), 3);
}

TEST(Tokenizer, BosIsNotAmongTheIds) {
  const Tokenizer tokenizer = fixture_tokenizer("llama3");
  EXPECT_NE(tokenizer.encode("the").front(), tokenizer.bos_id());
}

TEST(Tokenizer, IgnoreMergesTakesWholeWordsOfTheVocabulary) {
  EXPECT_EQ(fixture_tokenizer("llama3").encode("a Qqz").back(), 600);
  Json json = fixture_json("llama3.json");
  json["model"]["ignore_merges"] = false;
  EXPECT_GT(tokenizer_from(json).encode(" Qqz").size(), 1u);
}

TEST(Tokenizer, MergesMayBePairsOrStrings) {
  Json json = fixture_json("llama3.json");
  for (Json& merge : json["model"]["merges"]) {
    merge = merge[0].get<std::string>() + ' ' + merge[1].get<std::string>();
  }
  json["model"]["merges"].insert(json["model"]["merges"].begin(), "#version: 0.2");
  const std::string text = contents(fixture("text.txt"));
  EXPECT_EQ(tokenizer_from(json).encode(text), fixture_tokenizer("llama3").encode(text));
}

TEST(Tokenizer, TruncationAndPaddingInTheFileHaveNoEffect) {
  Json json = changed(
      "/truncation",
      {{"direction", "Right"}, {"max_length", 2}, {"strategy", "LongestFirst"}, {"stride", 0}});
  json["padding"] = {{"strategy", {{"Fixed", 64}}}, {"direction", "Right"}, {"pad_id", 0}};
  const std::string text = contents(fixture("text.txt"));
  EXPECT_EQ(tokenizer_from(json).encode(text), fixture_tokenizer("gpt2").encode(text));
}

TEST(Tokenizer, AddedTokenOutsideTheVocabularyCountsOnFromItsSizeAsInTokenizers) {
  const Json token = {{"id", 5000},
                      {"content", "<new>"},
                      {"single_word", false},
                      {"lstrip", false},
                      {"rstrip", false},
                      {"normalized", false},
                      {"special", true}};
  Json json = fixture_json("gpt2.json");
  json["added_tokens"].push_back(token);
  EXPECT_EQ(tokenizer_from(json).encode("<new>"), (Ids{601}));
}

TEST(Tokenizer, LongWordsGiveTheSameIdsWhereverTheyStand) {
  // Beyond 48 bytes another algorithm merges: a word of two equal halves that no merge joins must
  // encode to the ids of one half twice.
  const Tokenizer tokenizer = fixture_tokenizer("gpt2");
  for (const char* half : {"dictionary", "training", "vectors", "encodes", "keys"}) {
    std::string word;
    Ids expected;
    for (int i = 0; i < 40; ++i) {
      // U+4E2D ends no token of the fixture's vocabulary but single bytes.
      const std::string part = std::string(half) + "\u4e2d";
      const Ids ids = tokenizer.encode(part);
      word += part;
      expected.insert(expected.end(), ids.begin(), ids.end());
    }
    EXPECT_EQ(tokenizer.encode(word), expected) << half;
  }
}

TEST(Tokenizer, ThreadsMayShareOneAndUseSeveral) {
  const Tokenizer first = fixture_tokenizer("gpt2"), second = fixture_tokenizer("qwen2");
  const std::string text = contents(fixture("text.txt"));
  const Ids first_ids = first.encode(text), second_ids = second.encode(text);
  std::vector<std::thread> threads;
  std::vector<int> num_wrong(4);
  for (int& wrong : num_wrong) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        wrong += first.encode(text) != first_ids;
        wrong += second.encode(text) != second_ids;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_wrong, std::vector<int>(4));
}

TEST(Tokenizer, MovedToAnotherObjectItWorks) {
  Tokenizer tokenizer = fixture_tokenizer("gpt2");
  const Ids ids = tokenizer.encode("the dictionary");
  Tokenizer other = fixture_tokenizer("unknown");
  other.encode("the dictionary");
  other = std::move(tokenizer);
  EXPECT_EQ(other.encode("the dictionary"), ids);
}

TEST(Tokenizer, PatternThatNeedsTooManyStepsIsAnErrorNotAHang) {
  const Json split = {{"type", "Split"},
                      {"pattern", {{"Regex", "(?:a|aa|aaa)*(?:b|c)"}}},
                      {"behavior", "Isolated"},
                      {"invert", false}};
  const Json bytes = fixture_json("gpt2.json")["pre_tokenizer"];
  const Tokenizer tokenizer = tokenizer_from(
      changed("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {split, bytes}}}));
  EXPECT_THROW(tokenizer.encode(std::string(300, 'a')), ResourceError);
  EXPECT_FALSE(tokenizer.encode("the").empty());
}

// What is refused, and by which words.
struct Refusal {
  const char* name;
  const char* pointer;
  Json value;
  std::vector<std::string> words;
  bool gives_advice = false;
};
void PrintTo(const Refusal& refusal, std::ostream* out) { *out << refusal.name; }

class Refused : public testing::TestWithParam<Refusal> {};

TEST_P(Refused, NamesFileFieldAndValue) {
  const std::string message =
      message_of<IoError>([] { tokenizer_from(changed(GetParam().pointer, GetParam().value)); });
  EXPECT_NE(message.find("tokenizer.json: "), message.npos) << message;
  for (const std::string& word : GetParam().words) {
    EXPECT_NE(message.find(word), message.npos) << '"' << word << "\" is not in: " << message;
  }
  EXPECT_EQ(message.find("--token-ids") != message.npos, GetParam().gives_advice) << message;
}

Json split_with(const char* pattern, const char* behavior = "Isolated") {
  return {{"type", "Split"},
          {"pattern", {{"Regex", pattern}}},
          {"behavior", behavior},
          {"invert", false}};
}
Json sequence_of(const Json& first, const Json& second) {
  return {{"type", "Sequence"}, {"pretokenizers", {first, second}}};
}
Json nested_sequences(int depth) {
  Json json = {{"type", "NFC"}};
  for (int i = 0; i < depth; ++i) {
    Json outer = {{"type", "Sequence"}, {"normalizers", Json::array()}};
    outer["normalizers"].push_back(std::move(json));
    json = std::move(outer);
  }
  return json;
}
const Json kBytes = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};

INSTANTIATE_TEST_SUITE_P(
    OtherKinds,
    Refused,
    testing::Values(
        Refusal{"WordPiece", "/model/type", "WordPiece", {"model.type", "\"WordPiece\""}, true},
        Refusal{"Unigram", "/model/type", "Unigram", {"model.type", "\"Unigram\""}, true},
        Refusal{"WordLevel", "/model/type", "WordLevel", {"model.type", "\"WordLevel\""}, true},
        Refusal{"SentencePieceBpe",
                "/model",
                {{"type", "BPE"},
                 {"byte_fallback", true},
                 {"vocab", {{"<unk>", 0}, {"<0x0A>", 1}}},
                 {"merges", Json::array()}},
                {"model", "SentencePiece BPE"},
                true},
        Refusal{"ModelOfNoType", "/model", Json::object(), {"model", "\"merges\""}, true},
        Refusal{"Metaspace",
                "/pre_tokenizer",
                {{"type", "Metaspace"}, {"replacement", "_"}},
                {"pre_tokenizer.type", "\"Metaspace\""},
                true},
        Refusal{"NoPreTokenizer", "/pre_tokenizer", nullptr, {"pre_tokenizer", "ByteLevel"}, true},
        Refusal{
            "OnlySplit", "/pre_tokenizer", split_with("a"), {"pre_tokenizer", "ByteLevel"}, true},
        Refusal{"AfterByteLevel",
                "/pre_tokenizer",
                sequence_of(kBytes, split_with("a")),
                {"pre_tokenizer.pretokenizers[1].type", "\"Split\"", "ByteLevel"},
                true},
        Refusal{"Behavior",
                "/pre_tokenizer",
                sequence_of(split_with("a", "Sideways"), kBytes),
                {"pretokenizers[0].behavior", "\"Sideways\""},
                true},
        Refusal{"Pattern",
                "/pre_tokenizer",
                sequence_of(split_with("a(?<name>b)"), kBytes),
                {"pretokenizers[0].pattern.Regex", "a(?<name>b)", "(?<n"},
                true},
        Refusal{"ClassIntersection",
                "/pre_tokenizer",
                sequence_of(split_with("[a&&b]"), kBytes),
                {"pattern.Regex", "&&"},
                true},
        Refusal{"UnknownProperty",
                "/pre_tokenizer",
                sequence_of(split_with("\\p{Klingon}"), kBytes),
                {"pattern.Regex", "Klingon"},
                true},
        Refusal{"UnclosedGroup",
                "/pre_tokenizer",
                sequence_of(split_with("(a"), kBytes),
                {"pattern.Regex", "(a"},
                true},
        Refusal{"Normalizer",
                "/normalizer",
                {{"type", "Lowercase"}},
                {"normalizer.type", "\"Lowercase\""},
                true},
        Refusal{"NormalizerInSequence",
                "/normalizer",
                {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}, {{"type", "NFKC"}}}}},
                {"normalizer.normalizers[1].type", "\"NFKC\""},
                true},
        Refusal{"ContinuingPrefix",
                "/model/continuing_subword_prefix",
                "##",
                {"model.continuing_subword_prefix", "\"##\""},
                true},
        Refusal{"WordSuffix",
                "/model/end_of_word_suffix",
                "</w>",
                {"model.end_of_word_suffix", "\"</w>\""},
                true},
        Refusal{"Dropout", "/model/dropout", 0.1, {"model.dropout", "0.1"}, true},
        Refusal{"PostProcessor",
                "/post_processor",
                {{"type", "Magic"}},
                {"post_processor.type", "\"Magic\""},
                true},
        Refusal{"DeepNesting", "/normalizer", nested_sequences(1000), {"normalizer"}, true}),
    [](const auto& instance) { return std::string(instance.param.name); });

INSTANTIATE_TEST_SUITE_P(
    Damaged,
    Refused,
    testing::Values(
        Refusal{"Version", "/version", "3.0", {"version", "\"3.0\""}},
        Refusal{"NoModel", "/model", nullptr, {"model"}},
        Refusal{"ModelIsAList", "/model", Json::array(), {"model", "an array", "want an object"}},
        Refusal{"NoVocab", "/model/vocab", nullptr, {"model", "\"vocab\""}},
        Refusal{"EmptyVocab", "/model/vocab", Json::object(), {"model.vocab", "empty"}},
        Refusal{"VocabIsAList", "/model/vocab", Json::array(), {"model.vocab", "an array"}},
        Refusal{"NegativeId", "/model/vocab/a", -1, {"model.vocab[\"a\"]", "-1", "[0, "}},
        Refusal{"HugeId", "/model/vocab/a", 2147483648, {"model.vocab[\"a\"]", "2147483648"}},
        Refusal{"EndlessId", "/model/vocab/a", 1e300, {"model.vocab[\"a\"]", "1e+300"}},
        Refusal{"FractionalId", "/model/vocab/a", 1.5, {"model.vocab[\"a\"]", "1.5"}},
        Refusal{"TextForAnId", "/model/vocab/a", "1", {"model.vocab[\"a\"]", "\"1\""}},
        Refusal{"DuplicateId", "/model/vocab/a", 0, {"model.vocab", "id 0", "\"!\"", "\"a\""}},
        Refusal{"NoMerges", "/model/merges", nullptr, {"model", "\"merges\""}},
        Refusal{"MergesAreText", "/model/merges", "a b", {"model.merges", "\"a b\"", "an array"}},
        Refusal{"MergeOfUnknownToken",
                "/model/merges/3",
                "a \u4e2d",
                {"model.merges[3]", "\"\u4e2d\"", "model.vocab"}},
        Refusal{"MergeToUnknownToken", "/model/merges/3", "! !", {"model.merges[3]", "\"!!\""}},
        Refusal{"MergeOfOne", "/model/merges/3", "abc", {"model.merges[3]", "\"abc\""}},
        Refusal{"MergeOfThree", "/model/merges/3", {"a", "b", "c"}, {"model.merges[3]"}},
        Refusal{"MergeOfNumbers",
                "/model/merges/3",
                {1, 2},
                {"model.merges[3][0]", "1", "want a string"}},
        Refusal{"FlagIsText",
                "/model/ignore_merges",
                "yes",
                {"model.ignore_merges", "\"yes\"", "true or false"}},
        Refusal{"AddedTokensAreAnObject",
                "/added_tokens",
                Json::object(),
                {"added_tokens", "an object"}},
        Refusal{"AddedTokenLacksAField",
                "/added_tokens/0",
                {{"id", 1}, {"content", "x"}},
                {"added_tokens[0]", "\"single_word\""}},
        Refusal{"AddedTokenWithNegativeId", "/added_tokens/0/id", -5, {"added_tokens[0].id", "-5"}},
        Refusal{"TypeIsANumber",
                "/pre_tokenizer/type",
                7,
                {"pre_tokenizer.type", "7", "want a string"}},
        Refusal{"ByteLevelLacksAField",
                "/pre_tokenizer",
                {{"type", "ByteLevel"}},
                {"pre_tokenizer", "\"add_prefix_space\""}},
        Refusal{"TemplateLacksItsToken",
                "/post_processor",
                {{"type", "TemplateProcessing"},
                 {"single", {{{"SpecialToken", {{"id", "<s>"}}}}}},
                 {"special_tokens", Json::object()}},
                {"post_processor.special_tokens", "\"<s>\""}}),
    [](const auto& instance) { return std::string(instance.param.name); });

TEST(Tokenizer, ByteFallbackAndUnknownTokenMatterOnlyWhereBytesLack) {
  Json json = changed("/model/byte_fallback", true);
  json["model"]["unk_token"] = "<none>";
  EXPECT_FALSE(tokenizer_from(json).encode("the").empty());
  json = fixture_json("unknown.json");
  json["model"]["byte_fallback"] = true;
  EXPECT_NE(message_of<IoError>([&] { tokenizer_from(json); }).find("model.byte_fallback is true"),
            std::string::npos);
  json = fixture_json("unknown.json");
  json["model"]["unk_token"] = "<none>";
  EXPECT_NE(
      message_of<IoError>([&] { tokenizer_from(json); }).find("model.unk_token is \"<none>\""),
      std::string::npos);
}

TEST(Tokenizer, FilesThatAreNoneAreRefusedByName) {
  const TemporaryFolder folder;
  const std::string whole = contents(fixture("gpt2.json"));
  const std::pair<const char*, std::string> files[] = {
      {"empty.json", ""},
      {"truncated.json", whole.substr(0, whole.size() / 2)},
      {"text.json", "hello"},
      {"number.json", "17"},
      {"list.json", "[]"},
      {"deep.json", std::string(1'000'000, '[')},
      {"deep_but_closed.json", std::string(100'000, '[') + std::string(100'000, ']')},
      {"latin1.json", "{\"version\": \"\xE9\"}"},
      {"surrogate.json", R"({"version": "\ud800"})"},
  };
  for (const auto& [name, bytes] : files) {
    const std::string path = test::write(folder, name, bytes);
    const std::string message = message_of<IoError>([&] { Tokenizer::from_file(path); });
    EXPECT_EQ(message.rfind(path + ": ", 0), 0u) << name << ": " << message;
    EXPECT_LT(message.size(), 600u) << name;
  }
  const std::string sentencepiece = test::write(folder, "tokenizer.model", "\n\x0E\n\x05<unk>");
  EXPECT_EQ(message_of<IoError>([&] {
              Tokenizer::from_file(sentencepiece);
            }).rfind(sentencepiece + ": is a SentencePiece or tiktoken model: only byte-level", 0),
            0u);
  for (const std::string& path : {folder.file("missing.json"), folder.path().string()}) {
    EXPECT_EQ(message_of<IoError>([&] { Tokenizer::from_file(path); }).rfind(path + ": ", 0), 0u);
  }
}

}  // namespace
}  // namespace lexico
