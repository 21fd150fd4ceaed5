// Cutting jobs into pieces of equal bytes, and walking the streams that are not plain arrays.
#pragma once

#include "engine.h"

namespace fusedopt {

struct Piece {
  const Job* job;
  int64_t first, count;
};

// Small enough to spread a large tensor over all threads, large enough that a call costs nothing.
constexpr int64_t kPieceBytes = 256 * 1024;

inline int64_t bytes_per_element(const Job& job) {
  int64_t bytes = 0;
  for (int s = 0; s < job.stream_count; ++s) {
    bytes += kItemSize[static_cast<int>(job.streams[s].dtype)];
  }
  return bytes;
}

// A multiple of 64 elements, so that pieces of an aligned array are aligned to cache lines.
inline int64_t piece_elements(const Job& job) {
  return kPieceBytes / bytes_per_element(job) / 64 * 64;
}

inline std::vector<Piece> cut(const std::vector<Job>& jobs) {
  std::vector<Piece> pieces;
  pieces.reserve(jobs.size());
  for (const Job& job : jobs) {
    const int64_t length = piece_elements(job);
    for (int64_t first = 0; first < job.numel; first += length) {
      pieces.push_back({&job, first, job.numel - first < length ? job.numel - first : length});
    }
  }
  return pieces;
}

// Calls f(at, offsets, run) for each run along the innermost dimension that elements
// [first, first + count) of `layout` fall into: elements at, at + 1, ... of the range lie at
// offsets[s], offsets[s] + layout[0].stride[s], ... of stream s.
template <class F>
void walk(const Layout& layout, int64_t first, int64_t count, F f) {
  int64_t index[64];  // torch's limit on dimensions
  int64_t rest = first;
  for (size_t d = 0; d < layout.size(); ++d) {
    index[d] = rest % layout[d].size;
    rest /= layout[d].size;
  }
  for (int64_t at = 0; at < count;) {
    int64_t offsets[kMaxStreams] = {};
    for (size_t d = 0; d < layout.size(); ++d) {
      for (int s = 0; s < kMaxStreams; ++s) offsets[s] += index[d] * layout[d].stride[s];
    }
    const int64_t left = layout[0].size - index[0];
    const int64_t run = left < count - at ? left : count - at;
    f(at, offsets, run);
    at += run;
    index[0] += run;
    for (size_t d = 0; d + 1 < layout.size() && index[d] == layout[d].size; ++d) {
      index[d] = 0;
      ++index[d + 1];
    }
  }
}

}  // namespace fusedopt
