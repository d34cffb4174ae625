// The contract of lexico/trainer.h.
#include "lexico/trainer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "core/random.h"
#include "lexico/error.h"
#include "lexico/files.h"
#include "support/message_of.h"
#include "support/temporary_folder.h"
#include "training/recipe_case.h"

namespace lexico {
namespace {

using test::message_of;

/// Sparse combinations of hidden atoms, addressed by number: any batch split gives the same
/// vectors.
class SyntheticStream : public VectorStream {
 public:
  SyntheticStream(int num_dictionaries, int dim, int hidden_atoms, int sparsity)
      : num_dictionaries_(num_dictionaries), dim_(dim), hidden_(hidden_atoms), sparsity_(sparsity) {
    detail::Random random({99});
    truth_.resize(static_cast<std::size_t>(num_dictionaries * hidden_ * dim));
    for (float& v : truth_) v = static_cast<float>(random.normal());
    normalize_atoms(truth_, num_dictionaries * hidden_, dim);
  }
  int num_dictionaries() const override { return num_dictionaries_; }
  int dim() const override { return dim_; }
  void seek(std::int64_t vectors) override { position_ = vectors; }
  void next(std::int64_t count, float* out) override {
    for (int p = 0; p < num_dictionaries_; ++p)
      for (std::int64_t i = 0; i < count; ++i) fill(p, position_ + i, out + (p * count + i) * dim_);
    position_ += count;
  }
  float scale = 1;
  std::int64_t bad_every = 0;                ///< every so-th vector holds a NaN
  std::int64_t bad_from = 0, bad_until = 0;  ///< and all of these

