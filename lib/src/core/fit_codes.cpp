// The tables of a packed format, learned from vectors.
#include "lexico/fit_codes.h"

#include <omp.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "check.h"
#include "core/levels.h"
#include "core/size_of.h"
#include "core/trellis.h"
#include "core/weight_solver.h"

namespace lexico {

using detail::size_of;
using detail::throw_invalid;

namespace {

constexpr std::int64_t kSearchRows = 8192;  // of a sample that choose_codes searches on
constexpr int kMeasured = 3;                // formats whose error choose_codes measures
constexpr int kTrellisRounds = 8;
constexpr std::int64_t kTrellisRows = 8192;  // of a group that trellis levels are learned on
constexpr double kNoBits = -1;

using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// Mean squared error of 8-state trellis codes over that of scalar levels of the same bits, for a
// Gaussian: what the allocation of bits needs to know before any levels are learned.
double trellis_gain(int bits) {
  constexpr double kGain[] = {1.0, 0.86, 0.76, 0.71, 0.69};
  return kGain[std::min(bits, 4)];
}

// Vectors, and the pursuit of each.
struct Sample {
  std::int64_t rows = 0;
  int dim = 0, heads = 1, max_atoms = 0;
  std::vector<float> vectors;
  SparseCodes codes;
  std::vector<double> gram, inner;  // [rows, max_atoms (, max_atoms)]

