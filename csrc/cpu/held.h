// Blocks of streams in registers: how each is loaded there, and stored again. Included inside the
// ISA's namespace.
#pragma once

#include "cpu/tiles.h"

// ---- a block of a stream ------------------------------------------------------------------------

// Where the random bits of a block are.
struct RandomOfBlock {
  const uint16_t* halves;
  BlockBits bits;  // for E4M3
};

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

// float or BFloat16.
template <class Stored>
struct HeldNumbers : HeldLanes {
  FUSEDOPT_FN bool load(const Stream& from, int64_t at) {
    const auto* data = reinterpret_cast<const Stored*>(from.data) + at;
    load_each([data](int i) { return load_in_halves(data + i); });
    return true;
  }
  FUSEDOPT_FN bool is_rare() { return !std::is_same_v<Stored, float> && has_nan(); }
  FUSEDOPT_FN void store(const Stream& to, int64_t at, const RandomOfBlock&) const {
    auto* data = reinterpret_cast<Stored*>(to.data) + at;
    store_each([data](BFloat16Vec x, int i) { store_in_halves(x, data + i); });
  }
};
template <>
struct Held<DType::f32> : HeldNumbers<float> {};
template <>
struct Held<DType::bf16> : HeldNumbers<BFloat16> {};

template <>
struct Held<DType::bf16_random> : Held<DType::bf16> {
  static constexpr bool kRandom = true;
  FUSEDOPT_FN void store(const Stream& to, int64_t at, const RandomOfBlock& random) const {
    auto* data = reinterpret_cast<BFloat16*>(to.data) + at;
    store_each([data, halves = random.halves](BFloat16Vec x, int i) {
      store_at_random(x, load_halves(halves + i), data + i);
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
  FUSEDOPT_FN void store(const Stream& to, int64_t at, const RandomOfBlock&) const {
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
    return Block<Code>::load(
        reinterpret_cast<const uint8_t*>(from.data) + at,
        reinterpret_cast<const uint8_t*>(from.second)[static_cast<uint64_t>(at) / kBlock]);
  }
  FUSEDOPT_FN bool is_rare() {
    most = this->largest();
    return Block<Code>::is_rare(most);
  }
  FUSEDOPT_FN void store(const Stream& to, int64_t at, const RandomOfBlock& random) const {
    Block<Code>::store(most, Code::kSigned ? random.bits : random.bits.for_other_code(),
                       reinterpret_cast<uint8_t*>(to.data) + at,
                       reinterpret_cast<uint8_t*>(to.second) + static_cast<uint64_t>(at) / kBlock);
  }
};
template <>
struct Held<DType::e4m3> : HeldBlock<E4M3> {};
template <>
struct Held<DType::e5m3> : HeldBlock<E5M3> {};

// ---- blocks of the states -----------------------------------------------------------------------

template <DType... kStored>  // none, at the end
struct HeldStates {
  static constexpr bool kRandom = false;
  FUSEDOPT_FN bool load(const Stream*, int64_t) { return true; }
  FUSEDOPT_FN void lanes_to(BFloat16Vec*, int) const {}
  FUSEDOPT_FN void lanes_from(const BFloat16Vec*, int) {}
  FUSEDOPT_FN bool is_rare() { return false; }
  FUSEDOPT_FN void store(const Stream*, int64_t, const RandomOfBlock&) const {}
};

template <DType kFirst, DType... kOthers>
struct HeldStates<kFirst, kOthers...> {
  Held<kFirst> first;
  HeldStates<kOthers...> others;
  static constexpr bool kRandom = Held<kFirst>::kRandom || HeldStates<kOthers...>::kRandom;

  FUSEDOPT_FN bool load(const Stream* from, int64_t at) {
    return first.load(*from, at) & others.load(from + 1, at);
  }
  FUSEDOPT_FN void lanes_to(BFloat16Vec* state, int i) const {
    *state = first.lanes[i];
    others.lanes_to(state + 1, i);
  }
  FUSEDOPT_FN void lanes_from(const BFloat16Vec* state, int i) {
    first.lanes[i] = *state;
    others.lanes_from(state + 1, i);
  }
  FUSEDOPT_FN bool is_rare() { return first.is_rare() | others.is_rare(); }
  FUSEDOPT_FN void store(const Stream* to, int64_t at, const RandomOfBlock& random) const {
    first.store(*to, at, random);
    others.store(to + 1, at, random);
  }
};
