// Any mixture of streams: each is decoded to a small array in compute precision, and encoded again.
// Included inside the ISA's namespace.
#pragma once

#include "cpu/apply.h"
#include "numeric/vec_codec.h"

// Small enough that five scratch tiles stay in the first-level cache.
constexpr int64_t kTile = 256;

// ---- codecs of two arrays, or with random bits --------------------------------------------------

template <class Pair>
using Second = std::conditional_t<std::is_same_v<Pair, SplitFloat>, int16_t, float>;

template <class Pair, class T>
void decode_pairs(const char* data, const char* second, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Pair pair;
    Second<Pair> other;
    std::memcpy(&pair.bits, data + 2 * i, 2);
    std::memcpy(&other, second + i * int64_t{sizeof(other)}, sizeof(other));
    to[i] = decode(Pair{pair.bits, other});
  }
}

template <class Pair, class T>
void encode_pairs(const T* from, char* data, char* second, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Pair pair;
    encode(static_cast<float>(from[i]), pair);
    const auto [bits, other] = pair;
    std::memcpy(data + 2 * i, &bits, 2);
    std::memcpy(second + i * int64_t{sizeof(other)}, &other, sizeof(other));
  }
}

template <class Stored, class T>
void encode_at_random(const T* from, char* data, int64_t n, const uint16_t* random) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_for_parameter(uint32_t{random[i]});
    const uint16_t rounded = round_at_random(static_cast<float>(from[i]), bits, Stored{});
    std::memcpy(data + 2 * i, &rounded, 2);
  }
}

// Calls f(element of the tile, count, scale) for the blocks of elements [first, first + n), which
// are whole.
template <class F>
FUSEDOPT_FN void for_each_block(const Stream& stream, const Rows& rows, int64_t first, int64_t n,
                                F f) {
  auto* scale = reinterpret_cast<uint8_t*>(stream.second) + rows.block_of(first);
  for (int64_t at = 0; at < n; ++scale) {
    const int64_t end = rows.end_of_block(first + at) - first;
    const int64_t count = (end < n ? end : n) - at;
    f(at, count, *scale);
    at += count;
  }
}

template <class Code, class T>
void decode_blocks(const Stream& from, const Rows& rows, int64_t first, T* to, int64_t n) {
  const auto* codes = reinterpret_cast<const uint8_t*>(from.data) + first;
  for_each_block(from, rows, first, n, [&](int64_t at, int64_t count, uint8_t scale) {
    if constexpr (std::is_same_v<T, float>) {
      Block<Code> block;
      if (count == kBlock && block.load(codes + at, scale)) return block.to_memory(to + at);
    }
    const float up = power_of_two(scale - 127);
    for (int64_t i = at; i < at + count; ++i) to[i] = decode<Code>(codes[i], up);
  });
}

template <class Code, class T>
void encode_blocks(const T* from, const Stream& to, const Rows& rows, int64_t first, int64_t n,
                   const uint16_t* random) {
  auto* codes = reinterpret_cast<uint8_t*>(to.data) + first;
  for_each_block(to, rows, first, n, [&](int64_t at, int64_t count, uint8_t& scale) {
    if constexpr (std::is_same_v<T, float>) {
      if (count == kBlock) {
        const Block<Code> block = Block<Code>::from_memory(from + at);
        const uint32_t largest = block.largest();
        if (!block.is_rare(largest)) {
          return block.store(largest, BlockBits::load<Code>(random + at), codes + at, &scale);
        }
      }
    }
    uint32_t largest = 0;
    for (int64_t i = at; i < at + count; ++i) {
      const uint32_t magnitude = finite_magnitude(static_cast<float>(from[i]));
      largest = largest > magnitude ? largest : magnitude;
    }
    scale = static_cast<uint8_t>(scale_of<Code>(largest));
    const float down = power_of_two(127 - scale);
    for (int64_t i = at; i < at + count; ++i) {
      codes[i] = encode<Code>(static_cast<float>(from[i]), down, uint32_t{random[i]});
    }
  });
}

// Random bits of elements [first, first + n), within `bits`, which has room for two more tiles.
inline const uint16_t* random_tile(const Origin& origin, int64_t first, int64_t n, uint16_t* bits) {
  const RandomBits random(origin.key, origin.draw);
  const auto element = static_cast<uint64_t>(origin.first + first);
  const auto before = static_cast<int64_t>(element % kRandomBlock);
  uint64_t block = element / kRandomBlock;
  for (int64_t at = 0; at < before + n; at += kRandomTile, block += kRandomTile / kRandomBlock) {
    random(block, bits + at);
  }
  return bits + before;
}

