// Whether jobs share memory. Two parameters may be views of one storage, or a gradient be another
// parameter: the updates then have to happen in their order, as they do one by one.
#pragma once

#include <algorithm>

#include "engine.h"

namespace fusedopt {

struct Extent {
  const char *begin, *end;
};

inline Extent extent(const Job& job, int s) {
  int64_t last = job.numel - 1;
  if (job.layout) {
    last = 0;
    for (const Dim& dim : *job.layout) last += (dim.size - 1) * dim.stride[s];
  }
  const char* begin = job.streams[s].data;
  const int64_t size = kItemSize[static_cast<int>(job.streams[s].dtype)];
  return {begin, begin + (last + 1) * size};
}

// Sorts extents that often are in order, or in reverse order, already.
inline void sort_extents(std::vector<Extent>* extents) {
  const auto before = [](const Extent& a, const Extent& b) { return a.begin < b.begin; };
  if (std::is_sorted(extents->begin(), extents->end(), before)) return;
  std::reverse(extents->begin(), extents->end());
  if (std::is_sorted(extents->begin(), extents->end(), before)) return;
  std::sort(extents->begin(), extents->end(), before);
}

// Whether something that a job writes overlaps something that any stream reads or writes.
inline bool any_overlap(const std::vector<Job>& jobs) {
  // One list for each stream, since allocators tend to hand out equal things in order.
  constexpr int kLists = kMaxStreams + 1;
  std::vector<Extent> lists[kLists];
  for (const Job& job : jobs) {
    if (job.numel == 0) continue;
    for (int s = 0; s < job.stream_count; ++s) {
      // A gradient that is the parameter itself is read before it is written, element by element.
      if (s == kGrad && job.streams[s].data == job.streams[kParam].data) continue;
      if (lists[s].empty()) lists[s].reserve(jobs.size());
      lists[s].push_back(extent(job, s));
    }
    for (int s = kFirstState; job.then && s < job.then->stream_count; ++s) {
      lists[kMaxStreams].push_back(extent(*job.then, s));
    }
  }
  struct Rest {
    const Extent *next, *end;
    bool written;
  };
  Rest rests[kLists];
  int count = 0;
  for (int s = 0; s < kLists; ++s) {
    if (lists[s].empty()) continue;
    sort_extents(&lists[s]);
    rests[count++] = {lists[s].data(), lists[s].data() + lists[s].size(), s != kGrad};
  }
  const char *written_end = nullptr, *read_end = nullptr;
  while (count > 0) {
    // From the list that begins first, all that begins before the others.
    Rest* first = rests;
    for (int i = 1; i < count; ++i) {
      if (rests[i].next->begin < first->next->begin) first = &rests[i];
    }
    const Extent* others = nullptr;
    for (int i = 0; i < count; ++i) {
      const Extent* const other = rests[i].next;
      if (&rests[i] != first && (!others || other->begin < others->begin)) others = other;
    }
    do {
      const Extent& e = *first->next++;
      if (e.begin < written_end || (first->written && e.begin < read_end)) return true;
      const char*& end = first->written ? written_end : read_end;
      end = std::max(end, e.end);
    } while (first->next != first->end && (!others || first->next->begin < others->begin));
    if (first->next == first->end) *first = rests[--count];
  }
  return false;
}

}  // namespace fusedopt
