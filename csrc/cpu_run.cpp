// Running jobs: norms and updates, each step in one parallel region over all pieces.

#include <algorithm>
#include <cstring>

#include "chunk.h"
#include "engine.h"
#include "overlap.h"
#include "parallel.h"

namespace fusedopt {

// ---- one piece ----------------------------------------------------------------------------------

// Copies `count` elements of `size` bytes between two strided places.
static void copy_strided(const char* from, int64_t from_stride, char* to, int64_t to_stride,
                         int64_t count, int64_t size) {
  const auto copy = [&](auto word) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(&word, from + i * from_stride * size, sizeof(word));
      std::memcpy(to + i * to_stride * size, &word, sizeof(word));
    }
  };
  switch (size) {
    case 2: return copy(uint16_t{});
    case 4: return copy(uint32_t{});
    default: return copy(uint64_t{});
  }
}

// A piece of a job with a layout: gathered into small arrays, updated there, scattered back.
static void update_strided(const Job& job, double factor, int64_t first, int64_t count) {
  constexpr int64_t kTile = 256;
  alignas(64) char scratch[kMaxStreams][kTile * sizeof(double)];
  Stream tile[kMaxStreams];
  const void* in_cache[kMaxStreams];
  for (int s = 0; s < job.stream_count; ++s) {
    tile[s] = {scratch[s], job.streams[s].dtype};
    in_cache[s] = scratch[s];
  }
  for (const int64_t end = first + count; first < end; first += kTile) {
    const int64_t n = std::min(end - first, kTile);
    const auto copy_streams = [&](bool gather) {
      walk(*job.layout, first, n, [&](int64_t at, const int64_t* offsets, int64_t run) {
        for (int s = 0; s < job.stream_count; ++s) {
          const int64_t size = kItemSize[static_cast<int>(tile[s].dtype)];
          const int64_t stride = (*job.layout)[0].stride[s];
          char* far = job.streams[s].data + offsets[s] * size;
          char* near = tile[s].data + at * size;
          if (gather) {
            copy_strided(far, stride, near, 1, run, size);
          } else if (s != kGrad) {
            copy_strided(near, 1, far, stride, run, size);
          }
        }
      });
    };
    copy_streams(/*gather=*/true);
    job.update(job.scalars, job.grad_scale * factor, tile, 0, n, in_cache);
    copy_streams(/*gather=*/false);
  }
}

static int64_t item_size(const Piece& piece, int stream) {
  return kItemSize[static_cast<int>(piece.job->streams[stream].dtype)];
}

// Where a stream of a piece begins.
static const char* begin_of(const Piece& piece, int stream) {
  return piece.job->streams[stream].data + piece.first * item_size(piece, stream);
}

// Whether it has such a stream, as an array, which a kernel can ask for ahead.
static bool has_array(const Piece& piece, int stream) {
  return !piece.job->layout && stream < piece.job->stream_count;
}

static void update_piece(const Piece& piece, const Piece& next, double factor) {
  const Job& job = *piece.job;
  if (job.layout) {
    update_strided(job, factor, piece.first, piece.count);
  } else {
    const void* next_streams[kMaxStreams];
    for (int s = 0; s < job.stream_count; ++s) {
      next_streams[s] = begin_of(has_array(next, s) ? next : piece, s);
    }
    job.update(job.scalars, job.grad_scale * factor, job.streams, piece.first, piece.count,
               next_streams);
  }
  if (!job.then) return;
  const Piece then{job.then, piece.first, piece.count, 0};
  update_piece(then, then, 1);
}

// A block of a gradient with a layout, gathered into a small array.
static void norm_strided(NormBlocks norm, const Job& job, int64_t first, int64_t count,
                         double* block) {
  alignas(64) char scratch[kNormBlock * sizeof(double)];
  const Stream& grad = job.streams[kGrad];
  const int64_t size = kItemSize[static_cast<int>(grad.dtype)];
  walk(*job.grad_layout, first, count, [&](int64_t at, const int64_t* offsets, int64_t run) {
    copy_strided(grad.data + offsets[0] * size, (*job.grad_layout)[0].stride[0],
                 scratch + at * size, 1, run, size);
  });
  norm({scratch, grad.dtype}, 0, count, scratch, block);
}

static void norm_piece(NormBlocks norm, const Piece& piece, const Piece& next, double* blocks) {
  const Job& job = *piece.job;
  blocks += piece.block;
  if (!job.grad_layout) {
    const Piece& ahead = next.job->grad_layout ? piece : next;
    return norm(job.streams[kGrad], piece.first, piece.count, begin_of(ahead, kGrad), blocks);
  }
  for (int64_t at = 0; at < piece.count; at += kNormBlock) {
    const int64_t count = std::min(piece.count - at, kNormBlock);
    norm_strided(norm, job, piece.first + at, count, blocks++);
  }
}

// Asks for the beginning of streams [from, to) of a piece, as far as the kernel does not that runs
// on the piece before: it is too short, or knows nothing of what comes next.
static void prefetch(const Piece& piece, const Piece& before, int from, int to) {
  if (piece.job->layout) return;  // its elements lie elsewhere
  for (int s = from; s < to; ++s) {
    const int64_t asked = has_array(before, s) ? before.count * item_size(before, s) : 0;
    const int64_t bytes = std::min(piece.count * item_size(piece, s), kPrefetchBytes - asked);
    const char* const begin = begin_of(piece, s);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(begin + at);
  }
}

