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
bool ParamReader::may_find_usual(const std::deque<Group>& groups) {
  return tensors_.fast() && std::any_of(groups.begin(), groups.end(), [&](const Group& group) {
           if (group.size() == 0) return false;
           View view;
           const bool readable =
               tensors_.is_plain(group.param(0)) && tensors_.read(group.param(0), &view, &held_);
           holds_states_ = readable && view.device != kHost;
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

// Each of these passes reads what the one before has asked for.
void ParamReader::find_usual(Entry* begin, Entry* end) {
  const auto for_usual = [&](auto f) {
    for (Entry* entry = begin; entry != end; ++entry) entry->usual = entry->usual && f(entry);
  };
  for_usual([&](Entry* entry) {
    __builtin_prefetch(entry->param);
    if (entry->group->has_state) {
      entry->state = find_next(state_.ptr(), entry->param, &cursor_);
      __builtin_prefetch(entry->state);
    }
    return entry->group->has_kernel;
  });
  for_usual([&](Entry* entry) {
    if (!entry->group->has_state) return true;
    if (!entry->state || !PyDict_Check(entry->state)) return false;
    constexpr int kBytes = 192;
    const char* const keys =
        reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(entry->state)->ma_keys);
    for (int at = 0; at < kBytes; at += 64) __builtin_prefetch(keys + at);
    return true;
  });
  for_usual([&](Entry* entry) { return find_tensors(entry); });
  for_usual([&](Entry* entry) { return find_records(entry); });
}

// The objects of a usual parameter, where their records come later.
bool ParamReader::find_tensors(Entry* entry) {
  const Group& group = *entry->group;
  entry->records[kParam] = entry->param;
  if (!group.has_state) return true;
  Py_ssize_t cursor = 0;
  const auto find = [&](PyObject* key, Record* record) {
    PyObject* const tensor = find_next(entry->state, key, &cursor);
    __builtin_prefetch(tensor);
    *record = tensor;
    return tensor != nullptr;
  };
  if (group.counts_steps && !find(step_key(), &entry->step_record)) return false;
  for (size_t s = 0; s < group.rule_states; ++s) {
    if (!find(group.state(s).ptr(), &entry->records[kFirstState + s])) return false;
  }
  // What follows, and is at rest, is not read, but has to be made in the first step.
  for (size_t f = 0; f < group.followers.size(); ++f) {
    PyObject* const weights = find_next(entry->state, group.followers[f].key.ptr(), &cursor);
    if (!weights || weights == Py_None) return false;
    if (group.weight(f) != 0) entry->records[kFirstState + group.rule_states + f] = weights;
  }
  return !group.in_parts || find_usual_parts(entry, &cursor);
}

bool ParamReader::find_records(Entry* entry) {
  const auto find = [&](Record* record) {
    if (!*record) return true;
    auto* const tensor = static_cast<PyObject*>(*record);
    if (!tensors_.is_plain(tensor)) return false;
    if (holds_states_) held_.push_back(py::reinterpret_borrow<py::object>(tensor));
    *record = tensors_.abi().record(tensor);
    TorchAbi::ask_for(*record);
    return true;
  };
  return find(&entry->step_record) &&
         std::all_of(std::begin(entry->records), std::end(entry->records),
                     [&](Record& record) { return find(&record); });
}

// Also asks for all memory that read_usual reads, as far as find_records has not.
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
  if (!read_usual_followers(*entry, views)) return false;
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

// Those that move; the views of others are empty.
bool ParamReader::read_usual_followers(const Entry& entry, View* views) const {
  for (size_t f = 0; f < entry.group->followers.size(); ++f) {
    const size_t s = kFirstState + entry.group->rule_states + f;
    View& view = views[s];
    view = {};
    if (!entry.records[s]) continue;
    if (!tensors_.read_stored(entry.records[s], &view) || !view.contiguous ||
        fault_of(views[kParam], view) != Fault::none || !is_number(view.dtype)) {
      return false;
    }
    if (entry.device != kHost && !have_one_precision(views[kParam], view)) return false;
  }
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
  held_.reserve(held_.size() + entries.size());
  for (const Entry& entry : entries) {
    held_.push_back(py::reinterpret_borrow<py::object>(entry.param));
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
