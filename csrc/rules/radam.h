// Rectified Adam (Liu et al. 2019, arXiv:1908.03265). kRectified depends on the step: before
// sqrt(v) means anything, nothing is divided by it. Without coupled decay,
// decay = 1 - lr * weight_decay; step_size has the bias corrections and, with kRectified, the
// rectification. Readable spec: reference() in python/fusedopt/radam.py

template <class T, bool kCoupled, bool kRectified>
struct RAdam {
  static constexpr int kStates = 2;
  T weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size;

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V* state) const {
    V& m = state[0];
    V& v = state[1];
    if constexpr (kCoupled) {
      g = g + p * weight_decay;
    } else {
      p = p * decay;
    }
    m = m * beta1 + g * one_minus_beta1;
    v = v * beta2 + (g * g) * one_minus_beta2;
    V update = m * step_size;
    if constexpr (kRectified) update = update / (sqrt(v) + eps);
    p = p - update;
  }
};
