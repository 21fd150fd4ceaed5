// No optimizer: the memory traffic of one with one state or two, and next to no arithmetic, which
// benchmarks take for the limit of a step.

template <class T, bool one_state>
struct Traffic {
  static constexpr int kStates = one_state ? 1 : 2;
  T weight;

  FUSEDOPT_FN void fold(double, double) {}

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V* state) const {
    g = g * weight;
    p = p + g;
    for (int s = 0; s < kStates; ++s) state[s] = state[s] + g;
  }
};
