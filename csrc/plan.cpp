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

static PyObject* step_key() {
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

// On a device, all streams are walked as arrays in the parameter's order: a gradient that cannot be
// is copied. False if not even the parameter can.
bool StepPlan::fit_gradient(Entry* entry, const View& param, View* grad) {
  if (!common_layout(&param, 1).empty()) return false;
  const bool is_array = common_layout(grad, 1).empty();
  if (is_array) entry->norm_item = {grad->data, grad->numel, 0, grad->dtype};
  const View views[] = {param, *grad};
  const bool wide = param.dtype == DType::f64;
  if ((grad->dtype == DType::f64) != wide || !common_layout(views, 2).empty()) {
    const auto torch = py::module_::import("torch");
    const py::object copy =
        torch.attr("empty_like")(py::handle(entry->param),
                                 py::arg("dtype") = (grad->dtype == DType::f64) == wide
                                                        ? py::handle(entry->grad).attr("dtype")
                                                        : torch.attr(wide ? "float64" : "float32"),
                                 py::arg("requires_grad") = false);
    copy.attr("copy_")(py::handle(entry->grad).attr("detach")());
    held_.push_back(copy);
    entry->grad = copy.ptr();
    reader_.read(entry->grad, grad, &held_);
  }
  if (!is_array) entry->norm_item = {grad->data, grad->numel, 0, grad->dtype};
  return true;
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

bool StepPlan::counts_on_device(const Entry& entry) const {
  return entry.device != kHost && (entry.group->counts_on_device || may_skip_);
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

// Puts counts where they belong: a checkpoint may have them elsewhere, and a step that only a
// device knows to be skipped is counted there.
void StepPlan::move_counts() {
  for (Entry& entry : entries_) {
    if (!entry.has_to_move) continue;
    const bool on_device = counts_on_device(entry);
    if (PyDict_GetItem(entry.state, step_key()) == entry.step) {  // listed for the first time
      entry.group->move_count(py::handle(entry.param), entry.t - 1, on_device);
    }
    entry.step = PyDict_GetItem(entry.state, step_key());
    held_.push_back(py::reinterpret_borrow<py::object>(entry.step));
    reader_.read_count(entry.step, &entry.count, &held_);
    entry.count.device = on_device ? entry.device : kHost;
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
  if (entries_.empty()) return;
  py::list params(entries_.size());
  for (size_t i = 0; i < entries_.size(); ++i) {
    PyList_SET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(entries_[i].param));
  }
  py::module_::import("torch.autograd.graph").attr("increment_version")(params);
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

// ---- devices ------------------------------------------------------------------------------------

std::vector<int> StepPlan::devices() const {
  std::vector<int> devices;
  for (const Entry& entry : entries_) {
    if (entry.device == kHost) continue;
    if (std::find(devices.begin(), devices.end(), entry.device) == devices.end()) {
      devices.push_back(entry.device);
    }
  }
  return devices;
}

std::vector<Job> StepPlan::jobs_on(int device) const {
  std::vector<Job> jobs;
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].device == device) jobs.push_back(jobs_[i]);
  }
  return jobs;
}

void StepPlan::refuse_to_be_captured() const {
  for (const Entry& entry : entries_) {
    const Group& group = *entry.group;
    if (group.has_slow) {
      throw std::runtime_error(
          "a graph cannot capture a step of Lookahead, whose slow weights move in every k-th step "
          "alone; capture the wrapped optimizer's");
    }
    if (group.counts_steps && entry.count.device == kHost && !group.counts_on_device) {
      throw std::runtime_error(
          "a graph cannot capture a step that the CPU counts: the step of " + name(entry, "") +
          " would be the same at each replay; pass capturable=True, or do not capture it");
    }
    if (group.counts_steps && entry.count.device == kHost && !entry.is_new) {
      throw std::runtime_error("the step of " + name(entry, "") +
                               " is still counted on the CPU; take a step before the capture");
    }
  }
}

bool StepPlan::skips_on_host() const {
  return std::any_of(entries_.begin(), entries_.end(), [](const Entry& entry) {
    return entry.group->has_slow || (entry.is_new && entry.group->starts_unlike);
  });
}

std::vector<cuda::NormItem> StepPlan::norm_items(int device) const {
  std::vector<cuda::NormItem> items;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const bool elsewhere = std::binary_search(distributed_.begin(), distributed_.end(), i);
    if (entries_[i].device == device && !elsewhere) items.push_back(entries_[i].norm_item);
  }
  return items;
}

std::vector<cuda::Update> StepPlan::updates(int device, double factor) {
  std::vector<cuda::Update> updates;
  const Group* group = nullptr;
  cuda::Clock clock;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    if (entry.device != device) continue;
    if (entry.group != group) {
      group = entry.group;
      clock = {};
      if (PyFloat_Check(group->lr.ptr())) {
        clock.host_lr = py::cast<double>(group->lr);
      } else {
        View lr;
        reader_.read(group->lr.ptr(), &lr, &held_);
        if (lr.device != device) {
          const auto memory = py::module_::import("fusedopt._memory");
          held_.push_back(memory.attr("gather")(py::make_tuple(group->lr), device));
          reader_.read(held_.back().ptr(), &lr, &held_);
        }
        clock.lr = lr.data;
        clock.lr_is_double = lr.dtype == DType::f64;
      }
    }
    clock.step = entry.count.device == device ? static_cast<float*>(entry.count.data) : nullptr;
    clock.t = entry.t;
    const Rule& rule = entry.folded->rule;
    updates.push_back({static_cast<int>(&rule - kernels_.rules), rule.scalars, &jobs_[i],
                       jobs_[i].grad_scale * factor, clock});
  }
  return updates;
}

std::vector<cuda::Update> StepPlan::updates_after(int device) const {
  const Rule& rule = find_rule(kernels_, "lookahead", 0);
  std::vector<cuda::Update> updates;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Job* then = jobs_[i].then;
    if (entries_[i].device != device || !then) continue;
    updates.push_back({static_cast<int>(&rule - kernels_.rules), rule.scalars, then, 1, {}});
  }
  return updates;
}

}  // namespace fusedopt
