// What the engine asks of torch in C, in some nanoseconds and without linking torch: functions of
// the libtorch that Python has loaded. All but one belong to its stable C ABI
// (torch/csrc/inductor/aoti_torch/c/shim.h).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

namespace fusedopt {

namespace py = pybind11;

// What the engine asks of a strided tensor on the CPU or on a CUDA device. `shape` and `strides`
// live as long as the tensor keeps them.
struct RawTensor {
  enum Type : uint8_t { f32, f64, bf16, f16, i64 } type;
  bool on_cuda;
  int device;  // its number, on CUDA
  int ndim;
  const int64_t *shape, *strides;
  void* data;
};

class TorchAbi {
 public:
  // Nothing where this torch lacks it, or where it says of some tensors anything but what Python
  // says of them.
  static std::optional<TorchAbi> find();

  // False, with no Python error set, for anything but what a RawTensor can describe. `object` is a
  // torch.Tensor.
  bool read(PyObject* object, RawTensor* tensor) const;

  // Tells autograd that a tensor has changed, as torch.autograd.graph.increment_version does.
  void bump_version(PyObject* object) const;

 private:
  // A handle is the address of an at::Tensor, which is one pointer to torch's record. Each Python
  // object holds one.
  using Handle = void*;
  Handle handle(PyObject* object) const { return reinterpret_cast<char*>(object) + offset_; }
  bool find_functions();
  bool find_offset(const py::list& tensors);
  bool agrees_on(py::handle tensor, RawTensor::Type type) const;
  bool read_handle(Handle handle, RawTensor* tensor) const;

  ptrdiff_t offset_ = 0;
  // Each returns 0, or an error code.
  int (*get_layout_)(Handle, int32_t*);
  int (*get_device_type_)(Handle, int32_t*);
  int (*get_device_index_)(Handle, int32_t*);
  int (*get_dtype_)(Handle, int32_t*);
  int (*get_dim_)(Handle, int64_t*);
  int (*get_sizes_)(Handle, int64_t**);
  int (*get_strides_)(Handle, int64_t**);
  int (*get_data_ptr_)(Handle, void**);
  void (*bump_version_)(Handle);
  // Torch's numbers for what is supported.
  int32_t strided_, cpu_, cuda_, dtypes_[RawTensor::i64 + 1];
};

}  // namespace fusedopt