  const float* row(std::int64_t r) const { return vectors.data() + r * dim; }
  int count(std::int64_t r, int atoms) const {
    return max_atoms > 0 ? std::min(atoms, codes.counts[static_cast<std::size_t>(r)]) : 0;
  }
};

void check(const CodeFitOptions& o, const Dictionary& d, std::int64_t rows, int heads) {
  if (heads < 1) throw_invalid("heads is ", heads, ", must be >= 1");
  if (rows < 0) throw_invalid("rows is ", rows, ", must be >= 0");
  const int limit = std::min(d.num_atoms, d.dim);
  if (o.max_atoms < 0 || o.max_atoms > limit)
    throw_invalid("max_atoms is ", o.max_atoms, ", must be in [0, ", limit, "]");
  if (o.groups != 0 && o.groups != 1 && o.groups != heads)
    throw_invalid("groups is ", o.groups, ", must be 1 or ", heads, " (0: the latter)");
  if (o.states != 0 && !detail::Trellis::has(o.states))
    throw_invalid("states is ", o.states, ", must be 0 or a power of two in [4, 256]");
  if (o.max_rows < 2) throw_invalid("max_rows is ", o.max_rows, ", must be >= 2");
}

// Whole tokens (one row of each head), evenly spread; a token with a NaN or Inf is left out.
Sample take(const Dictionary& d,
            const float* vectors,
            std::int64_t rows,
            int heads,
            const CodeFitOptions& options,
            std::int64_t max_rows) {
  Sample sample;
  sample.dim = d.dim;
  sample.heads = heads;
  const std::int64_t tokens = rows / heads, size = std::int64_t{heads} * d.dim;
  const std::int64_t wanted = std::min(tokens, (max_rows + heads - 1) / heads);
  for (std::int64_t i = 0; i < wanted; ++i) {
    const float* token = vectors + i * tokens / wanted * size;
    if (std::all_of(token, token + size, [](float v) { return std::isfinite(v); }))
      sample.vectors.insert(sample.vectors.end(), token, token + size);
  }
  sample.rows = static_cast<std::int64_t>(sample.vectors.size()) / d.dim;
  if (sample.rows < 2 * heads)
    throw_invalid(
        "codes need at least ", 2 * heads, " vectors without NaN to learn from, got ", sample.rows);
  sample.max_atoms = options.max_atoms;
  if (options.max_atoms == 0) return sample;
  const int s = options.max_atoms;
  EncodeOptions encode;
  encode.max_atoms = s;
  encode.selection = options.selection;
  encode.threads = options.threads;
  Encoder encoder(encode);
  encoder.set_atoms(d.atoms.data(), 1, d.num_atoms, d.dim);
  encoder.encode(sample.vectors.data(), sample.rows, sample.codes);
  sample.gram.resize(size_of(sample.rows, s, s));
  sample.inner.resize(size_of(sample.rows, s));
  const int threads = options.threads > 0 ? options.threads : omp_get_num_procs();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t r = 0; r < sample.rows; ++r)
    detail::gram_of(d.atoms.data(),
                    d.dim,
                    sample.codes.indices.data() + r * s,
                    sample.count(r, s),
                    sample.row(r),
                    s,
                    sample.gram.data() + r * s * s,
                    sample.inner.data() + r * s);
  return sample;
}

std::vector<double> norms_of(const Sample& sample) {
  std::vector<double> norms(size_of(sample.rows));
  for (std::int64_t r = 0; r < sample.rows; ++r)
    norms[size_of(r)] =
        Eigen::Map<const Eigen::VectorXf>(sample.row(r), sample.dim).cast<double>().norm();
  return norms;
}

// A wide grid where bits allow it: vectors beyond the sample's range (first tokens, outliers) are
// still in it.
void fit_scale(const std::vector<double>& norms, CodeFormat& format) {
  if (format.scale_bits == 0) return;
  std::vector<double> logs;
  for (double norm : norms)
    if (norm > 0) logs.push_back(std::log2(norm));
  if (logs.empty()) logs.push_back(0);
  std::sort(logs.begin(), logs.end());
  const auto at = [&](double share) {
    return logs[static_cast<std::size_t>(share * static_cast<double>(logs.size() - 1))];
  };
  const double margin = std::max(0, format.scale_bits - 5);
  const double low = at(0.005) - margin, high = at(0.995) + margin + 1e-3;
  format.scale_low = static_cast<float>(std::clamp(low, -119.0, 118.0));
  format.scale_step = static_cast<float>(
      (std::clamp(high, low + 1e-3, 119.0) - static_cast<double>(format.scale_low)) /
      ((1 << format.scale_bits) - 1));
}

double scale_of(const CodeFormat& format, double norm) {
  if (format.scale_bits == 0) return 1;
  const double top = (1 << format.scale_bits) - 1, low = static_cast<double>(format.scale_low),
               step = static_cast<double>(format.scale_step);
  const double at = norm > 0 ? std::round((std::log2(norm) - low) / step) : 0.0;
  return std::exp2(low + step * std::clamp(at, 0.0, top));
}

std::vector<float> uniform_levels(const std::vector<float>& sorted, int bits) {
  const int half = 1 << (bits - 1);
  std::vector<float> best, levels(size_of(2 * half));
  double least = INFINITY;
  const float reach = std::max(std::fabs(sorted.front()), std::fabs(sorted.back()));
  for (int clip = 8; clip <= 32; ++clip) {
    const float step = reach * static_cast<float>(clip) / 32.0f / static_cast<float>(half);
    for (int k = 0; k < 2 * half; ++k) levels[size_of(k)] = step * static_cast<float>(k - half + 1);
    double error = 0;
    for (float v : sorted) {
      const float off = v - levels[size_of(detail::nearest_level(levels.data(), 2 * half, v))];
      error += static_cast<double>(off) * static_cast<double>(off);
    }
    if (error < least) {
      least = error;
      best = levels;
    }
  }
  return best;
}

// Learns the levels of one position after the other, each from the weights that the positions
// before it leave best; returns what the quantized atoms leave over, z - D y.
RowMatrix fit_weights(const Dictionary& d,
                      const Sample& sample,
                      const std::vector<double>& norms,
                      const CodeFitOptions& options,
                      CodeFormat& format) {
  const int s = format.max_atoms;
  const int threads = options.threads > 0 ? options.threads : omp_get_num_procs();
  RowMatrix rest =
      Eigen::Map<const RowMatrix>(sample.vectors.data(), sample.rows, std::ptrdiff_t{sample.dim});
  std::vector<detail::WeightSolver> solvers(size_of(s > 0 ? sample.rows : 0));
  std::vector<float> wanted(solvers.size());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t r = 0; r < static_cast<std::int64_t>(solvers.size()); ++r)
    solvers[size_of(r)].start(sample.gram.data() + r * sample.max_atoms * sample.max_atoms,
                              sample.max_atoms,
                              sample.inner.data() + r * sample.max_atoms,
                              sample.count(r, s));
  format.weight_levels.clear();
  for (int k = 0; k < s; ++k) {
    std::vector<float> numbers;
    for (std::int64_t r = 0; r < sample.rows; ++r) {
      if (k >= sample.count(r, s)) continue;
      wanted[size_of(r)] =
          static_cast<float>(solvers[size_of(r)].best(k) / scale_of(format, norms[size_of(r)]));
      numbers.push_back(wanted[size_of(r)]);
    }
    if (numbers.empty()) numbers.push_back(0);
    std::vector<float> levels = detail::lloyd_max(numbers, format.weight_bits).back().values;
    if (!options.learned_levels) levels = uniform_levels(numbers, format.weight_bits);
    levels[size_of(detail::nearest_level(levels.data(), static_cast<int>(levels.size()), 0))] = 0;
    format.weight_levels.insert(format.weight_levels.end(), levels.begin(), levels.end());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t r = 0; r < sample.rows; ++r) {
      if (k >= sample.count(r, s)) continue;
      const float level = levels[size_of(detail::nearest_level(
          levels.data(), static_cast<int>(levels.size()), wanted[size_of(r)]))];
      const double weight = static_cast<double>(level) * scale_of(format, norms[size_of(r)]);
      solvers[size_of(r)].fix(k, weight);
      const int index = sample.codes.indices[size_of(r, sample.max_atoms) + size_of(k)];
      rest.row(r) -=
          static_cast<float>(weight) * Eigen::Map<const Eigen::RowVectorXf>(
                                           d.atoms.data() + std::ptrdiff_t{index} * d.dim, d.dim);
    }
  }
  return rest;
}

