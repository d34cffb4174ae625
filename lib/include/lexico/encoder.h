#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace lexico {

/// Which atom pursuit takes next. The codes look the same; a decoder need not know.
struct Selection {
  enum class Rule { kOmp, kOls };
  Rule rule = Rule::kOmp;
  /// OLS among the atoms whose |d.r| is, or at an earlier pick of the signal was, one of the this
  /// many largest (atoms already taken do not count; of equals the lower indices); 0: among all.
  /// Where atoms are few, all are candidates (candidates_among).
  int candidates = 0;

  /// "omp", "ols" or "ols-N" with N in 4..64. @throws InvalidArgument naming the text otherwise.
  static Selection from(const std::string& text);
  std::string name() const;

  /// Candidates among so many atoms: 0 (all of them) up to 64 * candidates atoms, where finding the
  /// best takes longer than to weigh all. So "ols-16" is "ols" up to 1,024 atoms (a cache's own
  /// atoms count).
  int candidates_among(std::int64_t num_atoms) const;
};

/// When to stop adding atoms to a signal x with residual r: the first bound met wins.
struct EncodeOptions {
  int max_atoms = 8;  ///< the paper's s: 1 <= max_atoms <= min(dim, num_atoms)
  float relative_tolerance =
      0.0f;  ///< stop once |r| <= relative_tolerance * |x|; 0 asks for max_atoms
  Selection selection;
  int threads = 0;  ///< 0: all the machine has. The result does not depend on it.
  /// Where to encode: cpu, cuda or cuda:N. On a GPU arrays are copied in and out in pieces that fit
  /// there; docs/gpu.md says where its codes may differ.
  std::string device = "cpu";
};

/// What a batch encodes to, for P dictionaries side by side and B signals each. Fixed stride:
/// signal (p, b) owns slots [(p * B + b) * max_atoms, ... + counts[p * B + b]).
struct SparseCodes {
  int num_dictionaries = 0;
  std::int64_t num_signals = 0;  ///< B, per dictionary
  int max_atoms = 0;
  std::vector<std::int32_t> indices;  ///< [P, B, max_atoms], -1 in unused slots
  std::vector<float> weights;         ///< [P, B, max_atoms], 0 in unused slots
  std::vector<std::int32_t> counts;   ///< [P, B], 0..max_atoms
  std::vector<float> residual_norms;  ///< [P, B], L2; NaN for a signal that holds NaN or Inf
  std::vector<float>
      curve;  ///< empty, or [P, B, max_atoms]: |r| after each atom; the last value repeats
};

/// Sparse coding by matching pursuit with re-fitted weights (OMP and its OLS form), fp32, on the
/// CPU or a GPU.
///
/// An all-zero signal gets no atoms. A signal with a NaN or Inf gets no atoms and a NaN residual
/// norm; its neighbours are unaffected. No index is chosen twice; a signal that lies in the span of
/// fewer atoms gets fewer. Ties go to the lower index. The result does not depend on the thread
/// count nor, on the CPU, on how signals are split into batches.
///
/// One encoder owns scratch memory that grows to the largest batch seen and serves one caller at a
/// time.
class Encoder {
 public:
  /// @throws InvalidArgument naming the option, its value and its bound; also if the environment
  /// variable LEXICO_CPU names no speed level of this CPU, or there is no such device.
  explicit Encoder(const EncodeOptions& options);
  ~Encoder();
  Encoder(Encoder&&) noexcept;
  Encoder& operator=(Encoder&&) noexcept;

  const EncodeOptions& options() const;

  /// On a GPU: works in the scratch memory of `other`, which is of the same device, so both serve
  /// one caller at a time together. Each keeps its atoms there.
  void share_scratch(const Encoder& other);

  /// Takes the atoms to encode with; call it again whenever they change. The memory must stay valid
  /// and unchanged until the next call.
  /// @param atoms  [num_dictionaries, num_atoms, dim], rows of unit L2 norm.
  /// @throws InvalidArgument if max_atoms > min(dim, num_atoms), or a size is < 1.
  void set_atoms(const float* atoms, int num_dictionaries, int num_atoms, int dim);

  /// @param signals     [num_dictionaries, num_signals, dim]; num_signals may be 0.
  /// @param codes       overwritten; its memory is reused when it fits.
  /// @param with_curve  also fill `codes.curve`.
  /// @param budgets     nullptr, or [num_dictionaries, num_signals]: at most this many atoms for
  /// the signal (more than
  ///                    max_atoms means max_atoms, less than 0 none).
  /// @throws InvalidArgument if there are no atoms yet or num_signals < 0; ResourceError if scratch
  /// cannot be had.
  void encode(const float* signals,
              std::int64_t num_signals,
              SparseCodes& codes,
              bool with_curve = false,
              const std::int32_t* budgets = nullptr);

  /// Scratch that one call with `num_signals` needs with these atoms, in bytes (beyond atoms,
  /// signals and codes). Small batches need less: a Gram matrix is made once the signals encoded
  /// since set_atoms pay for it. On a GPU all device memory that it wants, of which it can do with
  /// less.
  std::size_t workspace_bytes(std::int64_t num_signals) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// The speed level the last encoder made runs at, the best this CPU has unless LEXICO_CPU names
/// another; and all that this CPU has, worst first: "generic", "avx2", "avx512", "avx512vnni",
/// "amx". Codes have the same accuracy at each.
std::string cpu_level();
std::vector<std::string> cpu_levels();

}  // namespace lexico
