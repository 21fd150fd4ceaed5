// RMSprop (Hinton 2012, lecture 6e), centered as in Graves 2013 (arXiv:1308.0850), with momentum.
// Readable spec: reference() in python/fusedopt/rmsprop.py

template <class T, bool kDecay, bool kCentered, bool kMomentum>
struct RmsProp {
  static constexpr int kStates = 1 + kCentered + kMomentum;
  T weight_decay, alpha, one_minus_alpha, eps, momentum, lr;

  FUSEDOPT_FN void fold(double new_lr, double) { lr = new_lr; }

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V* state) const {
    V& v = state[0];
    if constexpr (kDecay) g = g + p * weight_decay;
    v = v * alpha + (g * g) * one_minus_alpha;
    V variance = v;
    if constexpr (kCentered) {
      V& mean = state[1];
      mean = mean * alpha + g * one_minus_alpha;
      variance = v - mean * mean;
    }
    V update = g / (sqrt(variance) + eps);
    if constexpr (kMomentum) {
      V& buf = state[1 + kCentered];
      update = buf = buf * momentum + update;
    }
    p = p - update * lr;
  }
};
