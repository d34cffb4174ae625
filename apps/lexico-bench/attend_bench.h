#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "lexico/dictionary.h"
#include "lexico/encoder.h"
#include "lexico/kind.h"
#include "lexico/rope.h"

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
  Selection selection = {};    ///< of pursuit, where vectors are coded
  std::string device = "cpu";  ///< that attends and compresses
  int value_tile_tokens = 0;   ///< of a GPU, as half_tables
  bool half_tables = false;
};

/// Layers are as many as a large last-level cache does not hold, 32 at most as in a model.
inline constexpr double kBeyondCaches = 96e6;  // bytes

std::vector<float> normals(std::size_t count, std::mt19937_64& random);
Dictionary random_dictionary(const AttendBench& bench,
                             Kind kind,
                             int sparsity,
                             std::mt19937_64& random);
Rope usual_rope(int dim);

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

}  // namespace lexico::apps
