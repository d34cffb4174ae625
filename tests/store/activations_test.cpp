#include "lexico/activations.h"

#include <gtest/gtest.h>
#include <hdf5.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>

#include "lexico/error.h"
#include "lexico/rope.h"
#include "store/half.h"
#include "store/sample_activations.h"
#include "support/message_of.h"
#include "support/temporary_folder.h"

namespace lexico {
namespace {

namespace fs = std::filesystem;
using test::sample_info;
using test::sample_value;
using test::SampleBatch;
using test::TemporaryFolder;
using test::write_sample;

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

void expect_vectors(ActivationReader& reader, std::int64_t first_token, float tolerance) {
  const ActivationInfo& info = reader.info();
  const auto dim = static_cast<std::size_t>(info.head_dim);
  for (int layer = 0; layer < info.num_layers; ++layer)
    for (Kind kind : kBothKinds) {
      std::vector<float> rows(static_cast<std::size_t>(reader.num_rows()) * dim);
      reader.read(layer, kind, 0, reader.num_rows(), rows.data());
      for (std::int64_t r = 0; r < reader.num_rows(); ++r)
        for (std::size_t i = 0; i < dim; ++i)
          ASSERT_NEAR(rows[static_cast<std::size_t>(r) * dim + i],
                      sample_value(layer,
                                   kind,
                                   first_token + r / info.kv_heads,
                                   r % info.kv_heads,
                                   static_cast<std::int64_t>(i)),
                      tolerance)
              << layer << " " << name_of(kind) << " row " << r;
    }
}

TEST(Activations, RowsComeBackByTokenAndHead) {
  const TemporaryFolder folder;
  const std::string path = folder.file("a.h5");
  write_sample(
      path,
      sample_info(1537));  // 4611 rows: two whole chunks and a part, and a short last sequence
  ActivationReader reader(path);
  EXPECT_EQ(reader.num_rows(), 1537 * 3);
  EXPECT_TRUE(reader.is_half());
  expect_vectors(reader, 0, 1.0f / 2048);  // half an ulp of a half in [0.5, 1)
}

TEST(Activations, SizesThatLookLikeAddressesAreNotTakenForDamage) {
  const TemporaryFolder folder;
  for (int dim : {8, 16, 20, 64}) {
    ActivationInfo info = sample_info(2048);  // the byte at which a file's texts begin
    info.kv_heads = 1;
    info.head_dim = dim;
    write_sample(folder.file("a.h5"), info);
    EXPECT_EQ(ActivationReader(folder.file("a.h5")).num_rows(), 2048);
  }
}

TEST(Activations, Float32IsExact) {
  const TemporaryFolder folder;
  ActivationInfo info = sample_info(700);
  info.half = false;
  write_sample(folder.file("a.h5"), info);
  ActivationReader reader(folder.file("a.h5"));
  EXPECT_FALSE(reader.is_half());
  expect_vectors(reader, 0, 0.0f);
  std::vector<std::uint16_t> bits(20);
  EXPECT_HAS(test::message_of<InvalidArgument>(
                 [&] { reader.read_half(0, Kind::kKeys, 0, 1, bits.data()); }),
             "stores float32");
}

TEST(Activations, TheInfoComesBack) {
  const TemporaryFolder folder;
  ActivationInfo info = sample_info(25);
  info.key_stage = KeyStage::kPreRope;
  info.rope = R"({"kind":"none"})";
  info.shard_index = 0, info.shard_count = 3;
  write_sample(folder.file("a.h5"), info);
  const ActivationInfo got = ActivationReader(folder.file("a.h5")).info();
  EXPECT_EQ(got.model, info.model);
  EXPECT_EQ(got.model_sha256, info.model_sha256);
  EXPECT_EQ(got.corpora, info.corpora);
  EXPECT_EQ(got.corpus_documents, info.corpus_documents);
  EXPECT_EQ(got.key_stage, KeyStage::kPreRope);
  EXPECT_EQ(got.rope, info.rope);
  EXPECT_EQ(got.num_tokens, 25);
  EXPECT_EQ(got.seed, info.seed);
  EXPECT_EQ(got.sequence_length, 10);
  EXPECT_EQ(got.bos, "always");
  EXPECT_EQ(got.version, "0.1.0");
  EXPECT_EQ(got.command_line, info.command_line);
  EXPECT_EQ(got.plan_hash, "plan");
  EXPECT_EQ(got.shard_count, 3);
  EXPECT_TRUE(got.complete);
}

TEST(Activations, KeysComeInTheStageThatIsAskedFor) {
  const TemporaryFolder folder;
  ActivationInfo info = sample_info(55);
  Rope rope;
  rope.kind = "default";
  rope.rotary_dim = 8;
  rope.inverse_frequencies = {1.0, 0.3, 0.1, 0.01};
  info.rope = rope.to_json();
  for (const bool half : {true, false}) {
    info.half = half;
    write_sample(folder.file("a.h5"), info);
    ActivationReader plain(folder.file("a.h5")), turned(folder.file("a.h5"));
    turned.set_key_stage(KeyStage::kPreRope);
    EXPECT_EQ(turned.info().key_stage, KeyStage::kPreRope);
    constexpr std::int64_t kFirst = 32, kRows = 70;  // begins and ends within a token
    const auto dim = static_cast<std::size_t>(info.head_dim);
    std::vector<float> want(kRows * dim), got(want.size());
    std::vector<std::int32_t> positions;
    for (std::int64_t row = kFirst; row < kFirst + kRows; ++row)
      positions.push_back(static_cast<std::int32_t>(row / info.kv_heads % 10));
    plain.read(1, Kind::kKeys, kFirst, kRows, want.data());
    rope.undo(1, want.data(), info.head_dim, positions.data(), kRows);
    turned.read(1, Kind::kKeys, kFirst, kRows, got.data());
    for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-6) << i;
    if (half) {
      std::vector<std::uint16_t> bits(want.size());
      turned.read_half(1, Kind::kKeys, kFirst, kRows, bits.data());
      store::to_float(bits.data(), bits.size(), got.data());
      for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-3) << i;
    }
    plain.read(1, Kind::kValues, kFirst, kRows, want.data());
    turned.read(1, Kind::kValues, kFirst, kRows, got.data());
    EXPECT_EQ(got, want);
    turned.set_key_stage(KeyStage::kPostRope);  // back again: as stored
    plain.read(1, Kind::kKeys, kFirst, kRows, want.data());
    turned.read(1, Kind::kKeys, kFirst, kRows, got.data());
    EXPECT_EQ(got, want);
  }
  info.rope.clear();
  write_sample(folder.file("a.h5"), info);
  ActivationReader unknown(folder.file("a.h5"));
  EXPECT_HAS(test::message_of<IoError>([&] { unknown.set_key_stage(KeyStage::kPreRope); }),
             "no attribute 'rope'");
}

