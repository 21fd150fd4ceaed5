#include "step.h"

#include <pybind11/stl.h>

#include <deque>

namespace fusedopt {

namespace {

// What one param group asks for: fusedopt._base.Group, read once a step.
struct Group {
  explicit Group(py::handle source)
      : params(source.attr("params")),
        names(source.attr("names")),
        has_kernel(py::cast<bool>(source.attr("has_kernel"))),
        rule(py::cast<std::string>(source.attr("rule"))),
        states(py::cast<std::vector<py::str>>(source.attr("states"))),
        counts_steps(py::cast<bool>(source.attr("counts_steps"))),
        grad_scale(py::cast<double>(source.attr("grad_scale"))),
        fold(source.attr("fold")),
        create_state(source.attr("create_state")) {
    if (states.size() > kMaxStates) throw std::logic_error("rule " + rule + ": raise kMaxStates");
  }

  py::list params;
  py::object names;
  bool has_kernel;
  std::string rule;
  std::vector<py::str> states;
  bool counts_steps;
  double grad_scale;
  py::object fold, create_state;
};

// What a group does in one step number: a variant of its rule, with scalars.
struct Folded {
  const Rule& rule;
  std::vector<double> scalars;
};

// One parameter that has a gradient and a kernel. The objects live in the group and in `held_`.
struct Entry {
  const Group* group;
  Py_ssize_t index;
  PyObject *param, *grad;
  PyObject* state = nullptr;       // its dict; null while it has none
  PyObject* step = nullptr;        // state["step"]; null while there is none
  TensorReader::Count count = {};  // its memory; null where it is a plain number
  double t = 1;                    // the number of this step
  const Folded* folded = nullptr;  // for t
};

class StepPlan {
 public:
  StepPlan(const Kernels& kernels, const TensorReader& reader, const py::dict& state,
           const py::sequence& groups);

  // The parts of a step, in order: whatever can fail comes before whatever changes something.
  void collect();
  void fold_scalars();
  void bump_versions() const;
  void create_missing_states();
  void advance_step_counts();

  const std::vector<Job>& jobs() const { return jobs_; }
  py::list unsupported;  // [(group index, parameter), ...]

 private:
  void collect(const Group& group, int group_index, Py_ssize_t index);
  bool read_states(Entry& entry, View* views);
  void read_step(Entry& entry, Py_ssize_t* cursor);
  const Folded* fold(const Entry& entry);
  void set_kernel(size_t i);
  Job make_job(const Entry& entry, const View* views);
  std::string name(const Entry& entry, const std::string& what) const;

