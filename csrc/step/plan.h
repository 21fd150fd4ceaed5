// One optimizer step: what is to be run for the parameters that have been read.
#pragma once

#include <map>

#include "engine/schedule.h"
#include "step/params.h"

namespace fusedopt {

// What runs after a parameter's job, on the same elements.
struct JobAfter : Job {
  const Rule* rule = nullptr;
};

// A parameter that is listed, or counted, a second time: where, and what it adds to a norm.
struct Repeat {
  Group* group;
  Py_ssize_t index;
  PyObject* param;
  bool repeats_first;  // step of the same group: torch looks for states before it steps a group
  int device;
  Job norm_job;              // on the CPU; of no elements if that adds nothing
  cuda::NormItem norm_item;  // or on a device
};

// Where counts lie. From step to step they stay there, and are not looked at again.
class CountPlaces {
 public:
  // Whether no two parameters have one count.
  bool lie_apart(const std::vector<Entry>& entries);

 private:
  std::vector<const void*> places_, seen_;  // in this step, and in the last one,
  bool apart_ = true;                       // and what was found then
};

// What is kept for one device from step to step.
struct OnDevice {
  Overlaps overlaps;
  bool knows = false, shares = false;  // whether the jobs there share memory
  int64_t bytes = 0;                   // that a step takes
};

// What a plan fills, kept from step to step: entries for their capacity alone, jobs also because
// the schedule fits the next ones, too, if they lie where these do.
struct PlanMemory {
  std::vector<Entry> entries;
  std::vector<Job> jobs;        // one an entry
  std::vector<JobAfter> after;  // kMaxFollowers an entry, of usual parameters; or none
  Schedule schedule;
  CountPlaces counts;
  std::map<int, OnDevice> devices;
};

class StepPlan {
 public:
  // may_skip: see ParamReader.
  StepPlan(const Kernels& kernels, const TensorReader& tensors, const py::dict& state,
           std::deque<Group>* groups, bool may_skip, PlanMemory* spare);
  ~StepPlan();

  // ---- what may fail, and changes nothing
  void collect(int threads);                               // all parameters,
  void collect_again(const std::vector<Repeat>& repeats);  // or some
  void fold_scalars();
  void hold() { params_.hold(memory_.entries); }

  // ---- what changes something
  void complete_states();  // creates those that are missing, moves counts to where they belong
  void advance() const { params_.advance(memory_.entries); }

  const ParamReader& params() const { return params_; }
  const std::vector<Job>& jobs() const { return memory_.jobs; }
  std::vector<Job> jobs_of_norm() const;  // on the CPU, but for what is in params().outside()
  int64_t bytes() const;                  // that the jobs move
  Schedule* schedule() { return &memory_.schedule; }
  bool lacks_states() const { return lacks_states_; }
  // A plan of them comes after this one. The norm is theirs, too.
  const std::vector<Repeat>& later() const { return later_; }

  // ---- of steps with parameters on devices (devices.cpp)
  std::vector<int> devices();
  size_t count_on(int device);  // or kHost: the parameters there
  std::vector<Job> jobs_on(int device);
  OnDevice* on(int device) { return &memory_.devices[device]; }
  bool share_memory(int device);  // see Overlaps
  // Throws if a graph of this step would repeat what the CPU has decided for this one alone.
  void refuse_to_be_captured() const;
  // Whether a step that is skipped has to be known to be before states are made.
  bool skips_on_host() const;
  std::vector<cuda::NormItem> norm_items(int device);
  std::vector<cuda::Update> updates(int device, double factor);
  // Those that come so many after the first ones, one at least.
  std::vector<cuda::Update> updates_after(int device, int place) const;

 private:
  void collect_usual(int threads);
  void collect_others();
  template <class F>
  void keep_if(F f);
  void set_repeats_aside();
  void forget_devices() {  // whose jobs are other ones
    for (auto& [device, there] : memory_.devices) there.knows = false;
  }
  // `after` is where jobs may be kept that come after this one.
  void set_job(const Entry& entry, const View* views, Job* job, JobAfter* after = nullptr);
  void set_rule_and_more(const Entry& entry, const View* views, Job* job, JobAfter* after);
  void set_followers(const Entry& entry, const View* views, Job* job, JobAfter* after);

  const Kernels& kernels_;
  PlanMemory* const spare_;
  ParamReader params_;
  std::deque<Group>& groups_;
  PlanMemory memory_;
  std::vector<Repeat> later_;
  std::map<int, size_t> places_;  // how many parameters are on each; empty while nobody has asked
  bool is_ready_ = false;         // all have their scalars: no parameter needs Python any more
  bool lacks_states_ = false;
  Layouts layouts_;
  std::deque<JobAfter> jobs_after_;
};

}  // namespace fusedopt
