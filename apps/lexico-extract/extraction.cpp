// Two threads: this one runs the model, the other converts and writes what it gave, one batch
// behind.
#include "lexico-extract/extraction.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>

#include "common/program.h"
#include "lexico/activations.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// Sequences of one length that the model runs together, and what it gives for them.
struct Batch {
  std::size_t shard = 0;
  bool first_of_shard = false, last_of_shard = false;
  std::vector<std::int32_t> ids, documents;
  std::int64_t size = 0, length = 0;
  CacheBatch cache;

  std::int64_t num_tokens() const { return size * length; }
};

/// The batches of one shard. They depend on the plan alone, so that a shard made again has equal
/// bytes.
class BatchMaker {
 public:
  BatchMaker(const Corpus& corpus, const Plan& plan, std::size_t shard)
      : corpus_(corpus),
        plan_(plan),
        shard_(shard),
        next_(plan.shards[shard].first_batch),
        end_(next_ + plan.shards[shard].num_batches) {}

  bool done() const { return next_ == end_; }

  void fill(Batch& batch) {
    const Plan::Batch& from = plan_.batches[next_];
    batch.shard = shard_;
    batch.first_of_shard = next_ == plan_.shards[shard_].first_batch;
    batch.size = static_cast<std::int64_t>(from.count);
    batch.length = from.length;
    batch.ids.resize(static_cast<std::size_t>(batch.num_tokens()));
    batch.documents.resize(batch.ids.size());
    for (std::size_t i = 0; i < from.count; ++i) {
      const auto at = i * static_cast<std::size_t>(batch.length);
      corpus_.read(
          plan_.sequences.sequence(corpus_, from.first + i), &batch.ids[at], &batch.documents[at]);
    }
    batch.last_of_shard = ++next_ == end_;
  }

 private:
  const Corpus& corpus_;
  const Plan& plan_;
  std::size_t shard_, next_, end_;
};

/// Takes batches in order and turns them into files, on its own thread.
class WriterThread {
 public:
  WriterThread(const ModelInfo& model, const Plan& plan, const Output& output)
      : model_(model),
        plan_(plan),
        output_(output),
        idle_{&batches_[0], &batches_[1]},
        thread_([this] { run(); }) {}

  /// Without `finish`: the file in work is given up.
  ~WriterThread() {
    {
      const std::lock_guard lock(mutex_);
      give_up_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }
  WriterThread(const WriterThread&) = delete;
  WriterThread& operator=(const WriterThread&) = delete;

  /// A batch to fill, as soon as one is free. @throws what went wrong in writing.
  Batch& next_free() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return error_ || !idle_.empty(); });
    if (error_) std::rethrow_exception(error_);
    Batch& batch = *idle_.front();
    idle_.pop_front();
    return batch;
  }

  void write(Batch& batch) {
    {
      const std::lock_guard lock(mutex_);
      waiting_.push_back(&batch);
    }
    changed_.notify_all();
  }

  /// Waits until the batches so far are written. @throws what went wrong in writing.
  void wait_until_idle() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return error_ || (waiting_.empty() && !busy_); });
    if (error_) std::rethrow_exception(error_);
  }

  /// Waits until all is written. @throws what went wrong.
  void finish() {
    {
      const std::lock_guard lock(mutex_);
      no_more_ = true;
    }
    changed_.notify_all();
    thread_.join();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void run() {
    try {
      while (Batch* batch = take()) {
        put_away(*batch);
        {
          const std::lock_guard lock(mutex_);
          idle_.push_back(batch);
          busy_ = false;
        }
        changed_.notify_all();
      }
    } catch (...) {
      const std::lock_guard lock(mutex_);
      error_ = std::current_exception();
    }
    writer_.reset();
    changed_.notify_all();
  }

  Batch* take() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return give_up_ || no_more_ || !waiting_.empty(); });
    if (give_up_ || waiting_.empty()) return nullptr;
    Batch* batch = waiting_.front();
    waiting_.pop_front();
    busy_ = true;
    return batch;
  }

  void put_away(Batch& batch) {
    if (batch.first_of_shard) {
      writer_.emplace(output_.file_of(batch.shard), plan_.info_of(batch.shard));
      products_.clear();
    }
    if (plan_.info.key_stage == KeyStage::kPreRope) undo_rotation(batch);
    if (plan_.query_moments) add_query_products(model_, batch.cache, products_);
    writer_->append({batch.size,
                     batch.length,
                     batch.cache.keys.data(),
                     batch.cache.values.data(),
                     batch.ids.data(),
                     batch.documents.data()});
    if (!batch.last_of_shard) return;
    writer_->finish(plan_.query_moments ? moments_of(batch.shard).data() : nullptr);
    writer_.reset();
  }

  void undo_rotation(Batch& batch) {
    const auto undo = [&](std::vector<float>& vectors, int heads) {
      const std::int64_t rows = batch.size * heads * batch.length;
      positions_.resize(static_cast<std::size_t>(rows));
      for (std::int64_t i = 0; i < rows; ++i)
        positions_[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i % batch.length);
      for (int layer = 0; layer < model_.layers; ++layer)
        model_.rope.undo(layer,
                         vectors.data() + layer * rows * model_.head_dim,
                         model_.head_dim,
                         positions_.data(),
                         rows);
    };
    undo(batch.cache.keys, model_.kv_heads);
    if (plan_.query_moments) undo(batch.cache.queries, model_.heads);  // in the frame of the keys
  }

  std::vector<float> moments_of(std::size_t shard) const {
    const double count =
        static_cast<double>(plan_.shards[shard].num_tokens) * (model_.heads / model_.kv_heads);
    std::vector<float> moments;
    for (const double product : products_) moments.push_back(static_cast<float>(product / count));
    return moments;
  }

  const ModelInfo& model_;
  const Plan& plan_;
  const Output& output_;
  Batch batches_[2];
  std::optional<ActivationWriter> writer_;
  std::vector<double> products_;
  std::vector<std::int32_t> positions_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Batch*> idle_, waiting_;
  bool no_more_ = false, give_up_ = false, busy_ = false;
  std::exception_ptr error_;
  std::thread thread_;  // last: it uses the others
};

