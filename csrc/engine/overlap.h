// Whether jobs share memory. Two parameters may be views of one storage, or a gradient be another
// parameter: the updates then have to happen in their order, as they do one by one.
#pragma once

#include <vector>

#include "engine/job.h"

namespace fusedopt {

struct Extent {
  const char *begin, *end;
};

// Remembers where it has found nothing shared: from step to step gradients move, while parameters
// and states stay where they are.
class Overlaps {
 public:
  // Whether something that a job writes overlaps something that any stream reads or writes.
  bool any(const std::vector<Job>& jobs);

 private:
  bool has_seen(const std::vector<Job>& jobs);
  void sort_written(const std::vector<Job>& jobs);

  std::vector<Extent> seen_;    // what jobs write, one after the other
  bool apart_ = false;          // whether none of that overlaps; then
  std::vector<Extent> sorted_;  // it in the order of memory,
  std::vector<Extent> runs_;    // and the same, with what lies close together in one
};

}  // namespace fusedopt
