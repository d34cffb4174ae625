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
#include "lexico/fit_codes.h"
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

// Means, maps, formats of each kind, dictionaries per head, and two layers that share atoms.
DictionarySet rich_set() {
  DictionarySet set = random_set(4, 24, 8);
  detail::Random random({2});
  std::vector<float> sample(400 * 8);
  for (float& v : sample) v = static_cast<float>(random.normal());
  const auto fit = [&](Dictionary& d, int heads) {
    CodeFitOptions options;
    options.max_atoms = 2;
    options.weight_bits = 3;
    options.residual_bits = 11;
    options.threads = 1;
    d.format = fit_codes(d, sample.data(), 400, heads, options);
  };
  Dictionary& first = set.dictionaries[0];
  first.transform.heads = 2;
  first.transform.mean = head_means(sample.data(), 400, 8, 2);
  std::vector<float> metric(2 * 64);
  for (int d = 0; d < 8; ++d)
    metric[static_cast<std::size_t>(9 * d)] = metric[static_cast<std::size_t>(64 + 9 * d)] =
        static_cast<float>(1 + d);
  set_metric(first.transform, metric, 2, 8, 0.2);
  first.transform.unit_scale = true;
  fit(first, 2);
  set.dictionaries[1].format.coding = CodeFormat::Coding::kFp8Int16;
  set.dictionaries[1].format.max_atoms = 6;
  Dictionary second_head = set.dictionaries[2];
  set.dictionaries[2].head = 0;
  set.dictionaries[2].transform.mean.assign(8, 0.5f);
  second_head.head = 1;
  normalize_atoms(second_head.atoms, 24, 8);
  set.dictionaries.insert(set.dictionaries.begin() + 3, second_head);
  fit(set.dictionaries[3], 1);
  Dictionary& shared = set.dictionaries[8];  // layer 3 values, with the atoms of layer 1
  shared.atoms = set.dictionaries[4].atoms;
  shared.shares_atoms_with = 1;
  fit(shared, 1);
  set.metadata["rope"] = R"({"kind": "default"})";
  return set;
}

TEST(Dictionaries, TransformsFormatsHeadsAndSharingAreReadBack) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("d.safetensors");
  const DictionarySet set = rich_set();
  write_dictionaries(set, path);
  const DictionarySet read = read_dictionaries(path);
  ASSERT_EQ(read.dictionaries.size(), set.dictionaries.size());
  EXPECT_EQ(read.metadata.at("rope"), set.metadata.at("rope"));
  EXPECT_FALSE(read.metadata.contains("layers.00.keys"));
  for (std::size_t i = 0; i < set.dictionaries.size(); ++i) {
    const Dictionary &a = set.dictionaries[i], &b = read.dictionaries[i];
    EXPECT_EQ(a.layer, b.layer);
    EXPECT_EQ(a.kind, b.kind);
    EXPECT_EQ(a.head, b.head);
    EXPECT_EQ(a.atoms, b.atoms);
    EXPECT_EQ(a.shares_atoms_with, b.shares_atoms_with);
    EXPECT_EQ(a.transform.heads, b.transform.heads);
    EXPECT_EQ(a.transform.mean, b.transform.mean);
    EXPECT_EQ(a.transform.map, b.transform.map);
    EXPECT_EQ(a.transform.back_map, b.transform.back_map);
    EXPECT_EQ(a.transform.unit_scale, b.transform.unit_scale);
    EXPECT_STREQ(a.format.name(), b.format.name());
    EXPECT_EQ(a.format.max_atoms, b.format.max_atoms);
    EXPECT_EQ(a.format.weight_levels, b.format.weight_levels);
    EXPECT_EQ(a.format.scale_low, b.format.scale_low);
    EXPECT_EQ(a.format.scale_step, b.format.scale_step);
    EXPECT_EQ(a.format.residual.bits, b.format.residual.bits);
    EXPECT_EQ(a.format.residual.axes, b.format.residual.axes);
    EXPECT_EQ(a.format.residual.mean, b.format.residual.mean);
    EXPECT_EQ(a.format.residual.levels, b.format.residual.levels);
    EXPECT_EQ(a.format.residual.states, b.format.residual.states);
  }
  // Shared atoms are in the file once, and what was read is written alike.
  EXPECT_EQ(read_file(path).find("layers.03.values.atoms"), std::string::npos);
  DictionarySet again = read;
  write_dictionaries(again, folder.file("again"));
  EXPECT_EQ(read_file(folder.file("again")), read_file(path));
}

TEST(Dictionaries, OneForAllHeadsServesEachAndOneOfAHeadOnlyItsOwn) {
  const DictionarySet set = rich_set();
  EXPECT_EQ(set.find(1, Kind::kKeys), nullptr);
  EXPECT_EQ(set.find(1, Kind::kKeys, 1)->head, 1);
  EXPECT_EQ(set.find(1, Kind::kKeys, 2), nullptr);
  EXPECT_EQ(set.find(0, Kind::kKeys, 1), set.find(0, Kind::kKeys));
}

