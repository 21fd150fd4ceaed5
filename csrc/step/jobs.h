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
bool gradient_comes_close(const View* views, int count);  // to another
// Whether two views share memory.
bool overlap(const View& a, const View& b);
// Whether two views of one shape come close otherwise than element by element.
bool overlap_out_of_step(const View& a, const View& b);

// Whether both are float64, or neither is.
inline bool have_one_precision(const View& a, const View& b) {
  return (a.dtype == DType::f64) == (b.dtype == DType::f64);
}

// How to walk streams of one shape together; empty if each is one array in the same order.
Layout common_layout(const View* views, int count);

// What a job walks, in the order of Job::streams;
void set_streams(const View* views, int count, Layouts* layouts, Job* job);
// what it applies to them, once it has them;
void set_rule(const Rule& rule, const double* scalars, Job* job);
// or a gradient alone, twice: for a norm, and for a rule that writes gradients.
void set_norm(const View& view, Layouts* layouts, Job* job);

// Blocks of states begin with the rows of the parameter's dimension 0.
Rows rows_of(const View& param);
inline bool is_half(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }
// Of streams that are stored in two arrays: gives the first one its second. False if that is none.
bool join_master(const View& second, View* param);
bool join_scales(bool has_no_sign, const View& scale, const View& param, View* state);

// Why a view cannot be walked along with the parameter, if it cannot.
enum class Fault : uint8_t { none, elsewhere, shape, overlaps_itself, negated };
inline Fault fault_of(const View& param, const View& view) {
  return view.device != param.device ? Fault::elsewhere
         : !same_shape(param, view)  ? Fault::shape
         : overlaps_itself(view)     ? Fault::overlaps_itself
         : view.negated              ? Fault::negated
                                     : Fault::none;
}

// Whether a job walks these arrays, but for the place of the gradient, and nothing else.
bool walks(const Job& job, const View* views, int count);

}  // namespace fusedopt
