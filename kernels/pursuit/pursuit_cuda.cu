// Pursuit on a GPU: chooses a path and sizes, lays out the workspace, starts the kernels.
#include "kernels/common/runtime.h"
#include "kernels/pursuit/pursuit_tensor.cuh"

namespace lexico::kernels::cuda {
namespace {

constexpr std::size_t kMostScratch = std::size_t{1} << 30;

constexpr Status refused(const char* why) { return {static_cast<int>(cudaErrorInvalidValue), why}; }

Status limits_of_device(DeviceLimits* limits) {
  int shared_bytes = 0;
  Status status = device_attribute(cudaDevAttrComputeCapabilityMajor, &limits->major);
  if (status.ok()) status = device_attribute(cudaDevAttrComputeCapabilityMinor, &limits->minor);
  if (status.ok())
    status = device_attribute(cudaDevAttrMultiProcessorCount, &limits->multiprocessors);
  if (status.ok())
    status = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_bytes);
  limits->shared_bytes = static_cast<std::size_t>(shared_bytes);
  return status;
}

std::int64_t groups_of(const PursuitProblem& p, int signals_per_block) {
  return (p.num_signals + signals_per_block - 1) / signals_per_block * p.num_dictionaries;
}

// Why the tensor paths do not take a problem; nullptr if they do.
const char* not_for_tensor_cores(const PursuitProblem& p, const DeviceLimits& device) {
  if (device.major < 8) return "the tensor paths need compute capability 8.0";
  if (p.dim > kMaxTensorDim) return "the tensor paths take at most 256 dimensions";
  if (p.max_atoms > kMaxTensorPicks) return "the tensor paths take at most 64 picks";
  if (p.num_atoms > kMaxTensorAtoms) return "the tensor paths take at most 524288 atoms";
  if (p.rule == PursuitRule::kOls && p.candidates < 1)
    return "OLS among all atoms is on the plain path only";
  if (p.candidates > kMostSegments / 2) return "the tensor paths take at most 64 candidates";
  if (groups_of(p, 16) > 0x7fffffff) return "the tensor paths take at most 2^35 signals";
  return nullptr;
}

// How many signals a block takes: the time of a pass over the atoms is that of the products, or,
// for few signals, that of bringing the atoms in.
int block_for(const PursuitProblem& p, const DeviceLimits& device) {
  struct Size {
    int signals;
    double time;  // of a pass, in passes of the smallest
  };
  int best = 0;
  double least = 0;
  for (const Size size : {Size{128, 2.0}, Size{64, 1.1}, Size{16, 1.0}}) {
    if (size.signals == 128 && p.rule == PursuitRule::kOls) continue;
    if (mma_shared_bytes(p, size.signals) > device.shared_bytes) continue;
    const std::int64_t waves =
        (groups_of(p, size.signals) + device.multiprocessors - 1) / device.multiprocessors;
    const double time = static_cast<double>(waves) * size.time;
    if (best == 0 || time < least) {
      best = size.signals;
      least = time;
    }
  }
  return best;
}

constexpr int kWgmmaSignals = 128;

bool takes_wgmma(const PursuitProblem& p, const DeviceLimits& device) {
  return has_wgmma() && device.major == 9 && device.minor == 0 && p.rule == PursuitRule::kOmp &&
         wgmma_shared_bytes(p) <= device.shared_bytes;
}

// Where the prepared atoms go, with the scratch behind them.
TensorSpace lay_out(const PursuitProblem& p, void* memory, std::size_t* prepared_bytes) {
  const std::size_t rows = static_cast<std::size_t>(p.num_dictionaries) *
                           static_cast<std::size_t>(padded_atoms(p)),
                    atoms_bytes = aligned(rows * static_cast<std::size_t>(padded_dim(p.dim)) * 2),
                    norms_bytes = aligned(rows * sizeof(float));
  unsigned char* const base = static_cast<unsigned char*>(memory);
  *prepared_bytes = atoms_bytes + norms_bytes;
  if (base == nullptr) return {};
  return {base, reinterpret_cast<float*>(base + atoms_bytes), base + *prepared_bytes};
}

void plan_tensor(const PursuitProblem& p,
                 const DeviceLimits& device,
                 std::size_t shared_bytes,
                 PursuitPlan* plan) {
  TensorSignal unused;
  lay_out(p, nullptr, &plan->prepared_bytes);
  plan->scratch_bytes =
      aligned(static_cast<std::size_t>(plan->signals_per_block) * carve(p, nullptr, &unused));
  const auto resident =
      static_cast<std::int64_t>((device.shared_bytes + 1024) / (shared_bytes + 1024));
  std::int64_t blocks = device.multiprocessors * (resident < 2 ? 1 : 2);
  const auto fit = static_cast<std::int64_t>(kMostScratch / plan->scratch_bytes);
  const std::int64_t groups = groups_of(p, plan->signals_per_block);
  if (blocks > fit) blocks = fit;
  if (blocks > groups) blocks = groups;
  if (blocks < 1) blocks = 1;
  plan->blocks = static_cast<int>(blocks);
  plan->workspace_bytes =
      plan->prepared_bytes + static_cast<std::size_t>(blocks) * plan->scratch_bytes;
}

}  // namespace

