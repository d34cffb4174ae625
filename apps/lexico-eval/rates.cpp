// Errors at equal bits: dictionaries against coders that need none.
#include "lexico-eval/rates.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "common/options.h"
#include "common/program.h"
#include "common/report/text.h"
#include "lexico/activation_sampler.h"
#include "lexico/activations.h"
#include "lexico/error.h"
#include "lexico/fit_codes.h"
#include "lexico/sparse_autoencoder.h"

namespace lexico::apps {
namespace {

using report::Coder;

constexpr std::int64_t kRowsBetweenStops = 4096;
constexpr int kMostAtoms = 8, kTrellisStates = 8;  // of fitted codes

std::string place_name(int layer, Kind kind) {
  return "layer " + std::to_string(layer) + " " + name_of(kind);
}

/// Formats that come with the dictionary.
void add_own_formats(const Contender& contender,
                     const MeasureOptions& options,
                     std::vector<RateCoder>& coders) {
  for (const Dictionary& own : contender.set.dictionaries) {
    const auto add =
        [&](const std::string& name, const Dictionary& dictionary, const char* coding) {
          coders.push_back({name,
                            own.layer,
                            own.kind,
                            contender.set.key_stage,
                            own.head,
                            dictionary_coder(dictionary, options.encode),
                            &own,
                            std::make_shared<const CodeFormat>(dictionary.format),
                            coding});
        };
    if (own.format.coding == CodeFormat::Coding::kPacked) add(contender.coder.name, own, "file");
    for (const int sparsity : options.sparsities) {
      Dictionary published = own;
      published.format = {};
      published.format.coding = CodeFormat::Coding::kFp8Int16;
      published.format.max_atoms = sparsity;
      add(contender.coder.name + report::kPublishedSuffix, published, "fp8-int16");
    }
  }
}

/// Coders that know nothing of the data.
void add_fixed_coders(const DictionarySet& like,
                      int dim,
                      const MeasureOptions& options,
                      const RateOptions& rates,
                      std::vector<RateCoder>& coders) {
  for (const int layer : options.layers)
    for (const Kind kind : kBothKinds) {
      const auto add = [&](const std::string& name, std::unique_ptr<VectorCoder> coder) {
        coders.push_back(
            {name, layer, kind, like.key_stage, Dictionary::kAllHeads, std::move(coder)});
      };
      for (const double rate : rates.bits_per_number) {
        const int bits = static_cast<int>(std::lround(rate * dim));
        if (bits >= 16 + dim / 4 && bits <= 16 + 8 * dim)
          add("rotation + Lloyd-Max", rotation_coder(dim, bits, options.seed));
      }
      for (const int bits : {2, 3, 4}) add("min/max", min_max_coder(dim, bits));
    }
}

/// A sparse autoencoder whose codes are stored as the published format stores a dictionary's.
class AutoencoderCoder : public VectorCoder {
 public:
  explicit AutoencoderCoder(SparseAutoencoder autoencoder) : autoencoder_(std::move(autoencoder)) {}
  std::string name() const override { return "sparse autoencoder"; }
  int bits_per_vector() const override { return 24 * autoencoder_.sparsity + 16; }
  void reconstruct(const float* vectors, std::int64_t rows, float* out) override {
    const std::vector<float> back =
        autoencoder_.reconstruct(vectors, rows);  // weights as they are: in its favour
    std::copy(back.begin(), back.end(), out);
  }

 private:
  SparseAutoencoder autoencoder_;
};

/// Trains one for keys and values of every layer on the activations of `source`.
void add_autoencoders(const Contender& like,
                      const NamedSource& source,
                      const MeasureOptions& options,
                      const RateOptions& rates,
                      std::vector<RateCoder>& coders) {
  if (source.spec.is_text)
    throw InvalidArgument("sparse_autoencoder needs activations to learn from, but --fit " +
                          source.spec.path + " is text: dump it with lexico-extract");
  ActivationReader reader(source.spec.path);
  reader.set_key_stage(like.set.key_stage);
  std::vector<TrainTarget> targets;
  for (const int layer : options.layers)
    for (const Kind kind : kBothKinds) targets.push_back({layer, kind});
  constexpr std::size_t kPoolBytes = std::size_t{1} << 30;
  ActivationSampler sampler(reader, targets, reader.num_rows(), options.seed, kPoolBytes);
  SparseAutoencoderConfig config;
  config.num_latents = like.coder.num_atoms;
  config.sparsity = options.sparsities[options.sparsities.size() / 2];
  config.activation = "relu";
  config.vectors = rates.autoencoder_vectors;
  config.seed = options.seed;
  config.threads = options.encode.threads;
  Progress progress("training sparse autoencoders", 1, "of the steps");
  std::vector<SparseAutoencoder> trained =
      train_sparse_autoencoders(config, sampler, [&](const SparseAutoencoderStep& step) {
        progress.update(static_cast<double>(step.step) / static_cast<double>(step.num_steps),
                        "rel_err=" + value_text(step.relative_error));
        return !stop_requested();
      });
  for (std::size_t i = 0; i < targets.size(); ++i)
    coders.push_back({"sparse autoencoder",
                      targets[i].layer,
                      targets[i].kind,
                      like.set.key_stage,
                      Dictionary::kAllHeads,
                      std::make_unique<AutoencoderCoder>(std::move(trained[i]))});
}

/// Rows of one layer and kind to fit on, as the source has them.
struct FitRows {
  std::vector<std::int64_t> tokens;
  std::vector<float> rows;
};

/// Takes rows without NaN or Inf of whole tokens to the frame that codes are fitted in.
std::vector<float> in_frame(const Dictionary& dictionary, const float* rows, std::int64_t count) {
  std::vector<float> frame(rows, rows + count * dictionary.dim);
  dictionary.transform.forward(frame.data(), count, dictionary.dim);
  return frame;
}

class Fitter {
 public:
  Fitter(const std::vector<Contender>& contenders,
         NamedSource& source,
         const MeasureOptions& options,
         const RateOptions& rates,
         std::vector<RateCoder>& coders)
      : contenders_(contenders),
        source_(source),
        options_(options),
        rates_(rates),
        coders_(coders),
        progress_("fitting codes", static_cast<double>(2 * options.layers.size()), "dictionaries") {
  }

