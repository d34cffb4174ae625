// Rows straight from the model, as a dump would hold them.
#include "lexico/model_activations.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "check.h"
#include "lexico/language_model.h"
#include "store/bad_value.h"
#include "store/half.h"

namespace lexico {
namespace {

/// Rows that stay in memory, once they were there.
struct Held {
  ActivationSource::Rows rows;
  std::set<std::size_t> missing;  // batches that have some of them
  std::map<ActivationSource::Dataset, std::vector<std::byte>> data;
};

}  // namespace

struct ModelActivations::Impl {
  LanguageModel& model;
  const ActivationInfo& info;  // of the source
  const KeyStage stored_stage;
  std::string place;  // of the tokens, for messages
  std::vector<Batch> batches;
  ReadIds read_ids;

  std::mutex mutex;
  std::vector<Held> held;
  std::size_t last = static_cast<std::size_t>(-1);  // the batch in `cache`
  CacheBatch cache;
  std::vector<std::int32_t> ids, positions;
  std::atomic<std::int64_t> tokens_run{0};

  std::int64_t heads() const { return info.kv_heads; }
  std::int64_t row_bytes() const { return info.head_dim * (info.half ? 2 : 4); }
  std::int64_t first_row(std::size_t batch) const { return batches[batch].first_token * heads(); }
  std::int64_t end_row(std::size_t batch) const {
    return first_row(batch) + batches[batch].size * batches[batch].length * heads();
  }
  std::size_t batch_of(std::int64_t token) const {
    const auto after = std::upper_bound(
        batches.begin(), batches.end(), token, [](std::int64_t t, const Batch& batch) {
          return t < batch.first_token;
        });
    return static_cast<std::size_t>(after - batches.begin()) - 1;
  }

  void check(int layer, std::int64_t first, std::int64_t count) const {
    if (layer < 0 || layer >= info.num_layers)
      detail::throw_invalid("layer is ", layer, ", must be in [0, ", info.num_layers, ")");
    const std::int64_t all = info.num_tokens * heads();
    if (first < 0 || count < 0 || first > all - count)
      detail::throw_invalid("rows [", first, ", ", first, " + ", count, ") of ", all);
  }

  /// Has the model read a batch, unless it is the last one that it read.
  void run(std::size_t number) {
    if (number == last) return;
    last = static_cast<std::size_t>(-1);
    const Batch& batch = batches[number];
    ids.resize(static_cast<std::size_t>(batch.size * batch.length));
    read_ids(number, ids.data());
    model.forward(ids.data(), batch.size, batch.length, false, cache);
    if (stored_stage == KeyStage::kPreRope) undo_rotation();
    tokens_run += batch.size * batch.length;
    last = number;
    for (Held& some : held)
      if (some.missing.erase(number) > 0) keep(some);
  }

  void undo_rotation() {
    const std::int64_t rows = cache.batch * heads() * cache.length;
    positions.resize(static_cast<std::size_t>(rows));
    for (std::int64_t i = 0; i < rows; ++i)
      positions[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i % cache.length);
    for (int layer = 0; layer < info.num_layers; ++layer)
      model.info().rope.undo(layer,
                             cache.keys.data() + layer * rows * info.head_dim,
                             info.head_dim,
                             positions.data(),
                             rows);
  }

  /// Of the batch that the model read last.
  void keep(Held& some) {
    const std::int64_t first = std::max(some.rows.first, first_row(last)),
                       end = std::min(some.rows.first + some.rows.count, end_row(last));
    for (auto& [dataset, data] : some.data)
      convert(dataset.first,
              dataset.second,
              first,
              end - first,
              data.data() + (first - some.rows.first) * row_bytes());
  }

  /// Rows of the batch that the model read last, as they are stored.
  void convert(int layer, Kind kind, std::int64_t first, std::int64_t count, std::byte* out) const {
    const std::int64_t dim = info.head_dim, start = first_row(last);
    const float* all = (kind == Kind::kKeys ? cache.keys : cache.values).data() +
                       layer * cache.batch * heads() * cache.length * dim;
    for (std::int64_t row = first; row < first + count; ++row, out += row_bytes()) {
      const std::int64_t token = (row - start) / heads(), head = (row - start) % heads();
      const std::int64_t sequence = token / cache.length, position = token % cache.length;
      const float* vector = all + ((sequence * heads() + head) * cache.length + position) * dim;
      bool fits = true;
      if (info.half) {
        fits = store::to_half(
            vector, static_cast<std::size_t>(dim), reinterpret_cast<std::uint16_t*>(out));
      } else {
        std::copy_n(vector, dim, reinterpret_cast<float*>(out));
        fits = std::all_of(vector, vector + dim, [](float value) { return std::isfinite(value); });
      }
      if (!fits)
        store::throw_bad_value(vector,
                               info.head_dim,
                               info.half,
                               layer,
                               kind,
                               row / heads(),
                               static_cast<int>(head),
                               place);
    }
  }

