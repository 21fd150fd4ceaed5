// The limit that benchmarks compare with: a read-modify-write of three streams and a read of a
// fourth, the traffic of Adam, with next to no arithmetic.
#pragma once

#include <cstdint>

namespace fusedopt {

// Moves 28 * n bytes on `threads` threads, each of which walks one contiguous share.
inline void stream_like_adam(float* p, const float* g, float* m, float* v, int64_t n, int threads) {
  (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for simd schedule(static) num_threads(threads)
#endif
  for (int64_t i = 0; i < n; ++i) {
    const float x = g[i];
    p[i] += x;
    m[i] += x;
    v[i] += x;
  }
}

}  // namespace fusedopt
