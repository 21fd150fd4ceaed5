// A CUDA device played by the CPU: the text of the CUDA kernels, each launch one thread after the
// other. Built into the module with FUSEDOPT_EMULATED_DEVICE, for tests: all but the launches
// themselves can then be tried without a GPU.

#include "emulated_device.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define FUSEDOPT_FN inline

namespace fusedopt {
namespace cuda {
namespace {

#include "cuda/device.h"

class Team {
 public:
  template <class F>
  void each(F f) {
    for (int thread = 0; thread < kThreads; ++thread) f(thread);
  }
  // Where threads wait for each other in the middle of f, all run to there, and then once more.
  template <class F>
  void together(F f) {
    bool waits[kThreads];
    has_joined_ = false;
    std::memset(seen_, 0, sizeof(seen_));
    for (int thread = 0; thread < kThreads; ++thread) waits[thread] = !f(thread);
    has_joined_ = true;
    for (int thread = 0; thread < kThreads; ++thread) {
      if (waits[thread] && !f(thread)) std::abort();
    }
  }
  template <int kLanes, int kCount>
  bool join(int thread, uint32_t* largest) {
    if (!has_joined_) {
      std::copy(largest, largest + kCount, seen_[thread]);
      return false;
    }
    const int first = thread / kLanes * kLanes;
    for (int other = first; other < first + kLanes; ++other) {
      for (int i = 0; i < kCount; ++i) largest[i] = std::max(largest[i], seen_[other][i]);
    }
    return true;
  }

 private:
  bool has_joined_ = false;
  uint32_t seen_[kThreads][kMaxStreams];
};

constexpr int64_t kResident = 3;  // blocks: few, so that each takes several tiles

struct RuleRuns {
  void (*update[kAnyCodecs + 1])(const Args<UpdateItem>&);
};

template <class F32, class F64>
struct Make {
  template <int kKind>
  static void run(const Args<UpdateItem>& args) {
    using Kind = KindOf<taken<F32>(kKind)>;
    const int64_t blocks = args.units < kResident ? args.units : kResident;
    for (int64_t block = 0; block < blocks; ++block) {
      Team team;
      update<Kind, std::conditional_t<Kind::kDouble, F64, F32>>(team, args, block, blocks);
    }
  }
  template <int... kKind>
  static constexpr RuleRuns all(std::integer_sequence<int, kKind...>) {
    return {{run<kKind>...}};
  }
  static constexpr RuleRuns entry(const char*, int) {
    return all(std::make_integer_sequence<int, kAnyCodecs + 1>());
  }
};

constexpr auto kTable = make_rule_table<RuleRuns, Make>();

template <Norm kNorm>
void run_norm(const Args<NormItem>& args) {
  constexpr int64_t kBlocks = kThreads / kNormLanes;
  for (int64_t block = 0; block < (args.units + kBlocks - 1) / kBlocks; ++block) {
    double lanes[kThreads];
    Team team;
    norm<kNorm>(team, args, block, lanes);
  }
}

template <Norm kNorm>
void run_finish(const FinishArgs& args) {
  double lanes[kThreads];
  Team team;
  finish<kNorm>(team, args, lanes);
}

void run_keep(const Launch&, const Args<WatchItem>& args) {
  for (int64_t block = 0; block < args.units; ++block) {
    Team team;
    keep(team, args, block);
  }
}

void run_watch(const Launch&, const Args<WatchItem>& args) {
  constexpr int64_t kBlocks = kThreads / kNormLanes;
  double lanes[kSums * kThreads];
  Team team;
  for (int64_t block = 0; block < (args.units + kBlocks - 1) / kBlocks; ++block) {
    watch(team, args, block, lanes);
  }
  for (int64_t item = 0; item < args.item_count; ++item) join_blocks(team, args, item, lanes);
}

constexpr Kernels kKernels = {[](const Launch&, char* to, const std::string& table) {
                                in_pages<kSmallBytes>(to, table, [](const auto& page) {
                                  for (int64_t i = 0; i < page.count + kThreads; ++i)
                                    write(page, i);
                                });
                              },
                              [](const Launch&, Norm norm, const Args<NormItem>& args) {
                                constexpr void (*kRuns[])(const Args<NormItem>&) = {
                                    run_norm<Norm::one>, run_norm<Norm::two>, run_norm<Norm::inf>};
                                kRuns[static_cast<int>(norm)](args);
                              },
                              [](const Launch&, const FinishArgs& args) {
                                constexpr void (*kRuns[])(const FinishArgs&) = {
                                    run_finish<Norm::one>, run_finish<Norm::two>,
                                    run_finish<Norm::inf>};
                                kRuns[static_cast<int>(args.norm)](args);
                              },
                              [](const Launch&, const Args<FoldItem>& args) {
                                for (int64_t i = 0; i < args.item_count + kThreads; ++i)
                                  fold(args, i);
                              },
                              [](const Launch&, int rule, int kind, const Args<UpdateItem>& args) {
                                kTable.entries[rule].update[kind](args);
                              },
                              [](const Launch&, const Args<UpdateItem>& args) {
                                for (int64_t i = 0; i < args.item_count + kThreads; ++i)
                                  advance(args, i);
                              },
                              run_keep,
                              run_watch,
                              [](int) { return std::string(); }};

// What launches nothing: what is left of a step is the host's.
constexpr Kernels kIdle = {[](const Launch&, char*, const std::string&) {},
                           [](const Launch&, Norm, const Args<NormItem>&) {},
                           [](const Launch&, const FinishArgs&) {},
                           [](const Launch&, const Args<FoldItem>&) {},
                           [](const Launch&, int, int, const Args<UpdateItem>&) {},
                           [](const Launch&, const Args<UpdateItem>&) {},
                           [](const Launch&, const Args<WatchItem>&) {},
                           [](const Launch&, const Args<WatchItem>&) {},
                           kKernels.why_not};

constexpr Kernels kOutdated = {kKernels.write,
                               kKernels.norm,
                               kKernels.finish,
                               kKernels.fold,
                               kKernels.update,
                               kKernels.advance,
                               kKernels.keep,
                               kKernels.watch,
                               [](int) { return std::string("the driver is from another age"); }};

}  // namespace

const Kernels* emulated_kernels(const std::string& name) {
  if (name == "emulated") return &kKernels;
  if (name == "idle") return &kIdle;
  if (name == "outdated") return &kOutdated;
  return nullptr;
}

std::pair<int64_t, int64_t> elements_of_tile(int64_t numel, int64_t number) {
  UpdateItem item{};
  item.numel = numel;
  const Tile<KindOf<0>, Sgd<float, false>> tile(item, {}, number);
  const int64_t first = (tile.places[kParam].data - item.data[kParam]) / int64_t{sizeof(float)};
  return {first, first + tile.count};
}

int64_t item_of_unit(const std::vector<int64_t>& begins, int64_t unit) {
  std::vector<UpdateItem> items(begins.size());
  for (size_t i = 0; i < begins.size(); ++i) items[i].begin = begins[i];
  return &item_of(items.data(), static_cast<int64_t>(items.size()), unit) - items.data();
}

}  // namespace cuda
}  // namespace fusedopt
