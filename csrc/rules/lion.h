// Lion (Chen et al. 2023, arXiv:2302.06675). decay = 1 - lr * weight_decay. Readable spec:
// reference() in python/fusedopt/lion.py

template <class T>
struct Lion {
  static constexpr int kStates = 1;
  T weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr;

  FUSEDOPT_FN void fold(double new_lr, double) {
    decay = 1 - new_lr * weight_decay;
    lr = new_lr;
  }

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V* state) const {
    V& m = state[0];
    p = p * decay - sign(m * beta1 + g * one_minus_beta1) * lr;
    m = m * beta2 + g * one_minus_beta2;
  }
};
