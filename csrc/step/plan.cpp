#include "step/plan.h"

#include <pybind11/stl.h>

#include "cpu/dispatch.h"

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

std::string type_text(PyObject* object) {
  const auto self = py::reinterpret_borrow<py::object>(object);
  const auto text = [&](const char* attribute) {
    return py::cast<std::string>(py::str(self.attr(attribute)));
  };
  if (!py::hasattr(self, "layout") || !py::hasattr(self, "device")) {
    return py::cast<std::string>(py::repr(self));
  }
  // A class of its own may hold its elements in another way than these words say.
  const auto type = py::str(py::type::of(self).attr("__name__"));
  const std::string name = py::cast<std::string>(type);
  const std::string kind = name == "Tensor" || name == "Parameter" ? "tensor" : name;
  return "a " + text("layout") + " " + kind + " of " + text("dtype") + " and " + text("shape") +
         " on " + text("device");
}

// For example: exp_avg of params[3] ('layer.weight') of group 1
std::string StepPlan::name(const Entry& entry, const std::string& what) const {
  std::string text =
      what + (what.empty() ? "" : " of ") + "params[" + std::to_string(entry.index) + "]";
  const py::object& names = entry.group->names;
  if (!names.is_none() && entry.index < static_cast<Py_ssize_t>(py::len(names))) {
    text += " ('" + py::cast<std::string>(names[py::int_(entry.index)]) + "')";
  }
  if (groups_.size() > 1) text += " of group " + std::to_string(number_of(*entry.group));
  return text;
}

int StepPlan::number_of(const Group& group) const {
  int number = 0;
  while (&groups_[number] != &group) ++number;
  return number;
}

// ---- the parts of a step but for collect --------------------------------------------------------

PyObject* step_key() {
  static PyObject* const key = PyUnicode_InternFromString("step");
  return key;
}

StepPlan::StepPlan(const Kernels& kernels, const TensorReader& reader, const py::dict& state,
                   const py::sequence& groups, bool may_skip, PlanMemory* spare,
                   const std::vector<Place>* only)
    : kernels_(kernels),
      reader_(reader),
      state_(state),
      may_skip_(may_skip),
      spare_(spare),
      only_(only) {
  for (const py::handle group : groups) groups_.emplace_back(group);
  swap_with(spare);
}

StepPlan::~StepPlan() {
  entries_.clear();
  swap_with(spare_);
}

void StepPlan::swap_with(PlanMemory* memory) {
  entries_.swap(memory->entries);
  jobs_.swap(memory->jobs);
  std::swap(schedule_, memory->schedule);
  std::swap(counts_, memory->counts);
}

// From Python.
const Folded* StepPlan::fold(const Group& group, double t) {
  const auto scalars = py::cast<py::dict>(group.fold(t));
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
  if (is_ready()) return;
  // A rule that keeps no count only tells a parameter's first step from the others.
  for (Entry& entry : entries_) {
    if (!entry.group->counts_steps) entry.t = entry.is_new || entry.repeats_first ? 1 : 2;
  }
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    if (entry.folded) continue;
    const Group& group = *entry.group;
    if (entry.device == kHost && !PyFloat_Check(group.lr.ptr())) {
      throw py::value_error("lr of the group of " + name(entry, "") + " is " +
                            type_text(group.lr.ptr()) +
                            ", but the parameter is on cpu; pass a number, or a tensor on cpu");
    }
    const Entry* before = i > 0 ? &entries_[i - 1] : nullptr;
    const bool same = before && before->group == &group && before->t == entry.t;
    entry.folded = same                                        ? before->folded
                   : group.likely && group.likely_t == entry.t ? group.likely
                                                               : fold(group, entry.t);
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

void StepPlan::advance() const {
  for (const Entry& entry : entries_) {
    if (entry.count.data) {
      if (entry.count.device == kHost) entry.count.increment();
    } else if (entry.step) {
      const auto count = py::reinterpret_steal<py::object>(
          PyLong_Check(entry.step) ? PyLong_FromDouble(entry.t) : PyFloat_FromDouble(entry.t));
      if (PyDict_SetItem(entry.state, step_key(), count.ptr())) throw py::error_already_set();
    }
    if (entry.usual) {
      reader_.abi().bump_version(entry.records[kParam]);
    } else {
      reader_.bump_version(entry.param);
    }
  }
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

int64_t StepPlan::bytes() const {
  if (schedule_.fits) return schedule_.bytes();
  int64_t bytes = 0;
  for (const Job& job : jobs_) bytes += job.numel * job.bytes_per_element;
  return bytes;
}

std::vector<Job> StepPlan::jobs_of_norm() const {
  std::vector<Job> jobs = jobs_;
  for (const size_t i : distributed_) jobs[i].numel = 0;
  for (size_t i = 0; i < jobs.size(); ++i) {
    if (entries_[i].device != kHost) jobs[i].numel = 0;
  }
  for (const LaterNorm& later : later_norms_) {
    if (later.device == kHost) jobs.push_back(later.job);
  }
  return jobs;
}

}  // namespace fusedopt
