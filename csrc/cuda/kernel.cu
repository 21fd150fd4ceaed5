// The CUDA kernels, and how they are launched: the only file that a CUDA compiler sees. What the
// threads do is in device.h.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/kernel.h"

#define FUSEDOPT_FN __host__ __device__ __forceinline__

namespace fusedopt {
namespace cuda {
namespace {

#include "cuda/device.h"

// ---- errors and devices -------------------------------------------------------------------------

void check(cudaError_t error, const char* call, int device) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + " on cuda:" + std::to_string(device) + ": " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Makes a device the current one, and the former one again.
class Guard {
 public:
  explicit Guard(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice", device);
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice", device);
  }
  ~Guard() {
    if (before_ != device_) (void)cudaSetDevice(before_);
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  int device_, before_ = 0;
};

template <class Argument>
void launch(const Launch& at, const char* name, void (*kernel)(Argument), const Argument& argument,
            int64_t blocks) {
  const Guard guard(at.device);
  void* arguments[] = {const_cast<Argument*>(&argument)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(at.stream)),
        name, at.device);
}

// As many blocks as the device runs at a time.
template <class Argument>
int64_t resident_blocks(const Launch& at, void (*kernel)(Argument)) {
  const Guard guard(at.device);
  int multiprocessors = 0, blocks = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, at.device),
        "cudaDeviceGetAttribute", at.device);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &blocks, reinterpret_cast<const void*>(kernel), kThreads, 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor", at.device);
  return int64_t{multiprocessors} * blocks;
}

// ---- kernels ------------------------------------------------------------------------------------

// The threads of one block.
struct Team {
  template <class F>
  __device__ void each(F f) {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <class F>
  __device__ void together(F f) {
    f(static_cast<int>(threadIdx.x));
  }
  // The largest of each that kLanes neighbours have.
  template <int kLanes, int kCount>
  __device__ bool join(int thread, uint32_t* largest) {
    const uint32_t own = (kLanes < 32 ? (1u << kLanes) - 1 : 0xffffffff)
                         << thread % 32 / kLanes * kLanes;
    FUSEDOPT_UNROLL()
    for (int i = 0; i < kCount; ++i) {
      FUSEDOPT_UNROLL()
      for (int half = kLanes / 2; half > 0; half /= 2) {
        const uint32_t other = __shfl_xor_sync(own, largest[i], half);
        largest[i] = largest[i] > other ? largest[i] : other;
      }
    }
    return true;
  }
};

template <int kKind, class Rule>
__global__ void __launch_bounds__(kThreads, KindOf<kKind>::kBlocks)
    update_kernel(const __grid_constant__ Args<UpdateItem> args) {
  Team team;
  update<KindOf<kKind>, Rule>(team, args, blockIdx.x, gridDim.x);
}

__global__ void __launch_bounds__(kThreads)
    advance_kernel(const __grid_constant__ Args<UpdateItem> args) {
  advance(args, int64_t{blockIdx.x} * kThreads + threadIdx.x);
}

__global__ void __launch_bounds__(kThreads)
    fold_kernel(const __grid_constant__ Args<FoldItem> args) {
  fold(args, int64_t{blockIdx.x} * kThreads + threadIdx.x);
}

template <int64_t kBytes>
__global__ void __launch_bounds__(kThreads)
    write_kernel(const __grid_constant__ Page<kBytes> page) {
  write(page, int64_t{blockIdx.x} * kThreads + threadIdx.x);
}

template <Norm kNorm>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const __grid_constant__ Args<NormItem> args) {
  __shared__ double lanes[kThreads];
  Team team;
  norm<kNorm>(team, args, blockIdx.x, lanes);
}

template <Norm kNorm>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ FinishArgs args) {
  static_assert(kThreads == kNormJoin);
  __shared__ double lanes[kThreads];
  Team team;
  finish<kNorm>(team, args, lanes);
}

