// Which streams a rule leaves alone, as it says by constants of its own, bit s for stream s: those
// of kKeeps it does not change, and nothing is stored there; those of kIgnores it does not look at,
// and nothing is loaded from there. Included inside a back end's namespace.
#pragma once

template <class Rule, class = void>
struct Keeps {
  static constexpr unsigned value = 0;
};
template <class Rule>
struct Keeps<Rule, std::void_t<decltype(Rule::kKeeps)>> {
  static constexpr unsigned value = Rule::kKeeps;
};

template <class Rule, class = void>
struct Ignores {
  static constexpr unsigned value = 0;
};
template <class Rule>
struct Ignores<Rule, std::void_t<decltype(Rule::kIgnores)>> {
  static constexpr unsigned value = Rule::kIgnores;
};

template <class Rule>
constexpr unsigned kKept = Keeps<Rule>::value | 1u << kGrad;
template <class Rule>
constexpr unsigned kIgnored = Ignores<Rule>::value;

template <class Rule>
FUSEDOPT_FN constexpr bool stores(int stream) {
  return !(kKept<Rule> >> stream & 1);
}
template <class Rule>
FUSEDOPT_FN constexpr bool loads(int stream) {
  return !(kIgnored<Rule> >> stream & 1);
}
template <class Rule>
FUSEDOPT_FN constexpr bool touches(int stream) {
  return loads<Rule>(stream) || stores<Rule>(stream);
}