TEST(Activations, TokensComeBack) {
  const TemporaryFolder folder;
  write_sample(folder.file("a.h5"), sample_info(55));
  ActivationReader reader(folder.file("a.h5"));
  std::vector<std::int32_t> id(20), position(20), document(20);
  reader.read_tokens(35, 20, id.data(), position.data(), document.data());
  for (int i = 0; i < 20; ++i) {
    const auto at = static_cast<std::size_t>(i);
    EXPECT_EQ(id[at], 1035 + i);
    EXPECT_EQ(position[at], (35 + i) % 10);
    EXPECT_EQ(document[at], (35 + i) / 7);
  }
  reader.read_tokens(0, 5, nullptr, position.data(), nullptr);
  EXPECT_EQ(position[4], 4);
  EXPECT_HAS(test::message_of<InvalidArgument>(
                 [&] { reader.read_tokens(50, 6, id.data(), nullptr, nullptr); }),
             "of 55");
}

TEST(Activations, EqualCallsGiveEqualBytes) {
  const TemporaryFolder folder;
  write_sample(folder.file("a.h5"), sample_info(1000));
  ::sleep(1);  // HDF5 would store the second an object was made in
  write_sample(folder.file("b.h5"), sample_info(1000));
  EXPECT_EQ(test::bytes_of(folder.file("a.h5")), test::bytes_of(folder.file("b.h5")));
}

