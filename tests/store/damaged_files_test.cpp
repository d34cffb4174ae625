// No damage to an activation file may crash or hang its reader. Each damaged file is read in a
// child process: HDF5 is a C library with a history of such bugs, and a crash of the child is what
// the test looks for.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cstdint>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "lexico/activations.h"
#include "lexico/error.h"
#include "store/sample_activations.h"
#include "support/temporary_folder.h"

namespace lexico {
namespace {

void read_everything(const std::string& path) {
  ActivationReader reader(path);
  const ActivationInfo& info = reader.info();
  if (reader.num_rows() * info.head_dim > (1 << 24)) return;
  std::vector<float> rows(static_cast<std::size_t>(reader.num_rows() * info.head_dim));
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(info.num_tokens));
  for (int layer = 0; layer < info.num_layers; ++layer) {
    for (Kind kind : kBothKinds) reader.read(layer, kind, 0, reader.num_rows(), rows.data());
    (void)reader.query_second_moment(layer);
  }
  for (int field = 0; field < 3; ++field)
    reader.read_tokens(0,
                       info.num_tokens,
                       field == 0 ? tokens.data() : nullptr,
                       field == 1 ? tokens.data() : nullptr,
                       field == 2 ? tokens.data() : nullptr);
}

struct Outcome {
  int refused = 0, read = 0, wrong = 0, crashed = 0;
  std::string first_crash;
};

/// Reads `count` damaged files, many in one child; after a crash the next child goes on behind it.
Outcome read_damaged(const std::string& folder,
                     int count,
                     const std::function<std::string(int)>& damaged) {
  Outcome outcome;
  for (int next = 0; next < count;) {
    int report[2];
    EXPECT_EQ(::pipe(report), 0);
    const pid_t child = ::fork();
    if (child == 0) {
      for (int i = next; i < count; ++i) {
        ::alarm(5);
        const std::string path = folder + "/damaged.h5";
        ::unlink(path.c_str());  // file systems sync a file that is cut to nothing and rewritten
        std::ofstream(path, std::ios::binary) << damaged(i);
        char result = 'w';
        try {
          read_everything(path);
          result = 'r';
        } catch (const IoError&) {
          result = 'i';
        } catch (const std::exception& error) {
          std::fprintf(stderr, "case %d: %s\n", i, error.what());
        }
        if (::write(report[1], &result, 1) != 1) ::_exit(1);
      }
      ::_exit(0);
    }
    ::close(report[1]);
    for (char result; ::read(report[0], &result, 1) == 1; ++next)
      ++(result == 'r' ? outcome.read : result == 'i' ? outcome.refused : outcome.wrong);
    ::close(report[0]);
    int status = 0;
    ::waitpid(child, &status, 0);
    if (outcome.crashed == 20) break;
    if (next < count) {
      ++outcome.crashed;
      if (outcome.first_crash.empty())
        outcome.first_crash = "case " + std::to_string(next) + ", status " + std::to_string(status);
      ++next;
    }
  }
  return outcome;
}

class DamagedFile : public ::testing::Test {
 protected:
  void SetUp() override {
    std::vector<float> moments(2 * 3 * 20 * 20, 1.0f);
    test::write_sample(folder_.file("good.h5"), test::sample_info(20), 0, moments.data());
    good_ = test::bytes_of(folder_.file("good.h5"));
    ASSERT_FALSE(good_.empty());
  }

  test::TemporaryFolder folder_;
  std::string good_;
};

TEST_F(DamagedFile, CutOffAnywhereIsRefused) {
  const int count = 150;
  const Outcome outcome = read_damaged(folder_.path(), count, [&](int i) {
    return good_.substr(0, good_.size() * static_cast<std::size_t>(i) / count);
  });
  EXPECT_EQ(outcome.refused, count);
  EXPECT_EQ(outcome.crashed, 0) << outcome.first_crash;
}

/// Offsets of bytes that are not zero: metadata and data, less the padding of chunks.
std::vector<std::size_t> used_bytes(const std::string& bytes) {
  std::vector<std::size_t> used;
  for (std::size_t i = 0; i < bytes.size(); ++i)
    if (bytes[i] != 0) used.push_back(i);
  return used;
}

TEST_F(DamagedFile, FlippedBitsNeverCrash) {
  const std::vector<std::size_t> used = used_bytes(good_);
  const int count = 800;
  const Outcome outcome = read_damaged(folder_.path(), count, [&](int i) {
    std::mt19937_64 random(static_cast<std::uint64_t>(i));
    std::string bytes = good_;
    // Half of the cases hit the first 8 KiB, where most of the metadata are.
    for (int flips = 1 + i % 4; flips > 0; --flips) {
      const std::size_t at = i % 2 == 0 ? used[random() % used.size()] : random() % 8192;
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8));
    }
    return bytes;
  });
  EXPECT_EQ(outcome.crashed, 0) << outcome.first_crash;
  EXPECT_EQ(outcome.wrong, 0);
  EXPECT_GT(outcome.refused, count / 10);
}

TEST_F(DamagedFile, OverwrittenStretchesNeverCrash) {
  const int count = 400;
  const Outcome outcome = read_damaged(folder_.path(), count, [&](int i) {
    std::mt19937_64 random(static_cast<std::uint64_t>(i) + 1'000'000);
    std::string bytes = good_;
    const std::size_t at = random() % (i % 2 == 0 ? bytes.size() : 8192);
    const std::size_t length = std::min<std::size_t>(1 + random() % 200, bytes.size() - at);
    for (std::size_t j = 0; j < length; ++j)
      bytes[at + j] = i % 3 == 0 ? '\xff' : i % 3 == 1 ? '\0' : static_cast<char>(random());
    return bytes;
  });
  EXPECT_EQ(outcome.crashed, 0) << outcome.first_crash;
  EXPECT_EQ(outcome.wrong, 0);
}

}  // namespace
}  // namespace lexico