 private:
  void fill(int p, std::int64_t number, float* x) const {
    detail::Random random({7, static_cast<std::uint64_t>(p), static_cast<std::uint64_t>(number)});
    for (int d = 0; d < dim_; ++d) x[d] = static_cast<float>(0.05 * random.normal());
    for (int k = 0; k < sparsity_; ++k) {
      const std::uint64_t atom = random.below(static_cast<std::uint64_t>(hidden_));
      const float weight = static_cast<float>(random.normal());
      const float* from = truth_.data() + (static_cast<std::size_t>(p * hidden_) + atom) *
                                              static_cast<std::size_t>(dim_);
      for (int d = 0; d < dim_; ++d) x[d] += weight * from[d];
    }
    for (int d = 0; d < dim_; ++d) x[d] *= scale;
    if ((bad_every > 0 && number % bad_every == 0) || (number >= bad_from && number < bad_until))
      x[dim_ / 2] = std::numeric_limits<float>::quiet_NaN();
  }
  int num_dictionaries_, dim_, hidden_, sparsity_;
  std::int64_t position_ = 0;
  std::vector<float> truth_;
};

struct Record : TrainObserver {
  std::vector<TrainStep> steps;
  std::int64_t stop_at = -1;
  void on_step(const TrainStep& step) override { steps.push_back(step); }
  bool wants_stop() override { return static_cast<std::int64_t>(steps.size()) == stop_at; }
};

const std::vector<TrainTarget> kTwoTargets = {{0, Kind::kKeys}, {0, Kind::kValues}};

TrainConfig small_config(const std::string& recipe) {
  TrainConfig config;
  config.recipe = recipe;
  config.num_atoms = 48;
  config.sparsity = 3;
  config.vectors = recipe == "lexico" ? 60 * 64 : 40 * 256;
  config.batch_size = recipe == "lexico" ? 64 : 256;
  config.finish = recipe == "online" ? 0.3 : 0;  // both phases; stops and checkpoints fall in one
  config.epochs = 4;
  config.seed = 5;
  return config;
}

std::vector<float> atoms_of(const Trainer& trainer) {
  std::vector<float> all;
  for (const Dictionary& d : trainer.dictionaries().dictionaries)
    all.insert(all.end(), d.atoms.begin(), d.atoms.end());
  return all;
}

TEST(Trainer, LexicoRecipeFollowsThePublishedStep) {
  RecipeCase recipe(LEXICO_SOURCE_DIR "/tests/training/golden/lexico_recipe.safetensors");
  recipe.train(4, 1e-4, 30);
  const std::vector<float> loss = recipe.floats("loss"), error = recipe.floats("relative_error"),
                           atoms = recipe.floats("atoms");
  ASSERT_EQ(recipe.loss.size(), loss.size());
  for (std::size_t t = 0; t < loss.size(); ++t) {
    EXPECT_NEAR(recipe.loss[t], loss[t], 1e-5 * loss[t]) << "step " << t;
    EXPECT_NEAR(recipe.relative_error[t], error[t], 1e-5 * error[t]) << "step " << t;
  }
  // The published code saves atoms off unit norm by about the rate.
  for (std::size_t i = 0; i < atoms.size(); ++i) ASSERT_NEAR(recipe.atoms[i], atoms[i], 1e-3) << i;
}

TEST(Trainer, RefusesVectorsWhoseSquaresOverflow) {
  for (const char* recipe : {"lexico", "sgd"}) {
    SyntheticStream stream(2, 16, 40, 3);
    stream.scale = 1e20f;
    Trainer trainer(small_config(recipe), kTwoTargets, stream);
    Record record;
    EXPECT_THROW(trainer.run(record), IoError) << recipe;
  }
}

class TrainerRecipe : public ::testing::TestWithParam<const char*> {};

TEST_P(TrainerRecipe, LowersTheErrorAndKeepsAtomsOfUnitNorm) {
  SyntheticStream stream(2, 16, 40, 3);
  TrainConfig config = small_config(GetParam());
  config.learning_rate = 1e-2;
  config.vectors *= 5;
  Trainer trainer(config, kTwoTargets, stream);
  Record record;
  ASSERT_TRUE(trainer.run(record));
  EXPECT_LT(record.steps.back().relative_error, 0.8 * record.steps.front().relative_error);
  const std::vector<float> atoms = atoms_of(trainer);
  for (std::size_t n = 0; n < atoms.size() / 16; ++n) {
    double norm2 = 0;
    for (std::size_t d = 0; d < 16; ++d)
      norm2 += static_cast<double>(atoms[n * 16 + d]) * atoms[n * 16 + d];
    ASSERT_NEAR(norm2, 1.0, 1e-5) << n;
  }
}

TEST_P(TrainerRecipe, ThreadCountDoesNotChangeTheResult) {
  std::vector<float> results[2];
  for (int threads : {1, 2}) {
    SyntheticStream stream(2, 16, 40, 3);
    TrainConfig config = small_config(GetParam());
    config.threads = threads;
    Trainer trainer(config, kTwoTargets, stream);
    Record record;
    trainer.run(record);
    results[threads - 1] = atoms_of(trainer);
  }
  EXPECT_EQ(results[0], results[1]);
}

/// Some of the dictionaries of a larger stream.
class PartOfStream : public VectorStream {
 public:
  PartOfStream(VectorStream& all, int first, int count) : all_(all), first_(first), count_(count) {}
  int num_dictionaries() const override { return count_; }
  int dim() const override { return all_.dim(); }
  void seek(std::int64_t vectors) override { all_.seek(vectors); }
  void next(std::int64_t count, float* out) override {
    const auto size = static_cast<std::size_t>(count * dim());
    std::vector<float> batch(static_cast<std::size_t>(all_.num_dictionaries()) * size);
    all_.next(count, batch.data());
    std::copy_n(batch.data() + static_cast<std::size_t>(first_) * size,
                static_cast<std::size_t>(count_) * size,
                out);
  }

