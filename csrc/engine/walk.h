// Walking the streams that are not plain arrays.
#pragma once

#include "engine/job.h"

namespace fusedopt {

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
    int64_t offsets[kMaxArrays] = {};
    for (size_t d = 0; d < layout.size(); ++d) {
      for (int s = 0; s < kMaxArrays; ++s) offsets[s] += index[d] * layout[d].stride[s];
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
