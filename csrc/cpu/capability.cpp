// Chooses the instruction-set unit once per process. Compiled for the baseline.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "capability.h"

namespace vitkern {

namespace {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
constexpr bool kUnits = true;
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
constexpr bool kUnits = false;  // clang ignores the target pragma: only the baseline unit is what its name says
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
#endif

struct Unit {
  const char* name;
  const Kernels* table;
  bool (*runs_here)();
};
bool always() { return true; }
const Unit kUnitsBestFirst[] = {
    {"avx512_bf16", &kernels_avx512_bf16, has_avx512_bf16},
    {"avx512", &kernels_avx512, has_avx512},
    {"avx2", &kernels_avx2, has_avx2},
    {"default", &kernels_baseline, always},
};

const Unit* chosen = nullptr;

const Unit* find(const std::string& name) {
  std::string have;
  for (const Unit& u : kUnitsBestFirst) {
    if (name == u.name && u.runs_here()) return &u;
    if (u.runs_here()) have += have.empty() ? u.name : std::string(", ") + u.name;
  }
  throw std::runtime_error("VITKERN_CPU_CAPABILITY must be a set this machine has (" + have + "), got '" + name + "'" +
                           (kUnits ? "" : "; this build has the baseline only"));
}

const Unit& unit() {
  if (!chosen) {
    const char* wanted = std::getenv("VITKERN_CPU_CAPABILITY");
    if (wanted && *wanted) {
      chosen = find(wanted);
    } else {
      for (const Unit& u : kUnitsBestFirst)
        if (!chosen && u.runs_here()) chosen = &u;
    }
  }
  return *chosen;
}

}  // namespace

const Kernels& kernels() { return *unit().table; }
std::string capability() { return unit().name; }
void set_capability(const std::string& name) { chosen = find(name); }
std::string capabilities() {
  std::string all;
  for (const Unit& u : kUnitsBestFirst)
    if (u.runs_here()) all += all.empty() ? u.name : std::string(" ") + u.name;
  return all;
}

}  // namespace vitkern
