// The scalars of a rule that depend on the learning rate or on the number of the step, by the
// rule's own text.

#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "step/group.h"

#define FUSEDOPT_FN inline

namespace fusedopt {
namespace {

#include "cuda/scalar.h"
#include "rules/list.h"

using Fold = void (*)(double lr, double t, double* scalars);

template <class Rule>
void fold(double lr, double t, double* scalars) {
  Rule rule;
  std::memcpy(&rule, scalars, sizeof(rule));
  rule.fold(lr, t);
  std::memcpy(scalars, &rule, sizeof(rule));
}

template <class F32, class F64>
struct Make {
  static constexpr Fold entry(const char*, int) { return fold<F64>; }
};

constexpr auto kTable = make_rule_table<Fold, Make>();

}  // namespace

bool fold_rule(int rule, double lr, double t, std::vector<double>* scalars) {
  if (!std::isfinite(lr)) return false;  // divided by 0, it raises no flag, but Python does
  constexpr int kErrors = FE_DIVBYZERO | FE_INVALID | FE_OVERFLOW;
  // (To look takes less time than to clear.)
  if (std::fetestexcept(kErrors) != 0) std::feclearexcept(kErrors);
  kTable.entries[rule](lr, t, scalars->data());
  return std::fetestexcept(kErrors) == 0;
}

}  // namespace fusedopt
