#include "step/group.h"

#include <map>
#include <stdexcept>

namespace fusedopt {

Group::Group(py::handle source, int number, bool is_only, const Kernels& kernels)
    : fields_(source), number(number), is_only(is_only), kernels_(kernels) {
  if (rule_states > kMaxStates) throw std::logic_error("rule " + rule + ": raise kMaxStates");
}

PyObject* Group::scale_key(size_t s) {
  static std::map<std::string, PyObject*> keys;
  if (!scale_keys_[s]) {
    const auto name = py::cast<std::string>(state(s)) + "_scale";
    PyObject*& key = keys[name];
    if (!key) key = PyUnicode_InternFromString(name.c_str());
    scale_keys_[s] = key;
  }
  return scale_keys_[s];
}

const Folded* Group::fold(double t) {
  if (const Folded* folded = expected(t)) return folded;
  if (!folded_.empty() && folded_.back().t == t) return &folded_.back();
  Folded folded{t, find_rule(kernels_, rule, flags), {}};
  for (const auto& item : py::cast<py::dict>(fold_in_step(t))) {
    folded.scalars.push_back(py::cast<double>(item.second));
  }
  if (static_cast<int>(rule_states) != folded.rule.states) {
    throw std::logic_error("rule " + rule + " has another number of states");
  }
  if (static_cast<int>(folded.scalars.size()) != folded.rule.scalars) {
    throw std::logic_error("rule " + rule + " has another number of scalars");
  }
  return &folded_.emplace_back(std::move(folded));
}

void Group::expect(double t) {
  if (!has_kernel || params.empty()) return;
  try {
    fold(counts_steps ? t : 2);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // a keyboard interrupt
    // Perhaps no parameter of it has a gradient; fold_scalars asks again if one does.
  }
}

}  // namespace fusedopt
