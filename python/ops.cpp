// torch.ops.lexico.* and torch.classes.lexico.CompressedCache: the core library for PyTorch
// (docs/pytorch.md). The only file that sees both; shapes, types and devices are checked here.
// Tensors are of the CPU or of a CUDA device, where work goes on torch's current stream.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "core/pursuit_options.h"
#include "kernels/pursuit/pursuit.h"
#include "lexico/attention.h"
#include "lexico/compressed_cache.h"
#include "lexico/dictionary.h"
#include "lexico/encoder.h"
#include "lexico/error.h"

namespace {

using at::Tensor;

// What the library throws as what Python expects: ValueError, torch.OutOfMemoryError, RuntimeError.
template <typename Call>
auto translated(Call&& call) {
  try {
    return call();
  } catch (const lexico::InvalidArgument& error) {
    C10_THROW_ERROR(ValueError, error.what());
  } catch (const lexico::ResourceError& error) {
    C10_THROW_ERROR(OutOfMemoryError, error.what());
  } catch (const lexico::Error& error) {
    C10_THROW_ERROR(Error, error.what());
  } catch (const std::bad_alloc&) {
    C10_THROW_ERROR(OutOfMemoryError, "lexico: not enough memory");
  }
}

int as_int(std::int64_t value, const char* name) {
  TORCH_CHECK_VALUE(value >= INT32_MIN && value <= INT32_MAX,
                    "lexico: ",
                    name,
                    " is ",
                    value,
                    ", beyond 32 bits");
  return static_cast<int>(value);
}

void check_device(const Tensor& tensor, const char* name, const at::Device& device) {
  TORCH_CHECK_VALUE(tensor.is_cpu() || tensor.is_cuda(),
                    "lexico: ",
                    name,
                    " is on ",
                    tensor.device(),
                    ", must be on the CPU or a CUDA device: move it with .cpu()");
  TORCH_CHECK_VALUE(tensor.device() == device,
                    "lexico: ",
                    name,
                    " is on ",
                    tensor.device(),
                    ", must be on ",
                    device);
}

void* stream_of(const at::Device& device) {
  return device.is_cpu()
             ? nullptr
             : c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// fp32 and contiguous; rank -1: any above 0.
Tensor floats(const Tensor& tensor,
              const char* name,
              const at::Device& device,
              std::int64_t rank = -1) {
  check_device(tensor, name, device);
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                   "lexico: ",
                   name,
                   " is ",
                   type,
                   ", must be float32, float16 or bfloat16");
  TORCH_CHECK_VALUE(rank < 0 ? tensor.dim() > 0 : tensor.dim() == rank,
                    "lexico: ",
                    name,
                    " has shape ",
                    tensor.sizes(),
                    ", must have ",
                    rank < 0 ? 1 : rank,
                    rank < 0 ? " or more" : "",
                    " dimensions");
  return tensor.detach().to(at::kFloat).contiguous();
}

Tensor indices_of(const Tensor& tensor,
                  const char* name,
                  const at::Device& device,
                  std::int64_t num_atoms) {
  check_device(tensor, name, device);
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kInt || type == at::kLong,
                   "lexico: ",
                   name,
                   " is ",
                   type,
                   ", must be int32 or int64");
  TORCH_CHECK_VALUE(
      tensor.dim() > 0, "lexico: ", name, " is a scalar, must have the shape [..., sparsity]");
  if (tensor.numel() > 0) {
    const std::int64_t low = tensor.min().item<std::int64_t>(),
                       high = tensor.max().item<std::int64_t>();
    TORCH_CHECK_VALUE(low >= -1 && high < num_atoms,
                      "lexico: ",
                      name,
                      " reach from ",
                      low,
                      " to ",
                      high,
                      ", must be in [0, ",
                      num_atoms,
                      "), or -1 for an unused slot");
  }
  return tensor.to(at::kInt).contiguous();
}

