// Streams that are stored in more than one tensor: a parameter and what it lacks of its master,
// 8-bit states and their scales; and what random bits come of. As everywhere, once through Python,
// with messages about what does not fit, and once of usual parameters.

#include "step/params.h"

namespace fusedopt {

const PartKeys& part_keys() {
  static const PartKeys keys;
  return keys;
}

static bool has_master(const Group& group, const View& param) {
  return group.has_master && is_half(param.dtype);
}
static bool rounds_at_random(const Group& group, const View& param) {
  return group.rounds_at_random && is_half(param.dtype) && !group.has_master;
}
static bool has_no_sign(const Group& group, size_t s) {
  return PyTuple_GET_ITEM(group.has_no_sign.ptr(), static_cast<Py_ssize_t>(s)) == Py_True;
}
static bool counts_draws(const TensorReader::Count& count) {
  return count.type == TensorReader::Count::i64 && count.device == kHost;
}
static void set_random(View* param) {
  param->dtype = param->dtype == DType::bf16 ? DType::bf16_random : DType::f16_random;
}

// ---- any parameter ------------------------------------------------------------------------------

// In the order in which create_state adds what is missing.
void ParamReader::read_parts(Entry* entry, View* views, Py_ssize_t* cursor) {
  Group& group = *entry->group;
  View& param = views[kParam];
  const auto found = [&](PyObject* key) {
    PyObject* const tensor = find(entry->state, key, cursor);
    if (tensor) held_.push_back(py::reinterpret_borrow<py::object>(tensor));
    entry->lacks_state = entry->lacks_state || !tensor;
    return tensor;
  };
  const auto refuse = [&](PyObject* key, PyObject* tensor, const std::string& expected) {
    throw py::value_error(
        entry->name(py::cast<std::string>(py::handle(key))) + " is " + type_text(tensor) +
        ", expected " + expected +
        "; load a checkpoint of this model, or delete opt.state[p] to start anew");
  };
  // Reads a second tensor and gives it to the first one with `join`.
  const auto join = [&](PyObject* key, const std::string& expected, auto join) {
    PyObject* const tensor = found(key);
    if (!tensor) return;
    View second;
    if (!tensors_.read_stored(tensor, &second, &held_) || !join(second)) {
      refuse(key, tensor, expected);
    }
  };

  const View plain = param;
  bool takes_bits = rounds_at_random(group, param);
  if (has_master(group, param)) {
    const bool split = param.dtype == DType::bf16;
    join(split ? part_keys().remainder : part_keys().master,
         std::string(split ? "an int16" : "a float32") + " tensor of shape " + shape_text(param) +
             " on " + device_text(param.device),
         [&](const View& second) { return join_master(second, &param); });
  }
  for (size_t s = 0; s < group.rule_states; ++s) {
    View& state = views[kFirstState + s];
    if (!state.data && state.numel != 0) continue;  // it is missing itself
    if (!has_blocks(state.dtype)) continue;
    takes_bits = true;
    join(group.scale_key(s),
         "a uint8 tensor of shape (" + std::to_string(plain.ndim ? plain.shape[0] : 0) + ", " +
             std::to_string(rows_of(plain).blocks()) + ") on " + device_text(plain.device),
         [&](const View& scale) {
           return join_scales(has_no_sign(group, s), scale, plain, &state);
         });
  }
  if (!takes_bits) return;
  PyObject* const rounding = found(part_keys().rounding);
  if (!rounding) return;
  entry->parts = &parts_.emplace_back();
  TensorReader::Count* const count = &entry->parts->rounding;
  const bool readable = tensors_.read_count(rounding, count, &held_);
  if (tensors_.emulated()) count->device = entry->device;
  if (!readable || count->type != TensorReader::Count::i64 || count->device != entry->device) {
    refuse(part_keys().rounding, rounding,
           "an int64 tensor on " + device_text(entry->device) + " with one element");
  }
  if (rounds_at_random(group, param)) set_random(&param);
  if (param.is_local_part) {
    entry->parts->first_element = group.first_element(entry->param);
  }
}

// ---- usual ones ---------------------------------------------------------------------------------

// What there is of them, in that order; whether that is all is seen when they are read.
bool ParamReader::find_usual_parts(Entry* entry, Py_ssize_t* cursor) {
  Group& group = *entry->group;
  const auto find = [&](PyObject* key, Record* record) {
    PyObject* const tensor = find_next(entry->state, key, cursor);
    if (!tensor) return true;
    *record = tensors_.abi().record(tensor);
    return tensors_.is_plain(tensor);
  };
  Parts* const parts = entry->parts = &parts_.emplace_back();
  bool all = find(part_keys().remainder, &parts->second_records[kParam]);
  if (!parts->second_records[kParam]) {
    all = all && find(part_keys().master, &parts->second_records[kParam]);
  }
  for (size_t s = 0; all && s < group.rule_states; ++s) {
    all = find(group.scale_key(s), &parts->second_records[kFirstState + s]);
  }
  return all && find(part_keys().rounding, &parts->rounding_record);
}

bool ParamReader::read_usual_parts(Entry* entry, View* views) const {
  Group& group = *entry->group;
  View& param = views[kParam];
  const View plain = param;
  const auto read = [&](int s, View* second) {
    const Record record = entry->parts->second_records[s];
    return record && tensors_.read_stored(record, second);
  };
  View second;
  bool takes_bits = rounds_at_random(group, param);
  if (has_master(group, param) && (!read(kParam, &second) || !join_master(second, &param))) {
    return false;
  }
  for (size_t s = 0; s < group.rule_states; ++s) {
    View& state = views[kFirstState + s];
    if (!has_blocks(state.dtype)) continue;
    takes_bits = true;
    if (!read(static_cast<int>(kFirstState + s), &second) ||
        !join_scales(has_no_sign(group, s), second, plain, &state)) {
      return false;
    }
  }
  if (!takes_bits) return param.contiguous;
  const Record record = entry->parts->rounding_record;
  TensorReader::Count* const count = &entry->parts->rounding;
  if (!record || !tensors_.read_count(record, count) || !counts_draws(*count)) {
    return false;
  }
  if (rounds_at_random(group, param)) set_random(&param);
  return param.contiguous;
}

}  // namespace fusedopt