 private:
  VectorStream& all_;
  int first_, count_;
};

TEST_P(TrainerRecipe, ADictionaryDoesNotDependOnThoseTrainedBesideIt) {
  // Keys and values of other numbers of atoms per vector, one of a head alone; so many atoms that
  // some fall out of use.
  const std::vector<TrainTarget> targets = {
      {0, Kind::kKeys, 1}, {0, Kind::kValues}, {4, Kind::kKeys}};
  TrainConfig config = small_config(GetParam());
  config.num_atoms = 96;
  config.batch_size = 64;
  config.vectors = 120 * 64;
  config.initialization = "random";
  config.key_sparsity = 1;
  config.value_sparsity = 4;
  const auto trained = [&](int first, int count, int of_job) {
    SyntheticStream all(3, 16, 40, 3);
    PartOfStream stream(all, first, count);
    Trainer trainer(
        config, {targets.begin() + first, targets.begin() + first + count}, stream, {}, of_job);
    Record record;
    trainer.run(record);
    EXPECT_TRUE(config.recipe == "lexico" || record.steps.back().revived_atoms > 0);
    return atoms_of(trainer);
  };
  const std::vector<float> together = trained(0, 3, 0);
  std::vector<float> apart = trained(0, 1, 3);
  const std::vector<float> others = trained(1, 2, 3);
  apart.insert(apart.end(), others.begin(), others.end());
  EXPECT_EQ(apart, together);
}

TEST_P(TrainerRecipe, ResumedRunEndsWithTheSameAtoms) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("checkpoint.safetensors");
  const TrainConfig config = small_config(GetParam());
  SyntheticStream stream(2, 16, 40, 3);
  Trainer whole(config, kTwoTargets, stream);
  Record record;
  ASSERT_TRUE(whole.run(record));