Segments segments_of(const PursuitProblem& p, TileShape shape) {
  const int tiles = padded_atoms(p) / shape.tile, each = shape.segments_per_flush();
  // More segments where one would have so many atoms that the column takes too much of a score.
  const int positions = tiles * shape.columns_per_thread();
  int wanted = p.rule == PursuitRule::kOls ? kMostSegments : kOmpSegments;
  while (wanted < kMostSegments && positions * each / wanted > 1 << kGoodPositionBits) wanted *= 2;
  const int flushes = wanted / each > 1 ? wanted / each : 1;
  Segments s;
  s.flush = (tiles + flushes - 1) / flushes;
  s.count = (tiles + s.flush - 1) / s.flush * each;
  s.position_bits = 4;
  while (1 << s.position_bits < s.flush * shape.columns_per_thread()) ++s.position_bits;
  return s;
}

TensorTask task_of(const PursuitProblem& p,
                   const PursuitPlan& plan,
                   const TensorSpace& space,
                   TileShape shape) {
  TensorSignal unused;
  const Segments segments = segments_of(p, shape);
  TensorTask task{};
  task.p = p;
  task.atoms16 = space.atoms16;
  task.norms2 = space.norms2;
  task.scratch = space.scratch;
  task.block_bytes = static_cast<std::int64_t>(plan.scratch_bytes);
  task.signal_bytes = static_cast<std::int64_t>(carve(p, nullptr, &unused));
  task.padded_atoms = padded_atoms(p);
  task.flush = segments.flush;
  task.segments = segments.count;
  task.position_bits = segments.position_bits;
  task.last_bits = (1u << segments.position_bits) - 1;
  task.kept_bits = 0x7fffffffu & ~task.last_bits;
  task.groups = static_cast<int>(groups_of(p, plan.signals_per_block));
  task.groups_of_one = task.groups / p.num_dictionaries;
  return task;
}

Status plan_pursuit(const PursuitProblem& p, PursuitPath wanted, PursuitPlan* plan) {
  DeviceLimits device;
  const Status status = limits_of_device(&device);
  if (!status.ok()) return status;
  PursuitPlan made;
  made.path = PursuitPath::kPlain;
  if (wanted != PursuitPath::kPlain) {
    const char* const why = not_for_tensor_cores(p, device);
    const int signals = why == nullptr ? block_for(p, device) : 0;
    const bool hopper = signals > 0 && wanted != PursuitPath::kTensor && takes_wgmma(p, device);
    if (wanted == PursuitPath::kHopper && !hopper)
      return refused(why != nullptr ? why
                                    : "the Hopper path is OMP on compute capability 9.0 only");
    if (signals > 0) {
      // Few signals want small blocks more than fast products.
      const bool use = hopper && (signals == kWgmmaSignals || wanted == PursuitPath::kHopper);
      made.path = use ? PursuitPath::kHopper : PursuitPath::kTensor;
      made.signals_per_block = use ? kWgmmaSignals : signals;
      plan_tensor(p, device, use ? wgmma_shared_bytes(p) : mma_shared_bytes(p, signals), &made);
    } else if (wanted != PursuitPath::kAuto) {
      return refused(why != nullptr ? why : "too little shared memory for the tensor paths");
    }
  }
  if (made.path == PursuitPath::kPlain) plan_plain(p, device, &made);
  *plan = made;
  return {};
}

Status pursuit(const PursuitProblem& p,
               const PursuitPlan& plan,
               void* workspace,
               bool prepared,
               Stream stream,
               void* apart) {
  if (p.num_signals == 0) return {};
  if (plan.path == PursuitPath::kPlain) return run_plain(p, plan, workspace, stream);
  std::size_t unused = 0;
  TensorSpace space = lay_out(p, apart != nullptr ? apart : workspace, &unused);
  if (apart != nullptr) space.scratch = static_cast<unsigned char*>(workspace);
  if (!prepared) {
    const Status status = prepare_atoms(p, space, stream);
    if (!status.ok()) return status;
  }
  return plan.path == PursuitPath::kHopper ? run_wgmma(p, plan, space, stream)
                                           : run_mma(p, plan, space, stream);
}

}  // namespace lexico::kernels::cuda
