// Parameters and gradients: what the objects are, and whether they fit together.

#include "step/params.h"

#include "step/device_queue.h"

namespace fusedopt {

// ---- messages -----------------------------------------------------------------------------------

std::string type_text(PyObject* object) {
  const auto self = py::reinterpret_borrow<py::object>(object);
  const auto text = [&](const char* attribute) {
    return py::cast<std::string>(py::str(self.attr(attribute)));
  };
  if (!py::hasattr(self, "layout") || !py::hasattr(self, "device")) {
    return py::cast<std::string>(py::repr(self));
  }
  // A class of its own may hold its elements in another way than these words say.
  const auto type = py::str(py::type::of(self).attr("__name__"));
  const std::string name = py::cast<std::string>(type);
  const std::string kind = name == "Tensor" || name == "Parameter" ? "tensor" : name;
  return "a " + text("layout") + " " + kind + " of " + text("dtype") + " and " + text("shape") +
         " on " + text("device");
}

std::string Entry::name(const std::string& what) const {
  std::string text = what + (what.empty() ? "" : " of ") + "params[" + std::to_string(index) + "]";
  const std::string name = group->name(index);
  if (!name.empty()) text += " ('" + name + "')";
  if (!group->is_only) text += " of group " + std::to_string(group->number);
  return text;
}

// ---- reading ------------------------------------------------------------------------------------

View ParamReader::read_held(const py::object& tensor) {
  View view;
  held_.push_back(tensor);
  tensors_.read(tensor.ptr(), &view, &held_);
  return view;
}

void ParamReader::replace_gradient(Entry* entry, const py::object& grad, View* view) {
  entry->grad = grad.ptr();
  *view = read_held(grad);
}

bool ParamReader::read(Entry* entry, View* views) {
  held_.push_back(tensors_.grad(entry->param));
  if (held_.back().is_none()) return false;
  entry->grad = held_.back().ptr();

  View &p = views[kParam], &g = views[kGrad];
  PyObject* grad = entry->grad;  // that of the parameter, whatever is done with it below
  const auto leave_to_torch = [&] {
    unsupported_.append(py::make_tuple(entry->group->number, py::handle(entry->param)));
    outside_.append(py::handle(grad));
    return false;
  };
  if (!entry->group->has_kernel || !tensors_.read(entry->param, &p, &held_) ||
      !tensors_.read(entry->grad, &g, &held_) || p.device != g.device || p.negated) {
    return leave_to_torch();
  }
  entry->device = p.device;
  if (p.device != kHost) uses_devices_ = true;
  if (g.negated) replace_gradient(entry, py::handle(entry->grad).attr("resolve_neg")(), &g);
  if (fault_of(p, g) == Fault::shape) {
    throw py::value_error(entry->name("grad") + " has shape " + shape_text(g) + ", expected " +
                          shape_text(p) + "; call zero_grad() and compute it again");
  }
  if (fault_of(p, p) == Fault::overlaps_itself) {
    throw py::value_error(entry->name("") +
                          " is a view in which elements share memory; expected every element in a "
                          "place of its own; pass a clone() of it");
  }
  if (!read_states(entry, views)) return leave_to_torch();
  separate_streams(entry, views);
  grad = entry->grad;
  if (p.device != kHost && !fit_gradient(entry, p, &g)) return leave_to_torch();
  entry->sums_elsewhere = g.is_local_part;
  if (g.is_local_part) outside_.append(py::handle(grad));
  return true;
}

// Elements are read a register or a tile at a time: where something is written that another stream
// has elsewhere, the numbers would depend on how many those are. A gradient is copied then, and two
// that are written are an error.
void ParamReader::separate_streams(Entry* entry, View* views) {
  const Group& group = *entry->group;
  const int streams = kFirstState + static_cast<int>(group.rule_states + group.followers.size());
  if (!any_come_close(views, streams)) return;
  const auto name_of = [&](int s) {
    return s == kParam ? std::string("the parameter")
                       : py::cast<std::string>(group.state(static_cast<size_t>(s - kFirstState)));
  };
  for (int s = 0; s < streams; ++s) {
    if (s == kGrad) continue;
    if (overlap_out_of_step(views[s], views[kGrad])) {
      replace_gradient(entry, py::handle(entry->grad).attr("clone")(), &views[kGrad]);
    }
    for (int other = 0; other < s; ++other) {
      if (other == kGrad || !overlap(views[s], views[other])) continue;
      throw py::value_error(entry->name(name_of(s)) + " shares memory with " + name_of(other) +
                            "; expected memory of its own; store a clone() of it");
    }
  }
}

// On a device, all streams are walked as arrays in the parameter's order, and for the norm the
// gradient in its own, as on the CPU: one that cannot be is copied. False if not even the parameter
// can.
bool ParamReader::fit_gradient(Entry* entry, const View& param, View* grad) {
  if (!common_layout(&param, 1).empty()) return false;
  if (!grad->is_local_part && !common_layout(grad, 1).empty()) {
    const py::object array = device_memory().attr("without_gaps")(py::handle(entry->grad));
    replace_gradient(entry, array, grad);
  }
  entry->norm_item = {grad->data, grad->numel, 0, grad->dtype};
  const View views[] = {param, *grad};
  const bool fits = have_one_precision(param, *grad);
  if (!fits || !common_layout(views, 2).empty()) {
    const auto torch = py::module_::import("torch");
    const bool wide = param.dtype == DType::f64;
    const py::object copy =
        torch.attr("empty_like")(py::handle(entry->param),
                                 py::arg("dtype") = fits ? py::handle(entry->grad).attr("dtype")
                                                         : torch.attr(wide ? "float64" : "float32"),
                                 py::arg("requires_grad") = false);
    copy.attr("copy_")(py::handle(entry->grad).attr("detach")());
    replace_gradient(entry, copy, grad);
  }
  return true;
}

}  // namespace fusedopt
