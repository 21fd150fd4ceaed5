// rules/: what optimizers compute, a few lines each, and their list.
//
// Each is an aggregate of scalars of type T, in the order that the optimizer's _scalars() in Python
// returns them, and is applied as rule(p, g, state): p, g and the kStates states are lanes in
// compute precision. fold(lr, t) sets those that depend on the learning rate and on the number of
// the step, in double, as _scalars() does: for a device that knows both before the host does, and
// on the host for a group that Python has been asked about. What it leaves alone it says by
// constants (streams.h).
// Included inside a back end's namespace.
#pragma once

#include "numeric/average.h"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/ema.h"
#include "rules/lion.h"
#include "rules/lookahead.h"
#include "rules/muon.h"
#include "rules/radam.h"
#include "rules/rmsprop.h"
#include "rules/scale.h"
#include "rules/sgd.h"
#include "rules/streams.h"
#include "rules/traffic.h"

// X(name, Rule, number of bool flags)
#define FUSEDOPT_RULES(X)             \
  X("sgd", Sgd, 1)                    \
  X("sgd_momentum", SgdMomentum, 2)   \
  X("adam", Adam, 2)                  \
  X("rmsprop", RmsProp, 3)            \
  X("adagrad", Adagrad, 1)            \
  X("radam", RAdam, 1)                \
  X("lion", Lion, 0)                  \
  X("muon_momentum", MuonMomentum, 0) \
  X("muon_nesterov", MuonNesterov, 0) \
  X("muon_step", MuonStep, 0)         \
  X("lookahead", Lookahead, 0)        \
  X("ema", Ema, 0)                    \
  X("scale", Scale, 0)                \
  X("traffic", Traffic, 1)

// A table with an entry for every rule and every combination of its flags, in this order:
// Make<Rule in float, Rule in double>::entry(name, flags).
template <template <class, bool...> class Family, size_t kBits, class Flags>
struct Variant;
template <template <class, bool...> class Family, size_t kBits, size_t... kFlag>
struct Variant<Family, kBits, std::index_sequence<kFlag...>> {
  using F32 = Family<float, ((kBits >> kFlag) & 1)...>;
  using F64 = Family<double, ((kBits >> kFlag) & 1)...>;
};

template <class Entry, template <class, class> class Make>
struct RuleTable {
  Entry entries[64];
  int count;

  template <template <class, bool...> class Family, class Flags, size_t... kBits>
  constexpr void add(const char* name, std::index_sequence<kBits...>) {
    ((entries[count++] = Make<typename Variant<Family, kBits, Flags>::F32,
                              typename Variant<Family, kBits, Flags>::F64>::entry(name, kBits)),
     ...);
  }
};

template <class Entry, template <class, class> class Make>
constexpr RuleTable<Entry, Make> make_rule_table() {
  RuleTable<Entry, Make> table{};
#define FUSEDOPT_ADD(name, Family, flags)                      \
  table.template add<Family, std::make_index_sequence<flags>>( \
      name, std::make_index_sequence<1 << flags>());
  FUSEDOPT_RULES(FUSEDOPT_ADD)
#undef FUSEDOPT_ADD
  return table;
}
