#include "lexico-eval/vector_source.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>

#include "common/options.h"
#include "common/program.h"
#include "common/report/text.h"
#include "lexico/activations.h"
#include "lexico/error.h"
#include "lexico/language_model.h"
#include "lexico/text_source.h"

namespace lexico::apps {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kPieceBytes = 64 << 20;   // of rows handed over at once
constexpr std::int64_t kModelBytes = 128 << 20;  // of keys and values from one call of the model
constexpr std::int64_t kMaxGap = 256;            // rows between wanted ones that are read over
constexpr std::int64_t kWidePlaces = 16;         // sequences that choose_widely takes at least

bool has_hdf5_signature(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  char start[8] = {};
  in.read(start, sizeof start);
  return std::string(start, sizeof start) == std::string("\x89HDF\r\n\x1a\n", 8);
}

bool ends_with_any(const std::string& path, std::initializer_list<const char*> endings) {
  return std::any_of(
      endings.begin(), endings.end(), [&](const char* end) { return path.ends_with(end); });
}

class ActivationSource : public VectorSource {
 public:
  explicit ActivationSource(const std::string& path) : reader_(path) {
    const ActivationInfo& from = reader_.info();
    info_ = {from.model,
             from.model_sha256,
             from.key_stage,
             {},
             from.num_layers,
             from.kv_heads,
             from.head_dim,
             from.num_tokens};
    if (!from.rope.empty())
      info_.rope = Rope::parse(
          from.rope, reader_.files().front() + ": rope: ", info_.head_dim, info_.num_layers);
  }

  const Info& info() const override { return info_; }
  std::vector<std::int64_t> choose(std::int64_t count) const override {
    return spread(info_.num_tokens, count);
  }
  std::vector<std::int64_t> choose_widely(std::int64_t count) const override {
    return choose(count);
  }
  std::string sampling(const std::vector<std::int64_t>& tokens) const override {
    const auto count = static_cast<std::int64_t>(tokens.size());
    if (count == info_.num_tokens) return "all tokens, every KV head";
    return report::grouped(count) + " of " + report::grouped(info_.num_tokens) +
           " tokens, evenly spread, every KV head";
  }
  std::vector<std::vector<std::int32_t>> sequences(std::int64_t) const override { return {}; }
  std::vector<std::int32_t> positions(const std::int64_t* tokens, std::int64_t count) override {
    std::vector<std::int32_t> positions(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count;) {  // runs of neighbours in one go
      std::int64_t end = i + 1;
      while (end < count && tokens[end] == tokens[end - 1] + 1) ++end;
      reader_.read_tokens(tokens[i], end - i, nullptr, positions.data() + i, nullptr);
      i = end;
    }
    return positions;
  }
  std::vector<std::vector<int>> groups(const std::vector<int>& layers) const override {
    std::vector<std::vector<int>> groups;
    for (const int layer : layers) groups.push_back({layer});
    return groups;
  }

  void read(const std::vector<std::int64_t>& tokens,
            const std::vector<int>& layers,
            const Take& take) override {
    const std::int64_t token_floats = static_cast<std::int64_t>(info_.kv_heads) * info_.head_dim;
    const auto per_piece = static_cast<std::size_t>(
        std::max<std::int64_t>(1, kPieceBytes / (token_floats * std::int64_t{sizeof(float)})));
    for (const int layer : layers)
      for (const Kind kind : kBothKinds)
        for (std::size_t first = 0; first < tokens.size(); first += per_piece) {
          const std::size_t count = std::min(per_piece, tokens.size() - first);
          rows_.resize(count * static_cast<std::size_t>(token_floats));
          gather(layer, kind, &tokens[first], static_cast<std::int64_t>(count));
          take(layer, kind, &tokens[first], static_cast<std::int64_t>(count), rows_.data());
        }
  }

