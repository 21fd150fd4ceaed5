// Usual parameters: they, their gradients and their states are plain tensors on the CPU, contiguous
// and of one shape, and their states complete and in order. This thread finds their objects, and
// any thread then reads and validates what torch has recorded of them, which needs no Python.
//
// Where all parameters are usual, and in the same step, no Python code runs from here to the end of
// the step; nor can it on another thread, unless the GIL is released. So nothing has to be held.
// (Gradients must not change meanwhile in any other way, either: by a backward pass in a thread of
// C++, say. Nor may they be copies that torch has yet to make, as torch._lazy_clone returns them.)

#include <algorithm>
#include <utility>

#include "engine/parallel.h"
#include "step/plan.h"

namespace fusedopt {

// Whether to look for usual parameters: they are few where no group begins with one on the CPU.
bool StepPlan::may_be_usual() const {
  return reader_.fast() && std::any_of(groups_.begin(), groups_.end(), [&](const Group& group) {
           if (group.params.empty()) return false;
           PyObject* const param = PyTuple_GET_ITEM(group.params.ptr(), 0);
           View view;
           return reader_.is_plain(param) && reader_.read(reader_.abi().record(param), &view) &&
                  view.device == kHost;
         });
}

// ---- scalars, before anything is collected ------------------------------------------------------

// The number of this step for the parameter whose state is the oldest.
double StepPlan::likely_t() const {
  PyObject *param, *state;
  Py_ssize_t at = 0;
  if (!PyDict_Next(state_.ptr(), &at, &param, &state) || !PyDict_Check(state)) return 1;
  PyObject* const step = PyDict_GetItem(state, step_key());
  TensorReader::Count count;
  const bool readable =
      step && reader_.is_plain(step) && reader_.read_count(reader_.abi().record(step), &count);
  return readable && is_step(count.get()) ? count.get() + 1 : 1;
}

// Asks Python now, since afterwards it would have to wait for hold().
void StepPlan::expect_scalars() {
  const double t = likely_t();
  for (Group& group : groups_) {
    if (!group.has_kernel || group.params.empty() || !PyFloat_Check(group.lr.ptr())) continue;
    group.likely_t = group.counts_steps ? t : 2;
    try {
      group.likely = fold(group, group.likely_t);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_Exception)) throw;  // a keyboard interrupt
      // Perhaps no parameter of it has a gradient; fold_scalars asks again if one does.
    }
  }
}

// ---- finding and reading ------------------------------------------------------------------------

bool StepPlan::find_usual(Entry* entry) {
  const Group& group = *entry->group;
  const bool has_state = group.counts_steps || !group.states.empty();
  if (has_state) entry->state = find_next(state_.ptr(), entry->param, &state_cursor_);
  const bool moves_slow = group.has_slow && group.alpha != 0;
  if (!group.has_kernel || moves_slow || !reader_.is_plain(entry->param)) return false;
  const TorchAbi& abi = reader_.abi();
  entry->records[kParam] = abi.record(entry->param);
  if (!has_state) return true;
  if (!entry->state || !PyDict_Check(entry->state)) return false;
  Py_ssize_t cursor = 0;
  const auto find = [&](PyObject* key, Record* record) {
    PyObject* const tensor = find_next(entry->state, key, &cursor);
    if (!tensor || !reader_.is_plain(tensor)) return false;
    *record = abi.record(tensor);
    return true;
  };
  if (group.counts_steps && !find(step_key(), &entry->step_record)) return false;
  for (size_t s = 0; s < group.rule_states(); ++s) {
    if (!find(group.states[s].ptr(), &entry->records[kFirstState + s])) return false;
  }
  // Slow weights at rest are not read, but have to be made in the first step.
  if (!group.has_slow) return true;
  PyObject* const slow = find_next(entry->state, group.states.back().ptr(), &cursor);
  return slow && slow != Py_None;
}

// Whether some of these arrays of equal shapes share memory.
static bool any_come_close(const View* views, int count) {
  const auto end = [](const View& view) {
    return view.data + view.numel * kItemSize[static_cast<int>(view.dtype)];
  };
  for (int s = 1; s < count; ++s) {
    for (int other = 0; other < s; ++other) {
      if (views[s].data < end(views[other]) && views[other].data < end(views[s])) return true;
    }
  }
  return false;
}

