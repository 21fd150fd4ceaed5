// Usual mixtures of streams without a detour: a block of each is decoded to registers, and what is
// rare is left to tiles, where the conversions of a stream and the arithmetic of the rule come one
// after the other instead of side by side. Included inside the ISA's namespace.
#pragma once

#include "cpu/held.h"
#include "rules/list.h"

// ---- an update ----------------------------------------------------------------------------------

// Asks for as much of a stream as has its random bits made at once, `ahead` of that at element
// `first`. (A number may point anywhere.) Unrolled here and below, it costs a step in cache 6 %
// less, and block by block, a step out of cache 5 to 8 % more.
FUSEDOPT_FN void prefetch_elements(uintptr_t ahead, int64_t first, int64_t size) {
  const uintptr_t from = ahead + static_cast<uintptr_t>(first * size);
#pragma GCC unroll 16
  for (uintptr_t at = 0; at < static_cast<uintptr_t>(kRandomTile * size); at += 64)
    prefetch(from + at);
}

// Streams that are stored so: parameter, gradient, and states.
template <DType kParamType, DType kGradType, DType... kStates>
struct Mixture {
  static bool is(const Stream* streams) {
    return streams[kParam].dtype == kParamType && streams[kGrad].dtype == kGradType &&
           has_states(streams + kFirstState);
  }

  // Returns where it has stopped: after the last whole block.
  template <class Rule>
  [[gnu::noinline]] static int64_t update(const Rule& given, float grad_scale,
                                          const Stream* streams, const Origin& origin,
                                          int64_t first, int64_t count, const void* const* next) {
    static_assert(kKept<Rule> == 1u << kGrad && !kIgnored<Rule>, "all streams are taken here");
    constexpr int kStreams = kFirstState + Rule::kStates;
    constexpr int64_t kSizes[] = {item_size(kParamType), item_size(kGradType),
                                  item_size(kStates)..., second_size(kParamType)};
    // Copies that nothing stored can change.
    const Rule rule = given;
    Stream own[kStreams];
    for (int s = 0; s < kStreams; ++s) own[s] = streams[s];
    const int64_t offset = origin.first;
    // As many elements of each, so that all come to their ends together, and go on at `next`.
    const int64_t distance = bytes_ahead(kStreams, count * 2) / 2;
    uintptr_t there[kStreams + 1];
    for (int s = 0; s <= kStreams; ++s) {
      const char* const array = s == kStreams ? own[kParam].second : own[s].data;
      there[s] = reinterpret_cast<uintptr_t>(array) + static_cast<uintptr_t>(distance * kSizes[s]);
    }
    alignas(kVectorBytes) uint16_t random[kRandomTile];
    const RandomBits random_bits(origin.key, origin.draw);
    const int64_t end = first + count;
    int64_t turn = end - distance;  // from there on, what is ahead is at `next`
    int64_t at = first;
    for (; at + kBlock <= end; at += kBlock) {
      if (at >= turn) {
        turn = end;
        for (int s = 0; s <= kStreams; ++s) {
          there[s] = reinterpret_cast<uintptr_t>(next[s == kStreams ? kParam : s]) +
                     static_cast<uintptr_t>((distance - end) * kSizes[s]);
        }
      }
      const int64_t in_tile = (at - first) % kRandomTile;
      if (in_tile == 0) {
#pragma GCC unroll 8
        for (int s = 0; s <= kStreams; ++s) prefetch_elements(there[s], at, kSizes[s]);
        if (kIsRandom) random_bits(static_cast<uint64_t>(offset + at) / kRandomBlock, random);
      }
      Held<kParamType> p;
      Held<kGradType> g;
      HeldStates<kStates...> states;
      const bool usual =
          p.load(own[kParam], at) & g.load(own[kGrad], at) & states.load(own + kFirstState, at);
      for (int i = 0; i < kInBlock; ++i) {
        BFloat16Vec state[kMaxStates];
        states.lanes_to(state, i);
        rule(p.lanes[i], g.lanes[i] * grad_scale, state);
        states.lanes_from(state, i);
      }
      if (!usual | p.is_rare() | states.is_rare()) {
        update_in_tiles(given, grad_scale, streams, origin, at, kBlock, next);
        continue;
      }
      RandomOfBlock bits;
      if constexpr (kIsRandom) {
        bits = {random + in_tile, BlockBits::load<E4M3>(random + in_tile)};
      }
      p.store(own[kParam], at, bits);
      states.store(own + kFirstState, at, bits);
    }
    return at;
  }