// ---- tiles --------------------------------------------------------------------------------------

// Asks for what comes after a tile of `bytes` at `from`, in an array of which `left` are left from
// there on. Tiles of many arrays take turns, whatever the rule.
FUSEDOPT_FN void prefetch_tile(const char* from, int64_t bytes, int64_t left, const void* next) {
  const int64_t distance = bytes_ahead(kMaxStreams, left);
  for (int64_t at = 0; at < bytes; at += 64) prefetch(ahead_of(from, at, left, next, distance));
}

// Elements [first, first + n) of a stream that goes on to element `end`, and then at `next`.
template <class T>
void decode_tile(const Stream& from, const Rows& rows, int64_t first, T* to, int64_t n, int64_t end,
                 const void* next) {
  const int64_t size = item_size(from.dtype);
  const char* data = from.data + first * size;
  const char* second = from.second + first * second_size(from.dtype);
  prefetch_tile(data, n * size, (end - first) * size, next);
  switch (from.dtype) {
    case DType::f32: return decode_all<float>(data, to, n);
    case DType::f64: return decode_all<double>(data, to, n);
    case DType::bf16:
    case DType::bf16_random: return decode_all<BFloat16>(data, to, n);
    case DType::f16:
    case DType::f16_random: return decode_all<Float16>(data, to, n);
    case DType::bf16_split: return decode_pairs<SplitFloat>(data, second, to, n);
    case DType::f16_master: return decode_pairs<MasterFloat>(data, second, to, n);
    case DType::e4m3: return decode_blocks<E4M3>(from, rows, first, to, n);
    case DType::e5m3: return decode_blocks<E5M3>(from, rows, first, to, n);
  }
}

// `random` has 16 bits for each element, where the stream takes any.
template <class T>
void encode_tile(const T* from, const Stream& to, const Rows& rows, int64_t first, int64_t n,
                 const uint16_t* random) {
  char* data = to.data + first * item_size(to.dtype);
  char* second = to.second + first * second_size(to.dtype);
  switch (to.dtype) {
    case DType::f32: return encode_all<float>(from, data, n);
    case DType::f64: return encode_all<double>(from, data, n);
    case DType::bf16: return encode_all<BFloat16>(from, data, n);
    case DType::f16: return encode_all<Float16>(from, data, n);
    case DType::bf16_random: return encode_at_random<BFloat16>(from, data, n, random);
    case DType::f16_random: return encode_at_random<Float16>(from, data, n, random);
    case DType::bf16_split: return encode_pairs<SplitFloat>(from, data, second, n);
    case DType::f16_master: return encode_pairs<MasterFloat>(from, data, second, n);
    case DType::e4m3: return encode_blocks<E4M3>(from, to, rows, first, n, random);
    case DType::e5m3: return encode_blocks<E5M3>(from, to, rows, first, n, random);
  }
}

template <class T, class Rule>
[[gnu::noinline]] void update_in_tiles(const Rule& rule, T grad_scale, const Stream* streams,
                                       const Origin& origin, int64_t first, int64_t count,
                                       const void* const* next) {
  constexpr int kStreams = kFirstState + Rule::kStates;
  T scratch[kStreams][kTile];
  T* arrays[kStreams];
  bool in_blocks = false, at_random = false;
  for (int s = 0; s < kStreams; ++s) {
    arrays[s] = scratch[s];
    in_blocks = in_blocks || has_blocks(streams[s].dtype);
    at_random = at_random || (stores<Rule>(s) && takes_random_bits(streams[s].dtype));
  }
  alignas(kVectorBytes) uint16_t bits[kTile + 2 * kRandomTile];
  const uint16_t* random = bits;
  for (const int64_t end = first + count; first < end;) {
    int64_t n = end - first < kTile ? end - first : kTile;
    if (in_blocks && first + n < end) n = origin.rows.begin_of_block(first + n) - first;
    for (int s = 0; s < kStreams; ++s) {
      if (loads<Rule>(s)) {
        decode_tile(streams[s], origin.rows, first, scratch[s], n, end, next[s]);
      }
    }
    apply<Vec<T>, /*kAhead=*/false>(rule, grad_scale, arrays, n, nullptr);
    if (at_random) random = random_tile(origin, first, n, bits);
    for (int s = 0; s < kStreams; ++s) {
      if (stores<Rule>(s)) encode_tile(scratch[s], streams[s], origin.rows, first, n, random);
    }
    first += n;
  }
}
