// Gathering and validation: what a parameter's objects are, and whether they fit together.

#include "step/plan.h"

namespace fusedopt {

static std::string device_text(int device) {
  return device == kHost ? "cpu" : "cuda:" + std::to_string(device);
}

void StepPlan::collect(int threads) {
  collect_usual(threads);
  const size_t count = entries_.size();
  if (is_ready() && counts_lie_apart()) return;
  hold();
  state_cursor_ = 0;  // whoever gets the GIL from here on may change the state
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    Entry& entry = entries_[kept];
    if (kept != i) {
      entry = entries_[i];
      jobs_[kept] = jobs_[i];
    }
    if (entry.usual) {
      find_next(state_.ptr(), entry.param, &state_cursor_);
      ++kept;
    } else {
      kept += collect(entry, kept);
    }
  }
  entries_.erase(entries_.begin() + static_cast<ptrdiff_t>(kept), entries_.end());
  jobs_.resize(kept);
  if (!in_order_ || !counts_lie_apart()) set_repeats_aside();
}

// Any parameter, whatever it takes; false if there is nothing to do, or nothing that a kernel can.
bool StepPlan::collect(Entry& entry, size_t at) {
  const Group& group = *entry.group;
  held_.push_back(reader_.grad(entry.param));
  if (held_.back().is_none()) return false;
  entry.grad = held_.back().ptr();

  View views[kMaxStreams + 1];
  View &p = views[kParam], &g = views[kGrad];
  PyObject* grad = entry.grad;  // that of the parameter, whatever is done with it below
  const auto leave_to_torch = [&] {
    unsupported.append(py::make_tuple(number_of(group), py::handle(entry.param)));
    outside.append(py::handle(grad));
    return false;
  };
  if (!group.has_kernel || !reader_.read(entry.param, &p, &held_) ||
      !reader_.read(entry.grad, &g, &held_) || p.device != g.device || p.negated) {
    return leave_to_torch();
  }
  entry.device = p.device;
  uses_devices_ = uses_devices_ || p.device != kHost;
  if (g.negated) {
    held_.push_back(py::handle(entry.grad).attr("resolve_neg")());
    entry.grad = held_.back().ptr();
    reader_.read(entry.grad, &g, &held_);
  }
  if (!same_shape(p, g)) {
    throw py::value_error(name(entry, "grad") + " has shape " + shape_text(g) + ", expected " +
                          shape_text(p) + "; call zero_grad() and compute it again");
  }
  if (overlaps_itself(p)) {
    throw py::value_error(name(entry, "") +
                          " is a view in which elements share memory; expected every element in a "
                          "place of its own; pass a clone() of it");
  }
  const bool complete = read_states(entry, views);
  if (!entry.fits) return leave_to_torch();
  separate_streams(&entry, views);
  grad = entry.grad;
  if (p.device != kHost && !fit_gradient(&entry, p, &g)) return leave_to_torch();
  if (g.is_local_part) {
    outside.append(py::handle(grad));
    distributed_.push_back(at);
  }
  jobs_[at] = {};
  if (complete) {
    set_job(entry, views, &jobs_[at]);
  } else {
    incomplete_.push_back(at);
    set_norm(g, &layouts_, &jobs_[at]);  // all that it can have by now
  }
  return true;
}

// Elements are read a register or a tile at a time: where something is written that another stream
// has elsewhere, the numbers would depend on how many those are. A gradient is copied then, and two
// that are written are an error.
void StepPlan::separate_streams(Entry* entry, View* views) {
  const Group& group = *entry->group;
  const int streams = kFirstState + static_cast<int>(group.states.size());
  const auto name_of = [&](int s) {
    return s == kParam ? std::string("the parameter")
                       : std::string(group.states[static_cast<size_t>(s - kFirstState)]);
  };
  for (int s = 0; s < streams; ++s) {
    if (s == kGrad) continue;
    if (overlap_out_of_step(views[s], views[kGrad])) {
      held_.push_back(py::handle(entry->grad).attr("clone")());
      entry->grad = held_.back().ptr();
      reader_.read(entry->grad, &views[kGrad], &held_);
    }
    for (int other = 0; other < s; ++other) {
      if (other == kGrad || !come_close(views[s], views[other])) continue;
      if (!overlap(views[s], views[other])) continue;
      throw py::value_error(name(*entry, name_of(s)) + " shares memory with " + name_of(other) +
                            "; expected memory of its own; store a clone() of it");
    }
  }
}

PyObject* find_next(PyObject* dict, PyObject* key, Py_ssize_t* cursor) {
  PyObject *at, *value;
  Py_ssize_t next = *cursor;
  if (!PyDict_Next(dict, &next, &at, &value) || at != key) return nullptr;
  *cursor = next;
  return value;
}