  void run() {
    VectorSource& source = *source_.source;
    const std::int64_t heads = source.info().kv_heads;
    const std::vector<std::int64_t> tokens =
        source.choose_widely(std::max<std::int64_t>(1, rates_.fit_vectors / heads));
    for (const std::vector<int>& group : source.groups(options_.layers)) {
      std::map<std::pair<int, Kind>, FitRows> all;
      source.read(
          tokens,
          group,
          [&](int layer, Kind kind, const std::int64_t* of, std::int64_t count, const float* rows) {
            FitRows& fit = all[{layer, kind}];
            fit.tokens.insert(fit.tokens.end(), of, of + count);
            fit.rows.insert(fit.rows.end(), rows, rows + count * heads * source.info().head_dim);
          });
      for (const int layer : group)
        for (const Kind kind : kBothKinds) {
          fit(layer, kind, all[{layer, kind}]);
          all.erase({layer, kind});
        }
    }
  }

 private:
  void fit(int layer, Kind kind, const FitRows& from) {
    const VectorSource::Info& info = source_.source->info();
    const auto tokens = static_cast<std::int64_t>(from.tokens.size());
    StagedRows staged(source_, layer, kind, from.tokens.data(), tokens, from.rows.data());
    for (const Contender& contender : contenders_) {
      if (contender.coder.role != Coder::Role::kDictionary) continue;
      const DictionarySet& set = contender.set;
      if (set.dictionaries.front().format.coding == CodeFormat::Coding::kFp8Int16)
        continue;  // as it is meant
      if (!set.find(layer, kind) && !set.find(layer, kind, 0)) continue;
      for_each_dictionary(set,
                          layer,
                          kind,
                          info.kv_heads,
                          staged.at(set.key_stage),
                          tokens,
                          [&](const Dictionary& dictionary, const float* rows, std::int64_t count) {
                            fit_dictionary(contender, dictionary, rows, count);
                          });
    }
    if (rates_.baselines) {
      const KeyStage stage = contenders_.front().set.key_stage;
      for (const double rate : rates_.bits_per_number) {
        stop_if_asked();
        coders_.push_back({"PCA transform coding",
                           layer,
                           kind,
                           stage,
                           Dictionary::kAllHeads,
                           pca_coder(staged.at(stage),
                                     tokens * info.kv_heads,
                                     info.head_dim,
                                     info.kv_heads,
                                     static_cast<int>(std::lround(rate * info.head_dim)))});
      }
    }
    progress_.update(++done_, place_name(layer, kind));
  }

  void fit_dictionary(const Contender& contender,
                      const Dictionary& dictionary,
                      const float* rows,
                      std::int64_t count) {
    const int heads =
        dictionary.head == Dictionary::kAllHeads ? source_.source->info().kv_heads : 1;
    const std::vector<float> frame = in_frame(dictionary, rows, count);
    for (const double rate : rates_.bits_per_number) {
      stop_if_asked();
      CodeFitOptions fit;
      fit.max_atoms = std::min({kMostAtoms, dictionary.dim, dictionary.num_atoms});
      fit.weight_bits = 0;
      fit.scale_bits = -1;
      fit.states = kTrellisStates;
      fit.selection = options_.encode.selection;
      fit.threads = options_.encode.threads;
      Dictionary coded = dictionary;
      const int bits = static_cast<int>(std::lround(rate * dictionary.dim));
      try {
        coded.format = choose_codes(dictionary, frame.data(), count, heads, bits, fit).format;
      } catch (const InvalidArgument&) {
        continue;  // too few bits for an atom, or more than there are
      }
      coders_.push_back({contender.coder.name + kFittedSuffix,
                         dictionary.layer,
                         dictionary.kind,
                         contender.set.key_stage,
                         dictionary.head,
                         dictionary_coder(coded, options_.encode),
                         &dictionary,
                         std::make_shared<const CodeFormat>(coded.format),
                         "fitted"});
    }
  }

