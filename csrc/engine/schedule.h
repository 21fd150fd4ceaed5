// How the threads share the work of a step.
#pragma once

#include <atomic>
#include <vector>

#include "engine/job.h"
#include "engine/overlap.h"

namespace fusedopt {

// What is added up for statistics over a block, or over a parameter: squares, and counts. Python
// reads them as a row of as many doubles (fusedopt.statistics).
struct Sums {
  double grad, nonfinite;  // of the gradient as it arrived
  double param, update;    // after the update; and its difference to what was there before
  double unmoved;          // elements; NaN of a parameter in which they are not counted
};

// Of which parameters elements are counted that do not move: of 16 bits, without masters.
constexpr bool counts_unmoved(DType param) {
  return item_size(param) == 2 && second_size(param) == 0;
}

struct Piece {
  const Job* job;
  int64_t first, count;
  int64_t block;  // the number of its first block, counted over all pieces
};

// Small enough to spread a large tensor over all threads, large enough that a call costs nothing.
constexpr int64_t kPieceBytes = 256 * 1024;

// A multiple of the block of a norm, so that blocks begin at the same elements for any piece size.
inline int64_t piece_elements(const Job& job) {
  return kPieceBytes / job.bytes_per_element / kNormBlock * kNormBlock;
}

// All jobs in pieces, and the pieces in consecutive shares of about equal bytes, one a thread: in
// each step a thread finds the same memory in its cache. One that is done with its own share takes
// batches of pieces from the others', whose threads may have been held up.
//
// All that depends on where the jobs lie and how large they are, which is mostly as it was in the
// step before. To find it out anew takes 9 % of a step on many small tensors
// (benchmarks/NOTES.md).
class Schedule {
 public:
  enum Work : uint8_t { kNorm, kUpdates, kNormAndUpdates };

  // For these jobs and at most so many threads; does nothing if it is so already.
  void make(const std::vector<Job>& jobs, int threads, Work work);

  // Whether it was made for what the next make() is given: that vector, with jobs for the same
  // arrays. Whoever changes jobs sets it to false, and back if they turn out to be the same.
  bool fits = false;

  int threads() const { return shares_; }
  // Whether updates go from the last piece of a share to the first, so that they begin with the
  // gradients that the norm has just read.
  bool backwards() const { return backwards_; }
  int64_t bytes() const { return bytes_; }  // of all streams of all jobs

  const std::vector<Piece>& pieces() const { return pieces_; }

  // How many batches of each share have been taken, in one pass over all pieces.
  struct alignas(64) Taken {
    std::atomic<size_t> batches{0};
  };
  // All 0, for a pass that is kNorm or kUpdates.
  std::vector<Taken>* none_taken(Work pass);
  // Of a norm, one for each block.
  std::vector<double>* sums_of_blocks() {
    sums_.resize(static_cast<size_t>(blocks_));
    return &sums_;
  }
  // Of statistics, the same.
  std::vector<Sums>* sums_of_watch() {
    watched_.resize(static_cast<size_t>(blocks_));
    return &watched_;
  }

  // Calls f(begin, end) for batches of pieces that no thread has taken yet, until there are none:
  // those of each share from the first to the last, or backwards.
  template <class F>
  void take_batches(int thread, std::vector<Taken>* taken, bool backwards, F f) const {
    for (int i = 0; i < shares_; ++i) {
      const int share = (thread + i) % shares_;
      const size_t* const begin = batches_.data() + shares_begin_[share];
      const size_t count = shares_begin_[share + 1] - shares_begin_[share];
      for (;;) {
        const size_t number = (*taken)[share].batches.fetch_add(1, std::memory_order_relaxed);
        if (number >= count) break;
        const size_t* const batch = begin + (backwards ? count - 1 - number : number);
        f(pieces_.data() + batch[0], pieces_.data() + batch[1]);
      }
    }
  }

 private:
  void cut(const std::vector<Job>& jobs);

  // What it was made for,
  int most_threads_ = 0;
  Work work_ = kNorm;
  // and what came of it: batch i is pieces [batches_[i], batches_[i + 1]), and share i is batches
  // [shares_begin_[i], shares_begin_[i + 1]).
  int shares_ = 1;
  bool backwards_ = false;
  std::vector<Piece> pieces_;
  std::vector<size_t> batches_, shares_begin_;
  int64_t blocks_ = 0, bytes_ = 0;
  Overlaps overlaps_;
  // Kept for their memory: to find new one, malloc would first go through all that a backward pass
  // has freed, which takes as long as a fifth of a step on many small tensors.
  std::vector<Taken> taken_[2];
  std::vector<double> sums_;
  std::vector<Sums> watched_;
};

}  // namespace fusedopt
