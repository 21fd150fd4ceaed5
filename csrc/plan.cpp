#include "plan.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <unordered_map>

namespace fusedopt {

Group::Group(py::handle source)
    : params(py::tuple(source.attr("params"))),
      names(source.attr("names")),
      has_kernel(py::cast<bool>(source.attr("has_kernel"))),
      rule(py::cast<std::string>(source.attr("rule"))),
      flags(py::cast<int>(source.attr("flags"))),
      states(py::cast<std::vector<py::str>>(source.attr("states"))),
      has_slow(py::cast<bool>(source.attr("has_slow"))),
      alpha(py::cast<double>(source.attr("alpha"))),
      counts_steps(py::cast<bool>(source.attr("counts_steps"))),
      counts_on_device(py::cast<bool>(source.attr("counts_on_device"))),
      starts_unlike(py::cast<bool>(source.attr("starts_unlike"))),
      grad_scale(py::cast<double>(source.attr("grad_scale"))),
      lr(source.attr("lr")),
      fold(source.attr("fold")),
      create_state(source.attr("create_state")),
      move_count(source.attr("move_count")) {
  if (rule_states() > kMaxStates) throw std::logic_error("rule " + rule + ": raise kMaxStates");
}

// ---- messages -----------------------------------------------------------------------------------

// What an object is, for a message.
static std::string type_text(PyObject* object) {
  const auto self = py::reinterpret_borrow<py::object>(object);
  const auto text = [&](const char* attribute) {
    return py::cast<std::string>(py::str(self.attr(attribute)));
  };
  if (!py::hasattr(self, "layout") || !py::hasattr(self, "device")) {
    return py::cast<std::string>(py::repr(self));
  }
  return "a " + text("layout") + " tensor of " + text("dtype") + " and " + text("shape") + " on " +
         text("device");
}

static std::string device_text(int device) {
  return device == kHost ? "cpu" : "cuda:" + std::to_string(device);
}

// For example: exp_avg of params[3] ('layer.weight') of group 1
std::string StepPlan::name(const Entry& entry, const std::string& what) const {
  std::string text =
      what + (what.empty() ? "" : " of ") + "params[" + std::to_string(entry.index) + "]";
  const py::object& names = entry.group->names;
  if (!names.is_none() && entry.index < static_cast<Py_ssize_t>(py::len(names))) {
    text += " ('" + py::cast<std::string>(names[py::int_(entry.index)]) + "')";
  }
  if (groups_.size() > 1) {
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (&groups_[i] == entry.group) text += " of group " + std::to_string(i);
    }
  }
  return text;
}

// ---- gathering and validation -------------------------------------------------------------------

PyObject* step_key() {
  static PyObject* const key = PyUnicode_InternFromString("step");
  return key;
}

StepPlan::StepPlan(const Kernels& kernels, const TensorReader& reader, const py::dict& state,
                   const py::sequence& groups, bool may_skip)
    : kernels_(kernels), reader_(reader), state_(state), may_skip_(may_skip) {
  size_t count = 0;
  for (const py::handle group : groups) {
    groups_.emplace_back(group);
    count += groups_.back().params.size();
  }
  entries_.reserve(count);
  jobs_.reserve(count);
  held_.reserve(count * (kMaxStreams + 1));
}

void StepPlan::collect() {
  for (size_t g = 0; g < groups_.size(); ++g) {
    const auto count = static_cast<Py_ssize_t>(groups_[g].params.size());
    for (Py_ssize_t i = 0; i < count; ++i) collect(groups_[g], static_cast<int>(g), i);
  }
  if (!in_order_) count_repeats();
}

// Whether the memory has the opposite sign of the tensor: a view that torch has yet to negate. It
// is the imaginary part of a complex tensor, so its elements are not next to each other.
static inline bool negated(PyObject* tensor, const View& view) {
  if (view.contiguous && view.numel != 1) return false;
  return py::cast<bool>(py::handle(tensor).attr("is_neg")());
}

