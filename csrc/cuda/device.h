// What runs on a CUDA device, thread by thread: plain C++ that also runs on a CPU, where the tests
// take its bits. Included inside a back end's namespace, after FUSEDOPT_FN is defined.

#include "cuda/scalar.h"
#include "cuda/update.h"

// ---- scalars that depend on what the device has -------------------------------------------------

// Calls f(rule in double) for the variant of a rule that has this number.
template <template <class, bool...> class Family, class Flags, class F, size_t... kBits>
FUSEDOPT_FN void visit(int number, F f, std::index_sequence<kBits...>) {
  ((number == static_cast<int>(kBits) ? f(typename Variant<Family, kBits, Flags>::F64()) : void()),
   ...);
}
template <class F>
FUSEDOPT_FN void visit_rule(int number, F f) {
#define FUSEDOPT_VISIT(name, Family, flags)                                               \
  visit<Family, std::make_index_sequence<flags>>(number, f,                               \
                                                 std::make_index_sequence<1 << flags>()); \
  number -= 1 << flags;
  FUSEDOPT_RULES(FUSEDOPT_VISIT)
#undef FUSEDOPT_VISIT
}

// Advances the steps of item `i`, and folds its scalars for the step that is now taken.
FUSEDOPT_FN void fold(const Args<FoldItem>& args, int64_t i) {
  if (i >= args.item_count || (args.decision && args.decision->skipped)) return;
  const FoldItem& item = args.begin()[i];
  const auto& host = args.template scalars_at<Folded<double>>(item.folded);
  double t = item.t;
  if (item.step) t = *item.step += 1;
  double lr = item.host_lr;
  if (item.lr) {
    lr = item.lr_is_double ? *static_cast<const double*>(item.lr)
                           : double{*static_cast<const float*>(item.lr)};
  }
  const auto write = [&](const auto& scalars, int count, auto* folded) {
    using T = std::decay_t<decltype(folded->grad_scale)>;
    FUSEDOPT_UNROLL()
    for (int s = 0; s < count; ++s) folded->scalars[s] = static_cast<T>(scalars[s]);
    folded->grad_scale = static_cast<T>(host.grad_scale);
  };
  visit_rule(item.rule, [&](auto rule) {
    constexpr int kScalars = sizeof(rule) / sizeof(double);
    double scalars[kScalars];
    std::memcpy(&rule, host.scalars, sizeof(rule));
    rule.fold(lr, t);
    std::memcpy(scalars, &rule, sizeof(rule));
    if (item.in_double) {
      write(scalars, kScalars, reinterpret_cast<Folded<double>*>(item.result));
    } else {
      write(scalars, kScalars, reinterpret_cast<Folded<float>*>(item.result));
    }
  });
}

// ---- tables that are too long for arguments -----------------------------------------------------

template <class Page>
FUSEDOPT_FN void write(const Page& page, int64_t i) {
  if (i < page.count) page.to[i] = page.data[i];
}

// ---- norms --------------------------------------------------------------------------------------

FUSEDOPT_FN double add_square(double sum, double x) { return sum + x * x; }
// A float's square is exact in double, so that one operation rounds as two do: some GPUs have few
// units for them.
FUSEDOPT_FN double add_square(double sum, float x) {
  const double exact = x;
#if defined(__CUDA_ARCH__)
  return __fma_rn(exact, exact, sum);
#else
  return sum + exact * exact;
#endif
}

template <Norm kNorm, class T>
FUSEDOPT_FN double add(double sum, T x) {
  if constexpr (kNorm == Norm::two) {
    return add_square(sum, x);
  } else {
    const double size{(x < 0 ? -x : x) + T{0}};
    return kNorm == Norm::one ? sum + size : max(sum, size);
  }
}

template <Norm kNorm>
FUSEDOPT_FN double join(double a, double b) {
  return kNorm == Norm::inf ? max(a, b) : a + b;
}

