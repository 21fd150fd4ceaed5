// What a step does to all gradients before the rules see them, and what their norm decides: the
// same text on the host and, where the host is not to wait for the norm, on a device.
#pragma once

#include "engine/spikes.h"

namespace fusedopt {

// Clipping, the check for non-finite gradients and that for spikes need the 2-norm of all gradients
// times `unscale`; the last one, unless another norm is there for it.
struct Scaling {
  double unscale = 1;      // the gradients are those of a loss times 1 / unscale
  double coefficient = 1;  // one more factor, decided elsewhere
  bool clip = false;       // so that the norm of what the rules see is at most max_norm
  double max_norm = 0;
  bool skip_nonfinite = false;  // no update if the norm is infinite or NaN
  Spikes spikes;                // no update, or a smaller one, if it is one of them
  bool knows_norm = false;      // that of spikes, before it is unscaled
  double known_norm = 0;

  FUSEDOPT_HD bool needs_norm() const {
    return clip || skip_nonfinite || (spikes.norms && !knows_norm);
  }
};

struct Verdict {
  double norm;    // of all gradients, before clipping
  double factor;  // of every gradient
  bool skipped;
  Judgement judgement;  // to be remembered
};

// min(1, max_norm / (norm + 1e-6)), NaN for NaN, as torch.nn.utils.clip_grad_norm_ has it; but 1
// for an infinite max_norm, whatever the norm is: that clips nothing.
FUSEDOPT_HD inline double clip_coefficient(double norm, double max_norm) {
  if (max_norm == HUGE_VAL) return 1;
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1 ? 1 : coefficient;
}

FUSEDOPT_HD inline Verdict decide(const Scaling& scaling, double sum_of_squares) {
  Verdict verdict{};
  verdict.norm = sqrt(sum_of_squares) * scaling.unscale;
  // (NaN minus NaN and infinity minus infinity are NaN.)
  verdict.skipped = scaling.skip_nonfinite && !(verdict.norm - verdict.norm == 0);
  double clip = 1;
  if (scaling.clip) clip = clip_coefficient(verdict.norm * scaling.coefficient, scaling.max_norm);
  if (scaling.spikes.norms && !verdict.skipped) {
    const double norm = scaling.knows_norm ? scaling.known_norm * scaling.unscale : verdict.norm;
    verdict.judgement = judge(scaling.spikes, norm);
    verdict.skipped = verdict.judgement.is_spike && !scaling.spikes.clips;
    if (verdict.judgement.is_spike && scaling.spikes.clips) {
      const double other = clip_coefficient(norm * scaling.coefficient, verdict.judgement.limit);
      clip = other < clip ? other : clip;
    }
  }
  verdict.factor = scaling.unscale * scaling.coefficient * clip;
  return verdict;
}

}  // namespace fusedopt
