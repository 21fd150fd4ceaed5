// Usual mixtures of streams without a detour: a block of each is decoded to registers, and what is
// rare is left to tiles, where the conversions of a stream and the arithmetic of the rule come one
// after the other instead of side by side. Included inside the ISA's namespace.
#pragma once

#include "cpu/tiles.h"
#include "rules/list.h"

// ---- a block of a stream ------------------------------------------------------------------------

// load() and is_rare(), which is asked after the update and before any store(): whether the block
// has to be done in tiles.
template <DType kStored>
struct Held;

struct HeldLanes {
  BFloat16Vec lanes[kInBlock];
  static constexpr bool kRandom = false;

  template <class Load>
  FUSEDOPT_FN void load_each(Load load) {
    for (int i = 0; i < kInBlock; ++i) lanes[i] = load(i * BFloat16Vec::kLanes);
  }
  template <class Store>
  FUSEDOPT_FN void store_each(Store store) const {
    for (int i = 0; i < kInBlock; ++i) store(lanes[i], i * BFloat16Vec::kLanes);
  }
  FUSEDOPT_FN bool has_nan() const {
    Ints nan{};
    for (const BFloat16Vec& x : lanes) nan |= is_nan(x);
    return any_lane(nan);
  }
};

template <>
struct Held<DType::f32> : HeldLanes {
  FUSEDOPT_FN bool load(const Stream& from, int64_t at) {
    const auto* data = reinterpret_cast<const float*>(from.data) + at;
    load_each([data](int i) { return load_floats(data + i); });
    return true;
  }
  FUSEDOPT_FN bool is_rare() { return false; }
  FUSEDOPT_FN void store(const Stream& to, int64_t at, const uint16_t*) const {
    auto* data = reinterpret_cast<float*>(to.data) + at;
    store_each([data](BFloat16Vec x, int i) { store_floats(x, data + i); });
  }
};

template <>
struct Held<DType::bf16> : HeldLanes {
  FUSEDOPT_FN bool load(const Stream& from, int64_t at) {
    const auto* data = reinterpret_cast<const BFloat16*>(from.data) + at;
    load_each([data](int i) { return load_in_halves(data + i); });
    return true;
  }
  FUSEDOPT_FN bool is_rare() { return has_nan(); }
  FUSEDOPT_FN void store(const Stream& to, int64_t at, const uint16_t*) const {
    auto* data = reinterpret_cast<BFloat16*>(to.data) + at;
    store_each([data](BFloat16Vec x, int i) { store_in_halves(x, data + i); });
  }
};

template <>
struct Held<DType::bf16_random> : Held<DType::bf16> {
  static constexpr bool kRandom = true;
  FUSEDOPT_FN void store(const Stream& to, int64_t at, const uint16_t* random) const {
    auto* data = reinterpret_cast<BFloat16*>(to.data) + at;
    store_each([data, random](BFloat16Vec x, int i) {
      store_at_random(x, load_halves(random + i), data + i);
    });
  }
};

template <>
struct Held<DType::bf16_split> : HeldLanes {
  FUSEDOPT_FN bool load(const Stream& from, int64_t at) {
    const auto* data = reinterpret_cast<const uint16_t*>(from.data) + at;
    const auto* second = reinterpret_cast<const uint16_t*>(from.second) + at;
    load_each([=](int i) { return load_split(data + i, second + i); });
    return true;  // what is rare is NaN, and stays it
  }
  FUSEDOPT_FN bool is_rare() { return has_nan(); }
  FUSEDOPT_FN void store(const Stream& to, int64_t at, const uint16_t*) const {
    auto* data = reinterpret_cast<uint16_t*>(to.data) + at;
    auto* second = reinterpret_cast<uint16_t*>(to.second) + at;
    store_each([=](BFloat16Vec x, int i) { store_split(x, data + i, second + i); });
  }
};

template <class Code>
struct HeldBlock : Block<Code> {
  static constexpr bool kRandom = true;
  uint32_t most;
  FUSEDOPT_FN bool load(const Stream& from, int64_t at) {
    return Block<Code>::load(reinterpret_cast<const uint8_t*>(from.data) + at,
                             reinterpret_cast<const uint8_t*>(from.second)[at / kBlock]);
  }
  FUSEDOPT_FN bool is_rare() {
    most = this->largest();
    return Block<Code>::is_rare(most);
  }
  FUSEDOPT_FN void store(const Stream& to, int64_t at, const uint16_t* random) const {
    Block<Code>::store(most, random, reinterpret_cast<uint8_t*>(to.data) + at,
                       reinterpret_cast<uint8_t*>(to.second) + at / kBlock);
  }
};
template <>
struct Held<DType::e4m3> : HeldBlock<E4M3> {};
template <>
struct Held<DType::e5m3> : HeldBlock<E5M3> {};

// ---- an update ----------------------------------------------------------------------------------

constexpr int64_t kUnit = kRandomTile;

// Asks for a unit of a stream, `ahead` of that at element `first`. (A number may point anywhere.)
template <int64_t kSize>
FUSEDOPT_FN void prefetch_unit(uintptr_t ahead, int64_t first) {
  const uintptr_t from = ahead + static_cast<uintptr_t>(first * kSize);
  for (uintptr_t at = 0; at < kUnit * kSize; at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + at));
  }
}

