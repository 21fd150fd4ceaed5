// How a thread of a CUDA device accesses memory: in words of 16 bytes, or one element at a time.
// Included by codecs.h, inside its namespace.
#pragma once

#include "numeric/codec.h"

#if defined(__CUDA_ARCH__)
#define FUSEDOPT_PRAGMA(text) _Pragma(#text)
#define FUSEDOPT_UNROLL(times) FUSEDOPT_PRAGMA(unroll times)
#else
#define FUSEDOPT_UNROLL(times)
#endif

// The same x, of which a compiler knows nothing: it would keep sums of what addresses are made of,
// in more registers, and make each address in more instructions.
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

// A compiler that sees accesses of a struct may cut them into parts: stores, and loads of doubles.
template <int kBytes, bool kOfDoubles>
FUSEDOPT_FN Word<kBytes> load_word(const char* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16 && kOfDoubles) {
    Word<kBytes> word;
    uint32_t* const parts = word.parts;
    asm("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
        : "l"(from));
    return word;
  }
#endif
  return *reinterpret_cast<const Word<kBytes>*>(on_device(from));
}

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
template <int kBytes, bool kOfDoubles = false>
FUSEDOPT_FN void copy_from(const char* from, uint32_t* parts) {
  if constexpr (kBytes == 1) {
    *parts = *reinterpret_cast<const uint8_t*>(on_device(from));
  } else if constexpr (kBytes == 2) {
    *parts = *reinterpret_cast<const uint16_t*>(on_device(from));
  } else {
    constexpr int kWord = kBytes < 16 ? kBytes : 16;
    FUSEDOPT_UNROLL()
    for (int at = 0; at < kBytes; at += kWord) {
      const auto word = load_word<kWord, kOfDoubles>(from + at);
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