// ---- all pieces ---------------------------------------------------------------------------------

static bool is_large(const std::vector<Job>& jobs) {
  // Waking the other threads takes a few microseconds, the time of about this many bytes;
  constexpr int64_t kSmallBytes = 128 * 1024;
  // and to make sure that jobs do not overlap, the time of about this many a job.
  constexpr int64_t kSmallBytesOfJob = 2 * 1024;
  int64_t left = -kSmallBytes;
  for (const Job& job : jobs) left += job.numel * job.bytes_per_element - kSmallBytesOfJob;
  return left > 0;
}

int useful_threads(const std::vector<Job>& jobs, int threads) {
  return is_large(jobs) ? threads : 1;
}

// ---- joining the blocks of a norm ---------------------------------------------------------------

static double join_all(Norm norm, const std::vector<double>& blocks) {
  const auto join = [norm](double a, double b) {
    if (norm != Norm::inf) return a + b;
    return a > b || a != a ? a : b;  // NaN if either is
  };
  double lanes[kNormJoin] = {};
  for (size_t i = 0; i < blocks.size(); ++i) {
    double& lane = lanes[i % kNormJoin];
    lane = join(lane, blocks[i]);
  }
  for (int64_t half = kNormJoin / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] = join(lanes[l], lanes[l + half]);
  }
  return lanes[0];
}

namespace {

// The work of a step in shares, one a thread.
class Shares {
 public:
  // overlaps: null if nothing is written.
  Shares(const std::vector<Job>& jobs, int threads, Overlaps* overlaps, bool backwards = false)
      : threads_(possible_threads(threads)), backwards_(backwards) {
    if (overlaps && (threads_ > 1 || backwards_) && overlaps->any(jobs)) {
      threads_ = 1;
      backwards_ = false;
    }
    cut_ = cut(jobs, threads_);
  }

  int threads() const { return threads_; }
  int64_t blocks() const { return cut_.blocks; }

  void norms(int thread, int threads, NormBlocks norm, double* blocks) const {
    for_each_piece(thread, threads, false, [&](const Piece& piece, const Piece& next) {
      prefetch(next, piece, kGrad, kGrad + 1);
      norm_piece(norm, piece, next, blocks);
    });
  }
  void updates(int thread, int threads, double factor) const {
    for_each_piece(thread, threads, backwards_, [&](const Piece& piece, const Piece& next) {
      prefetch(next, piece, 0, next.job->stream_count);
      update_piece(piece, next, factor);
    });
  }

 private:
  // Calls f(piece, the one after it, or the last one again).
  template <class F>
  void for_each_piece(int thread, int threads, bool backwards, F f) const {
    for (int share = thread; share < threads_; share += threads) {
      const Piece* const begin = cut_.pieces.data() + cut_.begin[share];
      const auto count = static_cast<ptrdiff_t>(cut_.begin[share + 1] - cut_.begin[share]);
      for (ptrdiff_t i = 0; i < count; ++i) {
        const ptrdiff_t at = backwards ? count - 1 - i : i;
        const ptrdiff_t next = backwards ? at - 1 : at + 1;
        f(begin[at], begin[i + 1 < count ? next : at]);
      }
    }
  }

  int threads_;
  bool backwards_;
  Cut cut_;
};

}  // namespace

double run_norm(const Kernels& kernels, Norm norm, const std::vector<Job>& jobs, int threads) {
  const Shares shares(jobs, threads, /*overlaps=*/nullptr);
  std::vector<double> blocks(static_cast<size_t>(shares.blocks()));
  in_parallel(shares.threads(), [&](int thread, int count) {
    shares.norms(thread, count, kernels.norms[static_cast<int>(norm)], blocks.data());
  });
  return join_all(norm, blocks);
}

void run_updates(const std::vector<Job>& jobs, int threads, double factor, Overlaps* overlaps) {
  const Shares shares(jobs, threads, overlaps);
  in_parallel(shares.threads(),
              [&](int thread, int count) { shares.updates(thread, count, factor); });
}

Verdict run(const Kernels& kernels, const std::vector<Job>& jobs, int threads,
            const Scaling& scaling, Overlaps* overlaps) {
  if (!scaling.needs_norm()) {
    const double factor = scaling.unscale * scaling.coefficient;
    run_updates(jobs, threads, factor, overlaps);
    return {0, factor, false};
  }
  // Backwards, the updates begin with the gradients that the norm has just read.
  const Shares shares(jobs, threads, overlaps, /*backwards=*/is_large(jobs));
  std::vector<double> blocks(static_cast<size_t>(shares.blocks()));
  Verdict verdict{};
  in_parallel(shares.threads(), [&](int thread, int count) {
    shares.norms(thread, count, kernels.norms[static_cast<int>(Norm::two)], blocks.data());
    together([&] { verdict = decide(scaling, join_all(Norm::two, blocks)); });
    if (!verdict.skipped) shares.updates(thread, count, verdict.factor);
  });
  return verdict;
}

}  // namespace fusedopt
