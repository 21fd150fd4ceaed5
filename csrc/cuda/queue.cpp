#include "cuda/queue.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <tuple>

namespace fusedopt {
namespace cuda {

bool can_access(const Job& job, Streams* kind) {
  const Stream *const streams = job.streams, *const end = streams + job.stream_count;
  const auto all = [&](DType dtype) {
    return std::all_of(streams, end, [&](const Stream& s) { return s.dtype == dtype; });
  };
  *kind = all(DType::f32) ? Streams::f32 : all(DType::f64) ? Streams::f64 : Streams::mixed;
  return *kind != Streams::mixed ||
         std::none_of(streams, end, [](const Stream& s) { return s.dtype == DType::f64; });
}

// ---- tables -------------------------------------------------------------------------------------

static int64_t units_of(int64_t numel, int64_t unit) { return (numel + unit - 1) / unit; }

template <class T>
static std::string bytes_of(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
}

// The items of one launch behind what several of them have in common.
template <class Item>
struct Table {
  std::string head;
  std::vector<Item> items;
  int64_t units = 0;

  int64_t bytes() const { return static_cast<int64_t>(head.size() + items.size() * sizeof(Item)); }
  bool ends_with(const std::string& entry) const {
    return head.size() >= entry.size() &&
           !head.compare(head.size() - entry.size(), entry.size(), entry);
  }
};

// Cuts sources into tables of at most so many bytes. entry(source) is what goes to the head unless
// the one before is equal; make_item(source, its index there, table) is the item.
template <class Item, class Source, class Entry, class MakeItem, class Use>
static void for_each_table(const std::vector<Source>& sources, int64_t most_bytes, Entry entry,
                           MakeItem make_item, Use use) {
  Table<Item> table;
  for (const Source& source : sources) {
    const std::string& wanted = entry(source);
    const int64_t added = static_cast<int64_t>(wanted.size() + sizeof(Item));
    if (!table.items.empty() && table.bytes() > most_bytes - added) {
      use(table);
      table = {};
    }
    if (!wanted.empty() && !table.ends_with(wanted)) table.head += wanted;
    const size_t index = wanted.empty() ? 0 : table.head.size() / wanted.size() - 1;
    table.items.push_back(make_item(source, static_cast<int32_t>(index), table));
  }
  if (!table.items.empty()) use(table);
}

// How large a table may become, head and items.
template <class Item>
int64_t Queue::most_bytes() const {
  if (memory_.upload) return std::numeric_limits<int64_t>::max();
  return kernels_.largest_args() - (int64_t{sizeof(Args<Item, kSmallBytes>)} -
                                    int64_t{sizeof(Args<Item, kSmallBytes>::room)});
}

// Calls start(arguments, their bytes) with a table in the arguments if it fits, and else on the
// device.
template <class Item, class Start>
void Queue::start(const Table<Item>& table, const void* head, void* results,
                  const Decision* decision, Start start) const {
  const size_t item_bytes = table.items.size() * sizeof(Item);
  const auto make = [&](auto args) {
    args->items = nullptr;
    args->head = static_cast<const char*>(head);
    args->results = results;
    args->decision = decision;
    args->item_count = static_cast<int64_t>(table.items.size());
    args->units = table.units;
    args->head_bytes = static_cast<int64_t>(table.head.size());
    return args;
  };
  const auto fits = [&](auto args) {
    if (table.bytes() > int64_t{sizeof(args->room)}) return false;
    std::memcpy(args->room, table.head.data(), table.head.size());
    std::memcpy(args->room + table.head.size(), table.items.data(), item_bytes);
    start(args.get(), int64_t{sizeof(*args)});
    return true;
  };
  if (fits(make(std::make_unique<Args<Item, kSmallBytes>>()))) return;
  if (kernels_.largest_args() == kLargeBytes &&
      fits(make(std::make_unique<Args<Item, kLargeBytes>>()))) {
    return;
  }
  const std::string items(reinterpret_cast<const char*>(table.items.data()), item_bytes);
  const char* const uploaded = memory_.upload(table.head + items);
  const auto args = make(std::make_unique<Args<Item, kSmallBytes>>());
  args->items = reinterpret_cast<const Item*>(uploaded + table.head.size());
  if (!head) args->head = uploaded;
  start(args.get(), int64_t{sizeof(*args)});
}

// ---- norms --------------------------------------------------------------------------------------

void Queue::norm(Norm norm, const std::vector<NormItem>& items, FinishArgs finish) const {
  int64_t blocks = 0;
  for (const NormItem& item : items) blocks += units_of(item.numel, kNormBlock);
  double* const sums = allocate<double>(blocks + 1);
  int64_t begin = 0;
  const std::string none;
  for_each_table<NormItem>(
      items, most_bytes<NormItem>(), [&](const NormItem&) -> const std::string& { return none; },
      [&](NormItem item, int32_t, Table<NormItem>& table) {
        item.begin = begin;
        begin += units_of(item.numel, kNormBlock);
        table.units += units_of(item.numel, kNormBlock);
        return item;
      },
      [&](const Table<NormItem>& table) {
        if (table.units == 0) return;
        start(table, nullptr, sums, nullptr, [&](const void* args, int64_t bytes) {
          kernels_.norm(launch_, norm, args, bytes, table.units);
        });
      });
  finish.norm = norm;
  finish.blocks = sums;
  finish.block_count = blocks;
  kernels_.finish(launch_, finish);
}

// ---- updates ------------------------------------------------------------------------------------

template <class T>
static T round_scalar(double scalar) {
  const T rounded = static_cast<T>(scalar);
  return rounded != rounded ? std::numeric_limits<T>::quiet_NaN() : rounded;  // no payload
}

namespace {

// The scalars of updates as a table has them; those of neighbours are usually the same.
template <class T>
class Entries {
 public:
  const std::string& operator()(const Update* update) {
    if (!last_ || update->job->scalars != last_->job->scalars ||
        update->grad_scale != last_->grad_scale) {
      Folded<T> folded{};
      for (int i = 0; i < update->scalar_count; ++i) {
        folded.scalars[i] = round_scalar<T>(update->job->scalars[i]);
      }
      folded.grad_scale = round_scalar<T>(update->grad_scale);
      bytes_ = bytes_of(folded);
      last_ = update;
    }
    return bytes_;
  }

