// States and counts of steps: what exists of them, whether it fits, and what a step changes.

#include <algorithm>

#include "step/params.h"

namespace fusedopt {

// ---- finding ------------------------------------------------------------------------------------

PyObject* step_key() {
  static PyObject* const key = PyUnicode_InternFromString("step");
  return key;
}

PyObject* find(PyObject* dict, PyObject* key, Py_ssize_t* cursor) {
  PyObject* value = find_next(dict, key, cursor);
  if (value) return value;
  value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// ---- reading ------------------------------------------------------------------------------------

// Reads and validates what exists of the entry's state: the count, the states of the rule, those of
// its followers, then what else streams are stored in (parts.cpp). False if no device can access
// all of it.
bool ParamReader::read_states(Entry* entry, View* views) {
  const Group& group = *entry->group;
  const bool is_plain = !group.in_parts || !is_half(views[kParam].dtype);
  const size_t states = group.rule_states + group.followers.size();
  if (states == 0 && !group.counts_steps && is_plain) return true;
  const Py_ssize_t before = cursor_;
  // Random bits and blocks go by the numbers of elements, which a device has in their order alone.
  const bool may_be_numbered =
      group.may_be_coded || (group.rounds_at_random && is_half(views[kParam].dtype));
  if (entry->device != kHost && may_be_numbered && !views[kParam].contiguous) return false;
  entry->state = find(state_.ptr(), entry->param, &cursor_);
  in_order_ = in_order_ && cursor_ != before;
  entry->is_new = entry->lacks_state = !entry->state;
  if (entry->is_new) return true;
  if (!PyDict_Check(entry->state)) {
    throw py::type_error(entry->name("state") + " is " + type_text(entry->state) +
                         ", expected a dict; delete opt.state[p] to start anew");
  }
  held_.push_back(py::reinterpret_borrow<py::object>(entry->state));
  Py_ssize_t cursor = 0;
  if (group.counts_steps) read_step(entry, &cursor);
  entry->lacks_state = group.counts_steps && !entry->step;
  for (size_t s = 0; s < states; ++s) {
    const bool follows = s >= group.rule_states;
    const size_t follower = s - group.rule_states;
    PyObject* tensor = find(entry->state, group.state(s).ptr(), &cursor);
    if (!tensor || tensor == Py_None) {
      if (follows && group.leaves_out(follower, entry->param)) continue;
      entry->lacks_state = true;
      entry->is_new = entry->is_new || !follows;
      continue;
    }
    if (follows && group.weight(follower) == 0) continue;  // at rest
    View& state = views[kFirstState + s];
    read_state(*entry, tensor, group.state(s), views[kParam], &state);
  }
  read_parts(entry, views, &cursor);
  return entry->device == kHost || are_arrays(views, static_cast<int>(states));
}

// Whether a device can walk the states that there are in the order of the parameter, as arrays.
bool ParamReader::are_arrays(const View* views, int states) {
  return std::all_of(views + kFirstState, views + kFirstState + states, [&](const View& state) {
    const View pair[] = {views[kParam], state};
    return !state.data || (common_layout(pair, 2).empty() &&
                           (state.dtype == DType::f64) == (pair[0].dtype == DType::f64));
  });
}

std::string device_text(int device) {
  return device == kHost ? "cpu" : "cuda:" + std::to_string(device);
}

void ParamReader::read_state(const Entry& entry, PyObject* tensor, py::handle key,
                             const View& param, View* view) {
  held_.push_back(py::reinterpret_borrow<py::object>(tensor));
  const bool readable =
      tensors_.read_stored(tensor, view, &held_) && view->dtype != DType::bf16_split;
  const Fault fault = readable ? fault_of(param, *view) : Fault::elsewhere;
  if (fault == Fault::none) return;
  const std::string name = entry.name(py::cast<std::string>(key));
  if (fault == Fault::elsewhere) {
    throw py::type_error(name + " is " + type_text(tensor) +
                         ", expected a strided float32, float64, bfloat16 or float16 tensor on " +
                         device_text(param.device) +
                         "; move it there, or delete opt.state[p] to start anew");
  }
  throw py::value_error(
      name +
      (fault == Fault::shape
           ? " has shape " + shape_text(*view) + ", expected " + shape_text(param) +
                 "; load a checkpoint of this model, or delete opt.state[p] to start anew"
       : fault == Fault::overlaps_itself
           ? " is a view in which elements share memory; expected every element in a place of its "
             "own; store a clone() of it"
           : " is a view that torch has yet to negate; expected memory with the values themselves; "
             "store resolve_neg() of it"));
}

// Whether it is a tensor with one element that the memory has the opposite sign of.
static bool is_yet_to_be_negated(PyObject* object) {
  const auto tensor = py::reinterpret_borrow<py::object>(object);
  return py::hasattr(tensor, "is_neg") && py::cast<bool>(tensor.attr("is_neg")()) &&
         py::cast<int64_t>(tensor.attr("numel")()) == 1;
}

void ParamReader::read_step(Entry* entry, Py_ssize_t* cursor) {
  entry->step = find(entry->state, step_key(), cursor);
  if (!entry->step) return;
  held_.push_back(py::reinterpret_borrow<py::object>(entry->step));
  const auto item = [&] { return py::cast<double>(py::handle(entry->step).attr("item")()); };
  const bool on_device = counts_on_device(*entry);
  bool elsewhere = false;
  double steps = 0;
  if (tensors_.read_count(entry->step, &entry->count, &held_)) {
    place_count(entry);
    if (entry->device_counts) {
      entry->has_to_move = entry->count.type != TensorReader::Count::f32;  // into a float32 there
      return;
    }
    elsewhere = entry->count.device != kHost;  // a checkpoint of another device: read it once
    steps = elsewhere ? item() : entry->count.get();
  } else if (is_yet_to_be_negated(entry->step)) {  // read it once, as a count of another device
    elsewhere = true;
    steps = item();
  } else if (PyLong_Check(entry->step) || PyFloat_Check(entry->step)) {
    steps = PyFloat_AsDouble(entry->step);
    if (PyErr_Occurred()) steps = HUGE_VAL;  // an integer beyond all doubles
    PyErr_Clear();
  } else {
    throw py::type_error(entry->name("step") + " is " + type_text(entry->step) +
                         ", expected a number, or a float32, float64 or int64 tensor on cpu with "
                         "one element; store the number of steps taken so far");
  }
  if (!is_step(steps)) {
    throw py::value_error(entry->name("step") + " is " + std::to_string(steps) +
                          ", expected a finite number, 0 or more; store the number of steps taken "
                          "so far");
  }
  entry->t = steps + 1;
  entry->has_to_move = on_device || elsewhere;
}

// ---- changing -----------------------------------------------------------------------------------

// Puts a count where it belongs: a checkpoint may have it elsewhere, and a step that only a device
// knows to be skipped is counted there.
void ParamReader::move_count(Entry* entry) {
  const bool on_device = entry->device_counts || counts_on_device(*entry);
  if (PyDict_GetItem(entry->state, step_key()) == entry->step) {  // listed for the first time
    const py::object steps =
        entry->device_counts ? py::object(py::none()) : py::float_(entry->t - 1);
    entry->group->move_count(entry->param, steps, on_device);
  }
  entry->step = PyDict_GetItem(entry->state, step_key());
  held_.push_back(py::reinterpret_borrow<py::object>(entry->step));
  tensors_.read_count(entry->step, &entry->count, &held_);
  entry->count.device = on_device ? entry->device : kHost;
}

void ParamReader::create_states(Entry* entry, View* views) {
  entry->group->create_state(entry->param);
  const bool readable = tensors_.read(entry->param, &views[kParam], &held_) &&
                        tensors_.read(entry->grad, &views[kGrad], &held_);
  if (readable) read_states(entry, views);
  if (!readable || entry->lacks_state) {
    throw std::logic_error("create_state left a gap in the state of " + entry->name(""));
  }
}

void ParamReader::advance(const std::vector<Entry>& entries) const {
  for (const Entry& entry : entries) {
    if (entry.count.data) {
      if (entry.count.device == kHost) entry.count.increment();
    } else if (entry.step) {
      const auto count = py::reinterpret_steal<py::object>(
          PyLong_Check(entry.step) ? PyLong_FromDouble(entry.t) : PyFloat_FromDouble(entry.t));
      if (PyDict_SetItem(entry.state, step_key(), count.ptr())) throw py::error_already_set();
    }
    const TensorReader::Count* const rounding = entry.rounding();
    if (rounding && rounding->device == kHost) rounding->increment();
    if (entry.usual) {
      tensors_.abi().bump_version(entry.records[kParam]);
    } else {
      tensors_.bump_version(entry.param);
    }
  }
}

}  // namespace fusedopt
