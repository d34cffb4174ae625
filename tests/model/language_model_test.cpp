#include "lexico/language_model.h"

#include <gtest/gtest.h>
#include <torch/script.h>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "lexico/error.h"
#include "lexico/files.h"
#include "support/message_of.h"
#include "support/temporary_folder.h"

namespace lexico {
namespace {

using Json = nlohmann::json;
using test::TemporaryFolder;

// 2 layers, 4 heads, 2 KV heads, head_dim 3. A key tells layer, batch, head, position, component
// and id; a value is its negative; a query is twice the component + 1 plus the head.
constexpr const char* kToy = R"(
def cache(self, ids: Tensor, heads: int) -> Tensor:
    n, t = ids.shape[0], ids.shape[1]
    place = torch.arange(2 * n * heads * t * 3).reshape([2, n, heads, t, 3])
    return place.float() + 1000.0 * ids[None, :, None, :, None].float()

def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tuple[Tensor, Tensor]:
    keys = self.cache(input_ids, 2)
    return keys, -keys

def queries(self, input_ids: Tensor, attention_mask: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    keys = self.cache(input_ids, 2)
    heads = torch.arange(4).float()[None, None, :, None, None]
    component = torch.arange(3).float()
    queries = (2.0 * component + 1.0 + heads).expand([2, keys.shape[1], 4, keys.shape[3], 3])
    return keys, -keys, queries
)";

Json toy_json() {
  return Json::parse(R"({"contract": "lexico-model 1", "model": "toy", "dtype": "float32",
    "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 3, "vocab": 50, "max_positions": 20,
    "bos_id": 1, "add_bos": false, "tokenizer_sha256": null, "methods": ["forward", "queries"],
    "rope": {"kind": "default", "layout": "half", "rotary_dim": 2, "inverse_frequencies": [1.0],
             "attention_scaling": 1.0}})");
}

class LanguageModelTest : public ::testing::Test {
 protected:
  TemporaryFolder folder_;
  std::string path_ = folder_.file("toy.pt");

  LanguageModel make(const std::string& json, const std::string& source = kToy) {
    torch::jit::Module module("toy");
    module.define(source);
    torch::jit::ExtraFilesMap extra;
    if (!json.empty()) extra["lexico.json"] = json;
    module.save(path_, extra);
    return open();
  }
  LanguageModel make() { return make(toy_json().dump()); }
  LanguageModel open(const std::string& device = "cpu") { return {path_, device, 1}; }

  /// What a lexico.json with this change is refused with; null takes the key away.
  std::string refusal(const std::string& pointer, const Json& value) {
    Json json = toy_json();
    if (value.is_discarded()) {
      json = json.patch(Json::array({{{"op", "remove"}, {"path", pointer}}}));
    } else {
      json[Json::json_pointer(pointer)] = value;
    }
    return test::message_of<IoError>([&] { parse_model_info(json.dump(), "m.pt"); });
  }
};

#define EXPECT_HAS(text, part) EXPECT_PRED2(contains, text, part)
bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST_F(LanguageModelTest, ForwardGivesKeysAndValuesAsTheModelMadeThem) {
  LanguageModel model = make();
  EXPECT_EQ(model.info().name, "toy");
  EXPECT_EQ(model.info().bos_id, 1);
  EXPECT_FALSE(model.info().add_bos);
  const std::int32_t ids[] = {3, 0, 49, 7, 7, 7};
  CacheBatch cache;
  for (int repeat = 0; repeat < 2; ++repeat) model.forward(ids, 2, 3, false, cache);
  EXPECT_EQ(cache.batch, 2);
  EXPECT_EQ(cache.length, 3);
  EXPECT_TRUE(cache.queries.empty());
  ASSERT_EQ(cache.keys.size(), 2u * 2 * 2 * 3 * 3);
  for (std::size_t i = 0; i < cache.keys.size(); ++i) {
    const std::size_t token = i / 3 % 3, sequence = i / (3 * 3 * 2) % 2;
    const float want =
        static_cast<float>(i) + 1000.0f * static_cast<float>(ids[sequence * 3 + token]);
    ASSERT_EQ(cache.keys[i], want);
    ASSERT_EQ(cache.values[i], -want);
  }
}

TEST_F(LanguageModelTest, QueriesComeOnRequestAndTheirProductsAreSummedOverTheGroup) {
  LanguageModel model = make();
  const std::vector<std::int32_t> ids(10, 4);
  CacheBatch cache;
  model.forward(ids.data(), 2, 5, true, cache);
  ASSERT_EQ(cache.queries.size(), 2u * 2 * 4 * 5 * 3);
  std::vector<double> sums;
  add_query_products(model.info(), cache, sums);
  add_query_products(model.info(), cache, sums);
  ASSERT_EQ(sums.size(), 2u * 2 * 3 * 3);
  for (int kv_head = 0; kv_head < 2; ++kv_head)
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) {
        double want = 0;
        for (int head : {2 * kv_head, 2 * kv_head + 1})
          want += 2 * 10 * (2.0 * i + 1 + head) * (2.0 * j + 1 + head);
        EXPECT_DOUBLE_EQ(sums[static_cast<std::size_t>(18 + (kv_head * 3 + i) * 3 + j)], want);
      }
}