Tensor atoms_of(const Tensor& tensor, const char* name, const at::Device& device) {
  const Tensor atoms = floats(tensor, name, device, 2);
  TORCH_CHECK_VALUE(atoms.numel() > 0,
                    "lexico: ",
                    name,
                    " has shape ",
                    atoms.sizes(),
                    ", must be [num_atoms, dim], neither 0");
  return atoms;
}

void check_unit_rows(const Tensor& atoms) {
  const Tensor off = (atoms.norm(2, {1}) - 1).abs();
  const double worst = off.max().item<double>();  // NaN if any is
  TORCH_CHECK_VALUE(worst <= 1e-3,
                    "lexico: atom ",
                    off.argmax().item<std::int64_t>(),
                    " has a norm that is off 1 by ",
                    worst,
                    ", must be within 0.001: atoms are rows of unit length");
}

std::vector<std::int64_t> with_last(const Tensor& like, std::int64_t last) {
  std::vector<std::int64_t> sizes = like.sizes().vec();
  sizes.back() = last;
  return sizes;
}

void check(const lexico::kernels::Status& status) {
  TORCH_CHECK(status.ok(), "lexico: ", status.what);
}

// Vectors [rows, dim] and atoms of a CUDA device.
std::tuple<Tensor, Tensor, Tensor> encode_on_device(const Tensor& x,
                                                    const Tensor& d,
                                                    const lexico::EncodeOptions& options) {
  namespace kernels = lexico::kernels;
  const c10::DeviceGuard guard(x.device());
  const std::int64_t rows = x.numel() / x.size(-1);
  Tensor indices = at::empty(with_last(x, options.max_atoms), x.options().dtype(at::kInt));
  Tensor weights = at::empty(with_last(x, options.max_atoms), x.options());
  Tensor counts = at::empty(x.sizes().slice(0, static_cast<std::size_t>(x.dim() - 1)),
                            x.options().dtype(at::kInt));
  Tensor norms = at::empty({rows}, x.options());
  if (rows == 0) return {indices, weights, counts};
  kernels::PursuitProblem p;
  p.num_dictionaries = 1;
  p.num_signals = rows;
  p.num_atoms = static_cast<int>(d.size(0));
  p.dim = static_cast<int>(d.size(1));
  lexico::detail::set_options(p, options);
  p.atoms = d.const_data_ptr<float>();
  p.signals = x.const_data_ptr<float>();
  p.indices = indices.mutable_data_ptr<std::int32_t>();
  p.weights = weights.mutable_data_ptr<float>();
  p.counts = counts.mutable_data_ptr<std::int32_t>();
  p.residual_norms = norms.mutable_data_ptr<float>();
  kernels::cuda::PursuitPlan plan;
  check(kernels::cuda::plan_pursuit(p, kernels::cuda::PursuitPath::kAuto, &plan));
  Tensor workspace =
      at::empty({static_cast<std::int64_t>(plan.workspace_bytes)}, x.options().dtype(at::kByte));
  check(kernels::cuda::pursuit(p,
                               plan,
                               workspace.mutable_data_ptr(),
                               false,
                               static_cast<kernels::Stream>(stream_of(x.device()))));
  return {indices, weights, counts};
}

