#include "lexico/language_model.h"

#include <ATen/Parallel.h>
#include <malloc.h>
#include <torch/cuda.h>
#include <torch/version.h>
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "check.h"
#include "model/language_model_impl.h"

namespace lexico {
namespace {

/// The one line of a libtorch message that says what went wrong: of a TorchScript traceback the
/// last, else the first.
std::string reason_of(const std::exception& error) {
  const auto* own = dynamic_cast<const c10::Error*>(&error);
  std::istringstream text(own != nullptr ? own->what_without_backtrace() : error.what());
  std::string first, last;
  for (std::string line; std::getline(text, line);) {
    if (line.find_first_not_of(" \t\r^~") == std::string::npos) continue;
    if (first.empty()) first = line;
    last = line;
  }
  const bool is_traceback = first.find("TorchScript interpreter") != std::string::npos;
  return is_traceback ? last : first;
}

torch::Device device_from(const std::string& name) {
  if (name == "auto")
    return torch::cuda::is_available() ? torch::Device(torch::kCUDA) : torch::Device(torch::kCPU);
  if (name == "cpu") return torch::Device(torch::kCPU);
  if (name != "cuda" && name.rfind("cuda:", 0) != 0)
    detail::throw_invalid("device is '", name, "', must be auto, cpu, cuda or cuda:N");
  const auto found = static_cast<int>(torch::cuda::device_count());
  int index = 0;
  if (name.size() > 5) {
    const std::string digits = name.substr(5);
    if (digits.size() > 3 || digits.find_first_not_of("0123456789") != std::string::npos)
      detail::throw_invalid("device is '", name, "', must be auto, cpu, cuda or cuda:N");
    index = std::stoi(digits);
  } else if (name == "cuda:") {
    detail::throw_invalid("device is '", name, "', must be auto, cpu, cuda or cuda:N");
  }
  if (index >= found)
    detail::throw_invalid("device is '", name, "', but ", found, " CUDA devices can be used here");
  return {torch::kCUDA, static_cast<c10::DeviceIndex>(index)};
}

/// Keeps freed memory for the next tensor: by default large ones come from the kernel and go back
/// to it each time, and clearing their pages takes a third of a small model's forward.
void keep_freed_memory() {
  ::mallopt(M_MMAP_THRESHOLD, 1 << 30);
  ::mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
}

void check_readable(const std::string& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored))
    throw IoError(path + ": is a folder, want a model file (.pt)");
  const std::ifstream in(path, std::ios::binary);
  if (!in) throw IoError(path + ": " + std::strerror(errno));
}

}  // namespace

namespace detail {

void throw_for_model(const std::string& path,
                     const std::string& doing,
                     const std::exception& error) {
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr)
    throw ResourceError(path + ": " + doing + ": not enough memory");
  const std::string message = path + ": " + doing + ": " + reason_of(error);
  if (dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr ||
      message.find("not enough memory") != std::string::npos ||
      message.find("CUDA out of memory") != std::string::npos)
    throw ResourceError(message);
  throw IoError(message);
}

torch::Tensor LanguageModelImpl::checked(const torch::jit::IValue& value,
                                         const char* what,
                                         at::IntArrayRef shape,
                                         const char* shape_names) const {
  if (!value.isTensor())
    throw IoError(path + ": the model's " + what + " are no tensor but " + value.tagKind());
  const torch::Tensor& tensor = value.toTensor();
  if (tensor.sizes() != shape) {
    std::ostringstream text;
    text << path << ": the model's " << what << " have shape " << tensor.sizes()
         << ", its lexico.json promises " << shape << " [" << shape_names << "]";
    throw IoError(text.str());
  }
  if (!tensor.is_floating_point())
    throw IoError(path + ": the model's " + what + " are of type " +
                  std::string(c10::toString(tensor.scalar_type())) + ", must be floating point");
  return tensor;
}

void LanguageModelImpl::take(const torch::jit::IValue& value,
                             const char* what,
                             std::int64_t heads,
                             std::int64_t batch,
                             std::int64_t length,
                             std::vector<float>& out) const {
  const std::vector<std::int64_t> shape = {info.layers, batch, heads, length, info.head_dim};
  const torch::Tensor tensor =
      checked(value, what, shape, "layers, batch, heads, length, head_dim");
  out.resize(static_cast<std::size_t>(tensor.numel()));
  torch::from_blob(out.data(), shape, torch::kFloat32).copy_(tensor);
}