// What lane number `lane` adds up: every sixteenth element of a block.
template <Norm kNorm, class Stored>
FUSEDOPT_FN double norm_lane(const Stored* x, int64_t n, int lane) {
  double sum = 0;
  FUSEDOPT_UNROLL(32)
  for (int64_t i = lane; i < n; i += kNormLanes) sum = add<kNorm>(sum, decode(*on_device(x + i)));
  return sum;
}

template <Norm kNorm>
FUSEDOPT_FN double norm_lane(const NormItem& item, int64_t block, int lane) {
  const int64_t first = block * kNormBlock;
  const int64_t n = item.numel - first < kNormBlock ? item.numel - first : kNormBlock;
  const auto sum = [&](auto* data) { return norm_lane<kNorm>(data + first, n, lane); };
  switch (item.dtype) {
    case DType::f32: return sum(reinterpret_cast<const float*>(item.data));
    case DType::f64: return sum(reinterpret_cast<const double*>(item.data));
    case DType::bf16: return sum(reinterpret_cast<const BFloat16*>(item.data));
    default: return sum(reinterpret_cast<const Float16*>(item.data));
  }
}

// Joins lanes [0, kLanes) of each kLanes in shared memory. Team::each(f) calls f(thread) on each
// thread of a block, and returns when all are done.
template <Norm kNorm, int kLanes, class Team>
FUSEDOPT_FN void join_lanes(Team& team, double* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    team.each([&](int thread) {
      if (thread % kLanes < half) lanes[thread] = join<kNorm>(lanes[thread], lanes[thread + half]);
    });
  }
}

// The norms of kThreads / kNormLanes blocks, those of number `block` of all.
template <Norm kNorm, class Team>
FUSEDOPT_FN void norm(Team& team, const Args<NormItem>& args, int64_t block, double* lanes) {
  constexpr int64_t kBlocks = kThreads / kNormLanes;
  const NormItem* const items = args.begin();
  team.each([&](int thread) {
    const int64_t unit = block * kBlocks + thread / kNormLanes;
    if (unit >= args.units) return;
    const NormItem& item = item_of(items, args.item_count, items->begin + unit);
    lanes[thread] = norm_lane<kNorm>(item, items->begin + unit - item.begin, thread % kNormLanes);
  });
  join_lanes<kNorm, kNormLanes>(team, lanes);
  team.each([&](int thread) {
    const int64_t unit = block * kBlocks + thread / kNormLanes;
    if (thread % kNormLanes == 0 && unit < args.units) {
      args.sums[items->begin + unit] = lanes[thread];
    }
  });
}

FUSEDOPT_FN void make_decision(const FinishArgs& args, double sum) {
  Scaling scaling = args.scaling;
  sum += args.host_sum;
  for (int64_t i = 0; i < args.sum_count; ++i) sum += args.sums[i];
  if (args.unscale) scaling.unscale = *args.unscale;
  if (args.coefficient) scaling.coefficient = *args.coefficient;
  if (args.known_norm) scaling.known_norm = *args.known_norm;
  const Verdict verdict = decide(scaling, sum);
  const bool to_skip = args.skip && *args.skip != 0;
  const bool skipped = verdict.skipped || to_skip;
  if (scaling.spikes.norms && !to_skip) remember(scaling.spikes, verdict.judgement);
  args.decision->factor = verdict.factor;
  args.decision->factor_f32 = static_cast<float>(verdict.factor);
  args.decision->skipped = skipped;
  *args.norm_result = static_cast<float>(verdict.norm);
  *args.skipped_result = skipped;
  if (args.factor_result) *args.factor_result = verdict.factor;
}

// For one block of threads.
template <Norm kNorm, class Team>
FUSEDOPT_FN void finish(Team& team, const FinishArgs& args, double* lanes) {
  team.each([&](int thread) {
    double sum = 0;
    for (int64_t i = thread; i < args.block_count; i += kNormJoin) {
      sum = join<kNorm>(sum, args.blocks[i]);
    }
    lanes[thread] = sum;
  });
  join_lanes<kNorm, kNormJoin>(team, lanes);
  team.each([&](int thread) {
    if (thread != 0) return;
    if (args.sum) *args.sum = lanes[0];
    if (args.decision) make_decision(args, lanes[0]);
  });
}
