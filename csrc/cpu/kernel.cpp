// The CPU kernels of one instruction set: compiled once for each line of the ISA table in
// CMakeLists.txt, with FUSEDOPT_ISA and that set's flags. Everything but the table has internal
// linkage, and nothing here has a static initialiser: otherwise the linker could keep this file's
// copy of a shared inline function, and a machine without the instruction set would run it.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "engine/ahead.h"
#include "engine/kernels.h"

#define FUSEDOPT_FN [[gnu::always_inline]] inline

namespace fusedopt {
namespace FUSEDOPT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#include "cpu/norms.h"
#include "cpu/registers.h"
#include "cpu/tiles.h"
#include "rules/list.h"

// ---- one piece
// -----------------------------------------------------------------------------------

template <class T>
constexpr DType kComputeType = std::is_same_v<T, double> ? DType::f64 : DType::f32;

template <class T>
T round_scalar(double scalar) {
  const T rounded = static_cast<T>(scalar);
  return rounded != rounded ? std::numeric_limits<T>::quiet_NaN() : rounded;  // no payload
}

template <class T, class Rule>
Rule fold(const double* scalars) {
  T rounded[sizeof(Rule) / sizeof(T)];
  for (T& scalar : rounded) scalar = round_scalar<T>(*scalars++);
  Rule rule;
  std::memcpy(&rule, rounded, sizeof(rule));
  return rule;
}

template <class V, class Stored, class T, class Rule>
void update_in_place(const Rule& rule, T grad_scale, const Stream* streams, int64_t first,
                     int64_t count, const void* const* next) {
  Stored* arrays[kFirstState + Rule::kStates];
  for (int s = 0; s < kFirstState + Rule::kStates; ++s) {
    arrays[s] = reinterpret_cast<Stored*>(streams[s].data) + first;
  }
  apply<V, true>(rule, grad_scale, arrays, count, next);
}

template <class T, class Rule>
void update(const double* scalars, double grad_scale, const Stream* streams, const Origin& origin,
            int64_t first, int64_t count, const void* const* next) {
  const Rule rule = fold<T, Rule>(scalars);
  const T scale = round_scalar<T>(grad_scale);
  const auto all_are = [streams](DType dtype) {
    for (int s = 0; s < kFirstState + Rule::kStates; ++s) {
      if (touches<Rule>(s) && streams[s].dtype != dtype) return false;
    }
    return true;
  };
  if (all_are(kComputeType<T>)) {
    return update_in_place<Vec<T>, T>(rule, scale, streams, first, count, next);
  }
  // Converted in registers, 16-bit elements take two thirds of the time that they take in tiles, in
  // cache and out of it.
  if constexpr (std::is_same_v<T, float>) {
    if (all_are(DType::bf16)) {
      return update_in_place<BFloat16Vec, BFloat16>(rule, scale, streams, first, count, next);
    }
#if defined(__F16C__)
    if (all_are(DType::f16)) {
      return update_in_place<Vec<float>, Float16>(rule, scale, streams, first, count, next);
    }
#endif
    const int64_t end = first + count;
    first = update_if_usual(rule, scale, streams, origin, first, count, next);
    count = end - first;
  }
  update_in_tiles(rule, scale, streams, origin, first, count, next);
}

// ---- the table ----------------------------------------------------------------------------------

template <class F32, class F64>
struct Make {
  static constexpr Rule entry(const char* name, int flags) {
    constexpr int kScalars = sizeof(F32) / sizeof(float);
    static_assert(F32::kStates <= kMaxStates, "raise kMaxStates");
    return {name,       flags,         F32::kStates,       kScalars,
            kKept<F32>, kIgnored<F32>, update<float, F32>, update<double, F64>};
  }
};

constexpr auto kTable = make_rule_table<Rule, Make>();

#define FUSEDOPT_STRING(x) #x
#define FUSEDOPT_NAME(isa) FUSEDOPT_STRING(isa)

}  // namespace

extern const Kernels kKernels;
constexpr Kernels kKernels = {
    FUSEDOPT_NAME(FUSEDOPT_ISA),
    kVectorBytes,
    kTable.entries,
    kTable.count,
    {norm_blocks<SumOfSizes>, norm_blocks<SumOfSquares>, norm_blocks<Largest>}};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