void LanguageModelImpl::check_ids(const std::int32_t* ids,
                                  std::int64_t batch,
                                  std::int64_t length,
                                  std::int64_t first_sequence) const {
  if (batch < 1 || length < 1)
    throw_invalid("batch is ", batch, " and length ", length, ", both must be at least 1");
  if (length > info.max_positions)
    throw_invalid("length is ", length, ", the model's max_positions is ", info.max_positions);
  for (std::int64_t i = 0; i < batch * length; ++i)
    if (ids[i] < 0 || ids[i] >= info.vocab)
      throw_invalid("token id ",
                    ids[i],
                    " of sequence ",
                    first_sequence + i / length,
                    ", position ",
                    i % length,
                    ": must be in [0, ",
                    info.vocab,
                    ")");
}

void LanguageModelImpl::require_step() const {
  if (!info.has_step)
    throw IoError(path +
                  ": the model has no method 'step', which tells what a compressed cache does to "
                  "it: export it again with tools/export_model.py, or add 'step' and name it under "
                  "'methods' in lexico.json");
}

torch::Tensor LanguageModelImpl::input(const std::int32_t* ids,
                                       std::int64_t batch,
                                       std::int64_t length) const {
  return torch::from_blob(const_cast<std::int32_t*>(ids), {batch, length}, torch::kInt32)
      .to(device, torch::kInt64);
}

StepTensors LanguageModelImpl::step(const torch::Tensor& ids,
                                    const torch::Tensor& past_keys,
                                    const torch::Tensor& past_values) const {
  return with_name(path, "the model failed", [&] {
    const c10::InferenceMode inference;
    const torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);  // as in forward
    const torch::jit::IValue result = module.get_method("step")({ids, past_keys, past_values});
    if (!result.isTuple() || result.toTupleRef().elements().size() != 3)
      throw IoError(path + ": 'step' must return (logits, keys, values), but returned a " +
                    result.tagKind());
    const auto& parts = result.toTupleRef().elements();
    const std::int64_t batch = ids.size(0), length = ids.size(1);
    const std::vector<std::int64_t> vectors = {
        info.layers, batch, info.kv_heads, length, info.head_dim};
    const char* names = "layers, batch, heads, length, head_dim";
    return StepTensors{
        checked(parts[0], "logits", {batch, length, info.vocab}, "batch, length, vocab"),
        checked(parts[1], "keys", vectors, names),
        checked(parts[2], "values", vectors, names)};
  });
}

}  // namespace detail

using detail::with_name;

LanguageModel::LanguageModel(const std::string& path, const std::string& device, int threads)
    : impl_(std::make_unique<detail::LanguageModelImpl>()) {
  impl_->path = path;
  check_readable(path);
  if (threads < 0) detail::throw_invalid("threads is ", threads, ", must be at least 0");
  if (threads > 0) at::set_num_threads(threads);
  impl_->device = device_from(device);
  if (impl_->device.is_cpu()) keep_freed_memory();
  torch::jit::ExtraFilesMap extra{{"lexico.json", ""}};
  with_name(path, "cannot be read as a TorchScript model", [&] {
    impl_->module = torch::jit::load(path, impl_->device, extra);
    impl_->module.eval();
  });
  if (extra["lexico.json"].empty())
    throw IoError(path + ": holds no lexico.json: not a model that tools/export_model.py wrote");
  impl_->info = parse_model_info(extra["lexico.json"], path);
  for (const auto& [method, promised] : {std::pair{"forward", true},
                                         std::pair{"queries", impl_->info.has_queries},
                                         std::pair{"step", impl_->info.has_step}})
    if (promised && !impl_->module.find_method(method))
      throw IoError(path + ": lexico.json names the method '" + method +
                    "', but the model has none");
}
LanguageModel::~LanguageModel() = default;
LanguageModel::LanguageModel(LanguageModel&&) noexcept = default;

const ModelInfo& LanguageModel::info() const { return impl_->info; }

