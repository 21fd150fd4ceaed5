// What one param group asks for.
#pragma once

#include <pybind11/stl.h>

#include <list>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace fusedopt {

namespace py = pybind11;

// What a group does in one step number: a variant of its rule, with scalars.
struct Folded {
  double t;
  const Rule& rule;
  std::vector<double> scalars;
};

// fusedopt._engine.Group, read once a step.
class Group {
  template <class T>
  T get(const char* name) const {
    return py::cast<T>(source_.attr(name));
  }
  const py::handle source_;

 public:
  Group(py::handle source, int number, bool is_only, const Kernels& kernels);

  const int number;                                // among the groups of this step,
  const bool is_only;                              // of which there may be no other
  const py::tuple params{source_.attr("params")};  // a copy: Python code may change the list
  const py::object names = get<py::object>("names");
  const bool has_kernel = get<bool>("has_kernel");
  const std::string rule = get<std::string>("rule");
  const int flags = get<int>("flags");
  // Of the rule, and then the slow weights, if there are any.
  const std::vector<py::str> states = get<std::vector<py::str>>("states");
  const bool has_slow = get<bool>("has_slow");
  const double alpha = get<double>("alpha");  // of Lookahead; 0 if this step moves no slow weights
  const bool counts_steps = get<bool>("counts_steps");
  const bool counts_on_device = get<bool>("counts_on_device");  // where the parameters are
  const bool starts_unlike = get<bool>("starts_unlike");        // a first step is not from zeros
  const double grad_scale = get<double>("grad_scale");
  const py::object lr = get<py::object>("lr");  // a number, or a tensor on the parameters' device
  const py::object create_state = get<py::object>("create_state");
  const py::object move_count = get<py::object>("move_count");
  const py::tuple has_no_sign = get<py::tuple>("unsigned");  // each of the rule's states, or not
  const bool has_master = get<bool>("has_master");  // 16-bit parameters have a second array,
  const bool rounds_at_random = get<bool>("rounds_at_random");  // or else are rounded at random
  const bool may_be_coded = get<bool>("may_be_coded");          // states may be in 8 bits
  const py::object first_element = get<py::object>("first_element");

  // Whether streams may need more than one tensor each.
  bool in_parts() const { return has_master || rounds_at_random || may_be_coded; }
  bool has_state() const { return counts_steps || !states.empty() || in_parts(); }
  size_t rule_states() const { return states.size() - has_slow; }
  PyObject* param(Py_ssize_t index) const { return PyTuple_GET_ITEM(params.ptr(), index); }

  // What it does in step t. Asks Python, but for the first t and the last one that it was asked of.
  const Folded* fold(double t);
  // Asks for the t of most parameters before any is read, while nothing has to be held yet,
  void expect(double t);
  // so that threads find it without Python; null for any other t.
  const Folded* expected(double t) const {
    return !folded_.empty() && folded_.front().t == t ? &folded_.front() : nullptr;
  }

 private:
  const Kernels& kernels_;
  const py::object fold_ = get<py::object>("fold");
  std::list<Folded> folded_;
};

}  // namespace fusedopt