struct Axes {
  Eigen::RowVectorXf mean;
  RowMatrix axes;  // rows, largest variance first
  Eigen::VectorXd variances;
};

// Row r of group r % groups.
RowMatrix rows_of(const RowMatrix& all, int group, int groups) {
  const std::ptrdiff_t count = (all.rows() - group + groups - 1) / groups;
  RowMatrix rows(count, all.cols());
  for (std::ptrdiff_t i = 0; i < count; ++i) rows.row(i) = all.row(group + i * groups);
  return rows;
}

Axes principal_axes(const RowMatrix& rows) {
  const Eigen::RowVectorXd mean = rows.cast<double>().colwise().mean();
  const RowMatrix centred = rows.rowwise() - mean.cast<float>();
  Eigen::MatrixXd covariance = Eigen::MatrixXd::Zero(rows.cols(), rows.cols());
  constexpr std::ptrdiff_t kPiece = 2048;  // summed in float, pieces in double
  for (std::ptrdiff_t first = 0; first < rows.rows(); first += kPiece) {
    const auto piece = centred.middleRows(first, std::min(kPiece, rows.rows() - first));
    covariance += Eigen::MatrixXf(piece.transpose() * piece).cast<double>();
  }
  covariance /= static_cast<double>(rows.rows());
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solved(covariance);
  Axes result;
  result.mean = mean.cast<float>();
  result.axes = solved.eigenvectors().rowwise().reverse().transpose().cast<float>();
  result.variances = solved.eigenvalues().reverse().cwiseMax(0.0);
  return result;
}

// Bits always to the component with the largest drop of error per bit. Drops of one component may
// grow before they fall, so several bits at once are weighed too.
// @param errors  [components][bits]
std::vector<int> allocate(const std::vector<std::vector<double>>& errors, int total) {
  std::vector<int> bits(errors.size(), 0);
  while (total > 0) {
    double best = kNoBits;
    std::size_t where = 0;
    int step = 0;
    for (std::size_t c = 0; c < errors.size(); ++c)
      for (int more = 1; more <= std::min(total, ResidualCode::kMaxBits - bits[c]); ++more) {
        const auto now = size_of(bits[c]);
        const double drop = (errors[c][now] - errors[c][now + size_of(more)]) / more;
        if (drop > best) {
          best = drop;
          where = c;
          step = more;
        }
      }
    bits[where] += step;
    total -= step;
  }
  return bits;
}

