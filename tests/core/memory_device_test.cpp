// Copies to a GPU, or to one that the CPU emulates, of what the host goes on changing.
#include "core/device_memory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "lexico/device_array.h"
#include "lexico/error.h"
#include "support/device_memory.h"

namespace lexico::detail {
namespace {

class DeviceMemory : public test::DeviceTest {
 protected:
  void TearDown() override {
    DeviceTest::TearDown();
#ifdef LEXICO_DEVICE_IS_EMULATED
    EXPECT_EQ(emulated::allocated_bytes(), 0u);
#endif
  }
  static std::vector<std::uint8_t> numbers(std::size_t count, unsigned first) {
    std::vector<std::uint8_t> bytes(count);
    for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::uint8_t>((first + i) % 251);
    return bytes;
  }
};

TEST_F(DeviceMemory, UploadsMayBeOverwrittenAtOnce) {
  Uploads uploads;
  for (const std::size_t bytes :
       {std::size_t{1} << 20, std::size_t{700001}, std::size_t{5} << 20}) {
    std::vector<std::uint8_t*> copies;
    std::vector<std::uint8_t> source;
    {
      const Uploads::Session session(uploads, nullptr);
      for (unsigned i = 0; i < 9; ++i) {
        copies.push_back(upload(std::vector<std::uint8_t>(bytes)));
        source = numbers(bytes, i);
        uploads.copy(copies.back(), source.data(), bytes);
        std::fill(source.begin(), source.end(), std::uint8_t{255});
      }
    }
    for (unsigned i = 0; i < 9; ++i)
      EXPECT_EQ(download(copies[i], bytes), numbers(bytes, i)) << "copy " << i << " of " << bytes;
    release_all();
  }
}

TEST_F(DeviceMemory, RowsGoToTheirPlaces) {
  constexpr std::size_t kRows = 5, kFrom = 70, kTo = 90;
  const std::vector<std::uint8_t> source = numbers(kRows * kFrom, 3);
  std::uint8_t* const to = upload(std::vector<std::uint8_t>(kRows * kTo));
  Uploads uploads;
  {
    const Uploads::Session session(uploads, nullptr);
    uploads.copy_rows(to, kTo, source.data(), kFrom, 60, kRows);
  }
  const std::vector<std::uint8_t> found = download(to, kRows * kTo);
  for (std::size_t row = 0; row < kRows; ++row)
    for (std::size_t i = 0; i < kTo; ++i)
      ASSERT_EQ(found[row * kTo + i], i < 60 ? source[row * kFrom + i] : 0) << row << ' ' << i;
}

TEST_F(DeviceMemory, PoolGivesEveryPieceOnceAndTakesThemBack) {
  DevicePool pool(300000);
  std::set<char*> pieces;
  for (int i = 0; i < 10; ++i) pieces.insert(static_cast<char*>(pool.take()));
  ASSERT_EQ(pieces.size(), 10u);
  char* before = nullptr;
  for (char* piece : pieces) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(piece) % 256, 0u);
    EXPECT_TRUE(before == nullptr || piece - before >= 300000);
    before = piece;
  }
  for (char* piece : pieces) pool.give(piece);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(pieces.count(static_cast<char*>(pool.take())), 1u);
}

TEST_F(DeviceMemory, MirrorTakesWhatWasTouched) {
  constexpr std::size_t kRows = 3, kBytes = 100;
  const auto pool = std::make_shared<DevicePool>(kRows * kBytes);
  Uploads uploads;
  MirroredBytes bytes(kRows, kBytes, 32);
  const auto copy = [&](MirroredBytes& of) {
    const std::uint8_t* at = nullptr;
    {
      const Uploads::Session session(uploads, nullptr);
      at = of.on_device(pool, uploads);
    }
    return download(at, kRows * kBytes);
  };
  const auto host = [&](MirroredBytes& of) {
    return std::vector<std::uint8_t>(of.data(), of.data() + kRows * kBytes);
  };
  std::iota(bytes.data(), bytes.data() + kRows * kBytes, std::uint8_t{1});
  EXPECT_EQ(copy(bytes), host(bytes));
  const std::vector<std::uint8_t> old = host(bytes);
  bytes.data()[kBytes + 40] = 255;
  EXPECT_EQ(copy(bytes), old) << "not touched, not copied";
  bytes.touch(40, 41);
  EXPECT_EQ(copy(bytes), host(bytes));
  bytes.drop_copy();
  void* const given_back = pool->take();
  bytes.data()[1] = 253;  // untouched, but all of it goes again
  EXPECT_EQ(copy(bytes), host(bytes));
  pool->give(given_back);
  MirroredBytes other = bytes;
  other.data()[7] = 254;
  EXPECT_EQ(copy(other), host(other));
  EXPECT_EQ(copy(bytes), host(bytes));
}

TEST_F(DeviceMemory, ArraysHoldWhatWasWritten) {
  const std::vector<float> values{1, 2.5f, -3};
  DeviceArray array("cuda", values.size()), other("cuda:0", 3);
  array.write(values.data());
  other.write(std::vector<float>(3, 7).data());
  std::vector<float> found(3);
  array.read(found.data());
  EXPECT_EQ(found, values);
  EXPECT_EQ(array.size(), 3u);
  EXPECT_THROW(DeviceArray("cpu", 3), InvalidArgument);
}

}  // namespace
}  // namespace lexico::detail
