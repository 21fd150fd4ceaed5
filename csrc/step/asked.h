// What Python hands to a step: named tuples of fusedopt._engine, read by position. By name, the
// fields of one group would take as long as a few parameters.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

namespace fusedopt {

namespace py = pybind11;

// The fields of a named tuple, one after the other.
class Fields {
 public:
  explicit Fields(py::handle tuple) : tuple_(tuple.ptr()) {}

  template <class T>
  T next() {
    if (next_ >= PyTuple_GET_SIZE(tuple_)) throw std::logic_error("a named tuple lacks a field");
    return py::cast<T>(py::handle(PyTuple_GET_ITEM(tuple_, next_++)));
  }

 private:
  PyObject* const tuple_;
  Py_ssize_t next_ = 0;
};

// fusedopt._engine.Scaling, which outlives this.
class AskedScaling {
  Fields fields_;

 public:
  explicit AskedScaling(const py::tuple& source) : fields_(source) {}

  const py::handle unscale = fields_.next<py::handle>();
  const py::handle coefficient = fields_.next<py::handle>();
  const py::handle max_norm = fields_.next<py::handle>();
  const bool skip_nonfinite = fields_.next<bool>();
  const py::handle skip = fields_.next<py::handle>();

  bool clips() const { return !max_norm.is_none(); }
  bool needs_norm() const { return clips() || skip_nonfinite; }
  bool may_skip() const { return skip_nonfinite || !skip.is_none(); }
  // Whether it takes Python to know them, or a device.
  bool has_tensors() const {
    return !skip.is_none() || !PyFloat_Check(unscale.ptr()) || !PyFloat_Check(coefficient.ptr());
  }
};

}  // namespace fusedopt
