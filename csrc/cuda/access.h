// How a thread of a CUDA device reads and writes the streams of an update: in words of 16 bytes
// where they are aligned, whatever is stored. Included by device.h, inside its namespace.
#pragma once

#include "numeric/codec.h"

#if defined(__CUDA_ARCH__)
#define FUSEDOPT_PRAGMA(text) _Pragma(#text)
#define FUSEDOPT_UNROLL(times) FUSEDOPT_PRAGMA(unroll times)
#else
#define FUSEDOPT_UNROLL(times)
#endif

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
