// One optimizer step, from Python objects to jobs and back: all gathering, all validation, all
// messages about parameters.
#pragma once

#include <atomic>
#include <cmath>

#include "cuda/queue.h"
#include "engine/schedule.h"
#include "step/jobs.h"

namespace fusedopt {

// What a group does in one step number: a variant of its rule, with scalars.
struct Folded {
  const Rule& rule;
  std::vector<double> scalars;
};

// What one param group asks for: fusedopt._engine.Group, read once a step.
struct Group {
  explicit Group(py::handle source);

  py::tuple params;  // a copy: while Python code runs, the list may change
  py::object names;
  bool has_kernel;
  std::string rule;
  int flags;
  std::vector<py::str> states;  // of the rule, and then the slow weights, if there are any
  bool has_slow;
  double alpha;  // of Lookahead; 0 if this step does not move the slow weights
  bool counts_steps;
  bool counts_on_device;  // where the parameters are
  bool starts_unlike;     // a first step is not one from states of zeros
  double grad_scale;
  py::object lr;  // a number, or a tensor on the parameters' device
  py::object fold, create_state, move_count;

  size_t rule_states() const { return states.size() - has_slow; }

  double likely_t = 0;             // the number that this step has for most parameters,
  const Folded* likely = nullptr;  // and what the group then does; null if that is unknown yet
};

// One parameter; after collect, one that has a gradient and a kernel.
struct Entry {
  Entry(const Group* group, Py_ssize_t index, PyObject* param)
      : group(group), index(index), param(param) {}

  const Group* group;
  Py_ssize_t index;
  PyObject* param;
  PyObject* grad = nullptr;        // null while Python was not needed to read it
  PyObject* state = nullptr;       // its dict; null while it has none
  PyObject* step = nullptr;        // state["step"]; null while there is none
  TensorReader::Count count = {};  // its memory; null where it is a plain number
  double t = 1;                    // the number of this step
  const Folded* folded = nullptr;  // for t
  bool is_new = false;             // lacks a state of its rule
  bool repeats_first = false;      // see Place
  bool has_to_move = false;        // the count, to where it belongs
  int device = kHost;
  cuda::NormItem norm_item = {};  // of its gradient, on a device
  bool fits = true;               // all streams are arrays of one order that a device can access
  bool usual = false;             // see usual.cpp; the records are those of one that is
  Record records[kMaxStreams] = {}, step_record = nullptr;
};

// What a plan fills, kept from step to step: entries for their capacity alone, jobs also because
// the schedule fits the next ones, too, if they lie where these do.
struct PlanMemory {
  std::vector<Entry> entries;
  std::vector<Job> jobs;
  Schedule schedule;
  struct {
    std::vector<const void*> seen;  // where they lay in the last step,
    bool apart = true;              // and whether no two were one
  } counts;
};

// Where a parameter is listed.
struct Place {
  int group;
  Py_ssize_t index;
  bool repeats_first;  // step of the same group: torch looks for states before it steps a group
};

PyObject* step_key();  // of a state
inline bool is_step(double steps) { return steps >= 0 && std::isfinite(steps); }
// dict[key] if that is what comes at the cursor, or null. Keys are usually asked for in the order
// in which they were added, so most are found without hashing; and hash(tensor) is a Python
// function.
PyObject* find_next(PyObject* dict, PyObject* key, Py_ssize_t* cursor);
std::string type_text(PyObject* object);  // what an object is, for a message

class StepPlan {
 public:
  // may_skip: whether a device may find out that nothing is to be done; it then counts the steps.
  // only: the parameters to step; null: all.
  StepPlan(const Kernels& kernels, const TensorReader& reader, const py::dict& state,
           const py::sequence& groups, bool may_skip, PlanMemory* spare,
           const std::vector<Place>* only = nullptr);
  ~StepPlan();

  // ---- what may fail, and changes nothing
  void collect(int threads);
  void fold_scalars();
  // Keeps all memory that is in use. Once collected, this has to come before any Python code, of
  // this thread or of another that gets the GIL; collect does it where it needs Python itself.
  void hold();
  bool holds() const { return holds_; }

