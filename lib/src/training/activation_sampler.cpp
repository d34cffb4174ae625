// Two-level shuffle over a source of activations: chunks, then the rows of a pool of chunks.
#include "lexico/activation_sampler.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <future>
#include <map>
#include <numeric>
#include <utility>

#include "check.h"
#include "core/random.h"
#include "lexico/activations.h"
#include "store/half.h"
#include "training/prepare_rows.h"

namespace lexico {
namespace {

constexpr std::int64_t kChunkRows = 2048;  // at least; as files are chunked
constexpr std::int64_t kFitRows = 65536;   // that the frame is fitted on
// The first pools are smaller, so that training starts while most is still to be loaded.
constexpr std::int64_t kFirstPools = 8, kLeastChunks = 16;
// What a random stream is for.
constexpr std::uint64_t kChunkOrder = 1, kRowOrder = 2, kOffsets = 6;

/// The chunks of an epoch in their order, cut into pools.
struct Epoch {
  std::vector<std::int64_t> order;
  std::vector<std::size_t> ends;  // of each pool, in `order`
};

/// Some chunks that are in memory together.
struct Pool {
  std::int64_t epoch = -1, number = -1;
  std::int64_t first = 0, units = 0;  // of the stream: the first one, and how many
  std::vector<std::int64_t> chunks;
  std::size_t loaded = 0;  // of them
  std::size_t slot = 0;

  bool is(std::int64_t e, std::int64_t n) const { return epoch == e && number == n; }
};

/// Memory for a pool.
struct Slot {
  std::vector<std::unique_ptr<std::byte[]>> rows;  // of each dataset
  std::map<std::int64_t, std::int64_t> places;     // of each chunk that is in it: its first row
  std::int64_t used = 0, capacity = 0;             // rows
};

}  // namespace

struct ActivationSampler::Impl {
  ActivationSource& source;
  std::vector<TrainTarget> targets;
  std::int64_t num_rows;
  std::uint64_t seed;
  std::int64_t expected;  // units; 0: not known
  std::int64_t heads, dim;
  bool half;
  // What is shuffled is a unit: a row, or a token's rows of all heads where targets have heads.
  std::int64_t unit_rows;
  std::vector<ActivationSource::Dataset> datasets;
  std::vector<std::vector<std::size_t>> datasets_of;  // per target, one for each of its layers

  std::vector<std::int64_t> batches;  // first rows of the source's batches in use, and the end
  std::vector<std::size_t> chunks;    // first batch of each, and the end
  std::int64_t largest_chunk = 0;     // rows
  bool all_held = false;              // one slot for the whole run, else two that take turns
  std::int64_t slot_rows = 0, first_pool_rows = 0;

  TrainingFrame frame;
  std::vector<Transform> transforms;  // [dataset, head]; empty: the frame changes nothing

  std::map<std::int64_t, Epoch> epochs;  // those in work
  Slot slots[2];
  Pool current, ahead;
  std::vector<std::uint32_t> unit_order;  // of the current pool, once it is loaded
  std::size_t cursor = 0;                 // units of it already given
  std::future<void> loading;              // of `ahead`
  std::atomic<bool> pausing{false};

  Impl(ActivationSource& from,
       std::vector<TrainTarget> all,
       std::int64_t rows,
       std::uint64_t s,
       std::int64_t vectors)
      : source(from),
        targets(std::move(all)),
        num_rows(rows),
        seed(s),
        expected(vectors),
        heads(from.info().kv_heads),
        dim(from.info().head_dim),
        half(from.is_half()),
        unit_rows(targets.front().head >= 0 ? heads : 1) {
    num_rows = num_rows / unit_rows * unit_rows;
  }
  ~Impl() { stop_loading(); }

  // --- which rows when ----------------------------------------------------------------------

  std::int64_t num_chunks() const { return static_cast<std::int64_t>(chunks.size()) - 1; }
  std::int64_t first_row(std::int64_t chunk) const {
    return batches[chunks[static_cast<std::size_t>(chunk)]];
  }
  std::int64_t rows_in(std::int64_t chunk) const { return first_row(chunk + 1) - first_row(chunk); }
  std::int64_t units_in_epoch() const { return num_rows / unit_rows; }