std::tuple<Tensor, Tensor, Tensor> encode(const Tensor& vectors,
                                          const Tensor& atoms,
                                          std::int64_t sparsity,
                                          double tolerance,
                                          const std::string& selection) {
  const Tensor x = floats(vectors, "vectors", vectors.device());
  const Tensor d = atoms_of(atoms, "atoms", vectors.device());
  TORCH_CHECK_VALUE(x.size(-1) == d.size(1),
                    "lexico: vectors have shape ",
                    x.sizes(),
                    " and atoms ",
                    d.sizes(),
                    ": the last dimensions must be equal");
  check_unit_rows(d);
  return translated([&] {
    const lexico::EncodeOptions options{.max_atoms = as_int(sparsity, "sparsity"),
                                        .relative_tolerance = static_cast<float>(tolerance),
                                        .selection = lexico::Selection::from(selection),
                                        .threads = at::get_num_threads()};
    lexico::Encoder encoder(options);  // it checks them
    if (!x.is_cpu()) {
      const std::int64_t most = std::min(d.size(0), d.size(1));
      TORCH_CHECK_VALUE(
          sparsity <= most, "lexico: sparsity is ", sparsity, ", must be in [1, ", most, "]");
      return encode_on_device(x, d, options);
    }
    encoder.set_atoms(
        d.const_data_ptr<float>(), 1, as_int(d.size(0), "num_atoms"), as_int(d.size(1), "dim"));
    const std::int64_t rows = x.numel() / x.size(-1);
    lexico::SparseCodes codes;
    encoder.encode(x.const_data_ptr<float>(), rows, codes);
    Tensor indices = at::empty(with_last(x, sparsity), at::kInt);
    Tensor weights = at::empty(with_last(x, sparsity), at::kFloat);
    Tensor counts = at::empty(x.sizes().slice(0, static_cast<std::size_t>(x.dim() - 1)), at::kInt);
    std::copy_n(codes.indices.data(), indices.numel(), indices.mutable_data_ptr<std::int32_t>());
    std::copy_n(codes.weights.data(), weights.numel(), weights.mutable_data_ptr<float>());
    std::copy_n(codes.counts.data(), counts.numel(), counts.mutable_data_ptr<std::int32_t>());
    return std::make_tuple(indices, weights, counts);
  });
}

void check_codes(const Tensor& indices, const Tensor& weights, const char* what) {
  TORCH_CHECK_VALUE(indices.sizes() == weights.sizes(),
                    "lexico: ",
                    what,
                    "indices have shape ",
                    indices.sizes(),
                    " and weights ",
                    weights.sizes(),
                    ", must be equal");
}

Tensor decode(const Tensor& indices, const Tensor& weights, const Tensor& atoms) {
  const Tensor d = atoms_of(atoms, "atoms", weights.device());
  const Tensor at_atoms = indices_of(indices, "indices", weights.device(), d.size(0));
  const Tensor w = floats(weights, "weights", weights.device());
  check_codes(at_atoms, w, "");
  const std::int64_t sparsity = w.size(-1), dim = d.size(1);
  Tensor out = at::zeros(with_last(w, dim), w.options());
  const std::int64_t rows = out.numel() / dim;
  if (!w.is_cpu()) {
    for (std::int64_t slot = 0; slot < sparsity; ++slot) {
      const Tensor of = at_atoms.select(-1, slot);
      const Tensor unused = (of < 0).unsqueeze(-1);
      const Tensor rows_of = d.index_select(0, of.clamp_min(0).flatten()).view(out.sizes());
      const Tensor weights_of = w.select(-1, slot).unsqueeze(-1).masked_fill(unused, 0);
      out.addcmul_(rows_of.masked_fill(unused, 0), weights_of);
    }
    return out;
  }
  const std::int32_t* index = at_atoms.const_data_ptr<std::int32_t>();
  const float* weight = w.const_data_ptr<float>();
  const float* atom = d.const_data_ptr<float>();
  float* x = out.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 256, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t slot = row * sparsity; slot < (row + 1) * sparsity; ++slot) {
        if (index[slot] < 0) continue;
        for (std::int64_t i = 0; i < dim; ++i)
          x[row * dim + i] += weight[slot] * atom[index[slot] * dim + i];
      }
    }
  });
  return out;
}

// A dictionary whose codes keep fp32 weights.
lexico::Dictionary exact_dictionary(const Tensor& atoms, lexico::Kind kind, std::int64_t sparsity) {
  lexico::Dictionary dictionary;
  dictionary.kind = kind;
  dictionary.num_atoms = as_int(atoms.size(0), "num_atoms");
  dictionary.dim = as_int(atoms.size(1), "dim");
  dictionary.atoms.assign(atoms.const_data_ptr<float>(),
                          atoms.const_data_ptr<float>() + atoms.numel());
  dictionary.format.max_atoms = as_int(sparsity, "sparsity");
  return dictionary;
}

