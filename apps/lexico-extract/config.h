#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lexico::apps {

/// The options of lexico-extract.
struct ExtractConfig {
  std::string model, tokenizer;
  std::vector<std::string> text, token_ids;
  std::string field = "text", output, bos = "auto", key_stage = "post_rope", dtype = "float16",
              device = "auto";
  int sequence_length = 0, batch_size = 0, batch_tokens = 4096, threads = 0;
  std::int64_t max_vectors = 0, shard_vectors = 0;
  std::uint64_t seed = 0;
  bool query_moments = false, resume = false, overwrite = false, dry_run = false, benchmark = false,
       json = false;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("model", self.model, "model file of tools/export_model.py (.pt)");
    visit("tokenizer",
          self.tokenizer,
          "tokenizer.json; empty: MODEL.tokenizer.json or tokenizer.json beside the model");
    visit("text",
          self.text,
          "[name=]FILE to run the model on: .txt, or .jsonl with one document a line; repeatable");
    visit("field", self.field, "key of the text in each line of a .jsonl file");
    visit("token_ids",
          self.token_ids,
          "[name=]FILE of token ids instead of text: .bin (int32) or .safetensors; repeatable");
    visit("output", self.output, "FILE.h5, or a folder for shards activations-00000.h5, ...");
    visit("sequence_length",
          self.sequence_length,
          "tokens the model sees at once; 0: 512, or the model's most if less");
    visit("bos",
          self.bos,
          "what the BOS token starts: always (every document and sequence), document, none; auto: "
          "always if the model expects one");
    visit("key_stage",
          self.key_stage,
          "keys after RoPE as the cache holds them (post_rope), or with it undone (pre_rope)");
    visit(
        "query_moments", self.query_moments, "also store the mean of q q^T per layer and KV head");
    visit("dtype", self.dtype, "type of the stored vectors: float16 or float32");
    visit("max_vectors",
          self.max_vectors,
          "budget per layer and kind; sequences are picked evenly over all texts; 0: all");
    visit("seed", self.seed, "which sequences are picked under max_vectors");
    visit("shard_vectors",
          self.shard_vectors,
          "vectors per layer and kind in each file of a folder; 0: files of about 2 GB");
    visit("batch_tokens", self.batch_tokens, "tokens the model runs at a time");
    visit("batch_size",
          self.batch_size,
          "sequences the model runs at a time; 0: as batch_tokens says");
    visit("resume",
          self.resume,
          "keep the finished shards of the same run in OUTPUT and make the others");
    visit("overwrite", self.overwrite, "replace what is in OUTPUT");
    visit("dry_run",
          self.dry_run,
          "print the plan (tokens, vectors, bytes, free disk, time) and stop");
    visit("benchmark", self.benchmark, "also time the bare model on every third batch, to compare");
    visit("json", self.json, "print the result as JSON on stdout");
    visit("device", self.device, "where the model runs: auto, cpu, cuda or cuda:1");
    visit("threads", self.threads, "CPU threads for the model; 0: all the machine has");
  }

  /// @throws InvalidArgument naming the option, its value and its bound.
  void validate() const;
};

}  // namespace lexico::apps