TEST(Activations, ShardsInAFolderReadAsOne) {
  const TemporaryFolder folder;
  ActivationInfo info = sample_info(30);
  info.shard_count = 3;
  for (int i = 0; i < 3; ++i) {
    info.shard_index = i;
    info.num_tokens = i == 2 ? 5 : 30;
    write_sample(folder.file("activations-0000" + std::to_string(i) + ".h5"), info, i * 30);
  }
  ActivationReader whole(folder.path().string());
  EXPECT_EQ(whole.info().num_tokens, 65);
  EXPECT_EQ(whole.files().size(), 3u);
  expect_vectors(whole, 0, 1.0f / 2048);

  std::vector<float> rows(40 * 20);
  whole.read(1, Kind::kValues, 85, 40, rows.data());  // across the border between shard 0 and 1
  EXPECT_NEAR(rows[39 * 20], sample_value(1, Kind::kValues, 124 / 3, 124 % 3, 0), 1e-3);
  std::vector<std::int32_t> id(35);
  whole.read_tokens(28, 35, id.data(), nullptr, nullptr);
  EXPECT_EQ(id[34], 1062);

  ActivationReader part(folder.file("activations-0000[12].h5"));
  EXPECT_EQ(part.info().num_tokens, 35);
  expect_vectors(part, 30, 1.0f / 2048);

  fs::remove(folder.file("activations-00001.h5"));
  EXPECT_HAS(test::message_of<IoError>([&] { ActivationReader reader(folder.path().string()); }),
             "holds 2 of 3 shards");
  write_sample(folder.file("activations-00001.h5"), info, 60);
  EXPECT_HAS(test::message_of<IoError>([&] { ActivationReader reader(folder.path().string()); }),
             "is shard 2, and so is");
}

TEST(Activations, MoreShardsThanFilesMayBeOpenAtOnce) {
  const TemporaryFolder folder;
  ActivationInfo info = sample_info(10);
  info.shard_count = 70;
  for (int i = 0; i < 70; ++i) {
    info.shard_index = i;
    write_sample(folder.file(std::to_string(100 + i)).append(".h5"), info, i * 10);
  }
  ActivationReader reader(folder.path().string());
  expect_vectors(reader, 0, 1.0f / 2048);
}

TEST(Activations, ShardsThatDoNotFitAreNamedWithTheAttribute) {
  const TemporaryFolder folder;
  write_sample(folder.file("a.h5"), sample_info(10));
  ActivationInfo other = sample_info(10);
  other.head_dim = 16;
  write_sample(folder.file("b.h5"), other);
  const std::string error =
      test::message_of<IoError>([&] { ActivationReader reader(folder.file("*.h5")); });
  EXPECT_HAS(error, "b.h5: attribute 'head_dim' is 16, but 20 in ");
  EXPECT_HAS(error, "a.h5");
  other = sample_info(10);
  other.model_sha256 = "other";
  write_sample(folder.file("b.h5"), other);
  EXPECT_HAS(test::message_of<IoError>([&] { ActivationReader reader(folder.file("*.h5")); }),
             "'model_sha256'");
  other = sample_info(10);
  other.plan_hash = "other";
  write_sample(folder.file("b.h5"), other);
  EXPECT_EQ(ActivationReader(folder.file("*.h5")).num_rows(),
            60);  // two runs: a glob may name both
  EXPECT_HAS(test::message_of<IoError>([&] { ActivationReader reader(folder.path().string()); }),
             "different runs");
}

TEST(Activations, QueryMomentsAreAveragedByTokens) {
  const TemporaryFolder folder;
  ActivationInfo info = sample_info(10);
  std::vector<float> moments(2 * 3 * 20 * 20, 1.0f);
  info.shard_count = 2;
  write_sample(folder.file("a.h5"), info, 0, moments.data());
  info.shard_index = 1;
  info.num_tokens = 30;
  moments.assign(moments.size(), 5.0f);
  write_sample(folder.file("b.h5"), info, 10, moments.data());
  ActivationReader reader(folder.path().string());
  const std::vector<float> mean = reader.query_second_moment(1);
  ASSERT_EQ(mean.size(), 3u * 20 * 20);
  EXPECT_FLOAT_EQ(mean[7], 4.0f);

  write_sample(folder.file("c.h5"), info, 10);
  EXPECT_TRUE(ActivationReader(folder.file("c.h5")).query_second_moment(0).empty());
}

TEST(Activations, OutOfBoundsIsRefused) {
  const TemporaryFolder folder;
  write_sample(folder.file("a.h5"), sample_info(10));
  ActivationReader reader(folder.file("a.h5"));
  std::vector<float> rows(40 * 20);
  EXPECT_HAS(
      test::message_of<InvalidArgument>([&] { reader.read(2, Kind::kKeys, 0, 1, rows.data()); }),
      "layer is 2, must be in [0, 2)");
  for (auto [first, count] : {std::pair{30, 1}, {-1, 1}, {0, 31}, {0, -1}})
    EXPECT_THROW(reader.read(0, Kind::kKeys, first, count, rows.data()), InvalidArgument);
  EXPECT_THROW(
      reader.read(0, Kind::kKeys, std::numeric_limits<std::int64_t>::max(), 1, rows.data()),
      InvalidArgument);
  EXPECT_NO_THROW(reader.read(0, Kind::kKeys, 30, 0, rows.data()));
}

