// What a parameter is, and whether it is fit to be stepped: all validation of parameters, gradients
// and states, and all messages about them.
#pragma once

#include <atomic>
#include <cmath>
#include <deque>

#include "cuda/queue.h"
#include "step/group.h"
#include "step/jobs.h"

namespace fusedopt {

// What streams have that are stored in more than one tensor.
struct Parts {
  Record second_records[kMaxStreams] = {}, rounding_record = nullptr;  // of a usual parameter
  TensorReader::Count rounding = {};  // what random bits come of; without memory, there are none
  int64_t first_element = 0;  // elements of the whole parameter before those of this process
};

// One parameter; once it has been read, one that has a gradient and a kernel.
struct Entry {
  Entry(Group* group, Py_ssize_t index, PyObject* param)
      : group(group), index(index), param(param) {}

  // For a message. For example: exp_avg of params[3] ('layer.weight') of group 1
  std::string name(const std::string& what) const;

  Group* group;
  Py_ssize_t index;
  PyObject* param;
  PyObject* grad = nullptr;        // null while Python was not needed to read it
  PyObject* state = nullptr;       // its dict; null while it has none
  PyObject* step = nullptr;        // state["step"]; null while there is none
  TensorReader::Count count = {};  // its memory; null where it is a plain number
  double t = 1;                    // the number of this step
  const Folded* folded = nullptr;  // for t
  int device = kHost;
  bool lacks_state = false;       // of its rule, or a follower: it is yet to be made
  bool is_new = false;            // lacks a state of its rule
  bool repeats_first = false;     // see Repeat
  bool has_to_move = false;       // the count, to where it belongs
  bool device_counts = false;     // and alone knows the number of this step
  bool sums_elsewhere = false;    // its gradient is in outside()
  bool usual = false;             // see usual.cpp; the records are those of one that is
  cuda::NormItem norm_item = {};  // of its gradient, on a device
  Record records[kMaxViews] = {}, step_record = nullptr;
  Parts* parts = nullptr;  // only where streams may be stored in more than one tensor

  // What its random bits come of, or null.
  const TensorReader::Count* rounding() const {
    return parts && parts->rounding.data ? &parts->rounding : nullptr;
  }
};

// The keys of a state for what is not a state of the rule.
struct PartKeys {
  PyObject* const remainder = PyUnicode_InternFromString("remainder");
  PyObject* const master = PyUnicode_InternFromString("master");
  PyObject* const rounding = PyUnicode_InternFromString("rounding");
};
const PartKeys& part_keys();

PyObject* step_key();  // of a state
inline bool is_step(double steps) { return steps >= 0 && std::isfinite(steps); }
// dict[key] if that is what comes at the cursor, or null. Keys are usually asked for in the order
// in which they were added, so most are found without hashing; and hash(tensor) is a Python
// function.
inline PyObject* find_next(PyObject* dict, PyObject* key, Py_ssize_t* cursor) {
  PyObject *at, *value;
  Py_ssize_t next = *cursor;
  if (!PyDict_Next(dict, &next, &at, &value) || at != key) return nullptr;
  *cursor = next;
  return value;
}
// dict[key], or null. The cursor stays where it is if it was not found there.
PyObject* find(PyObject* dict, PyObject* key, Py_ssize_t* cursor);
std::string type_text(PyObject* object);  // what an object is, for a message,
std::string device_text(int device);      // and where it is to be

// Reads the parameters of one step, in their order, into entries and views: [parameter, gradient,
// *states, *followers]. Holds what it reads where Python code may run before the step is over.
class ParamReader {
 public:
  // may_skip: whether a device may find out that nothing is to be done; it then counts the steps.
  ParamReader(const TensorReader& tensors, const py::dict& state, bool may_skip)
      : tensors_(tensors), state_(state), may_skip_(may_skip) {}

  // ---- any parameter (params.cpp, states.cpp)
  // False if there is nothing to do, or nothing that a kernel can. What is not fit is refused here,
  // before anything has changed.
  bool read(Entry* entry, View* views);
  void pass(const Entry& entry) { find_next(state_.ptr(), entry.param, &cursor_); }  // a usual one
  View read_held(const py::object& tensor);  // any other that a step needs

  // ---- the same of a usual one, without Python (usual.cpp)
  bool may_find_usual(const std::deque<Group>& groups);
  double likely_t() const;  // the number of this step for the parameter with the oldest state
  // Which of these are usual, as far as objects say, in the order of the parameters:
  void find_usual(Entry* begin, Entry* end);
  void find_gradients(Entry* begin, Entry* end) const;  // of usual ones; any thread may,
  bool read_usual(Entry* entry, View* views);           // and then read them

  // Keeps all memory that is in use. Once parameters have been found to be usual, this has to come
  // before any Python code, of this thread or of another that gets the GIL.
  void hold(const std::vector<Entry>& entries);
  bool holds() const { return holds_; }

  // ---- what changes something (states.cpp)
  void move_count(Entry* entry);  // where it has to
  void create_states(Entry* entry, View* views);
  void advance(const std::vector<Entry>& entries) const;  // counts, and versions

  // ---- what was found
  bool uses_devices() const { return uses_devices_; }
  bool in_order() const { return in_order_; }  // each state lay behind that of the one before
  const py::list& unsupported() const { return unsupported_; }  // [(group index, parameter), ...]
  // Gradients, among those read and of unsupported(), that a norm needs Python for: the engine
  // cannot read them, or each process has a part of them.
  const py::list& outside() const { return outside_; }

 private:
  void separate_streams(Entry* entry, View* views);
  bool fit_gradient(Entry* entry, const View& param, View* grad);
  bool read_states(Entry* entry, View* views);
  void read_state(const Entry& entry, PyObject* tensor, py::handle key, const View& param,
                  View* view);
  static bool are_arrays(const View* views, int states);
  void read_step(Entry* entry, Py_ssize_t* cursor);
  void read_parts(Entry* entry, View* views, Py_ssize_t* cursor);
  bool find_tensors(Entry* entry);
  bool find_records(Entry* entry);
  bool find_usual_parts(Entry* entry, Py_ssize_t* cursor);
  bool read_usual_parts(Entry* entry, View* views) const;
  bool read_usual_followers(const Entry& entry, View* views) const;
  bool read_usual_count(Entry* entry) const;
  bool counts_on_device(const Entry& entry) const {
    return entry.device != kHost && (entry.group->counts_on_device || may_skip_);
  }
  // Says where the count lies that was read. (An emulated device has it where it is to be.)
  void place_count(Entry* entry) const {
    if (tensors_.emulated() && counts_on_device(*entry)) entry->count.device = entry->device;
    entry->device_counts = entry->device != kHost && entry->count.device == entry->device;
  }
  void replace_gradient(Entry* entry, const py::object& grad, View* view);

  const TensorReader& tensors_;
  const py::dict& state_;
  const bool may_skip_;
  Py_ssize_t cursor_ = 0;  // in the state
  bool in_order_ = true, holds_ = false, holds_states_ = false;
  std::atomic<bool> uses_devices_{false};
  py::list unsupported_, outside_;
  Held held_;
  std::deque<Parts> parts_;
  std::vector<TorchAbi::Hold> held_grads_;  // of usual parameters, which may have no Python object
};

}  // namespace fusedopt
