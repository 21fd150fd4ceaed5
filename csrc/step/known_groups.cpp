#include "step/known_groups.h"

#include <algorithm>
#include <cstring>

namespace fusedopt {

// ---- values -------------------------------------------------------------------------------------

// (The counts of Lookahead and EMA change in each step: what comes of them is asked for each time.)
static bool is_left_out(PyObject* key) {
  static PyObject* const keys[] = {
      PyUnicode_InternFromString("params"), PyUnicode_InternFromString("param_names"),
      PyUnicode_InternFromString("lr"), PyUnicode_InternFromString("lookahead_step"),
      PyUnicode_InternFromString("ema_step")};
  return std::any_of(std::begin(keys), std::end(keys), [&](PyObject* left_out) {
    return key == left_out || (PyUnicode_CheckExact(key) && PyUnicode_Compare(key, left_out) == 0);
  });
}

static bool never_changes(PyObject* value) {
  static PyObject* const dtype =
      py::object(py::module_::import("torch").attr("dtype")).release().ptr();
  return value == Py_None || PyFloat_CheckExact(value) || PyLong_CheckExact(value) ||
         PyBool_Check(value) || PyUnicode_CheckExact(value) ||
         reinterpret_cast<PyObject*>(Py_TYPE(value)) == dtype;
}

static bool is_list(PyObject* value) {
  return PyTuple_CheckExact(value) || PyList_CheckExact(value);
}

// What stays as the value is now; null where that cannot be told.
static py::object frozen(PyObject* value, int depth = 0) {
  constexpr int kDeepest = 8;  // a list may contain itself
  if (never_changes(value)) return py::reinterpret_borrow<py::object>(value);
  if (!is_list(value) || depth == kDeepest) return {};
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
  py::tuple all(static_cast<size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    py::object each = frozen(PySequence_Fast_GET_ITEM(value, i), depth + 1);
    if (!each) return {};
    PyTuple_SET_ITEM(all.ptr(), i, each.release().ptr());
  }
  return std::move(all);
}

static bool is_still(PyObject* value, PyObject* frozen) {
  if (value == frozen) return true;
  if (PyFloat_CheckExact(value) && PyFloat_CheckExact(frozen)) {
    const double a = PyFloat_AS_DOUBLE(value), b = PyFloat_AS_DOUBLE(frozen);
    return std::memcmp(&a, &b, sizeof(a)) == 0;
  }
  if (!is_list(value) || !PyTuple_CheckExact(frozen)) return false;
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
  if (size != PyTuple_GET_SIZE(frozen)) return false;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!is_still(PySequence_Fast_GET_ITEM(value, i), PyTuple_GET_ITEM(frozen, i))) return false;
  }
  return true;
}

Values::Values(const py::dict& source) : known_(PyDict_CheckExact(source.ptr())) {
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(source.ptr(), &at, &key, &value);) {
    const bool left_out = is_left_out(key);
    items_.emplace_back(py::reinterpret_borrow<py::object>(key),
                        left_out ? py::object() : frozen(value));
    known_ = known_ && (left_out || items_.back().second);
  }
}

bool Values::are_those_of(const py::dict& other) const {
  if (!known_ || PyDict_GET_SIZE(other.ptr()) != static_cast<Py_ssize_t>(items_.size()))
    return false;
  PyObject *key, *value;
  Py_ssize_t at = 0;
  return std::all_of(items_.begin(), items_.end(), [&](const auto& item) {
    return PyDict_Next(other.ptr(), &at, &key, &value) && key == item.first.ptr() &&
           (!item.second || is_still(value, item.second.ptr()));
  });
}

// ---- groups -------------------------------------------------------------------------------------

std::deque<Group> KnownGroups::read(py::handle optimizer, const py::sequence& groups,
                                    const Kernels& kernels) {
  const py::dict defaults = optimizer.attr("defaults");
  if (!defaults_.are_those_of(defaults)) {
    known_.clear();
    defaults_ = Values(defaults);
  }
  const bool is_only = groups.size() == 1;
  std::deque<Group> read;
  std::vector<std::shared_ptr<const Known>> found;
  found.reserve(groups.size());
  for (size_t i = 0; i < groups.size(); ++i) {
    const py::dict group = groups[i];
    const auto knows = [&](const std::shared_ptr<const Known>& known) {
      return defaults_.are_known() && known->values.are_those_of(group);
    };
    if (i < known_.size() && knows(known_[i])) {
      found.push_back(known_[i]);
    } else if (i > 0 && knows(found[i - 1])) {
      found.push_back(found[i - 1]);
    } else {
      Values values(group);
      const py::tuple settings = optimizer.attr("_engine_group")(group);
      found.push_back(
          std::make_shared<const Known>(Known{std::move(values), Settings(settings, kernels)}));
    }
    read.emplace_back(found[i]->settings, optimizer, group, static_cast<int>(i), is_only, kernels);
  }
  known_ = std::move(found);
  return read;
}

}  // namespace fusedopt
