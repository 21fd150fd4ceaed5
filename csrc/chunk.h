// Cutting jobs into pieces of equal bytes, and walking the streams that are not plain arrays.
#pragma once

#include "engine.h"

namespace fusedopt {

struct Piece {
  const Job* job;
  int64_t first, count;
  int64_t block;  // the number of its first block, counted over all pieces
};

// Small enough to spread a large tensor over all threads, large enough that a call costs nothing.
constexpr int64_t kPieceBytes = 256 * 1024;

// A multiple of the block of a norm, so that blocks begin at the same elements for any piece size.
inline int64_t piece_elements(const Job& job) {
  return kPieceBytes / job.bytes_per_element / kNormBlock * kNormBlock;
}

// All jobs in pieces, and the pieces in consecutive shares of about equal bytes: share i is
// [begin[i], begin[i + 1]).
struct Cut {
  std::vector<Piece> pieces;
  std::vector<size_t> begin;
  int64_t blocks = 0;  // of a norm, over all pieces
};

inline Cut cut(const std::vector<Job>& jobs, int shares) {
  Cut cut;
  cut.pieces.reserve(jobs.size());
  int64_t bytes = 0;
  for (const Job& job : jobs) {
    const int64_t length = piece_elements(job);
    for (int64_t first = 0; first < job.numel; first += length) {
      const int64_t count = job.numel - first < length ? job.numel - first : length;
      cut.pieces.push_back({&job, first, count, cut.blocks});
      cut.blocks += (count + kNormBlock - 1) / kNormBlock;
    }
    bytes += job.numel * job.bytes_per_element;
  }
  // A piece belongs to the share in whose equal part of the bytes it begins.
  int64_t before = 0;
  for (size_t i = 0; i < cut.pieces.size(); ++i) {
    while (before >= bytes / shares * static_cast<int64_t>(cut.begin.size()) &&
           cut.begin.size() < static_cast<size_t>(shares)) {
      cut.begin.push_back(i);
    }
    before += cut.pieces[i].count * cut.pieces[i].job->bytes_per_element;
  }
  cut.begin.resize(static_cast<size_t>(shares) + 1, cut.pieces.size());
  return cut;
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
