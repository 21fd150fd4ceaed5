// What one param group asks for.
#pragma once

#include <list>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "step/asked.h"

namespace fusedopt {

// What a group does in one step number: a variant of its rule, with scalars.
struct Folded {
  double t;
  const Rule& rule;
  std::vector<double> scalars;
};

// fusedopt._engine.Group, read once a step.
class Group {
  Fields fields_;

 public:
  Group(py::handle source, int number, bool is_only, const Kernels& kernels);

  // In the order of its fields:
  const py::tuple params{fields_.next<py::object>()};  // a copy: Python code may change the list
  const py::object names = fields_.next<py::object>();
  const bool has_kernel = fields_.next<bool>();
  const std::string rule = fields_.next<std::string>();
  const int flags = fields_.next<int>();
  const py::tuple states = fields_.next<py::tuple>();  // of the rule, and then the slow weights,
  const bool has_slow = fields_.next<bool>();          // if there are any
  const double alpha =
      fields_.next<double>();  // of Lookahead; 0 if this step moves no slow weights
  const bool counts_steps = fields_.next<bool>();
  const bool counts_on_device = fields_.next<bool>();  // where the parameters are
  const bool starts_unlike = fields_.next<bool>();     // a first step is not from zeros
  const double grad_scale = fields_.next<double>();
  const py::object lr = fields_.next<py::object>();  // a number, or a tensor on their device
  const py::object fold_in_step = fields_.next<py::object>();
  const py::object create_state = fields_.next<py::object>();
  const py::object move_count = fields_.next<py::object>();
  const py::tuple has_no_sign = fields_.next<py::tuple>();  // each of the rule's states, or not
  const bool has_master = fields_.next<bool>();        // 16-bit parameters have a second array,
  const bool rounds_at_random = fields_.next<bool>();  // or else are rounded at random
  const bool may_be_coded = fields_.next<bool>();      // states may be in 8 bits
  const py::object first_element = fields_.next<py::object>();

  const int number;    // among the groups of this step,
  const bool is_only;  // of which there may be no other
  // Whether streams may need more than one tensor each.
  const bool in_parts = has_master || rounds_at_random || may_be_coded;
  const size_t rule_states = states.size() - has_slow;
  const bool has_state = counts_steps || states.size() != 0 || in_parts;

  bool has_number_as_lr() const { return PyFloat_Check(lr.ptr()); }
  bool moves_slow() const { return has_slow && alpha != 0; }
  PyObject* param(Py_ssize_t index) const { return PyTuple_GET_ITEM(params.ptr(), index); }
  py::handle state(size_t s) const {  // its key
    return PyTuple_GET_ITEM(states.ptr(), static_cast<Py_ssize_t>(s));
  }
  PyObject* scale_key(size_t s);  // of that state's scales, if it is in 8 bits; interned

  // What it does in step t. Asks Python, but for the first t and the last one that it was asked of.
  const Folded* fold(double t);
  // Asks for the t of most parameters before any is read, while nothing has to be held yet,
  void expect(double t);
  // so that threads find it without Python; null for any other t.
  const Folded* expected(double t) const {
    return !folded_.empty() && folded_.front().t == t ? &folded_.front() : nullptr;
  }
  double expected_t() const { return folded_.empty() ? 1 : folded_.front().t; }

 private:
  const Kernels& kernels_;
  PyObject* scale_keys_[kMaxStates] = {};  // as far as they were asked for
  std::list<Folded> folded_;
};

}  // namespace fusedopt
