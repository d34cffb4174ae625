#include "lexico/cache_effect.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>

#include "check.h"
#include "model/language_model_impl.h"

namespace lexico {
namespace {

using detail::LanguageModelImpl;
using detail::throw_invalid;
using torch::Tensor;

constexpr double kMostAtOnce = 64;  // sequences: a model of any size is busy with these
constexpr int kDefaultChunk = 32;   // where the window, and so the default, is 0

int chunk_of(const CacheSetting& setting) {
  if (setting.chunk > 0) return setting.chunk;
  return setting.recent_window > 0 ? setting.recent_window : kDefaultChunk;
}

void check(const CacheSetting& setting, std::size_t number) {
  const auto at_least_0 = [&](const char* name, int value) {
    if (value < 0)
      throw_invalid("setting ", number, ": ", name, " is ", value, ", must be at least 0");
  };
  at_least_0("recent_window", setting.recent_window);
  at_least_0("sink_tokens", setting.sink_tokens);
  at_least_0("chunk", setting.chunk);
  if (setting.compress_chunk < 1)
    throw_invalid(
        "setting ", number, ": compress_chunk is ", setting.compress_chunk, ", must be at least 1");
  if (setting.approximate && setting.compressed)
    throw_invalid("setting ", number, ": both approximate and compressed are given");
  if (!setting.approximate && !setting.compressed)
    throw_invalid("setting ", number, ": approximate is empty");
}

/// What the sums of one setting are made of.
struct Measured {
  double full_nll = 0, compressed_nll = 0;
  std::vector<double> kl;  // of each token
  std::size_t bytes = 0;
  std::int64_t own_atoms = 0;
};

/// The caches of some sequences of one length, read side by side.
struct Cache {
  Tensor keys, values;         // [L, B, H_kv, capacity, d] float32 on the device
  std::int64_t length = 0;     // tokens it holds
  std::int64_t old_until = 0;  // tokens before it have had their turn: approximated, or sinks

  Cache(const LanguageModelImpl& model, std::int64_t batch, std::int64_t capacity) {
    const ModelInfo& info = model.info;
    const auto make = [&] {
      return torch::empty({info.layers, batch, info.kv_heads, capacity, info.head_dim},
                          torch::TensorOptions(torch::kFloat32).device(model.device));
    };
    keys = make();
    values = make();
  }

  /// Reads the next tokens and keeps their vectors. @returns logits [B, n, vocab].
  Tensor read(const LanguageModelImpl& model, const Tensor& ids) {
    const detail::StepTensors out =
        model.step(ids, keys.narrow(3, 0, length), values.narrow(3, 0, length));
    keys.narrow(3, length, ids.size(1)).copy_(out.keys);
    values.narrow(3, length, ids.size(1)).copy_(out.values);
    length += ids.size(1);
    return out.logits;
  }
};

/// Rounds as CompressedCache rounds exact numbers.
void round_to_half(Tensor numbers) {
  constexpr double kMost = 65504;
  numbers.copy_(numbers.clamp(-kMost, kMost).to(torch::kFloat16));
}

/// A CompressedCache of the sequences read side by side, and the dense vectors that it stands for.
class CompressedPast {
 public:
  CompressedPast(const LanguageModelImpl& model, const CacheSetting& setting, std::int64_t batch)
      : model_(model), cache_(setting.compressed()) {
    const CacheShape& has = cache_.shape();
    const ModelInfo& info = model.info;
    if (has.layers != info.layers || has.kv_heads != info.kv_heads || has.head_dim != info.head_dim)
      throw_invalid("compressed made a cache of ",
                    has.layers,
                    " layers, ",
                    has.kv_heads,
                    " KV heads and head_dim ",
                    has.head_dim,
                    ", the model has ",
                    info.layers,
                    ", ",
                    info.kv_heads,
                    " and ",
                    info.head_dim);
    for (std::int64_t i = 0; i < batch; ++i) sequences_.push_back(cache_.add_sequence());
  }

