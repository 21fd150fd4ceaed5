// Usual parameters: they, their gradients and their states are plain tensors in one place,
// contiguous and of one shape, and their states complete and in order. This thread finds their
// objects, and any thread then reads what torch has recorded of them, which needs no Python, and
// asks of it what ParamReader::read asks: whatever would be a fault there, or take more than this,
// is not usual.
//
// Where all parameters are usual, and in the same step, no Python code runs from here to the end of
// the step; nor can it on another thread, unless the GIL is released. So nothing has to be held.
// (Gradients must not change meanwhile in any other way, either: by a backward pass in a thread of
// C++, say. Nor may they be copies that torch has yet to make, as torch._lazy_clone returns them.)

#include <algorithm>

#include "step/params.h"

namespace fusedopt {

// They are few where no group begins with one.
bool ParamReader::may_find_usual(const std::deque<Group>& groups, size_t count) {
  return tensors_.fast() && std::any_of(groups.begin(), groups.end(), [&](const Group& group) {
           if (group.params.empty()) return false;
           View view;
           const bool readable =
               tensors_.is_plain(group.param(0)) && tensors_.read(group.param(0), &view, &held_);
           holds_states_ = readable && view.device != kHost;
           if (holds_states_) held_.reserve(count * (1 + group.states.size()));
           return readable;
         });
}

double ParamReader::likely_t() const {
  PyObject *param, *state;
  Py_ssize_t at = 0;
  if (!PyDict_Next(state_.ptr(), &at, &param, &state) || !PyDict_Check(state)) return 1;
  PyObject* const step = PyDict_GetItem(state, step_key());
  TensorReader::Count count;
  const bool readable =
      step && tensors_.is_plain(step) && tensors_.read_count(tensors_.abi().record(step), &count);
  return readable && count.device == kHost && is_step(count.get()) ? count.get() + 1 : 1;
}

// ---- finding and reading ------------------------------------------------------------------------

bool ParamReader::find_usual(Entry* entry) {
  const Group& group = *entry->group;
  if (group.has_state) entry->state = find_next(state_.ptr(), entry->param, &cursor_);
  if (!group.has_kernel || group.moves_slow() || !tensors_.is_plain(entry->param)) return false;
  entry->records[kParam] = tensors_.abi().record(entry->param);
  if (!group.has_state) return true;
  if (!entry->state || !PyDict_Check(entry->state)) return false;
  Py_ssize_t cursor = 0;
  const auto find = [&](PyObject* key, Record* record) {
    PyObject* const tensor = find_next(entry->state, key, &cursor);
    if (!tensor || !tensors_.is_plain(tensor)) return false;
    *record = tensors_.abi().record(tensor);
    if (holds_states_) held_.push_back(py::reinterpret_borrow<py::object>(tensor));
    return true;
  };
  if (group.counts_steps && !find(step_key(), &entry->step_record)) return false;
  for (size_t s = 0; s < group.rule_states; ++s) {
    if (!find(group.state(s).ptr(), &entry->records[kFirstState + s])) return false;
  }
  // Slow weights at rest are not read, but have to be made in the first step.
  if (group.has_slow) {
    PyObject* const slow = find_next(entry->state, group.state(group.rule_states).ptr(), &cursor);
    if (!slow || slow == Py_None) return false;
  }
  return !group.in_parts || find_usual_parts(entry, &cursor);
}

// Also asks for all memory that read_usual reads.
void ParamReader::find_gradients(Entry* begin, Entry* end) const {
  const TorchAbi& abi = tensors_.abi();
  const auto for_usual = [&](auto f) {
    for (Entry* entry = begin; entry != end; ++entry) {
      if (entry->usual) f(entry);
    }
  };
  const auto for_each_record = [&](auto f) {
    for_usual([&](const Entry* entry) {
      for (const Record record : entry->records) {
        if (record) f(record);
      }
      if (entry->step_record) f(entry->step_record);
    });
  };
  for_each_record(TorchAbi::ask_for);
  for_usual([&](Entry* entry) {
    Record& grad = entry->records[kGrad];
    grad = abi.grad(entry->records[kParam]);
    if (grad) abi.ask_for(grad);
  });
  for_each_record([&](Record record) { abi.ask_for_storage(record); });
}

bool ParamReader::read_usual(Entry* entry, View* views) {
  const Group& group = *entry->group;
  if (!entry->records[kGrad] || tensors_.abi().asks_python(entry->records[kGrad])) return false;
  const int streams = kFirstState + static_cast<int>(group.rule_states);
  int doubles = 0;
  for (int s = 0; s < streams; ++s) {
    View& view = views[s];
    if (!tensors_.read_stored(entry->records[s], &view) || !view.contiguous ||
        fault_of(views[kParam], view) != Fault::none) {
      return false;
    }
    const bool may_be_coded = s >= kFirstState && group.may_be_coded && has_blocks(view.dtype);
    if (!is_number(view.dtype) && !may_be_coded) return false;
    doubles += view.dtype == DType::f64;
  }
  entry->device = views[kParam].device;
  if (entry->device == kHost) {
    if (group.in_parts && !read_usual_parts(entry, views)) return false;
    return group.has_number_as_lr() && read_usual_count(entry);
  }
  if (group.in_parts || (doubles != 0 && doubles != streams)) return false;
  const View& grad = views[kGrad];
  entry->norm_item = {grad.data, grad.numel, 0, grad.dtype};
  if (!read_usual_count(entry)) return false;
  uses_devices_.store(true, std::memory_order_relaxed);
  return true;
}

bool ParamReader::read_usual_count(Entry* entry) const {
  entry->t = 2;
  if (!entry->group->counts_steps) return true;
  if (!tensors_.read_count(entry->step_record, &entry->count)) return false;
  place_count(entry);
  if (entry->device_counts) {
    entry->t = entry->group->expected_t();  // one is as good as another
    return entry->count.type == TensorReader::Count::f32;
  }
  if (entry->count.device != kHost || counts_on_device(*entry)) return false;  // it has to move
  if (!is_step(entry->count.get())) return false;
  entry->t = entry->count.get() + 1;
  return true;
}

void ParamReader::hold(const std::vector<Entry>& entries) {
  if (holds_) return;
  holds_ = true;
  cursor_ = 0;  // whoever gets the GIL from here on may change the state
  held_grads_.reserve(entries.size());
  for (const Entry& entry : entries) {
    if (!entry.usual) continue;
    held_grads_.push_back(tensors_.abi().hold(entry.records[kGrad]));
    if (holds_states_) continue;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (entry.state && PyDict_Next(entry.state, &at, &key, &value)) {
      held_.push_back(py::reinterpret_borrow<py::object>(value));
    }
  }
}

}  // namespace fusedopt
