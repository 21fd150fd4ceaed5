// Named tuples that Python hands to a step, read by position. By name, the fields of one group
// would take as long as a few parameters.
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

}  // namespace fusedopt
