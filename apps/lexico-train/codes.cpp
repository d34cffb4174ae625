// From dictionaries to formats: how many atoms, how many bits for what they leave over.
#include "lexico-train/codes.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "common/options.h"
#include "common/program.h"
#include "lexico/budget.h"
#include "lexico/error.h"
#include "lexico/fit_codes.h"

namespace lexico::apps {
namespace {

constexpr int kMostAtoms = 8;  // that a code may have
constexpr int kBlocks = 16;  // of neighbouring rows, spread over the data: what codes are fitted on

/// What the published format takes at s = 8; fewer for short vectors, 13 bits for 4 numbers.
int default_bits(int dim) { return std::min(208, 13 * dim / 4); }

/// Rates of which a budget may choose one, as parts of the mean.
constexpr double kRates[kNumRates] = {0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.35, 1.6, 2.0};

/// Rows of one dictionary in its frame, and the KV heads they take turns in.
struct Sample {
  std::vector<float> rows;
  std::int64_t count = 0;
  int heads = 1;
};

/// The blocks that a sample consists of: whole tokens.
std::vector<ActivationSource::Rows> blocks_of(const ActivationInfo& info,
                                              std::int64_t num_rows,
                                              std::int64_t wanted,
                                              bool one_head) {
  const int kv_heads = info.kv_heads;
  const std::int64_t tokens = num_rows / kv_heads,
                     want_tokens = std::min(tokens, one_head ? wanted : wanted / kv_heads + 1),
                     block = (want_tokens + kBlocks - 1) / kBlocks;
  std::vector<ActivationSource::Rows> blocks;
  for (int b = 0; b < kBlocks; ++b)
    blocks.push_back(
        {b * (tokens - block) / std::max(1, kBlocks - 1) * kv_heads, block * kv_heads});
  return blocks;
}

Sample sample_of(const Dictionary& dictionary,
                 ActivationSource& data,
                 std::int64_t num_rows,
                 std::int64_t wanted) {
  const int kv_heads = data.info().kv_heads, dim = dictionary.dim;
  const bool one_head = dictionary.head != Dictionary::kAllHeads;
  Sample sample;
  sample.heads = one_head ? 1 : kv_heads;
  std::vector<float> rows;
  for (const ActivationSource::Rows& block : blocks_of(data.info(), num_rows, wanted, one_head)) {
    rows.resize(static_cast<std::size_t>(block.count * dim));
    data.read(dictionary.layer, dictionary.kind, block.first, block.count, rows.data());
    if (!one_head) {
      sample.rows.insert(sample.rows.end(), rows.begin(), rows.end());
      continue;
    }
    for (std::int64_t token = 0; token < block.count / kv_heads; ++token) {
      const float* row = rows.data() + (token * kv_heads + dictionary.head) * dim;
      sample.rows.insert(sample.rows.end(), row, row + dim);
    }
  }
  sample.count = static_cast<std::int64_t>(sample.rows.size()) / dim;
  dictionary.transform.forward(sample.rows.data(), sample.count, dim);
  return sample;
}

std::string place_of(const Dictionary& dictionary) {
  return "layer " + std::to_string(dictionary.layer) + " " + name_of(dictionary.kind);
}

class Fitter {
 public:
  Fitter(DictionarySet& set,
         ActivationSource& data,
         std::int64_t num_rows,
         const CodeConfig& config,
         const TrainConfig& train)
      : set_(set), data_(data), num_rows_(num_rows), config_(config) {
    options_.weight_bits = 0;
    options_.scale_bits = -1;
    options_.states = config.residual_states;
    options_.selection = Selection::from(train.selection);
    options_.threads = train.threads;
  }

  void equal_bits(int bits) {
    Progress progress(
        "fitting codes", static_cast<double>(set_.dictionaries.size()), "dictionaries");
    double done = 0;
    for (Dictionary& dictionary : set_.dictionaries) {
      dictionary.format = choose(dictionary, bits).format;
      progress.update(++done, place_of(dictionary));
    }
  }

  void shared_out(double bytes_per_token) {
    const double places =
        static_cast<double>(set_.dictionaries.size()) * heads_of(set_.dictionaries.front());
    const double mean_bits = 8 * bytes_per_token / places;
    std::vector<BudgetCurve> curves;
    std::vector<std::vector<CodeFormat>> formats;
    Progress progress("fitting codes",
                      static_cast<double>(set_.dictionaries.size() * std::size(kRates)),
                      "codes");
    double done = 0;
    for (const Dictionary& dictionary : set_.dictionaries) {
      BudgetCurve curve{dictionary.layer, dictionary.kind, {}, 1.0};
      std::vector<CodeFormat>& own = formats.emplace_back();
      for (const double rate : kRates) {
        const int bits = static_cast<int>(std::lround(rate * mean_bits / 8)) * 8;  // whole bytes
        try {
          CodeChoice choice = choose(dictionary, bits);
          curve.points.push_back({bits, choice.error * choice.error});
          own.push_back(std::move(choice.format));
        } catch (const InvalidArgument&) {
          if (rate == 1.0) throw;  // else: too few or too many bits for this one
        }
        progress.update(++done, place_of(dictionary));
      }
      curves.push_back(std::move(curve));
    }
    const BudgetChoice choice =
        choose_budget(curves, heads_of(set_.dictionaries.front()), bytes_per_token);
    for (std::size_t i = 0; i < formats.size(); ++i)
      set_.dictionaries[i].format =
          std::move(formats[i][static_cast<std::size_t>(choice.points[i])]);
  }

