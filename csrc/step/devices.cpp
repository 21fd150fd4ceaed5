// What a plan has to know of parameters on CUDA devices.

#include <algorithm>

#include "cpu/dispatch.h"
#include "step/plan.h"

namespace fusedopt {

std::vector<int> StepPlan::devices() const {
  std::vector<int> devices;
  for (const Entry& entry : memory_.entries) {
    const bool known = std::count(devices.begin(), devices.end(), entry.device) != 0;
    if (entry.device != kHost && !known) devices.push_back(entry.device);
  }
  return devices;
}

std::vector<Job> StepPlan::jobs_on(int device) const {
  std::vector<Job> jobs;
  for (size_t i = 0; i < memory_.entries.size(); ++i) {
    if (memory_.entries[i].device == device) jobs.push_back(memory_.jobs[i]);
  }
  return jobs;
}

void StepPlan::refuse_to_be_captured() const {
  for (const Entry& entry : memory_.entries) {
    const Group& group = *entry.group;
    if (group.has_slow) {
      throw std::runtime_error(
          "a graph cannot capture a step of Lookahead, whose slow weights move in every k-th step "
          "alone; capture the wrapped optimizer's");
    }
    if (group.counts_steps && entry.count.device == kHost && !group.counts_on_device) {
      throw std::runtime_error(
          "a graph cannot capture a step that the CPU counts: the step of " + entry.name("") +
          " would be the same at each replay; pass capturable=True, or do not capture it");
    }
    if (group.counts_steps && entry.count.device == kHost && !entry.is_new) {
      throw std::runtime_error("the step of " + entry.name("") +
                               " is still counted on the CPU; take a step before the capture");
    }
  }
}

bool StepPlan::skips_on_host() const {
  return std::any_of(memory_.entries.begin(), memory_.entries.end(), [](const Entry& entry) {
    return entry.group->has_slow || (entry.is_new && entry.group->starts_unlike);
  });
}

std::vector<cuda::NormItem> StepPlan::norm_items(int device) const {
  std::vector<cuda::NormItem> items;
  for (const Entry& entry : memory_.entries) {
    if (entry.device == device && !entry.sums_elsewhere) items.push_back(entry.norm_item);
  }
  for (const Repeat& repeat : later_) {
    if (repeat.device == device && repeat.norm_job.numel) items.push_back(repeat.norm_item);
  }
  return items;
}

std::vector<cuda::Update> StepPlan::updates(int device, double factor) {
  std::vector<cuda::Update> updates;
  const Group* group = nullptr;
  cuda::Clock clock;
  for (size_t i = 0; i < memory_.entries.size(); ++i) {
    const Entry& entry = memory_.entries[i];
    if (entry.device != device) continue;
    if (entry.group != group) {
      group = entry.group;
      clock = {};
      if (PyFloat_Check(group->lr.ptr())) {
        clock.host_lr = py::cast<double>(group->lr);
      } else {
        View lr = params_.read_held(group->lr);
        if (lr.device != device) {
          const auto memory = py::module_::import("fusedopt._memory");
          lr = params_.read_held(memory.attr("gather")(py::make_tuple(group->lr), device));
        }
        clock.lr = lr.data;
        clock.lr_is_double = lr.dtype == DType::f64;
      }
    }
    clock.step = entry.count.device == device ? static_cast<float*>(entry.count.data) : nullptr;
    clock.t = entry.t;
    const Rule& rule = entry.folded->rule;
    updates.push_back({static_cast<int>(&rule - kernels_.rules), rule.scalars, &memory_.jobs[i],
                       memory_.jobs[i].grad_scale * factor, clock,
                       static_cast<int64_t*>(entry.rounding.data)});
  }
  return updates;
}

std::vector<cuda::Update> StepPlan::updates_after(int device) const {
  const Rule& rule = find_rule(kernels_, "lookahead", 0);
  std::vector<cuda::Update> updates;
  for (size_t i = 0; i < memory_.entries.size(); ++i) {
    const Job* then = memory_.jobs[i].then;
    const Entry& entry = memory_.entries[i];
    if (entry.device != device || !then) continue;
    updates.push_back({static_cast<int>(&rule - kernels_.rules),
                       rule.scalars,
                       then,
                       1,
                       {},
                       static_cast<int64_t*>(entry.rounding.data),
                       /*draws_again=*/true});
  }
  return updates;
}

}  // namespace fusedopt
