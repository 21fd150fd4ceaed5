#include "torch_abi.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace fusedopt {

// In the order of RawTensor::Type.
static const char* const kDtypes[] = {"float32", "float64", "bfloat16", "float16", "int64"};

#if defined(__unix__) || defined(__APPLE__)

// The library that `import torch` has loaded, or null.
static void* loaded_libtorch() {
#if defined(__APPLE__)
  const std::string name = "libtorch_cpu.dylib";
#else
  const std::string name = "libtorch_cpu.so";
#endif
  const auto directories = py::list(py::module_::import("torch").attr("__path__"));
  const auto path = py::cast<std::string>(directories[0]) + "/lib/" + name;
  void* const library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return library ? library : dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
}

bool TorchAbi::find_functions() {
  void* const library = loaded_libtorch();
  if (!library) return false;
  bool all = true;
  const auto find_symbol = [&](const char* name, auto* function) {
    void* const symbol = dlsym(library, name);
    all = all && symbol;
    std::memcpy(function, &symbol, sizeof(symbol));
  };
  const auto find = [&](const std::string& name, auto* function) {
    find_symbol(("aoti_torch_" + name).c_str(), function);
  };
  const auto find_number = [&](const std::string& name, int32_t* number) {
    int32_t (*function)() = nullptr;
    find(name, &function);
    if (function) *number = function();
  };
  find("get_layout", &get_layout_);
  find("get_device_type", &get_device_type_);
  find("get_device_index", &get_device_index_);
  find("get_dtype", &get_dtype_);
  find("get_dim", &get_dim_);
  find("get_sizes", &get_sizes_);
  find("get_strides", &get_strides_);
  find("get_data_ptr", &get_data_ptr_);
  // torch::autograd::impl::bump_version(const at::Tensor&), for which there is no C function.
  find_symbol("_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", &bump_version_);
  find_number("layout_strided", &strided_);
  find_number("device_type_cpu", &cpu_);
  find_number("device_type_cuda", &cuda_);
  for (int i = 0; i <= RawTensor::i64; ++i) {
    find_number(std::string("dtype_") + kDtypes[i], &dtypes_[i]);
  }
  return all;
}

#else

bool TorchAbi::find_functions() { return false; }

#endif

// Where the objects of these tensors hold what torch gives as their `_cdata`.
bool TorchAbi::find_offset(const py::list& tensors) {
  const auto base = py::module_::import("torch").attr("_C").attr("TensorBase");
  const auto size = py::cast<ptrdiff_t>(base.attr("__basicsize__"));
  constexpr ptrdiff_t kWord = sizeof(uintptr_t);
  int found = 0;
  for (ptrdiff_t offset = sizeof(PyObject); offset + kWord <= size; offset += kWord) {
    const bool everywhere = std::all_of(tensors.begin(), tensors.end(), [&](py::handle tensor) {
      uintptr_t word;
      std::memcpy(&word, reinterpret_cast<char*>(tensor.ptr()) + offset, sizeof(word));
      return word == py::cast<uintptr_t>(tensor.attr("_cdata"));
    });
    if (!everywhere) continue;
    offset_ = offset;
    ++found;
  }
  return found == 1;
}

// Whether what is read of a tensor, and done to it, is what Python says.
bool TorchAbi::agrees_on(const py::handle tensor, RawTensor::Type type) const {
  RawTensor raw;
  if (!read(tensor.ptr(), &raw) || raw.on_cuda || raw.type != type) return false;
  const auto shape = py::cast<py::tuple>(tensor.attr("shape"));
  const auto strides = py::cast<py::tuple>(tensor.attr("stride")());
  bool same = raw.data == reinterpret_cast<void*>(py::cast<uintptr_t>(tensor.attr("data_ptr")())) &&
              raw.ndim == static_cast<int>(shape.size());
  for (int d = 0; same && d < raw.ndim; ++d) {
    same = raw.shape[d] == py::cast<int64_t>(shape[d]) &&
           raw.strides[d] == py::cast<int64_t>(strides[d]);
  }
  if (!same) return false;
  const auto version = [&] { return py::cast<int64_t>(tensor.attr("_version")); };
  const int64_t before = version();
  bump_version(tensor.ptr());
  return version() == before + 1;
}

std::optional<TorchAbi> TorchAbi::find() try {
  TorchAbi abi;
  if (!abi.find_functions()) return {};
  const auto torch = py::module_::import("torch");
  const py::object cpu = torch.attr("device")("cpu");  // whatever the default is
  // Inference tensors would have no versions.
  const py::object empty = torch.attr("inference_mode")(false)(torch.attr("empty"));
  py::list tensors;
  for (int i = 0; i <= RawTensor::i64; ++i) {
    const py::tuple shape = py::make_tuple(3, 4, 1, 2 + i);
    const py::object dtype = torch.attr(kDtypes[i]);
    const py::object tensor = empty(shape, py::arg("dtype") = dtype, py::arg("device") = cpu);
    tensors.append(i == 0   ? tensor.attr("transpose")(0, 3)
                   : i == 1 ? torch.attr("nn").attr("Parameter")(tensor)
                            : tensor);
  }
  if (!abi.find_offset(tensors)) return {};
  for (int i = 0; i <= RawTensor::i64; ++i) {
    if (!abi.agrees_on(tensors[i], static_cast<RawTensor::Type>(i))) return {};
  }
  return abi;
} catch (const py::error_already_set&) {
  return {};  // a torch that lacks what was asked of it in Python
} catch (const py::cast_error&) {
  return {};
}

bool TorchAbi::read(PyObject* object, RawTensor* tensor) const {
  if (read_handle(handle(object), tensor)) return true;
  PyErr_Clear();  // what tensors with a Python class of their own may have run into
  return false;
}

bool TorchAbi::read_handle(Handle handle, RawTensor* tensor) const {
  // Torch says of some layouts and devices, in an exception, that they have no strides or pointer.
  int32_t layout, device_type, dtype, device;
  if (get_layout_(handle, &layout) || layout != strided_) return false;
  if (get_device_type_(handle, &device_type)) return false;
  tensor->on_cuda = device_type == cuda_;
  if (tensor->on_cuda) {
    if (get_device_index_(handle, &device)) return false;
    tensor->device = device;
  } else if (device_type != cpu_) {
    return false;
  }
  if (get_dtype_(handle, &dtype)) return false;
  const auto* known = std::find(dtypes_, std::end(dtypes_), dtype);
  if (known == std::end(dtypes_)) return false;
  tensor->type = static_cast<RawTensor::Type>(known - dtypes_);
  int64_t ndim, *shape, *strides;
  if (get_dim_(handle, &ndim) || get_sizes_(handle, &shape) || get_strides_(handle, &strides)) {
    return false;
  }
  tensor->ndim = static_cast<int>(ndim);
  tensor->shape = shape;
  tensor->strides = strides;
  return get_data_ptr_(handle, &tensor->data) == 0;
}

void TorchAbi::bump_version(PyObject* object) const try {
  bump_version_(handle(object));
} catch (const std::exception&) {
  // It is an inference tensor, and has none.
}

}  // namespace fusedopt