 private:
  int heads_of(const Dictionary& dictionary) const {
    return dictionary.head == Dictionary::kAllHeads ? data_.info().kv_heads : 1;
  }

  CodeChoice choose(const Dictionary& dictionary, int bits) {
    if (stop_requested())
      throw Interrupted("stopped while fitting codes; the same command with --resume does it");
    if (&dictionary != sampled_) {
      sample_ = sample_of(dictionary, data_, num_rows_, config_.code_vectors);
      sampled_ = &dictionary;
    }
    try {
      return choose_codes(
          dictionary, sample_.rows.data(), sample_.count, sample_.heads, bits, options_);
    } catch (const InvalidArgument& e) {
      throw InvalidArgument(place_of(dictionary) + ": " + e.what());
    }
  }

  DictionarySet& set_;
  ActivationSource& data_;
  std::int64_t num_rows_;
  const CodeConfig& config_;
  CodeFitOptions options_;
  const Dictionary* sampled_ = nullptr;
  Sample sample_;
};

}  // namespace

void CodeConfig::validate() const {
  if (coding != "auto" && coding != "packed" && coding != "fp8-int16" && coding != "exact")
    throw InvalidArgument("coding is '" + coding + "', must be auto, packed, fp8-int16 or exact");
  if (bits < 0) throw InvalidArgument("bits is " + std::to_string(bits) + ", must be >= 0");
  if (!(bytes_per_token >= 0))
    throw InvalidArgument("bytes_per_token is " + value_text(bytes_per_token) + ", must be >= 0");
  if (bits > 0 && bytes_per_token > 0)
    throw InvalidArgument("bits and bytes_per_token both say how large codes are: give one");
  if (residual_states != 0 && (residual_states < 4 || residual_states > 256 ||
                               (residual_states & (residual_states - 1)) != 0))
    throw InvalidArgument("residual_states is " + std::to_string(residual_states) +
                          ", must be 0 or a power of two in [4, 256]");
  if (code_vectors < 256)
    throw InvalidArgument("code_vectors is " + std::to_string(code_vectors) + ", must be >= 256");
}

void CodeConfig::require_room(int num_atoms, double vectors_per_token) const {
  constexpr int kLeastWeightBits = 2;
  const int least = index_bits(num_atoms) + kLeastWeightBits;
  const double bytes = (least + 7) / 8 * vectors_per_token;
  if (bits > 0 && bits < least)
    throw InvalidArgument("bits is " + std::to_string(bits) +
                          ", must be >= " + std::to_string(least) + ": one atom and its weight");
  if (bytes_per_token > 0 && bytes_per_token < bytes)
    throw InvalidArgument("bytes_per_token is " + value_text(bytes_per_token) +
                          ", must be at least " + value_text(bytes) +
                          ": one atom and its weight in each of " + value_text(vectors_per_token) +
                          " vectors");
}

std::string CodeConfig::resolved_coding(const std::string& recipe) const {
  if (coding != "auto") return coding;
  return recipe == "lexico" ? "fp8-int16" : "packed";
}

std::vector<ActivationSource::Rows> hold_code_rows(ActivationSource& data,
                                                   std::int64_t num_rows,
                                                   const CodeConfig& config,
                                                   const TrainConfig& train,
                                                   const std::vector<TrainTarget>& targets) {
  if (config.resolved_coding(train.recipe) != "packed") return {};
  std::vector<ActivationSource::Dataset> datasets;
  for (const TrainTarget& target : targets) {
    datasets.emplace_back(target.layer, target.kind);
    for (int layer : target.more_layers) datasets.emplace_back(layer, target.kind);
  }
  const bool one_head = targets.front().head >= 0;
  const std::vector<ActivationSource::Rows> rows =
      blocks_of(data.info(), num_rows, config.code_vectors, one_head);
  data.hold(rows, datasets);
  return rows;
}

void fit_formats(DictionarySet& set,
                 ActivationSource& data,
                 std::int64_t num_rows,
                 const CodeConfig& config,
                 const TrainConfig& train) {
  const std::string coding = config.resolved_coding(train.recipe);
  if (coding != "packed") {
    for (Dictionary& dictionary : set.dictionaries) {
      dictionary.format = {};
      dictionary.format.coding = coding_from(coding);
      dictionary.format.max_atoms = train.sparsity_of(dictionary.kind);
    }
    return;
  }
  Fitter fitter(set, data, num_rows, config, train);
  if (config.bytes_per_token > 0)
    fitter.shared_out(config.bytes_per_token);
  else
    fitter.equal_bits(config.bits > 0 ? config.bits : default_bits(data.info().head_dim));
}

}  // namespace lexico::apps
