// Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), which orthogonalizes matrices
// between these rules: the momentum; what is to be orthogonalized, with Nesterov's look ahead; and
// the step, whose gradient is what came of it. Readable spec: reference() in
// python/fusedopt/muon.py

// forget = 1 - momentum.
template <class T>
struct MuonMomentum {
  static constexpr int kStates = 1;
  static constexpr unsigned kKeeps = 1u << kParam, kIgnores = 1u << kParam;
  T forget;

  FUSEDOPT_FN void fold(double, double) {}

  template <class V>
  FUSEDOPT_FN void operator()(V&, V g, V* state) const {
    V& buf = state[0];
    buf = accumulate(buf, g * forget, forget);
  }
};

// The momentum once more, for the place where it is to be orthogonalized. factor is that of the
// gradients of the step.
template <class T>
struct MuonNesterov {
  static constexpr int kStates = 1;
  static constexpr unsigned kKeeps = 1u << kFirstState, kIgnores = 1u << kParam;
  T factor, forget;

  FUSEDOPT_FN void fold(double, double) {}

  template <class V>
  FUSEDOPT_FN void operator()(V& update, V g, V* state) const {
    update = accumulate(state[0], g * factor * forget, forget);
  }
};

// decay = lr * weight_decay, step_size = lr * ratio, which depends on the matrix's shape.
template <class T>
struct MuonStep {
  static constexpr int kStates = 0;
  T weight_decay, ratio, decay, step_size;

  FUSEDOPT_FN void fold(double lr, double) {
    decay = lr * weight_decay;
    step_size = lr * ratio;
  }

  template <class V>
  FUSEDOPT_FN void operator()(V& p, V orthogonal, V*) const {
    p = p - (orthogonal * step_size + p * decay);
  }
};
