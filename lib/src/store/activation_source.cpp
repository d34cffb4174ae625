// What all sources of activations share: the stage of the keys.
#include "check.h"
#include "half.h"
#include "lexico/activations.h"
#include "lexico/error.h"

namespace lexico {

void ActivationSource::describe(const ActivationInfo& info, const std::vector<std::string>& files) {
  info_ = info;
  files_ = files;
  stored_stage_ = info.key_stage;
}

void ActivationSource::hold(const std::vector<Rows>&, const std::vector<Dataset>&) {}

void ActivationSource::set_key_stage(KeyStage stage) {
  if (stage == info_.key_stage) return;
  const std::string& file = files_.front();
  if (info_.rope.empty())
    throw IoError(file + ": holds " + name_of(stored_stage_) +
                  " keys and no attribute 'rope' to take them to " + name_of(stage) +
                  "; dump them again");
  rope_ = Rope::parse(info_.rope, file + ": rope: ", info_.head_dim, info_.num_layers);
  std::int32_t position = 0;
  if (rope_.rotates() && info_.num_tokens > 0) read_positions(0, 1, &position);
  info_.key_stage = stage;
}

void ActivationSource::read(
    int layer, Kind kind, std::int64_t first, std::int64_t count, float* out) {
  read_stored(layer, kind, first, count, out);
  if (kind == Kind::kKeys && info_.key_stage != stored_stage_) rotate(layer, first, count, out);
}

void ActivationSource::read_half(
    int layer, Kind kind, std::int64_t first, std::int64_t count, std::uint16_t* out) {
  if (!info_.half)
    detail::throw_invalid(files_.front(), ": stores float32, read_half is for float16");
  if (kind == Kind::kValues || info_.key_stage == stored_stage_ || count <= 0) {
    read_stored_half(layer, kind, first, count, out);
    return;
  }
  std::vector<float> rows(static_cast<std::size_t>(count * info_.head_dim));
  read(layer, kind, first, count, rows.data());
  store::to_half(rows.data(), rows.size(), out);
}

void ActivationSource::rotate(int layer, std::int64_t first, std::int64_t count, float* rows) {
  if (!rope_.rotates() || count <= 0) return;
  const std::int64_t heads = info_.kv_heads, first_token = first / heads,
                     last_token = (first + count - 1) / heads;
  std::vector<std::int32_t> of_tokens(static_cast<std::size_t>(last_token - first_token + 1));
  read_positions(first_token, last_token - first_token + 1, of_tokens.data());
  std::vector<std::int32_t> of_rows;
  for (std::int64_t row = first; row < first + count; ++row)
    of_rows.push_back(of_tokens[static_cast<std::size_t>(row / heads - first_token)]);
  if (info_.key_stage == KeyStage::kPreRope)
    rope_.undo(layer, rows, info_.head_dim, of_rows.data(), count);
  else
    rope_.apply(layer, rows, info_.head_dim, of_rows.data(), count);
}

}  // namespace lexico