  const Held* holder_of(const Dataset& dataset, std::int64_t row) const {
    for (const Held& some : held)
      if (row >= some.rows.first && row < some.rows.first + some.rows.count &&
          some.data.count(dataset) != 0)
        return &some;
    return nullptr;
  }

  void read(int layer, Kind kind, std::int64_t first, std::int64_t count, std::byte* out) {
    const std::lock_guard lock(mutex);
    for (std::int64_t row = first; row < first + count;) {
      const std::size_t batch = batch_of(row / heads());
      std::int64_t end = std::min(first + count, end_row(batch));
      std::byte* to = out + (row - first) * row_bytes();
      const Held* some = holder_of({layer, kind}, row);
      if (some != nullptr && some->missing.count(batch) == 0) {
        end = std::min(end, some->rows.first + some->rows.count);
        const std::byte* from =
            some->data.at({layer, kind}).data() + (row - some->rows.first) * row_bytes();
        std::copy_n(from, (end - row) * row_bytes(), to);
      } else {
        run(batch);
        convert(layer, kind, row, end - row, to);
      }
      row = end;
    }
  }
};

ModelActivations::ModelActivations(LanguageModel& model,
                                   const ActivationInfo& own,
                                   const std::vector<std::string>& files,
                                   std::vector<Batch> batches,
                                   ReadIds read_ids) {
  describe(own, files);
  std::string place = "the text";
  for (std::size_t i = 1; i < files.size(); ++i) place += (i == 1 ? " " : ", ") + files[i];
  impl_ = std::unique_ptr<Impl>(new Impl{.model = model,
                                         .info = info(),
                                         .stored_stage = own.key_stage,
                                         .place = std::move(place),
                                         .batches = std::move(batches),
                                         .read_ids = std::move(read_ids),
                                         .mutex = {},
                                         .held = {},
                                         .cache = {},
                                         .ids = {},
                                         .positions = {}});
}
ModelActivations::~ModelActivations() = default;

std::vector<float> ModelActivations::query_second_moment(int) { return {}; }

std::vector<std::int64_t> ModelActivations::batch_starts() {
  std::vector<std::int64_t> starts;
  for (const Batch& batch : impl_->batches) starts.push_back(batch.first_token);
  return starts;
}

void ModelActivations::hold(const std::vector<Rows>& rows, const std::vector<Dataset>& datasets) {
  Impl& impl = *impl_;
  const std::lock_guard lock(impl.mutex);
  for (const Rows& some : rows) {
    if (some.count <= 0) continue;
    impl.check(0, some.first, some.count);
    Held& own = impl.held.emplace_back(Held{some, {}, {}});
    for (std::size_t batch = impl.batch_of(some.first / impl.heads());
         batch < impl.batches.size() && impl.first_row(batch) < some.first + some.count;
         ++batch)
      own.missing.insert(batch);
    for (const Dataset& dataset : datasets)
      own.data[dataset].resize(static_cast<std::size_t>(some.count * impl.row_bytes()));
  }
  impl.last = static_cast<std::size_t>(-1);  // so that they are kept whatever is asked for next
}

std::int64_t ModelActivations::tokens_run() const { return impl_->tokens_run; }

void ModelActivations::read_stored(
    int layer, Kind kind, std::int64_t first, std::int64_t count, float* out) {
  impl_->check(layer, first, count);
  if (!info().half) {
    impl_->read(layer, kind, first, count, reinterpret_cast<std::byte*>(out));
    return;
  }
  const auto numbers = static_cast<std::size_t>(count * info().head_dim);
  std::vector<std::uint16_t> stored(numbers);
  impl_->read(layer, kind, first, count, reinterpret_cast<std::byte*>(stored.data()));
  store::to_float(stored.data(), numbers, out);
}

void ModelActivations::read_stored_half(
    int layer, Kind kind, std::int64_t first, std::int64_t count, std::uint16_t* out) {
  impl_->check(layer, first, count);
  impl_->read(layer, kind, first, count, reinterpret_cast<std::byte*>(out));
}

void ModelActivations::read_positions(std::int64_t first_token,
                                      std::int64_t count,
                                      std::int32_t* out) {
  for (std::int64_t token = first_token; token < first_token + count; ++token) {
    const Batch& batch = impl_->batches[impl_->batch_of(token)];
    *out++ = static_cast<std::int32_t>((token - batch.first_token) % batch.length);
  }
}

}  // namespace lexico
