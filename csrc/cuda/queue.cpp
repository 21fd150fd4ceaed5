#include "cuda/queue.h"

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>

namespace fusedopt {
namespace cuda {

// The first kind that the streams are of.
static int kind_of(const Job& job) {
  const Stream *const streams = job.streams, *const end = streams + job.stream_count;
  int kind = 0;
  const auto is_as_stored = [&] {
    return std::equal(streams, end, kKinds[kind],
                      [](const Stream& stream, DType dtype) { return stream.dtype == dtype; });
  };
  while (kind < kAnyNumbers && !is_as_stored()) ++kind;
  const bool numbers =
      std::all_of(streams, end, [](const Stream& stream) { return is_number(stream.dtype); });
  return kind == kAnyNumbers && !numbers ? kAnyCodecs : kind;
}

bool can_access(const Job& job) {
  return kind_of(job) < kAnyNumbers ||
         std::none_of(
             job.streams, job.streams + job.stream_count,
             [](const Stream& stream) { return stream.dtype == DType::f64; });
}

static bool is_double(int kind) { return kind == kF64; }
static bool is_of_numbers(int kind) { return kind < kFirstOfAdam || kind == kAnyNumbers; }

static int64_t units_of(int64_t numel, int64_t unit) { return (numel + unit - 1) / unit; }

// ---- tables -------------------------------------------------------------------------------------

// The items of one launch, behind what several of them have in common.
template <class Item>
class Table {
 public:
  int64_t units = 0;

  void add(const Item& item) { items_.push_back(item); }

  // Puts an entry there, unless it is equal to the one at `last`; returns where it is.
  template <class Entry>
  int32_t share(const Entry& entry, int32_t last = -1) {
    const auto* const bytes = reinterpret_cast<const char*>(&entry);
    if (last >= 0 && !std::memcmp(head_.data() + last, bytes, sizeof(entry))) return last;
    head_.append(bytes, sizeof(entry));
    return static_cast<int32_t>(head_.size() - sizeof(entry));
  }

  int64_t count() const { return static_cast<int64_t>(items_.size()); }
  int64_t head_bytes() const { return static_cast<int64_t>(head_.size()); }
  std::string bytes() const {
    return head_ +
           std::string(reinterpret_cast<const char*>(items_.data()), items_.size() * sizeof(Item));
  }