// Of one sequence, [kv_heads, tokens, sparsity] each: to records [tokens, kv_heads] of so many
// indices and then weights.
void append_codes(lexico::CodedVectors& coded, const Tensor& indices, const Tensor& weights) {
  const std::int64_t heads = indices.size(0), tokens = indices.size(1), sparsity = indices.size(2);
  std::vector<std::uint8_t> records(
      static_cast<std::size_t>(tokens * heads * coded.record_bytes()));
  const auto half = static_cast<std::size_t>(sparsity) * sizeof(float);
  TORCH_INTERNAL_ASSERT(static_cast<std::size_t>(coded.record_bytes()) == 2 * half);
  std::uint8_t* record = records.data();
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (std::int64_t head = 0; head < heads; ++head, record += 2 * half) {
      const std::int64_t first = (head * tokens + token) * sparsity;
      std::memcpy(record, indices.const_data_ptr<std::int32_t>() + first, half);
      std::memcpy(record + half, weights.const_data_ptr<float>() + first, half);
    }
  }
  coded.append(records.data(), tokens);
}

Tensor attend(const Tensor& queries,
              const Tensor& key_indices,
              const Tensor& key_weights,
              const Tensor& key_atoms,
              const Tensor& value_indices,
              const Tensor& value_weights,
              const Tensor& value_atoms,
              const std::optional<Tensor>& window_keys,
              const std::optional<Tensor>& window_values,
              std::optional<double> scale) {
  const at::Device device = queries.device();
  const Tensor q = floats(queries, "queries", device, 3);
  const Tensor kd = atoms_of(key_atoms, "key_atoms", device),
               vd = atoms_of(value_atoms, "value_atoms", device);
  // Codes are packed by the CPU.
  const Tensor ki = indices_of(key_indices, "key_indices", device, kd.size(0)).cpu(),
               kw = floats(key_weights, "key_weights", device, 4).cpu();
  const Tensor vi = indices_of(value_indices, "value_indices", device, vd.size(0)).cpu(),
               vw = floats(value_weights, "value_weights", device, 4).cpu();
  check_codes(ki, kw, "key ");
  check_codes(vi, vw, "value ");
  const std::int64_t batch = q.size(0), heads = q.size(1), dim = q.size(2), kv_heads = kw.size(1),
                     tokens = kw.size(2);
  TORCH_CHECK_VALUE(kw.size(0) == batch && vw.sizes().slice(0, 3) == kw.sizes().slice(0, 3),
                    "lexico: keys' codes have shape ",
                    kw.sizes(),
                    " and values' ",
                    vw.sizes(),
                    ", must be [",
                    batch,
                    ", kv_heads, tokens, sparsity]: queries have shape ",
                    q.sizes());
  TORCH_CHECK_VALUE(kv_heads > 0 && heads % kv_heads == 0,
                    "lexico: ",
                    heads,
                    " query heads are no multiple of ",
                    kv_heads,
                    " KV heads");
  TORCH_CHECK_VALUE(kd.size(1) == dim && vd.size(1) == dim,
                    "lexico: queries are of dim ",
                    dim,
                    ", key_atoms of ",
                    kd.size(1),
                    ", value_atoms of ",
                    vd.size(1),
                    ", must be equal");
  TORCH_CHECK_VALUE(window_keys.has_value() == window_values.has_value(),
                    "lexico: window_keys and window_values come together");
  Tensor wk, wv;
  if (window_keys) {
    wk = floats(*window_keys, "window_keys", device, 4);
    wv = floats(*window_values, "window_values", device, 4);
    TORCH_CHECK_VALUE(wk.sizes() == wv.sizes() && wk.size(0) == batch && wk.size(1) == kv_heads &&
                          wk.size(3) == dim,
                      "lexico: window_keys have shape ",
                      wk.sizes(),
                      " and window_values ",
                      wv.sizes(),
                      ", must be [",
                      batch,
                      ", ",
                      kv_heads,
                      ", tokens, ",
                      dim,
                      "]");
  }
  return translated([&] {
    const lexico::Dictionary keys = exact_dictionary(kd.cpu(), lexico::Kind::kKeys, kw.size(3));
    const lexico::Dictionary values = exact_dictionary(vd.cpu(), lexico::Kind::kValues, vw.size(3));
    const lexico::LayerAttention attention({&keys},
                                           {&values},
                                           {.kv_heads = as_int(kv_heads, "kv_heads"),
                                            .group = as_int(heads / kv_heads, "group"),
                                            .softmax_scale = static_cast<float>(scale.value_or(0)),
                                            .page_tokens = tokens < 1024 ? 64 : 1024,
                                            .threads = at::get_num_threads(),
                                            .device = device.str()});
    std::vector<lexico::CodedVectors> coded;
    coded.reserve(static_cast<std::size_t>(2 * batch));
    std::vector<lexico::LayerAttention::Sequence> sequences;
    for (std::int64_t i = 0; i < batch; ++i) {
      coded.push_back(attention.coded_keys());
      append_codes(coded.back(), ki[i], kw[i]);
      coded.push_back(attention.coded_values());
      append_codes(coded.back(), vi[i], vw[i]);
      lexico::LayerAttention::Sequence sequence{
          .keys = &coded[coded.size() - 2], .values = &coded.back(), .exact = {}};
      if (wk.defined()) {
        sequence.exact = {{.keys = wk.const_data_ptr<float>() + i * wk.stride(0),
                           .values = wv.const_data_ptr<float>() + i * wv.stride(0),
                           .head_stride = wk.size(2) * dim,
                           .tokens = as_int(wk.size(2), "window tokens")}};
      }
      sequences.push_back(std::move(sequence));
    }
    Tensor out = at::zeros_like(q);
    lexico::AttentionScratch scratch;
    if (batch > 0)
      attention.attend(sequences,
                       q.const_data_ptr<float>(),
                       out.mutable_data_ptr<float>(),
                       scratch,
                       nullptr,
                       stream_of(device));
    return out;
  });
}

