#include "engine/parallel.h"

#include <algorithm>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fusedopt {

std::atomic<bool> forked{false};
#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
static const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Waits for a moment, and for longer if that has not helped.
static void wait(unsigned times) {
  constexpr unsigned kPatience = 1000;
  if (times > kPatience) return std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void in_pipeline(int threads, size_t count, const OfRange& first, const OfRange& second) {
  constexpr size_t kRange = 16;
  std::atomic<size_t> done{0};   // by the first stage
  std::atomic<size_t> taken{0};  // by the second
  in_parallel(possible_threads(threads), [&](int thread, int team) {
    if (thread == 0) {
      for (size_t begin = 0; begin < count; begin += kRange) {
        const size_t end = std::min(begin + kRange, count);
        first(begin, end);
        done.store(end, std::memory_order_release);
        if (team == 1) second(begin, end);
      }
      if (team == 1) return;
    }
    for (;;) {
      const size_t begin = taken.fetch_add(kRange);
      const size_t end = std::min(begin + kRange, count);
      if (begin >= count) return;
      for (unsigned i = 0; done.load(std::memory_order_acquire) < end; ++i) wait(i);
      second(begin, end);
    }
  });
}

}  // namespace fusedopt
