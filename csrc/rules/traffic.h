// No optimizer: the memory traffic of Adam with next to no arithmetic, which benchmarks take for
// the limit of a step.

template <class T>
struct Traffic {
  static constexpr int kStates = 2;
  T weight;

  FUSEDOPT_FN void fold(double, double) {}

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V* state) const {
    g = g * weight;
    p = p + g;
    state[0] = state[0] + g;
    state[1] = state[1] + g;
  }
};
