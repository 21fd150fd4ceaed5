// What runs on a CUDA device, thread by thread: plain C++ that also runs on a CPU, where the tests
// take its bits. Included inside a back end's namespace, after FUSEDOPT_FN is defined.

#if defined(__CUDA_ARCH__)
#define FUSEDOPT_PRAGMA(text) _Pragma(#text)
#define FUSEDOPT_UNROLL(times) FUSEDOPT_PRAGMA(unroll times)
#else
#define FUSEDOPT_UNROLL(times)
#endif

FUSEDOPT_FN float sqrt(float x) { return ::sqrtf(x); }  // correctly rounded, on a device too
FUSEDOPT_FN double sqrt(double x) { return ::sqrt(x); }
FUSEDOPT_FN double pow(double x, double y) { return ::pow(x, y); }

// As in vec.h.
template <class T>
FUSEDOPT_FN T max(T a, T b) {
  return a > b || a != a ? a : b;
}
template <class T>
FUSEDOPT_FN T sign(T x) {
  return x > 0 ? T(1) : (x < 0 ? T(-1) : T(0));
}

#include "codec.h"
#include "rules.h"

// ---- an update ----------------------------------------------------------------------------------

// The unit of memory access.
struct alignas(16) Word {
  uint32_t parts[4];
};
template <class Stored>
constexpr int kInWord = 16 / sizeof(Stored);

// Element i of a word.
template <class Stored>
FUSEDOPT_FN Stored get(const Word& word, int i) {
  if constexpr (sizeof(Stored) == 2) {
    return bit_cast<Stored>(static_cast<uint16_t>(word.parts[i / 2] >> (i % 2 * 16)));
  } else if constexpr (sizeof(Stored) == 4) {
    return bit_cast<Stored>(word.parts[i]);
  } else {
    return bit_cast<Stored>(uint64_t{word.parts[2 * i]} | uint64_t{word.parts[2 * i + 1]} << 32);
  }
}

