#include "torch/tensors.h"

#include <pybind11/stl.h>

#include <algorithm>

namespace fusedopt {

TensorReader::TensorReader(bool fast, std::string (*why_not)(int device), bool emulated)
    : abi_(fast ? TorchAbi::find() : std::nullopt), why_not_(why_not), emulated_(emulated) {
  const auto torch = py::module_::import("torch");
  tensor_ = torch.attr("Tensor");
  parameter_ = torch.attr("nn").attr("Parameter");
  grad_ = tensor_.attr("grad");
}

void* TensorReader::current_stream(int device) const {
  if (emulated_) return nullptr;
  const py::object current =
      py::module_::import("torch").attr("cuda").attr("current_stream")(device);
  return reinterpret_cast<void*>(py::cast<uintptr_t>(current.attr("cuda_stream")));
}

bool TensorReader::is_plain(PyObject* object) const {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == tensor_.ptr() || type == parameter_.ptr();
}

// The names that are asked of every DTensor of a step: Python finds interned ones several times
// faster. The private ones are slots, where DTensor's public ones run Python code.
struct Names {
  PyObject* const grad = PyUnicode_InternFromString("grad");
  PyObject* const spec = PyUnicode_InternFromString("_spec");
  PyObject* const placements = PyUnicode_InternFromString("placements");
  PyObject* const local_tensor = PyUnicode_InternFromString("_local_tensor");
};

static const Names& names() {
  static const Names names;
  return names;
}

// object.name, or null if there is none.
static py::object attribute(PyObject* object, PyObject* name) {
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!value) PyErr_Clear();
  return value;
}

py::object TensorReader::grad(PyObject* param) const {
  if (is_plain(param)) {  // asking the descriptor itself spares a search of the type's bases
    PyObject* grad = Py_TYPE(grad_.ptr())->tp_descr_get(grad_.ptr(), param, nullptr);
    if (!grad) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(grad);
  }
  auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, names().grad));
  if (!grad) throw py::error_already_set();
  const py::object spec = attribute(param, names().spec);
  const py::object grad_spec = spec ? attribute(grad.ptr(), names().spec) : py::object();
  if (!grad_spec || grad_spec.is(spec)) return grad;
  const py::object placements = attribute(spec.ptr(), names().placements);
  const py::object grad_placements = attribute(grad_spec.ptr(), names().placements);
  if (!placements || !grad_placements || grad_placements.equal(placements)) return grad;
  return grad.attr("redistribute")(py::arg("placements") = placements);
}

PyObject* TensorReader::local_part(PyObject* object, Held* held) const {
  if (is_plain(object)) return object;
  if (!PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(tensor_.ptr()))) {
    return nullptr;
  }
  const py::object local = attribute(object, names().local_tensor);
  if (!local) return object;
  held->push_back(local);
  return local_part(local.ptr(), held);
}

bool TensorReader::read_raw(PyObject* object, RawTensor* tensor, Held* held) const {
  if (!abi_) return read_attributes(object, tensor, held);
  if (abi_->read(abi_->record(object), tensor)) return true;
  PyErr_Clear();  // what tensors with a Python class of their own may have run into
  return false;
}

// The same through Python, several times slower.
bool TensorReader::read_attributes(PyObject* object, RawTensor* tensor, Held* held) const try {
  static const std::map<std::string, RawTensor::Type> types = {
      {"torch.float32", RawTensor::f32},   {"torch.float64", RawTensor::f64},
      {"torch.bfloat16", RawTensor::bf16}, {"torch.float16", RawTensor::f16},
      {"torch.uint8", RawTensor::u8},      {"torch.int16", RawTensor::i16},
      {"torch.int64", RawTensor::i64},
  };
  const auto self = py::reinterpret_borrow<py::object>(object);
  const auto text = [](const py::object& value) { return py::cast<std::string>(py::str(value)); };
  const auto type = types.find(text(self.attr("dtype")));
  const auto device = self.attr("device");
  const auto device_type = text(device.attr("type"));
  if (type == types.end() || text(self.attr("layout")) != "torch.strided" ||
      (device_type != "cpu" && device_type != "cuda")) {
    return false;
  }
  tensor->type = type->second;
  tensor->on_cuda = device_type == "cuda";
  if (tensor->on_cuda) tensor->device = py::cast<int>(device.attr("index"));
  tensor->data = reinterpret_cast<void*>(py::cast<uintptr_t>(self.attr("data_ptr")()));
  tensor->negated = py::cast<bool>(self.attr("is_neg")());
  const auto shape = py::cast<std::vector<int64_t>>(self.attr("shape"));
  const auto strides = py::cast<std::vector<int64_t>>(self.attr("stride")());
  tensor->ndim = static_cast<int>(shape.size());
  const size_t bytes = sizeof(int64_t) * shape.size();
  const py::bytes buffer(std::string(2 * bytes + 1, 0));
  held->push_back(buffer);
  auto* sizes = reinterpret_cast<int64_t*>(PyBytes_AS_STRING(buffer.ptr()));
  std::copy(shape.begin(), shape.end(), sizes);
  std::copy(strides.begin(), strides.end(), sizes + shape.size());
  tensor->shape = sizes;
  tensor->strides = sizes + shape.size();
  return true;
} catch (const py::error_already_set&) {
  return false;
}

