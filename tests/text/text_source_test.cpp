#include "lexico/text_source.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <fstream>

#include "lexico/error.h"
#include "text/fixtures.h"

namespace lexico {
namespace {

using test::fixture;
using test::message_of;
using test::TemporaryFolder;
using Bos = PackOptions::Bos;
using Ids = std::vector<std::int32_t>;

template <typename T>
std::string bytes_of(const std::vector<T>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

std::string safetensors(const std::string& header, const std::string& data) {
  const std::uint64_t size = header.size();
  return bytes_of(std::vector<std::uint64_t>{size}) + header + data;
}

TextSpec token_ids(const std::string& path) {
  TextSpec spec = TextSpec::from(path);
  spec.is_token_ids = true;
  return spec;
}

constexpr PackOptions kNoBos{.sequence_length = 4, .bos = Bos::kNone, .bos_id = -1};

class TextSource : public testing::Test {
 protected:
  std::string file(const std::string& name, std::string_view bytes) {
    return test::write(folder_, name, bytes);
  }
  PackedText read(const std::string& name,
                  std::string_view bytes,
                  const PackOptions& options = kNoBos,
                  int vocab = 0) {
    return read_packed(TextSpec::from(file(name, bytes)), &tokenizer_, options, vocab);
  }
  /// Packs documents of given ids, through a safetensors file.
  PackedText pack(const std::vector<Ids>& documents, const PackOptions& options) {
    std::string header = "{", data;
    for (std::size_t i = 0; i < documents.size(); ++i) {
      const std::size_t start = data.size();
      data += bytes_of(documents[i]);
      header += (i ? ",\"" : "\"") + std::to_string(100 + i) + R"(":{"dtype":"I32","shape":[)" +
                std::to_string(documents[i].size()) + "],\"data_offsets\":[" +
                std::to_string(start) + ',' + std::to_string(data.size()) + "]}";
    }
    return read_packed(token_ids(file("documents.safetensors", safetensors(header + '}', data))),
                       nullptr,
                       options,
                       0);
  }
  /// The error of reading such a file, which must be named first.
  std::string refusal(const std::string& name,
                      std::string_view bytes,
                      int vocab = 0,
                      bool is_ids = false) {
    TextSpec spec = TextSpec::from(file(name, bytes));
    spec.is_token_ids = is_ids;
    const std::string message =
        message_of<IoError>([&] { read_packed(spec, &tokenizer_, kNoBos, vocab); });
    EXPECT_EQ(message.rfind(spec.path + ": ", 0), 0u) << message;
    return message.substr(std::min(message.size(), spec.path.size()));
  }

  TemporaryFolder folder_;
  Tokenizer tokenizer_ = Tokenizer::from_file(fixture("llama3.json"));
};

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST(TextSpec, IsNamedAfterItsFile) {
  const TextSpec spec = TextSpec::from("some/folder/wiki.test.tokens");
  EXPECT_EQ(spec.name, "wiki.test");
  EXPECT_EQ(spec.path, "some/folder/wiki.test.tokens");
  EXPECT_EQ(spec.field, "text");
  EXPECT_FALSE(spec.is_token_ids);
}

TEST(TextSpec, NameBeforeTheFirstEqualsSign) {
  const TextSpec spec = TextSpec::from("code=some/a=b.txt");
  EXPECT_EQ(spec.name, "code");
  EXPECT_EQ(spec.path, "some/a=b.txt");
}

TEST(TextSpec, ExistingPathWinsOverTheEqualsSign) {
  const TemporaryFolder folder;
  const std::string path = test::write(folder, "a=b.txt", "text");
  EXPECT_EQ(TextSpec::from(path).path, path);
  EXPECT_EQ(TextSpec::from(path).name, "a=b");
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(folder.path());
  const TextSpec spec = TextSpec::from("a=b.txt"), other = TextSpec::from("a=c.txt");
  std::filesystem::current_path(before);
  EXPECT_EQ(spec.path, "a=b.txt");
  EXPECT_EQ(other.path, "c.txt");
}

TEST(TextSpec, NameHasNoSlash) {
  EXPECT_EQ(TextSpec::from("missing/a=b.txt").path, "missing/a=b.txt");
}

TEST(TextSpec, EmptyNameOrPathIsRefused) {
  for (const char* text : {"", "=a.txt", "a="}) {
    EXPECT_THROW(TextSpec::from(text), InvalidArgument) << text;
  }
}

TEST_F(TextSource, PackedWithoutBosDocumentsFollowEachOther) {
  const PackedText packed = pack({{1, 2, 3}, {4}, {5, 6, 7, 8, 9}}, {4, Bos::kNone, -1});
  EXPECT_EQ(packed.ids, (Ids{1, 2, 3, 4, 5, 6, 7, 8, 9}));
  EXPECT_EQ(packed.documents, (Ids{0, 0, 0, 1, 2, 2, 2, 2, 2}));
  EXPECT_EQ(packed.sequence_length, 4);
  EXPECT_EQ(packed.num_documents, 3);
  EXPECT_EQ(packed.num_tokens(), 9);
  EXPECT_EQ(packed.num_sequences(), 3);  // the last one shorter
}

TEST_F(TextSource, BosStartsEveryDocument) {
  const PackedText packed = pack({{1, 2, 3}, {4}, {5, 6}}, {4, Bos::kDocument, 9});
  EXPECT_EQ(packed.ids, (Ids{9, 1, 2, 3, 9, 4, 9, 5, 6}));
  EXPECT_EQ(packed.documents, (Ids{0, 0, 0, 0, 1, 1, 2, 2, 2}));
}

TEST_F(TextSource, BosStartsEveryDocumentAndEverySequence) {
  const PackedText packed = pack({{1, 2, 3, 4, 5}, {6, 7, 8}}, {4, Bos::kAlways, 9});
  // A sequence that starts inside a document holds sequence_length - 1 of its tokens.
  EXPECT_EQ(packed.ids, (Ids{9, 1, 2, 3, 9, 4, 5, 9, 9, 6, 7, 8}));
  EXPECT_EQ(packed.documents, (Ids{0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1}));
}

TEST_F(TextSource, DocumentAtTheStartOfASequenceHasOneBos) {
  EXPECT_EQ(pack({{1, 2, 3}, {4, 5}}, {4, Bos::kAlways, 9}).ids, (Ids{9, 1, 2, 3, 9, 4, 5}));
}

TEST_F(TextSource, BosIsNotDoubledBeforeATextThatBeginsWithIt) {
  EXPECT_EQ(pack({{9, 1}, {9, 2, 3, 9, 4}}, {4, Bos::kAlways, 9}).ids,
            (Ids{9, 1, 9, 2, 9, 3, 9, 4}));
  EXPECT_EQ(pack({{9, 1}, {2}}, {4, Bos::kDocument, 9}).ids, (Ids{9, 1, 9, 2}));
  EXPECT_EQ(pack({{9}}, {4, Bos::kAlways, 9}).ids, (Ids{9}));
  // A token of the text that is the BOS serves as that of the sequence it starts.
  EXPECT_EQ(pack({{1, 2, 3, 9, 4}}, {4, Bos::kAlways, 9}).ids, (Ids{9, 1, 2, 3, 9, 4}));
}

TEST_F(TextSource, EverySequenceBeginsWithBosWhateverTheDocuments) {
  for (int length = 2; length <= 7; ++length) {
    std::vector<Ids> documents;
    for (std::size_t i = 0; i < 30; ++i)
      documents.emplace_back(i % 11, static_cast<std::int32_t>(i % 3));
    const PackedText packed = pack(documents, {length, Bos::kAlways, 9});
    EXPECT_EQ(packed.num_documents, 27);  // three are empty
    Ids without_bos, expected;
    for (std::size_t i = 0; i < packed.ids.size(); ++i) {
      const bool starts_document = i == 0 || packed.documents[i] != packed.documents[i - 1];
      if (i % static_cast<std::size_t>(length) == 0 || starts_document) {
        EXPECT_EQ(packed.ids[i], 9);
      }
      if (packed.ids[i] != 9) without_bos.push_back(packed.ids[i]);
    }
    for (const Ids& document : documents)
      expected.insert(expected.end(), document.begin(), document.end());
    EXPECT_EQ(without_bos, expected);
  }
}

TEST_F(TextSource, OptionsThatDoNotFitAreRefused) {
  const auto message = [&](const PackOptions& options, int vocab = 0) {
    return message_of<InvalidArgument>([&] { read("a.txt", "text", options, vocab); });
  };
  EXPECT_HAS(message({0, Bos::kNone, -1}), "sequence_length is 0, must be >= 1");
  EXPECT_HAS(message({1, Bos::kAlways, 0}), "sequence_length is 1, must be >= 2");
  EXPECT_HAS(message({4, Bos::kAlways, -1}), "bos_id is -1");
  EXPECT_HAS(message({4, Bos::kDocument, 1000}, 1000), "bos_id is 1000, must be in [0, 1000)");
  EXPECT_HAS(message_of<InvalidArgument>(
                 [&] { read_packed(TextSpec::from("a.txt"), nullptr, kNoBos, 0); }),
             "a.txt: a text needs a tokenizer");
  EXPECT_NO_THROW(read("a.txt", "text", {1, Bos::kDocument, 0}));
}

TEST_F(TextSource, TxtIsOneDocument) {
  const PackedText packed = read("a.txt", "The first.\r\n\r\nThe second.\n");
  EXPECT_EQ(packed.ids, tokenizer_.encode("The first.\r\n\r\nThe second.\n"));
  EXPECT_EQ(packed.num_documents, 1);
}

TEST_F(TextSource, OtherNamesAreText) {
  for (const char* name : {"wiki.tokens", "README", "code.py"}) {
    EXPECT_EQ(read(name, "{\"text\": 1}").ids, tokenizer_.encode("{\"text\": 1}")) << name;
  }
}

TEST_F(TextSource, ByteOrderMarkIsDropped) {
  EXPECT_EQ(read("a.txt", "\xEF\xBB\xBFtext").ids, tokenizer_.encode("text"));
  EXPECT_EQ(read("a.jsonl", "\xEF\xBB\xBF{\"text\":\"text\"}").ids, tokenizer_.encode("text"));
}

TEST_F(TextSource, FewOddBytesAreReadAsReplacementCharacters) {
  EXPECT_EQ(read("a.txt", "caf\xE9").ids, tokenizer_.encode("caf\xEF\xBF\xBD"));
  EXPECT_EQ(read("a.txt", std::string_view("a\0b", 3)).ids,
            tokenizer_.encode(std::string_view("a\0b", 3)));
}

TEST_F(TextSource, WhatIsNotTextIsRefused) {
  EXPECT_HAS(refusal("a.txt", ""), "holds no text");
  EXPECT_HAS(refusal("a.txt", " \n\t\r\n \xC2\xA0\xE3\x80\x80"), "holds no text");
  EXPECT_HAS(refusal("a.txt", "\xEF\xBB\xBF"), "holds no text");
  std::string noise;
  for (unsigned i = 0; i < 1000; ++i)
    noise += static_cast<char>(i * i * 37 + i * 11 + (i >> 3) * 101);
  EXPECT_HAS(refusal("a.txt", noise), "is not UTF-8 text");
  EXPECT_HAS(refusal("a.txt", std::string(1000, '\0')), "1000 of its 1000 bytes");
  std::string utf16 = "\xFF\xFE";
  for (const char c : std::string("wide text")) utf16 += {c, '\0'};
  EXPECT_HAS(refusal("a.txt", utf16), "UTF-16");
  std::string utf16_without_mark;
  for (int i = 0; i < 30; ++i) utf16_without_mark += {'a', '\0'};
  EXPECT_HAS(refusal("a.txt", utf16_without_mark), "is not UTF-8 text");
  EXPECT_HAS(refusal("a.jsonl", "\n\n \r\n"), "holds no text");
  EXPECT_HAS(refusal("a.jsonl", "{\"text\":\"\"}\n{\"text\":\" \"}"), "holds no text");
}

TEST_F(TextSource, UnreadableFilesAreNamed) {
  const auto message = [&](const std::string& path) {
    return message_of<IoError>([&] { read_packed(TextSpec::from(path), &tokenizer_, kNoBos, 0); });
  };
  EXPECT_HAS(message(folder_.file("missing.txt")), "missing.txt: cannot be read: No such file");
  EXPECT_HAS(message(folder_.path().string()), ": is a folder");
  const std::string path = file("secret.txt", "text");
  chmod(path.c_str(), 0);
  if (std::ifstream(path)) GTEST_SKIP() << "root may read every file";
  EXPECT_HAS(message(path), "secret.txt: cannot be read: Permission denied");
}

TEST_F(TextSource, JsonlHasADocumentALine) {
  const PackedText packed = read("a.jsonl",
                                 "{\"text\":\"one\"}\r\n\n  \n{\"id\":7,\"text\":\"two "
                                 "\\u00e9\\n\"}\n{\"text\":\"\"}\n{\"text\":\"x\"}");
  Ids expected = tokenizer_.encode("one");
  Ids documents(expected.size(), 0);
  for (const auto& [text, number] : {std::pair("two \u00e9\n", 1), std::pair("x", 2)}) {
    const Ids ids = tokenizer_.encode(text);
    expected.insert(expected.end(), ids.begin(), ids.end());
    documents.insert(documents.end(), ids.size(), number);
  }
  EXPECT_EQ(packed.ids, expected);
  EXPECT_EQ(packed.documents, documents);
  EXPECT_EQ(packed.num_documents, 3);
}

TEST_F(TextSource, JsonlReadsTheFieldAskedFor) {
  TextSpec spec = TextSpec::from(file("a.jsonl", "{\"text\":\"one\",\"answer\":\"two\"}"));
  spec.field = "answer";
  EXPECT_EQ(read_packed(spec, &tokenizer_, kNoBos, 0).ids, tokenizer_.encode("two"));
}

TEST_F(TextSource, JsonlErrorsNameTheLine) {
  const std::string good = "{\"text\":\"one\"}\n\n";
  EXPECT_HAS(refusal("a.jsonl", good + "{\"text\": "), "line 3 is not JSON");
  EXPECT_HAS(refusal("a.jsonl", good + "[\"text\"]"), "line 3 is not a JSON object");
  EXPECT_HAS(refusal("a.jsonl", good + "{\"prompt\":1,\"answer\":2}"),
             "line 3 has no field \"text\" (--field); it has \"answer\", \"prompt\"");
  EXPECT_HAS(refusal("a.jsonl", good + "{}"),
             "line 3 has no field \"text\" (--field); it has none");
  EXPECT_HAS(refusal("a.jsonl", good + "{\"text\":17}"),
             "line 3: field \"text\" is of type number");
  EXPECT_HAS(refusal("a.jsonl", good + "{\"text\":null}"), "of type null, want a string");
  EXPECT_HAS(refusal("a.jsonl", good + "{\"text\":\"\xFF\"}"), "line 3 is not JSON");
  EXPECT_HAS(refusal("a.jsonl", good + std::string(1'000'000, '[')), "line 3 is not JSON");
  EXPECT_HAS(refusal("a.jsonl", "plain text"), "line 1 is not JSON");
}

TEST_F(TextSource, IdsBeyondTheModelsVocabularyAreRefused) {
  const std::string message = refusal("a.txt", "some text<|eot_id|>", 604);
  EXPECT_HAS(message, "token id 604");
  EXPECT_HAS(message, "[0, 604)");
  EXPECT_HAS(refusal("a.jsonl", "\n{\"text\":\"<|eot_id|>\"}", 604),
             "line 2: the tokenizer gives token id 604");
  EXPECT_NO_THROW(read("a.txt", "some text<|eot_id|>", kNoBos, 605));
}

TEST_F(TextSource, BinIsOneDocumentOfInt32) {
  const std::string path = file("a.bin", bytes_of(Ids{5, 0, 300}));
  const PackedText packed = read_packed(token_ids(path), nullptr, kNoBos, 301);
  EXPECT_EQ(packed.ids, (Ids{5, 0, 300}));
  EXPECT_EQ(packed.num_documents, 1);
}

TEST_F(TextSource, TokenIdsThatCannotBeAreRefused) {
  EXPECT_HAS(refusal("a.bin", bytes_of(Ids{5, 300, 7}), 300, true),
             "token id 300 at index 1 is not in [0, 300)");
  EXPECT_HAS(refusal("a.bin", bytes_of(Ids{5, 6, -2}), 0, true),
             "token id -2 at index 2 is not in [0, 2147483648)");
  EXPECT_HAS(refusal("a.bin", "12345", 0, true), "has 5 bytes");
  EXPECT_HAS(refusal("a.bin", "", 0, true), "holds no token ids");
  EXPECT_HAS(refusal("a.txt", "1 2 3", 0, true),
             "must be a .bin file (int32) or a .safetensors file");
}

TEST_F(TextSource, SafetensorsHasADocumentATensorInNameOrder) {
  const std::string data = bytes_of(std::vector<std::int64_t>{7, 8}) +
                           bytes_of(std::vector<std::uint16_t>{65535}) +
                           bytes_of(std::vector<std::uint32_t>{1, 2});
  const std::string header = R"({"b":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},)"
                             R"("c":{"dtype":"U16","shape":[1],"data_offsets":[16,18]},)"
                             R"("a":{"dtype":"U32","shape":[2],"data_offsets":[18,26]},)"
                             R"("none":{"dtype":"I32","shape":[0],"data_offsets":[26,26]},)"
                             R"("__metadata__":{"made":"here"}}  )";
  const PackedText packed = read_packed(
      token_ids(file("a.safetensors", safetensors(header, data))), nullptr, kNoBos, 65536);
  EXPECT_EQ(packed.ids, (Ids{1, 2, 7, 8, 65535}));
  EXPECT_EQ(packed.documents, (Ids{0, 0, 1, 1, 2}));
}

TEST_F(TextSource, DamagedSafetensorsAreRefused) {
  const auto message = [&](const std::string& entry,
                           const std::string& data = std::string(8, '\0')) {
    return refusal("a.safetensors", safetensors("{\"x\":" + entry + "}", data), 100, true);
  };
  EXPECT_HAS(refusal("a.safetensors", "", 0, true), "only 0 bytes");
  EXPECT_HAS(refusal("a.safetensors", std::string(8, '\xFF'), 0, true),
             "claims 18446744073709551615 bytes");
  EXPECT_HAS(refusal("a.safetensors", safetensors("not json", ""), 0, true),
             "is not a safetensors file");
  EXPECT_HAS(refusal("a.safetensors", safetensors("[]", ""), 0, true), "not an object");
  EXPECT_HAS(refusal("a.safetensors", safetensors("{}", ""), 0, true), "holds no token ids");
  EXPECT_HAS(message("7"), "tensor \"x\": has no dtype");
  EXPECT_HAS(message(R"({"dtype":"I32"})"), "tensor \"x\": has no shape");
  EXPECT_HAS(message(R"({"dtype":"I32","shape":[-2],"data_offsets":[0,8]})"), "has no shape");
  EXPECT_HAS(message(R"({"dtype":"I32","shape":[2],"data_offsets":[0]})"), "has no data_offsets");
  EXPECT_HAS(message(R"({"dtype":"I32","shape":[2],"data_offsets":[0,16]})"),
             "[0, 16] are not within the 8 bytes");
  EXPECT_HAS(message(R"({"dtype":"I32","shape":[2],"data_offsets":[8,0]})"), "data_offsets [8, 0]");
  EXPECT_HAS(message(R"({"dtype":"I32","shape":[3],"data_offsets":[0,8]})"),
             "has 8 bytes, want 3 values of 4 bytes");
  EXPECT_HAS(message(R"({"dtype":"I32","shape":[4611686018427387906],"data_offsets":[0,8]})"),
             "want 4611686018427387906");
  EXPECT_HAS(message(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})"),
             "is F32 with 1 dimensions");
  EXPECT_HAS(message(R"({"dtype":"I32","shape":[1,2],"data_offsets":[0,8]})"),
             "is I32 with 2 dimensions");
  EXPECT_HAS(
      message(R"({"dtype":"I64","shape":[1],"data_offsets":[0,8]})", std::string(7, '\0') + '\x01'),
      "tensor \"x\": token id 72057594037927936 at index 0 is not in [0, 100)");
}

TEST(PackText, PiecesOfALargeTextGiveTheIdsOfTheWhole) {
  const TemporaryFolder folder;
  std::string text = "\xEF\xBB\xBF \n\n";  // a byte order mark, then white space first
  while (text.size() < 400'000)
    text += test::contents(fixture("text.txt")) + " = Title = \n \n The  end \n\n\n\ta line\r\n";
  for (const char* name : {"gpt2.json", "llama3.json", "qwen2.json"}) {
    const Tokenizer tokenizer = Tokenizer::from_file(fixture(name));
    const TextSpec spec = TextSpec::from(test::write(folder, "long.txt", text));
    const PackOptions options{.sequence_length = 50, .bos = Bos::kAlways, .bos_id = 0};
    const PackedText whole = read_packed(spec, &tokenizer, options, 0);
    Ids ids, documents;
    std::size_t most = 0;
    pack_text(
        spec,
        &tokenizer,
        options,
        0,
        [&](const Ids& some, const Ids& their) {
          most = std::max(most, some.size());
          ids.insert(ids.end(), some.begin(), some.end());
          documents.insert(documents.end(), their.begin(), their.end());
        },
        30'000);
    EXPECT_EQ(ids, whole.ids) << name;
    EXPECT_EQ(documents, whole.documents);
    EXPECT_LT(most, whole.ids.size() / 5) << name;
    // Without BOS the ids are those of the text in one go.
    EXPECT_EQ(read_packed(spec, &tokenizer, kNoBos, 0).ids,
              tokenizer.encode(std::string_view(text).substr(3)));
  }
}

TEST(PackText, LinesAndTokenIdsMayBeCutAnywhere) {
  const TemporaryFolder folder;
  const Tokenizer tokenizer = Tokenizer::from_file(fixture("gpt2.json"));
  std::string lines;
  for (int i = 0; i < 200; ++i)
    lines += "{\"text\": \"document " + std::to_string(i * i) + "\"}" + (i < 199 ? "\n" : "");
  Ids numbers(3'000'000);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<std::int32_t>(i % 777);
  const TextSpec jsonl = TextSpec::from(test::write(folder, "a.jsonl", lines)),
                 bin = token_ids(test::write(folder, "a.bin", bytes_of(numbers)));
  const PackOptions options{.sequence_length = 10, .bos = Bos::kDocument, .bos_id = 0};
  for (const TextSpec& spec : {jsonl, bin}) {
    const PackedText whole = read_packed(spec, &tokenizer, options, 0);
    for (std::size_t piece : {7u, 64u, 5000u}) {
      Ids ids, documents;
      EXPECT_EQ(pack_text(
                    spec,
                    &tokenizer,
                    options,
                    0,
                    [&](const Ids& some, const Ids& their) {
                      ids.insert(ids.end(), some.begin(), some.end());
                      documents.insert(documents.end(), their.begin(), their.end());
                    },
                    piece),
                whole.num_documents);
      EXPECT_EQ(ids, whole.ids);
      EXPECT_EQ(documents, whole.documents);
    }
  }
  EXPECT_EQ(read_packed(bin, nullptr, kNoBos, 0).ids, numbers);
  numbers[2'999'999] = -1;
  EXPECT_HAS(message_of<IoError>([&] {
               read_packed(
                   token_ids(test::write(folder, "a.bin", bytes_of(numbers))), nullptr, kNoBos, 0);
             }),
             "token id -1 at index 2999999");
}

}  // namespace
}  // namespace lexico