lexico::ExactNumbers exact_numbers(const std::string& name) {
  if (name == "float16") return lexico::ExactNumbers::kFloat16;
  if (name == "bfloat16") return lexico::ExactNumbers::kBFloat16;
  TORCH_CHECK_VALUE(
      name == "float32", "lexico: exact is '", name, "', must be float16, bfloat16 or float32");
  return lexico::ExactNumbers::kFloat32;
}

// Of all layers (lists of one), or of each layer (lists of `layers`); empty: the dictionary's own.
void set_coding(lexico::CacheCoding& all,
                std::map<int, lexico::CacheCoding>& single,
                const std::string& kind,
                const std::vector<std::int64_t>& atoms,
                const std::vector<double>& tolerances,
                std::int64_t layers) {
  const auto fits = [&](std::size_t size) {
    return size <= 1 || size == static_cast<std::size_t>(layers);
  };
  TORCH_CHECK_VALUE(fits(atoms.size()) && fits(tolerances.size()),
                    "lexico: ",
                    kind,
                    " have ",
                    atoms.size(),
                    " sparsities and ",
                    tolerances.size(),
                    " tolerances, must be one, or one for each of ",
                    layers,
                    " layers");
  const auto of_layer = [&](std::size_t layer) {
    lexico::CacheCoding coding;
    if (!atoms.empty()) coding.max_atoms = as_int(atoms[atoms.size() == 1 ? 0 : layer], "sparsity");
    if (!tolerances.empty())
      coding.relative_tolerance =
          static_cast<float>(tolerances[tolerances.size() == 1 ? 0 : layer]);
    return coding;
  };
  all = of_layer(0);
  if (atoms.size() <= 1 && tolerances.size() <= 1) return;
  for (std::int64_t layer = 0; layer < layers; ++layer)
    single[static_cast<int>(layer)] = of_layer(static_cast<std::size_t>(layer));
}