void StepPlan::collect(const Group& group, int group_index, Py_ssize_t index) {
  PyObject* const param = PyTuple_GET_ITEM(group.params.ptr(), index);
  held_.push_back(reader_.grad(param));
  if (held_.back().is_none()) return;
  Entry& entry = entries_.emplace_back(&group, index, param, held_.back().ptr());

  View views[kMaxStreams + 1];
  View &p = views[kParam], &g = views[kGrad];
  PyObject* grad = entry.grad;  // that of the parameter, whatever is done with it below
  const auto leave_to_torch = [&] {
    unsupported.append(py::make_tuple(group_index, py::handle(entry.param)));
    outside.append(py::handle(grad));
    entries_.pop_back();
  };
  if (!group.has_kernel || !reader_.read(entry.param, &p, &held_) ||
      !reader_.read(entry.grad, &g, &held_) || p.device != g.device || negated(entry.param, p)) {
    return leave_to_torch();
  }
  entry.device = p.device;
  uses_devices_ = uses_devices_ || p.device != kHost;
  if (negated(entry.grad, g)) {
    held_.push_back(py::handle(entry.grad).attr("resolve_neg")());
    entry.grad = held_.back().ptr();
    reader_.read(entry.grad, &g, &held_);
  }
  if (!same_shape(p, g)) {
    throw py::value_error(name(entry, "grad") + " has shape " + shape_text(g) + ", expected " +
                          shape_text(p) + "; call zero_grad() and compute it again");
  }
  if (overlap_out_of_step(p, g)) {  // a copy, or some of it would change before it is read
    held_.push_back(py::handle(entry.grad).attr("clone")());
    entry.grad = held_.back().ptr();
    reader_.read(entry.grad, &g, &held_);
  }
  if (overlaps_itself(p)) {
    throw py::value_error(name(entry, "") +
                          " is a view in which elements share memory; expected every element in a "
                          "place of its own; pass a clone() of it");
  }
  grad = entry.grad;
  if (p.device != kHost && !fit_gradient(&entry, p, &g)) return leave_to_torch();
  const bool complete = read_states(entry, views);
  if (!entry.fits) return leave_to_torch();
  if (g.is_local_part) {
    outside.append(py::handle(grad));
    distributed_.push_back(jobs_.size());
  }
  if (complete) {
    set_job(entry, views, &jobs_.emplace_back());
  } else {
    incomplete_.push_back(jobs_.size());
    set_norm(g, &layouts_, &jobs_.emplace_back());  // all that it can have by now
  }
}

// dict[key], or null. Keys are usually asked for in the order in which they were added, so walking
// the dict with a cursor finds most without hashing; and hash(tensor) is a Python function. Clears
// `in_order` where that did not suffice.
static PyObject* find(PyObject* dict, PyObject* key, Py_ssize_t* cursor, bool* in_order) {
  PyObject *at, *value;
  Py_ssize_t next = *cursor;
  if (PyDict_Next(dict, &next, &at, &value) && at == key) {
    *cursor = next;
    return value;
  }
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
  if (negated(tensor, *view)) {
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
  } else if (PyLong_Check(entry.step) || PyFloat_Check(entry.step)) {
    steps = PyFloat_AsDouble(entry.step);
    if (PyErr_Occurred()) steps = HUGE_VAL;  // an integer beyond all doubles
    PyErr_Clear();
  } else {
    throw py::type_error(name(entry, "step") + " is " + type_text(entry.step) +
                         ", expected a number, or a float32, float64 or int64 tensor on cpu with "
                         "one element; store the number of steps taken so far");
  }
  if (!(steps >= 0 && std::isfinite(steps))) {
    throw py::value_error(name(entry, "step") + " is " + std::to_string(steps) +
                          ", expected a finite number, 0 or more; store the number of steps taken "
                          "so far");
  }
  entry.t = steps + 1;
  entry.has_to_move = on_device || elsewhere;
}

// A parameter that is listed twice is stepped twice, the second time with the next number.
void StepPlan::count_repeats() {
  std::unordered_map<PyObject*, double> last;
  for (Entry& entry : entries_) {
    if (!entry.group->counts_steps || entry.count.device != kHost) continue;
    const auto [at, is_new] = last.try_emplace(entry.param, entry.t);
    if (!is_new) entry.t = ++at->second;
  }
}

