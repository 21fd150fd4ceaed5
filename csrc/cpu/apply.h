// One rule over arrays that a vector type can load. Included inside the ISA's namespace.
#pragma once

#include "numeric/vec.h"

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

// kAhead: ask for memory ahead; otherwise, all is in cache.
template <class V, bool kAhead, class T, class Stored, class Rule>
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
    for (int s = 0; kAhead && s < kFirstState + Rule::kStates; ++s) {
      prefetch(streams[s], i, n, next[s]);
    }
    step([i](const Stored* x) { return V::load(x + i); }, [i](V v, Stored* x) { v.store(x + i); });
  }
  if (i < n) {
    step([i, n](const Stored* x) { return load_partial<V>(x + i, n - i); },
         [i, n](V v, Stored* x) { store_partial(v, x + i, n - i); });
  }
}