void run_model(LanguageModel& model, const Plan& plan, Batch& batch) {
  model.forward(batch.ids.data(), batch.size, batch.length, plan.query_moments, batch.cache);
}

/// Of the model alone, with nothing beside it: the same batches, right before they are extracted,
/// so that a machine that others use too slows both alike.
class Bare {
 public:
  void time(LanguageModel& model, const Plan& plan, Batch& batch) {
    const auto begin = Clock::now();
    run_model(model, plan, batch);
    seconds_ += seconds_since(begin);
    tokens_ += static_cast<double>(batch.num_tokens());
  }
  double seconds() const { return seconds_; }
  double tokens_per_s() const { return seconds_ > 0 ? tokens_ / seconds_ : 0; }

 private:
  double seconds_ = 0, tokens_ = 0;
};

constexpr int kBareEvery = 3;  // batches, with --benchmark

}  // namespace

ExtractionResult extract(LanguageModel& model,
                         const Corpus& corpus,
                         const Plan& plan,
                         const Output& output,
                         const std::vector<bool>& finished,
                         bool benchmark) {
  ExtractionResult result;
  Bare bare;
  std::int64_t batches = 0;
  Progress progress("extracting", static_cast<double>(plan.num_tokens), "tokens");
  std::int64_t tokens_before = 0;
  for (std::size_t i = 0; i < finished.size(); ++i)
    if (finished[i]) tokens_before += plan.shards[i].num_tokens;
  progress.start_from(static_cast<double>(tokens_before));
  if (benchmark) {
    Batch warm_up;  // the first forward of a process is slow
    BatchMaker(corpus, plan, 0).fill(warm_up);
    run_model(model, plan, warm_up);
  }
  const auto begin = Clock::now();
  {
    WriterThread writer(model.info(), plan, output);
    for (std::size_t shard = 0; shard < plan.shards.size(); ++shard) {
      if (finished[shard]) continue;
      for (BatchMaker maker(corpus, plan, shard); !maker.done();) {
        if (stop_requested()) throw Interrupted("stopped");
        Batch& batch = writer.next_free();
        maker.fill(batch);
        if (benchmark && batches++ % kBareEvery == 0) {
          writer.wait_until_idle();
          bare.time(model, plan, batch);
        }
        const auto before = Clock::now();
        run_model(model, plan, batch);
        result.model_seconds += seconds_since(before);
        result.tokens += batch.num_tokens();
        writer.write(batch);
        progress.update(static_cast<double>(tokens_before + result.tokens));
      }
    }
    writer.finish();
  }
  result.seconds = seconds_since(begin) - bare.seconds();
  result.bare_tokens_per_s = bare.tokens_per_s();
  return result;
}

double probe_seconds_per_token(LanguageModel& model, const Corpus& corpus, const Plan& plan) {
  Batch batch;
  BatchMaker(corpus, plan, 0).fill(batch);
  run_model(model, plan, batch);
  Bare bare;
  bare.time(model, plan, batch);
  return bare.tokens_per_s() > 0 ? 1 / bare.tokens_per_s() : 0;
}

}  // namespace lexico::apps
