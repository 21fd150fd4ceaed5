// How the threads share the work of a step.
#pragma once

#include "engine.h"
#include "overlap.h"

namespace fusedopt {

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

// All jobs in pieces, and the pieces in consecutive shares of about equal bytes, one a thread. That
// depends on where the jobs lie and how large they are, which is mostly as it was in the step
// before. To find it out anew takes a twentieth of a step on many small tensors.
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
  int64_t blocks() const { return blocks_; }  // of a norm, over all pieces
  int64_t bytes() const { return bytes_; }    // of all streams of all jobs

  // Calls f(begin, end) for the pieces of this thread, of so many: of every share that is its own.
  template <class F>
  void for_each_share(int thread, int threads, F f) const {
    for (int share = thread; share < shares_; share += threads) {
      f(pieces_.data() + begin_[share], pieces_.data() + begin_[share + 1]);
    }
  }

 private:
  void cut(const std::vector<Job>& jobs);

  // What it was made for,
  int most_threads_ = 0;
  Work work_ = kNorm;
  // and what came of it: share i is pieces [begin_[i], begin_[i + 1]).
  int shares_ = 1;
  bool backwards_ = false;
  std::vector<Piece> pieces_;
  std::vector<size_t> begin_;
  int64_t blocks_ = 0, bytes_ = 0;
  Overlaps overlaps_;
};

}  // namespace fusedopt
