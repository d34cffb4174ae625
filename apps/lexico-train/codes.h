#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lexico/activations.h"
#include "lexico/dictionary.h"
#include "lexico/train_config.h"
#include "lexico/trainer.h"

namespace lexico::apps {

/// How what was learned is to be stored: the part of lexico-train's options that becomes the
/// formats in the file.
struct CodeConfig {
  std::string coding = "auto";
  int bits = 0;
  double bytes_per_token = 0;
  int residual_states = 8;
  std::int64_t code_vectors = 16384;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("coding",
          self.coding,
          "how codes become bytes: packed (atoms and a residual code, as many of each as err "
          "least), fp8-int16 (as "
          "published), exact (no format), or auto: fp8-int16 for recipe lexico, else packed");
    visit("bits",
          self.bits,
          "packed: bits of a vector; 0: 208, what the published format takes for 8 atoms, or 3.25 "
          "a number if that is less");
    visit("bytes_per_token",
          self.bytes_per_token,
          "packed: bytes of a token, keys and values of all layers and KV heads together, shared "
          "out where they help "
          "most; 0: bits for every vector");
    visit("residual_states",
          self.residual_states,
          "packed: states of the residual's trellis code, 4 to 256; more is better and slower to "
          "encode; 0: scalar");
    visit("code_vectors",
          self.code_vectors,
          "packed: vectors of each dictionary that codes are fitted on");
  }

  /// @throws InvalidArgument naming the option, its value and its bound.
  void validate() const;
  /// Before anything is trained. @throws InvalidArgument if not even one atom of `num_atoms` fits a
  /// vector.
  void require_room(int num_atoms, double vectors_per_token) const;
  /// "packed", "fp8-int16" or "exact".
  std::string resolved_coding(const std::string& recipe) const;
};

/// Rates that are tried for each dictionary where a budget is shared out.
inline constexpr int kNumRates = 9;

/// Tells `data` which rows fit_formats will read for these targets, dictionary by dictionary.
/// @returns them.
std::vector<ActivationSource::Rows> hold_code_rows(ActivationSource& data,
                                                   std::int64_t num_rows,
                                                   const CodeConfig& config,
                                                   const TrainConfig& train,
                                                   const std::vector<TrainTarget>& targets);

/// Gives every dictionary its format, fitted on rows [0, num_rows) of `data`. `train` is resolved.
/// @throws InvalidArgument naming the least bits or bytes if there are too few; Interrupted.
void fit_formats(DictionarySet& set,
                 ActivationSource& data,
                 std::int64_t num_rows,
                 const CodeConfig& config,
                 const TrainConfig& train);

}  // namespace lexico::apps
