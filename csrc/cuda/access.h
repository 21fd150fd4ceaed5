// How a thread of a CUDA device reads and writes the streams of an update, whatever is stored: in
// words of 16 bytes, or one element at a time. Included by device.h, inside its namespace.
#pragma once

#include "numeric/codec.h"

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
  if constexpr (kBytes == 2) {
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
  if constexpr (kBytes == 2) {
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
  if constexpr (sizeof(Element) == 2) {
    return bit_cast<Element>(static_cast<uint16_t>(parts[i / 2] >> (i % 2 * 16)));
  } else if constexpr (sizeof(Element) == 4) {
    return bit_cast<Element>(parts[i]);
  } else {
    return bit_cast<Element>(uint64_t{parts[2 * i]} | uint64_t{parts[2 * i + 1]} << 32);
  }
}

template <class Element>
FUSEDOPT_FN void set(uint32_t* parts, int i, Element element) {
  if constexpr (sizeof(Element) == 2) {
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

// The elements of a stream that a thread has at a time, as they are stored.
struct Group {
  uint32_t parts[8];
};

// A stream of numbers.
template <class Number>
struct Numbers {
  static constexpr int kSize = sizeof(Number);

  template <int kWidth>
  FUSEDOPT_FN static void load(const char* data, int group, Group* to) {
    copy_from<kWidth * kSize>(data + int64_t{group} * (kWidth * kSize), to->parts);
  }
  template <int kWidth>
  FUSEDOPT_FN static void store(const Group& from, char* data, int group) {
    copy_to<kWidth * kSize>(data + int64_t{group} * (kWidth * kSize), from.parts);
  }
  FUSEDOPT_FN static auto read(const Group& from, int i) {
    return decode(get<Number>(from.parts, i));
  }
  template <class T>
  FUSEDOPT_FN static void write(T x, int i, Group* to) {
    Number number;
    encode(x, number);
    set(to->parts, i, number);
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

// ---- kinds --------------------------------------------------------------------------------------

// Which streams a kernel takes: with<s>(dtype, f) calls f(codec) for stream number s.
template <DType... kStored>
struct Fixed;
template <DType kP, DType kG, DType kState0, DType kState1, DType kState2>
struct Fixed<kP, kG, kState0, kState1, kState2> {
  static constexpr bool kDouble = kP == DType::f64, kFloat = kP == DType::f32 && kG == DType::f32;
  using Compute = std::conditional_t<kDouble, double, float>;
  static constexpr int kWidth = kDouble ? 2 : kFloat ? 4 : 8;   // elements of a group
  static constexpr int kBlocks = kDouble ? 2 : kFloat ? 4 : 3;  // of threads, on a multiprocessor

  template <int s, class F>
  FUSEDOPT_FN static void with(DType, F f) {
    f(Codec<s == kParam            ? kP
            : s == kGrad           ? kG
            : s == kFirstState     ? kState0
            : s == kFirstState + 1 ? kState1
                                   : kState2>());
  }
};

// Of any mixture. A dtype is the same for all threads of a block, and so is the way that they take.
struct Any {
  static constexpr bool kDouble = false;
  using Compute = float;
  static constexpr int kWidth = 8;
  static constexpr int kBlocks = 2;

  template <int s, class F>
  FUSEDOPT_FN static void with(DType dtype, F f) {
    switch (dtype) {
      case DType::f32: return f(Codec<DType::f32>());
      case DType::bf16: return f(Codec<DType::bf16>());
      default: return f(Codec<DType::f16>());
    }
  }
};

template <int kNumber>
struct KindOf : Fixed<kKinds[kNumber][0], kKinds[kNumber][1], kKinds[kNumber][2],
                      kKinds[kNumber][3], kKinds[kNumber][4]> {};
template <>
struct KindOf<kAnyKind> : Any {};