bool StepPlan::read_usual(Entry* entry, Job* job) {
  const Group& group = *entry->group;
  if (!entry->records[kGrad] || reader_.abi().asks_python(entry->records[kGrad])) return false;
  View views[kMaxStreams];
  const int streams = kFirstState + static_cast<int>(group.rule_states());
  for (int s = 0; s < streams; ++s) {
    View& view = views[s];
    if (!reader_.read(entry->records[s], &view) || view.device != kHost || view.negated ||
        !view.contiguous || !same_shape(views[kParam], view)) {
      return false;
    }
  }
  if (any_come_close(views, streams)) return false;
  double t = 2;
  if (group.counts_steps) {
    if (!reader_.read_count(entry->step_record, &entry->count)) return false;
    if (!is_step(entry->count.get())) return false;
    t = entry->count.get() + 1;
  }
  entry->t = t;
  *job = {};
  set_job(*entry, views, job);
  if (group.likely && group.likely_t == t) {
    entry->folded = group.likely;
    set_rule(entry->folded->rule, entry->folded->scalars.data(), job);
  }
  return true;
}

// Calls f(record) for all that are known.
template <class F>
static void for_each_record(const Entry& entry, F f) {
  for (const Record record : entry.records) {
    if (record) f(record);
  }
  if (entry.step_record) f(entry.step_record);
}

void StepPlan::collect_usual(int threads) {
  if (only_) {
    schedule_.fits = false;
    for (const Place& place : *only_) {
      const Group& group = groups_[static_cast<size_t>(place.group)];
      PyObject* const param = PyTuple_GET_ITEM(group.params.ptr(), place.index);
      entries_.emplace_back(&group, place.index, param).repeats_first = place.repeats_first;
    }
    jobs_.resize(entries_.size());
    return;
  }
  // With fewer parameters a thread, waking all takes longer than they save. (Waking some would make
  // OpenMP's runtime end the others.)
  constexpr size_t kManyOfThread = 64;
  size_t count = 0;
  for (const Group& group : groups_) count += group.params.size();
  entries_.reserve(count);
  const bool fitted = std::exchange(schedule_.fits, false) && jobs_.size() == count;
  jobs_.resize(count);
  const bool look = may_be_usual();
  if (look) expect_scalars();

  std::atomic<size_t> unmoved{0};
  auto group = groups_.begin();
  Py_ssize_t index = 0;
  const auto find = [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i, ++index) {
      for (; index == static_cast<Py_ssize_t>(group->params.size()); ++group) index = 0;
      PyObject* const param = PyTuple_GET_ITEM(group->params.ptr(), index);
      Entry& entry = entries_.emplace_back(&*group, index, param);
      entry.usual = look && find_usual(&entry);
    }
  };
  const auto read = [&](size_t begin, size_t end) {
    Entry* const entries = entries_.data();
    const auto for_usual = [&](auto f) {
      for (size_t i = begin; i < end; ++i) {
        if (entries[i].usual) f(entries[i], jobs_[i]);
      }
    };
    const TorchAbi& abi = reader_.abi();
    for_usual([&](Entry& entry, Job&) { for_each_record(entry, TorchAbi::ask_for); });
    for_usual([&](Entry& entry, Job&) {
      entry.records[kGrad] = abi.grad(entry.records[kParam]);
      if (entry.records[kGrad]) abi.ask_for(entry.records[kGrad]);
    });
    for_usual([&](Entry& entry, Job&) {
      for_each_record(entry, [&](Record record) { abi.ask_for_storage(record); });
    });
    size_t ready = 0, same = 0;
    for_usual([&](Entry& entry, Job& job) {
      const Job before = job;
      entry.usual = read_usual(&entry, &job);
      ready += entry.usual && entry.folded;
      same += entry.usual && same_arrays(before, job);
    });
    ready_ += ready;
    unmoved += same;
  };
  const bool many = count >= kManyOfThread * static_cast<size_t>(threads);
  in_pipeline(look && many ? threads : 1, count, find, read);
  // If so, all are usual, and nothing changes their jobs from here on.
  schedule_.fits = fitted && unmoved == count;
}

void StepPlan::hold() {
  if (holds_) return;
  holds_ = true;
  held_grads_.reserve(entries_.size());
  for (const Entry& entry : entries_) {
    if (!entry.usual) continue;
    held_grads_.push_back(reader_.abi().hold(entry.records[kGrad]));
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (entry.state && PyDict_Next(entry.state, &at, &key, &value)) {
      held_.push_back(py::reinterpret_borrow<py::object>(value));
    }
  }
}

}  // namespace fusedopt
