// Stochastic gradient descent, with heavy-ball (Polyak 1964) or Nesterov momentum in the form of
// Sutskever et al. 2013. Readable spec: reference() in python/fusedopt/sgd.py

template <class T, bool kDecay>
struct Sgd {
  static constexpr int kStates = 0;
  T weight_decay, lr;

  FUSEDOPT_FN void fold(double new_lr, double) { lr = new_lr; }

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V*) const {
    if constexpr (kDecay) g = g + p * weight_decay;
    p = p - g * lr;
  }
};

// forget = 1 - momentum; a parameter's first step has forget = 1 and grad_weight = 1: its zero
// buffer becomes g.
template <class T, bool kDecay, bool kNesterov>
struct SgdMomentum {
  static constexpr int kStates = 1;
  T weight_decay, forget, grad_weight, momentum, lr;

  FUSEDOPT_FN void fold(double new_lr, double) { lr = new_lr; }

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V* state) const {
    V& buf = state[0];
    if constexpr (kDecay) g = g + p * weight_decay;
    buf = accumulate(buf, g * grad_weight, forget);
    if constexpr (kNesterov) {
      g = g + buf * momentum;
    } else {
      g = buf;
    }
    p = p - g * lr;
  }
};