  /// Compresses the last `count` tokens of `dense`, and takes back all that changed.
  void append(Cache& dense, std::int64_t count) {
    const std::int64_t first = dense.length - count, dim = model_.info.head_dim;
    for (int layer = 0; layer < model_.info.layers; ++layer) {
      const auto added = [&](const Tensor& all) {
        return all[layer].narrow(2, first, count).to(torch::kCPU).contiguous();  // [B, H, n, d]
      };
      const Tensor keys = added(dense.keys), values = added(dense.values);
      std::vector<NewTokens> batch;
      std::vector<std::int64_t> coded;  // end of what was coded before
      for (std::size_t i = 0; i < sequences_.size(); ++i) {
        const std::int64_t at = static_cast<std::int64_t>(i) * model_.info.kv_heads * count * dim;
        const float* k = keys.data_ptr<float>() + at;
        const float* v = values.data_ptr<float>() + at;
        batch.push_back({sequences_[i], count, k, v, dim, count * dim});
        coded.push_back(coded_end(sequences_[i], layer));
      }
      cache_.append(layer, batch);
      for (std::size_t i = 0; i < sequences_.size(); ++i) {
        const std::int64_t now = std::min(coded_end(sequences_[i], layer), first);
        take_back(dense, layer, i, coded[i], now);
        take_back(dense, layer, i, first, dense.length);
      }
    }
  }

  void add_to(Measured& measured) const {
    measured.bytes += cache_.bytes();
    measured.own_atoms += cache_.counts().own_atoms;
  }

 private:
  std::int64_t coded_end(int sequence, int layer) const {
    const std::int64_t coded = cache_.coded_tokens(sequence, layer);
    return coded > 0 ? cache_.options().sink_tokens + coded : 0;
  }

  void take_back(Cache& dense, int layer, std::size_t i, std::int64_t first, std::int64_t end) {
    if (first >= end) return;
    const std::int64_t heads = model_.info.kv_heads, dim = model_.info.head_dim;
    keys_.resize(static_cast<std::size_t>((end - first) * heads * dim));
    values_.resize(keys_.size());
    cache_.reconstruct(layer, sequences_[i], first, end - first, keys_.data(), values_.data());
    const auto put = [&](Tensor& all, std::vector<float>& from) {
      all[layer][static_cast<std::int64_t>(i)]
          .narrow(1, first, end - first)
          .copy_(torch::from_blob(from.data(), {end - first, heads, dim}).transpose(0, 1));
    };
    put(dense.keys, keys_);
    put(dense.values, values_);
  }

  const LanguageModelImpl& model_;
  CompressedCache cache_;
  std::vector<int> sequences_;
  std::vector<float> keys_, values_;
};

/// What is read side by side: numbers of settings of one chunk, and of sequences of one length.
struct Job {
  std::vector<std::size_t> settings, sequences;
};

/// The first NaN or Inf in `vectors` [B, tokens, kv_heads, head_dim], as text.
std::string bad_number(
    const Tensor& vectors, int layer, Kind kind, std::int64_t first_token, const Job& job) {
  const Tensor bad = torch::isfinite(vectors).logical_not().nonzero()[0];
  const auto at = [&](int axis) { return bad[axis].item<std::int64_t>(); };
  std::ostringstream text;
  text << "a NaN or Inf in the " << name_of(kind) << " of layer " << layer << ", position "
       << first_token + at(1) << " of sequence " << job.sequences[static_cast<std::size_t>(at(0))]
       << ", KV head " << at(2) << ", component " << at(3);
  return text.str();
}

class Reading {
 public:
  Reading(const LanguageModelImpl& model, const std::vector<CacheSetting>& settings, const Job& job)
      : model_(model), settings_(settings), job_(job) {}