// False if nothing here can be done there.
bool TensorReader::find_device(const RawTensor& tensor, bool may_ask, int* device) const {
  *device = tensor.on_cuda ? tensor.device : emulated_ ? 0 : kHost;
  if (*device == kHost || *device == found_last_) return true;
  const auto known = answers_.find(*device);
  return known != answers_.end() ? known->second.empty() : may_ask && why_not(*device).empty();
}

const std::string& TensorReader::why_not(int device) const {
  const auto [at, is_new] = answers_.try_emplace(device, "this build has no CUDA kernels");
  if (is_new && why_not_) at->second = why_not_(device);
  if (at->second.empty()) found_last_ = device;
  return at->second;
}

// A fake tensor and a wrapper have none.
static bool has_memory(const RawTensor& tensor, int64_t numel) {
  return numel == 0 || tensor.data != nullptr;
}

bool TensorReader::read_stored(PyObject* object, View* view, Held* held) const {
  RawTensor tensor;
  PyObject* const local = local_part(object, held);
  view->is_local_part = local != object;
  return local && read_raw(local, &tensor, held) && set_view(tensor, /*may_ask=*/true, view);
}

bool TensorReader::read_stored(Record record, View* view) const {
  RawTensor tensor;
  view->is_local_part = false;
  return abi_->read(record, &tensor) && set_view(tensor, /*may_ask=*/false, view);
}

bool TensorReader::set_view(const RawTensor& tensor, bool may_ask, View* view) const {
  if (!find_device(tensor, may_ask, &view->device)) return false;
  switch (tensor.type) {
    case RawTensor::f32: view->dtype = DType::f32; break;
    case RawTensor::f64: view->dtype = DType::f64; break;
    case RawTensor::bf16: view->dtype = DType::bf16; break;
    case RawTensor::f16: view->dtype = DType::f16; break;
    case RawTensor::u8: view->dtype = DType::e4m3; break;
    case RawTensor::i16: view->dtype = DType::bf16_split; break;
    case RawTensor::i64: return false;
  }
  view->data = static_cast<char*>(tensor.data);
  view->ndim = tensor.ndim;
  view->shape = tensor.shape;
  view->strides = tensor.strides;
  view->contiguous = true;
  view->numel = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    view->contiguous = view->contiguous && tensor.strides[d] == view->numel;
    view->numel *= tensor.shape[d];
  }
  view->negated = tensor.negated;
  view->second = nullptr;
  view->second_strides = nullptr;
  return has_memory(tensor, view->numel);
}

bool TensorReader::read_count(PyObject* object, Count* count, Held* held) const {
  RawTensor tensor;
  PyObject* const local = local_part(object, held);
  return local && read_raw(local, &tensor, held) && set_count(tensor, /*may_ask=*/true, count);
}

bool TensorReader::read_count(Record record, Count* count) const {
  RawTensor tensor;
  return abi_->read(record, &tensor) && set_count(tensor, /*may_ask=*/false, count);
}

bool TensorReader::set_count(const RawTensor& tensor, bool may_ask, Count* count) const {
  if (!find_device(tensor, may_ask, &count->device)) return false;
  if (emulated_) count->device = kHost;
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] != 1) return false;
  }
  if (!has_memory(tensor, 1) || tensor.negated) return false;
  count->data = tensor.data;
  switch (tensor.type) {
    case RawTensor::f32: count->type = Count::f32; return true;
    case RawTensor::f64: count->type = Count::f64; return true;
    case RawTensor::i64: count->type = Count::i64; return true;
    default: return false;
  }
}

void TensorReader::bump_version(PyObject* tensor) const {
  if (abi_) return abi_->bump_version(abi_->record(tensor));
  py::module_::import("torch.autograd.graph").attr("increment_version")(py::handle(tensor));
}

double TensorReader::Count::get() const {
  switch (type) {
    case f32: return *static_cast<const float*>(data);
    case f64: return *static_cast<const double*>(data);
    default: return static_cast<double>(*static_cast<const int64_t*>(data));
  }
}

void TensorReader::Count::increment() const {
  switch (type) {
    case f32: *static_cast<float*>(data) += 1; break;
    case f64: *static_cast<double*>(data) += 1; break;
    default: *static_cast<int64_t*>(data) += 1; break;
  }
}

std::string shape_text(const View& view) {
  std::string text = "(";
  for (int d = 0; d < view.ndim; ++d) {
    text += (d ? ", " : "") + std::to_string(view.shape[d]);
  }
  return text + (view.ndim == 1 ? ",)" : ")");
}

}  // namespace fusedopt
