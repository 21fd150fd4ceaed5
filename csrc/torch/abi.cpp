#include "torch/abi.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <utility>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace fusedopt {

// In the order of RawTensor::Type.
static const char* const kDtypes[] = {"float32", "float64", "bfloat16", "float16",
                                      "uint8",   "int16",   "int64"};

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
    std::memcpy(function, &symbol, sizeof(symbol));
    all = all && symbol;
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
  find("new_tensor_handle", &new_tensor_handle_);
  find("delete_tensor_object", &delete_tensor_object_);
  // For these there is no C function: torch::autograd::impl::bump_version(const at::Tensor&),
  find_symbol("_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", &bump_version_);
  // at::impl::tensor_has_dispatch(const at::Tensor&),
  find_symbol("_ZN2at4impl19tensor_has_dispatchERKNS_6TensorE", &has_dispatch_);
  // at::native::is_neg(const at::Tensor&),
  find_symbol("_ZN2at6native6is_negERKNS_6TensorE", &is_neg_);
  // c10::TensorImpl::grad() const.
  find_symbol("_ZNK3c1010TensorImpl4gradEv", &grad_);
  find_number("layout_strided", &strided_);
  find_number("device_type_cpu", &cpu_);
  find_number("device_type_cuda", &cuda_);
  for (int i = 0; i <= RawTensor::i64; ++i) {
    find_number(std::string("dtype_") + kDtypes[i], &dtypes_[i]);
  }
  const bool enough = all;
  // at::hasCallbacks().
  find_symbol("_ZN2at12hasCallbacksEv", &has_callbacks_);
  return enough;
}

#else

bool TorchAbi::find_functions() { return false; }

#endif

template <class T>
static T word_at(const void* memory, ptrdiff_t offset) {
  T word;
  std::memcpy(&word, static_cast<const char*>(memory) + offset, sizeof(word));
  return word;
}

// At which offset, below size, each of these addresses has what torch gives as the `_cdata` of the
// object beside it; 0 if there is none, or more than one.
using Described = std::vector<std::pair<const void*, py::object>>;
static ptrdiff_t find_offset(const Described& all, ptrdiff_t size) {
  constexpr ptrdiff_t kWord = sizeof(uintptr_t);
  ptrdiff_t found = 0;
  for (ptrdiff_t offset = kWord; offset + kWord <= size; offset += kWord) {
    const bool everywhere = std::all_of(all.begin(), all.end(), [&](const auto& each) {
      return word_at<uintptr_t>(each.first, offset) ==
             py::cast<uintptr_t>(each.second.attr("_cdata"));
    });
    if (everywhere && found) return 0;
    if (everywhere) found = offset;
  }
  return found;
}

bool TorchAbi::find_offsets(const py::list& tensors) {
  const auto base = py::module_::import("torch").attr("_C").attr("TensorBase");
  Described objects, records;
  for (const py::handle tensor : tensors) {
    objects.emplace_back(tensor.ptr(), py::reinterpret_borrow<py::object>(tensor));
  }
  record_offset_ = find_offset(objects, py::cast<ptrdiff_t>(base.attr("__basicsize__")));
  if (!record_offset_) return false;
  for (const py::handle tensor : tensors) {
    records.emplace_back(record(tensor.ptr()), tensor.attr("untyped_storage")());
  }
  constexpr ptrdiff_t kRecordBytes = 64;  // and more
  storage_offset_ = find_offset(records, kRecordBytes);
  return true;
}

// Whether what is read of a tensor, and done to it, is what Python says.
bool TorchAbi::agrees_on(const py::handle tensor, RawTensor::Type type) const {
  RawTensor raw;
  if (!read(record(tensor.ptr()), &raw) || raw.on_cuda || raw.type != type) return false;
  if (asks_python(record(tensor.ptr())) || raw.negated != py::cast<bool>(tensor.attr("is_neg")())) {
    return false;
  }
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
  bump_version(record(tensor.ptr()));
  return version() == before + 1;
}

// One with a Python class that answers for it.
static py::object asking_tensor(const py::module_& torch) {
  const auto builtins = py::module_::import("builtins");
  const py::object tensor = torch.attr("Tensor");
  const py::dict members(py::arg("__torch_dispatch__") =
                             builtins.attr("classmethod")(builtins.attr("len")));
  const py::object type = builtins.attr("type")("Asking", py::make_tuple(tensor), members);
  return tensor.attr("_make_wrapper_subclass")(type, py::make_tuple(2));
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
  if (!abi.find_offsets(tensors)) return {};
  const Record parameter = abi.record(tensors[1].ptr());
  abi.undefined_ = *abi.grad_(parameter);
  tensors[1].attr("grad") = tensors[1].attr("detach")();
  if (abi.grad(parameter) != abi.record(tensors[1].attr("grad").ptr())) return {};
  const py::object number =
      empty(2, py::arg("dtype") = torch.attr("complex64"), py::arg("device") = cpu);
  if (!abi.agrees_on(number.attr("conj")().attr("imag"), RawTensor::f32)) return {};
  if (!abi.asks_python(abi.record(asking_tensor(torch).ptr()))) return {};
  for (int i = 0; i <= RawTensor::i64; ++i) {
    if (!abi.agrees_on(tensors[i], static_cast<RawTensor::Type>(i))) return {};
  }
  return abi;
} catch (const py::error_already_set&) {
  return {};  // a torch that lacks what was asked of it in Python
} catch (const py::cast_error&) {
  return {};
}

Record TorchAbi::record(PyObject* object) const { return word_at<Record>(object, record_offset_); }

void TorchAbi::ask_for(Record record) {
  constexpr int kBytes = 192;
  for (int at = 0; at < kBytes; at += 64) __builtin_prefetch(static_cast<char*>(record) + at);
}

void TorchAbi::ask_for_storage(Record record) const {
  constexpr int kBytes = 128;
  const auto storage = word_at<uintptr_t>(record, storage_offset_);
  for (int at = 0; at < kBytes; at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(storage + at));  // which may be null
  }
}

bool TorchAbi::read(Record record, RawTensor* tensor) const {
  const Handle handle = &record;
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
  tensor->negated = is_neg_(handle);
  return get_data_ptr_(handle, &tensor->data) == 0;
}

Record TorchAbi::grad(Record record) const {
  const Record grad = *grad_(record);
  return grad == undefined_ ? nullptr : grad;
}

TorchAbi::Hold TorchAbi::hold(Record record) const {
  void* tensor = nullptr;
  if (new_tensor_handle_(&record, &tensor)) throw std::bad_alloc();
  return {tensor, {delete_tensor_object_}};
}

void TorchAbi::bump_version(Record record) const try {
  bump_version_(&record);
} catch (const std::exception&) {
  // It is an inference tensor, and has none.
}

}  // namespace fusedopt
