// From texts to batches of the model and shards of a dump.
#include "common/text_plan.h"

#include <algorithm>
#include <sstream>

#include "common/options.h"
#include "lexico/error.h"
#include "lexico/sha256.h"

namespace lexico::apps {
namespace {

constexpr std::int64_t kShardBytes = 2'000'000'000;

/// Of all that decides which vectors are in which file.
std::string hash_of(const Plan& plan, const Corpus& corpus) {
  const ActivationInfo& info = plan.info;
  std::ostringstream settings;
  settings << "lexico-activations 1\nmodel " << info.model_sha256 << "\nlength "
           << info.sequence_length << "\nbos " << info.bos << "\nstage " << name_of(info.key_stage)
           << "\nhalf " << info.half << "\nmoments " << plan.query_moments << "\n";
  for (const std::string& name : info.corpora)
    settings << "text " << name.size() << ' ' << name << "\n";
  for (const Plan::Shard& shard : plan.shards)
    settings << "shard " << shard.first << ' ' << shard.count << "\n";
  Sha256 sum;
  sum.update(settings.str());
  for (std::size_t i = 0; i < static_cast<std::size_t>(plan.sequences.count); ++i) {
    const Corpus::Sequence sequence = plan.sequences.sequence(corpus, i);
    sum.update(std::to_string(sequence.first) + ' ' + std::to_string(sequence.length) + "\n");
  }
  std::vector<std::int32_t> ids, documents;
  for (const bool of_documents : {false, true})
    for (std::int64_t i = 0; i < corpus.num_sequences; ++i) {
      const Corpus::Sequence sequence = corpus.sequence(i);
      ids.resize(static_cast<std::size_t>(sequence.length));
      documents.resize(ids.size());
      corpus.read(sequence, ids.data(), documents.data());
      const std::vector<std::int32_t>& part = of_documents ? documents : ids;
      sum.update(part.data(), part.size() * sizeof(std::int32_t));
    }
  return sum.finish();
}

std::int64_t sequences_per_shard(const PlanSettings& settings, const ActivationInfo& info) {
  const std::int64_t row_bytes =
      std::int64_t{2} * info.num_layers * info.head_dim * (info.half ? 2 : 4);
  const std::int64_t rows = settings.shard_vectors > 0
                                ? settings.shard_vectors
                                : std::max<std::int64_t>(1, kShardBytes / row_bytes);
  return std::max<std::int64_t>(1, rows / (std::int64_t{info.sequence_length} * info.kv_heads));
}

}  // namespace

ActivationInfo Plan::info_of(std::size_t shard) const {
  ActivationInfo own = info;
  own.num_tokens = shards[shard].num_tokens;
  own.shard_index = static_cast<int>(shard);
  own.shard_count = static_cast<int>(shards.size());
  return own;
}

void TextPlanConfig::validate() const {
  if (model.empty())
    throw InvalidArgument("model is missing: --model FILE.pt (tools/export_model.py writes it)");
  if (text.empty() && token_ids.empty())
    throw InvalidArgument("text is missing: --text [name=]FILE (or --token-ids FILE)");
  ModelTextConfig::validate();
  at_least("batch_size", batch_size, 0);
  at_least("batch_tokens", batch_tokens, 1);
  at_least("max_vectors", max_vectors, 0);
  if (dtype != "float16" && dtype != "float32")
    throw InvalidArgument("dtype is '" + dtype + "', must be one of: float16, float32");
}

Plan make_plan(const TextPlanConfig& config,
               const PlanSettings& settings,
               const ModelInfo& model,
               const Corpus& corpus) {
  if (settings.query_moments && !model.has_queries)
    throw InvalidArgument("query_moments: " + config.model +
                          " has no method 'queries'; export it again, or leave it out");
  if (config.max_vectors > 0 && config.max_vectors < model.kv_heads)
    throw InvalidArgument("max_vectors is " + std::to_string(config.max_vectors) +
                          ", but one token has " + std::to_string(model.kv_heads) +
                          " vectors (KV heads)");
  Plan plan;
  ActivationInfo& info = plan.info;
  info.model = model.name;
  info.model_sha256 = settings.model_sha256;
  info.corpora = corpus.names;
  info.corpus_documents = corpus.num_documents;
  info.key_stage = settings.key_stage;
  info.rope = model.rope.to_json();
  info.half = config.dtype == "float16";
  info.num_layers = model.layers;
  info.kv_heads = model.kv_heads;
  info.head_dim = model.head_dim;
  info.seed = settings.seed;
  info.sequence_length = corpus.sequence_length;
  info.bos = corpus.bos;
  info.version = std::string("lexico ") + lexico_version();
  info.command_line = settings.command_line;
  plan.query_moments = settings.query_moments;
  plan.sequences = pick_sequences(corpus, config.max_vectors / model.kv_heads, settings.seed);
  const std::int64_t all = plan.sequences.count;
  const auto per_shard = static_cast<std::size_t>(
      settings.one_file ? all : std::min(all, sequences_per_shard(settings, info)));
  // A shard smaller than a batch makes the batches smaller.
  info.batch_sequences = static_cast<int>(
      std::min(static_cast<std::int64_t>(per_shard),
               config.batch_size > 0
                   ? std::int64_t{config.batch_size}
                   : std::max<std::int64_t>(1, config.batch_tokens / corpus.sequence_length)));
  BatchRule rule(info.batch_sequences);
  for (std::size_t i = 0; i < static_cast<std::size_t>(all); ++i) {
    const std::int64_t length = plan.sequences.sequence(corpus, i).length;
    if (rule.starts_batch(length)) plan.batches.push_back({i, 0, length});
    ++plan.batches.back().count;
  }
  for (std::size_t i = 0; i < plan.batches.size(); ++i) {
    const Plan::Batch& batch = plan.batches[i];
    if (plan.shards.empty() || plan.shards.back().count + batch.count > per_shard)
      plan.shards.push_back({batch.first, 0, i, 0, 0});
    Plan::Shard& shard = plan.shards.back();
    shard.count += batch.count;
    ++shard.num_batches;
    const std::int64_t tokens = static_cast<std::int64_t>(batch.count) * batch.length;
    shard.num_tokens += tokens;
    plan.num_tokens += tokens;
  }
  info.plan_hash = hash_of(plan, corpus);
  for (std::size_t i = 0; i < plan.shards.size(); ++i)
    plan.bytes += ActivationWriter::file_bytes(plan.info_of(i));
  return plan;
}

}  // namespace lexico::apps
