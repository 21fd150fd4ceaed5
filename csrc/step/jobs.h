// From views of tensors to jobs: how to walk them together, and what shares memory.
#pragma once

#include <deque>

#include "engine/job.h"
#include "torch/tensors.h"

namespace fusedopt {

using Layouts = std::deque<Layout>;  // jobs point into it

// Whether two elements of the view share one memory location.
bool strided_overlaps_itself(const View& view);
inline bool overlaps_itself(const View& view) {
  return !view.contiguous && strided_overlaps_itself(view);
}

// Whether two of them may overlap, by their first and last bytes.
bool any_come_close(const View* views, int count);
// Whether two views share memory.
bool overlap(const View& a, const View& b);
// Whether two views of one shape come close otherwise than element by element.
bool overlap_out_of_step(const View& a, const View& b);

// How to walk streams of one shape together; empty if each is one array in the same order.
Layout common_layout(const View* views, int count);

// What a job walks, in the order of Job::streams;
void set_streams(const View* views, int count, Layouts* layouts, Job* job);
// what it applies to them, once it has them;
void set_rule(const Rule& rule, const double* scalars, Job* job);
// or a gradient alone, twice: for a norm, and for a rule that writes gradients.
void set_norm(const View& view, Layouts* layouts, Job* job);

// Whether both walk the same arrays, and nothing but arrays.
bool same_arrays(const Job& a, const Job& b);

}  // namespace fusedopt
