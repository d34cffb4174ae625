#pragma once

// What stands behind lexico/language_model.h, for the files of this library that see torch.

#include <torch/script.h>
#include <exception>
#include <string>

#include "lexico/error.h"
#include "lexico/language_model.h"

namespace lexico::detail {

/// Turns what libtorch threw into an error that names the file and what was being done.
[[noreturn]] void throw_for_model(const std::string& path,
                                  const std::string& doing,
                                  const std::exception& error);

/// Runs `body`; whatever it throws becomes an error that names the file.
template <typename Body>
auto with_name(const std::string& path, const std::string& doing, const Body& body) {
  try {
    return body();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw_for_model(path, doing, error);
  }
}

/// What `step` gives, as the model made it.
struct StepTensors {
  torch::Tensor logits;        ///< [B, T, vocab]
  torch::Tensor keys, values;  ///< [L, B, H_kv, T, d]
};

struct LanguageModelImpl {
  std::string path;
  ModelInfo info;
  torch::Device device{torch::kCPU};
  torch::jit::Module module;

  /// @param first_sequence  number of the first one, for the message.
  void check_ids(const std::int32_t* ids,
                 std::int64_t batch,
                 std::int64_t length,
                 std::int64_t first_sequence = 0) const;
  /// @throws IoError if there is none, saying how to get it.
  void require_step() const;
  /// int64 on the device.
  torch::Tensor input(const std::int32_t* ids, std::int64_t batch, std::int64_t length) const;
  /// All tensors on the device; ids int64 [B, T], past [L, B, H_kv, P, d] of any strides.
  StepTensors step(const torch::Tensor& ids,
                   const torch::Tensor& past_keys,
                   const torch::Tensor& past_values) const;
  /// @throws IoError unless `value` is a floating-point tensor of this shape.
  torch::Tensor checked(const torch::jit::IValue& value,
                        const char* what,
                        at::IntArrayRef shape,
                        const char* shape_names) const;
  /// Copies one of the model's results, [L, B, heads, T, d], to `out` as float32.
  void take(const torch::jit::IValue& value,
            const char* what,
            std::int64_t heads,
            std::int64_t batch,
            std::int64_t length,
            std::vector<float>& out) const;
};

}  // namespace lexico::detail
