// The moving average of the weights (Polyak & Juditsky 1992, doi:10.1137/0330046), which leaves
// them as they are. Runs after another rule, without a gradient. Readable spec: reference() in
// python/fusedopt/ema.py

// weight = 1 - the decay of this step.
template <class T>
struct Ema {
  static constexpr int kStates = 1;
  static constexpr unsigned kKeeps = 1u << kParam, kIgnores = 1u << kGrad;
  T weight;

  FUSEDOPT_FN void fold(double, double) {}

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V, V* state) const {
    V& average = state[0];
    average = accumulate(average, p * weight, weight);
  }
};