// Centroids of what the trellis assigns to each level, a few rounds.
void fit_trellis(const RowMatrix& components,
                 const std::vector<int>& bits,
                 int states,
                 int threads,
                 std::vector<std::vector<float>>& levels) {
  const detail::Trellis trellis(states);
  std::vector<std::size_t> coded;
  for (std::size_t c = 0; c < bits.size(); ++c)
    if (bits[c] > 0) coded.push_back(c);
  const std::int64_t rows = std::min<std::int64_t>(components.rows(), kTrellisRows);
  const std::int64_t all_rows = components.rows();
  if (coded.empty()) return;
  std::vector<std::uint32_t> codes(size_of(rows) * coded.size());
  for (int round = 0; round < kTrellisRounds; ++round) {
#pragma omp parallel num_threads(threads)
    {
      std::vector<detail::Trellis::Number> numbers(coded.size());
      detail::Trellis::Scratch scratch;
#pragma omp for schedule(static)
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t row = r * all_rows / rows;
        for (std::size_t i = 0; i < coded.size(); ++i)
          numbers[i] = {components(row, static_cast<std::ptrdiff_t>(coded[i])),
                        bits[coded[i]],
                        levels[coded[i]].data()};
        trellis.encode(numbers, codes.data() + size_of(r) * coded.size(), scratch);
      }
    }
    std::vector<std::vector<double>> sums(coded.size()), counts(coded.size());
    for (std::size_t i = 0; i < coded.size(); ++i) {
      sums[i].assign(levels[coded[i]].size(), 0);
      counts[i].assign(levels[coded[i]].size(), 0);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      std::uint32_t history = 0;
      for (std::size_t i = 0; i < coded.size(); ++i) {
        const auto level = size_of(trellis.level(codes[size_of(r) * coded.size() + i], history));
        sums[i][level] += static_cast<double>(
            components(r * all_rows / rows, static_cast<std::ptrdiff_t>(coded[i])));
        ++counts[i][level];
      }
    }
    for (std::size_t i = 0; i < coded.size(); ++i) {
      std::vector<float>& own = levels[coded[i]];
      for (std::size_t k = 0; k < own.size(); ++k) {
        if (counts[i][k] > 0) own[k] = static_cast<float>(sums[i][k] / counts[i][k]);
        if (k > 0) own[k] = std::max(own[k], own[k - 1]);  // the quarters interleave
      }
    }
  }
}

void fit_residual(const RowMatrix& rest,
                  const Sample& sample,
                  const std::vector<double>& norms,
                  const CodeFitOptions& options,
                  CodeFormat& format) {
  ResidualCode& residual = format.residual;
  if (options.residual_bits == 0) return;
  const int dim = sample.dim;
  const int threads = options.threads > 0 ? options.threads : omp_get_num_procs();
  residual.groups = options.groups > 0 ? options.groups : sample.heads;
  residual.states = options.states;
  residual.relative = options.relative;
  const int extra = options.states > 0 ? 1 : 0;
  for (int g = 0; g < residual.groups; ++g) {
    const RowMatrix rows = rows_of(rest, g, residual.groups);
    const Axes axes = principal_axes(rows);
    RowMatrix components = (rows.rowwise() - axes.mean) * axes.axes.transpose();
    if (options.relative)
      for (std::ptrdiff_t i = 0; i < components.rows(); ++i)
        components.row(i) /=
            static_cast<float>(scale_of(format, norms[size_of(g + i * residual.groups)]));
    std::vector<std::vector<detail::Levels>> learned(size_of(dim));
    std::vector<std::vector<double>> errors(size_of(dim));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int c = 0; c < dim; ++c) {
      std::vector<float> numbers(components.col(c).begin(), components.col(c).end());
      auto& own = learned[size_of(c)];
      if (options.learned_residual) {
        own = detail::lloyd_max(numbers, ResidualCode::kMaxBits + extra);
      } else {
        const double mean = static_cast<double>(components.col(c).mean());
        const double variance = (components.col(c).cast<double>().array() - mean).square().mean();
        for (int bits = 0; bits <= ResidualCode::kMaxBits + extra; ++bits) {
          own.push_back(
              {detail::gaussian_levels(bits), detail::gaussian_distortion(bits) * variance});
          for (float& level : own.back().values)
            level = static_cast<float>(mean + std::sqrt(variance) * static_cast<double>(level));
        }
      }
      for (int bits = 0; bits <= ResidualCode::kMaxBits; ++bits)
        errors[size_of(c)].push_back(own[size_of(bits)].distortion *
                                     (extra > 0 ? trellis_gain(bits) : 1.0));
    }
    const std::vector<int> bits = allocate(errors, options.residual_bits);
    std::vector<std::vector<float>> levels(size_of(dim));
    for (std::size_t c = 0; c < levels.size(); ++c)
      if (bits[c] > 0) levels[c] = learned[c][size_of(bits[c] + extra)].values;
    if (extra > 0) fit_trellis(components, bits, options.states, threads, levels);
    residual.mean.insert(residual.mean.end(), axes.mean.begin(), axes.mean.end());
    residual.axes.insert(
        residual.axes.end(), axes.axes.data(), axes.axes.data() + axes.axes.size());
    residual.bits.insert(residual.bits.end(), bits.begin(), bits.end());
    for (const std::vector<float>& own : levels)
      residual.levels.insert(residual.levels.end(), own.begin(), own.end());
  }
}

