// The limit that benchmarks compare with: a read-modify-write of three streams and a read of a
// fourth, the traffic of Adam, with next to no arithmetic.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "engine.h"

namespace fusedopt {

// Moves 28 * n bytes on `threads` threads, each of which walks one contiguous share, asking for
// memory as far ahead as the kernels do.
inline void stream_like_adam(float* p, const float* g, float* m, float* v, int64_t n, int threads) {
  (void)threads;
  constexpr int64_t kLine = 64 / sizeof(float);
  constexpr int64_t kAhead = kPrefetchBytes / sizeof(float);
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
  for (int64_t line = 0; line < n / kLine * kLine; line += kLine) {
    for (const float* from : {static_cast<const float*>(p), g, static_cast<const float*>(m),
                              static_cast<const float*>(v)}) {
      __builtin_prefetch(from + (line + kAhead < n ? line + kAhead : line));
    }
    for (int64_t i = line; i < line + kLine; ++i) {
      const float x = g[i];
      p[i] += x;
      m[i] += x;
      v[i] += x;
    }
  }
}

}  // namespace fusedopt
