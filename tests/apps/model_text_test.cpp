// The contract of apps/common/model_text.h: one meaning of the text options for every program.
#include "common/model_text.h"

#include <gtest/gtest.h>

#include "lexico/error.h"
#include "lexico/files.h"
#include "support/message_of.h"
#include "support/temporary_folder.h"

namespace lexico::apps {
namespace {

ModelInfo model_with(int max_positions, std::int32_t bos_id, bool add_bos) {
  ModelInfo model;
  model.max_positions = max_positions;
  model.bos_id = bos_id;
  model.add_bos = add_bos;
  return model;
}

TEST(ModelText, AutoTakesWhatTheModelExpects) {
  const ModelTextConfig config;
  const PackOptions with = packing_for(config, model_with(2048, 7, true));
  EXPECT_EQ(with.bos, PackOptions::Bos::kAlways);
  EXPECT_EQ(with.bos_id, 7);
  EXPECT_EQ(with.sequence_length, 512);
  const PackOptions without = packing_for(config, model_with(128, 7, false));
  EXPECT_EQ(without.bos, PackOptions::Bos::kNone);
  EXPECT_EQ(without.sequence_length, 128);
  EXPECT_EQ(packing_for(config, model_with(128, -1, false)).bos, PackOptions::Bos::kNone);
}

TEST(ModelText, WhatTheModelCannotDoIsRefused) {
  ModelTextConfig config;
  config.model = "m.pt";
  config.sequence_length = 129;
  EXPECT_EQ(
      test::message_of<InvalidArgument>([&] { packing_for(config, model_with(128, 7, true)); }),
      "sequence_length is 129, more than the 128 positions of m.pt");
  config.sequence_length = 0;
  config.bos = "document";
  EXPECT_EQ(
      test::message_of<InvalidArgument>([&] { packing_for(config, model_with(128, -1, false)); }),
      "bos is 'document', but m.pt has no BOS token: use --bos none");
}

TEST(ModelText, EveryBosPolicyIsNamedAsItsOption) {
  for (const std::string name : {"always", "document", "none"}) {
    ModelTextConfig config;
    config.bos = name;
    config.validate();
    EXPECT_EQ(name_of(packing_for(config, model_with(128, 7, true)).bos), name);
  }
}

TEST(ModelText, TheTokenizerBesideTheModelIsFound) {
  const test::TemporaryFolder folder;
  ModelTextConfig config;
  config.model = folder.file("m.pt");
  const std::string error = test::message_of<InvalidArgument>([&] { find_tokenizer(config); });
  EXPECT_NE(error.find(folder.file("m.tokenizer.json")), std::string::npos) << error;
  EXPECT_NE(error.find("--tokenizer"), std::string::npos) << error;
  write_file(folder.file("tokenizer.json"), "{}");
  EXPECT_EQ(find_tokenizer(config), folder.file("tokenizer.json"));
  write_file(folder.file("m.tokenizer.json"), "{}");
  EXPECT_EQ(find_tokenizer(config), folder.file("m.tokenizer.json"));
  config.tokenizer = "given.json";
  EXPECT_EQ(find_tokenizer(config), "given.json");
}

}  // namespace
}  // namespace lexico::apps