  /// Reads `sequences` [B, T] and adds to `measured`, which has an element per setting.
  /// @param on_chunk  called after each chunk with the tokens of each sequence read so far.
  template <typename OnChunk>
  void run(const Tensor& sequences, std::vector<Measured>& measured, const OnChunk& on_chunk) {
    const std::int64_t batch = sequences.size(0), length = sequences.size(1);
    const std::int64_t chunk = chunk_of(settings_[job_.settings.front()]);
    Cache full(model_, batch, length);
    std::vector<Cache> caches;
    std::vector<std::optional<CompressedPast>> compressed(job_.settings.size());
    for (std::size_t i = 0; i < job_.settings.size(); ++i) {
      const CacheSetting& setting = settings_[job_.settings[i]];
      caches.emplace_back(model_, batch, length);
      if (setting.compressed) compressed[i].emplace(model_, setting, batch);
    }
    for (std::int64_t start = 0; start < length; start += chunk) {
      const std::int64_t count = std::min(chunk, length - start);
      const Tensor ids = sequences.narrow(1, start, count);
      const std::int64_t predicted =
          std::min(count, length - 1 - start);  // 0: the last token alone
      Tensor p, targets;
      double full_nll = 0;
      if (predicted > 0) {
        targets = sequences.narrow(1, start + 1, predicted).unsqueeze(2);
        p = log_distribution(full.read(model_, ids), predicted, "the full cache");
        full_nll = -p.gather(2, targets).sum().item<double>();
      }
      for (std::size_t i = 0; i < caches.size(); ++i) {
        const CacheSetting& setting = settings_[job_.settings[i]];
        if (predicted == 0 && !compressed[i]) continue;
        if (!compressed[i]) compress_what_leaves(setting, caches[i]);
        const Tensor logits = caches[i].read(model_, ids);
        if (predicted > 0) {
          const Tensor q = log_distribution(logits, predicted, "a compressed cache");
          Measured& out = measured[job_.settings[i]];
          out.full_nll += full_nll;
          out.compressed_nll -= q.gather(2, targets).sum().item<double>();
          add_divergences(p, q, out.kl);
        }
        if (compressed[i])
          compressed[i]->append(caches[i], count);
        else if (setting.half_floats)
          round_new(caches[i], count);
      }
      on_chunk(start + count);
    }
    for (std::size_t i = 0; i < caches.size(); ++i)
      if (compressed[i]) compressed[i]->add_to(measured[job_.settings[i]]);
  }

 private:
  /// log softmax of the first `count` tokens' logits, in double.
  Tensor log_distribution(const Tensor& logits, std::int64_t count, const char* with) const {
    const Tensor result =
        torch::log_softmax(logits.narrow(1, 0, count).to(torch::kFloat32).to(torch::kFloat64), 2);
    if (torch::isnan(result).any().item<bool>())
      throw IoError(model_.path + ": the model's logits hold a NaN, read with " + with);
    return result;
  }

  static void add_divergences(const Tensor& p, const Tensor& q, std::vector<double>& out) {
    // A token the model rules out (logit -Inf) adds 0, not 0 * (Inf - Inf).
    const Tensor terms = (p.exp() * (p - q)).masked_fill_(p.isneginf(), 0.0);
    const Tensor kl = terms.sum(2).to(torch::kCPU).contiguous();
    out.insert(out.end(), kl.data_ptr<double>(), kl.data_ptr<double>() + kl.numel());
  }

  static void round_new(Cache& cache, std::int64_t count) {
    for (Tensor& all : {std::ref(cache.keys), std::ref(cache.values)})
      round_to_half(all.narrow(3, cache.length - count, count));
  }

