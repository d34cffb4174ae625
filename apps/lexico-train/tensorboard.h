#pragma once

#include <cstdint>
#include <string>

namespace lexico::apps {

/// Appends scalars to a TensorBoard event file (TFRecord framing around the Event message of
/// tensorflow's event.proto).
class TensorBoard {
 public:
  /// Opens a new events.out.tfevents.* file in `folder`. @throws ResourceError if it cannot.
  explicit TensorBoard(const std::string& folder);
  ~TensorBoard();
  TensorBoard(const TensorBoard&) = delete;
  TensorBoard& operator=(const TensorBoard&) = delete;
  void scalar(const std::string& tag, double value, std::int64_t step);

 private:
  void append(const std::string& event);
  std::string path_;
  int fd_ = -1;
};

}  // namespace lexico::apps
