#include "engine/overlap.h"

#include <algorithm>

namespace fusedopt {

static Extent extent(const Job& job, int s) {
  int64_t last = job.numel - 1;
  if (job.layout) {
    last = 0;
    for (const Dim& dim : *job.layout) last += (dim.size - 1) * dim.stride[s];
  }
  const char* begin = job.streams[s].data;
  const int64_t size = item_size(job.streams[s].dtype);
  return {begin, begin + (last + 1) * size};
}

// Of a stream's second array.
static Extent second_extent(const Job& job, int s) {
  const Stream& stream = job.streams[s];
  if (has_blocks(stream.dtype)) {
    return {stream.second, stream.second + job.origin.rows.block_of(job.numel - 1) + 1};
  }
  int64_t last = job.numel - 1;
  if (job.layout) {
    last = 0;
    for (const Dim& dim : *job.layout) last += (dim.size - 1) * dim.stride[kSecond];
  }
  return {stream.second, stream.second + (last + 1) * second_size(stream.dtype)};
}

// Calls f(the list that it belongs in, extent) for all that a job writes: one list for each stream,
// since allocators tend to hand out equal things in order.
constexpr int kLists = kMaxStreams + 2;
template <class F>
static void for_each_written(const Job& job, F f) {
  if (job.numel == 0) return;
  for (int s = 0; s < job.stream_count; ++s) {
    if (s == kGrad) continue;
    f(s, extent(job, s));
    if (job.streams[s].second) f(kMaxStreams + 1, second_extent(job, s));
  }
  for (int s = kFirstState; job.then && s < job.then->stream_count; ++s) {
    f(kMaxStreams, extent(*job.then, s));
  }
}

static bool begins_before(const Extent& a, const Extent& b) { return a.begin < b.begin; }

// Sorts extents that often are in order, or in reverse order, already.
static void sort_extents(std::vector<Extent>* extents) {
  if (std::is_sorted(extents->begin(), extents->end(), begins_before)) return;
  std::reverse(extents->begin(), extents->end());
  if (std::is_sorted(extents->begin(), extents->end(), begins_before)) return;
  std::sort(extents->begin(), extents->end(), begins_before);
}

// Whether all that jobs write lies where it did the last time; takes note of it.
bool Overlaps::has_seen(const std::vector<Job>& jobs) {
  size_t count = 0;
  bool same = true;
  for (const Job& job : jobs) {
    for_each_written(job, [&](int, const Extent& e) {
      if (count == seen_.size()) seen_.push_back({});
      Extent& seen = seen_[count++];
      same = same && seen.begin == e.begin && seen.end == e.end;
      seen = e;
    });
  }
  same = same && count == seen_.size();
  seen_.resize(count);
  return same;
}

void Overlaps::sort_written(const std::vector<Job>& jobs) {
  apart_ = false;  // whatever fails below
  std::vector<Extent> lists[kLists];
  for (const Job& job : jobs) {
    for_each_written(job, [&](int list, const Extent& e) {
      if (lists[list].empty()) lists[list].reserve(jobs.size());
      lists[list].push_back(e);
    });
  }
  sorted_.clear();
  for (std::vector<Extent>& list : lists) {
    sort_extents(&list);
    const auto middle = sorted_.insert(sorted_.end(), list.begin(), list.end());
    std::inplace_merge(sorted_.begin(), middle, sorted_.end(), begins_before);
  }
  // Allocators leave some bytes between what they hand out.
  constexpr ptrdiff_t kClose = 64;
  runs_.clear();
  bool apart = true;
  for (const Extent& e : sorted_) {
    if (!runs_.empty() && e.begin <= runs_.back().end + kClose) {
      apart = apart && e.begin >= runs_.back().end;
      runs_.back().end = std::max(runs_.back().end, e.end);
    } else {
      runs_.push_back(e);
    }
  }
  apart_ = apart;
}

// Whether one of these extents, which are in order and apart, overlaps e.
static bool any_overlaps(const std::vector<Extent>& extents, const Extent& e) {
  const auto after =
      std::upper_bound(extents.begin(), extents.end(), Extent{e.end - 1, nullptr}, begins_before);
  return after != extents.begin() && (after - 1)->end > e.begin;
}

bool Overlaps::any(const std::vector<Job>& jobs) {
  if (!has_seen(jobs)) sort_written(jobs);
  return !apart_ || std::any_of(jobs.begin(), jobs.end(), [&](const Job& job) {
    if (job.numel == 0) return false;
    // A gradient that is the parameter itself is read before it is written, element by element.
    if (job.streams[kGrad].data == job.streams[kParam].data) return false;
    const Extent grad = extent(job, kGrad);
    return any_overlaps(runs_, grad) && any_overlaps(sorted_, grad);
  });
}

}  // namespace fusedopt
