// Norms and updates of jobs. Each function is one parallel region, of at most so many threads; the
// results do not depend on how many there are.
#pragma once

#include "engine/schedule.h"
#include "engine/verdict.h"

namespace fusedopt {

// What the norm adds up over the gradients of all jobs.
double run_norm(const Kernels& kernels, Norm norm, const std::vector<Job>& jobs, int threads);
// All updates, of gradients times `factor`.
void run_updates(const std::vector<Job>& jobs, int threads, double factor);
// The 2-norm, if that is needed, then, unless it is to be skipped, all updates. `schedule`, never
// null, is kept from step to step. The judgement is yet to be remembered.
Verdict run(const Kernels& kernels, const std::vector<Job>& jobs, int threads,
            const Scaling& scaling, Schedule* schedule);

}  // namespace fusedopt
