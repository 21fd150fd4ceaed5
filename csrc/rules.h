// The list of rules. Each is an aggregate of scalars of type T, in the order that the optimizer's
// _scalars() in Python returns them, and is applied as rule(p, g, state): p, g and the kStates
// states are lanes in compute precision. fold(lr, t) sets those that depend on the learning rate
// and on the number of the step, in double, as _scalars() does: for a device that knows both before
// the host does. Included inside a back end's namespace.

#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/lion.h"
#include "rules/lookahead.h"
#include "rules/radam.h"
#include "rules/rmsprop.h"
#include "rules/scale.h"
#include "rules/sgd.h"
#include "rules/traffic.h"

// X(name, Rule, number of bool flags)
#define FUSEDOPT_RULES(X)           \
  X("sgd", Sgd, 1)                  \
  X("sgd_momentum", SgdMomentum, 2) \
  X("adam", Adam, 2)                \
  X("rmsprop", RmsProp, 3)          \
  X("adagrad", Adagrad, 1)          \
  X("radam", RAdam, 1)              \
  X("lion", Lion, 0)                \
  X("lookahead", Lookahead, 0)      \
  X("scale", Scale, 0)              \
  X("traffic", Traffic, 0)