void LanguageModel::forward(const std::int32_t* ids,
                            std::int64_t batch,
                            std::int64_t length,
                            bool with_queries,
                            CacheBatch& out) {
  const detail::LanguageModelImpl& self = *impl_;
  const ModelInfo& info = self.info;
  self.check_ids(ids, batch, length);
  if (with_queries && !info.has_queries)
    detail::throw_invalid(self.path, ": the model has no method 'queries'");
  with_name(self.path, "the model failed", [&] {
    const c10::InferenceMode inference;
    const torch::jit::GraphOptimizerEnabledGuard no_optimizer(
        false);  // it makes the first calls of each shape slow
    const torch::Tensor input = self.input(ids, batch, length);
    const torch::jit::IValue result = self.module.get_method(with_queries ? "queries" : "forward")(
        {input, torch::ones_like(input)});
    const std::size_t wanted = with_queries ? 3 : 2;
    if (!result.isTuple() || result.toTupleRef().elements().size() != wanted)
      throw IoError(self.path + ": " +
                    (with_queries ? "'queries' must return (keys, values, queries)"
                                  : "'forward' must return (keys, values)") +
                    ", but returned a " + result.tagKind());
    const auto& parts = result.toTupleRef().elements();
    self.take(parts[0], "keys", info.kv_heads, batch, length, out.keys);
    self.take(parts[1], "values", info.kv_heads, batch, length, out.values);
    out.queries.clear();
    if (with_queries) self.take(parts[2], "queries", info.heads, batch, length, out.queries);
  });
  out.batch = batch;
  out.length = length;
}

void LanguageModel::step(const std::int32_t* ids,
                         std::int64_t batch,
                         std::int64_t length,
                         const CacheBatch& past,
                         StepResult& out) {
  const detail::LanguageModelImpl& self = *impl_;
  const ModelInfo& info = self.info;
  self.require_step();
  self.check_ids(ids, batch, length);
  if (past.length < 0 || past.length > info.max_positions - length)
    detail::throw_invalid("a past of ",
                          past.length,
                          " and ",
                          length,
                          " new tokens: the model's max_positions is ",
                          info.max_positions);
  const std::vector<std::int64_t> shape = {
      info.layers, batch, info.kv_heads, past.length, info.head_dim};
  const auto count = static_cast<std::size_t>(c10::multiply_integers(shape));
  for (const auto& [name, part] :
       {std::pair{"keys", &past.keys}, std::pair{"values", &past.values}})
    if (past.length > 0 && (past.batch != batch || part->size() != count))
      detail::throw_invalid("the past's ",
                            name,
                            " are ",
                            part->size(),
                            " numbers of ",
                            past.batch,
                            " sequences, must be ",
                            count,
                            " of ",
                            batch,
                            " [layers, batch, kv_heads, past.length, head_dim]");
  with_name(self.path, "the model failed", [&] {
    const c10::InferenceMode inference;
    const auto tensor = [&](const std::vector<float>& part) {
      return (past.length == 0
                  ? torch::empty(shape)
                  : torch::from_blob(const_cast<float*>(part.data()), shape, torch::kFloat32))
          .to(self.device);
    };
    const detail::StepTensors result =
        self.step(self.input(ids, batch, length), tensor(past.keys), tensor(past.values));
    out.logits.resize(static_cast<std::size_t>(result.logits.numel()));
    torch::from_blob(out.logits.data(), result.logits.sizes(), torch::kFloat32)
        .copy_(result.logits);
    self.take(result.keys, "keys", info.kv_heads, batch, length, out.cache.keys);
    self.take(result.values, "values", info.kv_heads, batch, length, out.cache.values);
  });
  out.cache.queries.clear();
  out.cache.batch = batch;
  out.cache.length = length;
}

void add_query_products(const ModelInfo& info, const CacheBatch& cache, std::vector<double>& sums) {
  const c10::InferenceMode inference;
  const std::int64_t group = info.heads / info.kv_heads;
  const torch::Tensor queries = torch::from_blob(
      const_cast<float*>(cache.queries.data()),
      {info.layers, cache.batch, info.kv_heads, group, cache.length, info.head_dim},
      torch::kFloat32);
  sums.resize(static_cast<std::size_t>(info.layers) * static_cast<std::size_t>(info.kv_heads) *
              static_cast<std::size_t>(info.head_dim) * static_cast<std::size_t>(info.head_dim));
  const torch::Tensor rows =
      queries.permute({0, 2, 1, 3, 4, 5}).reshape({info.layers, info.kv_heads, -1, info.head_dim});
  torch::from_blob(
      sums.data(), {info.layers, info.kv_heads, info.head_dim, info.head_dim}, torch::kFloat64)
      .add_(torch::matmul(rows.transpose(2, 3), rows));
}

std::string torch_version() { return TORCH_VERSION; }

}  // namespace lexico
