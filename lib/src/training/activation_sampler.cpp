// Two-level shuffle over an activation dump: chunks, then the rows of a pool of chunks.
#include "lexico/activation_sampler.h"

#include <algorithm>
#include <numeric>

#include "check.h"
#include "core/half.h"
#include "core/random.h"
#include "lexico/activations.h"
#include "training/prepare_rows.h"

namespace lexico {
namespace {

constexpr std::int64_t kChunkRows = 2048;  // as the file is chunked
// What a random stream is for.
constexpr std::uint64_t kChunkOrder = 1, kRowOrder = 2, kOffsets = 6;

/// One dataset of the file, of which a pool is held.
struct Source {
  int layer;
  Kind kind;
  std::vector<std::uint16_t> half;
  std::vector<float> full;
};

}  // namespace

struct ActivationSampler::Impl {
  ActivationReader& reader;
  std::vector<TrainTarget> targets;
  std::int64_t num_rows;
  std::uint64_t seed;
  TrainingFrame frame;
  int dim;
  bool is_half;
  // What is shuffled is a unit: a row, or a token's rows of all heads where targets have heads.
  std::int64_t unit_rows, chunk_rows, num_chunks, chunks_per_pool;
  std::vector<Source> sources;
  std::vector<std::vector<std::size_t>> sources_of;  // per target, one for each of its layers

  std::int64_t epoch = -1, pool = 0;
  std::vector<std::int64_t> chunk_order;  // of this epoch
  std::vector<std::uint32_t> unit_order;  // of this pool
  std::size_t cursor = 0;                 // units of the pool already given

  std::int64_t rows_in_chunk(std::int64_t chunk) const {
    return std::min(chunk_rows, num_rows - chunk * chunk_rows);
  }
  std::int64_t num_pools() const { return (num_chunks + chunks_per_pool - 1) / chunks_per_pool; }

  void begin_epoch(std::int64_t number) {
    epoch = number;
    chunk_order.resize(static_cast<std::size_t>(num_chunks));
    std::iota(chunk_order.begin(), chunk_order.end(), 0);
    detail::Random({seed, kChunkOrder, static_cast<std::uint64_t>(epoch)}).shuffle(chunk_order);
  }

  std::vector<std::int64_t> chunks_of(std::int64_t pool_number) const {
    const auto first = chunk_order.begin() + pool_number * chunks_per_pool;
    const auto last =
        chunk_order.begin() + std::min(num_chunks, (pool_number + 1) * chunks_per_pool);
    std::vector<std::int64_t> chunks(first, last);
    std::sort(chunks.begin(), chunks.end());  // the disk likes it
    return chunks;
  }

  std::int64_t rows_of(const std::vector<std::int64_t>& chunks) const {
    std::int64_t rows = 0;
    for (std::int64_t chunk : chunks) rows += rows_in_chunk(chunk);
    return rows;
  }

  void load_chunk(Source& source, std::int64_t chunk, std::int64_t to_row) {
    const std::int64_t first = chunk * chunk_rows, count = rows_in_chunk(chunk);
    if (is_half) {
      reader.read_half(source.layer, source.kind, first, count, source.half.data() + to_row * dim);
      return;
    }
    float* out = source.full.data() + to_row * dim;
    reader.read(source.layer, source.kind, first, count, out);
    detail::prepare_rows(
        frame,
        source.layer,
        source.kind,
        first,
        out,
        count,
        dim,
        {seed, kOffsets, static_cast<std::uint64_t>(epoch), static_cast<std::uint64_t>(chunk)});
  }

  void load_pool(std::int64_t number) {
    pool = number;
    const std::vector<std::int64_t> chunks = chunks_of(pool);
    const std::int64_t rows = rows_of(chunks);
    for (Source& source : sources) {
      if (is_half)
        source.half.resize(static_cast<std::size_t>(rows * dim));
      else
        source.full.resize(static_cast<std::size_t>(rows * dim));
      std::int64_t row = 0;
      for (std::int64_t chunk : chunks) {
        load_chunk(source, chunk, row);
        row += rows_in_chunk(chunk);
      }
    }
    unit_order.resize(static_cast<std::size_t>(rows / unit_rows));
    std::iota(unit_order.begin(), unit_order.end(), 0u);
    detail::Random(
        {seed, kRowOrder, static_cast<std::uint64_t>(epoch), static_cast<std::uint64_t>(pool)})
        .shuffle(unit_order);
    cursor = 0;
  }

  void next_pool() {
    if (epoch >= 0 && pool + 1 < num_pools()) {
      load_pool(pool + 1);
      return;
    }
    begin_epoch(epoch + 1);
    load_pool(0);
  }