 private:
  /// Reads near tokens in one go and keeps the wanted rows.
  void gather(int layer, Kind kind, const std::int64_t* tokens, std::int64_t count) {
    const std::int64_t heads = info_.kv_heads, token_floats = heads * info_.head_dim;
    const std::int64_t max_gap = std::max<std::int64_t>(1, kMaxGap / heads);
    float* out = rows_.data();
    for (std::int64_t i = 0; i < count;) {
      std::int64_t end = i + 1;
      while (end < count && tokens[end] - tokens[end - 1] <= max_gap &&
             (tokens[end] - tokens[i]) * heads < 32768)
        ++end;
      const std::int64_t span = tokens[end - 1] - tokens[i] + 1;
      if (span == end - i) {
        reader_.read(layer, kind, tokens[i] * heads, span * heads, out);
      } else {
        span_.resize(static_cast<std::size_t>(span * token_floats));
        reader_.read(layer, kind, tokens[i] * heads, span * heads, span_.data());
        for (std::int64_t k = i; k < end; ++k)
          std::copy_n(span_.data() + (tokens[k] - tokens[i]) * token_floats,
                      token_floats,
                      out + (k - i) * token_floats);
      }
      out += (end - i) * token_floats;
      i = end;
      if (stop_requested()) throw Interrupted("stopped while reading " + reader_.files().front());
    }
  }

  ActivationReader reader_;
  Info info_;
  std::vector<float> rows_, span_;
};

class TextSource : public VectorSource {
 public:
  TextSource(LanguageModel& model, const std::string& model_sha256, PackedText text)
      : model_(model), text_(std::move(text)) {
    const ModelInfo& from = model.info();
    info_ = {from.name,
             model_sha256,
             KeyStage::kPostRope,
             from.rope,
             from.layers,
             from.kv_heads,
             from.head_dim,
             text_.num_tokens()};
  }

  const Info& info() const override { return info_; }

  std::vector<std::int64_t> choose(std::int64_t count) const override {
    return choose_from(count, 1);
  }
  std::vector<std::int64_t> choose_widely(std::int64_t count) const override {
    return choose_from(count, kWidePlaces);
  }
  std::string sampling(const std::vector<std::int64_t>& tokens) const override {
    const auto count = static_cast<std::int64_t>(tokens.size());
    const std::string of =
        "sequences of " + std::to_string(text_.sequence_length) + " tokens, every KV head";
    if (count == info_.num_tokens) return "all " + of;
    std::int64_t sequences = 0, last = -1;
    for (const std::int64_t token : tokens) {
      sequences += token / text_.sequence_length != last;
      last = token / text_.sequence_length;
    }
    return report::grouped(sequences) + " of " + report::grouped(text_.num_sequences()) +
           " evenly spread " + of;
  }
  std::vector<std::vector<std::int32_t>> sequences(std::int64_t tokens) const override {
    const std::int64_t length = text_.sequence_length;
    const std::int64_t count = tokens == 0 ? text_.num_sequences() : (tokens + length - 1) / length;
    std::vector<std::vector<std::int32_t>> sequences;
    for (const std::int64_t sequence : spread(text_.num_sequences(), count)) {
      const auto first = text_.ids.begin() + sequence * length;
      sequences.emplace_back(first, first + length_of(sequence));
    }
    return sequences;
  }
  std::vector<std::int32_t> positions(const std::int64_t* tokens, std::int64_t count) override {
    std::vector<std::int32_t> positions;
    for (std::int64_t i = 0; i < count; ++i)
      positions.push_back(static_cast<std::int32_t>(tokens[i] % text_.sequence_length));
    return positions;
  }
  std::vector<std::vector<int>> groups(const std::vector<int>& layers) const override {
    return {layers};
  }

  void read(const std::vector<std::int64_t>& tokens,
            const std::vector<int>& layers,
            const Take& take) override {
    const std::int64_t length = text_.sequence_length;
    const std::int64_t token_floats = static_cast<std::int64_t>(info_.kv_heads) * info_.head_dim;
    const std::int64_t sequence_bytes =
        2 * info_.num_layers * token_floats * length * std::int64_t{sizeof(float)};
    const std::int64_t max_batch = std::clamp<std::int64_t>(kModelBytes / sequence_bytes, 1, 16);
    const auto piece_tokens =
        std::max<std::int64_t>(1,
                               4 * kPieceBytes /
                                   (2 * static_cast<std::int64_t>(layers.size()) * token_floats *
                                    std::int64_t{sizeof(float)}));
    pending_.assign(layers.size() * 2, {});
    pending_tokens_.clear();
    for (std::size_t next = 0; next < tokens.size();) {
      // Sequences of one length, one after the other: as many as fit a batch.
      std::vector<std::int64_t> sequences;
      std::size_t end = next;
      while (end < tokens.size()) {
        const std::int64_t sequence = tokens[end] / length;
        if (sequences.empty() || sequences.back() != sequence) {
          const bool fits = static_cast<std::int64_t>(sequences.size()) < max_batch &&
                            (sequences.empty() || length_of(sequence) == length);
          if (!fits) break;
          sequences.push_back(sequence);
        }
        ++end;
      }
      if (stop_requested()) throw Interrupted("stopped while running the model");
      run(sequences);
      for (; next < end; ++next) keep(tokens[next], sequences, layers);
      if (static_cast<std::int64_t>(pending_tokens_.size()) >= piece_tokens)
        hand_over(layers, take);
    }
    hand_over(layers, take);
  }

