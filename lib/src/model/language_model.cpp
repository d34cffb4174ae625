#include "lexico/language_model.h"

#include <ATen/Parallel.h>
#include <malloc.h>
#include <torch/cuda.h>
#include <torch/script.h>
#include <torch/version.h>
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "check.h"
#include "lexico/error.h"

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

/// Runs `body`; what libtorch throws becomes an error that names the file.
template <typename Body>
auto with_name(const std::string& path, const char* doing, const Body& body) {
  try {
    return body();
  } catch (const Error&) {
    throw;
  } catch (const c10::OutOfMemoryError& error) {
    throw ResourceError(path + ": " + doing + ": " + reason_of(error));
  } catch (const std::bad_alloc&) {
    throw ResourceError(path + ": " + doing + ": not enough memory");
  } catch (const std::exception& error) {
    const std::string reason = reason_of(error);
    if (reason.find("not enough memory") != std::string::npos ||
        reason.find("CUDA out of memory") != std::string::npos)
      throw ResourceError(path + ": " + doing + ": " + reason);
    throw IoError(path + ": " + doing + ": " + reason);
  }
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

struct LanguageModel::Impl {
  std::string path;
  ModelInfo info;
  torch::Device device{torch::kCPU};
  torch::jit::Module module;

  /// Copies one of the model's results to `out` as float32.
  void take(const torch::jit::IValue& value,
            const char* what,
            std::int64_t heads,
            std::int64_t batch,
            std::int64_t length,
            std::vector<float>& out) const {
    if (!value.isTensor())
      throw IoError(path + ": the model's " + what + " are no tensor but " + value.tagKind());
    const torch::Tensor& tensor = value.toTensor();
    const std::vector<std::int64_t> want = {info.layers, batch, heads, length, info.head_dim};
    if (tensor.sizes() != at::IntArrayRef(want)) {
      std::ostringstream text;
      text << path << ": the model's " << what << " have shape " << tensor.sizes()
           << ", its lexico.json promises " << at::IntArrayRef(want)
           << " [layers, batch, heads, length, head_dim]";
      throw IoError(text.str());
    }
    if (!tensor.is_floating_point())
      throw IoError(path + ": the model's " + what + " are of type " +
                    std::string(c10::toString(tensor.scalar_type())) + ", must be floating point");
    out.resize(static_cast<std::size_t>(tensor.numel()));
    torch::from_blob(out.data(), want, torch::kFloat32).copy_(tensor);
  }

  void check_ids(const std::int32_t* ids, std::int64_t batch, std::int64_t length) const {
    if (batch < 1 || length < 1)
      detail::throw_invalid(
          "batch is ", batch, " and length ", length, ", both must be at least 1");
    if (length > info.max_positions)
      detail::throw_invalid(
          "length is ", length, ", the model's max_positions is ", info.max_positions);
    for (std::int64_t i = 0; i < batch * length; ++i)
      if (ids[i] < 0 || ids[i] >= info.vocab)
        detail::throw_invalid("token id ",
                              ids[i],
                              " of sequence ",
                              i / length,
                              ", position ",
                              i % length,
                              ": must be in [0, ",
                              info.vocab,
                              ")");
  }
};

LanguageModel::LanguageModel(const std::string& path, const std::string& device, int threads)
    : impl_(std::make_unique<Impl>()) {
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
  for (const char* method : {"forward", "queries"})
    if ((std::strcmp(method, "forward") == 0 || impl_->info.has_queries) &&
        !impl_->module.find_method(method))
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
  const Impl& self = *impl_;
  const ModelInfo& info = self.info;
  self.check_ids(ids, batch, length);
  if (with_queries && !info.has_queries)
    detail::throw_invalid(self.path, ": the model has no method 'queries'");
  with_name(self.path, "the model failed", [&] {
    const c10::InferenceMode inference;
    const torch::jit::GraphOptimizerEnabledGuard no_optimizer(
        false);  // it makes the first calls of each shape slow
    const torch::Tensor input =
        torch::from_blob(const_cast<std::int32_t*>(ids), {batch, length}, torch::kInt32)
            .to(self.device, torch::kInt64);
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
