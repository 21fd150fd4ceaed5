// One rule over arrays that a vector type can load. Included inside the ISA's namespace.
#pragma once

#include "cpu/sums.h"
#include "numeric/vec.h"
#include "rules/streams.h"

// What lies a fixed distance after element `at` in the array of n elements or, past its end, in the
// one that comes next. Often that is past the end of what comes next, too: a number, unlike a
// pointer, may be.
template <class Stored>
FUSEDOPT_FN uintptr_t ahead_of(const Stored* from, int64_t at, int64_t n, const void* next,
                               int64_t distance) {
  const int64_t there = at + distance;
  const void* const begin = there < n ? from : next;
  return reinterpret_cast<uintptr_t>(begin) +
         static_cast<uintptr_t>(there < n ? there : there - n) * sizeof(Stored);
}

FUSEDOPT_FN void prefetch(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address));
}

// How many arrays an update walks through.
template <class Rule>
constexpr int arrays_of() {
  int arrays = 0;
  for (int s = 0; s < kFirstState + Rule::kStates; ++s) arrays += touches<Rule>(s);
  return arrays;
}

// kAhead: ask for memory ahead; otherwise, all is in cache. kAdds: add what changes to `to`.
template <class V, bool kAhead, bool kAdds = false, class T, class Stored, class Rule>
FUSEDOPT_FN void apply(const Rule& given, T grad_scale, Stored* const* streams, int64_t n,
                       const void* const* next, [[maybe_unused]] ChangeLanes* to = nullptr) {
  const Rule rule = given;  // which nothing stored can change
  // The tail is the same text on a partial vector.
  const auto step = [&](auto load, auto store, auto add) __attribute__((always_inline)) {
    const auto read = [&](int s) __attribute__((always_inline)) {
      return loads<Rule>(s) ? load(streams[s]) : V{};
    };
    V p = read(kParam);
    const V before = p;
    V g = read(kGrad) * grad_scale;
    V state[kMaxStates];
    for (int s = 0; s < Rule::kStates; ++s) state[s] = read(kFirstState + s);
    rule(p, g, state);
    if (stores<Rule>(kParam)) store(p, streams[kParam]);
    for (int s = 0; s < Rule::kStates; ++s) {
      if (stores<Rule>(kFirstState + s)) store(state[s], streams[kFirstState + s]);
    }
    add(p, before);
  };
  const auto step_at = [&](int64_t i, auto add) __attribute__((always_inline)) {
    step([i](const Stored* x) { return V::load(x + i); }, [i](V v, Stored* x) { v.store(x + i); },
         add);
  };
  const auto nothing = [](auto&&...) {};
  // Where the line of memory ahead is, is found once. With each vector it is asked for: only once,
  // a step out of cache took 3 to 5 % longer. Without a gradient, a rule follows another one on the
  // same elements, which asks for nothing of what only this one has: that is asked for here while
  // this one runs over the elements before.
  const int64_t distance =
      !kAhead ? 0
      : loads<Rule>(kGrad)
          ? bytes_ahead(arrays_of<Rule>(), n * int64_t{sizeof(Stored)}) / int64_t{sizeof(Stored)}
          : n;
  constexpr int kVectors = kAhead ? 64 / (V::kLanes * static_cast<int>(sizeof(Stored))) : 1;
  constexpr int kLine = kVectors * V::kLanes;
  const auto step_line_at = [&](int64_t i, auto add) __attribute__((always_inline)) {
    uintptr_t lines[kMaxStreams];
    for (int s = 0; kAhead && s < kFirstState + Rule::kStates; ++s) {
      lines[s] = ahead_of(streams[s], i, n, next[s], distance);
    }
    for (int k = 0; k < kVectors; ++k) {
      for (int s = 0; kAhead && s < kFirstState + Rule::kStates; ++s) {
        if (touches<Rule>(s)) prefetch(lines[s]);
      }
      step_at(i + k * V::kLanes, [&](V p, V before) { add(k, p, before); });
    }
  };
  int64_t i = 0;
  if constexpr (kAdds) {
    while (i + kLine <= n) {
      const int64_t end = std::min(i + kChangeRun, n);
      RunSums sums;
      for (; i + kLine <= end; i += kLine) {
        step_line_at(i, [&](int k, V p, V before) { sums.add(k, p, p - before); });
      }
      sums.end_run(to);
    }
  } else {
    for (; i + kLine <= n; i += kLine) step_line_at(i, nothing);
  }
  const int64_t last = i;
  [[maybe_unused]] float kept[kChangeLanes];
  if constexpr (kAdds) {
    static_assert(kLine == kChangeLanes);
    std::memcpy(kept, streams[kParam] + i, static_cast<size_t>(n - i) * sizeof(float));
  }
  for (; kVectors > 1 && i + V::kLanes <= n; i += V::kLanes) step_at(i, nothing);
  if (i < n) {
    step([i, n](const Stored* x) { return load_partial<V>(x + i, n - i); },
         [i, n](V v, Stored* x) { store_partial(v, x + i, n - i); }, nothing);
  }
  if constexpr (kAdds) {
    if (last < n) add_last(streams[kParam] + last, kept, n - last, to);
  }
}