  void find_chunks() {
    for (std::int64_t token : source.batch_starts())
      if (token * heads < num_rows) batches.push_back(token * heads);
    if (batches.empty())
      for (std::int64_t row = 0; row < num_rows;
           row += std::max(kChunkRows / heads, std::int64_t{1}) * heads)
        batches.push_back(row);
    batches.push_back(num_rows);
    for (std::size_t i = 0; i + 1 < batches.size(); ++i)
      if (chunks.empty() || batches[i] - batches[chunks.back()] >= kChunkRows) chunks.push_back(i);
    chunks.push_back(batches.size() - 1);
    for (std::int64_t chunk = 0; chunk < num_chunks(); ++chunk)
      largest_chunk = std::max(largest_chunk, rows_in(chunk));
  }

  void share_out_memory(std::int64_t pool_rows) {
    std::int64_t needed = num_rows;
    if (expected > 0) needed = std::min(needed, expected * unit_rows + largest_chunk);
    all_held = needed <= pool_rows;
    slot_rows = all_held ? needed : std::max(pool_rows / 2, largest_chunk);
    first_pool_rows =
        std::min(slot_rows, std::max(needed / kFirstPools, kLeastChunks * largest_chunk));
  }

  const Epoch& epoch(std::int64_t number) {
    if (const auto found = epochs.find(number); found != epochs.end()) return found->second;
    Epoch& made = epochs[number];
    made.order.resize(static_cast<std::size_t>(num_chunks()));
    std::iota(made.order.begin(), made.order.end(), 0);
    detail::Random({seed, kChunkOrder, static_cast<std::uint64_t>(number)}).shuffle(made.order);
    const bool in_memory = all_held && number > 0;
    const std::int64_t most = in_memory ? num_rows : number == 0 ? first_pool_rows : slot_rows;
    std::int64_t rows = 0, units = number * units_in_epoch();
    for (std::size_t i = 0; i < made.order.size(); ++i) {
      const std::int64_t more = rows_in(made.order[i]);
      if (rows > 0 && rows + more > most) {
        made.ends.push_back(i);
        rows = 0;
      }
      rows += more;
      const bool before = units < expected;
      units += more / unit_rows;
      if (!in_memory && before && units >= expected) {  // the run ends here: load no more for it
        made.ends.push_back(i + 1);
        rows = 0;
      }
    }
    if (made.ends.empty() || made.ends.back() < made.order.size())
      made.ends.push_back(made.order.size());
    return made;
  }

  Pool pool(std::int64_t number_of_epoch, std::int64_t number) {
    const Epoch& all = epoch(number_of_epoch);
    const auto begin = static_cast<std::ptrdiff_t>(
        number == 0 ? 0 : all.ends[static_cast<std::size_t>(number - 1)]);
    const auto end = static_cast<std::ptrdiff_t>(all.ends[static_cast<std::size_t>(number)]);
    Pool made;
    made.epoch = number_of_epoch;
    made.number = number;
    made.first = number_of_epoch * units_in_epoch();
    for (std::ptrdiff_t i = 0; i < end; ++i) {
      const std::int64_t units = rows_in(all.order[static_cast<std::size_t>(i)]) / unit_rows;
      (i < begin ? made.first : made.units) += units;
    }
    made.chunks.assign(all.order.begin() + begin, all.order.begin() + end);
    return made;
  }

  Pool pool_after(const Pool& before) {
    const auto in_epoch = static_cast<std::int64_t>(epoch(before.epoch).ends.size());
    if (before.number + 1 < in_epoch) return pool(before.epoch, before.number + 1);
    epochs.erase(epochs.begin(), epochs.lower_bound(before.epoch));
    return pool(before.epoch + 1, 0);
  }

  // --- memory -------------------------------------------------------------------------------

  std::int64_t row_bytes() const { return dim * (half ? 2 : 4); }

  /// Reads what `pool` still lacks, up to `most` chunks of it.
  void load(Pool& pool, std::size_t most, bool may_pause) {
    Slot& slot = slots[pool.slot];
    if (pool.loaded == 0 && !all_held) {
      slot.places.clear();
      slot.used = 0;
    }
    for (; pool.loaded < std::min(most, pool.chunks.size()); ++pool.loaded) {
      if (may_pause && pausing) return;
      const std::int64_t chunk = pool.chunks[pool.loaded];
      if (slot.places.count(chunk) != 0) continue;
      make_room(slot, rows_in(chunk));
      read_chunk(chunk, slot);
      slot.places[chunk] = slot.used;
      slot.used += (rows_in(chunk) + heads - 1) / heads * heads;  // whole tokens
    }
  }