// lexico::CompressedCache with tensors; calls wait for each other.
class Cache : public torch::CustomClassHolder {
 public:
  Cache(lexico::DictionarySet dictionaries,
        const lexico::CacheShape& shape,
        const lexico::CacheOptions& options)
      : cache_(std::move(dictionaries), shape, options), device_(options.device) {}

 private:
  template <typename Call>
  auto locked(Call&& call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return translated(std::forward<Call>(call));
  }

 public:
  std::int64_t add_sequence() {
    return locked([&] { return std::int64_t{cache_.add_sequence()}; });
  }
  std::int64_t fork(std::int64_t sequence) {
    return locked([&] { return std::int64_t{cache_.fork(as_int(sequence, "sequence"))}; });
  }
  void remove(std::int64_t sequence) {
    locked([&] { cache_.remove(as_int(sequence, "sequence")); });
  }
  void clear() {
    locked([&] { cache_.clear(); });
  }
  std::int64_t tokens(std::int64_t sequence, std::int64_t layer) {
    return locked(
        [&] { return cache_.tokens(as_int(sequence, "sequence"), as_int(layer, "layer")); });
  }
  std::int64_t coded_tokens(std::int64_t sequence, std::int64_t layer) {
    return locked(
        [&] { return cache_.coded_tokens(as_int(sequence, "sequence"), as_int(layer, "layer")); });
  }
  void truncate(std::int64_t sequence, std::int64_t tokens) {
    locked([&] { cache_.truncate(as_int(sequence, "sequence"), tokens); });
  }

  void append(std::int64_t layer,
              const std::vector<std::int64_t>& sequences,
              const Tensor& keys,
              const Tensor& values) {
    // The host compresses, or brings what is due to the device.
    const Tensor k = floats(keys, "keys", keys.device(), 4).cpu(),
                 v = floats(values, "values", keys.device(), 4).cpu();
    const auto& shape = cache_.shape();
    const auto batch = static_cast<std::int64_t>(sequences.size());
    TORCH_CHECK_VALUE(k.sizes() == v.sizes() && k.size(0) == batch && k.size(1) == shape.kv_heads &&
                          k.size(3) == shape.head_dim,
                      "lexico: keys have shape ",
                      k.sizes(),
                      " and values ",
                      v.sizes(),
                      ", must be [",
                      batch,
                      ", ",
                      shape.kv_heads,
                      ", tokens, ",
                      shape.head_dim,
                      "]");
    std::vector<lexico::NewTokens> tokens;
    for (std::int64_t i = 0; i < batch; ++i) {
      tokens.push_back({.sequence = as_int(sequences[static_cast<std::size_t>(i)], "sequence"),
                        .tokens = k.size(2),
                        .keys = k.const_data_ptr<float>() + i * k.stride(0),
                        .values = v.const_data_ptr<float>() + i * v.stride(0),
                        .token_stride = shape.head_dim,
                        .head_stride = k.size(2) * shape.head_dim});
    }
    locked([&] { cache_.append(as_int(layer, "layer"), tokens); });
  }

  std::tuple<Tensor, Tensor> attend(std::int64_t layer,
                                    const std::vector<std::int64_t>& sequences,
                                    const Tensor& queries) {
    const Tensor q = floats(queries, "queries", device_, 3);
    const auto& shape = cache_.shape();
    const std::int64_t heads = std::int64_t{shape.kv_heads} * shape.group;
    TORCH_CHECK_VALUE(q.size(0) == static_cast<std::int64_t>(sequences.size()) &&
                          q.size(1) == heads && q.size(2) == shape.head_dim,
                      "lexico: queries have shape ",
                      q.sizes(),
                      ", must be [",
                      sequences.size(),
                      ", ",
                      heads,
                      ", ",
                      shape.head_dim,
                      "]");
    std::vector<int> of;
    for (const std::int64_t sequence : sequences) of.push_back(as_int(sequence, "sequence"));
    Tensor out = at::empty_like(q), log_sums = at::empty({q.size(0), heads}, q.options());
    locked([&] {
      cache_.attend(as_int(layer, "layer"),
                    of,
                    q.const_data_ptr<float>(),
                    out.mutable_data_ptr<float>(),
                    log_sums.mutable_data_ptr<float>(),
                    stream_of(device_));
    });
    return {out, log_sums};
  }