  /// Approximates the tokens that the window has left behind since the last call.
  void compress_what_leaves(const CacheSetting& setting, Cache& cache) const {
    const std::int64_t first = std::max<std::int64_t>(cache.old_until, setting.sink_tokens);
    const std::int64_t end = cache.length - setting.recent_window;
    if (end - first < setting.compress_chunk) return;
    cache.old_until = end;
    const std::int64_t batch = cache.keys.size(1), count = end - first;
    std::vector<std::int32_t> positions(static_cast<std::size_t>(batch * count));
    for (std::size_t i = 0; i < positions.size(); ++i)
      positions[i] = static_cast<std::int32_t>(first + static_cast<std::int64_t>(i) % count);
    for (int layer = 0; layer < model_.info.layers; ++layer)
      for (Kind kind : kBothKinds) {
        Tensor held = (kind == Kind::kKeys ? cache.keys : cache.values)[layer]
                          .narrow(2, first, count)
                          .transpose(1, 2);  // [B, count, H_kv, d]
        Tensor vectors = held.to(torch::kCPU).contiguous();
        if (!torch::isfinite(vectors).all().item<bool>())
          throw IoError(model_.path + ": the model gave " +
                        bad_number(vectors, layer, kind, first, job_));
        setting.approximate(
            layer, kind, positions.data(), batch * count, vectors.data_ptr<float>());
        if (!torch::isfinite(vectors).all().item<bool>())
          throw_invalid("approximate wrote ", bad_number(vectors, layer, kind, first, job_));
        held.copy_(vectors);
      }
  }

  const LanguageModelImpl& model_;
  const std::vector<CacheSetting>& settings_;
  const Job& job_;
};

/// Splits what is to be read so that a job takes about the memory allowed.
/// @param own_memory  of a setting, whatever it is used for.
void add_jobs(const ModelInfo& info,
              std::int64_t length,
              const std::vector<std::size_t>& sequences,
              std::int64_t chunk,
              const std::vector<std::size_t>& settings,
              double own_memory,
              const CacheEffectOptions& options,
              std::vector<Job>& jobs) {
  const double cache = 8.0 * info.layers * info.kv_heads * info.head_dim *
                       static_cast<double>(length);  // keys and values, float32
  const double rows = static_cast<double>(std::min(chunk, length));
  const double work = 44.0 * rows * info.vocab +  // logits, their float64 copies and differences
                      16.0 * rows * info.heads * static_cast<double>(length) +  // scores
                      cache / info.layers;  // past and new of one layer put together
  const double memory = static_cast<double>(options.memory_bytes);
  const double fit = std::clamp(
      (memory - work - cache) / (cache + own_memory), 1.0, static_cast<double>(settings.size()));
  const auto settings_at_once = static_cast<std::size_t>(fit);
  std::size_t sequences_at_once = static_cast<std::size_t>(options.sequences_at_once);
  if (sequences_at_once == 0)
    sequences_at_once = static_cast<std::size_t>(std::clamp(
        (memory - own_memory * std::floor(fit)) / (work + cache * (1.0 + std::floor(fit))),
        1.0,
        kMostAtOnce));
  const auto part = [](const std::vector<std::size_t>& all, std::size_t first, std::size_t count) {
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(first);
    const auto end = static_cast<std::ptrdiff_t>(std::min(count, all.size() - first));
    return std::vector<std::size_t>(begin, begin + end);
  };
  for (std::size_t s = 0; s < settings.size(); s += settings_at_once)
    for (std::size_t i = 0; i < sequences.size(); i += sequences_at_once)
      jobs.push_back({part(settings, s, settings_at_once), part(sequences, i, sequences_at_once)});
}

double quantile(std::vector<double>& values, double part) {
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  const double place = part * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::ptrdiff_t>(place);
  std::nth_element(values.begin(), values.begin() + below, values.end());
  const double low = values[static_cast<std::size_t>(below)];
  if (below + 1 == static_cast<std::ptrdiff_t>(values.size())) return low;
  const double high = *std::min_element(values.begin() + below + 1, values.end());
  return low + (place - static_cast<double>(below)) * (high - low);
}

CacheEffect summary_of(Measured& measured) {
  CacheEffect effect;
  effect.tokens = static_cast<std::int64_t>(measured.kl.size());
  const auto tokens = static_cast<double>(effect.tokens);  // 0: the means are 0 / 0 = NaN
  double kl = 0;
  for (double value : measured.kl) kl += value;
  effect.full_nll = measured.full_nll / tokens;
  effect.compressed_nll = measured.compressed_nll / tokens;
  effect.mean_kl = kl / tokens;
  effect.p99_kl = quantile(measured.kl, 0.99);
  effect.bytes = measured.bytes;
  effect.own_atoms = measured.own_atoms;
  return effect;
}

}  // namespace

double CacheEffect::full_perplexity() const { return std::exp(full_nll); }
double CacheEffect::compressed_perplexity() const { return std::exp(compressed_nll); }

std::vector<CacheEffect> measure_cache_effect(
    const LanguageModel& language_model,
    const std::vector<std::vector<std::int32_t>>& sequences,
    const std::vector<CacheSetting>& settings,
    const CacheEffectOptions& options) {
  const LanguageModelImpl& model = language_model.impl();
  model.require_step();
  if (options.sequences_at_once < 0)
    throw_invalid("sequences_at_once is ", options.sequences_at_once, ", must be at least 0");
  std::map<int, std::vector<std::size_t>> by_chunk;  // numbers of settings
  for (std::size_t i = 0; i < settings.size(); ++i) {
    check(settings[i], i);
    by_chunk[chunk_of(settings[i])].push_back(i);
  }
  std::map<std::int64_t, std::vector<std::size_t>> by_length;  // numbers of sequences
  double all_tokens = 0;                                       // of all settings
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const auto length = static_cast<std::int64_t>(sequences[i].size());
    if (length > 0) model.check_ids(sequences[i].data(), 1, length, static_cast<std::int64_t>(i));
    if (length < 2) continue;
    by_length[length].push_back(i);
    all_tokens += static_cast<double>(length) * static_cast<double>(settings.size());
  }
  std::vector<Job> jobs;
  for (const auto& [chunk, of_chunk] : by_chunk) {
    std::int64_t own_memory = 0;
    for (const std::size_t i : of_chunk)
      own_memory = std::max(own_memory, settings[i].memory_bytes);
    for (const auto& [length, of_length] : by_length)
      add_jobs(model.info,
               length,
               of_length,
               chunk,
               of_chunk,
               static_cast<double>(own_memory),
               options,
               jobs);
  }

