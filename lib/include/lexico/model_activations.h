#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lexico/activations.h"

namespace lexico {

class LanguageModel;

/// Keys and values that a model gives when they are asked for: the rows that a dump of the same
/// batches holds, bit for bit, with nothing on the disk. It keeps what the model gave last, and
/// rows that are to be held. Calls of several threads take turns.
class ModelActivations : public ActivationSource {
 public:
  /// Writes the ids of a batch's sequences, one after the other, to `out`.
  using ReadIds = std::function<void(std::size_t batch, std::int32_t* out)>;
  struct Batch {
    std::int64_t first_token = 0;  ///< in the data: those of all batches before
    std::int64_t size = 0, length = 0;
  };

  /// @param model    must outlive the source.
  /// @param info     as a dump of it would say; key_stage and half are how rows are stored there.
  /// @param files    the model's and the texts'.
  /// @param batches  as the extraction runs them (BatchRule), in order.
  ModelActivations(LanguageModel& model,
                   const ActivationInfo& info,
                   const std::vector<std::string>& files,
                   std::vector<Batch> batches,
                   ReadIds read_ids);
  ~ModelActivations() override;

  /// Empty: it would take a pass over the whole text.
  std::vector<float> query_second_moment(int layer) override;
  std::vector<std::int64_t> batch_starts() override;
  void hold(const std::vector<Rows>& rows, const std::vector<Dataset>& datasets) override;
  std::int64_t tokens_run() const;  ///< that the model has read so far

 private:
  /// @throws IoError if the model fails, or gives what cannot be stored.
  void read_stored(
      int layer, Kind kind, std::int64_t first, std::int64_t count, float* out) override;
  void read_stored_half(
      int layer, Kind kind, std::int64_t first, std::int64_t count, std::uint16_t* out) override;
  void read_positions(std::int64_t first_token, std::int64_t count, std::int32_t* out) override;

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lexico
