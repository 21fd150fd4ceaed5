// RMSprop (Hinton 2012, lecture 6e), centered as in Graves 2013 (arXiv:1308.0850), with momentum.
// Readable spec: reference() in python/fusedopt/rmsprop.py

template <class T, bool kDecay, bool kCentered, bool kMomentum>
struct RmsProp {
  static constexpr int kStates = 1 + kCentered + kMomentum;
  T weight_decay, alpha, one_minus_alpha, eps, one_minus_momentum, lr;

  FUSEDOPT_FN void fold(double new_lr, double) { lr = new_lr; }

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V g, V* state) const {
    V& v = state[0];
    if constexpr (kDecay) g = g + p * weight_decay;
    v = average_square(v, g, one_minus_alpha);
    V variance = v;
    if constexpr (kCentered) {
      V& mean = state[1];
      variance = centered(mean, v, g);
    }
    V update = g / (sqrt(variance) + eps);
    if constexpr (kMomentum) {
      V& buf = state[1 + kCentered];
      update = buf = accumulate(buf, update, one_minus_momentum);
    }
    p = p - update * lr;
  }

  // v less the square of the mean. Of gradients that hardly vary it is what rounding left of two
  // equal numbers, of either sign; but it is at least what this gradient alone adds to it, and less
  // than T resolves beside the square it need not be.
  template <class V>
  FUSEDOPT_FN V centered(V& mean, V v, V g) const {
    const V deviation = g - mean;
    mean = mean + deviation * one_minus_alpha;
    const V square = min(mean * mean, kLargest<T>);
    const V least = deviation * one_minus_alpha * deviation * alpha;
    return max(v - square, least + square * kEpsilon<T>);
  }
};
