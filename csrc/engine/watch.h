// What a step adds up for statistics: of each parameter, its gradient and how far it has moved.
#pragma once

#include <vector>

#include "engine/schedule.h"

namespace fusedopt {

// What becomes of the parameter in one block, as its elements are updated from the first to the
// last.
class BlockChange {
 public:
  BlockChange(const Kernels& kernels, const Job& job) : kernels_(kernels), job_(job) {}

  // Around the update of elements [first, first + count), of which there are kNormBlock + kBlock at
  // most, and a multiple of kChangeLanes unless they are the last.
  void before(int64_t first, int64_t count);
  void after(int64_t first, int64_t count);

  // What adds up the change itself, does it here.
  ChangeLanes* lanes() { return &lanes_; }

  // Sets param, update and unmoved.
  void write_to(Sums* sums) const;

 private:
  static constexpr int64_t kMost = kNormBlock + kBlock;
  Stream elements(int64_t* first, int64_t count);

  const Kernels& kernels_;
  const Job& job_;
  ChangeLanes lanes_{};
  alignas(64) char before_[kMost * sizeof(double)];
  alignas(64) char gathered_[2][kMost * sizeof(double)];  // of a job with a layout
};

// Whether an update adds up what it changes: of arrays of floats.
bool adds_itself(const Job& job);

// How many elements of a job are updated before their change is added up: so few that they are
// still in the first-level cache, and memory keeps coming meanwhile; or all of a block.
int64_t elements_between_sums(const Job& job);

// Whether a sum of squares tells that there may be infinite elements or NaN among them, and how
// many there are in elements [first, first + count) of the gradient.
inline bool is_nonfinite(double sum) { return !(sum - sum == 0); }
int64_t count_nonfinite(const Job& job, int64_t first, int64_t count);

// What is added up over a row of blocks, `stride` doubles apart, in the order of all norms.
double join_blocks(Norm norm, const double* blocks, int64_t count, int64_t stride = 1);

// What a step adds up in the blocks of its schedule.
struct Watch {
  const Kernels* kernels;
  bool knows_gradients;  // their sums of squares have been added up before
  std::vector<Sums>* blocks;

  // Joins the blocks of each job: one thread, afterwards.
  void join(const std::vector<Job>& jobs, Sums* sums) const;
};

}  // namespace fusedopt