__global__ void __launch_bounds__(kThreads)
    keep_kernel(const __grid_constant__ Args<WatchItem> args) {
  Team team;
  keep(team, args, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads)
    watch_kernel(const __grid_constant__ Args<WatchItem> args) {
  __shared__ double lanes[kSums * kThreads];
  Team team;
  watch(team, args, blockIdx.x, lanes);
}

__global__ void __launch_bounds__(kThreads)
    join_kernel(const __grid_constant__ Args<WatchItem> args) {
  __shared__ double lanes[kThreads];
  Team team;
  join_blocks(team, args, blockIdx.x, lanes);
}

// ---- every rule with every combination of its flags, in the order of the CPU's tables -----------

struct RuleLaunches {
  void (*update[kAnyCodecs + 1])(const Launch&, const Args<UpdateItem>&);
};

template <class F32, class F64>
struct Make {
  template <int kKind>
  static void update(const Launch& at, const Args<UpdateItem>& args) {
    constexpr int kTaken = taken<F32>(kKind);
    const auto kernel =
        update_kernel<kTaken, std::conditional_t<KindOf<kTaken>::kDouble, F64, F32>>;
    const int64_t resident = resident_blocks(at, kernel);
    launch(at, "launching an update", kernel, args, args.units < resident ? args.units : resident);
  }
  template <int... kKind>
  static constexpr RuleLaunches all(std::integer_sequence<int, kKind...>) {
    return {{update<kKind>...}};
  }
  static constexpr RuleLaunches entry(const char*, int) {
    static_assert(sizeof(F64) <= kMaxScalars * sizeof(double), "raise kMaxScalars");
    return all(std::make_integer_sequence<int, kAnyCodecs + 1>());
  }
};

constexpr auto kTable = make_rule_table<RuleLaunches, Make>();

// ---- what the engine calls ----------------------------------------------------------------------

constexpr int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

template <int64_t kBytes>
void write_pages(const Launch& at, char* to, const std::string& table) {
  in_pages<kBytes>(to, table, [&](const auto& page) {
    launch(at, "writing a table", write_kernel<kBytes>, page, blocks_for(page.count));
  });
}

void launch_write(const Launch& at, char* to, const std::string& table) {
#if CUDART_VERSION >= 12010
  if (driver_version() >= 12010) return write_pages<kLargeBytes>(at, to, table);
#endif
  write_pages<kSmallBytes>(at, to, table);
}

void launch_norm(const Launch& at, Norm norm, const Args<NormItem>& args) {
  const auto with = [&](auto kernel) {
    launch(at, "launching a norm", kernel, args, blocks_for(args.units * kNormLanes));
  };
  switch (norm) {
    case Norm::one: return with(norm_kernel<Norm::one>);
    case Norm::two: return with(norm_kernel<Norm::two>);
    case Norm::inf: return with(norm_kernel<Norm::inf>);
  }
}

void launch_finish(const Launch& at, const FinishArgs& args) {
  switch (args.norm) {
    case Norm::one: return launch(at, "launching a sum", finish_kernel<Norm::one>, args, 1);
    case Norm::two: return launch(at, "launching a sum", finish_kernel<Norm::two>, args, 1);
    case Norm::inf: return launch(at, "launching a sum", finish_kernel<Norm::inf>, args, 1);
  }
}

void launch_fold(const Launch& at, const Args<FoldItem>& args) {
  launch(at, "launching a fold", fold_kernel, args, blocks_for(args.item_count));
}

void launch_update(const Launch& at, int rule, int kind, const Args<UpdateItem>& args) {
  kTable.entries[rule].update[kind](at, args);
}

void launch_advance(const Launch& at, const Args<UpdateItem>& args) {
  launch(at, "advancing draws", advance_kernel, args, blocks_for(args.item_count));
}

void launch_keep(const Launch& at, const Args<WatchItem>& args) {
  launch(at, "keeping parameters", keep_kernel, args, args.units);
}

void launch_watch(const Launch& at, const Args<WatchItem>& args) {
  if (args.units != 0) {
    launch(at, "launching statistics", watch_kernel, args, blocks_for(args.units * kNormLanes));
  }
  launch(at, "joining statistics", join_kernel, args, args.item_count);
}

std::string why_not(int device) try {
  const Guard guard(device);
  cudaFuncAttributes attributes;
  const auto* const kernel = reinterpret_cast<const void*>(finish_kernel<Norm::two>);
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes", device);
  return "";
} catch (const std::runtime_error& error) {
  (void)cudaGetLastError();  // or the next call of others would find it
  return error.what();
}

constexpr Kernels kKernels = {launch_write, launch_norm,   launch_finish,
                              launch_fold,  launch_update, launch_advance,
                              launch_keep,  launch_watch,  why_not};

}  // namespace

const Kernels* compiled_kernels() { return &kKernels; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::vector<std::string> device_names() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return {};
  std::vector<std::string> names;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties", device);
    names.push_back(std::string(properties.name) + " (sm_" + std::to_string(properties.major) +
                    std::to_string(properties.minor) + ")");
  }
  return names;
}

}  // namespace cuda
}  // namespace fusedopt
