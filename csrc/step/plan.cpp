#include "step/plan.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "engine/parallel.h"

namespace fusedopt {

StepPlan::StepPlan(const Kernels& kernels, const TensorReader& tensors, const py::dict& state,
                   std::deque<Group>* groups, bool may_skip, PlanMemory* spare)
    : kernels_(kernels), spare_(spare), params_(tensors, state, may_skip), groups_(*groups) {
  std::swap(memory_, *spare);
}

StepPlan::~StepPlan() {
  memory_.entries.clear();
  std::swap(memory_, *spare_);
}

// ---- collecting parameters ----------------------------------------------------------------------

void StepPlan::collect(int threads) {
  collect_usual(threads);
  if (!is_ready_ || !memory_.counts.lie_apart(memory_.entries)) collect_others();
}

void StepPlan::collect_again(const std::vector<Repeat>& repeats) {
  memory_.schedule.fits = false;
  forget_devices();
  for (const Repeat& repeat : repeats) {
    Entry& entry = memory_.entries.emplace_back(repeat.group, repeat.index, repeat.param);
    entry.repeats_first = repeat.repeats_first;
  }
  memory_.jobs.resize(memory_.entries.size());
  collect_others();
}

// Whether a follower of a group moves that has these weights of a parameter.
static bool moves(const Group& group, size_t follower, const View* weights) {
  return group.weight(follower) != 0 && weights[follower].data;
}

// Whether the same jobs come after this one that came in the last step, in `after`.
static bool has_same_followers(const Group& group, const Job& job, const View* weights,
                               const JobAfter* after) {
  const Job* then = job.then;
  for (size_t f = 0; f < group.followers.size(); ++f) {
    if (!moves(group, f, weights)) continue;
    if (!then || then != after + f) return false;
    const Stream& stream = then->streams[kFirstState];
    if (stream.data != weights[f].data || stream.dtype != weights[f].dtype) return false;
    then = then->then;
  }
  return !then;
}

void StepPlan::collect_usual(int threads) {
  // With fewer parameters a thread, waking all takes longer than they save. (Waking some would make
  // OpenMP's runtime end the others.)
  constexpr size_t kManyOfThread = 64;
  const bool look = params_.may_find_usual(groups_);
  if (look) {
    const double t = params_.likely_t();
    for (Group& group : groups_) group.expect(t);
  }
  size_t count = 0;
  for (const Group& group : groups_) count += static_cast<size_t>(group.size());
  memory_.entries.reserve(count);
  const bool as_many = memory_.jobs.size() == count;
  const bool fitted = std::exchange(memory_.schedule.fits, false) && as_many;
  memory_.jobs.resize(count);
  memory_.after.resize(move_followers(groups_) ? count * kMaxFollowers : 0);

  std::atomic<size_t> ready{0}, unmoved{0};
  auto group = groups_.begin();
  Py_ssize_t index = 0;
  const auto find = [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i, ++index) {
      for (; index == group->size(); ++group) index = 0;
      memory_.entries.emplace_back(&*group, index, group->param(index)).usual = look;
    }
    Entry* const entries = memory_.entries.data();
    params_.find_usual(entries + begin, entries + end);
  };
  const auto read = [&](size_t begin, size_t end) {
    Entry* const entries = memory_.entries.data();
    params_.find_gradients(entries + begin, entries + end);
    size_t ready_here = 0, unmoved_here = 0;
    View views[kMaxViews];
    for (size_t i = begin; i < end; ++i) {
      Entry& entry = entries[i];
      Job* const job = &memory_.jobs[i];
      entry.usual = entry.usual && params_.read_usual(&entry, views);
      if (!entry.usual) continue;
      const int streams = kFirstState + static_cast<int>(entry.group->rule_states);
      const int all = streams + static_cast<int>(entry.group->followers.size());
      JobAfter* const after =
          memory_.after.empty() ? nullptr : &memory_.after[i * size_t{kMaxFollowers}];
      const bool stays = walks(*job, views, streams) &&
                         has_same_followers(*entry.group, *job, views + streams, after);
      const bool same = stays && job->streams[kGrad].data == views[kGrad].data;
      // What lies where it did in the last step lies apart, as it did.
      entry.usual =
          same || !(stays ? gradient_comes_close(views, all) : any_come_close(views, all));
      if (!entry.usual) continue;
      entry.folded = entry.group->expected(entry.t);
      if (stays) {
        job->streams[kGrad].data = views[kGrad].data;
        set_rule_and_more(entry, views, job, after);
      } else {
        set_job(entry, views, job, after);
      }
      ready_here += entry.folded != nullptr;
      unmoved_here += same;
    }
    ready += ready_here;
    unmoved += unmoved_here;
  };
  const bool many = count >= kManyOfThread * static_cast<size_t>(threads);
  in_pipeline(look && many ? threads : 1, count, find, read);
  is_ready_ = ready == count;
  // If so, all are usual, and nothing changes their jobs from here on.
  memory_.schedule.fits = fitted && unmoved == count;
  if (!as_many || unmoved != count) forget_devices();
}

