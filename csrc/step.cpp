#include "step.h"

#include <pybind11/stl.h>

#include <deque>

namespace fusedopt {

namespace {

// What one param group asks for: fusedopt._base.Group, read once a step.
struct Group {
  Group(const Kernels& kernels, py::handle source)
      : params(source.attr("params")),
        names(source.attr("names")),
        has_kernel(py::cast<bool>(source.attr("has_kernel"))),
        rule(find_rule(kernels, py::cast<std::string>(source.attr("rule")),
                       py::cast<int>(source.attr("flags")))),
        states(py::cast<std::vector<py::str>>(source.attr("states"))),
        counts_steps(py::cast<bool>(source.attr("counts_steps"))),
        grad_scale(py::cast<double>(source.attr("grad_scale"))),
        scalars(source.attr("scalars")),
        create_state(source.attr("create_state")) {
    if (static_cast<int>(states.size()) != rule.states) {
      throw std::logic_error(std::string("rule ") + rule.name + " has another number of states");
    }
  }

  py::list params;
  py::object names;
  bool has_kernel;
  const Rule& rule;
  std::vector<py::str> states;
  bool counts_steps;
  double grad_scale;
  py::object scalars, create_state;
};

// One parameter that has a gradient and a kernel.
struct Entry {
  const Group* group;
  Py_ssize_t index;
  PyObject* param;
  PyObject* state = nullptr;  // its dict; null while it has none
  View views[kMaxStreams];
  bool complete = true;  // every state tensor exists
  double t = 1;          // the number of this step
  PyObject* step = nullptr;
  TensorReader::Count count;  // where step is a tensor
  bool step_is_number = false;
  const double* scalars = nullptr;
};

class StepPlan {
 public:
  StepPlan(const Kernels& kernels, const TensorReader& reader, const py::dict& state,
           const py::sequence& groups)
      : reader_(reader), state_(state) {
    size_t count = 0;
    for (const py::handle group : groups) {
      groups_.emplace_back(kernels, group);
      count += groups_.back().params.size();
    }
    entries_.reserve(count);
    held_.reserve(count * kMaxStreams);
  }

  void collect();
  void fold_scalars();
  void bump_versions() const;
  void create_missing_states();
  void advance_step_counts();
  std::vector<Job> jobs();

  py::list unsupported;  // [(group index, parameter), ...]

 private:
  void collect(const Group& group, int group_index, Py_ssize_t index);
  void read_states(Entry& entry);
  void read_step(Entry& entry);
  std::string name(const Entry& entry, const std::string& what) const;

  const TensorReader& reader_;
  const py::dict& state_;
  std::deque<Group> groups_;
  std::vector<Entry> entries_;
  Held held_;
  std::deque<std::vector<double>> scalars_;
  std::deque<Layout> layouts_;
};

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// ---- messages -----------------------------------------------------------------------------------

// For example: exp_avg of params[3] ('layer.weight') of group 1
std::string StepPlan::name(const Entry& entry, const std::string& what) const {
  std::string text = what + (what.empty() ? "" : " of ") + "params[" +
                     std::to_string(entry.index) + "]";
  if (!entry.group->names.is_none()) {
    text += " ('" + py::cast<std::string>(entry.group->names[py::int_(entry.index)]) + "')";
  }
  if (groups_.size() > 1) {
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (&groups_[i] == entry.group) text += " of group " + std::to_string(i);
    }
  }
  return text;
}

// ---- gathering and validation -------------------------------------------------------------------

void StepPlan::collect() {
  for (size_t g = 0; g < groups_.size(); ++g) {
    const auto count = static_cast<Py_ssize_t>(groups_[g].params.size());
    for (Py_ssize_t i = 0; i < count; ++i) collect(groups_[g], static_cast<int>(g), i);
  }
}

void StepPlan::collect(const Group& group, int group_index, Py_ssize_t index) {
  static PyObject* const grad_name = interned("grad");
  Entry entry;
  entry.group = &group;
  entry.index = index;
  entry.param = PyList_GET_ITEM(group.params.ptr(), index);
  auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(entry.param, grad_name));
  if (!grad) throw py::error_already_set();
  if (grad.is_none()) return;
  held_.push_back(py::reinterpret_borrow<py::object>(entry.param));

