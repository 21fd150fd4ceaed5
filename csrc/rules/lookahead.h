// Lookahead (Zhang et al. 2019, arXiv:1907.08610): the slow weights follow the fast ones, which
// then start anew from there. Runs after another rule, without a gradient. Readable spec:
// reference() in python/fusedopt/lookahead.py

template <class T>
struct Lookahead {
  static constexpr int kStates = 1;
  static constexpr unsigned kIgnores = 1u << kGrad;
  T alpha;

  FUSEDOPT_FN void fold(double, double) {}

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V, V* state) const {
    V& slow = state[0];
    slow = accumulate(slow, p * alpha, alpha);
    p = slow;
  }
};
