// Where the statistics of a step go: a row for each parameter that is listed, on each device.
#pragma once

#include <deque>
#include <vector>

#include "engine/schedule.h"
#include "step/group.h"

namespace fusedopt {

class Watched {
 public:
  // `part`: a fusedopt._found.Part, or None if nobody asks; both outlive this.
  Watched(const py::object& part, const std::deque<Group>& groups) : part_(part) {
    if (part_.is_none()) return;
    Py_ssize_t row = 0;
    for (const Group& group : groups) {
      begins_.push_back(row);
      row += group.size();
    }
  }

  // The rows on a device; null if nobody asks. What nothing is written to is NaN.
  Sums* rows(int device) const {
    if (part_.is_none()) return nullptr;
    const py::object table = part_.attr("table")(device);
    return reinterpret_cast<Sums*>(py::cast<uintptr_t>(table.attr("data_ptr")()));
  }
  Py_ssize_t row_of(const Group& group, Py_ssize_t index) const {
    return begins_[static_cast<size_t>(group.number)] + index;
  }

 private:
  const py::object& part_;
  std::vector<Py_ssize_t> begins_;
};

}  // namespace fusedopt
