#include "tensors.h"

#include <cstring>

namespace fusedopt {

// ---- the DLPack structs that are needed (dlpack.h, version 1) -----------------------------------

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
static_assert(sizeof(DLTensor) == 48 && offsetof(DLTensor, shape) == 24, "DLPack 1.x layout");

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void *allocate, *managed_from_py_object, *managed_to_py_object;
  int (*from_py_object)(void* object, DLTensor* out);  // borrows; valid while the object lives
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};
static_assert(sizeof(DLPackExchangeAPI) == 56, "DLPack 1.x layout");

enum { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3 };
enum { kDLInt = 0, kDLFloat = 2, kDLBfloat = 4 };

TensorReader::TensorReader(bool fast, bool (*runs_on)(int device), bool emulated)
    : runs_on_(runs_on), emulated_(emulated) {
  const auto torch = py::module_::import("torch");
  tensor_ = torch.attr("Tensor");
  parameter_ = torch.attr("nn").attr("Parameter");
  grad_ = tensor_.attr("grad");
  if (!fast || !py::hasattr(tensor_, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor_.attr("__dlpack_c_exchange_api__");
  auto* api =
      static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  while (api && api->major != 1) api = api->previous;
  if (!api) return;
  from_py_object_ = api->from_py_object;
  current_work_stream_ = api->current_work_stream;
}

void* TensorReader::current_stream(int device) const {
  void* stream = nullptr;
  if (emulated_) return stream;
  if (current_work_stream_) {
    if (current_work_stream_(kDLCUDA, device, &stream)) throw py::error_already_set();
    return stream;
  }
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

bool TensorReader::read_dltensor(PyObject* object, DLTensor* tensor, Held* held) const {
  if (!from_py_object_) return read_attributes(object, tensor, held);
  if (from_py_object_(object, tensor) == 0) return true;
  PyErr_Clear();
  return false;
}

// The same through Python, several times slower.
bool TensorReader::read_attributes(PyObject* object, DLTensor* tensor, Held* held) const try {
  const auto self = py::reinterpret_borrow<py::object>(object);
  const auto dtype = py::cast<std::string>(py::str(self.attr("dtype")));
  *tensor = {};
  tensor->type_lanes = 1;
  tensor->type_code = dtype == "torch.bfloat16" ? kDLBfloat
                      : dtype == "torch.int64"  ? kDLInt
                                                : kDLFloat;
  tensor->type_bits = static_cast<uint8_t>(py::cast<int>(self.attr("element_size")()) * 8);
  const bool known = dtype == "torch.float32" || dtype == "torch.float64" ||
                     dtype == "torch.float16" || dtype == "torch.bfloat16" ||
                     dtype == "torch.int64";
  const auto device = self.attr("device");
  const auto device_type = py::cast<std::string>(device.attr("type"));
  if (!known || py::cast<std::string>(self.attr("layout").attr("__str__")()) != "torch.strided" ||
      (device_type != "cpu" && device_type != "cuda")) {
    return false;
  }
  tensor->device_type = device_type == "cpu" ? kDLCPU : kDLCUDA;
  tensor->device_id = device_type == "cpu" ? 0 : py::cast<int32_t>(device.attr("index"));
  tensor->data = reinterpret_cast<void*>(py::cast<uintptr_t>(self.attr("data_ptr")()));
  const auto shape = py::cast<py::tuple>(self.attr("shape"));
  const auto strides = py::cast<py::tuple>(self.attr("stride")());
  tensor->ndim = static_cast<int32_t>(shape.size());
  py::bytes buffer(std::string(2 * sizeof(int64_t) * shape.size() + 1, 0));
  held->push_back(buffer);
  tensor->shape = reinterpret_cast<int64_t*>(PyBytes_AS_STRING(buffer.ptr()));
  tensor->strides = tensor->shape + shape.size();
  for (size_t d = 0; d < shape.size(); ++d) {
    tensor->shape[d] = py::cast<int64_t>(shape[d]);
    tensor->strides[d] = py::cast<int64_t>(strides[d]);
  }
  return true;
} catch (const py::error_already_set&) {
  return false;
}

static char* data_of(const DLTensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

// False if nothing here can be done there.
bool TensorReader::find_device(const DLTensor& tensor, int* device) const {
  const bool on_cpu = tensor.device_type == kDLCPU || tensor.device_type == kDLCUDAHost;
  *device = on_cpu ? (emulated_ ? 0 : kHost) : tensor.device_id;
  return on_cpu || (tensor.device_type == kDLCUDA && has_kernels(tensor.device_id));
}

bool TensorReader::has_kernels(int device) const {
  if (!runs_on_) return false;
  const auto [at, is_new] = has_kernels_.try_emplace(device, false);
  if (is_new) at->second = runs_on_(device);
  return at->second;
}

// A fake tensor and a wrapper have none.
static bool has_memory(const DLTensor& tensor, int64_t numel) {
  return numel == 0 || tensor.data != nullptr;
}

bool TensorReader::read(PyObject* object, View* view, Held* held) const {
  DLTensor tensor;
  PyObject* const local = local_part(object, held);
  if (!local || !read_dltensor(local, &tensor, held)) return false;
  if (!find_device(tensor, &view->device) || tensor.type_lanes != 1) return false;
  const int bits = tensor.type_bits;
  if (tensor.type_code == kDLFloat && (bits == 16 || bits == 32 || bits == 64)) {
    view->dtype = bits == 32 ? DType::f32 : bits == 64 ? DType::f64 : DType::f16;
  } else if (tensor.type_code == kDLBfloat && bits == 16) {
    view->dtype = DType::bf16;
  } else {
    return false;
  }
  view->data = data_of(tensor);
  view->ndim = tensor.ndim;
  view->shape = tensor.shape;
  view->strides = tensor.strides;
  view->contiguous = true;
  view->numel = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    view->contiguous = view->contiguous && tensor.strides[d] == view->numel;
    view->numel *= tensor.shape[d];
  }
  view->is_local_part = local != object;
  return has_memory(tensor, view->numel);
}

bool TensorReader::read_count(PyObject* object, Count* count, Held* held) const {
  DLTensor tensor;
  PyObject* const local = local_part(object, held);
  if (!local || !read_dltensor(local, &tensor, held)) return false;
  if (!find_device(tensor, &count->device)) return false;
  if (emulated_) count->device = kHost;
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] != 1) return false;
  }
  if (!has_memory(tensor, 1)) return false;
  count->data = data_of(tensor);
  if (tensor.type_code == kDLFloat && tensor.type_bits == 32) {
    count->type = Count::f32;
  } else if (tensor.type_code == kDLFloat && tensor.type_bits == 64) {
    count->type = Count::f64;
  } else if (tensor.type_code == kDLInt && tensor.type_bits == 64) {
    count->type = Count::i64;
  } else {
    return false;
  }
  return true;
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