 private:
  std::int64_t length_of(std::int64_t sequence) const {
    return std::min<std::int64_t>(text_.sequence_length,
                                  text_.num_tokens() - sequence * text_.sequence_length);
  }

  /// Whole sequences, or the same number of spread tokens from each of at least `places`.
  std::vector<std::int64_t> choose_from(std::int64_t count, std::int64_t places) const {
    const std::int64_t length = text_.sequence_length;
    if (count >= info_.num_tokens) return spread(info_.num_tokens, info_.num_tokens);
    const std::int64_t whole = (count + length - 1) / length;
    const std::int64_t num_sequences = std::min(text_.num_sequences(), std::max(whole, places));
    const std::int64_t from_each = (count + num_sequences - 1) / num_sequences;
    std::vector<std::int64_t> tokens;
    for (const std::int64_t sequence : spread(text_.num_sequences(), num_sequences))
      for (const std::int64_t at : spread(length_of(sequence), from_each))
        if (static_cast<std::int64_t>(tokens.size()) < count)
          tokens.push_back(sequence * length + at);
    return tokens;
  }

  void run(const std::vector<std::int64_t>& sequences) {
    const std::int64_t length = length_of(sequences.front());
    ids_.clear();
    for (const std::int64_t sequence : sequences) {
      const auto* first = text_.ids.data() + sequence * text_.sequence_length;
      ids_.insert(ids_.end(), first, first + length);
    }
    const auto batch = static_cast<std::int64_t>(sequences.size());
    model_.forward(ids_.data(), batch, length, /*with_queries=*/false, cache_);
  }

  /// Copies one token's rows of all wanted layers out of the batch that was just run.
  void keep(std::int64_t token,
            const std::vector<std::int64_t>& sequences,
            const std::vector<int>& layers) {
    const std::int64_t sequence = token / text_.sequence_length;
    const std::int64_t position = token % text_.sequence_length;
    const std::int64_t place =
        std::lower_bound(sequences.begin(), sequences.end(), sequence) - sequences.begin();
    pending_tokens_.push_back(token);
    for (std::size_t i = 0; i < layers.size(); ++i)
      for (const Kind kind : kBothKinds) {
        const std::vector<float>& all = kind == Kind::kKeys ? cache_.keys : cache_.values;
        std::vector<float>& rows = pending_[2 * i + static_cast<std::size_t>(kind)];
        for (int head = 0; head < info_.kv_heads; ++head) {
          const std::int64_t row =
              ((layers[i] * cache_.batch + place) * info_.kv_heads + head) * cache_.length +
              position;
          const float* from = all.data() + row * info_.head_dim;
          rows.insert(rows.end(), from, from + info_.head_dim);
        }
      }
  }

  void hand_over(const std::vector<int>& layers, const Take& take) {
    if (pending_tokens_.empty()) return;
    const auto count = static_cast<std::int64_t>(pending_tokens_.size());
    for (std::size_t i = 0; i < layers.size(); ++i)
      for (const Kind kind : kBothKinds) {
        std::vector<float>& rows = pending_[2 * i + static_cast<std::size_t>(kind)];
        take(layers[i], kind, pending_tokens_.data(), count, rows.data());
        rows.clear();
      }
    pending_tokens_.clear();
  }

  LanguageModel& model_;
  PackedText text_;
  Info info_;
  CacheBatch cache_;
  std::vector<std::int32_t> ids_;
  std::vector<std::int64_t> pending_tokens_;
  std::vector<std::vector<float>> pending_;  // [layer * 2 + kind], rows of the pending tokens
};

}  // namespace