template <class Stored>
FUSEDOPT_FN void set(Word& word, int i, Stored element) {
  if constexpr (sizeof(Stored) == 2) {
    const uint32_t bits = bit_cast<uint16_t>(element);
    uint32_t& part = word.parts[i / 2];
    part = i % 2 ? (part & 0xffff) | bits << 16 : (part & 0xffff0000) | bits;
  } else if constexpr (sizeof(Stored) == 4) {
    word.parts[i] = bit_cast<uint32_t>(element);
  } else {
    const uint64_t bits = bit_cast<uint64_t>(element);
    word.parts[2 * i] = static_cast<uint32_t>(bits);
    word.parts[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
  }
}

// Where a group of kWidth consecutive elements lies, and which of them are to be touched.
struct Group {
  int64_t first;   // the group's first element, of which `begin` and more may be outside
  int begin, end;  // the elements to be touched: [begin, end) of the group
};

template <int kWidth>
FUSEDOPT_FN bool is_whole(Group group) {
  return group.begin == 0 && group.end == kWidth;
}

// A group of a stream whose groups are aligned goes as whole words, any other one by one.
template <class Stored, int kWidth>
FUSEDOPT_FN void load_words(const char* data, bool aligned, Group group, Word* words) {
  const Stored* from = reinterpret_cast<const Stored*>(data) + group.first;
  constexpr int kWords = kWidth / kInWord<Stored>;
  if (aligned && is_whole<kWidth>(group)) {
    FUSEDOPT_UNROLL()
    for (int w = 0; w < kWords; ++w) words[w] = reinterpret_cast<const Word*>(from)[w];
    return;
  }
  FUSEDOPT_UNROLL()
  for (int i = 0; i < kWidth; ++i) {
    const bool inside = group.begin <= i && i < group.end;
    set(words[i / kInWord<Stored>], i % kInWord<Stored>, inside ? from[i] : Stored{});
  }
}

template <class Stored, int kWidth>
FUSEDOPT_FN void store_words(const Word* words, char* data, bool aligned, Group group) {
  Stored* to = reinterpret_cast<Stored*>(data) + group.first;
  constexpr int kWords = kWidth / kInWord<Stored>;
  if (aligned && is_whole<kWidth>(group)) {
    FUSEDOPT_UNROLL()
    for (int w = 0; w < kWords; ++w) reinterpret_cast<Word*>(to)[w] = words[w];
    return;
  }
  FUSEDOPT_UNROLL()
  for (int i = 0; i < kWidth; ++i) {
    if (group.begin <= i && i < group.end) {
      to[i] = get<Stored>(words[i / kInWord<Stored>], i % kInWord<Stored>);
    }
  }
}

template <class Stored, int kWidth, class T>
FUSEDOPT_FN void decode_words(const Word* words, T* x) {
  FUSEDOPT_UNROLL()
  for (int i = 0; i < kWidth; ++i) {
    x[i] = decode(get<Stored>(words[i / kInWord<Stored>], i % kInWord<Stored>));
  }
}

template <class Stored, int kWidth, class T>
FUSEDOPT_FN void encode_words(const T* x, Word* words) {
  FUSEDOPT_UNROLL()
  for (int i = 0; i < kWidth; ++i) {
    Stored element;
    encode(x[i], element);
    set(words[i / kInWord<Stored>], i % kInWord<Stored>, element);
  }
}

// How a thread accesses groups of streams that are all stored as T.
template <class T>
struct Uniform {
  using Compute = T;
  static constexpr int kWidth = kInWord<T>;
  static constexpr int kUnroll = sizeof(T) == 4 ? 2 : 1;  // groups that a thread has in flight
  static constexpr int kWords = 1;                        // a stream and group

  FUSEDOPT_FN static void load(const UpdateItem& item, int s, bool aligned, Group group,
                               Word* words) {
    load_words<T, kWidth>(item.data[s], aligned, group, words);
  }
  FUSEDOPT_FN static void store(const UpdateItem& item, int s, bool aligned, Group group,
                                const Word* words) {
    store_words<T, kWidth>(words, item.data[s], aligned, group);
  }
  FUSEDOPT_FN static void decode(const UpdateItem&, int, const Word* words, T* x) {
    decode_words<T, kWidth>(words, x);
  }
  FUSEDOPT_FN static void encode(const UpdateItem&, int, const T* x, Word* words) {
    encode_words<T, kWidth>(x, words);
  }
};

// Of any mixture of float and 16-bit streams: eight elements are one word or two. The dtype is the
// same for all threads of a block, and so is the way that they take here.
struct Mixed {
  using Compute = float;
  static constexpr int kWidth = 8;
  static constexpr int kUnroll = 1;
  static constexpr int kWords = 2;

  FUSEDOPT_FN static void load(const UpdateItem& item, int s, bool aligned, Group group,
                               Word* words) {
    if (item.dtypes[s] == DType::f32) {
      load_words<float, kWidth>(item.data[s], aligned, group, words);
    } else {
      load_words<uint16_t, kWidth>(item.data[s], aligned, group, words);
    }
  }
  FUSEDOPT_FN static void store(const UpdateItem& item, int s, bool aligned, Group group,
                                const Word* words) {
    if (item.dtypes[s] == DType::f32) {
      store_words<float, kWidth>(words, item.data[s], aligned, group);
    } else {
      store_words<uint16_t, kWidth>(words, item.data[s], aligned, group);
    }
  }
  FUSEDOPT_FN static void decode(const UpdateItem& item, int s, const Word* words, float* x) {
    switch (item.dtypes[s]) {
      case DType::f32: return decode_words<float, kWidth>(words, x);
      case DType::bf16: return decode_words<BFloat16, kWidth>(words, x);
      default: return decode_words<Float16, kWidth>(words, x);
    }
  }
  FUSEDOPT_FN static void encode(const UpdateItem& item, int s, const float* x, Word* words) {
    switch (item.dtypes[s]) {
      case DType::f32: return encode_words<float, kWidth>(x, words);
      case DType::bf16: return encode_words<BFloat16, kWidth>(x, words);
      default: return encode_words<Float16, kWidth>(x, words);
    }
  }
};

// The groups of a tile: the first begins where the parameter is aligned, at `first` or before it.
template <int kWidth>
struct Groups {
  int64_t origin, first, end;

  FUSEDOPT_FN Groups(const UpdateItem& item, int64_t tile) {
    const int64_t size = item.dtypes[kParam] == DType::f64   ? 8
                         : item.dtypes[kParam] == DType::f32 ? 4
                                                             : 2;
    first = tile * kTile;
    end = item.numel - first < kTile ? item.numel : first + kTile;
    // (A group of 8 floats begins at every second word.)
    const auto address = reinterpret_cast<uintptr_t>(item.data[kParam]);
    origin = first - static_cast<int64_t>(address / size % kWidth + first % kWidth) % kWidth;
  }
  FUSEDOPT_FN int64_t count() const { return (end - origin + kWidth - 1) / kWidth; }
  FUSEDOPT_FN Group operator[](int64_t i) const {
    const int64_t at = origin + i * kWidth;
    const int64_t before = first - at, after = end - at;
    return {at, before > 0 ? static_cast<int>(before) : 0,
            after < kWidth ? static_cast<int>(after) : kWidth};
  }
  // Whether this stream's groups begin at multiples of a word, as the parameter's do if it can.
  FUSEDOPT_FN bool aligned(const UpdateItem& item, int s) const {
    const int64_t size = item.dtypes[s] == DType::f64 ? 8 : item.dtypes[s] == DType::f32 ? 4 : 2;
    return (reinterpret_cast<uintptr_t>(item.data[s]) + origin * size) % sizeof(Word) == 0;
  }
};

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