TEST(Activations, WhatIsNoActivationFileIsNamed) {
  const TemporaryFolder folder;
  const auto open = [&](const std::string& path) {
    return test::message_of<IoError>([&] { ActivationReader reader(path); });
  };
  EXPECT_HAS(open(folder.file("none.h5")), "none.h5: No such file");
  EXPECT_HAS(open(folder.file("none*.h5")), "no file matches");
  EXPECT_HAS(open(folder.path().string()), "holds no .h5 file");
  EXPECT_HAS(open("/dev/null"), "not a regular file");
  std::ofstream(folder.file("empty.h5")).close();
  EXPECT_HAS(open(folder.file("empty.h5")), "empty.h5: is empty");
  std::ofstream(folder.file("text.h5")) << "this is no HDF5 file, but some text";
  EXPECT_HAS(open(folder.file("text.h5")), "text.h5: cannot be opened as HDF5");
  write_sample(folder.file("good.h5"), sample_info(100));
  const std::string bytes = test::bytes_of(folder.file("good.h5"));
  std::ofstream(folder.file("cut.h5"), std::ios::binary) << bytes.substr(0, bytes.size() / 2);
  EXPECT_HAS(open(folder.file("cut.h5")), "cut.h5: cannot be opened as HDF5: truncated file");
}

TEST(Activations, ValuesThatCannotBeStoredAreNamed) {
  const TemporaryFolder folder;
  const ActivationInfo info = sample_info(20);
  const auto error_with = [&](float bad, bool half) {
    ActivationInfo own = info;
    own.half = half;
    ActivationWriter writer(folder.file("a.h5"), own);
    SampleBatch batch(own, 0, 2, 10);
    // layer 1, sequence 1, head 2, position 4, component 17
    batch.values[static_cast<std::size_t>((((1 * 2 + 1) * 3 + 2) * 10 + 4) * 20 + 17)] = bad;
    return test::message_of<IoError>([&] { writer.append(batch.view); });
  };
  std::string error = error_with(std::nanf(""), true);
  EXPECT_HAS(error, "values of layer 1, token 14 of ");
  EXPECT_HAS(error, "head 2, component 17: nan is not a finite number");
  EXPECT_HAS(error_with(std::nanf(""), false), "component 17: nan is not");
  EXPECT_HAS(error_with(-std::numeric_limits<float>::infinity(), true), "-inf is not");
  error = error_with(70000.0f, true);
  EXPECT_HAS(error, "70000 is beyond float16's range");
  EXPECT_HAS(error, "--dtype float32");
  EXPECT_TRUE(fs::is_empty(folder.path()));
}

TEST(Activations, NothingUnfinishedGetsTheName) {
  const TemporaryFolder folder;
  const ActivationInfo info = sample_info(20);
  {
    ActivationWriter writer(folder.file("a.h5"), info);
    writer.append(SampleBatch(info, 0, 1, 10).view);
    EXPECT_TRUE(fs::exists(folder.file("a.h5.partial")));
    EXPECT_HAS(test::message_of<InvalidArgument>([&] { writer.finish(); }),
               "10 tokens were written, planned were 20");
    EXPECT_HAS(
        test::message_of<InvalidArgument>([&] { writer.append(SampleBatch(info, 0, 3, 10).view); }),
        "10 + 30 tokens, planned were 20");
  }
  EXPECT_TRUE(fs::is_empty(folder.path()));
  ActivationInfo none = info;
  none.num_tokens = 0;
  EXPECT_THROW(ActivationWriter(folder.file("a.h5"), none), InvalidArgument);
}

TEST(Activations, APartialFileCutOffIsNotComplete) {
  const TemporaryFolder folder;
  ActivationInfo info = sample_info(20);
  // A writer that is killed leaves its .partial: as a file of that moment it must be refused.
  if (const pid_t child = ::fork(); child == 0) {
    ActivationWriter writer(folder.file("a.h5"), info);
    writer.append(SampleBatch(info, 0, 1, 10).view);
    ::kill(::getpid(), SIGKILL);
  } else {
    ::waitpid(child, nullptr, 0);
  }
  ASSERT_TRUE(fs::exists(folder.file("a.h5.partial")));
  EXPECT_THROW(ActivationReader(folder.file("a.h5.partial")), IoError);
  write_sample(folder.file("a.h5"), info);  // over the remains
  EXPECT_FALSE(fs::exists(folder.file("a.h5.partial")));
  EXPECT_EQ(ActivationReader(folder.file("a.h5")).num_rows(), 60);
}