 private:
  std::string head_;
  std::vector<Item> items_;
};

// The table goes into the arguments if it fits, and else to the device.
template <class Item>
Args<Item> Queue::arguments(const Table<Item>& table, const Decision* decision) const {
  Args<Item> args{};
  args.decision = decision;
  args.item_count = table.count();
  args.units = table.units;
  args.head_bytes = table.head_bytes();
  const std::string bytes = table.bytes();
  if (bytes.size() <= sizeof(args.room)) {
    std::memcpy(args.room, bytes.data(), bytes.size());
  } else {
    char* const memory = allocate_(static_cast<int64_t>(bytes.size()));
    kernels_.write(launch_, memory, bytes);
    args.memory = memory;
  }
  return args;
}

// ---- norms --------------------------------------------------------------------------------------

void Queue::norm(Norm norm, const std::vector<NormItem>& items, FinishArgs finish) const {
  Table<NormItem> table;
  for (NormItem item : items) {
    item.begin = table.units;
    table.units += units_of(item.numel, kNormBlock);
    table.add(item);
  }
  double* const sums = allocate<double>(table.units + 1);
  if (table.units != 0) {
    Args<NormItem> args = arguments(table, nullptr);
    args.sums = sums;
    kernels_.norm(launch_, norm, args);
  }
  finish.norm = norm;
  finish.blocks = sums;
  finish.block_count = table.units;
  kernels_.finish(launch_, finish);
}

// ---- statistics ---------------------------------------------------------------------------------

std::function<void()> Queue::watch(std::vector<WatchItem> items, const Decision* decision) const {
  Table<WatchItem> table;
  for (WatchItem& item : items) {
    const int64_t size = item.param_dtype == DType::f64 ? sizeof(double) : sizeof(float);
    item.before = allocate<char>(item.numel * size);
    item.begin = table.units;
    table.units += units_of(item.numel, kNormBlock);
    table.add(item);
  }
  if (items.empty()) return [] {};
  constexpr int64_t kSums = sizeof(Sums) / sizeof(double);
  Args<WatchItem> args = arguments(table, decision);
  args.sums = allocate<double>(table.units * kSums + 1);
  if (args.units != 0) kernels_.keep(launch_, args);
  return [args, kernels = &kernels_, launch = launch_] { kernels->watch(launch, args); };
}

// ---- updates ------------------------------------------------------------------------------------

template <class T>
static Folded<T> fold(const Update& update) {
  const auto round = [](double scalar) {
    const T rounded = static_cast<T>(scalar);
    return rounded != rounded ? std::numeric_limits<T>::quiet_NaN() : rounded;  // no payload
  };
  Folded<T> folded{};
  std::transform(update.job->scalars, update.job->scalars + update.scalar_count, folded.scalars,
                 round);
  folded.grad_scale = round(update.grad_scale);
  return folded;
}

static Parts parts_of(const Update& update) {
  const Job& job = *update.job;
  Parts parts{};
  for (int s = 0; s < job.stream_count; ++s) parts.second[s] = job.streams[s].second;
  parts.rounding = update.rounding;
  parts.first_element = job.origin.first;
  parts.rows = job.origin.rows;
  parts.other_key = job.origin.key;
  parts.draws_back = update.draws_again;
  return parts;
}

// Of what takes the place of a gradient where the rule takes none.
static DType as_number(DType dtype) {
  return is_number(dtype)                                            ? dtype
         : dtype == DType::bf16_split || dtype == DType::bf16_random ? DType::bf16
                                                                     : DType::f16;
}

// Makes one launch of updates that differ in nothing but scalars and data.
template <class T>
std::function<void()> Queue::make_update(const std::vector<const Update*>& updates, int kind,
                                         const Decision* decision) const {
  const int rule = updates[0]->rule;
  const bool folds = updates[0]->clock.is_on_device();
  char* const scalars =
      folds ? allocate_(static_cast<int64_t>(updates.size() * sizeof(Folded<T>))) : nullptr;
  Table<FoldItem> clocks;
  Table<UpdateItem> table;
  int32_t folded = -1, host_folded = -1;
  bool draws = false;
  for (const Update* const update : updates) {
    const Job& job = *update->job;
    if (folds) {
      folded = static_cast<int32_t>(clocks.count() * int64_t{sizeof(Folded<T>)});
      const Clock& clock = update->clock;
      host_folded = clocks.share(fold<double>(*update), host_folded);
      clocks.add({clock.step, clock.lr, clock.host_lr, clock.t, scalars + folded, host_folded,
                  static_cast<int16_t>(rule), clock.lr_is_double, is_double(kind)});
    } else {
      folded = table.share(fold<T>(*update), folded);
    }
    UpdateItem item{};
    for (int s = 0; s < job.stream_count; ++s) {
      item.data[s] = job.streams[s].data;
      item.dtypes[s] = s == kGrad ? as_number(job.streams[s].dtype) : job.streams[s].dtype;
    }
    item.numel = job.numel;
    item.begin = table.units;
    item.folded = folded;
    if (!is_of_numbers(kind)) item.parts = table.share(parts_of(*update));
    draws = draws || (update->rounding && !update->draws_again);
    table.units += units_of(job.numel, kTile);
    table.add(item);
  }
  Args<UpdateItem> args = arguments(table, decision);
  args.scalars = scalars;
  const auto start = [=, kernels = &kernels_, launch = launch_] {
    if (args.units != 0) kernels->update(launch, rule, kind, args);
    if (draws) kernels->advance(launch, args);
  };
  if (!folds) return start;
  return [start, kernels = &kernels_, launch = launch_, clocks = arguments(clocks, decision)] {
    kernels->fold(launch, clocks);
    start();
  };
}

void Queue::update(const std::vector<Update>& updates, const Decision* decision,
                   bool in_order) const {
  std::map<std::tuple<size_t, int, int, bool>, std::vector<const Update*>> alike;
  for (size_t i = 0; i < updates.size(); ++i) {
    const Update& update = updates[i];
    alike[{in_order ? i : 0, update.rule, kind_of(*update.job), update.clock.is_on_device()}]
        .push_back(&update);
  }
  // All memory first: where that runs out, nothing has changed.
  std::vector<std::function<void()>> launches;
  for (const auto& [key, group] : alike) {
    const int kind = std::get<2>(key);
    launches.push_back(is_double(kind) ? make_update<double>(group, kind, decision)
                                       : make_update<float>(group, kind, decision));
  }
  for (const auto& launch : launches) launch();
}

}  // namespace cuda
}  // namespace fusedopt