DataSpec DataSpec::from(const std::string& text, bool in_domain) {
  const TextSpec split = TextSpec::from(text);
  DataSpec spec{split.name, split.path, in_domain, false, false};
  const bool is_glob =
      spec.path.find_first_of("*?[") != std::string::npos && !fs::exists(spec.path);
  const bool is_folder = fs::is_directory(spec.path);
  if (is_glob || is_folder) {
    if (text == spec.path) {  // no name was given: the folder's says more than "*"
      fs::path folder = fs::absolute(spec.path).lexically_normal();
      if (is_glob || folder.filename().empty()) folder = folder.parent_path();
      spec.name = folder.filename().string();
    }
    return spec;
  }
  if (!fs::exists(spec.path)) throw IoError(spec.path + ": no such file");
  spec.is_text = !has_hdf5_signature(spec.path) && !ends_with_any(spec.path, {".h5", ".hdf5"});
  spec.is_token_ids = spec.is_text && ends_with_any(spec.path, {".bin", ".safetensors"});
  return spec;
}

DataSpec DataSpec::from_text(const std::string& text, bool is_token_ids) {
  const TextSpec split = TextSpec::from(text);
  return {split.name, split.path, true, true, is_token_ids};
}

std::vector<std::int64_t> spread(std::int64_t total, std::int64_t count) {
  count = std::min(total, count);
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(std::max<std::int64_t>(0, count)));
  constexpr double kGolden = 0.6180339887498949;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    const std::int64_t first = at * total / count, end = (at + 1) * total / count;
    const double turns = static_cast<double>(at) * kGolden;
    numbers[i] = first + static_cast<std::int64_t>((turns - std::floor(turns)) *
                                                   static_cast<double>(end - first));
  }
  return numbers;
}

void to_stage(VectorSource& source,
              int layer,
              const std::int64_t* tokens,
              std::int64_t count,
              KeyStage stage,
              std::int32_t offset,
              std::vector<float>& rows) {
  const VectorSource::Info& info = source.info();
  if (info.key_stage == stage && offset == 0) return;
  if (!info.rope)
    throw IoError(info.model + ": its data holds " + name_of(info.key_stage) +
                  " keys and no RoPE to take them to " + name_of(stage) +
                  (offset == 0 ? "" : " at other positions") +
                  "; dump them again, or evaluate text through --model");
  if (!info.rope->rotates()) return;
  const std::vector<std::int32_t> of_tokens = source.positions(tokens, count);
  std::vector<std::int32_t> from, to;  // of each row
  for (const std::int32_t position : of_tokens) {
    from.insert(from.end(), static_cast<std::size_t>(info.kv_heads), position);
    to.insert(to.end(), static_cast<std::size_t>(info.kv_heads), position + offset);
  }
  const auto num_rows = static_cast<std::int64_t>(from.size());
  // Moved keys take the way a cache would see them: off their old place, onto the new one.
  if (info.key_stage == KeyStage::kPostRope)
    info.rope->undo(layer, rows.data(), info.head_dim, from.data(), num_rows);
  if (stage == KeyStage::kPostRope || offset != 0)
    info.rope->apply(layer, rows.data(), info.head_dim, to.data(), num_rows);
  if (stage == KeyStage::kPreRope && offset != 0)
    info.rope->undo(layer, rows.data(), info.head_dim, to.data(), num_rows);
}

std::unique_ptr<VectorSource> open_activations(const DataSpec& spec) {
  return std::make_unique<ActivationSource>(spec.path);
}

std::unique_ptr<VectorSource> open_text(const DataSpec& spec,
                                        const std::string& field,
                                        LanguageModel& model,
                                        const std::string& model_sha256,
                                        const Tokenizer* tokenizer,
                                        const PackOptions& packing) {
  TextSpec text;
  text.name = spec.name;
  text.path = spec.path;
  text.field = field;
  text.is_token_ids = spec.is_token_ids;
  PackedText packed = read_packed(text, tokenizer, packing, model.info().vocab);
  return std::make_unique<TextSource>(model, model_sha256, std::move(packed));
}

}  // namespace lexico::apps
