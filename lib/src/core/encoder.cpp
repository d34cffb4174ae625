#include "lexico/encoder.h"

#include <algorithm>
#include <charconv>
#include <new>
#include <sstream>

#include "check.h"
#include "core/device_encoder.h"
#include "core/pursuit_options.h"
#include "kernels/memory/memory.h"
#include "kernels/pursuit/pursuit.h"

namespace lexico {

using detail::throw_if_failed;
using detail::throw_invalid;

Selection Selection::from(const std::string& text) {
  constexpr int kFewest = 4, kMost = 64;
  if (text == "omp") return {Rule::kOmp, 0};
  if (text == "ols") return {Rule::kOls, 0};
  if (text.starts_with("ols-")) {
    int candidates = 0;
    const char* const end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data() + 4, end, candidates);
    if (error == std::errc() && stop == end && candidates >= kFewest && candidates <= kMost) {
      return {Rule::kOls, candidates};
    }
  }
  throw_invalid(
      "selection is '", text, "', must be omp, ols, or ols-N with N in ", kFewest, "..", kMost);
}

std::string Selection::name() const {
  if (rule == Rule::kOmp) return "omp";
  return candidates == 0 ? "ols" : "ols-" + std::to_string(candidates);
}

int Selection::candidates_among(std::int64_t num_atoms) const {
  constexpr std::int64_t kAtomsPerCandidate = 64;
  return num_atoms > kAtomsPerCandidate * candidates ? candidates : 0;
}

struct Encoder::Impl {
  EncodeOptions options;
  const float* atoms = nullptr;
  int num_dictionaries = 0, num_atoms = 0, dim = 0;
  std::int64_t signals_seen = 0;  // per dictionary, since set_atoms

  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  kernels::cpu::PursuitPlan plan;
  bool prepared = false;  // the workspace holds what `plan` derives from the atoms
  std::unique_ptr<detail::DeviceEncoder> device;  // or nullptr: the CPU

  Impl() = default;
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() { kernels::cpu::release(workspace); }

  kernels::PursuitProblem problem(std::int64_t num_signals) const {
    kernels::PursuitProblem p;
    p.num_dictionaries = num_dictionaries;
    p.num_signals = num_signals;
    p.num_atoms = num_atoms;
    p.dim = dim;
    detail::set_options(p, options);
    p.threads = options.threads;
    p.atoms = atoms;
    return p;
  }

  void reserve(std::size_t bytes) {
    if (bytes <= workspace_bytes) return;
    kernels::cpu::release(workspace);
    workspace = nullptr;
    workspace_bytes = 0;
    prepared = false;
    throw_if_failed(kernels::cpu::allocate(&workspace, bytes), "encoder scratch");
    workspace_bytes = bytes;
  }
};

Encoder::Encoder(const EncodeOptions& options) : impl_(std::make_unique<Impl>()) {
  if (options.max_atoms < 1) throw_invalid("max_atoms is ", options.max_atoms, ", must be >= 1");
  if (!(options.relative_tolerance >= 0)) {
    throw_invalid("relative_tolerance is ", options.relative_tolerance, ", must be >= 0");
  }
  if (options.threads < 0) throw_invalid("threads is ", options.threads, ", must be >= 0 (0: all)");
  if (options.selection.candidates < 0) {
    throw_invalid("selection has ", options.selection.candidates, " candidates, must be >= 0");
  }
  const kernels::Status level = kernels::cpu::set_pursuit_level(nullptr);
  if (!level.ok()) throw_invalid(level.what);
  if (options.device != "cpu")
    impl_->device = std::make_unique<detail::DeviceEncoder>(detail::device_of(options.device));
  impl_->options = options;
}
Encoder::~Encoder() = default;
Encoder::Encoder(Encoder&&) noexcept = default;
Encoder& Encoder::operator=(Encoder&&) noexcept = default;

const EncodeOptions& Encoder::options() const { return impl_->options; }

void Encoder::share_scratch(const Encoder& other) {
  if (impl_->device == nullptr || impl_->options.device != other.impl_->options.device)
    throw_invalid("share_scratch: devices are '",
                  impl_->options.device,
                  "' and '",
                  other.impl_->options.device,
                  "', must be the same GPU");
  impl_->device->share_scratch(*other.impl_->device);
}

