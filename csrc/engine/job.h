// engine/: runs jobs, which are rules and arrays, on all threads, without Python, torch or an
// instruction set's flags.
#pragma once

#include <vector>

#include "engine/kernels.h"

namespace fusedopt {

// Where elements lie in streams that cannot all be walked as one array: dimensions from the
// innermost on, strides in elements. The parameter's second array has the last stride.
constexpr int kSecond = kMaxStreams;
constexpr int kMaxArrays = kMaxStreams + 1;
struct Dim {
  int64_t size;
  int64_t stride[kMaxArrays];
};
using Layout = std::vector<Dim>;

constexpr int kMaxFollowers = 2;  // jobs that run after one, with a stream more each
constexpr int kMaxViews = kMaxStreams + kMaxFollowers;

struct Job {
  Update update = nullptr;
  unsigned keeps = 1u << kGrad, ignores = 0;  // which streams, as Rule has them
  const double* scalars = nullptr;
  double grad_scale = 1;
  int64_t numel = 0;
  int stream_count = 0;
  int64_t bytes_per_element = 0;  // of all streams together
  Stream streams[kMaxStreams];
  Origin origin;
  bool in_blocks = false;               // some stream is
  const Layout* layout = nullptr;       // null: every stream is one array of numel elements
  const Layout* grad_layout = nullptr;  // of the gradient in stride[0], in its own order
  const Job* then = nullptr;            // for the same elements of param, while they are in cache
};

}  // namespace fusedopt