// Of a rule with two states. Returns where it has stopped: after the last whole unit.
template <DType kParamType, DType kGradType, DType kState0, DType kState1, class Rule>
[[gnu::noinline]] int64_t update_in_registers(const Rule& given, float grad_scale,
                                              const Stream* streams, const Origin& origin,
                                              int64_t first, int64_t count,
                                              const void* const* next) {
  constexpr bool kRandom =
      Held<kParamType>::kRandom || Held<kState0>::kRandom || Held<kState1>::kRandom;
  constexpr int64_t kSizes[] = {item_size(kParamType), item_size(kGradType), item_size(kState0),
                                item_size(kState1), second_size(kParamType)};
  // Copies that nothing stored can change.
  const Rule rule = given;
  const Stream param = streams[kParam], grad = streams[kGrad], first_state = streams[kFirstState],
               second_state = streams[kFirstState + 1];
  const int64_t offset = origin.first;
  const char* const arrays[] = {streams[0].data, streams[1].data, streams[2].data, streams[3].data,
                                streams[kParam].second};
  // As many elements of each, so that all come to their ends together, and go on at `next`.
  constexpr int64_t kAhead = kPrefetchBytes / 2;
  uintptr_t ahead[5];
  const auto ask_for = [&](auto from) {
    for (int s = 0; s < 5; ++s) ahead[s] = from(s);
  };
  alignas(kVectorBytes) uint16_t random[kUnit];
  const RandomBits random_bits(origin.key, origin.draw);
  const int64_t end = first + count;
  ask_for([&](int s) {
    return reinterpret_cast<uintptr_t>(arrays[s]) + static_cast<uintptr_t>(kAhead * kSizes[s]);
  });
  bool here = true;
  for (; first + kUnit <= end; first += kUnit) {
    if (here && first + kAhead >= end) {
      here = false;
      ask_for([&](int s) {
        const void* const then = next[s == 4 ? kParam : s];
        return reinterpret_cast<uintptr_t>(then) +
               static_cast<uintptr_t>((kAhead - end) * kSizes[s]);
      });
    }
    prefetch_unit<kSizes[0]>(ahead[0], first);
    prefetch_unit<kSizes[1]>(ahead[1], first);
    prefetch_unit<kSizes[2]>(ahead[2], first);
    prefetch_unit<kSizes[3]>(ahead[3], first);
    prefetch_unit<kSizes[4]>(ahead[4], first);
    if (kRandom) {
      random_bits(static_cast<uint64_t>(offset + first) / kRandomBlock, random);
    }
    for (int64_t at = first; at < first + kUnit; at += kBlock) {
      Held<kParamType> p;
      Held<kGradType> g;
      Held<kState0> m;
      Held<kState1> v;
      const bool usual =
          p.load(param, at) & g.load(grad, at) & m.load(first_state, at) & v.load(second_state, at);
      for (int i = 0; i < kInBlock; ++i) {
        BFloat16Vec state[kMaxStates] = {m.lanes[i], v.lanes[i]};
        rule(p.lanes[i], g.lanes[i] * grad_scale, state);
        m.lanes[i] = state[0];
        v.lanes[i] = state[1];
      }
      if (!usual | p.is_rare() | m.is_rare() | v.is_rare()) {
        update_in_tiles(given, grad_scale, streams, origin, at, kBlock, next);
        continue;
      }
      const uint16_t* const bits = random + (at - first);
      p.store(param, at, bits);
      m.store(first_state, at, bits);
      v.store(second_state, at, bits);
    }
  }
  return first;
}

// Rules that are worth it.
template <class Rule>
constexpr bool kIsHot = false;
template <bool kCoupled>
constexpr bool kIsHot<Adam<float, kCoupled, false>> = true;

// As far as these streams are such a mixture.
template <class Rule>
int64_t update_if_usual(const Rule& rule, float grad_scale, const Stream* streams,
                        const Origin& origin, int64_t first, int64_t count,
                        const void* const* next) {
  if constexpr (kIsHot<Rule>) {
    const bool aligned =
        origin.rows.length % kBlock == 0 || !has_blocks(streams[kFirstState].dtype);
    if (!aligned || first % kBlock || (origin.first + first) % kRandomBlock) return first;
    const auto are = [streams](DType p, DType g, DType m, DType v) {
      return streams[kParam].dtype == p && streams[kGrad].dtype == g &&
             streams[kFirstState].dtype == m && streams[kFirstState + 1].dtype == v;
    };
#define FUSEDOPT_MIXTURE(p, g, m, v)                                    \
  if (are(DType::p, DType::g, DType::m, DType::v)) {                    \
    return update_in_registers<DType::p, DType::g, DType::m, DType::v>( \
        rule, grad_scale, streams, origin, first, count, next);         \
  }
    FUSEDOPT_MIXTURE(bf16_split, bf16, f32, f32)
    FUSEDOPT_MIXTURE(bf16_split, bf16, bf16, bf16)
    FUSEDOPT_MIXTURE(bf16_split, bf16, e4m3, e5m3)
    FUSEDOPT_MIXTURE(bf16_random, bf16, bf16, bf16)
    FUSEDOPT_MIXTURE(bf16_random, bf16, e4m3, e5m3)
    FUSEDOPT_MIXTURE(bf16_random, bf16, f32, f32)
    FUSEDOPT_MIXTURE(bf16, bf16, f32, f32)
    FUSEDOPT_MIXTURE(f32, f32, bf16, bf16)
    FUSEDOPT_MIXTURE(f32, f32, e4m3, e5m3)
#undef FUSEDOPT_MIXTURE
  }
  return first;
}