  const Kernels& kernels_;
  const TensorReader& reader_;
  const py::dict& state_;
  Py_ssize_t state_cursor_ = 0;
  std::deque<Group> groups_;
  std::vector<Entry> entries_;
  std::vector<Job> jobs_;           // one an entry
  std::vector<size_t> incomplete_;  // entries that lack some state
  Held held_;
  std::deque<Folded> folded_;
  std::deque<Layout> layouts_;
};

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// What an object is, for a message.
std::string type_text(PyObject* object) {
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

// ---- messages -----------------------------------------------------------------------------------

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

StepPlan::StepPlan(const Kernels& kernels, const TensorReader& reader, const py::dict& state,
                   const py::sequence& groups)
    : kernels_(kernels), reader_(reader), state_(state) {
  size_t count = 0;
  for (const py::handle group : groups) {
    groups_.emplace_back(group);
    count += groups_.back().params.size();
  }
  entries_.reserve(count);
  jobs_.reserve(count);
  held_.reserve(count * (kMaxStreams + 2));
}

void StepPlan::collect() {
  for (size_t g = 0; g < groups_.size(); ++g) {
    const auto count = static_cast<Py_ssize_t>(groups_[g].params.size());
    for (Py_ssize_t i = 0; i < count; ++i) collect(groups_[g], static_cast<int>(g), i);
  }
}

void StepPlan::collect(const Group& group, int group_index, Py_ssize_t index) {
  Entry entry{&group, index, PyList_GET_ITEM(group.params.ptr(), index), nullptr};
  py::object grad = reader_.grad(entry.param);
  if (grad.is_none()) return;
  entry.grad = grad.ptr();
  held_.push_back(std::move(grad));
  held_.push_back(py::reinterpret_borrow<py::object>(entry.param));

  View views[kMaxStreams];
  View &p = views[kParam], &g = views[kGrad];
  if (!group.has_kernel || !reader_.read(entry.param, &p, &held_) ||
      !reader_.read(entry.grad, &g, &held_)) {
    unsupported.append(py::make_tuple(group_index, py::handle(entry.param)));
    return;
  }
  if (g.numel == 1 || !contiguous(g)) {  // may be a view that torch has yet to negate
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
                          " is an expanded view in which elements share memory; expected every "
                          "element in a place of its own; pass a clone() of it");
  }
  if (read_states(entry, views)) {
    jobs_.push_back(make_job(entry, views));
  } else {
    incomplete_.push_back(entries_.size());
    jobs_.emplace_back();
  }
  entries_.push_back(entry);
}

// dict[key], or null. Keys are usually asked for in the order in which they were added, so walking
// the dict with a cursor finds most without hashing; and hash(tensor) is a Python function.
PyObject* find(PyObject* dict, PyObject* key, Py_ssize_t* cursor) {
  PyObject *at, *value;
  Py_ssize_t next = *cursor;
  if (PyDict_Next(dict, &next, &at, &value) && at == key) {
    *cursor = next;
    return value;
  }
  value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Reads and validates what exists of the entry's state; false if something is missing.
bool StepPlan::read_states(Entry& entry, View* views) {
  const Group& group = *entry.group;
  if (group.states.empty() && !group.counts_steps) return true;
  entry.state = find(state_.ptr(), entry.param, &state_cursor_);
  if (!entry.state) return false;
  if (!PyDict_Check(entry.state)) {
    throw py::type_error(name(entry, "state") + " is " + type_text(entry.state) +
                         ", expected a dict; delete opt.state[p] to start anew");
  }
  held_.push_back(py::reinterpret_borrow<py::object>(entry.state));
  Py_ssize_t cursor = 0;
  if (group.counts_steps) read_step(entry, &cursor);
  bool complete = !group.counts_steps || entry.step;
  for (size_t s = 0; s < group.states.size(); ++s) {
    PyObject* tensor = find(entry.state, group.states[s].ptr(), &cursor);
    if (!tensor || tensor == Py_None) {
      complete = false;
      continue;
    }
    held_.push_back(py::reinterpret_borrow<py::object>(tensor));
    View& view = views[kFirstState + s];
    const auto state_name = [&] { return name(entry, std::string(group.states[s])); };
    if (!reader_.read(tensor, &view, &held_)) {
      throw py::type_error(state_name() + " is " + type_text(tensor) +
                           ", expected a strided float32, float64, bfloat16 or float16 tensor on "
                           "cpu; move it there, or delete opt.state[p] to start anew");
    }
    if (!same_shape(views[kParam], view)) {
      throw py::value_error(state_name() + " has shape " + shape_text(view) + ", expected " +
                            shape_text(views[kParam]) +
                            "; load a checkpoint of this model, or delete opt.state[p] to start "
                            "anew");
    }
    if (overlaps_itself(view)) {
      throw py::value_error(state_name() +
                            " is an expanded view in which elements share memory; expected every "
                            "element in a place of its own; store a clone() of it");
    }
  }
  return complete;
}

void StepPlan::read_step(Entry& entry, Py_ssize_t* cursor) {
  static PyObject* const step_name = interned("step");
  entry.step = find(entry.state, step_name, cursor);
  if (!entry.step) return;
  held_.push_back(py::reinterpret_borrow<py::object>(entry.step));
  double steps;
  if (reader_.read_count(entry.step, &entry.count, &held_)) {
    steps = entry.count.get();
  } else if (PyLong_Check(entry.step) || PyFloat_Check(entry.step)) {
    steps = PyFloat_AsDouble(entry.step);
  } else {
    throw py::type_error(name(entry, "step") + " is " + type_text(entry.step) +
                         ", expected a number, or a float32, float64 or int64 tensor on cpu with "
                         "one element; store the number of steps taken so far");
  }
  if (!(steps >= 0)) {
    throw py::value_error(name(entry, "step") + " is " + std::to_string(steps) +
                          ", expected 0 or more; store the number of steps taken so far");
  }
  entry.t = steps + 1;
}

// ---- the other parts of a step ------------------------------------------------------------------

Update update_for(const Rule& rule, DType param) {
  return param == DType::f64 ? rule.update_f64 : rule.update_f32;
}

// From Python.
const Folded* StepPlan::fold(const Entry& entry) {
  const Group& group = *entry.group;
  const auto [flags, scalars] = py::cast<std::pair<int, py::dict>>(group.fold(entry.t));
  Folded folded{find_rule(kernels_, group.rule, flags), {}};
  for (const auto& item : scalars) folded.scalars.push_back(py::cast<double>(item.second));
  if (static_cast<int>(group.states.size()) != folded.rule.states) {
    throw std::logic_error("rule " + group.rule + " has another number of states");
  }
  if (static_cast<int>(folded.scalars.size()) != folded.rule.scalars) {
    throw std::logic_error("rule " + group.rule + " has another number of scalars");
  }
  folded_.push_back(std::move(folded));
  return &folded_.back();
}

void StepPlan::set_kernel(size_t i) {
  const Folded& folded = *entries_[i].folded;
  jobs_[i].update = update_for(folded.rule, jobs_[i].streams[kParam].dtype);
  jobs_[i].scalars = folded.scalars.data();
}

void StepPlan::fold_scalars() {
  // A rule that keeps no count only tells a parameter's first step from the others.
  for (Entry& entry : entries_) {
    if (!entry.group->counts_steps) entry.t = 2;
  }
  for (const size_t i : incomplete_) {
    if (!entries_[i].group->counts_steps) entries_[i].t = 1;
  }
  for (size_t i = 0; i < entries_.size(); ++i) {
    const bool as_before =
        i > 0 && entries_[i].group == entries_[i - 1].group && entries_[i].t == entries_[i - 1].t;
    entries_[i].folded = as_before ? entries_[i - 1].folded : fold(entries_[i]);
    set_kernel(i);
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

void StepPlan::create_missing_states() {
  for (const size_t i : incomplete_) {
    Entry& entry = entries_[i];
    entry.group->create_state(py::handle(entry.param));
    View views[kMaxStreams];
    if (!reader_.read(entry.param, &views[kParam], &held_) ||
        !reader_.read(entry.grad, &views[kGrad], &held_) || !read_states(entry, views)) {
      throw std::logic_error("create_state left a gap in the state of " + name(entry, ""));
    }
    jobs_[i] = make_job(entry, views);
    set_kernel(i);
  }
}

void StepPlan::advance_step_counts() {
  static PyObject* const step_name = interned("step");
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    if (!entry.group->counts_steps) continue;
    if (!entry.count.data) {
      const auto next = py::reinterpret_borrow<py::object>(entry.step) + py::int_(1);
      if (PyDict_SetItem(entry.state, step_name, next.ptr())) throw py::error_already_set();
      continue;
    }
    if (entry.count.get() + 1 != entry.t) {  // the parameter is listed twice: its next step
      entry.t = entry.count.get() + 1;
      entry.folded = fold(entry);
      set_kernel(i);
    }
    entry.count.increment();
  }
}

// All but the kernel and its scalars.
Job job_for(int states, double grad_scale, const View* views, std::deque<Layout>* layouts) {
  Job job{};
  job.grad_scale = grad_scale;
  job.numel = views[kParam].numel;
  job.stream_count = kFirstState + states;
  for (int s = 0; s < job.stream_count; ++s) job.streams[s] = {views[s].data, views[s].dtype};
  Layout layout = common_layout(views, job.stream_count);
  if (!layout.empty()) {
    layouts->push_back(std::move(layout));
    job.layout = &layouts->back();
  }
  return job;
}

Job StepPlan::make_job(const Entry& entry, const View* views) {
  const auto states = static_cast<int>(entry.group->states.size());
  return job_for(states, entry.group->grad_scale, views, &layouts_);
}

}  // namespace

// ---- the engine ---------------------------------------------------------------------------------

Engine::Engine(const std::string& isa, bool fast_gather)
    : kernels_(isa.empty() ? *available_kernels().front() : kernels_named(isa)),
      reader_(fast_gather) {}

void Engine::step(const py::dict& state, const py::sequence& groups, int threads,
                  const py::object& fallback) const {
  StepPlan plan(kernels_, reader_, state, groups);
  plan.collect();
  plan.fold_scalars();
  if (!plan.unsupported.empty()) fallback(plan.unsupported);
  plan.bump_versions();
  plan.create_missing_states();
  plan.advance_step_counts();
  py::gil_scoped_release unlocked;
  run(plan.jobs(), useful_threads(plan.jobs(), threads));
}

void Engine::update(const std::string& rule_name, int flags, const std::vector<double>& scalars,
                    double grad_scale, const py::sequence& tensors, int threads) const {
  const Rule& rule = find_rule(kernels_, rule_name, flags);
  if (static_cast<int>(scalars.size()) != rule.scalars ||
      static_cast<int>(tensors.size()) != kFirstState + rule.states) {
    throw py::value_error(rule_name + " takes " + std::to_string(rule.scalars) + " scalars and " +
                          std::to_string(kFirstState + rule.states) + " tensors");
  }
  Held held;
  View views[kMaxStreams];
  for (size_t s = 0; s < tensors.size(); ++s) {
    const py::object tensor = tensors[s];
    held.push_back(tensor);
    if (!reader_.read(tensor.ptr(), &views[s], &held) || !same_shape(views[0], views[s])) {
      throw py::value_error("tensors[" + std::to_string(s) + "] is no CPU tensor of this shape");
    }
  }
  std::deque<Layout> layouts;
  std::vector<Job> jobs{job_for(rule.states, grad_scale, views, &layouts)};
  jobs[0].update = update_for(rule, views[kParam].dtype);
  jobs[0].scalars = scalars.data();
  py::gil_scoped_release unlocked;
  run(jobs, threads);
}

}  // namespace fusedopt
