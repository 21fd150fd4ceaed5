// torch/: tensors as a step sees them, without linking torch: through torch's stable C ABI, or
// through Python attributes where it is absent.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <vector>

#include "numeric/dtype.h"
#include "torch/abi.h"

namespace fusedopt {

// References to the Python objects whose memory is in use.
using Held = std::vector<py::object>;

constexpr int kHost = -1;

// A strided tensor of a supported dtype, on the CPU or on a CUDA device. `shape` and `strides` live
// as long as the tensor.
struct View {
  char* data = nullptr;
  int64_t numel = 0;
  int ndim = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;
  DType dtype = DType::f32;
  int device = kHost;
  bool contiguous = false;     // the strides are those of a C array, also where a size is 1
  bool is_local_part = false;  // of a tensor that several processes share
  bool negated = false;        // the memory has the opposite sign of the tensor
  // Of a stream that has one, the second array.
  char* second = nullptr;
  const int64_t* second_strides = nullptr;  // of a parameter's; the scales of blocks are one array
};

class TensorReader {
 public:
  // fast: use the C ABI if torch has it. emulated: take tensors on the CPU to be on cuda:0.
  // why_not: why a CUDA device has no kernels, empty if it has; null: none has.
  TensorReader(bool fast, std::string (*why_not)(int device), bool emulated);
  bool fast() const { return abi_.has_value(); }
  bool emulated() const { return emulated_; }
  const std::string& why_not(int device) const;  // asked once

  // param.grad, a DTensor's with the placements of the parameter.
  py::object grad(PyObject* param) const;

  // The stream that torch uses now.
  void* current_stream(int device) const;

  // Tells autograd that a tensor has changed.
  void bump_version(PyObject* tensor) const;

  // False, with no Python error set, for anything but a strided tensor of a supported dtype on the
  // CPU or on a CUDA device that has kernels.
  // A DTensor is read as its local shard.
  bool read(PyObject* object, View* view, Held* held) const {
    return read_stored(object, view, held) && is_number(view->dtype);
  }
  // The same, and uint8 as e4m3, int16 as bf16_split: what belongs to a stream of that kind.
  bool read_stored(PyObject* object, View* view, Held* held) const;

  // The same without Python, on any thread, where fast(): the record of a tensor in a class of
  // torch's. Of devices, those that why_not() was asked of.
  const TorchAbi& abi() const { return *abi_; }
  bool is_plain(PyObject* object) const;  // whether it is in one
  bool read(Record record, View* view) const {
    return read_stored(record, view) && is_number(view->dtype);
  }
  bool read_stored(Record record, View* view) const;

  // The single element of a tensor that counts steps; on a device, a float32 one.
  struct Count {
    enum { f32, f64, i64 } type = f32;
    void* data = nullptr;
    int device = kHost;

    double get() const;
    void increment() const;
  };
  bool read_count(PyObject* object, Count* count, Held* held) const;
  bool read_count(Record record, Count* count) const;

 private:
  // What this process has of a DTensor, or any other tensor itself; null for what is no tensor.
  PyObject* local_part(PyObject* object, Held* held) const;
  bool read_raw(PyObject* object, RawTensor* tensor, Held* held) const;
  bool read_attributes(PyObject* object, RawTensor* tensor, Held* held) const;
  bool set_view(const RawTensor& tensor, bool may_ask, View* view) const;
  bool set_count(const RawTensor& tensor, bool may_ask, Count* count) const;
  bool find_device(const RawTensor& tensor, bool may_ask, int* device) const;

  py::object tensor_, parameter_;  // the two plain types: no wrapper, no override
  py::object grad_;                // the descriptor of torch.Tensor.grad
  std::optional<TorchAbi> abi_;
  std::string (*why_not_)(int device);
  bool emulated_;
  mutable std::map<int, std::string> answers_;  // as far as it was asked
  mutable int found_last_ = kHost;              // with kernels
};

inline bool same_shape(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d]) return false;
  }
  return true;
}

std::string shape_text(const View& view);

}  // namespace fusedopt
