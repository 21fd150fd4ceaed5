// What a plan has to know of parameters on CUDA devices.

#include <algorithm>

#include "cpu/dispatch.h"
#include "step/device_queue.h"
#include "step/plan.h"

namespace fusedopt {

size_t StepPlan::count_on(int device) {
  if (places_.empty()) {
    size_t* count = nullptr;
    int last = kHost;
    for (const Entry& entry : memory_.entries) {
      if (!count || entry.device != last) count = &places_[last = entry.device];
      ++*count;
    }
  }
  const auto place = places_.find(device);
  return place == places_.end() ? 0 : place->second;
}

std::vector<int> StepPlan::devices() {
  std::vector<int> devices;
  (void)count_on(kHost);
  for (const auto& [device, count] : places_) {
    if (device != kHost) devices.push_back(device);
  }
  return devices;
}

std::vector<Job> StepPlan::jobs_on(int device) {
  std::vector<Job> jobs;
  for (size_t i = 0; i < memory_.entries.size(); ++i) {
    if (memory_.entries[i].device == device) jobs.push_back(memory_.jobs[i]);
  }
  return jobs;
}

bool StepPlan::share_memory(int device) {
  OnDevice& there = *on(device);
  if (!there.knows) {
    const bool all_there = count_on(device) == memory_.jobs.size();
    there.shares = there.overlaps.any(all_there ? memory_.jobs : jobs_on(device));
    there.knows = true;
  }
  return there.shares;
}

void StepPlan::refuse_to_be_captured() const {
  for (const Entry& entry : memory_.entries) {
    const Group& group = *entry.group;
    if (!group.followers.empty()) {
      throw std::runtime_error(
          "a graph cannot capture a step of Lookahead or EMA, which the CPU counts; capture the "
          "wrapped optimizer's");
    }
    if (group.counts_steps && entry.count.device == kHost && !group.counts_on_device) {
      throw std::runtime_error(
          "a graph cannot capture a step that the CPU counts: the step of " + entry.name("") +
          " would be the same at each replay; pass capturable=True, or do not capture it");
    }
    if (entry.lacks_state) {
      throw std::runtime_error("a graph cannot capture the first step of " + entry.name("") +
                               ", since each replay would make its state anew; take one step "
                               "before the capture");
    }
    if (entry.has_to_move) {
      throw std::runtime_error("the step of " + entry.name("") +
                               " is not yet a float32 on its device; take one step before the "
                               "capture");
    }
  }
}

bool StepPlan::skips_on_host() const {
  return std::any_of(memory_.entries.begin(), memory_.entries.end(), [](const Entry& entry) {
    return !entry.group->followers.empty() || (entry.is_new && entry.group->starts_unlike);
  });
}

std::vector<cuda::NormItem> StepPlan::norm_items(int device) {
  std::vector<cuda::NormItem> items;
  items.reserve(count_on(device));
  for (const Entry& entry : memory_.entries) {
    if (entry.device == device && !entry.sums_elsewhere) items.push_back(entry.norm_item);
  }
  for (const Repeat& repeat : later_) {
    if (repeat.device == device && repeat.norm_job.numel) items.push_back(repeat.norm_item);
  }
  return items;
}

static int64_t* rounding_of(const Entry& entry) {
  return entry.rounding() ? static_cast<int64_t*>(entry.rounding()->data) : nullptr;
}

std::vector<cuda::Update> StepPlan::updates(int device, double factor) {
  std::vector<cuda::Update> updates;
  updates.reserve(count_on(device));
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
          const py::tuple numbers = py::make_tuple(group->lr);
          lr = params_.read_held(device_memory().attr("gather")(numbers, device));
        }
        clock.lr = lr.data;
        clock.lr_is_double = lr.dtype == DType::f64;
      }
    }
    clock.step = entry.count.device == device ? static_cast<float*>(entry.count.data) : nullptr;
    clock.t = entry.t;
    const Rule& rule = entry.group->kernel;
    updates.push_back({static_cast<int>(&rule - kernels_.rules), rule.scalars, &memory_.jobs[i],
                       memory_.jobs[i].grad_scale * factor, clock, rounding_of(entry)});
  }
  return updates;
}

std::vector<cuda::Update> StepPlan::updates_after(int device, int place) const {
  std::vector<cuda::Update> updates;
  if (!move_followers(groups_)) return updates;
  for (size_t i = 0; i < memory_.entries.size(); ++i) {
    const Entry& entry = memory_.entries[i];
    const Job* then = &memory_.jobs[i];
    for (int at = 0; then && at < place; ++at) then = then->then;
    if (entry.device != device || !then) continue;
    const Rule* const rule = static_cast<const JobAfter*>(then)->rule;
    updates.push_back({static_cast<int>(rule - kernels_.rules),
                       rule->scalars,
                       then,
                       1,
                       {},
                       rounding_of(entry),
                       /*draws_again=*/true});
  }
  return updates;
}

}  // namespace fusedopt