TEST(Dictionaries, WhatCannotBeWrittenIsNamed) {
  const test::TemporaryFolder folder;
  const auto expect = [&](const char* part, auto&& change) {
    DictionarySet set = rich_set();
    change(set.dictionaries);
    try {
      write_dictionaries(set, folder.file("d"));
      ADD_FAILURE() << part;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
    EXPECT_FALSE(std::filesystem::exists(folder.file("d")));
  };
  using Dictionaries = std::vector<Dictionary>;
  expect("layers.00.keys: mean holds", [](Dictionaries& d) { d[0].transform.mean.pop_back(); });
  expect("not the inverse", [](Dictionaries& d) { d[0].transform.map[0] = 0; });
  expect("without the other", [](Dictionaries& d) { d[0].transform.map.clear(); });
  expect("heads is 0", [](Dictionaries& d) { d[0].transform.heads = 0; });
  expect("the transform 3 heads", [](Dictionaries& d) {
    d[0].transform = {};
    d[0].transform.heads = 3;
  });
  expect("layers.01.keys.head.0: it serves one head", [](Dictionaries& d) {
    d[2].transform.heads = 2;
    d[2].transform.mean.clear();
  });
  expect("weight_bits is 12", [](Dictionaries& d) { d[0].format.weight_bits = 12; });
  expect("two dictionaries layers.01.keys.head.1", [](Dictionaries& d) { d[2].head = 1; });
  expect("shares_atoms_with is 1", [](Dictionaries& d) { d[8].atoms[0] += 1; });
  expect("shares_atoms_with is 9", [](Dictionaries& d) { d[8].shares_atoms_with = 9; });
}

TEST(Dictionaries, DamagedTablesAreRefusedOrReadButNeverCrash) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("d.safetensors");
  write_dictionaries(rich_set(), path);
  const std::string whole = read_file(path);
  detail::Random random({3});
  int refused = 0;
  for (int i = 0; i < 600; ++i) {
    std::string bytes = whole;
    // The header in most rounds, where every flip has a meaning; else anywhere.
    const std::size_t reach = i % 4 == 0 ? bytes.size() : std::min<std::size_t>(5000, bytes.size());
    for (int flips = 0; flips < 2; ++flips)
      bytes[random.below(reach)] =
          static_cast<char>(i % 3 == 0 ? random.next() : '0' + random.below(10));
    if (i % 10 == 9) bytes.resize(random.below(bytes.size()));
    std::ofstream(path, std::ios::binary) << bytes;
    try {
      for (const Dictionary& d : read_dictionaries(path).dictionaries) {
        if (d.format.coding == CodeFormat::Coding::kExact) continue;
        Codec codec(d);  // what was read is usable
        std::vector<std::uint8_t> code(static_cast<std::size_t>(codec.bytes_per_vector()), 0xff);
        std::vector<float> vector(static_cast<std::size_t>(d.dim));
        codec.decode(code.data(), 1, vector.data());
      }
    } catch (const IoError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 300);
}

TEST(Dictionaries, EveryTableOutOfBoundsIsNamed) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("d.safetensors");
  write_dictionaries(rich_set(), path);
  const std::string whole = read_file(path);
  const auto expect = [&](const std::string& from, const std::string& to, const char* part) {
    ASSERT_EQ(from.size(), to.size());
    std::string bytes = whole;
    const std::size_t at = bytes.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    write_file(path, bytes.replace(at, from.size(), to));
    const std::string message = message_of(path);
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_NE(message.find(path), std::string::npos) << message;
  };
  expect(R"(\"weight_bits\":3)", R"(\"weight_bits\":9)", "layers.00.keys");
  expect(R"(\"scale_bits\":8)", R"(\"scale_bits\":9)", "scale_bits is 9");
  expect(R"(\"max_atoms\":2)", R"(\"max_atoms\":7)", "weight_levels");
  expect(R"(\"residual_states\":8)", R"(\"residual_states\":7)", "residual.states is 7");
  expect(R"(\"residual_groups\":2)", R"(\"residual_groups\":1)", "its shape is [2, ");
  expect(R"(\"shares_atoms_with\":1)", R"(\"shares_atoms_with\":7)", "shares_atoms_with is 7");
  expect(R"(fp8-int16)", R"(fp8-int99)", "must be exact, fp8-int16 or packed");
  expect("layers.00.keys.mean", "layers.00.keys.meen", "'.meen' is no table");
  expect("layers.00.keys.atoms", "layers.05.keys.atoms", "layers.00.keys");
  expect(
      "layers.01.keys.head.0.mean", "layers.01.keys.head.7.mean", "no atoms layers.01.keys.head.7");
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
