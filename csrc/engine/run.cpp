#include "engine/run.h"

#include <algorithm>
#include <cstring>

#include "engine/parallel.h"
#include "engine/walk.h"

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
    case 1: return copy(uint8_t{});
    case 2: return copy(uint16_t{});
    case 4: return copy(uint32_t{});
    default: return copy(uint64_t{});
  }
}

// A piece of a job with a layout: gathered into small arrays, updated there, scattered back.
static void update_strided(const Job& job, double factor, int64_t first, int64_t count) {
  constexpr int64_t kTile = 256;
  alignas(64) char scratch[kMaxArrays][kTile * sizeof(double)];
  Stream tile[kMaxStreams];
  const void* in_cache[kMaxStreams];
  for (int s = 0; s < job.stream_count; ++s) {
    tile[s] = {scratch[s], job.streams[s].dtype};
    in_cache[s] = scratch[s];
  }
  const int64_t second = second_size(tile[kParam].dtype);
  if (second) tile[kParam].second = scratch[kSecond];
  for (const int64_t end = first + count; first < end;) {
    int64_t n = std::min(end - first, kTile);
    Origin origin = job.origin;
    origin.first += first;
    if (job.in_blocks) {  // those of one row, so that no block but the last is a short one
      const Rows& rows = job.origin.rows;
      n = std::min(n, rows.length - first % rows.length);
      origin.rows = {kTile};
      for (int s = kFirstState; s < job.stream_count; ++s) {
        if (has_blocks(tile[s].dtype))
          tile[s].second = job.streams[s].second + rows.block_of(first);
      }
    }
    const auto copy_streams = [&](bool gather) {
      const unsigned left_alone = gather ? job.ignores : job.keeps;
      const auto is_copied = [&](int s) { return !(left_alone >> s & 1); };
      walk(*job.layout, first, n, [&](int64_t at, const int64_t* offsets, int64_t run) {
        const auto copy = [&](int array, char* far, char* near, int64_t size) {
          const int64_t stride = (*job.layout)[0].stride[array];
          far += offsets[array] * size;
          near += at * size;
          if (gather) {
            copy_strided(far, stride, near, 1, run, size);
          } else {
            copy_strided(near, 1, far, stride, run, size);
          }
        };
        for (int s = 0; s < job.stream_count; ++s) {
          if (!is_copied(s)) continue;
          copy(s, job.streams[s].data, tile[s].data, item_size(tile[s].dtype));
        }
        if (second && is_copied(kParam))
          copy(kSecond, job.streams[kParam].second, tile[kParam].second, second);
      });
    };
    copy_streams(/*gather=*/true);
    job.update(job.scalars, job.grad_scale * factor, tile, origin, 0, n, in_cache);
    copy_streams(/*gather=*/false);
    first += n;
  }
}

static int64_t item_size(const Piece& piece, int stream) {
  return item_size(piece.job->streams[stream].dtype);
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
  int64_t first = piece.first, end = piece.first + piece.count;
  if (job.in_blocks) {  // those that begin in the piece
    first = job.origin.rows.next_block(first);
    end = job.origin.rows.next_block(end);
  }
  const int64_t count = end - first;
  if (job.layout) {
    update_strided(job, factor, first, count);
  } else {
    const void* next_streams[kMaxStreams];
    for (int s = 0; s < job.stream_count; ++s) {
      next_streams[s] = begin_of(has_array(next, s) ? next : piece, s);
    }
    job.update(job.scalars, job.grad_scale * factor, job.streams, job.origin, first, count,
               next_streams);
  }
  if (!job.then) return;
  const Piece then{job.then, first, count, 0};
  update_piece(then, then, 1);
}