  static void stop_if_asked() {
    if (stop_requested()) throw Interrupted("stopped while fitting codes; nothing was written");
  }

  const std::vector<Contender>& contenders_;
  NamedSource& source_;
  const MeasureOptions& options_;
  const RateOptions& rates_;
  std::vector<RateCoder>& coders_;
  Progress progress_;
  double done_ = 0;
};

/// Sum and count of relative errors.
struct ErrorSum {
  double sum = 0;
  std::int64_t count = 0;
};

void add_errors(const float* x, const float* back, std::int64_t rows, int dim, ErrorSum& errors) {
  for (std::int64_t row = 0; row < rows; ++row) {
    double norm2 = 0, error2 = 0;
    for (int d = 0; d < dim; ++d) {
      const double a = x[row * dim + d], b = back[row * dim + d];
      norm2 += a * a;
      error2 += (a - b) * (a - b);
    }
    if (!std::isfinite(norm2) || norm2 == 0) continue;
    errors.sum += std::sqrt(error2 / norm2);
    ++errors.count;
  }
}

void measure_source(const std::vector<RateCoder>& coders,
                    NamedSource& source,
                    const MeasureOptions& options,
                    Progress& progress,
                    double& done,
                    report::EvaluationReport& report) {
  const VectorSource::Info& info = source.source->info();
  const std::vector<std::int64_t> tokens = chosen_tokens(*source.source, options.max_vectors);
  // Coders of single heads are one line together: by name, place and bits.
  std::map<std::tuple<std::string, int, Kind, int>, ErrorSum> errors;
  std::vector<float> back;
  for (const std::vector<int>& group : source.source->groups(options.layers))
    source.source->read(
        tokens,
        group,
        [&](int layer, Kind kind, const std::int64_t* of, std::int64_t count, const float* rows) {
          if (kind == Kind::kValues && source.position_offset != 0) return;
          StagedRows staged(source, layer, kind, of, count, rows);
          for (const RateCoder& c : coders) {
            if (c.layer != layer || c.kind != kind) continue;
            const float* x = staged.at(c.key_stage);
            std::vector<float> of_head;
            std::int64_t num_rows = count * info.kv_heads;
            if (c.head != Dictionary::kAllHeads) {
              of_head = rows_of_head(x, count, info.kv_heads, c.head, info.head_dim);
              x = of_head.data();
              num_rows = count;
            }
            const std::int64_t step =
                kRowsBetweenStops / info.kv_heads * info.kv_heads + info.kv_heads;
            ErrorSum& sum = errors[{c.name, layer, kind, c.coder->bits_per_vector()}];
            for (std::int64_t first = 0; first < num_rows; first += step) {
              if (stop_requested()) throw Interrupted("stopped; nothing was written");
              const std::int64_t part = std::min(step, num_rows - first);
              back.resize(static_cast<std::size_t>(part * info.head_dim));
              c.coder->reconstruct(x + first * info.head_dim, part, back.data());
              add_errors(x + first * info.head_dim, back.data(), part, info.head_dim, sum);
              progress.update(done += static_cast<double>(part),
                              source.spec.name + ", " + place_name(layer, kind));
            }
          }
        });
  for (const auto& [key, sum] : errors) {
    const auto& [name, layer, kind, bits] = key;
    report.rates.push_back({source.spec.name,
                            layer,
                            kind,
                            name,
                            bits,
                            sum.sum / static_cast<double>(sum.count),
                            sum.count});
  }
}

}  // namespace

std::vector<RateCoder> make_rate_coders(const std::vector<Contender>& contenders,
                                        NamedSource* fit,
                                        int dim,
                                        const MeasureOptions& options,
                                        const RateOptions& rates) {
  std::vector<RateCoder> coders;
  for (const Contender& contender : contenders)
    if (contender.coder.role == Coder::Role::kDictionary)
      add_own_formats(contender, options, coders);
  if (rates.baselines) add_fixed_coders(contenders.front().set, dim, options, rates, coders);
  if (fit != nullptr) Fitter(contenders, *fit, options, rates, coders).run();
  if (fit != nullptr && rates.autoencoder_vectors >= 0)
    add_autoencoders(contenders.front(), *fit, options, rates, coders);
  return coders;
}

void measure_rates(const std::vector<RateCoder>& coders,
                   std::vector<NamedSource>& sources,
                   const MeasureOptions& options,
                   report::EvaluationReport& report) {
  double total = 0, done = 0;
  for (const NamedSource& source : sources) {
    const double tokens =
        static_cast<double>(chosen_tokens(*source.source, options.max_vectors).size());
    for (const RateCoder& coder : coders)
      if (source.position_offset == 0 || coder.kind == Kind::kKeys)
        total +=
            tokens * (coder.head == Dictionary::kAllHeads ? source.source->info().kv_heads : 1);
  }
  Progress progress("comparing at equal bits", total, "vectors");
  for (NamedSource& source : sources)
    measure_source(coders, source, options, progress, done, report);
}

}  // namespace lexico::apps