// dict[key], or null. Clears `in_order` where it was not found there.
static PyObject* find(PyObject* dict, PyObject* key, Py_ssize_t* cursor, bool* in_order) {
  PyObject* value = find_next(dict, key, cursor);
  if (value) return value;
  *in_order = false;
  value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

void StepPlan::read_state(const Entry& entry, PyObject* tensor, const py::str& key,
                          const View& param, View* view) {
  held_.push_back(py::reinterpret_borrow<py::object>(tensor));
  const auto state_name = [&] { return name(entry, std::string(key)); };
  if (!reader_.read(tensor, view, &held_) || view->device != param.device) {
    throw py::type_error(state_name() + " is " + type_text(tensor) +
                         ", expected a strided float32, float64, bfloat16 or float16 tensor on " +
                         device_text(param.device) +
                         "; move it there, or delete opt.state[p] to start anew");
  }
  if (!same_shape(param, *view)) {
    throw py::value_error(state_name() + " has shape " + shape_text(*view) + ", expected " +
                          shape_text(param) +
                          "; load a checkpoint of this model, or delete opt.state[p] to start "
                          "anew");
  }
  if (overlaps_itself(*view)) {
    throw py::value_error(state_name() +
                          " is a view in which elements share memory; expected every element in "
                          "a place of its own; store a clone() of it");
  }
  if (view->negated) {
    throw py::value_error(state_name() +
                          " is a view that torch has yet to negate; expected memory with the "
                          "values themselves; store resolve_neg() of it");
  }
}

// Reads and validates what exists of the entry's state; false if something is missing.
bool StepPlan::read_states(Entry& entry, View* views) {
  const Group& group = *entry.group;
  if (group.states.empty() && !group.counts_steps) return true;
  entry.state = find(state_.ptr(), entry.param, &state_cursor_, &in_order_);
  entry.is_new = !entry.state;
  if (entry.is_new) return false;
  if (!PyDict_Check(entry.state)) {
    throw py::type_error(name(entry, "state") + " is " + type_text(entry.state) +
                         ", expected a dict; delete opt.state[p] to start anew");
  }
  held_.push_back(py::reinterpret_borrow<py::object>(entry.state));
  Py_ssize_t cursor = 0;
  bool any_order = true;
  if (group.counts_steps) read_step(entry, &cursor);
  bool complete = !group.counts_steps || entry.step;
  for (size_t s = 0; s < group.states.size(); ++s) {
    PyObject* tensor = find(entry.state, group.states[s].ptr(), &cursor, &any_order);
    if (!tensor || tensor == Py_None) {
      complete = false;
      entry.is_new = entry.is_new || s < group.rule_states();
      continue;
    }
    if (s == group.rule_states() && group.alpha == 0) continue;  // slow weights, at rest
    View& state = views[kFirstState + s];
    read_state(entry, tensor, group.states[s], views[kParam], &state);
    if (entry.device != kHost) {
      const View pair[] = {views[kParam], state};
      entry.fits = entry.fits && common_layout(pair, 2).empty() &&
                   (state.dtype == DType::f64) == (pair[0].dtype == DType::f64);
    }
  }
  return complete;
}

// Whether it is a tensor with one element that the memory has the opposite sign of.
static bool is_yet_to_be_negated(PyObject* object) {
  const auto tensor = py::reinterpret_borrow<py::object>(object);
  return py::hasattr(tensor, "is_neg") && py::cast<bool>(tensor.attr("is_neg")()) &&
         py::cast<int64_t>(tensor.attr("numel")()) == 1;
}

void StepPlan::read_step(Entry& entry, Py_ssize_t* cursor) {
  bool any_order = true;
  entry.step = find(entry.state, step_key(), cursor, &any_order);
  if (!entry.step) return;
  held_.push_back(py::reinterpret_borrow<py::object>(entry.step));
  const bool on_device = counts_on_device(entry);
  bool elsewhere = false;
  double steps;
  if (reader_.read_count(entry.step, &entry.count, &held_)) {
    if (reader_.emulated() && on_device) entry.count.device = entry.device;
    if (entry.count.device == entry.device && entry.device != kHost) {
      if (entry.count.type != TensorReader::Count::f32) {
        throw py::type_error(name(entry, "step") + " is " + type_text(entry.step) +
                             ", expected a float32 tensor on " + device_text(entry.device) +
                             " or on cpu; store the number of steps taken so far");
      }
      return;  // only the device knows
    }
    elsewhere = entry.count.device != kHost;  // a checkpoint of another device: read it once
    steps = elsewhere ? py::cast<double>(py::handle(entry.step).attr("item")()) : entry.count.get();
  } else if (is_yet_to_be_negated(entry.step)) {  // read it once, as a count of another device
    elsewhere = true;
    steps = py::cast<double>(py::handle(entry.step).attr("item")());
  } else if (PyLong_Check(entry.step) || PyFloat_Check(entry.step)) {
    steps = PyFloat_AsDouble(entry.step);
    if (PyErr_Occurred()) steps = HUGE_VAL;  // an integer beyond all doubles
    PyErr_Clear();
  } else {
    throw py::type_error(name(entry, "step") + " is " + type_text(entry.step) +
                         ", expected a number, or a float32, float64 or int64 tensor on cpu with "
                         "one element; store the number of steps taken so far");
  }
  if (!is_step(steps)) {
    throw py::value_error(name(entry, "step") + " is " + std::to_string(steps) +
                          ", expected a finite number, 0 or more; store the number of steps taken "
                          "so far");
  }
  entry.t = steps + 1;
  entry.has_to_move = on_device || elsewhere;
}

}  // namespace fusedopt