 private:
  static constexpr bool kIsRandom = Held<kParamType>::kRandom || HeldStates<kStates...>::kRandom;

  static bool has_states(const Stream* state) { return ((state++->dtype == kStates) && ...); }
};

// ---- rules that are worth it --------------------------------------------------------------------

template <DType...>
struct DTypes {};

// How their states are stored in 8 bits.
template <class Rule>
struct InEightBits {
  using States = DTypes<>;
};
template <bool kCoupled>
struct InEightBits<Adam<float, kCoupled, false>> {
  using States = DTypes<DType::e4m3, DType::e5m3>;
};
template <>
struct InEightBits<RAdam<float, false>> {
  using States = DTypes<DType::e4m3, DType::e5m3>;
};
template <bool kNesterov>
struct InEightBits<SgdMomentum<float, false, kNesterov>> {
  using States = DTypes<DType::e4m3>;
};
template <>
struct InEightBits<Lion<float>> {
  using States = DTypes<DType::e4m3>;
};
template <>
struct InEightBits<RmsProp<float, false, false, false>> {
  using States = DTypes<DType::e5m3>;
};
template <>
struct InEightBits<Adagrad<float, false>> {
  using States = DTypes<DType::e5m3>;
};

template <DType, DType kStored>
constexpr DType kAs = kStored;  // one for each of the others

template <DType... kCoded, class Rule>
int64_t update_if_any(DTypes<kCoded...>, const Rule& rule, float grad_scale, const Stream* streams,
                      const Origin& origin, int64_t first, int64_t count, const void* const* next) {
  const auto update_if = [&](auto mixture) {
    if (!mixture.is(streams)) return false;
    first = mixture.update(rule, grad_scale, streams, origin, first, count, next);
    return true;
  };
  constexpr DType kF32 = DType::f32, kBF16 = DType::bf16;
  (void)(update_if(Mixture<DType::bf16_split, kBF16, kAs<kCoded, kF32>...>()) ||
         update_if(Mixture<DType::bf16_split, kBF16, kAs<kCoded, kBF16>...>()) ||
         update_if(Mixture<DType::bf16_split, kBF16, kCoded...>()) ||
         update_if(Mixture<DType::bf16_random, kBF16, kAs<kCoded, kBF16>...>()) ||
         update_if(Mixture<DType::bf16_random, kBF16, kCoded...>()) ||
         update_if(Mixture<DType::bf16_random, kBF16, kAs<kCoded, kF32>...>()) ||
         update_if(Mixture<kBF16, kBF16, kAs<kCoded, kF32>...>()) ||
         update_if(Mixture<kF32, kF32, kAs<kCoded, kBF16>...>()) ||
         update_if(Mixture<kF32, kF32, kCoded...>()));
  return first;
}

// As far as these streams are such a mixture; returns where it has stopped.
template <class Rule>
int64_t update_if_usual(const Rule& rule, float grad_scale, const Stream* streams,
                        const Origin& origin, int64_t first, int64_t count,
                        const void* const* next) {
  using States = typename InEightBits<Rule>::States;
  if constexpr (!std::is_same_v<States, DTypes<>>) {
    const bool aligned =
        origin.rows.length % kBlock == 0 || !has_blocks(streams[kFirstState].dtype);
    if (!aligned || first % kBlock || (origin.first + first) % kRandomBlock) return first;
    return update_if_any(States(), rule, grad_scale, streams, origin, first, count, next);
  }
  return first;
}
