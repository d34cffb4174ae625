// The contract of lexico/dictionary.h: what is written is read back, and what is damaged is refused
// by name.
#include "lexico/dictionary.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#include "core/random.h"
#include "lexico/error.h"
#include "lexico/files.h"
#include "support/temporary_folder.h"

namespace lexico {
namespace {

DictionarySet random_set(int layers, int num_atoms, int dim) {
  detail::Random random({1});
  DictionarySet set;
  for (int layer = 0; layer < layers; ++layer)
    for (Kind kind : kBothKinds) {
      Dictionary d{layer,
                   kind,
                   num_atoms,
                   dim,
                   std::vector<float>(static_cast<std::size_t>(num_atoms * dim))};
      for (float& v : d.atoms) v = static_cast<float>(random.normal());
      normalize_atoms(d.atoms, num_atoms, dim);
      set.dictionaries.push_back(d);
    }
  set.metadata["model"] = "tiny \"quoted\"\n";
  return set;
}

std::string message_of(const std::string& path) {
  try {
    read_dictionaries(path);
  } catch (const IoError& e) {
    return e.what();
  }
  return "no error";
}

TEST(Dictionaries, ReadBackBitForBit) {
  const test::TemporaryFolder folder;
  DictionarySet set = random_set(12, 20, 8);
  set.key_stage = KeyStage::kPreRope;
  write_dictionaries(set, folder.file("dictionary.safetensors"));
  for (const std::string& path : {folder.file("dictionary.safetensors"), folder.path().string()}) {
    const DictionarySet read = read_dictionaries(path);
    EXPECT_EQ(read.key_stage, KeyStage::kPreRope);
    EXPECT_EQ(read.metadata.at("model"), set.metadata.at("model"));
    ASSERT_EQ(read.dictionaries.size(), 24u);
    EXPECT_EQ(read.layers().back(), 11);
    for (const Dictionary& d : set.dictionaries)
      EXPECT_EQ(read.find(d.layer, d.kind)->atoms, d.atoms);
  }
  EXPECT_FALSE(std::filesystem::exists(folder.file("dictionary.safetensors.partial")));
}

TEST(Dictionaries, AtomsAreScaledToUnitNorm) {
  std::vector<float> atoms = {3, 4, 0, 0, 0, 1e-30f, 1e30f, 0, 0};
  normalize_atoms(atoms, 3, 3);
  EXPECT_FLOAT_EQ(atoms[0], 0.6f);
  EXPECT_FLOAT_EQ(atoms[5], 1.0f);
  EXPECT_FLOAT_EQ(atoms[6], 1.0f);
  for (float bad :
       {0.0f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    std::vector<float> row = {1, 0, bad, 0};
    EXPECT_THROW(normalize_atoms(row, 2, 2), InvalidArgument);
  }
}

TEST(Dictionaries, EveryTruncationIsRefusedByName) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("d.safetensors");
  write_dictionaries(random_set(1, 6, 4), path);
  const std::string whole = read_file(path);
  for (std::size_t size = 0; size < whole.size(); size += 3) {
    write_file(path, whole.substr(0, size));
    ASSERT_NE(message_of(path).find(path), std::string::npos) << size;
  }
}

TEST(Dictionaries, DamagedHeadersNeverCrash) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("d.safetensors");
  write_dictionaries(random_set(1, 6, 4), path);
  const std::string whole = read_file(path);
  detail::Random random({3});
  for (int i = 0; i < 2000; ++i) {
    std::string bytes = whole;
    for (int flips = 0; flips < 3; ++flips)
      bytes[random.below(300)] = static_cast<char>(random.next());
    write_file(path, bytes);
    try {
      read_dictionaries(path);
    } catch (const IoError&) {
    }
  }
}

TEST(Dictionaries, WhatIsWrongIsSaid) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("d.safetensors");
  const auto with_header = [&](const std::string& header, const std::string& data) {
    std::string bytes(8, '\0');
    bytes[0] = static_cast<char>(header.size());
    write_file(path, bytes + header + data);
    return message_of(path);
  };
  const auto expect = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  expect(message_of(folder.file("missing")), "No such file");
  expect(message_of("/"), "dictionary.safetensors");
  expect(with_header(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "abcd"),
         "'a' is not a dictionary");
  expect(
      with_header(R"({"layers.00.keys.atoms":{"dtype":"I32","shape":[1,1],"data_offsets":[0,4]}})",
                  "abcd"),
      "dtype is I32");
  expect(with_header(R"({"layers.00.keys.atoms":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                     "abcd"),
         "[num_atoms, head_dim]");
  expect(
      with_header(R"({"layers.00.keys.atoms":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}})",
                  std::string(4, '\0')),
      "atom 0 has norm 0");
  expect(
      with_header(R"({"layers.00.keys.atoms":{"dtype":"F32","shape":[9,9],"data_offsets":[0,4]}})",
                  "abcd"),
      "its shape needs 324");
  expect(with_header("{}", ""), "holds no dictionary");
  expect(with_header("[1]", ""), "not a JSON object");
}

TEST(Files, WritingWhereOneMayNotNamesThePathAndLeavesNothing) {
  const test::TemporaryFolder folder;
  EXPECT_THROW(write_file("/dev/full", "text"), ResourceError);
  EXPECT_THROW(write_file(folder.file("no/such/folder"), "text"), ResourceError);
  EXPECT_THROW(write_file(folder.path().string(), "text"), ResourceError);
  EXPECT_THROW(read_file(folder.path().string()), IoError);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Random, ShuffleIsAPermutationAndTheSameForTheSameKeys) {
  std::vector<int> a(100), b(100);
  for (int i = 0; i < 100; ++i) a[static_cast<std::size_t>(i)] = b[static_cast<std::size_t>(i)] = i;
  const std::vector<int> sorted = a;
  detail::Random({1, 2}).shuffle(a);
  detail::Random({1, 2}).shuffle(b);
  EXPECT_EQ(a, b);
  EXPECT_NE(a, sorted);
  std::sort(a.begin(), a.end());
  EXPECT_EQ(a, sorted);
  detail::Random({1, 3}).shuffle(b);
  EXPECT_NE(a, b);
}

}  // namespace
}  // namespace lexico
