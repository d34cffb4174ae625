// Which instruction set level pursuit runs at.
#include "kernels/pursuit/levels.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/common/cpu_features.h"
#include "kernels/pursuit/pursuit.h"

namespace lexico::kernels::cpu {
namespace {

const PursuitLevel* offered = nullptr;

// Worst first.
const std::vector<const PursuitLevel*>& levels_here() {
  static const std::vector<const PursuitLevel*> levels = [] {
    std::vector<const PursuitLevel*> here = {&kGenericLevel};
#if defined(__x86_64__)
    const CpuFeatures& cpu = cpu_features();
    if (cpu.avx2) here.push_back(&kAvx2Level);
    if (cpu.avx512) here.push_back(&kAvx512Level);
    if (cpu.avx512_vnni) here.push_back(&kAvx512VnniLevel);
    if (cpu.avx512_vnni && cpu.amx) here.push_back(&kAmxLevel);
#endif
    if (offered != nullptr) here.insert(here.begin(), offered);
    return here;
  }();
  return levels;
}

const std::string& names_here() {
  static const std::string names = [] {
    std::string joined;
    for (const PursuitLevel* level : levels_here()) {
      if (!joined.empty()) joined += '|';
      joined += level->name;
    }
    return joined;
  }();
  return names;
}

const PursuitLevel* find(const std::string& name) {
  for (const PursuitLevel* level : levels_here()) {
    if (name == level->name) return level;
  }
  return nullptr;
}

std::atomic<const PursuitLevel*> chosen = nullptr;

}  // namespace

void offer_level(const PursuitLevel& level) { offered = &level; }

const PursuitLevel& current_level() {
  if (chosen.load() == nullptr && !set_pursuit_level(nullptr).ok()) chosen = levels_here().back();
  return *chosen.load();
}

const char* pursuit_level() { return current_level().name; }
const char* pursuit_levels() { return names_here().c_str(); }

Status set_pursuit_level(const char* name) {
  if (name == nullptr) name = std::getenv("LEXICO_CPU");
  if (name == nullptr || *name == '\0') {
    chosen = levels_here().back();
    return {};
  }
  const PursuitLevel* level = find(name);
  if (level == nullptr) {
    constexpr std::string_view kAll[] = {"generic", "avx2", "avx512", "avx512vnni", "amx"};
    const bool known = std::find(std::begin(kAll), std::end(kAll), name) != std::end(kAll);
    thread_local std::string message;
    message = "LEXICO_CPU is '" + std::string(name) + "', " +
              (known ? "which this CPU cannot run" : "which is no speed level") +
              "; this CPU has " + names_here();
    return {1, message.c_str()};
  }
  chosen = level;
  return {};
}

}  // namespace lexico::kernels::cpu
