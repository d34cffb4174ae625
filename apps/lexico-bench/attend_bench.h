#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lexico/kind.h"

namespace lexico::apps {

/// Sizes of the attention that is measured: random codes and dictionaries, whose time is that of
/// trained ones.
struct AttendBench {
  int batch = 1, kv_heads = 8, group = 4, dim = 128, num_atoms = 4096;
  int window = 128;  ///< exact tokens, of each sequence
  std::string format = "packed";
  KeyStage key_stage = KeyStage::kPostRope;
  int threads = 0;
  std::uint64_t seed = 0;
};

/// One setting, ready to be timed. As in a model, each call is of another layer with a dictionary
/// and codes of its own, so that caches hold no more of them than they would there.
class AttendCase {
 public:
  AttendCase(const AttendBench& bench, std::int64_t context, int sparsity);
  ~AttendCase();
  AttendCase(AttendCase&&) noexcept;

  /// Milliseconds of one call, the mean over at least `least_ms` of them.
  /// @param processor  processor time of all threads in place of wall time
  double time(double least_ms, bool processor);

  std::int64_t context() const;
  int sparsity() const;
  int layers() const;
  std::size_t coded_bytes() const;      ///< of one layer's keys and values
  std::size_t workspace_bytes() const;  ///< of one call

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Milliseconds that compressing one token takes in one layer: keys and values of all KV heads of
/// all sequences, `chunk` tokens at a time.
double time_compression(const AttendBench& bench, int sparsity, int chunk);

}  // namespace lexico::apps
