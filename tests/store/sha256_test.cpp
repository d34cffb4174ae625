#include "lexico/sha256.h"

#include <gtest/gtest.h>
#include <fstream>

#include "lexico/error.h"
#include "support/temporary_folder.h"

namespace lexico {
namespace {

std::string sum_of(const std::string& text) {
  Sha256 sum;
  sum.update(text);
  return sum.finish();
}

TEST(Sha256, AgreesWithTheStandardsExamples) {
  EXPECT_EQ(sum_of(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sum_of("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sum_of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sum_of(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, DoesNotDependOnThePieces) {
  std::string text;
  for (int i = 0; i < 300; ++i) text += static_cast<char>(i * 7);
  for (std::size_t cut = 0; cut <= text.size(); ++cut) {
    Sha256 sum;
    sum.update(text.substr(0, cut));
    sum.update(text.substr(cut));
    ASSERT_EQ(sum.finish(), sum_of(text)) << cut;
  }
}

TEST(Sha256, OfAFileIsThatOfItsBytes) {
  const test::TemporaryFolder folder;
  const std::string text(3'000'001, 'x');
  std::ofstream(folder.file("file"), std::ios::binary) << text;
  EXPECT_EQ(sha256_of_file(folder.file("file")), sum_of(text));
}

TEST(Sha256, MissingFileIsNamed) {
  try {
    (void)sha256_of_file("/no/such/file");
    FAIL();
  } catch (const IoError& error) {
    EXPECT_STREQ(error.what(), "/no/such/file: No such file or directory");
  }
}

}  // namespace
}  // namespace lexico
