#include "engine/watch.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "engine/copy.h"
#include "engine/walk.h"

namespace fusedopt {

// ---- one block ----------------------------------------------------------------------------------

// A stream in which the elements of the parameter are one array, and the number of the first there.
Stream BlockChange::elements(int64_t* first, int64_t count) {
  const Stream& param = job_.streams[kParam];
  if (!job_.layout) return param;
  const int64_t sizes[] = {item_size(param.dtype), second_size(param.dtype)};
  walk(*job_.layout, *first, count, [&](int64_t at, const int64_t* offsets, int64_t run) {
    const auto gather = [&](int array, const char* from, int which) {
      const int64_t size = sizes[which], stride = (*job_.layout)[0].stride[array];
      copy_strided(from + offsets[array] * size, stride, gathered_[which] + at * size, 1, run,
                   size);
    };
    gather(kParam, param.data, 0);
    if (sizes[1]) gather(kSecond, param.second, 1);
  });
  *first = 0;
  return {gathered_[0], param.dtype, gathered_[1]};
}

void BlockChange::before(int64_t first, int64_t count) {
  const Stream param = elements(&first, count);
  kernels_.keep(param, first, count, before_);
}

void BlockChange::after(int64_t first, int64_t count) {
  const Stream param = elements(&first, count);
  kernels_.add_change(param, first, count, before_, &lanes_);
}

// In the order of join_blocks, which takes several times as long for a few.
static double join_lanes(const double* given) {
  double lanes[kChangeLanes];
  std::copy_n(given, kChangeLanes, lanes);
  for (int half = kChangeLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

void BlockChange::write_to(Sums* sums) const {
  sums->param = join_lanes(lanes_.param);
  sums->update = join_lanes(lanes_.update);
  sums->unmoved = static_cast<double>(lanes_.unmoved);
}

bool adds_itself(const Job& job) {
  return job.update_and_add && !job.layout && !job.then &&
         std::all_of(job.streams, job.streams + job.stream_count,
                     [](const Stream& stream) { return stream.dtype == DType::f32; });
}

int64_t elements_between_sums(const Job& job) {
  const bool few = !job.layout && !(job.in_blocks && job.origin.rows.length % kBlock);
  return few ? kNormBlock / 8 : kNormBlock + kBlock;
}

// ---- gradients ----------------------------------------------------------------------------------

static int64_t count_nonfinite(DType dtype, const char* from, int64_t stride, int64_t count) {
  int64_t found = 0;
  const auto count_in = [&](auto word, auto exponent) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(&word, from + i * stride * int64_t{sizeof(word)}, sizeof(word));
      found += (word & exponent) == exponent;
    }
    return found;
  };
  switch (dtype) {
    case DType::f32: return count_in(uint32_t{}, uint32_t{0x7f800000});
    case DType::f64: return count_in(uint64_t{}, uint64_t{0x7ff0000000000000});
    case DType::bf16: return count_in(uint16_t{}, uint16_t{0x7f80});
    default: return count_in(uint16_t{}, uint16_t{0x7c00});
  }
}

int64_t count_nonfinite(const Job& job, int64_t first, int64_t count) {
  const Stream& grad = job.streams[kGrad];
  const int64_t size = item_size(grad.dtype);
  if (!job.grad_layout) return count_nonfinite(grad.dtype, grad.data + first * size, 1, count);
  int64_t found = 0;
  walk(*job.grad_layout, first, count, [&](int64_t, const int64_t* offsets, int64_t run) {
    const int64_t stride = (*job.grad_layout)[0].stride[0];
    found += count_nonfinite(grad.dtype, grad.data + offsets[0] * size, stride, run);
  });
  return found;
}

// ---- all blocks ---------------------------------------------------------------------------------

double join_blocks(Norm norm, const double* blocks, int64_t count, int64_t stride) {
  const auto join = [norm](double a, double b) {
    if (norm != Norm::inf) return a + b;
    return a > b || a != a ? a : b;  // NaN if either is
  };
  double lanes[kNormJoin];
  const int64_t filled = std::min(count, kNormJoin);  // in all others is 0
  if (filled == 0) return 0;
  if (filled == 1) return blocks[0];
  for (int64_t i = 0; i < filled; ++i) lanes[i] = blocks[i * stride];
  for (int64_t i = filled; i < count; ++i) {
    double& lane = lanes[i % kNormJoin];
    lane = join(lane, blocks[i * stride]);
  }
  int64_t half = kNormJoin / 2;
  while (half >= filled) half /= 2;
  for (; half > 0; half /= 2) {
    for (int64_t l = 0; l + half < std::min(filled, 2 * half); ++l) {
      lanes[l] = join(lanes[l], lanes[l + half]);
    }
  }
  return lanes[0];
}

void Watch::join(const std::vector<Job>& jobs, Sums* sums) const {
  constexpr int64_t kStride = sizeof(Sums) / sizeof(double);
  const Sums* block = blocks->data();
  for (const Job& job : jobs) {
    const int64_t count = (job.numel + kNormBlock - 1) / kNormBlock;
    const auto join = [&](double Sums::* sum) {
      return join_blocks(Norm::two, &(block->*sum), count, kStride);
    };
    *sums = {};
    if (count == 1) {
      *sums = *block;
    } else if (count > 1) {
      *sums = {join(&Sums::grad), join(&Sums::nonfinite), join(&Sums::param), join(&Sums::update),
               join(&Sums::unmoved)};
    }
    const bool counts = counts_unmoved(job.streams[kParam].dtype);
    if (!counts) sums->unmoved = std::numeric_limits<double>::quiet_NaN();
    ++sums;
    block += count;
  }
}

}  // namespace fusedopt