CodeFormat fit(const Dictionary& d, const Sample& sample, const CodeFitOptions& options) {
  CodeFormat format;
  format.coding = CodeFormat::Coding::kPacked;
  format.max_atoms = options.max_atoms;
  format.weight_bits = options.weight_bits;
  format.scale_bits = options.scale_bits;
  const std::vector<double> norms = norms_of(sample);
  fit_scale(norms, format);
  const RowMatrix rest = fit_weights(d, sample, norms, options, format);
  fit_residual(rest, sample, norms, options, format);
  return format;
}

void check_bits(const CodeFitOptions& o, int dim) {
  if (o.weight_bits < 2 || o.weight_bits > 8)
    throw_invalid("weight_bits is ", o.weight_bits, ", must be in [2, 8]");
  if (o.scale_bits < 0 || o.scale_bits > 8)
    throw_invalid("scale_bits is ", o.scale_bits, ", must be in [0, 8]");
  if (o.residual_bits < 0 || o.residual_bits > ResidualCode::kMaxBits * dim)
    throw_invalid("residual_bits is ",
                  o.residual_bits,
                  ", must be in [0, ",
                  ResidualCode::kMaxBits * dim,
                  "]");
  if (o.relative && o.scale_bits == 0)
    throw_invalid("relative residual levels need a scale, scale_bits is 0");
}

// What a residual code of so many bits would leave, per vector, if components were Gaussian.
double expected_error(const RowMatrix& rest, int groups, int bits, bool trellis) {
  double sum = 0;
  for (int g = 0; g < groups; ++g) {
    const Axes axes = principal_axes(rows_of(rest, g, groups));
    std::vector<std::vector<double>> errors;
    for (double variance : axes.variances) {
      errors.emplace_back();
      for (int b = 0; b <= ResidualCode::kMaxBits; ++b)
        errors.back().push_back(variance * detail::gaussian_distortion(b) *
                                (trellis ? trellis_gain(b) : 1.0));
    }
    const std::vector<int> given = allocate(errors, bits);
    for (std::size_t c = 0; c < errors.size(); ++c) sum += errors[c][size_of(given[c])];
  }
  return sum / groups;
}

double error_of(const Dictionary& d, Codec& codec, const float* vectors, std::int64_t rows) {
  constexpr std::int64_t kBlock = 4096;
  const int dim = d.dim;
  const auto heads =
      static_cast<std::int64_t>(std::max(d.transform.heads, d.format.residual.groups));
  const std::int64_t block = (kBlock + heads - 1) / heads * heads;
  std::vector<float> back(size_of(std::min(rows, block), dim)), original;
  double sum = 0;
  std::int64_t measured = 0;
  for (std::int64_t first = 0; first < rows; first += block) {
    const std::int64_t n = std::min(block, rows - first);
    const float* z = vectors + first * dim;
    codec.reconstruct(z, n, back.data());
    original.assign(z, z + n * dim);
    if (d.transform.map.empty()) d.transform.backward(original.data(), n, dim);
    for (std::int64_t r = 0; r < n; ++r) {
      double error = 0, norm = 0;
      for (int c = 0; c < dim; ++c) {
        const double off = static_cast<double>(z[r * dim + c]) -
                           static_cast<double>(back[size_of(r, dim) + size_of(c)]);
        const double x = static_cast<double>(original[size_of(r, dim) + size_of(c)]);
        error += off * off;
        norm += x * x;
      }
      if (!std::isfinite(norm) || norm == 0) continue;
      sum += std::sqrt(error / norm);
      ++measured;
    }
  }
  return measured > 0 ? sum / static_cast<double>(measured) : NAN;
}

}  // namespace

