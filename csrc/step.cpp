#include "step.h"

#include <limits>

#include "plan.h"

namespace fusedopt {

Engine::Engine(const std::string& isa, bool fast_gather)
    : kernels_(isa.empty() ? *available_kernels().front() : kernels_named(isa)),
      reader_(fast_gather) {}

static Scaling read_scaling(const py::object& source) {
  Scaling scaling;
  scaling.unscale = py::cast<double>(source.attr("unscale"));
  scaling.coefficient = py::cast<double>(source.attr("coefficient"));
  scaling.skip_nonfinite = py::cast<bool>(source.attr("skip_nonfinite"));
  const py::object max_norm = source.attr("max_norm");
  scaling.clip = !max_norm.is_none();
  if (scaling.clip) scaling.max_norm = py::cast<double>(max_norm);
  return scaling;
}

std::pair<double, bool> Engine::step(const py::dict& state, const py::sequence& groups, int threads,
                                     const py::object& scaling_source, const py::object& fallback,
                                     const py::object& outside) const {
  Scaling scaling = read_scaling(scaling_source);
  const bool needs_norm = scaling.needs_norm();
  StepPlan plan(kernels_, reader_, state, groups);
  plan.collect();
  plan.fold_scalars();
  threads = useful_threads(plan.jobs(), threads);

  Verdict verdict{};
  const bool needs_python =
      plan.lacks_states() || !plan.unsupported.empty() || !plan.outside.empty();
  if (needs_norm && needs_python) {  // the verdict first; then it is only a factor
    const std::vector<Job> jobs = plan.jobs_of_norm();
    double sum;
    {
      py::gil_scoped_release unlocked;
      sum = run_norm(kernels_, Norm::two, jobs, threads);
    }
    if (!plan.outside.empty()) sum += py::cast<double>(outside(plan.outside));
    verdict = decide(scaling, sum);
    if (verdict.skipped) return {verdict.norm, true};
    scaling = {};
    scaling.coefficient = verdict.factor;
  }
  if (!plan.unsupported.empty()) {
    fallback(plan.unsupported, scaling.unscale * scaling.coefficient);
  }
  plan.create_missing_states();
  {
    py::gil_scoped_release unlocked;
    const Verdict last = run(kernels_, plan.jobs(), threads, scaling);
    if (scaling.needs_norm()) verdict = last;
    if (!verdict.skipped) plan.advance_counts();
  }
  if (!verdict.skipped) {
    plan.advance_plain_counts();
    plan.bump_versions();
  }
  return {needs_norm ? verdict.norm : std::numeric_limits<double>::quiet_NaN(), verdict.skipped};
}

std::pair<double, py::list> Engine::norm(const py::sequence& tensors, double order,
                                         int threads) const {
  const Norm norm = order == 1 ? Norm::one : order == 2 ? Norm::two : Norm::inf;
  Held held;
  Layouts layouts;
  std::vector<Job> jobs;
  py::list others;
  for (const py::handle each : tensors) {
    auto tensor = py::reinterpret_borrow<py::object>(each);
    held.push_back(tensor);
    View view;
    if (reader_.read(tensor.ptr(), &view, &held) && !view.is_local_part) {
      set_norm(view, &layouts, &jobs.emplace_back());
    } else {
      others.append(tensor);
    }
  }
  double sum;
  {
    py::gil_scoped_release unlocked;
    sum = run_norm(kernels_, norm, jobs, useful_threads(jobs, threads));
  }
  return {sum, others};
}

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
                 same_shape(views[0], views[s]);
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
    run_updates(jobs, useful_threads(jobs, threads), 1);
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
      throw py::value_error("tensors[" + std::to_string(s) + "] is no CPU tensor of this shape");
    }
  }
  Layouts layouts;
  std::vector<Job> jobs(1);
  set_streams(views, kFirstState + rule.states, &layouts, &jobs[0]);
  set_rule(rule, scalars.data(), &jobs[0]);
  jobs[0].grad_scale = grad_scale;
  py::gil_scoped_release unlocked;
  run_updates(jobs, threads, 1);
}

}  // namespace fusedopt
