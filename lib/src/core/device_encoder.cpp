#include "core/device_encoder.h"

#include <algorithm>

#include "check.h"
#include "core/size_of.h"

namespace lexico::detail {
namespace {

using kernels::Status;
namespace cuda = kernels::cuda;

// Bytes of one signal, its codes included.
std::size_t bytes_of_signal(const kernels::PursuitProblem& p) {
  return size_of(p.dim) * 4 + size_of(p.max_atoms) * (p.curve == nullptr ? 8 : 12) + 12;
}

}  // namespace

std::int64_t DeviceEncoder::most_signals(const kernels::PursuitProblem& p) const {
  constexpr std::size_t kMostBytes = std::size_t{512}
                                     << 20;  // copies take far longer than a launch
  const auto most =
      static_cast<std::int64_t>(std::max<std::size_t>(kMostBytes / bytes_of_signal(p), 1));
  return limit_ > 0 ? std::min(limit_, most) : most;
}

DeviceEncoder::Layout DeviceEncoder::layout(const kernels::PursuitProblem& p,
                                            const Piece& piece) const {
  kernels::PursuitProblem part = p;
  part.num_dictionaries = piece.dictionaries;
  part.num_signals = piece.signals;
  Layout l{};
  throw_if_failed(cuda::plan_pursuit(part, cuda::PursuitPath::kAuto, &l.plan), "encode");
  const auto round_up = [](std::size_t bytes) { return (bytes + 255) / 256 * 256; };
  const auto take = [&](std::size_t bytes) {
    const std::size_t at = l.total;
    l.total += round_up(bytes);
    return at;
  };
  const std::size_t signals = size_of(piece.dictionaries * piece.signals),
                    slots = signals * size_of(p.max_atoms);
  l.atoms_bytes = size_of(piece.dictionaries) * size_of(p.num_atoms) * size_of(p.dim) * 4;
  l.prepared = round_up(l.atoms_bytes);
  l.atoms_total = l.prepared + l.plan.prepared_bytes;
  l.workspace = take(l.plan.workspace_bytes - l.plan.prepared_bytes);
  l.signals = take(signals * size_of(p.dim) * 4);
  l.budgets = take(p.budgets == nullptr ? 0 : signals * 4);
  l.indices = take(slots * 4);
  l.weights = take(slots * 4);
  l.counts = take(signals * 4);
  l.norms = take(signals * 4);
  l.curve = take(p.curve == nullptr ? 0 : slots * 4);
  return l;
}

std::size_t DeviceEncoder::device_bytes(const kernels::PursuitProblem& p) const {
  const UseDevice use(device_);
  const std::int64_t most = most_signals(p);
  Piece piece{0, 0, 1, std::min(p.num_signals, most)};
  if (p.num_signals <= most)
    piece.dictionaries = static_cast<int>(std::min<std::int64_t>(
        p.num_dictionaries, most / std::max<std::int64_t>(p.num_signals, 1)));
  const Layout l = layout(p, piece);
  return l.atoms_total + l.total;
}

Status DeviceEncoder::run(const kernels::PursuitProblem& p, const Piece& piece) {
  const Layout l = layout(p, piece);
  const bool held = first_dictionary_ == piece.first_dictionary &&
                    dictionaries_ == piece.dictionaries && l.atoms_total <= atoms_.size();
  const bool prepared = held && prepared_.path == l.plan.path &&
                        prepared_.signals_per_block == l.plan.signals_per_block;
  first_dictionary_ = -1;  // until all went well
  Status status = atoms_.reserve(l.atoms_total);
  if (status.ok()) status = scratch_->reserve(l.total);
  if (!status.ok()) {  // smaller pieces take less of both
    atoms_.release();
    scratch_->release();
    return status;
  }
  const auto at = [&](std::size_t offset) { return static_cast<void*>(scratch_->data() + offset); };
  const std::size_t first = size_of(piece.first_dictionary * p.num_signals + piece.first_signal),
                    signals = size_of(piece.dictionaries * piece.signals), s = size_of(p.max_atoms);
  const auto copy = [&](void* to, const void* from, std::size_t bytes) {
    if (status.ok()) status = cuda::copy(to, from, bytes, nullptr);
  };
  if (!held)
    copy(atoms_.data(),
         p.atoms + size_of(piece.first_dictionary) * size_of(p.num_atoms) * size_of(p.dim),
         l.atoms_bytes);
  copy(at(l.signals), p.signals + first * size_of(p.dim), signals * size_of(p.dim) * 4);
  if (p.budgets != nullptr) copy(at(l.budgets), p.budgets + first, signals * 4);

  kernels::PursuitProblem part = p;
  part.num_dictionaries = piece.dictionaries;
  part.num_signals = piece.signals;
  part.atoms = reinterpret_cast<const float*>(atoms_.data());
  part.signals = static_cast<const float*>(at(l.signals));
  if (p.budgets != nullptr) part.budgets = static_cast<const std::int32_t*>(at(l.budgets));
  part.indices = static_cast<std::int32_t*>(at(l.indices));
  part.weights = static_cast<float*>(at(l.weights));
  part.counts = static_cast<std::int32_t*>(at(l.counts));
  part.residual_norms = static_cast<float*>(at(l.norms));
  if (p.curve != nullptr) part.curve = static_cast<float*>(at(l.curve));
  if (status.ok())
    status =
        cuda::pursuit(part, l.plan, at(l.workspace), prepared, nullptr, atoms_.data() + l.prepared);

  copy(p.indices + first * s, part.indices, signals * s * 4);
  copy(p.weights + first * s, part.weights, signals * s * 4);
  copy(p.counts + first, part.counts, signals * 4);
  copy(p.residual_norms + first, part.residual_norms, signals * 4);
  if (p.curve != nullptr) copy(p.curve + first * s, part.curve, signals * s * 4);
  // Copies may read the caller's memory until here, also where one could not be asked for.
  const Status waited = cuda::synchronize(nullptr);
  if (status.ok()) status = waited;
  if (status.ok()) {
    first_dictionary_ = piece.first_dictionary;
    dictionaries_ = piece.dictionaries;
    prepared_ = l.plan;
  }
  return status;
}

void DeviceEncoder::encode(const kernels::PursuitProblem& p) {
  const UseDevice use(device_);
  Piece piece{0, 0, 1, 0};
  while (piece.first_dictionary < p.num_dictionaries) {
    const std::int64_t most = most_signals(p);
    piece.dictionaries = 1;
    piece.signals = std::min(most, p.num_signals - piece.first_signal);
    if (piece.first_signal == 0 && p.num_signals <= most)
      piece.dictionaries = static_cast<int>(
          std::min(p.num_dictionaries - piece.first_dictionary, most / p.num_signals));
    const Status status = run(p, piece);
    const std::int64_t asked = piece.dictionaries * piece.signals;
    if (status.code == cuda::kOutOfMemory && asked > 1) {
      limit_ = asked / 2;
      continue;
    }
    throw_if_failed(status, "encode on the device");
    piece.first_signal += piece.signals;
    if (piece.first_signal == p.num_signals) {
      piece.first_signal = 0;
      piece.first_dictionary += piece.dictionaries;
    }
  }
}

}  // namespace lexico::detail