void StepPlan::collect_others() {
  hold();
  is_ready_ = true;
  keep_if([&](Entry* entry, Job* job) {
    View views[kMaxViews];
    if (entry->usual) {
      params_.pass(*entry);
    } else if (!params_.read(entry, views)) {
      return false;
    } else if (entry->lacks_state) {
      lacks_states_ = true;
      *job = {};
      set_norm(views[kGrad], &layouts_, job);  // all that it can have by now
    } else {
      set_job(*entry, views, job);
    }
    is_ready_ = is_ready_ && entry->folded;
    return true;
  });
  if (!params_.in_order() || !memory_.counts.lie_apart(memory_.entries)) set_repeats_aside();
}

// Of the parameters and their jobs.
template <class F>
void StepPlan::keep_if(F f) {
  size_t kept = 0;
  for (size_t i = 0; i < memory_.entries.size(); ++i) {
    if (!f(&memory_.entries[i], &memory_.jobs[i])) continue;
    if (kept != i) {
      memory_.entries[kept] = memory_.entries[i];
      memory_.jobs[kept] = memory_.jobs[i];
    }
    ++kept;
  }
  memory_.entries.erase(memory_.entries.begin() + static_cast<ptrdiff_t>(kept),
                        memory_.entries.end());
  memory_.jobs.resize(kept);
}

// ---- what is listed, or counted, a second time --------------------------------------------------

bool CountPlaces::lie_apart(const std::vector<Entry>& entries) {
  places_.clear();
  for (const Entry& entry : entries) {
    if (entry.count.data) places_.push_back(entry.count.data);
  }
  if (places_ == seen_) return apart_;
  seen_ = places_;
  std::sort(places_.begin(), places_.end());
  return apart_ = std::adjacent_find(places_.begin(), places_.end()) == places_.end();
}

// A parameter that is listed twice is stepped twice, and the second time it finds what the first
// has left: states, a count, and weights. So does one whose count is another's, too.
void StepPlan::set_repeats_aside() {
  std::unordered_map<const void*, const Group*> seen;  // parameters and counts
  keep_if([&](Entry* entry, Job* job) {
    Group* const group = entry->group;
    const auto [before, is_first] = seen.try_emplace(entry->param, group);
    if (is_first && (!entry->count.data || seen.try_emplace(entry->count.data, nullptr).second)) {
      return true;
    }
    group->fold(entry->t + 1);  // what this refuses, it refuses before anything has changed
    later_.push_back({group, entry->index, entry->param,
                      entry->is_new && !is_first && before->second == group, entry->device,
                      entry->sums_elsewhere ? Job{} : *job, entry->norm_item});
    return false;
  });
  memory_.schedule.fits = false;
}

// ---- scalars and jobs ---------------------------------------------------------------------------

