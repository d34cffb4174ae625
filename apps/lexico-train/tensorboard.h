#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace lexico::apps {

/// Appends scalars to a TensorBoard event file (TFRecord framing around the Event message of
/// tensorflow's event.proto).
class TensorBoard {
 public:
  /// Begins a new events.out.tfevents.* file in `folder`. @throws ResourceError if it cannot.
  explicit TensorBoard(const std::string& folder);
  /// One point in each curve. @throws ResourceError.
  void scalars(const std::vector<std::pair<std::string, double>>& values, std::int64_t step);

 private:
  std::string path_;
};

}  // namespace lexico::apps