TEST_F(LanguageModelTest, RefusesIdsAndLengthsOutOfBounds) {
  LanguageModel model = make();
  CacheBatch cache;
  const auto run = [&](std::vector<std::int32_t> ids, std::int64_t batch, std::int64_t length) {
    return test::message_of<InvalidArgument>(
        [&] { model.forward(ids.data(), batch, length, false, cache); });
  };
  EXPECT_HAS(run({1, 2, 3, 50}, 2, 2), "token id 50 of sequence 1, position 1: must be in [0, 50)");
  EXPECT_HAS(run({-1}, 1, 1), "token id -1");
  EXPECT_HAS(run(std::vector<std::int32_t>(21), 1, 21),
             "length is 21, the model's max_positions is 20");
  EXPECT_HAS(run({1}, 0, 1), "batch is 0");
}

TEST_F(LanguageModelTest, RefusesFilesThatAreNoModel) {
  const auto opening = [&] { return test::message_of<IoError>([&] { open(); }); };
  EXPECT_HAS(opening(), "toy.pt: No such file or directory");
  make();
  const std::string whole = read_file(path_);
  for (std::size_t keep : {std::size_t{0}, std::size_t{100}, whole.size() / 2, whole.size() - 1}) {
    write_file(path_, whole.substr(0, keep));
    EXPECT_HAS(opening(), "toy.pt: cannot be read as a TorchScript model") << keep;
    EXPECT_EQ(opening().find('\n'), std::string::npos) << opening();
  }
  EXPECT_HAS(test::message_of<IoError>([&] { LanguageModel(folder_.path().string(), "cpu", 1); }),
             "is a folder");
  EXPECT_HAS(test::message_of<IoError>([&] { make(""); }), "holds no lexico.json");
  EXPECT_HAS(test::message_of<IoError>([&] { make("{"); }), "toy.pt: lexico.json: ");
}

TEST_F(LanguageModelTest, RefusesModelsThatBreakTheirPromise) {
  Json json = toy_json();
  const std::string forward_only =
      std::string(kToy).substr(0, std::string(kToy).find("def queries"));
  EXPECT_HAS(test::message_of<IoError>([&] { make(json.dump(), forward_only); }),
             "'queries', but the model has none");
  json["methods"] = {"forward"};
  CacheBatch cache;
  const std::int32_t id = 0;
  LanguageModel plain = make(json.dump(), forward_only);
  EXPECT_FALSE(plain.info().has_queries);
  EXPECT_HAS(test::message_of<InvalidArgument>([&] { plain.forward(&id, 1, 1, true, cache); }),
             "no method 'queries'");

  json["head_dim"] = 4;
  EXPECT_HAS(test::message_of<IoError>([&] { make(json.dump()).forward(&id, 1, 1, false, cache); }),
             "keys have shape [2, 1, 2, 1, 3], its lexico.json promises [2, 1, 2, 1, 4]");
  const auto returns = [&](const std::string& body) {
    const std::string source =
        "def forward(self, input_ids: Tensor, attention_mask: Tensor):\n" + body;
    json["head_dim"] = 3;
    return test::message_of<IoError>(
        [&] { make(json.dump(), source).forward(&id, 1, 1, false, cache); });
  };
  EXPECT_HAS(returns("    return input_ids\n"),
             "'forward' must return (keys, values), but returned a Tensor");
  EXPECT_HAS(returns("    return input_ids, 3\n"), "keys have shape [1, 1]");
  EXPECT_HAS(returns("    return torch.zeros([2, 1, 2, 1, 3]).long(), input_ids\n"),
             "are of type Long");
  const std::string failed = returns(
      "    assert input_ids.shape[0] > 7, 'too small a batch'\n    return input_ids, input_ids\n");
  EXPECT_HAS(failed, "toy.pt: the model failed: ");
  EXPECT_HAS(failed, "too small a batch");
  EXPECT_EQ(failed.find('\n'), std::string::npos) << failed;
}

