// Adam (Kingma & Ba 2014, arXiv:1412.6980), AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) and
// AMSGrad (Reddi et al. 2018, arXiv:1904.09237). AdamW is the rule with kCoupled = false; without
// coupled decay, decay = lr * weight_decay. Readable spec: reference() in
// python/fusedopt/adam.py

template <class T, bool kCoupled, bool kAmsgrad>
struct Adam {
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  T weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_bias2, eps,
      step_size;

  FUSEDOPT_FN void fold(double lr, double t) {
    decay = kCoupled ? 0 : lr * weight_decay;
    inv_sqrt_bias2 = 1 / sqrt(1 - pow(beta2, t));
    step_size = lr / (1 - pow(beta1, t));
  }

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V* state) const {
    V& m = state[0];
    V& v = state[1];
    if constexpr (kCoupled) g = g + p * weight_decay;
    m = accumulate(m, g * one_minus_beta1, one_minus_beta1);
    v = average_square(v, g, one_minus_beta2);
    V second = v;
    if constexpr (kAmsgrad) second = state[2] = max(state[2], v);
    V update = m * step_size / (sqrt(second) * inv_sqrt_bias2 + eps);
    if constexpr (!kCoupled) update = update + p * decay;
    p = p - update;
  }
};
