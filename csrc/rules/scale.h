// No optimizer: g * factor, which is what clipping in place does to a gradient.

template <class T>
struct Scale {
  static constexpr int kStates = 0;
  static constexpr unsigned kIgnores = 1u << kParam;
  T factor;

  FUSEDOPT_FN void fold(double, double) {}

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V*) const {
    p = g * factor;
  }
};