  /// The row of `target` in the unit at place `place` of the pool's order.
  void copy_row(std::size_t target, std::size_t place, float* out) const {
    const std::vector<std::size_t>& from = sources_of[target];
    const Source& source = sources[from[(place + static_cast<std::size_t>(epoch)) % from.size()]];
    const std::int64_t row =
        std::int64_t{unit_order[place]} * unit_rows + std::max(0, targets[target].head);
    const std::size_t at = static_cast<std::size_t>(row * dim);
    if (!is_half) {
      std::copy_n(source.full.data() + at, dim, out);
      return;
    }
    const std::uint16_t* values = source.half.data() + at;
    for (int d = 0; d < dim; ++d) out[d] = detail::float_from_half(values[d]);
  }
};

ActivationSampler::ActivationSampler(ActivationReader& reader,
                                     std::vector<TrainTarget> targets,
                                     std::int64_t num_rows,
                                     std::uint64_t seed,
                                     std::size_t pool_bytes,
                                     TrainingFrame frame) {
  const ActivationInfo& info = reader.info();
  if (targets.empty()) detail::throw_invalid("activation sampler: no dictionary to sample for");
  const bool by_head = targets.front().head >= 0;
  const std::int64_t heads = info.kv_heads;
  if (num_rows < (by_head ? heads : 1) || num_rows > reader.num_rows())
    detail::throw_invalid(
        "activation sampler: num_rows is ", num_rows, ", must be in [1, ", reader.num_rows(), "]");
  impl_ = std::make_unique<Impl>(Impl{.reader = reader,
                                      .targets = std::move(targets),
                                      .num_rows = by_head ? num_rows / heads * heads : num_rows,
                                      .seed = seed,
                                      .frame = std::move(frame),
                                      .dim = info.head_dim,
                                      .is_half = reader.is_half(),
                                      .unit_rows = by_head ? heads : 1,
                                      .chunk_rows = kChunkRows,
                                      .num_chunks = 0,
                                      .chunks_per_pool = 0,
                                      .sources = {},
                                      .sources_of = {},
                                      .chunk_order = {},
                                      .unit_order = {}});
  Impl& impl = *impl_;
  if (!impl.frame.changes_nothing()) impl.is_half = false;
  if (by_head) impl.chunk_rows = std::max<std::int64_t>(1, kChunkRows / heads) * heads;
  for (const TrainTarget& target : impl.targets) {
    if ((target.head >= 0) != by_head || target.head >= heads)
      detail::throw_invalid("activation sampler: head ", target.head, ", the data has ", heads);
    std::vector<int> layers = {target.layer};
    layers.insert(layers.end(), target.more_layers.begin(), target.more_layers.end());
    std::vector<std::size_t>& from = impl.sources_of.emplace_back();
    for (int layer : layers) {
      if (layer < 0 || layer >= info.num_layers)
        detail::throw_invalid(
            "activation sampler: layer ", layer, ", the data has ", info.num_layers);
      const auto found =
          std::find_if(impl.sources.begin(), impl.sources.end(), [&](const Source& source) {
            return source.layer == layer && source.kind == target.kind;
          });
      from.push_back(static_cast<std::size_t>(found - impl.sources.begin()));
      if (found == impl.sources.end()) impl.sources.push_back({layer, target.kind, {}, {}});
    }
  }
  impl.num_chunks = (impl.num_rows + impl.chunk_rows - 1) / impl.chunk_rows;
  const std::int64_t chunk_bytes = static_cast<std::int64_t>(impl.sources.size()) *
                                   impl.chunk_rows * impl.dim * (impl.is_half ? 2 : 4);
  impl.chunks_per_pool = std::clamp<std::int64_t>(
      static_cast<std::int64_t>(pool_bytes) / chunk_bytes, 1, impl.num_chunks);
}

ActivationSampler::~ActivationSampler() = default;

int ActivationSampler::num_dictionaries() const { return static_cast<int>(impl_->targets.size()); }
int ActivationSampler::dim() const { return impl_->dim; }

std::string ActivationSampler::identity() const {
  const ActivationInfo& info = impl_->reader.info();
  return "plan " + info.plan_hash + ", model " + info.model_sha256 + ", " +
         name_of(info.key_stage) + ", " + std::to_string(impl_->num_rows) + " of " +
         std::to_string(impl_->reader.num_rows()) + " rows, pools of " +
         std::to_string(impl_->chunks_per_pool) + " chunks";
}

std::size_t ActivationSampler::pool_bytes() const {
  return impl_->sources.size() *
         static_cast<std::size_t>(impl_->chunks_per_pool * impl_->chunk_rows * impl_->dim) *
         (impl_->is_half ? 2 : 4);
}

std::int64_t ActivationSampler::pool_rows() const {
  return impl_->chunks_per_pool * impl_->chunk_rows;
}

void ActivationSampler::next(std::int64_t count, float* out) {
  for (std::int64_t done = 0; done < count;) {
    if (impl_->cursor == impl_->unit_order.size()) impl_->next_pool();
    const std::int64_t units =
        std::min(count - done, static_cast<std::int64_t>(impl_->unit_order.size() - impl_->cursor));
    for (std::size_t t = 0; t < impl_->targets.size(); ++t)
      for (std::int64_t i = 0; i < units; ++i)
        impl_->copy_row(t,
                        impl_->cursor + static_cast<std::size_t>(i),
                        out + (static_cast<std::int64_t>(t) * count + done + i) * impl_->dim);
    impl_->cursor += static_cast<std::size_t>(units);
    done += units;
  }
}

void ActivationSampler::seek(std::int64_t vectors) {
  const std::int64_t units = impl_->num_rows / impl_->unit_rows;
  impl_->begin_epoch(vectors / units);
  std::int64_t rest = vectors % units, number = 0;
  const auto units_of = [&](std::int64_t pool) {
    return impl_->rows_of(impl_->chunks_of(pool)) / impl_->unit_rows;
  };
  for (; rest >= units_of(number); ++number) rest -= units_of(number);
  impl_->load_pool(number);
  impl_->cursor = static_cast<std::size_t>(rest);
}

}  // namespace lexico
