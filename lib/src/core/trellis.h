#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace lexico::detail {

/// Trellis-coded quantization (Marcellin and Fischer 1990) with the one-dimensional codes of
/// Ungerboeck (1982). Numbers come one after another; number t has bits[t] >= 1 bits, of which the
/// lowest, u_t, drives a shift register of log2(states) bits that starts at 0. The parity of u_t
/// and the register choose one of four interleaved quarters of the 2^(bits + 1) ascending levels,
/// the higher bits the level within it: level = 4 * (code >> 1) + quarter.
class Trellis {
 public:
  /// @param states  4, 8, 16, 32, 64, 128 or 256.
  explicit Trellis(int states);
  static bool has(int states);

  std::uint32_t high_mask() const { return high_mask_; }
  std::uint32_t low_mask() const { return low_mask_; }
  /// Quarter after u_t was shifted into `history`: bit 0 is u_t, bit k is u_(t - k).
  int quarter(std::uint32_t history) const {
    return 2 * (__builtin_popcount(history & high_mask_) & 1) +
           (__builtin_popcount(history & low_mask_) & 1);
  }

  struct Number {
    float value;
    int bits;
    const float* levels;  ///< 2^(bits + 1), ascending
  };
  /// Scratch of one caller.
  struct Scratch {
    std::vector<std::uint8_t> from;                  // [numbers, states]
    std::vector<std::array<std::int16_t, 4>> level;  // [numbers]: nearest of each quarter
  };
  /// The codes with the least sum of squared errors (Viterbi's algorithm).
  void encode(const std::vector<Number>& numbers, std::uint32_t* codes, Scratch& scratch) const;

  /// Level index of one code, in order; `history` starts at 0.
  int level(std::uint32_t code, std::uint32_t& history) const {
    history = (history << 1 | (code & 1u)) & register_mask_;
    return static_cast<int>(4 * (code >> 1)) + quarter(history);
  }

 private:
  int states_;
  std::uint32_t high_mask_ = 0, low_mask_ = 0, register_mask_;
  std::array<std::uint8_t, 256> quarter_of_[2];  // [which predecessor][new state]
};

}  // namespace lexico::detail
