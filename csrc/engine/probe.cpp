#include "engine/probe.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "engine/parallel.h"

namespace fusedopt {
namespace {

constexpr int64_t kLine = kProbedLine;
constexpr int64_t kPart = 1024 * kLine;  // of the way back: see move_streams
using Four = float __attribute__((vector_size(16)));
constexpr int kFours = kProbedLine / 4;

template <bool kTemporal>
void put(Four value, Four* to) {
  if constexpr (kTemporal) {
    *to = value;
  } else {
#if defined(__x86_64__)
    _mm_stream_ps(reinterpret_cast<float*>(to), value);
#elif defined(__clang__)
    __builtin_nontemporal_store(value, to);
#else
    *to = value;
#endif
  }
}

using Move = void (*)(float* const* arrays, int64_t begin, int64_t end);

template <int kAhead, bool kTemporal, int kArrays>
void move(float* const* arrays, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLine) {
    if constexpr (kAhead > 0) {
      // As a number: it may point past the end.
      for (int a = 0; a < kArrays; ++a) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(arrays[a] + i) + kAhead;
        __builtin_prefetch(reinterpret_cast<const void*>(at));
      }
    }
    Four added[kFours];
    for (int k = 0; k < kFours; ++k) added[k] = reinterpret_cast<const Four*>(arrays[1] + i)[k];
    for (int a = 0; a < kArrays; ++a) {
      if (a == 1) continue;
      Four* const to = reinterpret_cast<Four*>(arrays[a] + i);
      for (int k = 0; k < kFours; ++k) put<kTemporal>(to[k] + added[k], to + k);
    }
  }
#if defined(__x86_64__)
  if constexpr (!kTemporal) _mm_sfence();
#endif
}

template <int kAhead>
Move choose(bool temporal, bool four) {
  if (temporal) return four ? move<kAhead, true, 4> : move<kAhead, true, 3>;
  return four ? move<kAhead, false, 4> : move<kAhead, false, 3>;
}

Move choose(int ahead, bool temporal, bool four) {
  if (ahead == 0) return choose<kProbedAhead[0]>(temporal, four);
  if (ahead == 1) return choose<kProbedAhead[1]>(temporal, four);
  if (ahead == 2) return choose<kProbedAhead[2]>(temporal, four);
  throw std::invalid_argument("no such distance");
}

std::atomic<float> kept;  // so that no compiler leaves the reading out

void read(const float* array, int64_t begin, int64_t end) {
  Four sums[kFours] = {};
  for (int64_t i = begin; i < end; i += kLine)
    for (int k = 0; k < kFours; ++k) sums[k] += reinterpret_cast<const Four*>(array + i)[k];
  float sum = 0;
  for (const Four& each : sums) sum += each[0] + each[1] + each[2] + each[3];
  kept.store(sum, std::memory_order_relaxed);
}

}  // namespace

void move_streams(const std::vector<uintptr_t>& arrays, int64_t n, bool reads_first, int ahead,
                  bool temporal, int threads) {
  const bool four = arrays.size() == 4;
  if ((arrays.size() != 3 && !four) || n % kLine != 0)
    throw std::invalid_argument("expected 3 or 4 arrays of a multiple of 16 elements");
  float* all[4] = {};
  for (size_t a = 0; a < arrays.size(); ++a) {
    if (arrays[a] % sizeof(Four) != 0) throw std::invalid_argument("expected aligned arrays");
    all[a] = reinterpret_cast<float*>(arrays[a]);
  }
  const Move some = choose(ahead, temporal, four);
  in_parallel(possible_threads(threads), [&](int thread, int team) {
    const int64_t lines = n / kLine;
    const int64_t begin = lines * thread / team * kLine, end = lines * (thread + 1) / team * kLine;
    if (!reads_first) return some(all, begin, end);
    // Backwards, as the engine goes: what was read last is still in caches.
    read(all[1], begin, end);
    for (int64_t last = end; last > begin; last -= std::min(kPart, last - begin))
      some(all, last - std::min(kPart, last - begin), last);
  });
}

}  // namespace fusedopt