void StepPlan::fold_scalars() {
  if (is_ready_) return;
  for (size_t i = 0; i < memory_.entries.size(); ++i) {
    Entry& entry = memory_.entries[i];
    if (entry.folded) continue;
    Group& group = *entry.group;
    // A rule that keeps no count only tells a parameter's first step from the others.
    if (!group.counts_steps) entry.t = entry.is_new || entry.repeats_first ? 1 : 2;
    if (entry.device == kHost && !PyFloat_Check(group.lr.ptr())) {
      throw py::value_error("lr of the group of " + entry.name("") + " is " +
                            type_text(group.lr.ptr()) +
                            ", but the parameter is on cpu; pass a number, or a tensor on cpu");
    }
    entry.folded = group.fold(entry.t);
    set_rule(group.kernel, entry.folded->scalars.data(), &memory_.jobs[i]);
  }
}

void StepPlan::complete_states() {
  if (is_ready_) return;
  for (size_t i = 0; i < memory_.entries.size(); ++i) {
    Entry& entry = memory_.entries[i];
    if (entry.lacks_state) {
      View views[kMaxViews];
      params_.create_states(&entry, views);
      set_job(entry, views, &memory_.jobs[i]);
    }
    if (entry.has_to_move) params_.move_count(&entry);
  }
}

// A device reads key and draw itself.
static Origin origin_of(const Entry& entry, const View& param) {
  int64_t rounding = 0;
  if (entry.device == kHost) std::memcpy(&rounding, entry.rounding()->data, sizeof(rounding));
  return {static_cast<uint32_t>(rounding >> 32), static_cast<uint32_t>(rounding),
          entry.parts->first_element, rows_of(param)};
}

void StepPlan::set_job(const Entry& entry, const View* views, Job* job, JobAfter* after) {
  *job = {};
  set_streams(views, kFirstState + static_cast<int>(entry.group->rule_states), &layouts_, job);
  set_rule_and_more(entry, views, job, after);
}

// What a job has beside its streams.
void StepPlan::set_rule_and_more(const Entry& entry, const View* views, Job* job, JobAfter* after) {
  const Group& group = *entry.group;
  if (entry.folded) set_rule(group.kernel, entry.folded->scalars.data(), job);
  job->grad_scale = group.grad_scale;
  if (entry.rounding()) job->origin = origin_of(entry, views[kParam]);
  if (group.moves_followers()) set_followers(entry, views, job, after);
}

void StepPlan::set_followers(const Entry& entry, const View* views, Job* job, JobAfter* after) {
  const Group& group = *entry.group;
  const View* const weights = views + kFirstState + group.rule_states;
  for (size_t f = 0; f < group.followers.size(); ++f) {
    if (!moves(group, f, weights)) continue;
    const View streams[] = {views[kParam], views[kParam], weights[f]};
    JobAfter& then = after ? after[f] : jobs_after_.emplace_back();
    then = {};
    set_streams(streams, 3, &layouts_, &then);
    then.origin = job->origin;
    then.origin.key |= 0x80000000;  // which no parameter's has: other bits
    then.rule = group.followers[f].rule;
    set_rule(*then.rule, &group.weight(f), &then);
    job->then = &then;
    job = &then;
  }
}

int64_t StepPlan::bytes() const {
  if (memory_.schedule.fits) return memory_.schedule.bytes();
  int64_t bytes = 0;
  for (const Job& job : memory_.jobs) bytes += job.numel * job.bytes_per_element;
  return bytes;
}

std::vector<Job> StepPlan::jobs_of_norm() const {
  std::vector<Job> jobs = memory_.jobs;
  for (size_t i = 0; i < jobs.size(); ++i) {
    if (memory_.entries[i].device != kHost || memory_.entries[i].sums_elsewhere) jobs[i].numel = 0;
  }
  for (const Repeat& repeat : later_) {
    if (repeat.device == kHost) jobs.push_back(repeat.norm_job);
  }
  return jobs;
}

}  // namespace fusedopt