// ---- the other parts of a step ------------------------------------------------------------------

// From Python.
const Folded* StepPlan::fold(const Entry& entry) {
  const Group& group = *entry.group;
  if (entry.device == kHost && !PyFloat_Check(group.lr.ptr())) {
    throw py::value_error("lr of the group of " + name(entry, "") + " is " +
                          type_text(group.lr.ptr()) +
                          ", but the parameter is on cpu; pass a number, or a tensor on cpu");
  }
  const auto scalars = py::cast<py::dict>(group.fold(entry.t));
  Folded folded{find_rule(kernels_, group.rule, group.flags), {}};
  for (const auto& item : scalars) folded.scalars.push_back(py::cast<double>(item.second));
  if (static_cast<int>(group.rule_states()) != folded.rule.states) {
    throw std::logic_error("rule " + group.rule + " has another number of states");
  }
  if (static_cast<int>(folded.scalars.size()) != folded.rule.scalars) {
    throw std::logic_error("rule " + group.rule + " has another number of scalars");
  }
  folded_.push_back(std::move(folded));
  return &folded_.back();
}

void StepPlan::fold_scalars() {
  // A rule that keeps no count only tells a parameter's first step from the others.
  for (Entry& entry : entries_) {
    if (!entry.group->counts_steps) entry.t = entry.is_new ? 1 : 2;
  }
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    const Entry* before = i > 0 ? &entries_[i - 1] : nullptr;
    const bool same = before && before->group == entry.group && before->t == entry.t;
    entry.folded = same ? before->folded : fold(entry);
    set_rule(entry.folded->rule, entry.folded->scalars.data(), &jobs_[i]);
  }
}

void StepPlan::create_missing_states() {
  for (const size_t i : incomplete_) {
    Entry& entry = entries_[i];
    entry.group->create_state(py::handle(entry.param));
    View views[kMaxStreams + 1];
    if (!reader_.read(entry.param, &views[kParam], &held_) ||
        !reader_.read(entry.grad, &views[kGrad], &held_) || !read_states(entry, views)) {
      throw std::logic_error("create_state left a gap in the state of " + name(entry, ""));
    }
    set_job(entry, views, &jobs_[i]);
    set_rule(entry.folded->rule, entry.folded->scalars.data(), &jobs_[i]);
  }
}

// What was read here may lie in several entries' counts: a parameter that is listed twice.
void StepPlan::advance_counts() const {
  for (const Entry& entry : entries_) {
    if (entry.count.data && entry.count.device == kHost) entry.count.increment();
  }
}

void StepPlan::advance_plain_counts() const {
  for (const Entry& entry : entries_) {
    if (!entry.step || entry.count.data) continue;
    const auto count = py::reinterpret_steal<py::object>(
        PyLong_Check(entry.step) ? PyLong_FromDouble(entry.t) : PyFloat_FromDouble(entry.t));
    if (PyDict_SetItem(entry.state, step_key(), count.ptr())) throw py::error_already_set();
  }
}

void StepPlan::bump_versions() const {
  for (const Entry& entry : entries_) reader_.bump_version(entry.param);
}

// ---- jobs ---------------------------------------------------------------------------------------

void StepPlan::set_job(const Entry& entry, const View* views, Job* job) {
  const Group& group = *entry.group;
  const int streams = kFirstState + static_cast<int>(group.rule_states());
  set_streams(views, streams, &layouts_, job);
  job->grad_scale = group.grad_scale;
  if (!group.has_slow || group.alpha == 0) return;
  const View slow[] = {views[kParam], views[kParam], views[streams]};
  Job& then = jobs_after_.emplace_back();
  set_streams(slow, 3, &layouts_, &then);
  set_rule(find_rule(kernels_, "lookahead", 0), &group.alpha, &then);
  job->then = &then;
}

std::vector<Job> StepPlan::jobs_of_norm() const {
  std::vector<Job> jobs = jobs_;
  for (const size_t i : distributed_) jobs[i].numel = 0;
  for (size_t i = 0; i < jobs.size(); ++i) {
    if (entries_[i].device != kHost) jobs[i].numel = 0;
  }
  return jobs;
}

}  // namespace fusedopt
