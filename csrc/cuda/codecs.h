// What the streams of an update are stored as, and which of them a kernel takes. Included by
// update.h, inside its namespace.
#pragma once

#include "cuda/access.h"
#include "numeric/blocks.h"

// ---- streams ------------------------------------------------------------------------------------

// Where a stream begins in a tile.
struct Place {
  char *data, *second;
};

// Which group of its elements a thread has, and in which block of them.
struct Spot {
  int group, block;
};

// Those elements as they are stored.
struct Group {
  uint32_t first[8], second[8];
  uint32_t scale;
};

struct None {};

// A stream of one array or two.
template <class First, class Second = None>
struct Arrays {
  static constexpr bool kHasBlocks = false, kIsRandom = false;
  static constexpr bool kIsPair = !std::is_same_v<Second, None>;
  static constexpr int kSize = sizeof(First), kSecondSize = kIsPair ? sizeof(Second) : 0;

  template <int kWidth>
  FUSEDOPT_FN static void load(const Place& from, Spot at, Group* to) {
    const char* const data = from.data + int64_t{at.group} * (kWidth * kSize);
    copy_from<kWidth * kSize, std::is_same_v<First, double>>(data, to->first);
    if constexpr (kIsPair) {
      copy_from<kWidth * kSecondSize>(from.second + int64_t{at.group} * (kWidth * kSecondSize),
                                      to->second);
    }
  }
  template <int kWidth>
  FUSEDOPT_FN static void store(const Group& from, const Place& to, Spot at, bool) {
    copy_to<kWidth * kSize>(to.data + int64_t{at.group} * (kWidth * kSize), from.first);
    if constexpr (kIsPair) {
      copy_to<kWidth * kSecondSize>(to.second + int64_t{at.group} * (kWidth * kSecondSize),
                                    from.second);
    }
  }
};

template <class Number>
struct Numbers : Arrays<Number> {
  FUSEDOPT_FN static auto read(const Group& from, int i) {
    return decode(get<Number>(from.first, i));
  }
  template <class T>
  FUSEDOPT_FN static void write(T x, int i, uint32_t, Group* to) {
    Number number;
    encode(x, number);
    set(to->first, i, number);
  }
};

template <class Number>
struct AtRandom : Numbers<Number> {
  static constexpr bool kIsRandom = true;
  FUSEDOPT_FN static void write(float x, int i, uint32_t random, Group* to) {
    set(to->first, i, round_at_random(x, bits_for_parameter(random), Number{}));
  }
};

template <class Pair, class Second>
struct Pairs : Arrays<uint16_t, Second> {
  FUSEDOPT_FN static float read(const Group& from, int i) {
    return decode(Pair{get<uint16_t>(from.first, i), get<Second>(from.second, i)});
  }
  FUSEDOPT_FN static void write(float x, int i, uint32_t, Group* to) {
    Pair pair;
    encode(x, pair);
    const auto [first, second] = pair;
    set(to->first, i, first);
    set(to->second, i, second);
  }
};

template <class Code>
struct Codes : Arrays<uint8_t> {
  static constexpr bool kHasBlocks = true, kIsRandom = true;

  template <int kWidth>
  FUSEDOPT_FN static void load(const Place& from, Spot at, Group* to) {
    Arrays<uint8_t>::load<kWidth>(from, at, to);
    to->scale = static_cast<uint8_t>(from.second[at.block]);
  }
  // One thread of a block stores its scale.
  template <int kWidth>
  FUSEDOPT_FN static void store(const Group& from, const Place& to, Spot at, bool stores_scale) {
    Arrays<uint8_t>::store<kWidth>(from, to, at, stores_scale);
    if (stores_scale) to.second[at.block] = static_cast<char>(from.scale);
  }
  FUSEDOPT_FN static float read(const Group& from, int i) {
    const float up = power_of_two(static_cast<int>(from.scale) - 127);
    return decode<Code>(get<uint8_t>(from.first, i), up);
  }
  FUSEDOPT_FN static void set_scale(uint32_t largest, Group* to) {
    to->scale = static_cast<uint32_t>(scale_of<Code>(largest));
  }
  FUSEDOPT_FN static void write(float x, int i, uint32_t random, Group* to) {
    const float down = power_of_two(127 - static_cast<int>(to->scale));
    set(to->first, i, encode<Code>(x, down, random));
  }
};

