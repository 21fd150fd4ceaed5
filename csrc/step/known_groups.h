// What was found of param groups in the last step, for as long as their values stay as they are.
#pragma once

#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "step/group.h"

namespace fusedopt {

// The values of a dict at one time, but for those of params, param_names, lr and the counts of
// steps of what follows the parameters.
class Values {
 public:
  Values() = default;
  explicit Values(const py::dict& source);

  // Whether they can be compared with what the dict has later: there is nothing among them that
  // could have changed within.
  bool are_known() const { return known_; }
  // Whether a dict has the same ones now.
  bool are_those_of(const py::dict& other) const;

 private:
  bool known_ = false;
  std::vector<std::pair<py::object, py::object>> items_;  // null for a value that is left out
};

// Of one optimizer.
class KnownGroups {
 public:
  // Reads groups, and asks Python for the settings of those alone that have other values than in
  // the last call, and than the group before them.
  std::deque<Group> read(py::handle optimizer, const py::sequence& groups, const Kernels& kernels);

 private:
  struct Known {
    Values values;
    Settings settings;
  };
  Values defaults_;
  std::vector<std::shared_ptr<const Known>> known_;
};

}  // namespace fusedopt