 private:
  const Update* last_ = nullptr;
  std::string bytes_;
};

}  // namespace

template <class T>
void Queue::update_alike(const std::vector<const Update*>& updates, Streams streams,
                         const Decision* decision) const {
  const int rule = updates[0]->rule;
  Folded<T>* on_device = nullptr;
  if (updates[0]->clock.is_on_device()) {
    on_device = allocate<Folded<T>>(static_cast<int64_t>(updates.size()));
    Folded<T>* next = on_device;
    for_each_table<FoldItem>(
        updates, most_bytes<FoldItem>(), Entries<double>(),
        [](const Update* update, int32_t index, const Table<FoldItem>&) {
          const Clock& clock = update->clock;
          return FoldItem{clock.step, clock.lr, clock.host_lr, clock.t, index, clock.lr_is_double};
        },
        [&](const Table<FoldItem>& table) {
          const auto count = static_cast<int64_t>(table.items.size());
          start(table, nullptr, next, decision, [&](const void* args, int64_t bytes) {
            kernels_.fold(launch_, rule, streams, args, bytes, count);
          });
          next += count;
        });
  }
  int32_t number = 0;
  const std::string none;
  Entries<T> entries;
  for_each_table<UpdateItem>(
      updates, most_bytes<UpdateItem>(),
      [&](const Update* update) -> const std::string& {
        return on_device ? none : entries(update);
      },
      [&](const Update* update, int32_t index, Table<UpdateItem>& table) {
        UpdateItem item{};
        const Job& job = *update->job;
        for (int s = 0; s < job.stream_count; ++s) {
          item.data[s] = job.streams[s].data;
          item.dtypes[s] = job.streams[s].dtype;
        }
        item.numel = job.numel;
        item.begin = table.units;
        item.folded = on_device ? number++ : index;
        table.units += units_of(job.numel, kTile);
        return item;
      },
      [&](const Table<UpdateItem>& table) {
        if (table.units == 0) return;
        start(table, on_device, nullptr, decision, [&](const void* args, int64_t bytes) {
          kernels_.update(launch_, rule, streams, args, bytes, table.units);
        });
      });
}

void Queue::update(const std::vector<Update>& updates, const Decision* decision,
                   bool in_order) const {
  // One launch for all that differ in nothing but scalars and data.
  std::map<std::tuple<size_t, int, Streams, bool>, std::vector<const Update*>> alike;
  for (size_t i = 0; i < updates.size(); ++i) {
    const Update& update = updates[i];
    Streams kind;
    can_access(*update.job, &kind);
    alike[{in_order ? i : 0, update.rule, kind, update.clock.is_on_device()}].push_back(&update);
  }
  for (const auto& [key, group] : alike) {
    const Streams streams = std::get<2>(key);
    if (streams == Streams::f64) {
      update_alike<double>(group, streams, decision);
    } else {
      update_alike<float>(group, streams, decision);
    }
  }
}

}  // namespace cuda
}  // namespace fusedopt
