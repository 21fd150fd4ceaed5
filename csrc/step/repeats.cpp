// Parameters that are listed, or counted, a second time in one step.

#include <algorithm>
#include <unordered_map>

#include "step/plan.h"

namespace fusedopt {

// Whether no two parameters have one count. Remembers where counts have been found to lie apart:
// from step to step they stay where they are.
bool StepPlan::counts_lie_apart() {
  std::vector<const void*>& seen = counts_.seen;
  size_t count = 0;
  bool same = true;
  for (const Entry& entry : entries_) {
    if (!entry.count.data) continue;
    if (count == seen.size()) seen.push_back(nullptr);
    same = same && seen[count] == entry.count.data;
    seen[count++] = entry.count.data;
  }
  same = same && count == seen.size();
  seen.resize(count);
  if (same) return counts_.apart;
  std::vector<const void*> sorted = seen;
  std::sort(sorted.begin(), sorted.end());
  return counts_.apart = std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
}

// A parameter that is listed twice is stepped twice, and the second time it finds what the first
// has left: states, a count, and weights. So does one whose count is another's, too.
void StepPlan::set_repeats_aside() {
  std::unordered_map<const void*, const Group*> seen;  // parameters and counts
  std::vector<size_t> place(entries_.size());          // where entries go to
  size_t kept = 0;
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    const auto [before, is_first] = seen.try_emplace(entry.param, entry.group);
    const bool again =
        !is_first || (entry.count.data && !seen.try_emplace(entry.count.data, nullptr).second);
    place[i] = again ? entries_.size() : kept;
    if (!again) {
      if (kept != i) {
        entries_[kept] = entry;
        jobs_[kept] = jobs_[i];
      }
      ++kept;
      continue;
    }
    if (entry.usual && entry.folded) --ready_;
    const bool repeats_first = entry.is_new && !is_first && before->second == entry.group;
    later_.push_back({number_of(*entry.group), entry.index, repeats_first});
    fold(*entry.group, entry.t + 1);  // what this refuses, it refuses before anything has changed
    const bool elsewhere = std::binary_search(distributed_.begin(), distributed_.end(), i);
    later_norms_.push_back({entry.device, elsewhere ? Job{} : jobs_[i], entry.norm_item});
  }
  const auto remap = [&](std::vector<size_t>* indices) {
    size_t count = 0;
    for (const size_t i : *indices) {
      if (place[i] != entries_.size()) (*indices)[count++] = place[i];
    }
    indices->resize(count);
  };
  remap(&incomplete_);
  remap(&distributed_);
  entries_.erase(entries_.begin() + static_cast<ptrdiff_t>(kept), entries_.end());
  jobs_.resize(kept);
  schedule_.fits = false;
}

}  // namespace fusedopt
