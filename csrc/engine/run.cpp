#include "engine/run.h"

#include <algorithm>

#include "engine/copy.h"
#include "engine/parallel.h"
#include "engine/walk.h"

namespace fusedopt {

// ---- one piece ----------------------------------------------------------------------------------

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

// Updates elements [first, end); what comes after is asked for ahead. `change`: null, or where to
// add up what changes, in a job that can.
static void update_elements(const Job& job, int64_t first, int64_t end, const Piece& next,
                            double factor, ChangeLanes* change = nullptr) {
  if (job.layout) {
    update_strided(job, factor, first, end - first);
  } else {
    const void* next_streams[kMaxStreams];
    for (int s = 0; s < job.stream_count; ++s) {
      next_streams[s] = begin_of(has_array(next, s) ? next : Piece{&job, first, 0, 0}, s);
    }
    const double scale = job.grad_scale * factor;
    if (change) {
      return job.update_and_add(job.scalars, scale, job.streams, first, end - first, next_streams,
                                change);
    }
    job.update(job.scalars, scale, job.streams, job.origin, first, end - first, next_streams);
  }
  if (!job.then) return;
  const Piece here{job.then, first, 0, 0};
  const Piece after{next.job->then, next.first, 0, 0};
  update_elements(*job.then, first, end, after.job ? after : here, 1);
}

// The elements of a piece that are updated with it: of blocks, those that begin there.
static int64_t next_element(const Job& job, int64_t first) {
  return job.in_blocks ? job.origin.rows.next_block(first) : first;
}

static void update_piece(const Piece& piece, const Piece& next, double factor) {
  const Job& job = *piece.job;
  update_elements(job, next_element(job, piece.first), next_element(job, piece.first + piece.count),
                  next, factor);
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

// Updates the elements of a block, and adds up how they change.
static BlockChange watch_elements(const Job& job, int64_t first, int64_t end, const Piece& next,
                                  double factor, const Kernels& kernels) {
  BlockChange change(kernels, job);
  if (adds_itself(job)) {
    update_elements(job, first, end, next, factor, change.lanes());
    return change;
  }
  const int64_t most = elements_between_sums(job);
  while (first < end) {
    const int64_t count = std::min(end - first, most);
    const Piece rest{&job, first + count, 0, 0};
    change.before(first, count);
    update_elements(job, first, first + count, first + count == end ? next : rest, factor);
    change.after(first, count);
    first += count;
  }
  return change;
}

// The same as update_piece, and what it adds up.
static void watch_piece(const Piece& piece, const Piece& next, double factor, const Watch& watch,
                        double* gradients) {
  const Job& job = *piece.job;
  for (int64_t at = 0; at < piece.count; at += kNormBlock) {
    const int64_t first = piece.first + at, count = std::min(piece.count - at, kNormBlock);
    const Piece block{&job, first, count, piece.block + at / kNormBlock};
    Sums* const sums = watch.blocks->data() + block.block;
    if (!watch.knows_gradients) {
      norm_piece(watch.kernels->norms[static_cast<int>(Norm::two)], block, block, gradients);
    }
    sums->grad = gradients[block.block];
    sums->nonfinite = 0;
    if (is_nonfinite(sums->grad)) {
      sums->nonfinite = static_cast<double>(count_nonfinite(job, first, count));
    }
    const Piece rest{&job, first + count, 0, 0};
    watch_elements(job, next_element(job, first), next_element(job, first + count),
                   at + count == piece.count ? next : rest, factor, *watch.kernels)
        .write_to(sums);
  }
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

static void updates(const Schedule& schedule, int thread, Taken* taken, double factor,
                    const Watch* watch, double* gradients) {
  const bool back = schedule.backwards();
  schedule.take_batches(thread, taken, back, [&](const Piece* begin, const Piece* end) {
    const Piece* const first = &schedule.pieces().front();
    const Piece* const last = &schedule.pieces().back();
    const ptrdiff_t count = end - begin;
    for (ptrdiff_t i = 0; i < count; ++i) {
      const Piece* const piece = back ? end - 1 - i : begin + i;
      const Piece* const next = back ? std::max(first, piece - 1) : std::min(last, piece + 1);
      if (watch) {
        watch_piece(*piece, *next, factor, *watch, gradients);
      } else {
        update_piece(*piece, *next, factor);
      }
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
  return join_blocks(norm, sums->data(), static_cast<int64_t>(sums->size()));
}

static void run_updates(const Kernels& kernels, const std::vector<Job>& jobs, int threads,
                        double factor, Schedule* schedule, Sums* sums) {
  schedule->make(jobs, threads, Schedule::kUpdates);
  Taken* const taken = schedule->none_taken(Schedule::kUpdates);
  const Watch watch{&kernels, false, sums ? schedule->sums_of_watch() : nullptr};
  double* const gradients = sums ? schedule->sums_of_blocks()->data() : nullptr;
  in_parallel(schedule->threads(), [&](int thread, int) {
    updates(*schedule, thread, taken, factor, sums ? &watch : nullptr, gradients);
  });
  if (sums) watch.join(jobs, sums);
}

void run_updates(const Kernels& kernels, const std::vector<Job>& jobs, int threads, double factor,
                 Sums* sums) {
  Schedule schedule;
  run_updates(kernels, jobs, threads, factor, &schedule, sums);
}

Verdict run(const Kernels& kernels, const std::vector<Job>& jobs, int threads,
            const Scaling& scaling, Schedule* schedule, Sums* sums) {
  if (!scaling.needs_norm()) {
    const Verdict verdict = decide(scaling, 0);
    if (!verdict.skipped) run_updates(kernels, jobs, threads, verdict.factor, schedule, sums);
    return verdict;
  }
  schedule->make(jobs, threads, Schedule::kNormAndUpdates);
  std::vector<double>* const squares = schedule->sums_of_blocks();
  const Watch watch{&kernels, true, sums ? schedule->sums_of_watch() : nullptr};
  Taken* const read = schedule->none_taken(Schedule::kNorm);
  Taken* const updated = schedule->none_taken(Schedule::kUpdates);
  Verdict verdict{};
  in_parallel(schedule->threads(), [&](int thread, int) {
    norms(*schedule, thread, read, kernels.norms[static_cast<int>(Norm::two)], squares->data());
    together([&] {
      const auto count = static_cast<int64_t>(squares->size());
      verdict = decide(scaling, join_blocks(Norm::two, squares->data(), count));
    });
    if (verdict.skipped) return;
    updates(*schedule, thread, updated, verdict.factor, sums ? &watch : nullptr, squares->data());
  });
  if (sums && !verdict.skipped) watch.join(jobs, sums);
  return verdict;
}

}  // namespace fusedopt
