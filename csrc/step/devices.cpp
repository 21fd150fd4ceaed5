// What a plan has to know of parameters on CUDA devices.

#include <algorithm>

#include "cpu/dispatch.h"
#include "step/plan.h"

namespace fusedopt {

// ---- before anything changes --------------------------------------------------------------------

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

bool StepPlan::counts_on_device(const Entry& entry) const {
  return entry.device != kHost && (entry.group->counts_on_device || may_skip_);
}

// ---- what is launched ---------------------------------------------------------------------------

// Puts counts where they belong: a checkpoint may have them elsewhere, and a step that only a
// device knows to be skipped is counted there.
void StepPlan::move_counts() {
  if (is_ready()) return;  // none was moved
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
  for (const LaterNorm& later : later_norms_) {
    if (later.device == device && later.job.numel) items.push_back(later.norm_item);
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
