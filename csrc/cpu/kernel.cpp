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

#include "numeric/codec.h"
#include "numeric/vec.h"
#include "rules/list.h"

// ---- one rule over arrays that V can load -------------------------------------------------------

// Asks for what lies a fixed distance after `at`, in the array of n elements or, past its end, in
// the one that comes next.
template <class Stored>
FUSEDOPT_FN void prefetch(const Stored* from, int64_t at, int64_t n, const void* next) {
  const int64_t ahead = at + kPrefetchBytes / int64_t{sizeof(Stored)};
  const void* const begin = ahead < n ? from : next;
  // Often it is past the end of what comes next, too; a number, unlike a pointer, may be.
  const auto line = reinterpret_cast<uintptr_t>(begin) +
                    static_cast<uintptr_t>(ahead < n ? ahead : ahead - n) * sizeof(Stored);
  __builtin_prefetch(reinterpret_cast<const void*>(line));
}

// The same for a tile of `bytes` at `from`, in an array of which `left` are left from there on.
FUSEDOPT_FN void prefetch_tile(const char* from, int64_t bytes, int64_t left, const void* next) {
  for (int64_t at = 0; at < bytes; at += 64) prefetch(from, at, left, next);
}

template <class V, class T, class Stored, class Rule>
FUSEDOPT_FN void apply(const Rule& rule, T grad_scale, Stored* const* streams, int64_t n,
                       const void* const* next) {
  // The tail is the same text on a partial vector.
  const auto step = [&](auto load, auto store) __attribute__((always_inline)) {
    V p = load(streams[kParam]);
    V g = load(streams[kGrad]) * grad_scale;
    V state[kMaxStates];
    for (int s = 0; s < Rule::kStates; ++s) state[s] = load(streams[kFirstState + s]);
    rule(p, g, state);
    store(p, streams[kParam]);
    for (int s = 0; s < Rule::kStates; ++s) store(state[s], streams[kFirstState + s]);
  };
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) {
    for (int s = 0; s < kFirstState + Rule::kStates; ++s) prefetch(streams[s], i, n, next[s]);
    step([i](const Stored* x) { return V::load(x + i); }, [i](V v, Stored* x) { v.store(x + i); });
  }
  if (i < n) {
    step([i, n](const Stored* x) { return load_partial<V>(x + i, n - i); },
         [i, n](V v, Stored* x) { store_partial(v, x + i, n - i); });
  }
}

// ---- streams as they are stored -----------------------------------------------------------------

// Small enough that five scratch tiles stay in the first-level cache.
constexpr int64_t kTile = 256;

template <class T>
constexpr DType kComputeType = std::is_same_v<T, double> ? DType::f64 : DType::f32;

// Elements [first, first + n) of a stream that goes on to element `end`, and then at `next`.
template <class T>
void decode_tile(Stream from, int64_t first, T* to, int64_t n, int64_t end, const void* next) {
  const int64_t size = kItemSize[static_cast<int>(from.dtype)];
  const char* data = from.data + first * size;
  prefetch_tile(data, n * size, (end - first) * size, next);
  switch (from.dtype) {
    case DType::f32: return decode_all<float>(data, to, n);
    case DType::f64: return decode_all<double>(data, to, n);
    case DType::bf16: return decode_all<BFloat16>(data, to, n);
    case DType::f16: return decode_all<Float16>(data, to, n);
  }
}

template <class T>
void encode_tile(const T* from, Stream to, int64_t first, int64_t n) {
  char* data = to.data + first * kItemSize[static_cast<int>(to.dtype)];
  switch (to.dtype) {
    case DType::f32: return encode_all<float>(from, data, n);
    case DType::f64: return encode_all<double>(from, data, n);
    case DType::bf16: return encode_all<BFloat16>(from, data, n);
    case DType::f16: return encode_all<Float16>(from, data, n);
  }
}

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
  apply<V>(rule, grad_scale, arrays, count, next);
}

// Any mixture of dtypes: each stream goes through a tile of scratch in compute precision.
template <class T, class Rule>
void update_in_tiles(const Rule& rule, T grad_scale, const Stream* streams, int64_t first,
                     int64_t count, const void* const* next) {
  constexpr int kStreams = kFirstState + Rule::kStates;
  T scratch[kStreams][kTile];
  T* arrays[kStreams];
  const void* in_cache[kStreams];
  for (int s = 0; s < kStreams; ++s) in_cache[s] = arrays[s] = scratch[s];
  for (const int64_t end = first + count; first < end; first += kTile) {
    const int64_t n = end - first < kTile ? end - first : kTile;
    for (int s = 0; s < kStreams; ++s) {
      decode_tile(streams[s], first, scratch[s], n, end, next[s]);
    }
    apply<Vec<T>>(rule, grad_scale, arrays, n, in_cache);
    for (int s = 0; s < kStreams; ++s) {
      if (s != kGrad) encode_tile(scratch[s], streams[s], first, n);
    }
  }
}