  std::tuple<Tensor, Tensor> reconstruct(std::int64_t layer,
                                         std::int64_t sequence,
                                         std::int64_t first,
                                         std::int64_t tokens) {
    TORCH_CHECK_VALUE(tokens >= 0, "lexico: tokens is ", tokens, ", must be at least 0");
    const auto& shape = cache_.shape();
    Tensor keys = at::empty({tokens, shape.kv_heads, shape.head_dim}, at::kFloat),
           values = at::empty_like(keys);
    locked([&] {
      cache_.reconstruct(as_int(layer, "layer"),
                         as_int(sequence, "sequence"),
                         first,
                         tokens,
                         keys.mutable_data_ptr<float>(),
                         values.mutable_data_ptr<float>());
    });
    return {keys.transpose(0, 1).to(device_), values.transpose(0, 1).to(device_)};
  }

  std::int64_t bytes() {
    return locked([&] { return static_cast<std::int64_t>(cache_.bytes()); });
  }
  std::int64_t sequence_bytes(std::int64_t sequence) {
    return locked(
        [&] { return static_cast<std::int64_t>(cache_.bytes(as_int(sequence, "sequence"))); });
  }
  std::int64_t bytes_for(std::int64_t tokens) {
    return locked([&] { return static_cast<std::int64_t>(cache_.bytes_for(tokens)); });
  }
  c10::Dict<std::string, std::int64_t> counts() {
    return locked([&] {
      const lexico::CacheCounts& counts = cache_.counts();
      c10::Dict<std::string, std::int64_t> dict;
      dict.insert("coded_vectors", counts.coded_vectors);
      dict.insert("saturated", counts.saturated);
      dict.insert("not_finite", counts.not_finite);
      dict.insert("exact_saturated", counts.exact_saturated);
      dict.insert("own_atoms", counts.own_atoms);
      return dict;
    });
  }
  void save(std::int64_t sequence, const std::string& path) {
    locked([&] { cache_.save(as_int(sequence, "sequence"), path); });
  }
  std::int64_t load(const std::string& path) {
    return locked([&] { return std::int64_t{cache_.load(path)}; });
  }

 private:
  std::mutex mutex_;
  lexico::CompressedCache cache_;
  at::Device device_;  // with its number
};

c10::intrusive_ptr<Cache> make_cache(const std::string& dictionaries,
                                     std::int64_t layers,
                                     std::int64_t kv_heads,
                                     std::int64_t group,
                                     std::int64_t head_dim,
                                     std::int64_t max_positions,
                                     std::int64_t recent_window,
                                     std::int64_t compress_chunk,
                                     std::int64_t sink_tokens,
                                     const std::vector<std::int64_t>& key_sparsity,
                                     const std::vector<std::int64_t>& value_sparsity,
                                     const std::vector<double>& key_tolerance,
                                     const std::vector<double>& value_tolerance,
                                     const std::string& selection,
                                     const std::string& exact,
                                     double adaptive_threshold,
                                     std::int64_t adaptive_atoms,
                                     std::int64_t page_tokens,
                                     std::int64_t max_bytes,
                                     std::int64_t threads,
                                     const std::string& device) {
  return translated([&] {
    const lexico::CacheShape shape{.layers = as_int(layers, "layers"),
                                   .kv_heads = as_int(kv_heads, "kv_heads"),
                                   .group = as_int(group, "group"),
                                   .head_dim = as_int(head_dim, "head_dim"),
                                   .max_positions = max_positions};
    lexico::CacheOptions options;
    options.recent_window = as_int(recent_window, "recent_window");
    options.compress_chunk = as_int(compress_chunk, "compress_chunk");
    options.sink_tokens = as_int(sink_tokens, "sink_tokens");
    set_coding(options.keys, options.layer_keys, "keys", key_sparsity, key_tolerance, layers);
    set_coding(
        options.values, options.layer_values, "values", value_sparsity, value_tolerance, layers);
    options.selection = lexico::Selection::from(selection);
    options.exact = exact_numbers(exact);
    options.adaptive_threshold = static_cast<float>(adaptive_threshold);
    options.adaptive_atoms = as_int(adaptive_atoms, "adaptive_atoms");
    options.page_tokens = as_int(page_tokens, "page_tokens");
    TORCH_CHECK_VALUE(max_bytes >= 0, "lexico: max_bytes is ", max_bytes, ", must be at least 0");
    options.max_bytes = static_cast<std::size_t>(max_bytes);
    options.threads = threads == 0 ? at::get_num_threads() : as_int(threads, "threads");
    options.device = device;
    if (device == "cuda" && at::hasCUDA())  // as everywhere in torch: the current one
      options.device = c10::impl::VirtualGuardImpl(at::kCUDA).getDevice().str();
    return c10::make_intrusive<Cache>(lexico::read_dictionaries(dictionaries), shape, options);
  });
}

}  // namespace

