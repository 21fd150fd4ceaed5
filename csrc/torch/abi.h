// What the engine asks of torch in C, in some nanoseconds and without linking torch: functions of
// the libtorch that Python has loaded. Most belong to its stable C ABI
// (torch/csrc/inductor/aoti_torch/c/shim.h).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>

namespace fusedopt {

namespace py = pybind11;

// What the engine asks of a strided tensor on the CPU or on a CUDA device. `shape` and `strides`
// live as long as the tensor keeps them.
struct RawTensor {
  enum Type : uint8_t { f32, f64, bf16, f16, u8, i16, i64 } type;
  bool on_cuda;
  int device;  // its number, on CUDA
  int ndim;
  const int64_t *shape, *strides;
  void* data;
  bool negated;  // the memory has the opposite sign: a view that torch has yet to negate
};

// Torch's own record of a tensor, which a Python object and other tensors share.
using Record = void*;

class TorchAbi {
 public:
  // Nothing where this torch lacks it, or where it says of some tensors anything but what Python
  // says of them.
  static std::optional<TorchAbi> find();

  // Of a torch.Tensor.
  Record record(PyObject* object) const;

  // Whether the tensor has a Python class that answers for it. Of all others, what follows needs no
  // GIL.
  bool asks_python(Record record) const { return has_dispatch_(&record); }

  // False for anything but what a RawTensor can describe; a Python error may then be set.
  bool read(Record record, RawTensor* tensor) const;

  // Null if there is none.
  Record grad(Record record) const;

  // Reading waits for memory. These ask for it ahead: for a record, and, once that is here, for
  // what it says of the memory that the tensor shares with others.
  static void ask_for(Record record);
  void ask_for_storage(Record record) const;  // of a tensor that lives

  // Keeps a tensor's memory until it is released.
  struct Release {
    int (*function)(void*);
    void operator()(void* tensor) const { function(tensor); }
  };
  using Hold = std::unique_ptr<void, Release>;
  Hold hold(Record record) const;

  // Whether a profiler, or anyone else, wants to know what torch does on this thread.
  bool is_observed() const { return !has_callbacks_ || has_callbacks_(); }

  // Tells autograd that a tensor has changed, as torch.autograd.graph.increment_version does.
  void bump_version(Record record) const;

 private:
  // A handle is the address of an at::Tensor, which is one pointer to a record.
  using Handle = const Record*;
  bool find_functions();
  bool find_offsets(const py::list& tensors);
  bool agrees_on(py::handle tensor, RawTensor::Type type) const;

  ptrdiff_t record_offset_ = 0;   // in the object of a tensor
  ptrdiff_t storage_offset_ = 0;  // in a record; 0, where there is something else, if unknown
  // Each returns 0, or an error code.
  int (*get_layout_)(Handle, int32_t*);
  int (*get_device_type_)(Handle, int32_t*);
  int (*get_device_index_)(Handle, int32_t*);
  int (*get_dtype_)(Handle, int32_t*);
  int (*get_dim_)(Handle, int64_t*);
  int (*get_sizes_)(Handle, int64_t**);
  int (*get_strides_)(Handle, int64_t**);
  int (*get_data_ptr_)(Handle, void**);
  int (*new_tensor_handle_)(Handle, void**);
  int (*delete_tensor_object_)(void*);
  void (*bump_version_)(Handle);
  bool (*has_dispatch_)(Handle);
  bool (*is_neg_)(Handle);
  Handle (*grad_)(Record);
  bool (*has_callbacks_)() = nullptr;  // unless this torch has it
  Record undefined_;                   // of no tensor
  // Torch's numbers for what is supported.
  int32_t strided_, cpu_, cuda_, dtypes_[RawTensor::i64 + 1];
};

}  // namespace fusedopt