template <DType kStored>
struct Codec;
template <>
struct Codec<DType::f32> : Numbers<float> {};
template <>
struct Codec<DType::f64> : Numbers<double> {};
template <>
struct Codec<DType::bf16> : Numbers<BFloat16> {};
template <>
struct Codec<DType::f16> : Numbers<Float16> {};
template <>
struct Codec<DType::bf16_random> : AtRandom<BFloat16> {};
template <>
struct Codec<DType::f16_random> : AtRandom<Float16> {};
template <>
struct Codec<DType::bf16_split> : Pairs<SplitFloat, int16_t> {};
template <>
struct Codec<DType::f16_master> : Pairs<MasterFloat, float> {};
template <>
struct Codec<DType::e4m3> : Codes<E4M3> {};
template <>
struct Codec<DType::e5m3> : Codes<E5M3> {};

// ---- kinds --------------------------------------------------------------------------------------

// Which streams a kernel takes: with<s>(dtype, f) calls f(codec) for stream number s.
template <DType... kStored>
struct Fixed;
template <DType kP, DType kG, DType kState0, DType kState1, DType kState2>
struct Fixed<kP, kG, kState0, kState1, kState2> {
  static constexpr bool kDouble = kP == DType::f64;
  static constexpr bool kFloat = kP == DType::f32 && kG == DType::f32 && kState0 == DType::f32;
  using Compute = std::conditional_t<kDouble, double, float>;
  static constexpr int kWidth = kDouble ? 2 : kFloat ? 4 : 8;  // elements of a group
  // Blocks of threads on a multiprocessor, which leaves each thread so many registers.
  static constexpr int kBlocks = kDouble || has_blocks(kState0) ? 2 : kFloat ? 4 : 3;

  template <int s, class F>
  FUSEDOPT_FN static void with(DType, F f) {
    f(Codec<s == kParam            ? kP
            : s == kGrad           ? kG
            : s == kFirstState     ? kState0
            : s == kFirstState + 1 ? kState1
                                   : kState2>());
  }
};

// Of any mixture of numbers but doubles. A dtype is the same for all threads of a block, and so is
// the way that they take.
struct AnyNumbers {
  static constexpr bool kDouble = false;
  using Compute = float;
  static constexpr int kWidth = 8, kBlocks = 2;

  template <int s, class F>
  FUSEDOPT_FN static void with(DType dtype, F f) {
    switch (dtype) {
      case DType::f32: return f(Codec<DType::f32>());
      case DType::bf16: return f(Codec<DType::bf16>());
      default: return f(Codec<DType::f16>());
    }
  }
};

// Of any mixture at all, one by one: there are too many.
struct AnyCodecs {
  static constexpr bool kDouble = false;
  using Compute = float;
  static constexpr int kWidth = 1, kBlocks = 2;

  template <int s, class F>
  FUSEDOPT_FN static void with(DType dtype, F f) {
    if constexpr (s == kParam) {
      switch (dtype) {
        case DType::bf16_split: return f(Codec<DType::bf16_split>());
        case DType::f16_master: return f(Codec<DType::f16_master>());
        case DType::bf16_random: return f(Codec<DType::bf16_random>());
        case DType::f16_random: return f(Codec<DType::f16_random>());
        default: break;
      }
    } else if constexpr (s >= kFirstState) {
      if (dtype == DType::e4m3) return f(Codec<DType::e4m3>());
      if (dtype == DType::e5m3) return f(Codec<DType::e5m3>());
    }
    AnyNumbers::with<s>(dtype, f);
  }
};

template <int kNumber>
struct KindOf : Fixed<kKinds[kNumber][0], kKinds[kNumber][1], kKinds[kNumber][2],
                      kKinds[kNumber][3], kKinds[kNumber][4]> {};
template <>
struct KindOf<kAnyNumbers> : AnyNumbers {};
template <>
struct KindOf<kAnyCodecs> : AnyCodecs {};