  const c10::InferenceMode inference;
  std::vector<Measured> measured(settings.size());
  double done_tokens = 0;
  for (const Job& job : jobs) {
    const auto batch = static_cast<std::int64_t>(job.sequences.size());
    std::vector<std::int32_t> ids;
    for (std::size_t i : job.sequences)
      ids.insert(ids.end(), sequences[i].begin(), sequences[i].end());
    const std::int64_t length = static_cast<std::int64_t>(ids.size()) / batch;
    const auto say = [&](std::int64_t tokens) {  // of each sequence and setting
      const double part =
          static_cast<double>(batch * tokens) * static_cast<double>(job.settings.size());
      if (options.on_progress && !options.on_progress((done_tokens + part) / all_tokens))
        throw Interrupted("stopped while measuring what a compressed cache does to the model");
    };
    try {
      Reading(model, settings, job).run(model.input(ids.data(), batch, length), measured, say);
    } catch (const c10::Error& error) {
      detail::throw_for_model(model.path, "measuring a compressed cache", error);
    } catch (const std::bad_alloc& error) {
      detail::throw_for_model(model.path, "measuring a compressed cache", error);
    }
    done_tokens += static_cast<double>(ids.size()) * static_cast<double>(job.settings.size());
  }
  std::vector<CacheEffect> effects;
  for (Measured& one : measured) effects.push_back(summary_of(one));
  return effects;
}

}  // namespace lexico
