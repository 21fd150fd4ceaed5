// What one param group asks for.
#pragma once

#include <algorithm>
#include <deque>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "engine/job.h"
#include "step/fields.h"

namespace fusedopt {

// A rule's scalars for one learning rate in one step number.
struct Folded {
  double lr, t;
  std::vector<double> scalars;
};

// Sets those scalars that depend on the learning rate or on the step number, as the rule says that
// has this number. False where Python would make that an error: division by zero, say.
bool fold_rule(int rule, double lr, double t, std::vector<double>* scalars);

// What is known of the scalars of groups with equal settings, from step to step.
struct KnownScalars {
  std::vector<double> first, later;    // what Python has said: of t = 1, and of any later step
  std::shared_ptr<const Folded> last;  // what was folded last
};

// A rule that runs after that of the group, of weights that follow the parameter's.
struct Follower {
  const Rule* rule;
  py::object key;  // of its one state
};

// fusedopt._engine.Group: what all groups ask for whose values are the same, but for parameters and
// learning rates.
class Settings {
  Fields fields_;

 public:
  Settings(const py::tuple& source, const Kernels& kernels);

  // In the order of its fields:
  const bool has_kernel = fields_.next<bool>();
  const std::string rule = fields_.next<std::string>();
  const int flags = fields_.next<int>();
  const py::tuple states = fields_.next<py::tuple>();     // of the rule
  const py::tuple following = fields_.next<py::tuple>();  // what the followers are made of
  const bool counts_steps = fields_.next<bool>();
  const bool counts_on_device = fields_.next<bool>();  // where the parameters are
  const bool starts_unlike = fields_.next<bool>();     // a first step is not from zeros
  const double grad_scale = fields_.next<double>();
  const py::tuple has_no_sign = fields_.next<py::tuple>();  // each of the rule's states, or not
  const bool has_master = fields_.next<bool>();        // 16-bit parameters have a second array,
  const bool rounds_at_random = fields_.next<bool>();  // or else are rounded at random
  const bool may_be_coded = fields_.next<bool>();      // states may be in 8 bits

  const int rule_number;
  const std::vector<Follower> followers;  // in the order in which they run
  // Whether streams may need more than one tensor each.
  const bool in_parts = has_master || rounds_at_random || may_be_coded;
  const size_t rule_states = states.size();
  const bool has_state = counts_steps || rule_states != 0 || !followers.empty() || in_parts;

  py::handle state(size_t s) const {  // its key; those of the followers come after the rule's
    return s < rule_states ? py::handle(PyTuple_GET_ITEM(states.ptr(), static_cast<Py_ssize_t>(s)))
                           : py::handle(followers[s - rule_states].key);
  }

 protected:
  const std::shared_ptr<KnownScalars> known_ = std::make_shared<KnownScalars>();
};

// A param group in one step.
class Group : public Settings {
 public:
  // The optimizer outlives this.
  Group(const Settings& settings, py::handle optimizer, const py::dict& source, int number,
        bool is_only, const Kernels& kernels);

  const Rule& kernel;
  const int number;     // among the groups of this step,
  const bool is_only;   // of which there may be no other
  const py::object lr;  // a number, or a tensor on the device of the parameters

  // Its parameters: what Python code may change at any time.
  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(params_.ptr()); }
  PyObject* param(Py_ssize_t index) const { return PySequence_Fast_GET_ITEM(params_.ptr(), index); }
  std::string name(Py_ssize_t index) const;  // empty if it has none

  // The scalar of a follower's rule in this step; 0 if it is at rest.
  const double& weight(size_t follower) const { return weights_[follower]; }
  bool moves_followers() const {
    return std::any_of(weights_, weights_ + followers.size(), [](double w) { return w != 0; });
  }

  bool has_number_as_lr() const { return PyFloat_Check(lr.ptr()); }
  PyObject* scale_key(size_t s);  // of that state's scales, if it is in 8 bits; interned

  // What it does in step t.
  const Folded* fold(double t);
  // Folds for the t of most parameters before any is read, while nothing has to be held yet,
  void expect(double t);
  // so that threads find it without Python; null for any other t.
  const Folded* expected(double t) const {
    return !folded_.empty() && folded_.front()->t == t ? folded_.front().get() : nullptr;
  }
  double expected_t() const { return folded_.empty() ? 1 : folded_.front()->t; }

  // What its optimizer does for it.
  void create_state(PyObject* param) const;
  bool leaves_out(size_t follower, PyObject* param) const;
  void move_count(PyObject* param, const py::object& steps, bool to_device) const;
  int64_t first_element(PyObject* param) const;  // of what this process has of a DTensor

 private:
  std::vector<double> ask(double t) const;
  std::vector<double> scalars(double t) const;

  const py::handle optimizer_;
  const py::dict source_;
  const py::object params_;
  double weights_[kMaxFollowers] = {};
  PyObject* scale_keys_[kMaxStates] = {};  // as far as they were asked for
  std::vector<std::shared_ptr<const Folded>> folded_;
};

// Whether anything follows in this step.
inline bool move_followers(const std::deque<Group>& groups) {
  return std::any_of(groups.begin(), groups.end(),
                     [](const Group& group) { return group.moves_followers(); });
}

}  // namespace fusedopt
