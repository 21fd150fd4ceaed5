// What runs on a CUDA device, thread by thread: plain C++ that also runs on a CPU, where the tests
// take its bits. Included inside a back end's namespace, after FUSEDOPT_FN is defined.

#include "cuda/access.h"
#include "cuda/scalar.h"
#include "rules/list.h"

// ---- an update ----------------------------------------------------------------------------------

// One thread's part of a tile.
template <class Access, class Rule, class T>
FUSEDOPT_FN void update_tile(const Rule& rule, T grad_scale, const UpdateItem& item, int64_t tile,
                             int thread) {
  constexpr int kStreams = kFirstState + Rule::kStates;
  constexpr int kWidth = Access::kWidth;
  const Groups<kWidth> groups(item, tile);
  bool aligned[kStreams];
  FUSEDOPT_UNROLL()
  for (int s = 0; s < kStreams; ++s) aligned[s] = groups.aligned(item, s);

  for (int64_t at = thread; at < groups.count(); at += Access::kUnroll * kThreads) {
    // All loads first: none waits for another one's arithmetic.
    Word raw[Access::kUnroll][kStreams][Access::kWords];
    FUSEDOPT_UNROLL()
    for (int u = 0; u < Access::kUnroll; ++u) {
      if (at + u * kThreads >= groups.count()) break;
      const Group group = groups[at + u * kThreads];
      FUSEDOPT_UNROLL()
      for (int s = 0; s < kStreams; ++s) Access::load(item, s, aligned[s], group, raw[u][s]);
    }
    FUSEDOPT_UNROLL()
    for (int u = 0; u < Access::kUnroll; ++u) {
      if (at + u * kThreads >= groups.count()) break;
      const Group group = groups[at + u * kThreads];
      T x[kStreams][kWidth];
      FUSEDOPT_UNROLL()
      for (int s = 0; s < kStreams; ++s) Access::decode(item, s, raw[u][s], x[s]);
      FUSEDOPT_UNROLL()
      for (int i = 0; i < kWidth; ++i) {
        T state[kMaxStates];
        FUSEDOPT_UNROLL()
        for (int s = 0; s < Rule::kStates; ++s) state[s] = x[kFirstState + s][i];
        rule(x[kParam][i], x[kGrad][i] * grad_scale, state);
        FUSEDOPT_UNROLL()
        for (int s = 0; s < Rule::kStates; ++s) x[kFirstState + s][i] = state[s];
      }
      FUSEDOPT_UNROLL()
      for (int s = 0; s < kStreams; ++s) {
        if (s == kGrad) continue;
        Access::encode(item, s, x[s], raw[u][s]);
        Access::store(item, s, aligned[s], group, raw[u][s]);
      }
    }
  }
}

// One thread's part of all tiles that block number `block` of `blocks` takes.
template <class Access, class Rule, class Arguments>
FUSEDOPT_FN void update(const Arguments& args, int64_t block, int64_t blocks, int thread) {
  using T = typename Access::Compute;
  T factor = 1;
  if (args.decision) {
    if (args.decision->skipped) return;
    if constexpr (sizeof(T) == 8) {
      factor = args.decision->factor;
    } else {
      factor = args.decision->factor_f32;
    }
  }
  const Folded<T>* const all_folded = args.template entries<Folded<T>>();
  for (int64_t unit = block; unit < args.units; unit += blocks) {
    const UpdateItem& item = item_of(args.begin(), args.item_count, unit);
    const Folded<T>& folded = all_folded[item.folded];
    Rule rule;
    T* const scalars = reinterpret_cast<T*>(&rule);
    FUSEDOPT_UNROLL()
    for (int i = 0; i < static_cast<int>(sizeof(Rule) / sizeof(T)); ++i) {
      scalars[i] = folded.scalars[i];
    }
    update_tile<Access>(rule, folded.grad_scale * factor, item, unit - item.begin, thread);
  }
}

// ---- scalars that depend on what the device has -------------------------------------------------

// Advances the steps of item `i`, and folds its scalars for the step that is now taken.
template <class T, class Rule, class Arguments>
FUSEDOPT_FN void fold(const Arguments& args, int64_t i) {
  if (i >= args.item_count || (args.decision && args.decision->skipped)) return;
  const FoldItem& item = args.begin()[i];
  const Folded<double>& host = args.template entries<Folded<double>>()[item.scalars];
  double t = item.t;
  if (item.step) t = *item.step += 1;
  double lr = item.host_lr;
  if (item.lr) {
    lr = item.lr_is_double ? *static_cast<const double*>(item.lr)
                           : double{*static_cast<const float*>(item.lr)};
  }
  constexpr int kScalars = sizeof(Rule) / sizeof(double);
  Rule rule;
  std::memcpy(&rule, host.scalars, sizeof(rule));
  rule.fold(lr, t);
  double scalars[kScalars];
  std::memcpy(scalars, &rule, sizeof(rule));
  Folded<T>& folded = static_cast<Folded<T>*>(args.results)[i];
  for (int s = 0; s < kScalars; ++s) folded.scalars[s] = static_cast<T>(scalars[s]);
  folded.grad_scale = static_cast<T>(host.grad_scale);
}

// ---- norms --------------------------------------------------------------------------------------

template <Norm kNorm>
FUSEDOPT_FN double add(double sum, double x) {
  if constexpr (kNorm == Norm::two) {
    return sum + x * x;
  } else {
    const double size = (x < 0 ? -x : x) + 0.0;
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
  FUSEDOPT_UNROLL(8)
  for (int64_t i = lane; i < n; i += kNormLanes) sum = add<kNorm>(sum, double{decode(x[i])});
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
template <Norm kNorm, class Team, class Arguments>
FUSEDOPT_FN void norm(Team& team, const Arguments& args, int64_t block, double* lanes) {
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
      static_cast<double*>(args.results)[items->begin + unit] = lanes[thread];
    }
  });
}

FUSEDOPT_FN void make_decision(const FinishArgs& args, double sum) {
  Scaling scaling = args.scaling;
  sum += args.host_sum;
  for (int64_t i = 0; i < args.sum_count; ++i) sum += args.sums[i];
  if (args.unscale) scaling.unscale = *args.unscale;
  if (args.coefficient) scaling.coefficient = *args.coefficient;
  const Verdict verdict = decide(scaling, sum);
  const bool skipped = verdict.skipped || (args.skip && *args.skip != 0);
  args.decision->factor = verdict.factor;
  args.decision->factor_f32 = static_cast<float>(verdict.factor);
  args.decision->skipped = skipped;
  *args.norm_result = static_cast<float>(verdict.norm);
  *args.skipped_result = skipped;
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
