// What an update has changed, as the threads of a CUDA device add it up: before it and after it, in
// launches of their own. Included by device.h, inside its namespace.
#pragma once

FUSEDOPT_FN float decode_param(const WatchItem& item, int64_t at) {
  const auto stored = [&](auto x) {
    std::memcpy(&x.bits, on_device(item.param + 2 * at), 2);
    return x;
  };
  switch (item.param_dtype) {
    case DType::bf16:
    case DType::bf16_random: return decode(stored(BFloat16{}));
    case DType::bf16_split: {
      SplitFloat x = stored(SplitFloat{});
      x.remainder = on_device(reinterpret_cast<const int16_t*>(item.second))[at];
      return decode(x);
    }
    case DType::f16_master: {
      MasterFloat x = stored(MasterFloat{});
      x.master = on_device(reinterpret_cast<const float*>(item.second))[at];
      return decode(x);
    }
    case DType::f32: return on_device(reinterpret_cast<const float*>(item.param))[at];
    default: return decode(stored(Float16{}));
  }
}

// Calls f(number(i) -> what element i is now, the first of what was there before).
template <class F>
FUSEDOPT_FN void with_param(const WatchItem& item, F f) {
  if (item.param_dtype == DType::f64) {
    const auto* const now = on_device(reinterpret_cast<const double*>(item.param));
    f([now](int64_t i) { return now[i]; }, reinterpret_cast<double*>(item.before));
  } else {
    f([&item](int64_t i) { return decode_param(item, i); }, reinterpret_cast<float*>(item.before));
  }
}

// Keeps the parameters of block number `block` of all. For one block of threads.
template <class Team>
FUSEDOPT_FN void keep(Team& team, const Args<WatchItem>& args, int64_t block) {
  const WatchItem& item = item_of(args.begin(), args.item_count, block);
  const int64_t first = (block - item.begin) * kNormBlock;
  const int64_t end = first + kNormBlock < item.numel ? first + kNormBlock : item.numel;
  with_param(item, [&](auto now, auto* before) {
    team.each([&](int thread) {
      for (int64_t i = first + thread; i < end; i += kThreads) *on_device(before + i) = now(i);
    });
  });
}

// What lane number `lane` adds up of a block: every sixteenth element, as norms do.
FUSEDOPT_FN Sums watch_lane(const WatchItem& item, int64_t block, int lane) {
  Sums sums{};
  int64_t first = block * kNormBlock;
  int64_t end = first + kNormBlock < item.numel ? first + kNormBlock : item.numel;
  const auto add_gradient = [&](const auto* grad) {
    for (int64_t i = first + lane; i < end; i += kNormLanes) {
      const auto x = decode(*on_device(grad + i));
      sums.grad = add_square(sums.grad, x);
      sums.nonfinite += x - x == 0 ? 0 : 1;
    }
  };
  switch (item.grad_dtype) {
    case DType::f32: add_gradient(reinterpret_cast<const float*>(item.grad)); break;
    case DType::f64: add_gradient(reinterpret_cast<const double*>(item.grad)); break;
    case DType::bf16: add_gradient(reinterpret_cast<const BFloat16*>(item.grad)); break;
    default: add_gradient(reinterpret_cast<const Float16*>(item.grad));
  }
  if (item.in_blocks) {  // those that begin there
    first = item.rows.next_block(first);
    end = item.rows.next_block(end);
  }
  with_param(item, [&](auto now, const auto* before) {
    using T = std::decay_t<decltype(now(0))>;
    constexpr bool kDouble = std::is_same_v<T, double>;
    constexpr T kScale = kDouble ? 1 : kChangeScale;
    const int64_t whole = first + (end - first) / kNormLanes * kNormLanes;
    // A run, which is added up in T; one of doubles may be of any length.
    for (int64_t from = first; from < end;) {
      const int64_t most = kDouble ? kNormLanes : kChangeRun;
      const int64_t to = from == whole ? end : from + most < whole ? from + most : whole;
      T param = 0, update = 0;
      for (int64_t i = from + lane; i < to; i += kNormLanes) {
        const T x = now(i), was = *on_device(before + i);
        const T p = x * kScale, u = (x - was) * kScale;
        param = param + p * p;
        update = update + u * u;
        sums.unmoved += x == was ? 1 : 0;
      }
      sums.param += param * (1 / (double{kScale} * double{kScale}));
      sums.update += update * (1 / (double{kScale} * double{kScale}));
      from = to;
    }
  });
  return sums;
}

constexpr int kSums = sizeof(Sums) / sizeof(double);

// Of kThreads / kNormLanes blocks, those of number `block` of all. `lanes`: kSums * kThreads.
template <class Team>
FUSEDOPT_FN void watch(Team& team, const Args<WatchItem>& args, int64_t block, double* lanes) {
  constexpr int64_t kBlocks = kThreads / kNormLanes;
  team.each([&](int thread) {
    const int64_t unit = block * kBlocks + thread / kNormLanes;
    if (unit >= args.units) return;
    const WatchItem& item = item_of(args.begin(), args.item_count, unit);
    const Sums sums = watch_lane(item, unit - item.begin, thread % kNormLanes);
    double all[kSums];
    std::memcpy(all, &sums, sizeof(sums));
    for (int s = 0; s < kSums; ++s) lanes[s * kThreads + thread] = all[s];
  });
  for (int s = 0; s < kSums; ++s) {
    join_lanes<Norm::two, kNormLanes>(team, lanes + s * kThreads);
  }
  team.each([&](int thread) {
    const int64_t unit = block * kBlocks + thread / kNormLanes;
    if (thread % kNormLanes != 0 || unit >= args.units) return;
    for (int s = 0; s < kSums; ++s) args.sums[unit * kSums + s] = lanes[s * kThreads + thread];
  });
}

// Joins the blocks of item number `number`. For one block of threads.
template <class Team>
FUSEDOPT_FN void join_blocks(Team& team, const Args<WatchItem>& args, int64_t number,
                             double* lanes) {
  const WatchItem& item = args.begin()[number];
  const int64_t blocks = (item.numel + kNormBlock - 1) / kNormBlock;
  const double* const sums = args.sums + item.begin * kSums;
  const bool is_step = !(args.decision && args.decision->skipped);
  for (int s = 0; s < kSums; ++s) {
    team.each([&](int thread) {
      double sum = 0;
      for (int64_t i = thread; i < blocks; i += kNormJoin) sum += sums[i * kSums + s];
      lanes[thread] = sum;
    });
    join_lanes<Norm::two, kNormJoin>(team, lanes);
    team.each([&](int thread) {
      if (thread != 0) return;
      double* const row = reinterpret_cast<double*>(item.row);
      const bool is_count = s == kSums - 1;  // of elements that have not moved
      row[s] = !is_count      ? lanes[0]
               : !item.counts ? std::numeric_limits<double>::quiet_NaN()
               : is_step      ? lanes[0]
                              : 0;
    });
  }
}