  /// Memory that is not touched yet is not taken.
  void make_room(Slot& slot, std::int64_t rows) {
    if (slot.used + rows <= slot.capacity) return;
    // More than the run was expected to take is asked for if the slot is not new.
    slot.capacity = heads + (slot.used == 0 ? std::max(rows, slot_rows) : 2 * (slot.used + rows));
    slot.rows.resize(datasets.size());
    for (std::unique_ptr<std::byte[]>& old : slot.rows) {
      auto larger = std::make_unique_for_overwrite<std::byte[]>(
          static_cast<std::size_t>(slot.capacity * row_bytes()));
      if (slot.used > 0) std::copy_n(old.get(), slot.used * row_bytes(), larger.get());
      old = std::move(larger);
    }
  }

  void read_chunk(std::int64_t chunk, Slot& slot) {
    const auto at = static_cast<std::size_t>(chunk);
    for (std::size_t batch = chunks[at]; batch < chunks[at + 1]; ++batch) {
      const std::int64_t first = batches[batch], count = batches[batch + 1] - first;
      const std::int64_t to = (slot.used + first - first_row(chunk)) * row_bytes();
      for (std::size_t i = 0; i < datasets.size(); ++i) {
        const auto [layer, kind] = datasets[i];
        std::byte* out = slot.rows[i].get() + to;
        if (half)
          source.read_half(layer, kind, first, count, reinterpret_cast<std::uint16_t*>(out));
        else
          source.read(layer, kind, first, count, reinterpret_cast<float*>(out));
      }
    }
  }

  /// Starts to load the pool after the current one, unless the run ends before it.
  void look_ahead() {
    if (ahead.epoch < 0) {
      if (expected > 0 && current.first + current.units >= expected) return;
      ahead = pool_after(current);
      ahead.slot = all_held ? 0 : 1 - current.slot;
    }
    if (loading.valid()) {
      if (loading.wait_for(std::chrono::seconds(0)) != std::future_status::ready) return;
      loading.get();
    }
    if (ahead.loaded == ahead.chunks.size()) return;
    pausing = false;
    loading = std::async(std::launch::async, [this] { load(ahead, ahead.chunks.size(), true); });
  }

  /// What it could not load is met again when it is needed.
  void stop_loading() {
    pausing = true;
    if (loading.valid()) loading.wait();
    pausing = false;
  }

  void forget_ahead() {
    stop_loading();
    loading = {};
    ahead = {};
  }

  void set_current(Pool next) {
    current = std::move(next);
    unit_order.clear();
    cursor = 0;
  }

  void advance() {
    if (current.epoch < 0) {
      set_current(pool(0, 0));
    } else if (ahead.epoch >= 0) {
      if (loading.valid()) loading.get();
      set_current(std::exchange(ahead, {}));
    } else {
      const std::size_t slot = current.slot;
      set_current(pool_after(current));
      current.slot = slot;
    }
  }

  /// Makes the current pool ready to be given out.
  void begin_pool() {
    load(current, current.chunks.size(), false);
    const Slot& slot = slots[current.slot];
    for (std::int64_t chunk : current.chunks) {
      const std::int64_t first = slot.places.at(chunk) / unit_rows;
      for (std::int64_t unit = 0; unit < rows_in(chunk) / unit_rows; ++unit)
        unit_order.push_back(static_cast<std::uint32_t>(first + unit));
    }
    detail::Random({seed,
                    kRowOrder,
                    static_cast<std::uint64_t>(current.epoch),
                    static_cast<std::uint64_t>(current.number)})
        .shuffle(unit_order);
  }

  // --- rows ---------------------------------------------------------------------------------

  void copy_rows(const Slot& slot,
                 std::size_t dataset,
                 std::int64_t row,
                 std::int64_t count,
                 float* out) const {
    const std::byte* from = slot.rows[dataset].get() + row * row_bytes();
    if (half)
      store::to_float(
          reinterpret_cast<const std::uint16_t*>(from), static_cast<std::size_t>(count * dim), out);
    else
      std::copy_n(reinterpret_cast<const float*>(from), count * dim, out);
  }

  /// Rows of the first chunks, each without a token that is cut off at its end. Those of the first
  /// pool stay in memory.
  void for_each_row_to_fit(const detail::TakeRows& take) {
    const std::vector<std::int64_t> order = epoch(0).order;
    std::int64_t done = 0;
    for (std::size_t i = 0; i < order.size() && done < kFitRows; ++i) {
      Pool alone;
      alone.chunks = {order[i]};
      alone.slot = all_held ? 0 : 1;
      Pool& from = i < current.chunks.size() ? current : alone;
      load(from, from.loaded + 1, false);
      const std::int64_t count = rows_in(order[i]) / heads * heads;
      std::vector<float> rows(static_cast<std::size_t>(count * dim));
      for (std::size_t dataset = 0; dataset < datasets.size(); ++dataset) {
        const Slot& slot = slots[from.slot];
        copy_rows(slot, dataset, slot.places.at(order[i]), count, rows.data());
        take(datasets[dataset].first, datasets[dataset].second, rows);
      }
      done += count;
    }
  }

