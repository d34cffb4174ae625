// The frame that dictionaries are learnt in: means per head, metric, moved positions.
#include <algorithm>
#include <cmath>
#include <map>

#include "check.h"
#include "core/random.h"
#include "lexico/activation_sampler.h"
#include "lexico/activations.h"
#include "training/prepare_rows.h"

namespace lexico {
namespace {

using detail::throw_invalid;

// Of the mean eigenvalue, added to the metric: directions that no query asks for still count.
constexpr double kMetricShare = 0.2;
constexpr std::uint64_t kFitOffsets = 7;  // what a random stream is for

void set_query_metric(Transform& transform, ActivationSource& reader, int layer) {
  const ActivationInfo& info = reader.info();
  if (info.key_stage != KeyStage::kPreRope)
    throw_invalid("metric is 'queries', which needs pre_rope keys; ",
                  reader.files().front(),
                  " holds ",
                  name_of(info.key_stage));
  if (reader.stored_key_stage() != KeyStage::kPreRope)
    throw_invalid("metric is 'queries', but the query moments in ",
                  reader.files().front(),
                  " are of post_rope queries: lexico-extract --key-stage pre_rope --query-moments");
  const std::vector<float> moment = reader.query_second_moment(layer);
  if (moment.empty())
    throw_invalid("metric is 'queries', but ",
                  reader.files().front(),
                  " holds no query moments: lexico-extract --query-moments stores them");
  set_metric(transform, moment, info.kv_heads, info.head_dim, kMetricShare);
}

Rope rope_of(const ActivationSource& reader) {
  const ActivationInfo& info = reader.info();
  const std::string where = reader.files().front();
  if (info.key_stage != KeyStage::kPostRope)
    throw_invalid("position_offsets move post_rope keys, those of ",
                  where,
                  " are taken as ",
                  name_of(info.key_stage),
                  ": set key_stage to post_rope");
  if (info.rope.empty())
    throw_invalid("position_offsets need the model's rotation, which ",
                  where,
                  " does not hold: dump it again with this lexico-extract");
  Rope rope = Rope::parse(info.rope, where + ": ", info.head_dim, 0);
  if (!rope.rotates())
    throw_invalid("position_offsets: the model of ", where, " does not rotate its keys");
  rope.attention_scaling = 1;  // the keys have it already
  return rope;
}

void fit_means(TrainingFrame& frame,
               const ActivationInfo& info,
               std::uint64_t seed,
               const std::function<void(const detail::TakeRows&)>& each) {
  std::map<std::pair<int, Kind>, HeadMeans> means;
  for (const auto& [dataset, transform] : frame.transforms)
    means.emplace(dataset, HeadMeans(info.head_dim, info.kv_heads));
  detail::Random random({seed, kFitOffsets});
  each([&](int layer, Kind kind, std::vector<float>& rows) {
    const auto count = static_cast<std::int64_t>(rows.size()) / info.head_dim;
    std::vector<std::int32_t> offsets;
    if (frame.position_offsets > 0 && kind == Kind::kKeys)
      for (std::int64_t i = 0; i < count; ++i)
        offsets.push_back(static_cast<std::int32_t>(
            random.below(static_cast<std::uint64_t>(frame.position_offsets))));
    detail::move_positions(frame, layer, rows.data(), info.head_dim, offsets);
    means.at({layer, kind}).add(rows.data(), count);
  });
  for (auto& [dataset, transform] : frame.transforms) transform.mean = means.at(dataset).means();
}

}  // namespace

Transform TrainingFrame::of(int layer, Kind kind, int head) const {
  const auto found = transforms.find({layer, kind});
  if (found == transforms.end()) return {};
  Transform transform = found->second;
  if (head < 0) return transform;
  const auto keep_head = [&](std::vector<float>& values) {
    const std::size_t size = values.size() / static_cast<std::size_t>(transform.heads);
    const auto first = values.begin() + static_cast<std::ptrdiff_t>(size) * head;
    values = std::vector<float>(first, first + static_cast<std::ptrdiff_t>(size));
  };
  for (std::vector<float>* values : {&transform.mean, &transform.map, &transform.back_map})
    keep_head(*values);
  transform.heads = 1;
  return transform;
}

namespace detail {

TrainingFrame fit_frame(ActivationSource& source,
                        const std::vector<TrainTarget>& targets,
                        const TrainConfig& config,
                        const std::function<void(const TakeRows&)>& each) {
  TrainingFrame frame;
  const auto is_keys = [](const TrainTarget& t) { return t.kind == Kind::kKeys; };
  const bool any_keys = std::any_of(targets.begin(), targets.end(), is_keys);
  if (config.position_offsets > 0 && any_keys) {
    frame.position_offsets = config.position_offsets;
    frame.rope = rope_of(source);
  }
  const ActivationInfo& info = source.info();
  const bool means = config.mean == "head" || (config.mean == "auto" && config.recipe != "lexico" &&
                                               info.key_stage == KeyStage::kPreRope);
  for (const TrainTarget& target : targets) {
    std::vector<int> layers = target.more_layers;
    layers.push_back(target.layer);
    for (int layer : layers) {
      const bool metric = config.metric == "queries" && target.kind == Kind::kKeys;
      if ((!means && config.scale == "none" && !metric) ||
          frame.transforms.count({layer, target.kind}) != 0)
        continue;
      Transform& transform = frame.transforms[{layer, target.kind}];
      transform.heads = info.kv_heads;
      transform.unit_scale = config.scale == "unit";
      if (metric) set_query_metric(transform, source, layer);
    }
  }
  if (means) fit_means(frame, info, config.seed, each);
  return frame;
}

void move_positions(const TrainingFrame& frame,
                    int layer,
                    float* rows,
                    int dim,
                    const std::vector<std::int32_t>& offsets) {
  // Rotations add up: a key at position p turned by that of d is the key at p + d.
  if (!offsets.empty())
    frame.rope.apply(layer, rows, dim, offsets.data(), static_cast<std::int64_t>(offsets.size()));
}

void transform_rows(const Transform& transform, float* rows, std::int64_t count, int dim) {
  transform.forward(rows, count, dim);
  if (!transform.unit_scale) return;
  for (std::int64_t row = 0; row < count; ++row) {
    float* x = rows + row * dim;
    double energy = 0;
    for (int d = 0; d < dim; ++d) energy += static_cast<double>(x[d]) * x[d];
    if (!(energy > 0)) continue;  // zero, or NaN
    const double scale = 1 / std::sqrt(energy);
    for (int d = 0; d < dim; ++d) x[d] = static_cast<float>(x[d] * scale);
  }
}

}  // namespace detail
}  // namespace lexico
