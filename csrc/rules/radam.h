// Rectified Adam (Liu et al. 2019, arXiv:1908.03265). Until `rectified` is 1, sqrt(v) means nothing
// yet, and nothing is divided by it. Without coupled decay, decay = lr * weight_decay;
// step_size has the bias corrections and the rectification. Readable spec: reference() in
// python/fusedopt/radam.py

template <class T, bool kCoupled>
struct RAdam {
  static constexpr int kStates = 2;
  T weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, rectified;

  FUSEDOPT_FN void fold(double lr, double t) {
    decay = kCoupled ? 0 : lr * weight_decay;
    step_size = lr / (1 - pow(beta1, t));
    const double rho_inf = 2 / (1 - beta2) - 1;
    const double rho = rho_inf - 2 * t * pow(beta2, t) / (1 - pow(beta2, t));
    rectified = rho > 5;
    if (rho > 5) {
      step_size *= sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) *
                   sqrt(1 - pow(beta2, t));
    }
  }

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V* state) const {
    V& m = state[0];
    V& v = state[1];
    if constexpr (kCoupled) g = g + p * weight_decay;
    m = accumulate(m, g * one_minus_beta1, one_minus_beta1);
    v = average_square(v, g, one_minus_beta2);
    V update = m * step_size;
    if (rectified != 0) update = update / (sqrt(v) + eps);  // the same for all elements of a step
    if constexpr (!kCoupled) update = update + p * decay;
    p = p - update;
  }
};
