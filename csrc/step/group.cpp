#include "step/group.h"

#include <cstring>
#include <map>
#include <stdexcept>

namespace fusedopt {

static std::vector<Follower> followers_of(const py::tuple& following, const Kernels& kernels) {
  std::vector<Follower> followers;
  for (const py::handle each : following) {
    Fields fields(each);
    const Rule& rule = find_rule(kernels, fields.next<std::string>(), 0);
    followers.push_back({&rule, fields.next<py::object>()});
    if (rule.states != 1 || rule.scalars != 1 || followers.size() > size_t{kMaxFollowers}) {
      throw std::logic_error("rule " + std::string(rule.name) + " cannot follow another one here");
    }
  }
  return followers;
}

Settings::Settings(const py::tuple& source, const Kernels& kernels)
    : fields_(source),
      rule_number(static_cast<int>(&find_rule(kernels, rule, flags) - kernels.rules)),
      followers(followers_of(following, kernels)) {
  const Rule& found = kernels.rules[rule_number];
  if (rule_states > kMaxStates || static_cast<int>(rule_states) != found.states) {
    throw std::logic_error("rule " + rule + " has another number of states");
  }
}

// Its learning rate, if that is a number for anyone to read; or null.
static PyObject* plain_lr(const py::dict& group) {
  static PyObject* const key = PyUnicode_InternFromString("lr");
  PyObject* const lr = PyDict_GetItemWithError(group.ptr(), key);
  return lr && PyFloat_Check(lr) ? lr : nullptr;
}

static py::object lr_of(py::handle optimizer, const py::dict& group) {
  PyObject* const lr = plain_lr(group);
  if (lr) return py::reinterpret_borrow<py::object>(lr);
  return optimizer.attr("_engine_lr")(group);
}

static py::object params_of(const py::dict& group) {
  static PyObject* const key = PyUnicode_InternFromString("params");
  const py::object params = group[key];
  return PyList_CheckExact(params.ptr()) ? params : py::tuple(params);
}

Group::Group(const Settings& settings, py::handle optimizer, const py::dict& source, int number,
             bool is_only, const Kernels& kernels)
    : Settings(settings),
      kernel(kernels.rules[rule_number]),
      number(number),
      is_only(is_only),
      lr(lr_of(optimizer, source)),
      optimizer_(optimizer),
      source_(source),
      params_(params_of(source)) {
  if (followers.empty()) return;
  const auto weights = py::cast<py::tuple>(optimizer.attr("_weights_now")(source));
  for (size_t f = 0; f < followers.size(); ++f) weights_[f] = py::cast<double>(weights[f]);
}

std::string Group::name(Py_ssize_t index) const {
  if (!source_.contains("param_names")) return "";
  const py::object names = source_["param_names"];
  if (names.is_none() || index >= static_cast<Py_ssize_t>(py::len(names))) return "";
  return py::cast<std::string>(names[py::int_(index)]);
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

// ---- scalars ------------------------------------------------------------------------------------

static bool same_bits(double a, double b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

// A device folds its own learning rate: any other will do here.
static double number_or_one(const py::object& lr) {
  return PyFloat_Check(lr.ptr()) ? PyFloat_AS_DOUBLE(lr.ptr()) : 1.0;
}

std::vector<double> Group::ask(double t) const {
  py::dict group = source_;
  if (!plain_lr(group)) {
    group = py::reinterpret_steal<py::dict>(PyDict_Copy(source_.ptr()));
    group["lr"] = number_or_one(lr);
  }
  std::vector<double> scalars;
  for (const auto& item : py::cast<py::dict>(optimizer_.attr("_scalars")(group, t))) {
    scalars.push_back(py::cast<double>(item.second));
  }
  if (static_cast<int>(scalars.size()) != kernel.scalars) {
    throw std::logic_error("rule " + rule + " has another number of scalars");
  }
  return scalars;
}

// Python is asked once, and then the rule itself; but Python each time where the two differ.
std::vector<double> Group::scalars(double t) const {
  const double number = number_or_one(lr);
  std::vector<double>* const known = !counts_steps && t == 1 ? &known_->first : &known_->later;
  std::vector<double> scalars = *known;
  if (!known->empty() && fold_rule(rule_number, number, t, &scalars)) return scalars;
  scalars = ask(t);
  *known = scalars;
  const bool agrees = fold_rule(rule_number, number, t, known) &&
                      std::equal(known->begin(), known->end(), scalars.begin(), same_bits);
  if (!agrees) known->clear();
  return scalars;
}

const Folded* Group::fold(double t) {
  if (const Folded* folded = expected(t)) return folded;
  if (!folded_.empty() && folded_.back()->t == t) return folded_.back().get();
  std::shared_ptr<const Folded>& last = known_->last;
  const double number = number_or_one(lr);
  if (!last || last->t != t || !same_bits(last->lr, number)) {
    last = std::make_shared<const Folded>(Folded{number, t, scalars(t)});
  }
  return folded_.emplace_back(last).get();
}

void Group::expect(double t) {
  if (!has_kernel || size() == 0) return;
  try {
    fold(counts_steps ? t : 2);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // a keyboard interrupt
    // Perhaps no parameter of it has a gradient; fold_scalars asks again if one does.
  }
}

// ---- what its optimizer does --------------------------------------------------------------------

void Group::create_state(PyObject* param) const {
  optimizer_.attr("_create_state_in")(source_, py::handle(param));
}

bool Group::leaves_out(size_t follower, PyObject* param) const {
  return py::cast<bool>(optimizer_.attr("_leaves_out")(follower, py::handle(param)));
}

void Group::move_count(PyObject* param, const py::object& steps, bool to_device) const {
  optimizer_.attr("_move_count")(py::handle(param), steps, to_device);
}

int64_t Group::first_element(PyObject* param) const {
  return py::cast<int64_t>(optimizer_.attr("_first_element")(py::handle(param)));
}

}  // namespace fusedopt