TORCH_LIBRARY(lexico, m) {
  m.def(
      "encode(Tensor vectors, Tensor atoms, int sparsity, float tolerance=0.0, str "
      "selection=\"omp\") -> (Tensor indices, Tensor weights, Tensor counts)");
  m.def("decode(Tensor indices, Tensor weights, Tensor atoms) -> Tensor");
  m.def(
      "attend(Tensor queries, Tensor key_indices, Tensor key_weights, Tensor key_atoms, Tensor "
      "value_indices, Tensor value_weights, Tensor value_atoms, "
      "Tensor? window_keys=None, Tensor? window_values=None, float? scale=None) -> Tensor");
  using torch::arg;
  m.class_<Cache>("CompressedCache")
      .def(torch::init(&make_cache),
           "",
           {arg("dictionaries"),
            arg("layers"),
            arg("kv_heads"),
            arg("group"),
            arg("head_dim"),
            arg("max_positions") = 0,
            arg("recent_window") = 32,
            arg("compress_chunk") = 1,
            arg("sink_tokens") = 0,
            arg("key_sparsity") = std::vector<std::int64_t>{},
            arg("value_sparsity") = std::vector<std::int64_t>{},
            arg("key_tolerance") = std::vector<double>{},
            arg("value_tolerance") = std::vector<double>{},
            arg("selection") = "omp",
            arg("exact") = "float16",
            arg("adaptive_threshold") = 0.0,
            arg("adaptive_atoms") = 64,
            arg("page_tokens") = 256,
            arg("max_bytes") = 0,
            arg("threads") = 0,
            arg("device") = "cpu"})
      .def("add_sequence", &Cache::add_sequence)
      .def("fork", &Cache::fork)
      .def("remove", &Cache::remove)
      .def("clear", &Cache::clear)
      .def("tokens", &Cache::tokens)
      .def("coded_tokens", &Cache::coded_tokens)
      .def("truncate", &Cache::truncate)
      .def("append", &Cache::append)
      .def("attend", &Cache::attend)
      .def("reconstruct", &Cache::reconstruct)
      .def("bytes", &Cache::bytes)
      .def("sequence_bytes", &Cache::sequence_bytes)
      .def("bytes_for", &Cache::bytes_for)
      .def("counts", &Cache::counts)
      .def("save", &Cache::save)
      .def("load", &Cache::load);
}

// For every device, so that tensors elsewhere than in CPU memory are told what is missing. Shapes
// without data: python/lexico/__init__.py.
TORCH_LIBRARY_IMPL(lexico, CompositeExplicitAutograd, m) {
  m.impl("encode", &encode);
  m.impl("decode", &decode);
  m.impl("attend", &attend);
}
