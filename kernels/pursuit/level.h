#pragma once
// What the driver (pursuit_cpu.cpp) and the instruction set levels (level_*.cpp) agree on. Plain
// structs only: a level's translation unit is compiled for CPUs that others may not have, so
// nothing inline may be shared with it.
#include <cstddef>
#include <cstdint>

namespace lexico::kernels::cpu {

constexpr int kPanel = 64;  // packed atoms come in panels of this many; num_atoms is padded to it

struct PursuitShape {
  int num_atoms, padded_atoms;  // padded with zero atoms to a multiple of kPanel
  int dim, padded_dim;          // padded with zeros to a multiple of 16
  int max_atoms;
  bool ols;
  int candidates;
  float relative_tolerance;
  bool gram;
  int block;  // signals at a time
};

// One dictionary as the levels want it.
struct PreparedAtoms {
  const float* rows;  // [num_atoms, padded_dim]: the caller's atoms, or a zero padded copy
  void* panels;       // packed for correlating, kPanel atoms at a time
  float* norms2;      // [padded_atoms]: |d|^2
  void* gram;         // [num_atoms, padded_atoms], or nullptr
};

struct PursuitBlock {
  int num_signals;
  const float* signals;         // [num_signals, dim]
  const std::int32_t* budgets;  // or nullptr
  std::int32_t* indices;
  float* weights;
  std::int32_t* counts;
  float* residual_norms;
  float* curve;  // or nullptr
};

struct PursuitLevel {
  const char* name;
  int signal_tile;         // signals a correlation tile takes; blocks are multiples of it
  bool correlate_is_fast;  // the Gram form never pays
  std::size_t (*panel_bytes)(const PursuitShape&);
  std::size_t (*gram_bytes)(const PursuitShape&);
  std::size_t (*scratch_bytes)(const PursuitShape&);  // of one thread
  // Fills panels and norms2 of the panel's atoms.
  void (*prepare_panel)(const PursuitShape&, const PreparedAtoms&, int panel);
  // Fills gram of the panel's atoms; all panels are prepared. `scratch` has kPanel * padded_dim * 4
  // bytes, padded_dim rounded up to a multiple of kPanel.
  void (*prepare_gram)(const PursuitShape&, const PreparedAtoms&, int panel, void* scratch);
  void (*encode)(const PursuitShape&, const PreparedAtoms&, const PursuitBlock&, void* scratch);
};

extern const PursuitLevel kGenericLevel;                                          // any CPU
extern const PursuitLevel kAvx2Level, kAvx512Level, kAvx512VnniLevel, kAmxLevel;  // x86-64 only

}  // namespace lexico::kernels::cpu
