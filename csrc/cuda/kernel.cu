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

// What this CUDA compiles; whether the driver takes it, too, is asked when there is one.
constexpr int64_t kLargestArgs = CUDART_VERSION >= 12010 ? kLargeBytes : kSmallBytes;

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
};

template <class Access, class Rule, int64_t kBytes>
__global__ void __launch_bounds__(kThreads, 1)
    update_kernel(const __grid_constant__ Args<UpdateItem, kBytes> args) {
  update<Access, Rule>(args, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x));
}

template <class T, class Rule, int64_t kBytes>
__global__ void __launch_bounds__(kThreads, 1)
    fold_kernel(const __grid_constant__ Args<FoldItem, kBytes> args) {
  fold<T, Rule>(args, int64_t{blockIdx.x} * kThreads + threadIdx.x);
}

template <Norm kNorm, int64_t kBytes>
__global__ void __launch_bounds__(kThreads, 1)
    norm_kernel(const __grid_constant__ Args<NormItem, kBytes> args) {
  __shared__ double lanes[kThreads];
  Team team;
  norm<kNorm>(team, args, blockIdx.x, lanes);
}

template <Norm kNorm>
__global__ void __launch_bounds__(kThreads, 1)
    finish_kernel(const __grid_constant__ FinishArgs args) {
  static_assert(kThreads == kNormJoin);
  __shared__ double lanes[kThreads];
  Team team;
  finish<kNorm>(team, args, lanes);
}

// ---- every rule with every combination of its flags, in the order of the CPU's tables
// ------------

template <class Access, class Rule>
void launch_update(const Launch& at, const void* args, int64_t bytes, int64_t units) {
  const auto with = [&](auto kBytes) {
    using Arguments = Args<UpdateItem, decltype(kBytes)::value>;
    const auto kernel = update_kernel<Access, Rule, decltype(kBytes)::value>;
    const int64_t resident = resident_blocks(at, kernel);
    launch(at, "launching an update", kernel, *static_cast<const Arguments*>(args),
           units < resident ? units : resident);
  };
  if (bytes == kSmallBytes) {
    with(std::integral_constant<int64_t, kSmallBytes>());
  } else {
    with(std::integral_constant<int64_t, kLargestArgs>());
  }
}

template <class T, class Rule>
void launch_fold(const Launch& at, const void* args, int64_t bytes, int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  const auto with = [&](auto kBytes) {
    using Arguments = Args<FoldItem, decltype(kBytes)::value>;
    launch(at, "launching a fold", fold_kernel<T, Rule, decltype(kBytes)::value>,
           *static_cast<const Arguments*>(args), blocks);
  };
  if (bytes == kSmallBytes) {
    with(std::integral_constant<int64_t, kSmallBytes>());
  } else {
    with(std::integral_constant<int64_t, kLargestArgs>());
  }
}

struct RuleLaunches {
  void (*update[3])(const Launch&, const void*, int64_t, int64_t);  // by Streams
  void (*fold[3])(const Launch&, const void*, int64_t, int64_t);
};

template <class F32, class F64>
struct Make {
  static constexpr RuleLaunches entry(const char*, int) {
    static_assert(sizeof(F64) <= kMaxScalars * sizeof(double), "raise kMaxScalars");
    return {{launch_update<Uniform<float>, F32>, launch_update<Mixed, F32>,
             launch_update<Uniform<double>, F64>},
            {launch_fold<float, F64>, launch_fold<float, F64>, launch_fold<double, F64>}};
  }
};

constexpr auto kTable = make_rule_table<RuleLaunches, Make>();

// ---- what the engine calls ----------------------------------------------------------------------

void launch_norm(const Launch& at, Norm norm, const void* args, int64_t bytes, int64_t units) {
  constexpr int64_t kBlocks = kThreads / kNormLanes;
  const auto launch_it = [&](auto kNorm, auto kBytes) {
    using Arguments = Args<NormItem, decltype(kBytes)::value>;
    launch(at, "launching a norm", norm_kernel<decltype(kNorm)::value, decltype(kBytes)::value>,
           *static_cast<const Arguments*>(args), (units + kBlocks - 1) / kBlocks);
  };
  const auto with = [&](auto kNorm) {
    if (bytes == kSmallBytes) {
      launch_it(kNorm, std::integral_constant<int64_t, kSmallBytes>());
    } else {
      launch_it(kNorm, std::integral_constant<int64_t, kLargestArgs>());
    }
  };
  switch (norm) {
    case Norm::one: return with(std::integral_constant<Norm, Norm::one>());
    case Norm::two: return with(std::integral_constant<Norm, Norm::two>());
    case Norm::inf: return with(std::integral_constant<Norm, Norm::inf>());
  }
}

void launch_finish(const Launch& at, const FinishArgs& args) {
  switch (args.norm) {
    case Norm::one: return launch(at, "launching a sum", finish_kernel<Norm::one>, args, 1);
    case Norm::two: return launch(at, "launching a sum", finish_kernel<Norm::two>, args, 1);
    case Norm::inf: return launch(at, "launching a sum", finish_kernel<Norm::inf>, args, 1);
  }
}

void launch_rule_fold(const Launch& at, int rule, Streams streams, const void* args, int64_t bytes,
                      int64_t items) {
  kTable.entries[rule].fold[static_cast<int>(streams)](at, args, bytes, items);
}

void launch_rule_update(const Launch& at, int rule, Streams streams, const void* args,
                        int64_t bytes, int64_t units) {
  kTable.entries[rule].update[static_cast<int>(streams)](at, args, bytes, units);
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

int64_t largest_args() { return driver_version() >= 12010 ? kLargestArgs : kSmallBytes; }

constexpr Kernels kKernels = {launch_norm,        launch_finish, launch_rule_fold,
                              launch_rule_update, why_not,       largest_args};

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
