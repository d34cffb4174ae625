#include "lexico-extract/plan.h"

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
  for (const Corpus::Sequence& sequence : plan.sequences)
    settings << sequence.first << ' ' << sequence.length << "\n";
  Sha256 sum;
  sum.update(settings.str());
  sum.update(corpus.ids.data(), corpus.ids.size() * sizeof(std::int32_t));
  sum.update(corpus.documents.data(), corpus.documents.size() * sizeof(std::int32_t));
  return sum.finish();
}

std::int64_t sequences_per_shard(const ExtractConfig& config, const ActivationInfo& info) {
  const std::int64_t row_bytes =
      std::int64_t{2} * info.num_layers * info.head_dim * (info.half ? 2 : 4);
  const std::int64_t rows = config.shard_vectors > 0
                                ? config.shard_vectors
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

Plan make_plan(const ExtractConfig& config,
               const ModelInfo& model,
               const std::string& model_sha256,
               const Corpus& corpus,
               const std::string& command_line,
               bool one_file) {
  if (config.query_moments && !model.has_queries)
    throw InvalidArgument("query_moments: " + config.model +
                          " has no method 'queries'; export it again, or leave it out");
  if (config.max_vectors > 0 && config.max_vectors < model.kv_heads)
    throw InvalidArgument("max_vectors is " + std::to_string(config.max_vectors) +
                          ", but one token has " + std::to_string(model.kv_heads) +
                          " vectors (KV heads)");
  Plan plan;
  ActivationInfo& info = plan.info;
  info.model = model.name;
  info.model_sha256 = model_sha256;
  info.corpora = corpus.names;
  info.corpus_documents = corpus.num_documents;
  info.key_stage = key_stage_from(config.key_stage);
  info.rope = model.rope.to_json();
  info.half = config.dtype == "float16";
  info.num_layers = model.layers;
  info.kv_heads = model.kv_heads;
  info.head_dim = model.head_dim;
  info.seed = config.seed;
  info.sequence_length = corpus.sequence_length;
  info.bos = corpus.bos;
  info.version = std::string("lexico ") + lexico_version();
  info.command_line = command_line;
  plan.query_moments = config.query_moments;
  plan.sequences = pick_sequences(corpus, config.max_vectors / model.kv_heads, config.seed);
  plan.batch_size = config.batch_size > 0
                        ? config.batch_size
                        : std::max<std::int64_t>(1, config.batch_tokens / corpus.sequence_length);
  const auto all = static_cast<std::int64_t>(plan.sequences.size());
  const std::int64_t per_shard = one_file ? all : std::min(all, sequences_per_shard(config, info));
  for (std::int64_t first = 0; first < all; first += per_shard) {
    Plan::Shard shard{static_cast<std::size_t>(first),
                      static_cast<std::size_t>(std::min(per_shard, all - first)),
                      0};
    for (std::size_t i = 0; i < shard.count; ++i)
      shard.num_tokens += plan.sequences[shard.first + i].length;
    plan.num_tokens += shard.num_tokens;
    plan.shards.push_back(shard);
  }
  info.plan_hash = hash_of(plan, corpus);
  for (std::size_t i = 0; i < plan.shards.size(); ++i)
    plan.bytes += ActivationWriter::file_bytes(plan.info_of(i));
  return plan;
}

}  // namespace lexico::apps