  stream.seek(0);
  Trainer part(config, kTwoTargets, stream);
  Record until;
  until.stop_at = 23;
  EXPECT_FALSE(part.run(until));
  part.save(path);
  stream.seek(12345);  // load puts it back
  Trainer rest(config, kTwoTargets, stream);
  rest.load(path);
  EXPECT_EQ(rest.step(), 23);
  Record after;
  ASSERT_TRUE(rest.run(after));
  EXPECT_EQ(after.steps.size(), record.steps.size() - 23);
  EXPECT_EQ(atoms_of(rest), atoms_of(whole));
}

TEST_P(TrainerRecipe, VectorsWithNanAreLeftOutAndCounted) {
  SyntheticStream stream(2, 16, 40, 3);
  stream.bad_every = 10;
  Trainer trainer(small_config(GetParam()), kTwoTargets, stream);
  Record record;
  ASSERT_TRUE(trainer.run(record));
  EXPECT_NEAR(static_cast<double>(record.steps.back().bad_vectors),
              2 * 0.1 * static_cast<double>(record.steps.back().vectors),
              4);
  for (float v : atoms_of(trainer)) ASSERT_TRUE(std::isfinite(v));
  EXPECT_TRUE(std::isfinite(record.steps.back().loss));
}

TEST_P(TrainerRecipe, ResumedInEachPhaseEndsWithTheSameAtoms) {
  const test::TemporaryFolder folder;
  const TrainConfig config = small_config(GetParam());
  SyntheticStream stream(2, 16, 40, 3);
  Trainer whole(config, kTwoTargets, stream);
  Record record;
  whole.run(record);
  for (int at : {1, 27, 28, 29, 38}) {  // the finish of `online` begins after step 28
    const std::string path = folder.file(std::to_string(at));
    stream.seek(0);
    Trainer part(config, kTwoTargets, stream);
    Record until;
    until.stop_at = at;
    part.run(until);
    part.save(path);
    Trainer rest(config, kTwoTargets, stream);
    rest.load(path);
    Record after;
    ASSERT_TRUE(rest.run(after));
    EXPECT_EQ(atoms_of(rest), atoms_of(whole)) << at;
    part.save(path + "again");  // saving does not depend on what is read ahead
    Trainer again(config, kTwoTargets, stream);
    again.load(path + "again");
    EXPECT_EQ(atoms_of(again), atoms_of(part));
  }
}

TEST_P(TrainerRecipe, StoppedAndRunOnInOneTrainerIsTheSame) {
  const TrainConfig config = small_config(GetParam());
  SyntheticStream stream(2, 16, 40, 3), other(2, 16, 40, 3);
  Trainer whole(config, kTwoTargets, stream), parts(config, kTwoTargets, other);
  Record record, first, second;
  whole.run(record);
  first.stop_at = 9;
  parts.run(first);
  parts.run(second);
  EXPECT_EQ(atoms_of(parts), atoms_of(whole));
}

TEST_P(TrainerRecipe, ABatchOfNothingButNanIsSkippedAndCounted) {
  SyntheticStream stream(2, 16, 40, 3);
  const TrainConfig config = small_config(GetParam());
  stream.bad_from = 5 * config.batch_size;  // batches 6 and 7
  stream.bad_until = 7 * config.batch_size;
  Trainer trainer(config, kTwoTargets, stream);
  Record record;
  ASSERT_TRUE(trainer.run(record));
  EXPECT_EQ(record.steps.back().skipped_batches, 2 * 2);
  EXPECT_EQ(record.steps.back().bad_vectors, 2 * 2 * config.batch_size);
  EXPECT_EQ(record.steps[5].relative_errors, record.steps[4].relative_errors);
  for (float v : atoms_of(trainer)) ASSERT_TRUE(std::isfinite(v));
}

TEST_P(TrainerRecipe, NothingButNanIsAnErrorThatNamesTheDictionary) {
  SyntheticStream stream(2, 16, 40, 3);
  stream.bad_every = 1;
  Trainer trainer(small_config(GetParam()), kTwoTargets, stream);
  Record record;
  EXPECT_NE(message_of<IoError>([&] { trainer.run(record); }).find("layer 0 keys"),
            std::string::npos);
  EXPECT_LE(record.steps.size(), 16u);
}

INSTANTIATE_TEST_SUITE_P(Recipes,
                         TrainerRecipe,
                         ::testing::Values("lexico", "sgd", "online"),
                         [](const auto& test) { return std::string(test.param); });

TEST(Trainer, DivergenceStopsWithAdviceAndKeepsTheBest) {
  SyntheticStream stream(1, 16, 40, 3);
  TrainConfig config = small_config("lexico");
  config.learning_rate = 1;
  config.vectors = 1'000'000;
  SyntheticStream other(1, 16, 40, 3);
  TrainConfig good = small_config("sgd");
  good.vectors = 40 * 4096;
  good.learning_rate = 1e-2;
  Trainer start(good, {{2, Kind::kKeys}}, other);
  Record record;
  start.run(record);
  Trainer trainer(config, {{2, Kind::kKeys}}, stream, atoms_of(start));
  Record until;
  const std::string message = message_of<Diverged>([&] { trainer.run(until); });
  EXPECT_NE(message.find("layer 2 keys diverged"), std::string::npos) << message;
  EXPECT_NE(message.find("try a learning_rate below 1"), std::string::npos) << message;
  const std::vector<float> kept = atoms_of(trainer), best = atoms_of(start);
  for (std::size_t i = 0; i < best.size(); ++i) ASSERT_NEAR(kept[i], best[i], 1e-6);
}

TEST(Trainer, MinutesBecomeStepsThatACheckpointKeeps) {
  const test::TemporaryFolder folder;
  SyntheticStream stream(2, 16, 40, 3);
  TrainConfig config = small_config("sgd");
  config.vectors = 0;
  config.minutes = 0.02;
  Trainer trainer(config, kTwoTargets, stream);
  Record record;
  const auto began = std::chrono::steady_clock::now();
  ASSERT_TRUE(trainer.run(record));
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  EXPECT_GT(seconds, 0.3);
  EXPECT_LT(seconds, 5);  // 1.2 where nothing else runs
  EXPECT_EQ(record.steps.front().num_steps, 0);
  EXPECT_EQ(record.steps.back().num_steps, record.steps.back().step);
  EXPECT_EQ(trainer.config().num_steps(), trainer.step());
  EXPECT_LT(record.steps.back().learning_rate, 1e-3);  // annealed to what the budget became
  trainer.save(folder.file("a"));
  Trainer rest(config, kTwoTargets, stream);
  rest.load(folder.file("a"));
  EXPECT_EQ(rest.config().num_steps(), trainer.step());
  EXPECT_TRUE(rest.run(record));
}

TEST(Trainer, KeysAndValuesMayTakeDifferentNumbersOfAtoms) {
  SyntheticStream stream(2, 16, 40, 3);
  TrainConfig config = small_config("sgd");
  config.key_sparsity = 1;
  config.value_sparsity = 6;
  Trainer trainer(config, kTwoTargets, stream);
  Record record;
  trainer.run(record);
  EXPECT_LT(2 * record.steps.back().relative_errors[1], record.steps.back().relative_errors[0]);
}

TEST(Trainer, InitialDictionariesMustFitAndBothSidesAreNamed) {
  DictionarySet set;
  Dictionary d;
  d.layer = 1;
  d.num_atoms = 48;
  d.dim = 16;
  d.atoms.assign(48 * 16, 0.25f);
  set.dictionaries = {d};
  const TrainConfig config = small_config("sgd");
  const auto atoms = [&](std::vector<TrainTarget> targets, int dim, KeyStage stage) {
    return initial_atoms(set, "old.safetensors", targets, config, dim, stage);
  };
  EXPECT_EQ(atoms({{1, Kind::kKeys}}, 16, KeyStage::kPostRope), d.atoms);
  EXPECT_EQ(message_of<InvalidArgument>([&] {
              atoms({{0, Kind::kKeys}}, 16, {});
            }),
            "old.safetensors: has no dictionary for layer 0 keys");
  EXPECT_EQ(message_of<InvalidArgument>([&] {
              atoms({{1, Kind::kKeys}}, 8, {});
            }),
            "old.safetensors: the dictionary for layer 1 keys has 48 atoms of dim 16; this run has "
            "num_atoms 48 and vectors of dim 8");
  EXPECT_EQ(message_of<InvalidArgument>([&] {
              atoms({{1, Kind::kKeys}}, 16, KeyStage::kPreRope);
            }),
            "old.safetensors: its keys are post_rope, those of the data are pre_rope");
}

TEST(Trainer, SgdRevivesAtomsThatNoVectorUses) {
  // All vectors lie in the first 4 of 16 dimensions; half the atoms start in the others, where no
  // pursuit takes them.
  struct Plane : VectorStream {
    std::uint64_t count = 0;
    int num_dictionaries() const override { return 1; }
    int dim() const override { return 16; }
    void seek(std::int64_t vectors) override { count = static_cast<std::uint64_t>(vectors); }
    void next(std::int64_t n, float* out) override {
      std::fill_n(out, n * 16, 0.0f);
      for (std::int64_t i = 0; i < n; ++i) {
        detail::Random random({1, count++});
        for (int d = 0; d < 4; ++d) out[i * 16 + d] = static_cast<float>(random.normal());
      }
    }
  } stream;
  std::vector<float> initial(32 * 16, 0.0f);
  for (std::size_t n = 0; n < 32; ++n) {
    detail::Random random({2, n});
    for (std::size_t d = 0; d < 4; ++d)
      initial[n * 16 + d + (n % 2 ? 12 : 0)] = static_cast<float>(random.normal());
  }
  TrainConfig config = small_config("sgd");
  config.num_atoms = 32;
  config.sparsity = 2;
  config.batch_size = 64;
  config.vectors = 100 * 64;
  Trainer trainer(config, {{3, Kind::kValues}}, stream, initial);
  Record record;
  trainer.run(record);
  EXPECT_GE(record.steps.back().revived_atoms, 16);
  EXPECT_EQ(trainer.unused_atoms(), std::vector<int>{0});
  EXPECT_NE(trainer.dictionaries().find(3, Kind::kValues), nullptr);
}

TEST(Trainer, RefusesACheckpointOfAnotherConfigAndNamesTheDifference) {
  const test::TemporaryFolder folder;
  SyntheticStream stream(2, 16, 40, 3);
  Trainer(small_config("sgd"), kTwoTargets, stream).save(folder.file("a.safetensors"));
  TrainConfig other = small_config("sgd");
  other.learning_rate = 0.5;
  Trainer trainer(other, kTwoTargets, stream);
  try {
    trainer.load(folder.file("a.safetensors"));
    FAIL() << "no error";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("learning_rate"), std::string::npos) << e.what();
  }
}

