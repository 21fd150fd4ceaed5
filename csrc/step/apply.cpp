// What the engine does without an optimizer: norms, and one rule on some tensors.

#include <map>

#include "engine/run.h"
#include "step/device_queue.h"
#include "step/interface.h"
#include "step/jobs.h"

namespace fusedopt {

// ---- norms --------------------------------------------------------------------------------------

py::tuple Engine::norm(const py::sequence& tensors, double order, int threads) const {
  const Norm norm = order == 1 ? Norm::one : order == 2 ? Norm::two : Norm::inf;
  Held held;
  Layouts layouts;
  std::vector<Job> jobs;
  std::map<int, std::vector<cuda::NormItem>> items;
  py::list others;
  for (const py::handle each : tensors) {
    auto tensor = py::reinterpret_borrow<py::object>(each);
    held.push_back(tensor);
    View view;
    const bool readable = reader_.read(tensor.ptr(), &view, &held) && !view.is_local_part;
    if (readable && view.device == kHost) {
      set_norm(view, &layouts, &jobs.emplace_back());
    } else if (readable) {
      if (!common_layout(&view, 1).empty()) {
        held.push_back(device_memory().attr("without_gaps")(tensor));
        reader_.read(held.back().ptr(), &view, &held);
      }
      items[view.device].push_back({view.data, view.numel, 0, view.dtype});
    } else {
      others.append(tensor);
    }
  }
  py::list sums;
  for (const auto& [device, some] : items) {
    int64_t bytes = 0;
    sums.append(DeviceQueue(*device_kernels_, reader_, device, &bytes).sum(norm, some));
  }
  double sum;
  {
    py::gil_scoped_release unlocked;
    sum = run_norm(kernels_, norm, jobs, threads);
  }
  return py::make_tuple(sum, sums, others);
}

// ---- one rule, without an optimizer -------------------------------------------------------------

py::list Engine::apply(const std::string& rule_name, const std::vector<double>& scalars,
                       const py::sequence& rows, int threads) const {
  const Rule& rule = find_rule(kernels_, rule_name, 0);
  Held held;
  Layouts layouts;
  std::vector<Job> jobs;
  py::list others;
  for (const py::handle row : rows) {
    const auto tensors = py::reinterpret_borrow<py::sequence>(row);
    View views[kMaxStreams];
    bool readable = true;
    for (size_t s = 0; s < tensors.size(); ++s) {
      held.push_back(tensors[s]);
      readable = readable && reader_.read(held.back().ptr(), &views[s], &held) &&
                 views[s].device == kHost && same_shape(views[0], views[s]);
    }
    if (!readable) {
      others.append(row);
      continue;
    }
    if (overlaps_itself(views[kParam])) {
      throw py::value_error("a tensor of shape " + shape_text(views[kParam]) +
                            " is a view in which elements share memory; expected every element in "
                            "a place of its own; replace it by a clone() of it");
    }
    Job& job = jobs.emplace_back();
    set_streams(views, kFirstState + rule.states, &layouts, &job);
    set_rule(rule, scalars.data(), &job);
  }
  {
    py::gil_scoped_release unlocked;
    run_updates(kernels_, jobs, threads, 1);
  }
  return others;
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
      throw py::value_error("tensors[" + std::to_string(s) + "] is no tensor of this shape here");
    }
  }
  Layouts layouts;
  std::vector<Job> jobs(1);
  set_streams(views, kFirstState + rule.states, &layouts, &jobs[0]);
  set_rule(rule, scalars.data(), &jobs[0]);
  jobs[0].grad_scale = grad_scale;
  if (views[0].device != kHost) {
    if (jobs[0].layout || !cuda::can_access(jobs[0])) {
      throw py::value_error("no kernel of a device takes tensors of these strides and dtypes");
    }
    int64_t bytes = 0;
    DeviceQueue queue(*device_kernels_, reader_, views[0].device, &bytes);
    const int number = static_cast<int>(&rule - kernels_.rules);
    queue.update({{number, rule.scalars, &jobs[0], grad_scale, {}}}, /*in_order=*/false);
    queue.launch();
    return;
  }
  py::gil_scoped_release unlocked;
  run_updates(kernels_, jobs, threads, 1);
}

}  // namespace fusedopt
