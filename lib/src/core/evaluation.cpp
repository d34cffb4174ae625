#include "lexico/evaluation.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "check.h"
#include "core/random.h"

namespace lexico {
namespace {

constexpr double kEpsilon = 1e-8;  // the published metric's guard for zero vectors
constexpr std::int64_t kBatch =
    16384;  // vectors per pursuit: bounds the memory of codes and curves
constexpr const char* kName = "evaluation";  // opens the messages

std::vector<int> checked(std::vector<int> sparsities) {
  if (sparsities.empty()) detail::throw_invalid(kName, ": no sparsity is given, want at least one");
  if (sparsities.front() < 1)
    detail::throw_invalid(kName, ": sparsity is ", sparsities.front(), ", must be at least 1");
  for (std::size_t i = 1; i < sparsities.size(); ++i)
    if (sparsities[i] <= sparsities[i - 1])
      detail::throw_invalid(
          kName, ": sparsities must ascend, but ", sparsities[i], " follows ", sparsities[i - 1]);
  return sparsities;
}

EncodeOptions with_max_atoms(EncodeOptions options, const std::vector<int>& sparsities) {
  options.max_atoms = checked(sparsities).back();
  return options;
}

double norm(const float* x, int dim) {
  double sum = 0;
  for (int i = 0; i < dim; ++i) sum += static_cast<double>(x[i]) * x[i];
  return std::sqrt(sum);
}

/// Linear interpolation between order statistics (numpy's default). Reorders `values`.
double quantile(std::vector<float>& values, double q) {
  if (values.empty()) return std::nan("");
  const double place = q * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::ptrdiff_t>(place);
  std::nth_element(values.begin(), values.begin() + below, values.end());
  const double low = values[static_cast<std::size_t>(below)];
  if (static_cast<double>(below) == place) return low;
  const double high = *std::min_element(values.begin() + below + 1, values.end());
  return low + (high - low) * (place - static_cast<double>(below));
}

}  // namespace

RelativeErrors::RelativeErrors(std::vector<int> sparsities)
    : sparsities_(checked(std::move(sparsities))),
      errors_(sparsities_.size()),
      atoms_(sparsities_.size(), 0.0) {}

std::int64_t RelativeErrors::num_vectors() const {
  return static_cast<std::int64_t>(errors_.front().size());
}

std::vector<ErrorSummary> RelativeErrors::summarize() const {
  std::vector<ErrorSummary> summaries;
  for (std::size_t i = 0; i < sparsities_.size(); ++i) {
    std::vector<float> errors = errors_[i];
    double sum = 0;
    for (const float error : errors) sum += error;
    const auto count =
        static_cast<double>(errors.size());  // 0 / 0 is the NaN that the header promises
    summaries.push_back({sparsities_[i],
                         sum / count,
                         quantile(errors, 0.5),
                         quantile(errors, 0.99),
                         atoms_[i] / count,
                         num_vectors()});
  }
  return summaries;
}

Evaluator::Evaluator(std::vector<int> sparsities, EncodeOptions options)
    : sparsities_(std::move(sparsities)), encoder_(with_max_atoms(options, sparsities_)) {}

void Evaluator::use(const Dictionary& dictionary) {
  encoder_.set_atoms(dictionary.atoms.data(), 1, dictionary.num_atoms, dictionary.dim);
  dictionary_ = &dictionary;
}

void Evaluator::measure(const float* vectors,
                        std::int64_t num_vectors,
                        RelativeErrors& errors,
                        int first_head) {
  if (dictionary_ == nullptr) detail::throw_invalid(kName, ": measure() before use()");
  if (errors.sparsities_ != sparsities_)
    detail::throw_invalid(kName, ": errors were made for other sparsities");
  const int heads = dictionary_->transform.heads;
  for (std::int64_t first = 0; first < num_vectors; first += kBatch)
    measure_batch(vectors + first * dictionary_->dim,
                  std::min(kBatch, num_vectors - first),
                  static_cast<int>((first_head + first) % heads),
                  errors);
}

void Evaluator::measure_batch(const float* vectors,
                              std::int64_t count,
                              int head,
                              RelativeErrors& errors) {
  const int dim = dictionary_->dim;
  const Transform& transform = dictionary_->transform;
  const float* framed = vectors;
  if (!transform.is_identity()) {
    frame_.assign(vectors, vectors + count * dim);
    transform.forward(frame_.data(), count, dim, head);
    framed = frame_.data();
  }
  encoder_.encode(framed, count, codes_, /*with_curve=*/true);
  const auto stride = static_cast<std::size_t>(sparsities_.back());
  for (std::int64_t b = 0; b < count; ++b) {
    const auto at = static_cast<std::size_t>(b);
    if (std::isnan(codes_.residual_norms[at])) {
      ++errors.num_not_finite_;
      continue;
    }
    const double length = norm(vectors + b * dim, dim);
    for (std::size_t i = 0; i < sparsities_.size(); ++i) {
      const int s = sparsities_[i];
      errors.atoms_[i] += std::min(s, codes_.counts[at]);
      if (!transform.map.empty()) continue;
      // A signal without atoms (zero, or within the tolerance at once) has no curve: its residual
      // is itself.
      const double residual = codes_.counts[at] == 0
                                  ? codes_.residual_norms[at]
                                  : codes_.curve[at * stride + static_cast<std::size_t>(s - 1)];
      errors.errors_[i].push_back(static_cast<float>(residual / (length + kEpsilon)));
    }
  }
  if (transform.map.empty()) return;
  // Lengths in the frame are others: what comes back is compared, at each sparsity.
  for (std::size_t i = 0; i < sparsities_.size(); ++i) {
    budgets_.assign(static_cast<std::size_t>(count), sparsities_[i]);
    encoder_.encode(framed, count, codes_, /*with_curve=*/false, budgets_.data());
    back_.assign(static_cast<std::size_t>(count * dim), 0.0f);
    for (std::int64_t b = 0; b < count; ++b)
      for (int k = 0; k < codes_.counts[static_cast<std::size_t>(b)]; ++k) {
        const auto slot = static_cast<std::size_t>(b) * stride + static_cast<std::size_t>(k);
        const float* atom = dictionary_->atoms.data() + std::ptrdiff_t{codes_.indices[slot]} * dim;
        for (int d = 0; d < dim; ++d)
          back_[static_cast<std::size_t>(b * dim + d)] += codes_.weights[slot] * atom[d];
      }
    transform.backward(back_.data(), count, dim, head);
    for (std::int64_t b = 0; b < count; ++b) {
      if (std::isnan(codes_.residual_norms[static_cast<std::size_t>(b)])) continue;
      const float* x = vectors + b * dim;
      float* y = back_.data() + b * dim;
      for (int d = 0; d < dim; ++d) y[d] = x[d] - y[d];
      errors.errors_[i].push_back(static_cast<float>(norm(y, dim) / (norm(x, dim) + kEpsilon)));
    }
  }
}

std::vector<ErrorSummary> evaluate(const Dictionary& dictionary,
                                   const float* vectors,
                                   std::int64_t num_vectors,
                                   const std::vector<int>& sparsities,
                                   const EncodeOptions& options) {
  Evaluator evaluator(sparsities, options);
  RelativeErrors errors(sparsities);
  evaluator.use(dictionary);
  evaluator.measure(vectors, num_vectors, errors);
  return errors.summarize();
}

Dictionary random_dictionary(int layer, Kind kind, int num_atoms, int dim, std::uint64_t seed) {
  Dictionary dictionary{layer, kind, num_atoms, dim, {}};
  dictionary.atoms.resize(static_cast<std::size_t>(num_atoms) * static_cast<std::size_t>(dim));
  detail::Random random{seed, static_cast<std::uint64_t>(layer), static_cast<std::uint64_t>(kind)};
  for (float& value : dictionary.atoms) value = static_cast<float>(random.normal());
  normalize_atoms(dictionary.atoms, num_atoms, dim);
  return dictionary;
}

Dictionary sample_dictionary(
    int layer, Kind kind, int num_atoms, int dim, const float* vectors, std::int64_t num_vectors) {
  Dictionary dictionary{layer, kind, num_atoms, dim, {}};
  const auto wanted = static_cast<std::size_t>(num_atoms) * static_cast<std::size_t>(dim);
  for (std::int64_t row = 0; row < num_vectors && dictionary.atoms.size() < wanted; ++row) {
    const float* vector = vectors + row * dim;
    const double length = norm(vector, dim);
    if (length > 0 && std::isfinite(length))
      dictionary.atoms.insert(dictionary.atoms.end(), vector, vector + dim);
  }
  if (dictionary.atoms.size() < wanted)
    detail::throw_invalid("sample dictionary: ",
                          dictionary.atoms.size() / static_cast<std::size_t>(dim),
                          " usable vectors, need ",
                          num_atoms);
  normalize_atoms(dictionary.atoms, num_atoms, dim);
  return dictionary;
}

}  // namespace lexico