void Encoder::set_atoms(const float* atoms, int num_dictionaries, int num_atoms, int dim) {
  if (num_dictionaries < 1)
    throw_invalid("num_dictionaries is ", num_dictionaries, ", must be >= 1");
  if (num_atoms < 1) throw_invalid("num_atoms is ", num_atoms, ", must be >= 1");
  if (dim < 1) throw_invalid("dim is ", dim, ", must be >= 1");
  const int limit = std::min(num_atoms, dim);
  if (impl_->options.max_atoms > limit) {
    throw_invalid("max_atoms is ",
                  impl_->options.max_atoms,
                  ", must be in [1, ",
                  limit,
                  "]: the atoms are ",
                  num_atoms,
                  " of dimension ",
                  dim);
  }
  if (atoms == nullptr) throw_invalid("atoms is null");
  impl_->atoms = atoms;
  impl_->num_dictionaries = num_dictionaries;
  impl_->num_atoms = num_atoms;
  impl_->dim = dim;
  impl_->signals_seen = 0;
  impl_->prepared = false;
  if (impl_->device) impl_->device->forget_atoms();
}

void Encoder::encode(const float* signals,
                     std::int64_t num_signals,
                     SparseCodes& codes,
                     bool with_curve,
                     const std::int32_t* budgets) {
  Impl& impl = *impl_;
  if (impl.atoms == nullptr) throw_invalid("encode: no atoms yet, call set_atoms first");
  if (num_signals < 0) throw_invalid("num_signals is ", num_signals, ", must be >= 0");

  const std::size_t signals_total =
      static_cast<std::size_t>(impl.num_dictionaries) * static_cast<std::size_t>(num_signals);
  const std::size_t slots = signals_total * static_cast<std::size_t>(impl.options.max_atoms);
  codes.num_dictionaries = impl.num_dictionaries;
  codes.num_signals = num_signals;
  codes.max_atoms = impl.options.max_atoms;
  try {
    codes.indices.resize(slots);
    codes.weights.resize(slots);
    codes.counts.resize(signals_total);
    codes.residual_norms.resize(signals_total);
    codes.curve.resize(with_curve ? slots : 0);
  } catch (const std::bad_alloc&) {
    throw ResourceError("encode: no memory for the codes of " + std::to_string(signals_total) +
                        " signals");
  }
  if (num_signals == 0) return;

  kernels::PursuitProblem problem = impl.problem(num_signals);
  problem.signals = signals;
  problem.budgets = budgets;
  problem.indices = codes.indices.data();
  problem.weights = codes.weights.data();
  problem.counts = codes.counts.data();
  problem.residual_norms = codes.residual_norms.data();
  problem.curve = with_curve ? codes.curve.data() : nullptr;

  if (impl.device) {
    impl.device->encode(problem);
    return;
  }
  impl.signals_seen += num_signals;
  const kernels::cpu::PursuitPlan plan = kernels::cpu::plan_pursuit(problem, impl.signals_seen);
  // What was derived from the atoms lies at the front of the workspace, in an order that the form
  // decides.
  const bool reusable = impl.prepared && plan.level == impl.plan.level &&
                        plan.form == impl.plan.form && plan.wave == impl.num_dictionaries;
  impl.prepared = reusable;
  impl.reserve(plan.workspace_bytes);
  throw_if_failed(kernels::cpu::pursuit(problem, plan, impl.workspace, impl.prepared), "encode");
  impl.plan = plan;
  impl.prepared = plan.wave == impl.num_dictionaries;
}

std::size_t Encoder::workspace_bytes(std::int64_t num_signals) const {
  if (impl_->device) return impl_->device->device_bytes(impl_->problem(num_signals));
  return kernels::cpu::plan_pursuit(impl_->problem(num_signals),
                                    std::max(impl_->signals_seen, num_signals))
      .workspace_bytes;
}

std::string cpu_level() { return kernels::cpu::pursuit_level(); }

std::vector<std::string> cpu_levels() {
  std::vector<std::string> names;
  std::istringstream all(kernels::cpu::pursuit_levels());
  for (std::string name; std::getline(all, name, '|');) names.push_back(name);
  return names;
}

}  // namespace lexico
