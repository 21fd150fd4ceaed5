// A CUDA device played by the CPU: the text of the CUDA kernels, each launch one thread after the
// other. Built into the module with FUSEDOPT_EMULATED_DEVICE, for tests: all but the launches
// themselves can then be tried without a GPU.

#include "emulated_device.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define FUSEDOPT_FN inline

namespace fusedopt {
namespace cuda {
namespace {

#include "cuda/device.h"

struct Team {
  template <class F>
  void each(F f) {
    for (int thread = 0; thread < kThreads; ++thread) f(thread);
  }
};

constexpr int64_t kResident = 3;  // blocks: few, so that each takes several tiles

// Calls f(args) with the arguments as what they are.
template <class Item, class F>
void with_args(const void* args, int64_t bytes, F f) {
  if (bytes == kSmallBytes) {
    f(*static_cast<const Args<Item, kSmallBytes>*>(args));
  } else {
    f(*static_cast<const Args<Item, kLargeBytes>*>(args));
  }
}

template <class Access, class Rule>
void run_update(const void* args, int64_t bytes, int64_t units) {
  const int64_t blocks = units < kResident ? units : kResident;
  with_args<UpdateItem>(args, bytes, [&](const auto& args) {
    for (int64_t block = 0; block < blocks; ++block) {
      for (int thread = 0; thread < kThreads; ++thread) {
        update<Access, Rule>(args, block, blocks, thread);
      }
    }
  });
}

template <class T, class Rule>
void run_fold(const void* args, int64_t bytes, int64_t items) {
  const int64_t threads = (items + kThreads - 1) / kThreads * kThreads;
  with_args<FoldItem>(args, bytes, [&](const auto& args) {
    for (int64_t i = 0; i < threads; ++i) fold<T, Rule>(args, i);
  });
}

using Run = void (*)(const void*, int64_t, int64_t);
struct RuleRuns {
  Run update[3], fold[3];  // by Streams
};

template <class F32, class F64>
struct Make {
  static constexpr RuleRuns entry(const char*, int) {
    return {
        {run_update<Uniform<float>, F32>, run_update<Mixed, F32>, run_update<Uniform<double>, F64>},
        {run_fold<float, F64>, run_fold<float, F64>, run_fold<double, F64>}};
  }
};

constexpr auto kTable = make_rule_table<RuleRuns, Make>();

template <Norm kNorm>
void run_norm(const void* args, int64_t bytes, int64_t units) {
  constexpr int64_t kBlocks = kThreads / kNormLanes;
  with_args<NormItem>(args, bytes, [&](const auto& args) {
    for (int64_t block = 0; block < (units + kBlocks - 1) / kBlocks; ++block) {
      double lanes[kThreads];
      Team team;
      norm<kNorm>(team, args, block, lanes);
    }
  });
}

template <Norm kNorm>
void run_finish(const FinishArgs& args) {
  double lanes[kThreads];
  Team team;
  finish<kNorm>(team, args, lanes);
}

constexpr Kernels kKernels = {
    [](const Launch&, Norm norm, const void* args, int64_t bytes, int64_t units) {
      constexpr Run kRuns[] = {run_norm<Norm::one>, run_norm<Norm::two>, run_norm<Norm::inf>};
      kRuns[static_cast<int>(norm)](args, bytes, units);
    },
    [](const Launch&, const FinishArgs& args) {
      constexpr void (*kRuns[])(const FinishArgs&) = {run_finish<Norm::one>, run_finish<Norm::two>,
                                                      run_finish<Norm::inf>};
      kRuns[static_cast<int>(args.norm)](args);
    },
    [](const Launch&, int rule, Streams streams, const void* args, int64_t bytes, int64_t items) {
      kTable.entries[rule].fold[static_cast<int>(streams)](args, bytes, items);
    },
    [](const Launch&, int rule, Streams streams, const void* args, int64_t bytes, int64_t units) {
      kTable.entries[rule].update[static_cast<int>(streams)](args, bytes, units);
    },
    [](int) { return std::string(); },
    [] { return kLargeBytes; }};

// What launches nothing: what is left of a step is the host's.
constexpr Kernels kIdle = {[](const Launch&, Norm, const void*, int64_t, int64_t) {},
                           [](const Launch&, const FinishArgs&) {},
                           [](const Launch&, int, Streams, const void*, int64_t, int64_t) {},
                           [](const Launch&, int, Streams, const void*, int64_t, int64_t) {},
                           kKernels.why_not,
                           kKernels.largest_args};

constexpr Kernels kOutdated = {kKernels.norm,
                               kKernels.finish,
                               kKernels.fold,
                               kKernels.update,
                               [](int) { return std::string("the driver is from another age"); },
                               kKernels.largest_args};

}  // namespace

const Kernels* emulated_kernels(const std::string& name) {
  if (name == "emulated") return &kKernels;
  if (name == "idle") return &kIdle;
  if (name == "outdated") return &kOutdated;
  return nullptr;
}

std::vector<std::pair<int64_t, int64_t>> ranges_of_tile(uintptr_t address, DType dtype, int width,
                                                        int64_t numel, int64_t tile) {
  UpdateItem item{};
  item.data[kParam] = reinterpret_cast<char*>(address);
  item.dtypes[kParam] = dtype;
  item.numel = numel;
  std::vector<std::pair<int64_t, int64_t>> ranges;
  const auto visit = [&](auto groups) {
    for (int64_t i = 0; i < groups.count(); ++i) {
      const Group group = groups[i];
      ranges.emplace_back(group.first + group.begin, group.first + group.end);
    }
  };
  switch (width) {
    case 2: visit(Groups<2>(item, tile)); break;
    case 4: visit(Groups<4>(item, tile)); break;
    default: visit(Groups<8>(item, tile)); break;
  }
  return ranges;
}

int64_t item_of_unit(const std::vector<int64_t>& begins, int64_t unit) {
  std::vector<UpdateItem> items(begins.size());
  for (size_t i = 0; i < begins.size(); ++i) items[i].begin = begins[i];
  return &item_of(items.data(), static_cast<int64_t>(items.size()), unit) - items.data();
}

}  // namespace cuda
}  // namespace fusedopt
