// The encoder on a GPU, or on one that the CPU emulates.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/memory/memory.h"
#include "lexico/encoder.h"
#include "lexico/error.h"
#include "support/message_of.h"
#include "support/runtime_faults.h"

#ifdef LEXICO_DEVICE_IS_EMULATED
#include "engine.h"
#endif

namespace lexico {
namespace {

std::vector<float> random_rows(int rows, int dim, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(rows * dim));
  for (float& x : values) x = normal(random);
  for (int n = 0; n < rows; ++n) {
    float* const row = values.data() + n * dim;
    float norm2 = 0;
    for (int k = 0; k < dim; ++k) norm2 += row[k] * row[k];
    for (int k = 0; k < dim; ++k) row[k] /= std::sqrt(norm2);
  }
  return values;
}

Encoder encoder(const std::string& device, const std::string& selection = "omp") {
  EncodeOptions options;
  options.max_atoms = 4;
  options.selection = Selection::from(selection);
  options.threads = 1;
  options.device = device;
  return Encoder(options);
}

constexpr int kDictionaries = 3, kAtoms = 90, kDim = 40, kSignals = 20;

class EncoderOnDevice : public ::testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device here";
  }
#ifdef LEXICO_DEVICE_IS_EMULATED
  void TearDown() override {
    EXPECT_EQ(emulated::allocated_bytes(), 0u);
    emulated::device() = {};
  }
#endif
  void expect_codes_of_the_cpu(Encoder& device,
                               const std::string& selection = "omp",
                               const std::int32_t* budgets = nullptr) {
    SparseCodes want, codes;
    Encoder host = encoder("cpu", selection);
    for (Encoder* e : {&host, &device}) {
      e->set_atoms(atoms_.data(), kDictionaries, kAtoms, kDim);
      e->encode(signals_.data(), kSignals, e == &host ? want : codes, true, budgets);
    }
    EXPECT_EQ(codes.indices, want.indices);
    EXPECT_EQ(codes.counts, want.counts);
    for (std::size_t i = 0; i < want.weights.size(); ++i) {
      EXPECT_NEAR(codes.weights[i], want.weights[i], 1e-5);
      EXPECT_NEAR(codes.curve[i], want.curve[i], 1e-5);
    }
  }

  std::vector<float> atoms_ = random_rows(kDictionaries * kAtoms, kDim, 1),
                     signals_ = random_rows(kDictionaries * kSignals, kDim, 2);
};

TEST_F(EncoderOnDevice, CodesAreThoseOfTheCpu) {
  for (const char* selection : {"omp", "ols"}) {
    Encoder device = encoder("cuda", selection);
    expect_codes_of_the_cpu(device, selection);
    const std::vector<std::int32_t> budgets(kDictionaries * kSignals, 2);
    expect_codes_of_the_cpu(device, selection, budgets.data());
  }
}

TEST_F(EncoderOnDevice, CandidatesOfManyAtomsGiveTheErrorsOfTheCpu) {
  const std::vector<float> atoms = random_rows(300, kDim, 3);
  double sums[2] = {0, 0};
  for (const bool on_device : {false, true}) {
    Encoder e = encoder(on_device ? "cuda" : "cpu", "ols-4");  // up to 256 atoms it is ols
    e.set_atoms(atoms.data(), 1, 300, kDim);
    SparseCodes codes;
    e.encode(signals_.data(), kDictionaries * kSignals, codes);
    for (const float norm : codes.residual_norms)
      sums[on_device ? 1 : 0] += static_cast<double>(norm);
  }
  EXPECT_NEAR(sums[1] / sums[0], 1, 2e-3);
}

TEST_F(EncoderOnDevice, AtomsThatChangedAreTaken) {
  Encoder device = encoder("cuda:0");
  expect_codes_of_the_cpu(device);
  atoms_ = random_rows(kDictionaries * kAtoms, kDim, 7);
  expect_codes_of_the_cpu(device);
}

