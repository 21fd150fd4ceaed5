#include "step/interface.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "cuda/kernel.h"
#include "engine/run.h"
#include "step/device_queue.h"
#include "step/known_groups.h"
#include "step/plan.h"
#include "step/watched.h"
#if defined(FUSEDOPT_EMULATED_DEVICE)
#include "emulated_device.h"
#endif

namespace fusedopt {

// Kernels that the CPU plays, in a build for tests; or null.
static const cuda::Kernels* played_kernels(const std::string& device) {
#if defined(FUSEDOPT_EMULATED_DEVICE)
  return cuda::emulated_kernels(device);
#else
  (void)device;
  return nullptr;
#endif
}

static const cuda::Kernels* device_kernels(const std::string& device) {
  if (device == "cuda") return cuda::compiled_kernels();
  if (device == "none") return nullptr;
  if (const cuda::Kernels* const kernels = played_kernels(device)) return kernels;
  throw py::value_error("device is '" + device + "', expected one of: cuda, none");
}

Engine::Engine(const std::string& isa, bool fast_gather, const std::string& device)
    : kernels_(isa.empty() ? *available_kernels().front() : kernels_named(isa)),
      device_kernels_(device_kernels(device)),
      reader_(fast_gather, device_kernels_ ? device_kernels_->why_not : nullptr,
              played_kernels(device) != nullptr),
      spare_(std::make_unique<PlanMemory>()) {}

Engine::~Engine() = default;

constexpr double kNoNorm = std::numeric_limits<double>::quiet_NaN();  // nothing asked for it

// Whether other threads of Python would notice that they wait for the GIL: it changes hands every 5
// ms, in which smaller steps are done.
static bool takes_long(const StepPlan& plan) {
  constexpr int64_t kLongBytes = 32 * 1024 * 1024;
  return plan.bytes() > kLongBytes;
}

// ---- steps --------------------------------------------------------------------------------------

// A number; one on a device is waited for.
static double wait_for(const py::handle number) {
  return py::cast<double>(PyFloat_Check(number.ptr()) ? py::reinterpret_borrow<py::object>(number)
                                                      : number.attr("item")());
}

static Scaling read_scaling(const AskedScaling& asked, const Window& window) {
  Scaling scaling;
  scaling.unscale = wait_for(asked.unscale);
  scaling.coefficient = wait_for(asked.coefficient);
  scaling.skip_nonfinite = asked.skip_nonfinite;
  scaling.clip = asked.clips();
  if (scaling.clip) scaling.max_norm = py::cast<double>(asked.max_norm);
  if (const auto& watch = asked.watch) {
    scaling.spikes = watch->by(window.data());
    scaling.knows_norm = watch->knows_norm();
    if (scaling.knows_norm) scaling.known_norm = wait_for(watch->norm);
  }
  return scaling;
}

static Window window_on(const AskedScaling& asked, int place) {
  return asked.watch ? Window(*asked.watch, place) : Window();
}

static void remember(const Scaling& scaling, const Verdict& verdict, const Window& window) {
  if (!scaling.spikes.norms) return;
  remember(scaling.spikes, verdict.judgement);
  window.put_back();
}

// Whether it is known, or may be waited for, that there is to be no step.
static bool is_to_skip(const AskedScaling& asked) {
  return !asked.skip.is_none() && wait_for(asked.skip) != 0;
}

py::tuple Engine::step(const py::object& optimizer, KnownGroups* known, const py::sequence& sources,
                       int threads, const py::tuple& scaling_source, const py::object& fallback,
                       const py::object& outside, const py::object& watcher) const {
  const AskedScaling asked(scaling_source);
  const auto state = py::cast<py::dict>(optimizer.attr("state"));
  std::deque<Group> groups = known->read(optimizer, sources, kernels_);
  StepPlan plan(kernels_, reader_, state, &groups, asked.may_skip(), spare_.get());
  const Watched watched(watcher, groups);
  plan.collect(threads);
  const ParamReader& params = plan.params();
  if (params.uses_devices() || asked.has_tensors() || takes_long(plan)) plan.hold();
  plan.fold_scalars();
  const bool in_parts = params.uses_devices() || plan.lacks_states() || !plan.later().empty() ||
                        !params.unsupported().empty() || !params.outside().empty();
  if (in_parts || is_to_skip(asked)) {
    return step_in_parts(&plan, state, &groups, asked, threads, fallback, outside, watched);
  }

  const Window window = window_on(asked, kHost);
  const Scaling scaling = read_scaling(asked, window);
  plan.complete_states();
  Sums* const rows = plan.jobs().empty() ? nullptr : watched.rows(kHost);
  std::vector<Sums> sums(rows ? plan.jobs().size() : 0);
  Verdict verdict;
  {
    std::optional<py::gil_scoped_release> unlocked;
    if (params.holds()) unlocked.emplace();
    verdict =
        run(kernels_, plan.jobs(), threads, scaling, plan.schedule(), rows ? sums.data() : nullptr);
  }
  if (!verdict.skipped) {
    if (rows) plan.write_rows(kHost, watched, sums, rows);
    plan.advance();
  }
  remember(scaling, verdict, window);
  return py::make_tuple(scaling.needs_norm() ? verdict.norm : kNoNorm, verdict.skipped,
                        verdict.factor);
}

void Engine::step_later(std::vector<Repeat> later, const py::dict& state, std::deque<Group>* groups,
                        bool may_skip, DeviceQueues* queues, int threads, double factor,
                        const Watched& watched) const {
  while (!later.empty()) {
    StepPlan plan(kernels_, reader_, state, groups, may_skip, spare_.get());
    plan.collect_again(later);
    plan.fold_scalars();
    update_parts(&plan, queues, threads, factor, watched);
    later = plan.later();
  }
}

py::tuple Engine::step_in_parts(StepPlan* plan, const py::dict& state, std::deque<Group>* groups,
                                const AskedScaling& asked, int threads, const py::object& fallback,
                                const py::object& outside, const Watched& watched) const {
  DeviceQueues queues;
  for (const int device : plan->devices()) {
    queues.emplace_back(*device_kernels_, reader_, device, &plan->on(device)->bytes);
    if (queues.back().is_capturing()) plan->refuse_to_be_captured();
  }
  const bool needs_norm = asked.needs_norm();
  const bool uses_host = plan->count_on(kHost) != 0;

  // What the norm adds up: on the CPU, and elsewhere.
  double sum = 0, factor = 1;
  py::list sums;
  if (needs_norm) {
    if (uses_host) {
      py::gil_scoped_release unlocked;
      sum = run_norm(kernels_, Norm::two, plan->jobs_of_norm(), threads);
    }
    if (!plan->params().outside().empty()) {
      const py::object rest = outside(plan->params().outside());
      if (PyFloat_Check(rest.ptr())) {
        sum += py::cast<double>(rest);
      } else {
        sums.append(rest);
      }
    }
  }

  Scaling scaling;
  Verdict verdict{};
  Window window;
  py::object norm = py::float_(kNoNorm);
  py::object skipped = py::bool_(false), said_factor = py::none();
  const bool waits = uses_host || queues.empty() || !plan->params().unsupported().empty() ||
                     (asked.may_skip() && plan->skips_on_host());
  if (needs_norm && (waits || queues.size() > 1)) {  // each device needs the others' sums
    for (DeviceQueue& queue : queues) {
      sums.append(queue.sum(Norm::two, plan->norm_items(queue.device())));
    }
  }
  if (waits) {  // for the verdict, which is needed on the CPU
    window = window_on(asked, kHost);
    scaling = read_scaling(asked, window);
    for (const py::handle each : sums) sum += wait_for(each);
    verdict = decide(scaling, sum);
    if (needs_norm) norm = py::float_(verdict.norm);
    if (is_to_skip(asked)) return py::make_tuple(norm, true, verdict.factor);
    if (verdict.skipped) {
      remember(scaling, verdict, window);
      return py::make_tuple(norm, true, verdict.factor);
    }
    factor = verdict.factor;
  } else if (needs_norm || asked.may_skip() || asked.has_tensors() || asked.watch) {
    for (DeviceQueue& queue : queues) {
      const bool alone = needs_norm && queues.size() == 1;
      const Window here = window_on(asked, queue.place());
      queue.decide(asked, sum, sums,
                   alone ? plan->norm_items(queue.device()) : std::vector<cuda::NormItem>(), here);
      // All decide alike, and one remembers: that where the optimizer has its window, if any.
      if (&queue == &queues.front() || !here.is_copy()) window = here;
    }
    if (needs_norm) norm = queues[0].norm_result();
    if (asked.may_skip()) skipped = queues[0].skipped_result();
    if (asked.says_factor) said_factor = queues[0].factor_result();
  } else {
    factor = decide(read_scaling(asked, window), 0).factor;
  }

  if (!plan->params().unsupported().empty()) fallback(plan->params().unsupported(), factor);
  update_parts(plan, &queues, threads, factor, watched);
  step_later(plan->later(), state, groups, asked.may_skip(), &queues, threads, factor, watched);
  if (waits) {
    remember(scaling, verdict, window);
  } else {
    window.put_back();
  }
  if (said_factor.is_none()) said_factor = py::float_(factor);
  return py::make_tuple(norm, skipped, said_factor);
}

using Followers = std::vector<std::vector<cuda::Update>>;  // by their place

// Updates, of which statistics are taken. Where one finds what another has left, each is watched by
// itself; but those of followers, which come after all others, with them.
static void update_watched(const DeviceQueue& queue, const std::vector<cuda::Update>& updates,
                           const Followers& after, const std::vector<cuda::WatchItem>& items,
                           bool in_order) {
  const bool follows =
      std::any_of(after.begin(), after.end(), [](const auto& each) { return !each.empty(); });
  const bool one_by_one = in_order && !follows;
  const size_t count = one_by_one ? 1 : updates.size();
  for (size_t i = 0; i < updates.size(); i += count) {
    const auto begin = static_cast<ptrdiff_t>(i), end = static_cast<ptrdiff_t>(i + count);
    const auto add_up = queue.watch({items.begin() + begin, items.begin() + end});
    queue.update({updates.begin() + begin, updates.begin() + end}, in_order);
    for (const auto& each : after) queue.update(each, in_order);
    add_up();
  }
}

void Engine::update_parts(StepPlan* plan, DeviceQueues* queues, int threads, double factor,
                          const Watched& watched) const {
  Sums* const rows = plan->count_on(kHost) != 0 ? watched.rows(kHost) : nullptr;
  plan->complete_states();
  for (DeviceQueue& queue : *queues) {
    const bool in_order = plan->share_memory(queue.device());
    const auto updates = plan->updates(queue.device(), factor);
    Followers after;
    for (int place = 1; place <= kMaxFollowers; ++place) {
      after.push_back(plan->updates_after(queue.device(), place));
    }
    if (Sums* const there = watched.rows(queue.place())) {
      update_watched(queue, updates, after, plan->watch_items(queue.device(), watched, there),
                     in_order);
    } else {
      queue.update(updates, in_order);
      for (const auto& each : after) queue.update(each, in_order);
    }
  }
  for (DeviceQueue& queue : *queues) queue.launch();
  if (plan->count_on(kHost) != 0) {
    const std::vector<Job> on_host = plan->jobs_on(kHost);
    std::vector<Sums> sums(rows ? on_host.size() : 0);
    {
      py::gil_scoped_release unlocked;
      run_updates(kernels_, on_host, threads, factor, rows ? sums.data() : nullptr);
    }
    if (rows) plan->write_rows(kHost, watched, sums, rows);
  }
  plan->advance();
}

}  // namespace fusedopt