CodeFormat fit_codes(const Dictionary& dictionary,
                     const float* vectors,
                     std::int64_t rows,
                     int heads,
                     const CodeFitOptions& options) {
  check(options, dictionary, rows, heads);
  check_bits(options, dictionary.dim);
  return fit(
      dictionary, take(dictionary, vectors, rows, heads, options, options.max_rows), options);
}

CodeChoice choose_codes(const Dictionary& dictionary,
                        const float* vectors,
                        std::int64_t rows,
                        int heads,
                        int bits,
                        const CodeFitOptions& options) {
  check(options, dictionary, rows, heads);
  struct Candidate {
    CodeFitOptions options;
    double expected;
  };
  std::vector<Candidate> candidates;
  const int index = index_bits(dictionary.num_atoms);
  int least = -1, most = -1;
  const Sample search =
      take(dictionary, vectors, rows, heads, options, std::min(options.max_rows, kSearchRows));
  const std::vector<double> norms = norms_of(search);
  const int groups = options.groups > 0 ? options.groups : heads;
  for (int scale_bits : {0, 4, 8}) {
    if (options.scale_bits >= 0) scale_bits = options.scale_bits;
    if (scale_bits > 0 || !options.relative)
      for (int s = 0; s <= options.max_atoms; ++s)
        for (int weight_bits : {2, 3, 4, 5, 6, 8}) {
          if (options.weight_bits > 0) weight_bits = options.weight_bits;
          CodeFitOptions o = options;
          o.max_atoms = s;
          o.weight_bits = weight_bits;
          o.scale_bits = scale_bits;
          const int atom_bits = scale_bits + s * (index + weight_bits);
          o.residual_bits = bits - atom_bits;
          const int top = atom_bits + ResidualCode::kMaxBits * dictionary.dim;
          if (least < 0 || atom_bits < least) least = atom_bits;
          most = std::max(most, top);
          if (o.residual_bits >= 0 && bits <= top) {
            CodeFormat format;
            format.coding = CodeFormat::Coding::kPacked;
            format.max_atoms = s;
            format.weight_bits = weight_bits;
            format.scale_bits = scale_bits;
            fit_scale(norms, format);
            const RowMatrix rest = fit_weights(dictionary, search, norms, o, format);
            candidates.push_back(
                {o, expected_error(rest, groups, o.residual_bits, options.states > 0)});
          }
          if (s == 0 || options.weight_bits > 0) break;
        }
    if (options.scale_bits >= 0) break;
  }
  if (candidates.empty())
    throw_invalid("codes of ", bits, " bits a vector: must be in [", least, ", ", most, "]");
  std::stable_sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) {
    return a.expected < b.expected;
  });
  if (candidates.size() > size_of(kMeasured)) candidates.resize(size_of(kMeasured));
  const Sample whole = take(dictionary, vectors, rows, heads, options, options.max_rows);
  CodeChoice best;
  best.error = INFINITY;
  Dictionary trial = dictionary;
  EncodeOptions encode;
  encode.selection = options.selection;
  encode.threads = options.threads;
  for (const Candidate& candidate : candidates) {
    trial.format = fit(dictionary, whole, candidate.options);
    Codec codec(trial, encode);
    const double error = error_of(trial, codec, search.vectors.data(), search.rows);
    if (error < best.error) best = {trial.format, error};
  }
  return best;
}

double code_error(const Dictionary& dictionary,
                  const float* vectors,
                  std::int64_t rows,
                  const EncodeOptions& options) {
  Codec codec(dictionary, options);
  return error_of(dictionary, codec, vectors, rows);
}

}  // namespace lexico
