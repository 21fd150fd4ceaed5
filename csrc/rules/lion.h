// Lion (Chen et al. 2023, arXiv:2302.06675). decay = lr * weight_decay. Readable spec:
// reference() in python/fusedopt/lion.py

template <class T>
struct Lion {
  static constexpr int kStates = 1;
  T weight_decay, decay, one_minus_beta1, one_minus_beta2, lr;

  FUSEDOPT_FN void fold(double new_lr, double) {
    decay = new_lr * weight_decay;
    lr = new_lr;
  }

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V* state) const {
    V& m = state[0];
    const V c = accumulate(m, g * one_minus_beta1, one_minus_beta1);
    p = p - (sign(c) * lr + p * decay);
    m = accumulate(m, g * one_minus_beta2, one_minus_beta2);
  }
};
