// Two-level shuffle over an activation dump: chunks, then the rows of a pool of chunks.
#include "lexico/activation_sampler.h"

#include <algorithm>
#include <numeric>

#include "check.h"
#include "core/half.h"
#include "core/random.h"
#include "lexico/activations.h"

namespace lexico {
namespace {

constexpr std::int64_t kChunkRows = 2048;                // as the file is chunked
constexpr std::uint64_t kChunkOrder = 1, kRowOrder = 2;  // what a random stream is for

}  // namespace

struct ActivationSampler::Impl {
  ActivationReader& reader;
  std::vector<TrainTarget> targets;
  std::int64_t num_rows;
  std::uint64_t seed;
  std::int64_t num_chunks, chunks_per_pool;
  int dim;
  bool is_half;

  std::int64_t epoch = -1, pool = 0;
  std::vector<std::int64_t> chunk_order;         // of this epoch
  std::vector<std::uint32_t> row_order;          // of this pool
  std::size_t cursor = 0;                        // rows of the pool already given
  std::vector<std::vector<std::uint16_t>> half;  // per target, the pool's rows
  std::vector<std::vector<float>> full;

  std::int64_t rows_in_chunk(std::int64_t chunk) const {
    return std::min(kChunkRows, num_rows - chunk * kChunkRows);
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

  void load_pool(std::int64_t number) {
    pool = number;
    const std::vector<std::int64_t> chunks = chunks_of(pool);
    const std::int64_t rows = rows_of(chunks);
    for (std::size_t t = 0; t < targets.size(); ++t) {
      if (is_half)
        half[t].resize(static_cast<std::size_t>(rows * dim));
      else
        full[t].resize(static_cast<std::size_t>(rows * dim));
      std::int64_t row = 0;
      for (std::int64_t chunk : chunks) {
        const std::int64_t count = rows_in_chunk(chunk);
        if (is_half)
          reader.read_half(targets[t].layer,
                           targets[t].kind,
                           chunk * kChunkRows,
                           count,
                           half[t].data() + row * dim);
        else
          reader.read(targets[t].layer,
                      targets[t].kind,
                      chunk * kChunkRows,
                      count,
                      full[t].data() + row * dim);
        row += count;
      }
    }
    row_order.resize(static_cast<std::size_t>(rows));
    std::iota(row_order.begin(), row_order.end(), 0u);
    detail::Random(
        {seed, kRowOrder, static_cast<std::uint64_t>(epoch), static_cast<std::uint64_t>(pool)})
        .shuffle(row_order);
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

  void copy_row(std::size_t target, std::uint32_t row, float* out) const {
    const std::size_t at = static_cast<std::size_t>(row) * static_cast<std::size_t>(dim);
    if (!is_half) {
      std::copy_n(full[target].data() + at, dim, out);
      return;
    }
    const std::uint16_t* from = half[target].data() + at;
    for (int d = 0; d < dim; ++d) out[d] = detail::float_from_half(from[d]);
  }
};

ActivationSampler::ActivationSampler(ActivationReader& reader,
                                     std::vector<TrainTarget> targets,
                                     std::int64_t num_rows,
                                     std::uint64_t seed,
                                     std::size_t pool_bytes) {
  const ActivationInfo& info = reader.info();
  if (targets.empty()) detail::throw_invalid("activation sampler: no dictionary to sample for");
  for (const TrainTarget& target : targets)
    if (target.layer < 0 || target.layer >= info.num_layers)
      detail::throw_invalid(
          "activation sampler: layer ", target.layer, ", the data has ", info.num_layers);
  if (num_rows < 1 || num_rows > reader.num_rows())
    detail::throw_invalid(
        "activation sampler: num_rows is ", num_rows, ", must be in [1, ", reader.num_rows(), "]");
  const std::int64_t chunk_bytes = static_cast<std::int64_t>(targets.size()) * kChunkRows *
                                   info.head_dim * (reader.is_half() ? 2 : 4);
  const std::int64_t num_chunks = (num_rows + kChunkRows - 1) / kChunkRows;
  const std::int64_t affordable = static_cast<std::int64_t>(pool_bytes) / chunk_bytes;
  impl_ = std::make_unique<Impl>(Impl{reader,
                                      std::move(targets),
                                      num_rows,
                                      seed,
                                      num_chunks,
                                      std::clamp<std::int64_t>(affordable, 1, num_chunks),
                                      info.head_dim,
                                      reader.is_half(),
                                      -1,
                                      0,
                                      {},
                                      {},
                                      0,
                                      {},
                                      {}});
  impl_->half.resize(impl_->targets.size());
  impl_->full.resize(impl_->targets.size());
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
  return impl_->targets.size() *
         static_cast<std::size_t>(impl_->chunks_per_pool * kChunkRows * impl_->dim) *
         (impl_->is_half ? 2 : 4);
}

void ActivationSampler::next(std::int64_t count, float* out) {
  for (std::int64_t done = 0; done < count;) {
    if (impl_->cursor == impl_->row_order.size()) impl_->next_pool();
    const std::int64_t rows =
        std::min(count - done, static_cast<std::int64_t>(impl_->row_order.size() - impl_->cursor));
    const std::uint32_t* order = impl_->row_order.data() + impl_->cursor;
    for (std::size_t t = 0; t < impl_->targets.size(); ++t)
      for (std::int64_t i = 0; i < rows; ++i)
        impl_->copy_row(
            t, order[i], out + (static_cast<std::int64_t>(t) * count + done + i) * impl_->dim);
    impl_->cursor += static_cast<std::size_t>(rows);
    done += rows;
  }
}

void ActivationSampler::seek(std::int64_t vectors) {
  impl_->begin_epoch(vectors / impl_->num_rows);
  std::int64_t rest = vectors % impl_->num_rows, number = 0;
  for (; rest >= impl_->rows_of(impl_->chunks_of(number)); ++number)
    rest -= impl_->rows_of(impl_->chunks_of(number));
  impl_->load_pool(number);
  impl_->cursor = static_cast<std::size_t>(rest);
}

}  // namespace lexico
