#include "cpu/dispatch.h"

#include <cstring>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusedopt {

// ---- the instruction sets -----------------------------------------------------------------------

// FUSEDOPT_ISAS, from CMakeLists.txt, is FUSEDOPT_EACH(name) for each line of the ISA table.
#define FUSEDOPT_EACH(isa)       \
  namespace isa {                \
  extern const Kernels kKernels; \
  }
FUSEDOPT_ISAS
#undef FUSEDOPT_EACH

#if defined(__x86_64__)
// Clang 14 does not know this name in __builtin_cpu_supports.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

static bool runs(const char* isa) {
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_f16c();
  }
  if (!std::strcmp(isa, "avx2")) {
    return __builtin_cpu_supports("avx2") && has_f16c();
  }
#endif
  (void)isa;
  return true;
}

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> available = [] {
    std::vector<const Kernels*> found;
#define FUSEDOPT_EACH(isa) \
  if (runs(#isa)) found.push_back(&isa::kKernels);
    FUSEDOPT_ISAS
#undef FUSEDOPT_EACH
    return found;
  }();
  return available;
}

const Kernels& kernels_named(const std::string& isa) {
  std::string valid;
  for (const Kernels* kernels : available_kernels()) {
    if (isa == kernels->isa) return *kernels;
    valid += std::string(valid.empty() ? "" : ", ") + kernels->isa;
  }
  throw std::runtime_error("FUSEDOPT_ISA='" + isa +
                           "' names no instruction set that this machine and this build have; "
                           "expected one of: " +
                           valid);
}

const Rule& find_rule(const Kernels& kernels, const std::string& name, int flags) {
  for (const Rule* rule = kernels.rules; rule != kernels.rules + kernels.rule_count; ++rule) {
    if (name == rule->name && rule->flags == flags) return *rule;
  }
  throw std::runtime_error("no rule '" + name + "' with flags " + std::to_string(flags));
}

}  // namespace fusedopt