/// A checkpoint of a run with every tensor that a recipe can have, and a trainer to load it.
class CheckpointDamage : public ::testing::Test {
 protected:
  CheckpointDamage()
      : stream_(2, 16, 40, 3), trainer_(small_config("online"), kTwoTargets, stream_) {
    Record some;
    some.stop_at = 5;
    trainer_.run(some);
    trainer_.save(path_, {{"where", "here"}});
    whole_ = read_file(path_);
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, whole_.data(), sizeof bytes);
    header_end_ = sizeof bytes + bytes;
  }

  void put(std::size_t at, char value) {
    std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(at)).put(value);
  }
  void expect_refused_with_flipped_bit(std::size_t at, int bit) {
    put(at, static_cast<char>(whole_[at] ^ (1 << bit)));
    EXPECT_THROW(trainer_.load(path_), IoError) << "byte " << at << ", bit " << bit;
    put(at, whole_[at]);
  }

  const test::TemporaryFolder folder_;
  const std::string path_ = folder_.file("a.safetensors");
  SyntheticStream stream_;
  Trainer trainer_;
  std::string whole_;
  std::size_t header_end_ = 0;
  detail::Random random_{{1, 2}};
};

TEST_F(CheckpointDamage, EachByteOfTheHeaderCounts) {
  for (std::size_t at = 0; at < header_end_; ++at)
    expect_refused_with_flipped_bit(at, static_cast<int>(random_.below(8)));
  EXPECT_EQ(trainer_.load(path_).at("where"), "here");
}

