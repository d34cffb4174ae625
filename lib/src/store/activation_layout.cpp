#include "activation_layout.h"

#include <array>
#include <cstdio>
#include <limits>

#include "lexico/error.h"

namespace lexico::store {

std::string layer_group(int layer) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "/layers/%02d", layer);
  return text.data();
}
std::string vectors_name(int layer, Kind kind) { return layer_group(layer) + "/" + name_of(kind); }
std::string moment_name(int layer) { return layer_group(layer) + "/query_second_moment"; }
std::string tokens_name(const char* field) { return std::string("/tokens/") + field; }

void write_info(hid_t file, const ActivationInfo& info) {
  write_attribute(file, "contract", std::string(kContract));
  write_attribute(file, "model", info.model);
  write_attribute(file, "model_sha256", info.model_sha256);
  write_attribute(file, "corpora", info.corpora);
  write_attribute(file, "corpus_documents", info.corpus_documents);
  write_attribute(file, "key_stage", std::string(name_of(info.key_stage)));
  if (!info.rope.empty()) write_attribute(file, "rope", info.rope);
  write_attribute(file, "dtype", std::string(info.half ? "float16" : "float32"));
  write_attribute(file, "num_layers", std::int64_t{info.num_layers});
  write_attribute(file, "kv_heads", std::int64_t{info.kv_heads});
  write_attribute(file, "head_dim", std::int64_t{info.head_dim});
  write_attribute(file, "num_tokens", info.num_tokens);
  write_attribute(file, "num_vectors", info.num_tokens * info.kv_heads);
  write_attribute(file, "sequence_length", std::int64_t{info.sequence_length});
  if (info.batch_sequences > 0)
    write_attribute(file, "batch_sequences", std::int64_t{info.batch_sequences});
  write_attribute(file, "bos", info.bos);
  write_attribute(file, "seed", info.seed);
  write_attribute(file, "version", info.version);
  write_attribute(file, "command_line", info.command_line);
  write_attribute(file, "plan_hash", info.plan_hash);
  write_attribute(file, "shard_index", std::int64_t{info.shard_index});
  write_attribute(file, "shard_count", std::int64_t{info.shard_count});
}

namespace {

[[noreturn]] void wrong(const char* name, const std::string& what) {
  throw IoError("attribute '" + std::string(name) + "' " + what);
}

std::string required_text(hid_t file, const char* name) {
  if (auto text = read_text(file, name)) return *text;
  wrong(name, "is missing");
}

std::int64_t required_integer(hid_t file, const char* name, std::int64_t least, std::int64_t most) {
  const auto value = read_integer(file, name);
  if (!value) wrong(name, "is missing");
  if (*value < least || *value > most)
    wrong(name,
          "is " + std::to_string(*value) + ", must be in [" + std::to_string(least) + ", " +
              std::to_string(most) + "]");
  return *value;
}

int optional_int(hid_t file, const char* name, int otherwise) {
  return read_integer(file, name)
             ? static_cast<int>(required_integer(file, name, 0, std::numeric_limits<int>::max()))
             : otherwise;
}

}  // namespace

ActivationInfo read_info(hid_t file) {
  const auto contract = read_text(file, "contract");
  if (!contract) throw IoError("not an activation file: no attribute 'contract'");
  if (*contract != kContract) wrong("contract", "is '" + *contract + "', want '" + kContract + "'");
  ActivationInfo info;
  info.complete = required_integer(file, "complete", 0, 1) != 0;
  info.key_stage = [&] {
    const std::string stage = required_text(file, "key_stage");
    for (KeyStage known : {KeyStage::kPostRope, KeyStage::kPreRope})
      if (stage == name_of(known)) return known;
    wrong("key_stage", "is '" + stage + "', must be post_rope or pre_rope");
  }();
  const std::string dtype = required_text(file, "dtype");
  if (dtype != "float16" && dtype != "float32")
    wrong("dtype", "is '" + dtype + "', must be float16 or float32");
  info.half = dtype == "float16";
  info.num_layers = static_cast<int>(required_integer(file, "num_layers", 1, 10'000));
  // The bounds keep the bytes of a dataset below 2^63.
  info.kv_heads = static_cast<int>(required_integer(file, "kv_heads", 1, 1 << 12));
  info.head_dim = static_cast<int>(required_integer(file, "head_dim", 1, 1 << 13));
  info.num_tokens = required_integer(file, "num_tokens", 0, std::int64_t{1} << 36);
  // The rest tells where the vectors come from; a file made by other means may not know.
  info.model = read_text(file, "model").value_or("");
  info.model_sha256 = read_text(file, "model_sha256").value_or("");
  info.rope = read_text(file, "rope").value_or("");
  info.corpora = read_texts(file, "corpora").value_or(std::vector<std::string>{});
  info.corpus_documents =
      read_integers(file, "corpus_documents").value_or(std::vector<std::int64_t>{});
  info.sequence_length = optional_int(file, "sequence_length", 0);
  info.batch_sequences = optional_int(file, "batch_sequences", 0);
  info.bos = read_text(file, "bos").value_or("");
  info.seed = static_cast<std::uint64_t>(read_integer(file, "seed").value_or(0));
  info.version = read_text(file, "version").value_or("");
  info.command_line = read_text(file, "command_line").value_or("");
  info.plan_hash = read_text(file, "plan_hash").value_or("");
  info.shard_index = optional_int(file, "shard_index", 0);
  info.shard_count = optional_int(file, "shard_count", 1);
  return info;
}

}  // namespace lexico::store
