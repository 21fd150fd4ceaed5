#include "engine/schedule.h"

#include "engine/parallel.h"

namespace fusedopt {

// Whether the work is worth waking other threads for.
static bool is_large(const std::vector<Job>& jobs) {
  // That takes a few microseconds, the time of about this many bytes;
  constexpr int64_t kSmallBytes = 128 * 1024;
  // and to make sure that jobs do not overlap, the time of about this many a job.
  constexpr int64_t kSmallBytesOfJob = 2 * 1024;
  int64_t left = -kSmallBytes;
  for (const Job& job : jobs) left += job.numel * job.bytes_per_element - kSmallBytesOfJob;
  return left > 0;
}

void Schedule::make(const std::vector<Job>& jobs, int threads, Work work) {
  threads = possible_threads(threads);
  if (fits && most_threads_ == threads && work_ == work) return;
  fits = false;  // whatever fails below
  most_threads_ = threads;
  work_ = work;
  const bool large = is_large(jobs);
  shares_ = large ? threads : 1;
  backwards_ = large && work == kNormAndUpdates;
  // In their order, jobs may overlap: one thread then steps one parameter after the other.
  if (work != kNorm && (shares_ > 1 || backwards_) && overlaps_.any(jobs)) {
    shares_ = 1;
    backwards_ = false;
  }
  cut(jobs);
  fits = true;
}

void Schedule::cut(const std::vector<Job>& jobs) {
  pieces_.clear();
  pieces_.reserve(jobs.size());
  blocks_ = bytes_ = 0;
  for (const Job& job : jobs) {
    const int64_t length = piece_elements(job);
    for (int64_t first = 0; first < job.numel; first += length) {
      const int64_t count = job.numel - first < length ? job.numel - first : length;
      pieces_.push_back({&job, first, count, blocks_});
      blocks_ += (count + kNormBlock - 1) / kNormBlock;
    }
    bytes_ += job.numel * job.bytes_per_element;
  }
  // A batch begins where the last one has as many bytes as a piece may, or a share begins; and that
  // does with the piece that begins in its equal part of the bytes.
  batches_.clear();
  shares_begin_.clear();
  int64_t before = 0, batch_end = 0;
  for (size_t i = 0; i < pieces_.size(); ++i) {
    bool begins = before >= batch_end;
    while (before >= bytes_ / shares_ * static_cast<int64_t>(shares_begin_.size()) &&
           shares_begin_.size() < static_cast<size_t>(shares_)) {
      shares_begin_.push_back(batches_.size());
      begins = true;
    }
    if (begins) {
      batches_.push_back(i);
      batch_end = before + kPieceBytes;
    }
    before += pieces_[i].count * pieces_[i].job->bytes_per_element;
  }
  shares_begin_.resize(static_cast<size_t>(shares_) + 1, batches_.size());
  batches_.push_back(pieces_.size());
}

std::vector<Schedule::Taken>* Schedule::none_taken(Work pass) {
  std::vector<Taken>* const taken = &taken_[pass];
  if (taken->size() != static_cast<size_t>(shares_)) {
    *taken = std::vector<Taken>(static_cast<size_t>(shares_));
  }
  for (Taken& of_share : *taken) of_share.batches = 0;
  return taken;
}

}  // namespace fusedopt