TEST_F(LanguageModelTest, OtherTypesAndStridesGiveFloats) {
  Json json = toy_json();
  json["methods"] = {"forward"};
  LanguageModel model = make(json.dump(), R"(
def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tuple[Tensor, Tensor]:
    keys = torch.full([2, input_ids.shape[0], 2, input_ids.shape[1], 3], 1.5)
    return keys.half(), keys.double().transpose(0, 2)
)");
  const std::int32_t ids[] = {1, 2, 3};
  CacheBatch cache;
  model.forward(ids, 1, 3, false, cache);
  EXPECT_EQ(cache.keys, std::vector<float>(36, 1.5f));
  EXPECT_EQ(cache.values, std::vector<float>(36, 1.5f));
}

TEST_F(LanguageModelTest, RefusesDevicesThatAreNotThere) {
  make();
  for (const char* name : {"tpu", "cuda:", "cuda:x", "cuda:1234", "cuda99", ""})
    EXPECT_HAS(test::message_of<InvalidArgument>([&] { open(name); }),
               std::string("device is '") + name + "'");
  EXPECT_HAS(test::message_of<InvalidArgument>([&] { open("cuda:99"); }),
             "CUDA devices can be used here");
}

TEST_F(LanguageModelTest, EveryMissingKeyOfLexicoJsonIsNamed) {
  for (const char* key : {"contract",
                          "model",
                          "dtype",
                          "layers",
                          "heads",
                          "kv_heads",
                          "head_dim",
                          "vocab",
                          "max_positions",
                          "bos_id",
                          "tokenizer_sha256",
                          "rope",
                          "methods"})
    EXPECT_HAS(refusal("/" + std::string(key), Json::value_t::discarded),
               "'" + std::string(key) + "' is missing");
  for (const char* key :
       {"kind", "layout", "rotary_dim", "inverse_frequencies", "attention_scaling"})
    EXPECT_HAS(refusal("/rope/" + std::string(key), Json::value_t::discarded),
               "rope: '" + std::string(key) + "' is missing");
}

TEST_F(LanguageModelTest, EveryWrongValueOfLexicoJsonIsNamedWithItsBound) {
  EXPECT_HAS(refusal("/contract", "lexico-model 2"),
             R"('contract' is "lexico-model 2", must be "lexico-model 1")");
  EXPECT_HAS(refusal("/layers", 0),
             "m.pt: lexico.json: 'layers' is 0, must be a whole number, at least 1");
  EXPECT_HAS(refusal("/layers", 2.5), "'layers' is 2.5");
  EXPECT_HAS(refusal("/vocab", 1e30), "'vocab' is 1e+30");
  EXPECT_HAS(refusal("/vocab", 18446744073709551615u), "'vocab' is 18446744073709551615");
  EXPECT_HAS(refusal("/kv_heads", 3), "'kv_heads' is 3, must be a divisor of heads = 4");
  EXPECT_HAS(refusal("/bos_id", 50), "'bos_id' is 50, must be below vocab = 50");
  EXPECT_HAS(refusal("/add_bos", "yes"), "'add_bos' is \"yes\"");
  EXPECT_HAS(refusal("/methods", {"step"}), "'methods'");
  EXPECT_HAS(refusal("/rope", 3), "'rope' is 3, must be an object");
  EXPECT_HAS(refusal("/rope/layout", "odd"), "'layout' is \"odd\", must be half or interleaved");
  EXPECT_HAS(refusal("/rope/rotary_dim", 4),
             "'rotary_dim' is 4, must be even and at most head_dim = 3");
  EXPECT_HAS(refusal("/rope/inverse_frequencies", {1.0, 2.0}),
             "has 2 numbers, must have rotary_dim / 2 = 1");
  EXPECT_HAS(refusal("/rope/inverse_frequencies", Json::parse("[[1.0]]")),
             "has 1 lists for 2 layers");
  EXPECT_HAS(refusal("/rope/inverse_frequencies", {"a"}), "finite numbers");
  EXPECT_HAS(refusal("/rope/attention_scaling", 0), "'attention_scaling' is 0");
}

}  // namespace
}  // namespace lexico