TEST(Activations, TwoWritersOfOneFileAreRefused) {
  const TemporaryFolder folder;
  ActivationWriter first(folder.file("a.h5"), sample_info(20));
  EXPECT_HAS(test::message_of<ResourceError>(
                 [&] { ActivationWriter second(folder.file("a.h5"), sample_info(20)); }),
             "another process is writing it");
}

TEST(Activations, WhereNothingCanBeWrittenThePathIsNamed) {
  const TemporaryFolder folder;
  EXPECT_HAS(test::message_of<ResourceError>(
                 [&] { ActivationWriter(folder.file("none/a.h5"), sample_info(20)); }),
             "none/a.h5.partial: cannot be written: No such file");
  EXPECT_HAS(
      test::message_of<ResourceError>([] { ActivationWriter("/dev/full/a.h5", sample_info(20)); }),
      "Not a directory");
}

/// Ends the child with 0 if the writer says so, its file is gone, and the process can go on and
/// exit.
int write_with_little_space(const std::string& path, rlim_t most_bytes, std::int64_t tokens) {
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const ::rlimit limit{most_bytes, most_bytes};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    int code = 1;
    try {
      write_sample(path, sample_info(tokens));
    } catch (const ResourceError& error) {
      code = std::strstr(error.what(), "File too large") != nullptr &&
                     std::strstr(error.what(), path.c_str()) != nullptr && !fs::exists(path) &&
                     !fs::exists(path + ".partial")
                 ? 0
                 : 2;
      if (code != 0) std::fprintf(stderr, "%s\n", error.what());
    }
    std::exit(code);  // with HDF5's own end, which must not hang or crash
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status;
}

TEST(Activations, NoSpaceAtAnyPointLeavesNothingBehind) {
  const TemporaryFolder folder;
  const auto bytes = static_cast<rlim_t>(ActivationWriter::file_bytes(sample_info(3000)));
  for (rlim_t most : {rlim_t{0}, rlim_t{100}, rlim_t{5000}, bytes / 4, bytes / 2, bytes * 9 / 10})
    EXPECT_EQ(write_with_little_space(folder.file("a.h5"), most, 3000), 0) << most << " bytes";
}

TEST(Activations, TheForecastOfBytesIsClose) {
  const TemporaryFolder folder;
  for (std::int64_t tokens : {1, 10, 700, 9000}) {
    ActivationInfo info = sample_info(tokens);
    std::vector<float> moments(2 * 3 * 20 * 20, 1.0f);
    write_sample(folder.file("a.h5"), info, 0, moments.data());
    const auto is = static_cast<double>(fs::file_size(folder.file("a.h5")));
    const auto said = static_cast<double>(ActivationWriter::file_bytes(info));
    EXPECT_LE(is, said);
    EXPECT_GE(is, said * 0.75 - 65536) << tokens;
  }
}

