#include "step/device_queue.h"

namespace fusedopt {

template <class T>
static T* pointer(const py::object& tensor) {
  return reinterpret_cast<T*>(py::cast<uintptr_t>(tensor.attr("data_ptr")()));
}

// Torch's allocator hands out memory in the order of the stream: what is let go after a step is
// used anew by later work only.
static cuda::Allocate allocate_with(const py::object& memory, int place,
                                    const std::shared_ptr<Held>& held) {
  return [=](int64_t bytes) {
    held->push_back(memory.attr("empty")(place, bytes));
    return pointer<char>(held->back());
  };
}

DeviceQueue::DeviceQueue(const cuda::Kernels& kernels, const TensorReader& reader, int device)
    : device_(device),
      place_(reader.emulated() ? kHost : device),
      memory_(py::module_::import("fusedopt._memory")),
      is_capturing_(py::cast<bool>(memory_.attr("is_capturing")(place_))),
      held_(std::make_shared<Held>()),
      queue_(kernels, {device, reader.current_stream(device)},
             allocate_with(memory_, place_, held_)) {}

py::object DeviceQueue::sum(Norm norm, const std::vector<cuda::NormItem>& items) const {
  const py::object result = memory_.attr("scalar")(place_, "float64");
  cuda::FinishArgs args{};
  args.sum = pointer<double>(result);
  queue_.norm(norm, items, args);
  return result;
}

void DeviceQueue::decide(const py::object& scaling, double sum, const py::list& sums,
                         const std::vector<cuda::NormItem>& items) {
  const auto keep = [&](const py::object& tensor) {
    held_->push_back(tensor);
    return pointer<double>(tensor);
  };
  cuda::FinishArgs args{};
  // A number, or where the device finds it.
  const auto number = [&](const char* name, double* value, const double** place) {
    const py::object source = scaling.attr(name);
    if (PyFloat_Check(source.ptr())) {
      *value = py::cast<double>(source);
    } else if (!source.is_none()) {
      *place = keep(memory_.attr("gather")(py::make_tuple(source), place_));
    }
  };
  double none = 0;
  number("unscale", &args.scaling.unscale, &args.unscale);
  number("coefficient", &args.scaling.coefficient, &args.coefficient);
  number("skip", &none, &args.skip);
  args.scaling.skip_nonfinite = py::cast<bool>(scaling.attr("skip_nonfinite"));
  const py::object max_norm = scaling.attr("max_norm");
  args.scaling.clip = !max_norm.is_none();
  if (args.scaling.clip) args.scaling.max_norm = py::cast<double>(max_norm);
  args.host_sum = sum;
  args.sum_count = static_cast<int64_t>(sums.size());
  if (args.sum_count) args.sums = keep(memory_.attr("gather")(sums, place_));
  args.decision = decision_ = queue_.allocate<cuda::Decision>(1);
  norm_result_ = memory_.attr("scalar")(place_, "float32");
  skipped_result_ = memory_.attr("scalar")(place_, "float32");
  args.norm_result = pointer<float>(norm_result_);
  args.skipped_result = pointer<float>(skipped_result_);
  queue_.norm(Norm::two, items, args);
}

}  // namespace fusedopt
