// Parallel regions: one body on several threads, and a pipeline of two stages.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fusedopt {

// The threads of a parent's pool do not exist in a forked child, and a parallel region there would
// wait for them for ever.
extern std::atomic<bool> forked;

// As many of `threads` as there can be.
inline int possible_threads(int threads) {
#if defined(_OPENMP)
  return forked ? 1 : threads;
#else
  (void)threads;
  return 1;
#endif
}

// Calls body(thread, count) on each of `count` threads: as many as were asked for, or fewer if the
// runtime grants no more.
template <class Body>
void in_parallel(int threads, Body body) {
  (void)threads;
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}

// Inside of it: waits until all threads are here, calls f on one, and lets them go on.
template <class F>
void together(F f) {
#if defined(_OPENMP)
#pragma omp barrier
#pragma omp single
#endif
  f();
}

// Calls first(begin, end) for one short range of [0, count) after the other, on this thread, and
// then second(begin, end) for each, on any thread. Neither must throw.
using OfRange = std::function<void(size_t begin, size_t end)>;
void in_pipeline(int threads, size_t count, const OfRange& first, const OfRange& second);

}  // namespace fusedopt