TEST_F(EncoderOnDevice, EncodersThatShareScratchKeepTheirAtoms) {
  Encoder first = encoder("cuda"), second = encoder("cuda");
  second.share_scratch(first);
  const std::vector<float> other = random_rows(kDictionaries * kAtoms, kDim, 7);
  SparseCodes want[2], codes;
  for (int i = 0; i < 2; ++i) {
    Encoder host = encoder("cpu");
    host.set_atoms(i == 0 ? atoms_.data() : other.data(), kDictionaries, kAtoms, kDim);
    host.encode(signals_.data(), kSignals, want[i]);
  }
  first.set_atoms(atoms_.data(), kDictionaries, kAtoms, kDim);
  second.set_atoms(other.data(), kDictionaries, kAtoms, kDim);
  int calls_before = 0;
  for (int round = 0; round < 3; ++round) {
    test::RuntimeFaults counted(-1);
    for (int i = 0; i < 2; ++i) {
      // Fewer signals in the last round.
      const std::int64_t count = round < 2 ? kSignals : 3;
      (i == 0 ? first : second).encode(signals_.data(), count, codes);
      if (round < 2) {
        EXPECT_EQ(codes.indices, want[i].indices) << round << ' ' << i;
      }
    }
    // Atoms are brought, and memory is taken, once.
    if (round == 1) {
      EXPECT_LT(counted.calls(), calls_before);
    }
    calls_before = counted.calls();
  }
  Encoder host = encoder("cpu");
  EXPECT_THROW(host.share_scratch(first), InvalidArgument);
  EXPECT_THROW(first.share_scratch(host), InvalidArgument);
}

TEST_F(EncoderOnDevice, DeviceThatIsNotThereIsNamed) {
  for (const char* name : {"gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:999", "CUDA"}) {
    const std::string message = test::message_of<InvalidArgument>([&] { encoder(name); });
    EXPECT_NE(message.find("device is '" + std::string(name) + "'"), std::string::npos) << message;
  }
}

#ifdef LEXICO_DEVICE_IS_EMULATED
TEST_F(EncoderOnDevice, ShortMemoryIsAnsweredBySmallerPieces) {
  Encoder device = encoder("cuda");
  device.set_atoms(atoms_.data(), kDictionaries, kAtoms, kDim);
  const std::size_t wanted = device.workspace_bytes(kSignals);
  for (const std::size_t there : {wanted, wanted / 2, wanted / 4}) {
    emulated::device().memory_bytes = there;
    Encoder fresh = encoder("cuda");
    const std::int64_t before = emulated::launches();
    expect_codes_of_the_cpu(fresh);
    if (there < wanted) {
      EXPECT_GE(emulated::launches() - before, 4) << "pieces";
    }
  }
  emulated::device().memory_bytes = 1000;
  Encoder fresh = encoder("cuda");
  fresh.set_atoms(atoms_.data(), kDictionaries, kAtoms, kDim);
  SparseCodes codes;
  EXPECT_NE(test::message_of<ResourceError>([&] {
              fresh.encode(signals_.data(), kSignals, codes);
            }).find("out of memory"),
            std::string::npos);
}
#endif

TEST_F(EncoderOnDevice, CallOfTheRuntimeThatFailsIsAnError) {
  for (int fail_at = 0;; ++fail_at) {
    bool thrown = false, all_made = false;
    {
      test::RuntimeFaults faults(fail_at);
      SparseCodes codes;  // outlives what a wait that failed left to be done
      try {
        Encoder device = encoder("cuda");
        device.set_atoms(atoms_.data(), kDictionaries, kAtoms, kDim);
        device.encode(signals_.data(), kSignals, codes);
      } catch (const Error& error) {
        thrown = true;
        EXPECT_GT(std::string(error.what()).size(), 10u);
      }
      all_made = fail_at >= faults.calls();
      EXPECT_EQ(thrown, !all_made) << faults.failed();
    }
    if (all_made) break;
  }
  Encoder device = encoder("cuda");
  expect_codes_of_the_cpu(device);
}

}  // namespace
}  // namespace lexico
