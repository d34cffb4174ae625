#pragma once

#include <cstdint>
#include <memory>

#include "lexico-bench/attend_bench.h"

namespace lexico::apps {

/// A compressed cache whose filling is timed: random vectors and dictionaries, tolerance 0, so that
/// every vector gets all its atoms. As in a model, each call is of another layer with dictionaries
/// of its own, as many as a large last-level cache does not hold.
class CacheCase {
 public:
  /// @param compress_chunk  the paper's n_a
  CacheCase(const AttendBench& bench, int sparsity, int compress_chunk);
  ~CacheCase();
  CacheCase(CacheCase&&) noexcept;

  /// Milliseconds that one layer takes to append a prompt of `tokens` tokens to every sequence, of
  /// which all but the window are compressed.
  double prompt_ms(std::int64_t tokens, double least_ms, bool processor);
  /// Milliseconds per step that one layer takes to append a token to every sequence, once the
  /// window is full: a copy, and every compress_chunk steps the compression of as many tokens.
  double step_ms(double least_ms, bool processor);

  /// Tokens of a prompt that are compressed.
  std::int64_t coded_tokens(std::int64_t prompt) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lexico::apps