// A block of a gradient with a layout, gathered into a small array.
static void norm_strided(NormBlocks norm, const Job& job, int64_t first, int64_t count,
                         double* block) {
  alignas(64) char scratch[kNormBlock * sizeof(double)];
  const Stream& grad = job.streams[kGrad];
  const int64_t size = item_size(grad.dtype);
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

// ---- all pieces ---------------------------------------------------------------------------------

using Taken = std::vector<Schedule::Taken>;

static void norms(const Schedule& schedule, int thread, Taken* taken, NormBlocks norm,
                  double* blocks) {
  const auto bytes = [](const Piece& piece) { return piece.count * item_size(piece, kGrad); };
  const auto read = [&](const Piece* begin, const Piece* end) {
    const Piece* const last = &schedule.pieces().back();
    // The piece after this one in which the byte lies that is kNormPrefetchBytes ahead, and how
    // many bytes it begins after this one does.
    const Piece* ahead = begin;
    int64_t distance = 0;
    for (const Piece* piece = begin; piece != end; ++piece) {
      while (ahead < last && (ahead == piece || distance + bytes(*ahead) <= kNormPrefetchBytes)) {
        distance += bytes(*ahead++);
      }
      norm_piece(norm, *piece, *ahead, blocks);
      distance -= bytes(*piece);
    }
  };
  schedule.take_batches(thread, taken, /*backwards=*/false, read);
}

static void updates(const Schedule& schedule, int thread, Taken* taken, double factor) {
  const bool back = schedule.backwards();
  schedule.take_batches(thread, taken, back, [&](const Piece* begin, const Piece* end) {
    const Piece* const first = &schedule.pieces().front();
    const Piece* const last = &schedule.pieces().back();
    const ptrdiff_t count = end - begin;
    for (ptrdiff_t i = 0; i < count; ++i) {
      const Piece* const piece = back ? end - 1 - i : begin + i;
      const Piece* const next = back ? std::max(first, piece - 1) : std::min(last, piece + 1);
      update_piece(*piece, *next, factor);
    }
  });
}

double run_norm(const Kernels& kernels, Norm norm, const std::vector<Job>& jobs, int threads) {
  Schedule schedule;
  schedule.make(jobs, threads, Schedule::kNorm);
  std::vector<double>* const sums = schedule.sums_of_blocks();
  Taken* const taken = schedule.none_taken(Schedule::kNorm);
  in_parallel(schedule.threads(), [&](int thread, int) {
    norms(schedule, thread, taken, kernels.norms[static_cast<int>(norm)], sums->data());
  });
  return join_all(norm, *sums);
}

static void run_updates(const std::vector<Job>& jobs, int threads, double factor,
                        Schedule* schedule) {
  schedule->make(jobs, threads, Schedule::kUpdates);
  Taken* const taken = schedule->none_taken(Schedule::kUpdates);
  in_parallel(schedule->threads(),
              [&](int thread, int) { updates(*schedule, thread, taken, factor); });
}

void run_updates(const std::vector<Job>& jobs, int threads, double factor) {
  Schedule schedule;
  run_updates(jobs, threads, factor, &schedule);
}

Verdict run(const Kernels& kernels, const std::vector<Job>& jobs, int threads,
            const Scaling& scaling, Schedule* schedule) {
  if (!scaling.needs_norm()) {
    const Verdict verdict = decide(scaling, 0);
    if (!verdict.skipped) run_updates(jobs, threads, verdict.factor, schedule);
    return verdict;
  }
  schedule->make(jobs, threads, Schedule::kNormAndUpdates);
  std::vector<double>* const sums = schedule->sums_of_blocks();
  Taken* const read = schedule->none_taken(Schedule::kNorm);
  Taken* const updated = schedule->none_taken(Schedule::kUpdates);
  Verdict verdict{};
  in_parallel(schedule->threads(), [&](int thread, int) {
    norms(*schedule, thread, read, kernels.norms[static_cast<int>(Norm::two)], sums->data());
    together([&] { verdict = decide(scaling, join_all(Norm::two, *sums)); });
    if (!verdict.skipped) updates(*schedule, thread, updated, verdict.factor);
  });
  return verdict;
}

}  // namespace fusedopt