  // ---- what changes something
  void move_counts();
  void create_missing_states();
  void advance() const;  // counts, and versions

  const std::vector<Job>& jobs() const { return jobs_; }
  int64_t bytes() const;  // that the jobs move
  Schedule* schedule() { return &schedule_; }
  bool lacks_states() const { return !incomplete_.empty(); }
  // Parameters that are listed, or counted, a second time: a plan of them comes after this one. The
  // norm is theirs, too.
  const std::vector<Place>& later() const { return later_; }

  // ---- of steps with parameters on devices
  bool uses_devices() const { return uses_devices_; }
  std::vector<int> devices() const;
  std::vector<Job> jobs_on(int device) const;  // or kHost
  // Throws if a graph of this step would repeat what the CPU has decided for this one alone.
  void refuse_to_be_captured() const;
  // Whether a step that is skipped has to be known to be before states are made.
  bool skips_on_host() const;
  std::vector<cuda::NormItem> norm_items(int device) const;
  std::vector<cuda::Update> updates(int device, double factor);
  std::vector<cuda::Update> updates_after(int device) const;  // Lookahead's

  py::list unsupported;  // [(group index, parameter), ...]
  // Gradients, among those of jobs() and of `unsupported`, that a norm needs Python for: the
  // engine cannot read them, or each process has a part of them. Jobs with such a gradient are in
  // jobs() but not in jobs_of_norm().
  py::list outside;
  std::vector<Job> jobs_of_norm() const;  // on the CPU

 private:
  void swap_with(PlanMemory* memory);
  bool may_be_usual() const;
  double likely_t() const;
  void expect_scalars();
  void collect_usual(int threads);
  bool find_usual(Entry* entry);
  bool read_usual(Entry* entry, Job* job);
  bool is_ready() const { return ready_ == entries_.size(); }  // no parameter needs Python any more
  bool collect(Entry& entry, size_t at);
  int number_of(const Group& group) const;
  bool fit_gradient(Entry* entry, const View& param, View* grad);
  bool read_states(Entry& entry, View* views);
  void read_state(const Entry& entry, PyObject* tensor, const py::str& key, const View& param,
                  View* view);
  bool counts_on_device(const Entry& entry) const;
  void read_step(Entry& entry, Py_ssize_t* cursor);
  void separate_streams(Entry* entry, View* views);
  bool counts_lie_apart();
  void set_repeats_aside();
  const Folded* fold(const Group& group, double t);
  void set_job(const Entry& entry, const View* views, Job* job);
  std::string name(const Entry& entry, const std::string& what) const;

  const Kernels& kernels_;
  const TensorReader& reader_;
  const py::dict& state_;
  const bool may_skip_;
  PlanMemory* const spare_;
  const std::vector<Place>* const only_;
  Py_ssize_t state_cursor_ = 0;
  bool uses_devices_ = false;
  bool in_order_ = true;  // each parameter's state was found behind that of the one before
  bool holds_ = false;
  std::atomic<size_t> ready_{0};  // usual entries that have their scalars
  std::deque<Group> groups_;
  std::vector<Entry> entries_;
  std::vector<Job> jobs_;  // one an entry
  Schedule schedule_;
  decltype(PlanMemory::counts) counts_;
  std::vector<size_t> incomplete_;   // entries that lack some state
  std::vector<size_t> distributed_;  // entries whose gradient is in `outside`
  std::vector<Place> later_;
  struct LaterNorm {
    int device;
    Job job;                   // on the CPU
    cuda::NormItem norm_item;  // or on a device
  };
  std::vector<LaterNorm> later_norms_;
  Held held_;
  std::vector<TorchAbi::Hold> held_grads_;  // of usual parameters, which may have no Python object
  std::deque<Folded> folded_;
  Layouts layouts_;
  std::deque<Job> jobs_after_;
};

}  // namespace fusedopt
