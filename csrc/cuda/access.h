// How a thread of a CUDA device reads and writes the streams of an update, whatever is stored: in
// words of 16 bytes, or one element at a time. Included by device.h, inside its namespace.
#pragma once

#include "numeric/blocks.h"

#if defined(__CUDA_ARCH__)
#define FUSEDOPT_PRAGMA(text) _Pragma(#text)
#define FUSEDOPT_UNROLL(times) FUSEDOPT_PRAGMA(unroll times)
#else
#define FUSEDOPT_UNROLL(times)
#endif

// The same, of which a compiler knows nothing: it would keep sums of what addresses are made of, in
// more registers, and make each address in more instructions.
FUSEDOPT_FN int opaque(int x) {
#if defined(__CUDA_ARCH__)
  asm("" : "+r"(x));
#endif
  return x;
}
FUSEDOPT_FN char* opaque(char* x) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(x));
#endif
  return x;
}

// An address of the device's own memory, for which there are instructions.
template <class T>
FUSEDOPT_FN T* on_device(T* address) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

// ---- words --------------------------------------------------------------------------------------

template <int kBytes>
struct alignas(kBytes) Word {
  uint32_t parts[kBytes / 4];
};

// A compiler that sees a store of a struct may cut it into parts.
template <int kBytes>
FUSEDOPT_FN void store_word(const Word<kBytes>& word, char* to) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16) {
    const uint32_t* const parts = word.parts;
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(parts[0]), "r"(parts[1]),
                 "r"(parts[2]), "r"(parts[3])
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Word<kBytes>*>(on_device(to)) = word;
}

// Between memory and registers, where fewer than four bytes have a register, too.
template <int kBytes>
FUSEDOPT_FN void copy_from(const char* from, uint32_t* parts) {
  if constexpr (kBytes == 1) {
    *parts = *reinterpret_cast<const uint8_t*>(on_device(from));
  } else if constexpr (kBytes == 2) {
    *parts = *reinterpret_cast<const uint16_t*>(on_device(from));
  } else {
    constexpr int kWord = kBytes < 16 ? kBytes : 16;
    FUSEDOPT_UNROLL()
    for (int at = 0; at < kBytes; at += kWord) {
      const auto word = *reinterpret_cast<const Word<kWord>*>(on_device(from + at));
      FUSEDOPT_UNROLL()
      for (int i = 0; i < kWord / 4; ++i) parts[at / 4 + i] = word.parts[i];
    }
  }
}

template <int kBytes>
FUSEDOPT_FN void copy_to(char* to, const uint32_t* parts) {
  if constexpr (kBytes == 1) {
    *reinterpret_cast<uint8_t*>(on_device(to)) = static_cast<uint8_t>(*parts);
  } else if constexpr (kBytes == 2) {
    *reinterpret_cast<uint16_t*>(on_device(to)) = static_cast<uint16_t>(*parts);
  } else {
    constexpr int kWord = kBytes < 16 ? kBytes : 16;
    FUSEDOPT_UNROLL()
    for (int at = 0; at < kBytes; at += kWord) {
      Word<kWord> word;
      FUSEDOPT_UNROLL()
      for (int i = 0; i < kWord / 4; ++i) word.parts[i] = parts[at / 4 + i];
      store_word(word, to + at);
    }
  }
}

// Element i of what lies in registers; set() has to be called in order.
template <class Element>
FUSEDOPT_FN Element get(const uint32_t* parts, int i) {
  if constexpr (sizeof(Element) == 1) {
    return static_cast<uint8_t>(parts[i / 4] >> (i % 4 * 8));
  } else if constexpr (sizeof(Element) == 2) {
    return bit_cast<Element>(static_cast<uint16_t>(parts[i / 2] >> (i % 2 * 16)));
  } else if constexpr (sizeof(Element) == 4) {
    return bit_cast<Element>(parts[i]);
  } else {
    return bit_cast<Element>(uint64_t{parts[2 * i]} | uint64_t{parts[2 * i + 1]} << 32);
  }
}

template <class Element>
FUSEDOPT_FN void set(uint32_t* parts, int i, Element element) {
  if constexpr (sizeof(Element) == 1) {
    const uint32_t bits = uint32_t{element} << (i % 4 * 8);
    parts[i / 4] = i % 4 ? parts[i / 4] | bits : bits;
  } else if constexpr (sizeof(Element) == 2) {
    const uint32_t bits = bit_cast<uint16_t>(element);
    parts[i / 2] = i % 2 ? parts[i / 2] | bits << 16 : bits;
  } else if constexpr (sizeof(Element) == 4) {
    parts[i] = bit_cast<uint32_t>(element);
  } else {
    const auto bits = bit_cast<uint64_t>(element);
    parts[2 * i] = static_cast<uint32_t>(bits);
    parts[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
  }
}

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
    copy_from<kWidth * kSize>(from.data + int64_t{at.group} * (kWidth * kSize), to->first);
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