template <class T, class Rule>
void update(const double* scalars, double grad_scale, const Stream* streams, int64_t first,
            int64_t count, const void* const* next) {
  const Rule rule = fold<T, Rule>(scalars);
  const T scale = round_scalar<T>(grad_scale);
  const auto all_are = [streams](DType dtype) {
    for (int s = 0; s < kFirstState + Rule::kStates; ++s) {
      if (streams[s].dtype != dtype) return false;
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
  }
  update_in_tiles(rule, scale, streams, first, count, next);
}

// ---- norms --------------------------------------------------------------------------------------

// Element i of a block is added to lane i % kNormLanes, whatever a register holds.
constexpr int kNormLanes = 16;

struct SumOfSizes {
  static Vec<double> add(Vec<double> sum, Vec<double> x) { return sum + abs(x); }
  static double join(double a, double b) { return a + b; }
};
struct SumOfSquares {
  static Vec<double> add(Vec<double> sum, Vec<double> x) { return sum + x * x; }
  static double join(double a, double b) { return a + b; }
};
struct Largest {
  static Vec<double> add(Vec<double> largest, Vec<double> x) { return max(largest, abs(x)); }
  static double join(double a, double b) { return a > b || a != a ? a : b; }
};

template <class Sum, class T>
double norm_block(const T* x, int64_t n, const void* next) {
  constexpr int kVectors = kNormLanes / Vec<double>::kLanes;
  Vec<double> sums[kVectors] = {};
  const auto add = [&](const T* from) __attribute__((always_inline)) {
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = Sum::add(sums[v], load_as_double(from + v * Vec<double>::kLanes));
    }
  };
  int64_t i = 0;
  const auto add_until = [&](int64_t end, uintptr_t ahead) __attribute__((always_inline)) {
    for (; i + kNormLanes <= end; i += kNormLanes) {
      const uintptr_t line = ahead + static_cast<uintptr_t>(i) * sizeof(T);
      __builtin_prefetch(reinterpret_cast<const void*>(line), 0, /*locality=*/2);
      add(x + i);
    }
  };
  add_until(n - kNormPrefetchBytes / int64_t{sizeof(T)},
            reinterpret_cast<uintptr_t>(x) + kNormPrefetchBytes);
  add_until(n, reinterpret_cast<uintptr_t>(next) - static_cast<uintptr_t>(i) * sizeof(T));
  T padded[kNormLanes] = {};
  std::memcpy(padded, x + i, static_cast<size_t>(n - i) * sizeof(T));
  add(padded);
  double lanes[kNormLanes];
  for (int v = 0; v < kVectors; ++v) sums[v].store(lanes + v * Vec<double>::kLanes);
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = Sum::join(lanes[l], lanes[l + half]);
  }
  return lanes[0];
}

template <class Sum>
void norm_blocks(const Stream& stream, int64_t first, int64_t count, const void* next,
                 double* blocks) {
  const auto norm_in_place = [&](auto* x, int64_t n) {
    x += first;
    return norm_block<Sum>(x, n, n < count ? x + n : next);
  };
  float decoded[kNormBlock];
  while (count > 0) {
    const int64_t n = count < kNormBlock ? count : kNormBlock;
    switch (stream.dtype) {
      case DType::f32:
        *blocks++ = norm_in_place(reinterpret_cast<const float*>(stream.data), n);
        break;
      case DType::f64:
        *blocks++ = norm_in_place(reinterpret_cast<const double*>(stream.data), n);
        break;
#if defined(__AVX2__)  // for the generic kernels, a tile takes less time
      case DType::bf16:
        *blocks++ = norm_in_place(reinterpret_cast<const BFloat16*>(stream.data), n);
        break;
#endif
      default:
        decode_tile(stream, first, decoded, n, first + count, next);
        *blocks++ = norm_block<Sum>(decoded, n, decoded);
    }
    first += n;
    count -= n;
  }
}

// ---- the table ----------------------------------------------------------------------------------

template <class F32, class F64>
struct Make {
  static constexpr Rule entry(const char* name, int flags) {
    constexpr int kScalars = sizeof(F32) / sizeof(float);
    static_assert(F32::kStates <= kMaxStates, "raise kMaxStates");
    return {name, flags, F32::kStates, kScalars, update<float, F32>, update<double, F64>};
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
