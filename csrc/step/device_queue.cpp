#include "step/device_queue.h"

#include <algorithm>
#include <utility>

namespace fusedopt {

py::handle device_memory() {
  static PyObject* const module = py::module_::import("fusedopt._memory").release().ptr();
  return module;
}

// ---- memory -------------------------------------------------------------------------------------

// Torch's allocator hands out memory in the order of the stream: what is let go after a step is
// used anew by later work only.
char* DeviceQueue::keep(const py::object& tensor) {
  held_.push_back(tensor);
  return reinterpret_cast<char*>(py::cast<uintptr_t>(tensor.attr("data_ptr")()));
}

// All that a step takes is one piece of memory, if it takes as much as the last one.
char* DeviceQueue::allocate(int64_t bytes) {
  constexpr int64_t kAligned = 256;
  bytes = (bytes + kAligned - 1) / kAligned * kAligned;
  if (bytes > left_) {
    left_ = std::max(bytes, *usual_bytes_ - bytes_);
    free_ = keep(device_memory().attr("empty")(place_, left_));
  }
  char* const memory = free_;
  free_ += bytes;
  left_ -= bytes;
  bytes_ += bytes;
  return memory;
}

// ---- launches -----------------------------------------------------------------------------------

// Takes note of a launch, make(kernels, at), in place of making it.
template <class Make>
void DeviceQueue::later(const cuda::Launch& at, Make make) {
  Launches& all = *static_cast<Launches*>(at.stream);
  all.waiting.emplace_back([&all, make = std::move(make)] { make(all.kernels, all.at); });
}

cuda::Kernels DeviceQueue::recording(const cuda::Kernels& kernels) {
  using cuda::Args;
  using cuda::Launch;
  cuda::Kernels recording = kernels;
  recording.write = [](const Launch& at, char* to, const std::string& table) {
    later(at,
          [=](const cuda::Kernels& made, const Launch& there) { made.write(there, to, table); });
  };
  recording.norm = [](const Launch& at, Norm norm, const Args<cuda::NormItem>& args) {
    later(at,
          [=](const cuda::Kernels& made, const Launch& there) { made.norm(there, norm, args); });
  };
  recording.finish = [](const Launch& at, const cuda::FinishArgs& args) {
    later(at, [=](const cuda::Kernels& made, const Launch& there) { made.finish(there, args); });
  };
  recording.fold = [](const Launch& at, const Args<cuda::FoldItem>& args) {
    later(at, [=](const cuda::Kernels& made, const Launch& there) { made.fold(there, args); });
  };
  recording.update = [](const Launch& at, int rule, int kind, const Args<cuda::UpdateItem>& args) {
    later(at, [=](const cuda::Kernels& made, const Launch& there) {
      made.update(there, rule, kind, args);
    });
  };
  recording.advance = [](const Launch& at, const Args<cuda::UpdateItem>& args) {
    later(at, [=](const cuda::Kernels& made, const Launch& there) { made.advance(there, args); });
  };
  return recording;
}

void DeviceQueue::launch() {
  if (launches_.waiting.empty()) return;
  py::gil_scoped_release unlocked;
  for (const auto& make : launches_.waiting) make();
  launches_.waiting.clear();
}

// ---- what a step does ---------------------------------------------------------------------------

static bool is_captured(int place) {
  return py::cast<bool>(device_memory().attr("is_capturing")(place));
}

DeviceQueue::DeviceQueue(const cuda::Kernels& kernels, const TensorReader& reader, int device,
                         int64_t* usual_bytes)
    : device_(device),
      place_(reader.emulated() ? kHost : device),
      is_capturing_(is_captured(place_)),
      usual_bytes_(usual_bytes),
      launches_{kernels, {device, reader.current_stream(device)}, {}},
      recording_(recording(kernels)),
      queue_(recording_, {device, &launches_}, [this](int64_t bytes) { return allocate(bytes); }) {}

DeviceQueue::~DeviceQueue() { *usual_bytes_ = bytes_; }

py::object DeviceQueue::sum(Norm norm, const std::vector<cuda::NormItem>& items) {
  const py::object result = device_memory().attr("scalar")(place_, "float64");
  cuda::FinishArgs args{};
  args.sum = reinterpret_cast<double*>(keep(result));
  queue_.norm(norm, items, args);
  launch();
  return result;
}

void DeviceQueue::decide(const AskedScaling& scaling, double sum, const py::list& sums,
                         const std::vector<cuda::NormItem>& items, const Window& window) {
  const auto gather = [&](const py::object& numbers) {
    return reinterpret_cast<double*>(keep(device_memory().attr("gather")(numbers, place_)));
  };
  cuda::FinishArgs args{};
  // A number, or where the device finds it.
  const auto number = [&](py::handle source, double* value, const double** place) {
    if (PyFloat_Check(source.ptr())) {
      *value = py::cast<double>(source);
    } else if (!source.is_none()) {
      *place = gather(py::make_tuple(source));
    }
  };
  double none = 0;
  number(scaling.unscale, &args.scaling.unscale, &args.unscale);
  number(scaling.coefficient, &args.scaling.coefficient, &args.coefficient);
  number(scaling.skip, &none, &args.skip);
  args.scaling.skip_nonfinite = scaling.skip_nonfinite;
  args.scaling.clip = scaling.clips();
  if (args.scaling.clip) args.scaling.max_norm = py::cast<double>(scaling.max_norm);
  if (const auto& watch = scaling.watch) {
    keep(window.tensor());
    args.scaling.spikes = watch->by(window.data());
    args.scaling.knows_norm = watch->knows_norm();
    number(watch->norm, &args.scaling.known_norm, &args.known_norm);
  }
  args.host_sum = sum;
  args.sum_count = static_cast<int64_t>(sums.size());
  if (args.sum_count) args.sums = gather(sums);
  args.decision = decision_ = queue_.allocate<cuda::Decision>(1);
  // What is returned outlives the step's memory.
  const auto result = [&](bool is_asked, py::object* tensor) {
    if (!is_asked) return queue_.allocate<float>(1);
    *tensor = device_memory().attr("scalar")(place_, "float32");
    return reinterpret_cast<float*>(keep(*tensor));
  };
  args.norm_result = result(scaling.needs_norm(), &norm_result_);
  args.skipped_result = result(scaling.may_skip(), &skipped_result_);
  if (scaling.says_factor) {
    factor_result_ = device_memory().attr("scalar")(place_, "float64");
    args.factor_result = reinterpret_cast<double*>(keep(factor_result_));
  }
  queue_.norm(Norm::two, items, args);
}

}  // namespace fusedopt