  View& p = entry.views[kParam];
  View& g = entry.views[kGrad];
  if (!group.has_kernel || !reader_.read(entry.param, &p, &held_) ||
      !reader_.read(grad.ptr(), &g, &held_)) {
    unsupported.append(py::make_tuple(group_index, py::handle(entry.param)));
    return;
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
  held_.push_back(std::move(grad));
  if (group.rule.states > 0 || group.counts_steps) read_states(entry);
  entries_.push_back(entry);
}

// Reads what exists of the entry's state, so that all of it is validated before anything changes.
void StepPlan::read_states(Entry& entry) {
  const Group& group = *entry.group;
  entry.complete = true;
  entry.state = PyDict_GetItemWithError(state_.ptr(), entry.param);
  if (!entry.state && PyErr_Occurred()) throw py::error_already_set();
  if (!entry.state) {
    entry.complete = false;
    return;
  }
  if (group.counts_steps) {
    read_step(entry);
  }
  for (int s = 0; s < group.rule.states; ++s) {
    PyObject* tensor = PyDict_GetItemWithError(entry.state, group.states[s].ptr());
    if (!tensor || tensor == Py_None) {
      if (PyErr_Occurred()) throw py::error_already_set();
      entry.complete = false;
      continue;
    }
    held_.push_back(py::reinterpret_borrow<py::object>(tensor));
    View& view = entry.views[kFirstState + s];
    const auto state_name = [&] { return name(entry, std::string(group.states[s])); };
    if (!reader_.read(tensor, &view, &held_)) {
      throw py::value_error(state_name() + " is " +
                            py::cast<std::string>(py::str(py::type::of(py::handle(tensor)))) +
                            ", expected a strided float32, float64, bfloat16 or float16 tensor on "
                            "cpu; move it there, or delete opt.state[p] to start anew");
    }
    const View& p = entry.views[kParam];
    if (!same_shape(p, view)) {
      throw py::value_error(state_name() + " has shape " + shape_text(view) +
                            ", expected " + shape_text(p) +
                            "; load a checkpoint of this model, or delete opt.state[p] to start "
                            "anew");
    }
    if (overlaps_itself(view)) {
      throw py::value_error(state_name() +
                            " is an expanded view in which elements share memory; expected every "
                            "element in a place of its own; store a clone() of it");
    }
  }
}

void StepPlan::read_step(Entry& entry) {
  static PyObject* const step_name = interned("step");
  entry.step = PyDict_GetItemWithError(entry.state, step_name);
  if (!entry.step) {
    if (PyErr_Occurred()) throw py::error_already_set();
    entry.complete = false;
    return;
  }
  held_.push_back(py::reinterpret_borrow<py::object>(entry.step));
  using Count = TensorReader::Count;
  double steps;
  if (reader_.read_count(entry.step, &entry.count, &held_)) {
    entry.step_is_number = false;
    const void* at = entry.count.data;
    steps = entry.count.type == Count::f32   ? *static_cast<const float*>(at)
            : entry.count.type == Count::f64 ? *static_cast<const double*>(at)
                                             : static_cast<double>(*static_cast<const int64_t*>(at));
  } else if (PyLong_Check(entry.step) || PyFloat_Check(entry.step)) {
    entry.step_is_number = true;
    steps = PyFloat_AsDouble(entry.step);
  } else {
    throw py::type_error(name(entry, "step") + " is " +
                         py::cast<std::string>(py::repr(py::handle(entry.step))) +
                         ", expected a number, or a tensor on cpu with one element of dtype "
                         "float32, float64 or int64; store the number of steps taken so far");
  }
  if (!(steps >= 0)) {
    throw py::value_error(name(entry, "step") + " is " + std::to_string(steps) +
                          ", expected 0 or more; store the number of steps taken so far");
  }
  entry.t = steps + 1;
}

// ---- the parts of a step, in the order in which they can fail ------------------------------------

// The rule's scalars for each step number that occurs in a group: one call into Python each.
void StepPlan::fold_scalars() {
  const Entry* previous = nullptr;
  for (Entry& entry : entries_) {
    const Group& group = *entry.group;
    // A rule that keeps no count only tells a parameter's first step from the others.
    if (!group.counts_steps) entry.t = entry.complete ? 2 : 1;
    if (previous && previous->group == &group && previous->t == entry.t) {
      entry.scalars = previous->scalars;
    } else {
      const py::object count =
          entry.t < 9e15 ? py::object(py::int_(static_cast<int64_t>(entry.t))) : py::float_(entry.t);
      std::vector<double> values;
      for (const auto& item : py::cast<py::dict>(group.scalars(count))) {
        values.push_back(py::cast<double>(item.second));
      }
      if (static_cast<int>(values.size()) != group.rule.scalars) {
        throw std::logic_error(std::string("rule ") + group.rule.name +
                               " has another number of scalars");
      }
      scalars_.push_back(std::move(values));
      entry.scalars = scalars_.back().data();
    }
    previous = &entry;
  }
}

void StepPlan::bump_versions() const {
  if (entries_.empty()) return;
  py::list params(entries_.size());
  for (size_t i = 0; i < entries_.size(); ++i) {
    params[i] = py::reinterpret_borrow<py::object>(entries_[i].param);
  }
  py::module_::import("torch.autograd.graph").attr("increment_version")(params);
}

void StepPlan::create_missing_states() {
  for (Entry& entry : entries_) {
    if (entry.complete) continue;
    entry.group->create_state(py::handle(entry.param));
    read_states(entry);
    if (!entry.complete) throw std::logic_error(name(entry, "") + ": create_state left a gap");
  }
}

void StepPlan::advance_step_counts() {
  static PyObject* const step_name = interned("step");
  using Count = TensorReader::Count;
  for (const Entry& entry : entries_) {
    if (!entry.group->counts_steps) continue;
    if (entry.step_is_number) {
      const auto next = py::reinterpret_steal<py::object>(
          PyNumber_Add(entry.step, py::int_(1).ptr()));
      if (!next || PyDict_SetItem(entry.state, step_name, next.ptr())) {
        throw py::error_already_set();
      }
      continue;
    }
    switch (entry.count.type) {
      case Count::f32: *static_cast<float*>(entry.count.data) += 1; break;
      case Count::f64: *static_cast<double*>(entry.count.data) += 1; break;
      case Count::i64: *static_cast<int64_t*>(entry.count.data) += 1; break;
    }
  }
}

Job make_job(const Rule& rule, const double* scalars, double grad_scale, const View* views,
             std::deque<Layout>* layouts) {
  Job job{};
  job.update = views[kParam].dtype == DType::f64 ? rule.update_f64 : rule.update_f32;
  job.scalars = scalars;
  job.grad_scale = grad_scale;
  job.numel = views[kParam].numel;
  job.stream_count = kFirstState + rule.states;
  for (int s = 0; s < job.stream_count; ++s) job.streams[s] = {views[s].data, views[s].dtype};
  Layout layout = common_layout(views, job.stream_count);
  if (!layout.empty()) {
    layouts->push_back(std::move(layout));
    job.layout = &layouts->back();
  }
  return job;
}

std::vector<Job> StepPlan::jobs() {
  std::vector<Job> jobs;
  jobs.reserve(entries_.size());
  for (const Entry& entry : entries_) {
    const Group& group = *entry.group;
    jobs.push_back(
        make_job(group.rule, entry.scalars, group.grad_scale, entry.views, &layouts_));
  }
  return jobs;
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
  plan.bump_versions();
  if (!plan.unsupported.empty()) fallback(plan.unsupported);
  plan.create_missing_states();
  const std::vector<Job> jobs = plan.jobs();
  plan.advance_step_counts();
  py::gil_scoped_release unlocked;
  run(jobs, useful_threads(jobs, threads));
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
    if (!reader_.read(tensor.ptr(), &views[s], &held) || !same_shape(views[0], views[s])) {
      throw py::value_error("tensors[" + std::to_string(s) + "] is no CPU tensor of this shape");
    }
  }
  std::deque<Layout> layouts;
  const std::vector<Job> jobs{make_job(rule, scalars.data(), grad_scale, views, &layouts)};
  py::gil_scoped_release unlocked;
  run(jobs, threads);
}

}  // namespace fusedopt