TEST_F(CheckpointDamage, EachByteOfTheBodyCounts) {
  for (int i = 0; i < 10000; ++i)
    expect_refused_with_flipped_bit(header_end_ + random_.below(whole_.size() - header_end_),
                                    static_cast<int>(random_.below(8)));
  EXPECT_EQ(trainer_.step(), 5);
}

TEST_F(CheckpointDamage, ACutOffFileIsRefused) {
  const std::vector<float> before = atoms_of(trainer_);
  for (std::size_t i = 0; i < 1000; ++i) {  // each of the last and first bytes, others at random
    const std::size_t size = i < 100   ? whole_.size() - 1 - i
                             : i < 200 ? i - 100
                                       : random_.below(whole_.size());
    write_file(path_, std::string_view(whole_).substr(0, size));
    EXPECT_THROW(trainer_.load(path_), IoError) << size << " bytes";
  }
  EXPECT_THROW(trainer_.load(folder_.file("missing.safetensors")), IoError);
  EXPECT_EQ(atoms_of(trainer_), before);
}

TEST_F(CheckpointDamage, ALongerFileIsRefused) {
  write_file(path_, whole_ + whole_.substr(whole_.size() - 64));
  EXPECT_THROW(trainer_.load(path_), IoError);
}

TEST(Trainer, ConfigOutOfRangeIsNamedWithItsBound) {
  SyntheticStream stream(2, 16, 40, 3);
  TrainConfig config = small_config("sgd");
  config.sparsity = 17;
  try {
    Trainer trainer(config, kTwoTargets, stream);
    FAIL() << "no error";
  } catch (const InvalidArgument& e) {
    EXPECT_STREQ(e.what(), "sparsity is 17, must be at most head_dim = 16");
  }
  config = small_config("sgd");
  config.sparsity = 49;
  EXPECT_THROW(config.validate(), InvalidArgument);
  config = small_config("nonsense");
  EXPECT_THROW(config.validate(), InvalidArgument);
  config = small_config("sgd");
  config.device = "toaster";
  EXPECT_THROW(Trainer(config, kTwoTargets, stream), InvalidArgument);
}

}  // namespace
}  // namespace lexico
