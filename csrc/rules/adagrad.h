// Adagrad (Duchi et al. 2011, JMLR 12:2121). step_size = lr / (1 + (t - 1) * lr_decay). Readable
// spec: reference() in python/fusedopt/adagrad.py

template <class T, bool kDecay>
struct Adagrad {
  static constexpr int kStates = 1;
  T weight_decay, eps, lr_decay, step_size;

  FUSEDOPT_FN void fold(double lr, double t) { step_size = lr / (1 + (t - 1) * lr_decay); }

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V* state) const {
    V& sum = state[0];
    if constexpr (kDecay) g = g + p * weight_decay;
    sum = sum + g * g;
    p = p - g / (sqrt(sum) + eps) * step_size;
  }
};