  std::int64_t row_of(std::size_t target, std::size_t place) const {
    return std::int64_t{unit_order[place]} * unit_rows + std::max(0, targets[target].head);
  }
  std::size_t dataset_of(std::size_t target, std::size_t place) const {
    const std::vector<std::size_t>& from = datasets_of[target];
    return from[(place + static_cast<std::size_t>(current.epoch)) % from.size()];
  }

  /// `count` rows of a target from the cursor on.
  void give(std::size_t target, std::int64_t count, float* out) const {
    const Slot& slot = slots[current.slot];
    if (frame.changes_nothing()) {
      for (std::int64_t i = 0; i < count; ++i) {
        const std::size_t place = cursor + static_cast<std::size_t>(i);
        copy_rows(slot, dataset_of(target, place), row_of(target, place), 1, out + i * dim);
      }
      return;
    }
    // Rows of one dataset and head together: they share a transform.
    std::map<std::size_t, std::vector<std::int64_t>> groups;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::size_t place = cursor + static_cast<std::size_t>(i);
      const auto head = static_cast<std::size_t>(row_of(target, place) % heads);
      groups[dataset_of(target, place) * static_cast<std::size_t>(heads) + head].push_back(i);
    }
    std::vector<float> rows;
    std::vector<std::int32_t> offsets;
    for (const auto& [group, members] : groups) {
      const std::size_t dataset = group / static_cast<std::size_t>(heads);
      const auto [layer, kind] = datasets[dataset];
      rows.resize(members.size() * static_cast<std::size_t>(dim));
      offsets.clear();
      for (std::size_t i = 0; i < members.size(); ++i) {
        const std::size_t place = cursor + static_cast<std::size_t>(members[i]);
        copy_rows(slot,
                  dataset,
                  row_of(target, place),
                  1,
                  rows.data() + i * static_cast<std::size_t>(dim));
        if (frame.position_offsets > 0 && kind == Kind::kKeys)
          offsets.push_back(static_cast<std::int32_t>(
              detail::Random({seed,
                              kOffsets,
                              static_cast<std::uint64_t>(current.epoch),
                              static_cast<std::uint64_t>(current.number),
                              place})
                  .below(static_cast<std::uint64_t>(frame.position_offsets))));
      }
      const auto size = static_cast<std::int64_t>(members.size());
      detail::move_positions(frame, layer, rows.data(), static_cast<int>(dim), offsets);
      detail::transform_rows(transforms[group], rows.data(), size, static_cast<int>(dim));
      for (std::size_t i = 0; i < members.size(); ++i)
        std::copy_n(rows.data() + i * static_cast<std::size_t>(dim), dim, out + members[i] * dim);
    }
  }
};

ActivationSampler::ActivationSampler(ActivationSource& source,
                                     std::vector<TrainTarget> targets,
                                     std::int64_t num_rows,
                                     std::uint64_t seed,
                                     std::size_t pool_bytes,
                                     std::int64_t vectors) {
  const ActivationInfo& info = source.info();
  if (targets.empty()) detail::throw_invalid("activation sampler: no dictionary to sample for");
  const bool by_head = targets.front().head >= 0;
  const std::int64_t heads = info.kv_heads;
  if (num_rows < (by_head ? heads : 1) || num_rows > source.num_rows())
    detail::throw_invalid(
        "activation sampler: num_rows is ", num_rows, ", must be in [1, ", source.num_rows(), "]");
  impl_ = std::make_unique<Impl>(source, std::move(targets), num_rows, seed, vectors);
  Impl& impl = *impl_;
  for (const TrainTarget& target : impl.targets) {
    if ((target.head >= 0) != by_head || target.head >= heads)
      detail::throw_invalid("activation sampler: head ", target.head, ", the data has ", heads);
    std::vector<int> layers = {target.layer};
    layers.insert(layers.end(), target.more_layers.begin(), target.more_layers.end());
    std::vector<std::size_t>& from = impl.datasets_of.emplace_back();
    for (int layer : layers) {
      if (layer < 0 || layer >= info.num_layers)
        detail::throw_invalid(
            "activation sampler: layer ", layer, ", the data has ", info.num_layers);
      const ActivationSource::Dataset dataset(layer, target.kind);
      const auto found = std::find(impl.datasets.begin(), impl.datasets.end(), dataset);
      from.push_back(static_cast<std::size_t>(found - impl.datasets.begin()));
      if (found == impl.datasets.end()) impl.datasets.push_back(dataset);
    }
  }
  impl.find_chunks();
  const std::int64_t row_of_all = impl.row_bytes() * 2 * info.num_layers;
  impl.share_out_memory(static_cast<std::int64_t>(pool_bytes) / row_of_all);
}

