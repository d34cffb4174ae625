// The contract of common/ranks.h that needs no second process.
#include "common/ranks.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

#include "lexico/error.h"
#include "support/message_of.h"
#include "support/temporary_folder.h"

namespace lexico::apps {
namespace {

std::string gpu_of(int local_rank, const char* visible, const std::string& device) {
  setenv("LOCAL_RANK", std::to_string(local_rank).c_str(), 1);
  setenv("CUDA_VISIBLE_DEVICES", visible, 1);
  take_own_gpu({local_rank, 8, "test"}, device);
  unsetenv("LOCAL_RANK");
  return std::getenv("CUDA_VISIBLE_DEVICES");
}

TEST(Ranks, OfOneMachineTakeItsGpusInTurn) {
  EXPECT_EQ(gpu_of(0, "4,6,7", "cuda"), "4");
  EXPECT_EQ(gpu_of(5, "4,6,7", "auto"), "7");
  EXPECT_EQ(gpu_of(1, "GPU-a", "auto"), "GPU-a");    // the launcher has chosen
  EXPECT_EQ(gpu_of(1, "", "auto"), "");              // and here: none
  EXPECT_EQ(gpu_of(1, "4,6,7", "cuda:2"), "4,6,7");  // and here the user
  EXPECT_EQ(gpu_of(1, "4,6,7", "cpu"), "4,6,7");
}

TEST(Ranks, TheLeadingOneTellsItsWordToThoseThatComeLaterAndNothingIsLeft) {
  const test::TemporaryFolder folder;
  std::ofstream(folder.file(".rank-00009.alive")) << "old 1 1 1\n";
  std::ofstream(folder.file("data")) << "x";
  {
    SignOfLife leader(folder.path(), {0, 3, "test"});
    leader.say("4");
    SignOfLife first(folder.path(), {1, 3, "test"});
    EXPECT_EQ(first.wait_for_word(30), "4");
    SignOfLife second(folder.path(), {2, 3, "test"});
    EXPECT_EQ(second.wait_for_word(30), "4");
  }
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    EXPECT_EQ(entry.path().filename(), "data");
    ++files;
  }
  EXPECT_EQ(files, 1);
}

TEST(Ranks, AnAnswerOfAnEarlierStartDeceivesNobody) {
  const test::TemporaryFolder folder;
  std::ofstream(folder.file(".rank-answers")) << "12345 4\n";
  SignOfLife other(folder.path(), {1, 2, "test"});
  const std::string text = test::message_of<Interrupted>([&] { other.wait_for_word(0.3); });
  EXPECT_NE(text.find("rank 0 of 2, which prepares"), std::string::npos) << text;
}

}  // namespace
}  // namespace lexico::apps
