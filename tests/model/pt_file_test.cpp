#include "lexico/pt_file.h"

#include <gtest/gtest.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/torch.h>

#include "lexico/error.h"
#include "lexico/files.h"
#include "support/message_of.h"
#include "support/temporary_folder.h"

namespace lexico {
namespace {

using test::TemporaryFolder;

Dictionary unit(int layer, Kind kind) {  // 3 atoms of 2 dimensions
  return {layer, kind, 3, 2, {1, 0, 0, 1, 0.6f, kind == Kind::kKeys ? 0.8f : -0.8f}};
}

DictionarySet two_layers() {
  DictionarySet set;
  for (int layer : {0, 1})
    for (Kind kind : kBothKinds) set.dictionaries.push_back(unit(layer, kind));
  return set;
}

std::string save(const TemporaryFolder& folder, const torch::IValue& value) {
  const std::vector<char> bytes = torch::jit::pickle_save(value);
  write_file(folder.file("x.pt"), {bytes.data(), bytes.size()});
  return folder.file("x.pt");
}

TEST(PtFile, HoldsOneBareTensorAndComesBackUnchanged) {
  const TemporaryFolder folder;
  write_dictionaries_pt(two_layers(), folder.file("d.pt"));
  const std::string bytes = read_file(folder.file("d.pt"));
  const torch::Tensor all =
      torch::jit::pickle_load({bytes.begin(), bytes.end()}).toTensor();  // [2 layers, dim, atoms]
  ASSERT_EQ(all.sizes(), at::IntArrayRef({4, 2, 3}));
  EXPECT_EQ(all.scalar_type(), torch::kFloat32);
  EXPECT_EQ(all[1][1][2].item<float>(), -0.8f);  // layer 0, values, atom 2
  const DictionarySet back = read_dictionaries_any(folder.file("d.pt"));
  ASSERT_EQ(back.dictionaries.size(), 4u);
  for (const Dictionary& want : two_layers().dictionaries) {
    const Dictionary* found = back.find(want.layer, want.kind);
    ASSERT_NE(found, nullptr);
    for (std::size_t i = 0; i < want.atoms.size(); ++i)
      EXPECT_NEAR(found->atoms[i], want.atoms[i], 1e-6);
  }
}

TEST(PtFile, AtomsAreScaledToUnitLengthOnReading) {
  const TemporaryFolder folder;
  const std::string path = save(folder, torch::full({2, 4, 5}, 3.0, torch::kFloat64));
  EXPECT_NEAR(read_dictionaries_pt(path).dictionaries[0].atoms[0], 0.5f, 1e-6);
}

TEST(PtFile, RefusesASetThatIsNotWholeOrPreRope) {
  const TemporaryFolder folder;
  const auto write = [&](const DictionarySet& set) {
    return test::message_of<InvalidArgument>(
        [&] { write_dictionaries_pt(set, folder.file("d.pt")); });
  };
  DictionarySet set = two_layers();
  set.key_stage = KeyStage::kPreRope;
  EXPECT_NE(write(set).find("pre_rope"), std::string::npos);
  set = two_layers();
  set.dictionaries.erase(set.dictionaries.begin() + 2);
  EXPECT_NE(write(set).find("layer 1 has no keys"), std::string::npos) << write(set);
  set = two_layers();
  set.dictionaries[3] = {1, Kind::kValues, 2, 2, {1, 0, 0, 1}};
  EXPECT_NE(write(set).find("one shape"), std::string::npos);
  EXPECT_NE(write({}).find("no dictionaries"), std::string::npos);
  set = two_layers();
  set.dictionaries[3].transform.mean = {1, 0};
  EXPECT_NE(write(set).find("transform of the values of layer 1"), std::string::npos) << write(set);
  set = two_layers();
  set.dictionaries[2].head = 0;
  EXPECT_NE(write(set).find("single heads, as the keys of layer 1"), std::string::npos) << write(set);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(PtFile, RefusesWhatIsNoSuchTensor) {
  const TemporaryFolder folder;
  const auto read = [](const std::string& path) {
    return test::message_of<IoError>([&] { read_dictionaries_pt(path); });
  };
  EXPECT_NE(read(folder.file("none.pt")).find("none.pt"), std::string::npos);
  EXPECT_NE(read(save(folder, torch::ones({3, 2, 2}))).find("[3, 2, 2]"), std::string::npos);
  EXPECT_NE(read(save(folder, torch::ones({2, 2, 2}, torch::kInt64))).find("Long"),
            std::string::npos);
  EXPECT_NE(read(save(folder, torch::zeros({2, 2, 2}))).find("row 0"), std::string::npos);
  EXPECT_NE(read(save(folder, std::int64_t{7})).find("want one tensor"), std::string::npos);
  const std::string whole = read_file(save(folder, torch::ones({2, 2, 2})));
  for (std::size_t keep : {std::size_t{0}, std::size_t{3}, whole.size() / 2, whole.size() - 1}) {
    write_file(folder.file("cut.pt"), whole.substr(0, keep));
    EXPECT_NE(read(folder.file("cut.pt")).find("cut.pt"), std::string::npos) << keep;
  }
}

}  // namespace
}  // namespace lexico