ActivationSampler::~ActivationSampler() = default;
ActivationSampler::ActivationSampler(ActivationSampler&&) noexcept = default;

const TrainingFrame& ActivationSampler::fit_frame(const TrainConfig& config) {
  Impl& impl = *impl_;
  impl.forget_ahead();
  impl.set_current(impl.pool(0, 0));
  impl.frame =
      detail::fit_frame(impl.source, impl.targets, config, [&](const detail::TakeRows& take) {
        impl.for_each_row_to_fit(take);
      });
  impl.transforms.clear();
  for (const auto& [layer, kind] : impl.datasets)
    for (int head = 0; head < impl.heads; ++head)
      impl.transforms.push_back(impl.frame.of(layer, kind, head));
  return impl.frame;
}

const TrainingFrame& ActivationSampler::frame() const { return impl_->frame; }

int ActivationSampler::num_dictionaries() const { return static_cast<int>(impl_->targets.size()); }
int ActivationSampler::dim() const { return static_cast<int>(impl_->dim); }

std::string ActivationSampler::identity() const {
  const ActivationInfo& info = impl_->source.info();
  return "plan " + info.plan_hash + ", model " + info.model_sha256 + ", " +
         name_of(info.key_stage) + ", " + std::to_string(impl_->num_rows) + " of " +
         std::to_string(impl_->source.num_rows()) + " rows in " +
         std::to_string(impl_->num_chunks()) + " chunks, pools of " +
         std::to_string(impl_->slot_rows) + " rows";
}

std::size_t ActivationSampler::pool_bytes() const {
  return impl_->datasets.size() * (impl_->all_held ? 1 : 2) *
         static_cast<std::size_t>(impl_->slot_rows * impl_->row_bytes());
}

std::int64_t ActivationSampler::rows_to_load() const {
  Impl& impl = *impl_;
  if (impl.expected == 0) return 0;
  const std::int64_t whole = impl.expected / impl.units_in_epoch();
  if (whole > 0 && impl.all_held) return impl.num_rows;
  std::int64_t rows = whole * impl.num_rows;
  for (std::int64_t number = 0;; ++number) {
    const Pool pool = impl.pool(whole, number);
    if (pool.first >= impl.expected) return rows;
    rows += pool.units * impl.unit_rows;
    if (number + 1 == static_cast<std::int64_t>(impl.epoch(whole).ends.size())) return rows;
  }
}

std::int64_t ActivationSampler::pool_rows() const {
  return impl_->slot_rows * (impl_->all_held ? 1 : 2);
}

void ActivationSampler::next(std::int64_t count, float* out) {
  Impl& impl = *impl_;
  for (std::int64_t done = 0; done < count;) {
    if (static_cast<std::int64_t>(impl.cursor) >= impl.current.units) impl.advance();
    if (impl.unit_order.empty()) impl.begin_pool();
    impl.look_ahead();
    const std::int64_t units =
        std::min(count - done, impl.current.units - static_cast<std::int64_t>(impl.cursor));
    for (std::size_t t = 0; t < impl.targets.size(); ++t)
      impl.give(t, units, out + (static_cast<std::int64_t>(t) * count + done) * impl.dim);
    impl.cursor += static_cast<std::size_t>(units);
    done += units;
  }
}

void ActivationSampler::seek(std::int64_t vectors) {
  Impl& impl = *impl_;
  const std::int64_t epoch = vectors / impl.units_in_epoch();
  Pool wanted = impl.pool(epoch, 0);
  while (vectors >= wanted.first + wanted.units) wanted = impl.pool(epoch, wanted.number + 1);
  if (!impl.current.is(epoch, wanted.number)) {
    impl.forget_ahead();
    wanted.slot = impl.current.slot;
    impl.set_current(std::move(wanted));
  }
  impl.cursor = static_cast<std::size_t>(vectors - impl.current.first);
}

void ActivationSampler::pause() { impl_->stop_loading(); }

}  // namespace lexico