// What other programs put into such a file must not lead the reader elsewhere.
class ForeignFile : public ::testing::Test {
 protected:
  template <typename Edit>
  std::string error_after(const Edit& edit) {
    write_sample(folder_.file("a.h5"), sample_info(10));
    const hid_t file = H5Fopen((folder_.file("a.h5")).c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    EXPECT_GE(file, 0);
    edit(file);
    EXPECT_GE(H5Fclose(file), 0);
    return test::message_of<IoError>([&] { ActivationReader reader(folder_.file("a.h5")); });
  }

  TemporaryFolder folder_;
};

TEST_F(ForeignFile, ExternalLinkIsRefused) {
  write_sample(folder_.file("other.h5"), sample_info(10));
  EXPECT_HAS(
      error_after([](hid_t file) {
        H5Ldelete(file, "/layers/01/keys", H5P_DEFAULT);
        H5Lcreate_external(
            "other.h5", "/layers/01/keys", file, "/layers/01/keys", H5P_DEFAULT, H5P_DEFAULT);
      }),
      "/layers/01/keys is a link to another place");
}

TEST_F(ForeignFile, ExternalDataIsRefused) {
  EXPECT_HAS(error_after([](hid_t file) {
               H5Ldelete(file, "/layers/01/keys", H5P_DEFAULT);
               const hsize_t shape[2] = {30, 20};
               const hid_t space = H5Screate_simple(2, shape, nullptr);
               const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
               H5Pset_external(creation, "/etc/passwd", 0, 1 << 20);
               const hid_t type = H5Tcopy(H5T_IEEE_F32LE);
               H5Dclose(H5Dcreate2(
                   file, "/layers/01/keys", type, space, H5P_DEFAULT, creation, H5P_DEFAULT));
               H5Tclose(type);
               H5Pclose(creation);
               H5Sclose(space);
             }),
             "keeps its data in other files");
}

TEST_F(ForeignFile, MissingDatasetIsNamed) {
  EXPECT_HAS(error_after([](hid_t file) { H5Ldelete(file, "/layers/01/values", H5P_DEFAULT); }),
             "a.h5: dataset /layers/01/values is missing");
}

TEST_F(ForeignFile, WrongTypeAndShapeAreNamed) {
  const auto replace = [](hid_t file, hid_t type, hsize_t rows, hsize_t columns) {
    H5Ldelete(file, "/layers/00/keys", H5P_DEFAULT);
    const hsize_t shape[2] = {rows, columns};
    const hid_t space = H5Screate_simple(2, shape, nullptr);
    H5Dclose(
        H5Dcreate2(file, "/layers/00/keys", type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    H5Sclose(space);
  };
  EXPECT_HAS(error_after([&](hid_t file) { replace(file, H5T_STD_I16LE, 30, 20); }),
             "is not of type float16");
  EXPECT_HAS(error_after([&](hid_t file) { replace(file, H5T_STD_I16LE, 31, 20); }),
             "dataset /layers/00/keys has shape [31, 20], want [30, 20]");
}

TEST_F(ForeignFile, WrongAttributesAreNamed) {
  const auto set = [](hid_t file, const char* name, std::int64_t value) {
    H5Adelete(file, name);
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t attribute =
        H5Acreate2(file, name, H5T_NATIVE_INT64, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attribute, H5T_NATIVE_INT64, &value);
    H5Aclose(attribute);
    H5Sclose(space);
  };
  EXPECT_HAS(error_after([&](hid_t file) { set(file, "head_dim", 0); }),
             "a.h5: attribute 'head_dim' is 0, must be in [1, 8192]");
  EXPECT_HAS(error_after([&](hid_t file) { set(file, "key_stage", 1); }), "'key_stage' is no text");
  EXPECT_HAS(error_after([&](hid_t file) { H5Adelete(file, "key_stage"); }),
             "'key_stage' is missing");
  EXPECT_HAS(error_after([&](hid_t file) { set(file, "complete", 0); }), "is not complete");
  EXPECT_HAS(error_after([&](hid_t file) { H5Adelete(file, "contract"); }),
             "not an activation file");
}

// h5py is what users open these files with.
TEST(Activations, OpenInH5pyUnderTheDocumentedNames) {
  const std::string python = LEXICO_SOURCE_DIR "/.venv/bin/python";
  if (!fs::exists(python)) GTEST_SKIP() << "no " << python;
  const TemporaryFolder folder;
  std::vector<float> moments(2 * 3 * 20 * 20, 1.5f);
  write_sample(folder.file("a.h5"), sample_info(700), 0, moments.data());
  const std::string command =
      python + " " LEXICO_SOURCE_DIR "/tests/store/check_with_h5py.py " + (folder.file("a.h5"));
  EXPECT_EQ(std::system(command.c_str()), 0);
}

TEST(Activations, AFileMadeWithH5pyOpens) {
  const std::string python = LEXICO_SOURCE_DIR "/.venv/bin/python";
  if (!fs::exists(python)) GTEST_SKIP() << "no " << python;
  const TemporaryFolder folder;
  const std::string command =
      python + " " LEXICO_SOURCE_DIR "/tests/store/make_with_h5py.py " + (folder.file("a.h5"));
  ASSERT_EQ(std::system(command.c_str()), 0);
  ActivationReader reader(folder.file("a.h5"));
  EXPECT_EQ(reader.num_rows(), 6);
  EXPECT_EQ(reader.info().model, "");
  std::vector<float> row(4);
  reader.read(0, Kind::kValues, 5, 1, row.data());
  EXPECT_EQ(row, (std::vector<float>{20, 21, 22, 23}));
  std::int32_t id = 0;
  EXPECT_HAS(test::message_of<IoError>([&] { reader.read_tokens(0, 1, &id, nullptr, nullptr); }),
             "dataset /tokens/id is missing");
}

}  // namespace
}  // namespace lexico
