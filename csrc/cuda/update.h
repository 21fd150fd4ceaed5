// An update, as the threads of a CUDA device make it. Included by device.h, inside its namespace.
#pragma once

#include "cuda/codecs.h"
#include "rules/list.h"
#include "rules/streams.h"

// ---- a tile -------------------------------------------------------------------------------------

template <class F, int... s>
FUSEDOPT_FN void for_each_stream(std::integer_sequence<int, s...>, F f) {
  (f(std::integral_constant<int, s>()), ...);
}

// A thread block's part of a parameter.
template <class Kind, class Rule_>
struct Tile {
  using Rule = Rule_;
  static constexpr int kStreams = kFirstState + Rule::kStates;

  int64_t first;
  int count;
  Place places[kStreams];  // copies, which nothing that is stored can change
  DType dtypes[kStreams];
  bool is_whole = true;  // groups of all streams are words, and lie within blocks
  bool has_blocks = false, is_random = false;
  Rows rows;
  // Of random bits: whose, in which step, and from which element on.
  uint32_t key = 0, draw = 0;
  uint64_t element = 0;

  // Calls f(codec, number of the stream as a type).
  template <class F>
  FUSEDOPT_FN void for_each(F f) const {
    for_each_stream(std::make_integer_sequence<int, kStreams>(), [&](auto s) {
      Kind::template with<decltype(s)::value>(dtypes[s], [&](auto codec) { f(codec, s); });
    });
  }

  FUSEDOPT_FN Tile(const UpdateItem& item, const Parts& parts, int64_t number) {
    FUSEDOPT_UNROLL()
    for (int s = 0; s < kStreams; ++s) dtypes[s] = item.dtypes[s];
    for_each([&](auto codec, auto s) {
      has_blocks = has_blocks || codec.kHasBlocks;
      is_random = is_random || (codec.kIsRandom && stores<Rule>(decltype(s)::value));
    });
    first = number * kTile;
    int64_t end = first + kTile;
    if (has_blocks) {
      rows = parts.rows;
      is_whole = rows.length % kBlock == 0;
      first = rows.next_block(first);
      if (end < item.numel) end = rows.next_block(end);
    }
    count = static_cast<int>((end < item.numel ? end : item.numel) - first);
    if (is_random) {
      const auto rounding = static_cast<uint64_t>(*parts.rounding);
      key = static_cast<uint32_t>(rounding >> 32) | parts.other_key;
      draw = static_cast<uint32_t>(rounding) - static_cast<uint32_t>(parts.draws_back);
      element = static_cast<uint64_t>(parts.first_element + first);
      is_whole = is_whole && element % 8 == 0;
    }
    for_each([&](auto codec, auto s) {
      Place& place = places[s];
      place.data = opaque(item.data[s] + first * codec.kSize);
      is_whole = is_whole && lies_in_words<codec.kSize>(place.data);
      if constexpr (codec.kIsPair) {
        place.second = opaque(parts.second[s] + first * codec.kSecondSize);
        is_whole = is_whole && lies_in_words<codec.kSecondSize>(place.second);
      } else if constexpr (codec.kHasBlocks) {
        place.second = opaque(parts.second[s] + rows.block_of(first));
      }
    });
  }

  template <int kSize>
  FUSEDOPT_FN static bool lies_in_words(const char* data) {
    constexpr int kBytes = Kind::kWidth * kSize;
    return reinterpret_cast<uintptr_t>(data) % (kBytes < 16 ? kBytes : 16) == 0;
  }

  // How many blocks there are from this element on, and where one of them begins and ends. (Where
  // nothing is in blocks, each but the last one has as many elements.)
  FUSEDOPT_FN int blocks_from(int from) const {
    if (has_blocks && count > from) {
      return static_cast<int>(rows.block_of(first + count - 1) - rows.block_of(first)) + 1;
    }
    return (count - from + static_cast<int>(kBlock) - 1) / static_cast<int>(kBlock);
  }
  FUSEDOPT_FN void find_block(int block, int from, int* begin, int* end) const {
    if (has_blocks) {
      const int64_t number = rows.block_of(first) + block, in_row = number % rows.blocks() * kBlock;
      *begin = static_cast<int>(number / rows.blocks() * rows.length + in_row - first);
      *end =
          *begin + static_cast<int>(kBlock < rows.length - in_row ? kBlock : rows.length - in_row);
    } else {
      *begin = from + block * static_cast<int>(kBlock);
      *end = *begin + static_cast<int>(kBlock) < count ? *begin + static_cast<int>(kBlock) : count;
    }
  }
};

// What one of the threads that share a block does to kWidth elements of a tile. False if it has to
// be called again, when all of them have been.
template <int kWidth, class Tile, class T, class Team>
FUSEDOPT_FN bool update_group(Team& team, int thread, const Tile& tile,
                              const typename Tile::Rule& rule, T grad_scale, Spot at, bool is_own,
                              bool is_last) {
  using Rule = typename Tile::Rule;
  // All loads first: none waits for another one's arithmetic.
  Group groups[Tile::kStreams];
  tile.for_each([&](auto codec, auto s) {
    if constexpr (loads<Rule>(decltype(s)::value)) {
      codec.template load<kWidth>(tile.places[s], at, &groups[s]);
    }
  });
  T x[Tile::kStreams][kWidth];
  tile.for_each([&](auto codec, auto s) {
    FUSEDOPT_UNROLL()
    for (int i = 0; i < kWidth; ++i) {
      x[s][i] = loads<Rule>(decltype(s)::value) ? codec.read(groups[s], i) : T{0};
    }
  });
  FUSEDOPT_UNROLL()
  for (int i = 0; i < kWidth; ++i) {
    T state[kMaxStates];
    FUSEDOPT_UNROLL()
    for (int s = 0; s < Rule::kStates; ++s) state[s] = x[kFirstState + s][i];
    rule(x[kParam][i], x[kGrad][i] * grad_scale, state);
    FUSEDOPT_UNROLL()
    for (int s = 0; s < Rule::kStates; ++s) x[kFirstState + s][i] = state[s];
  }
  if (tile.has_blocks) {
    uint32_t largest[Rule::kStates + 1] = {};
    tile.for_each([&](auto codec, auto s) {
      if constexpr (codec.kHasBlocks && stores<Rule>(decltype(s)::value)) {
        FUSEDOPT_UNROLL()
        for (int i = 0; i < kWidth; ++i) {
          const uint32_t magnitude = finite_magnitude(x[s][i]);
          uint32_t& most = largest[s - kFirstState];
          most = most > magnitude ? most : magnitude;
        }
      }
    });
    if (!team.template join<kBlock / kWidth, Rule::kStates>(thread, largest)) return false;
    tile.for_each([&](auto codec, auto s) {
      if constexpr (codec.kHasBlocks && stores<Rule>(decltype(s)::value)) {
        codec.set_scale(largest[s - kFirstState], &groups[s]);
      }
    });
  }
  if (!is_own) return true;
  RandomWords random{};
  const uint64_t element = tile.element + static_cast<uint64_t>(at.group) * kWidth;
  if (tile.is_random) random = random_words(counter_of(element), tile.draw, tile.key);
  tile.for_each([&](auto codec, auto s) {
    if constexpr (stores<Rule>(decltype(s)::value)) {
      FUSEDOPT_UNROLL()
      for (int i = 0; i < kWidth; ++i) {
        uint32_t half = 0;
        if constexpr (codec.kIsRandom) {
          const int own = kWidth == 1 ? static_cast<int>(element % 8) : i;
          half = random_half(random, own, element % kRandomBlock >= kRandomBlock / 2);
        }
        codec.write(x[s][i], i, half, &groups[s]);
      }
      codec.template store<kWidth>(groups[s], tile.places[s], at, is_last);
    }
  });
  return true;
}

template <class Kind, class Tile, class T, class Team>
FUSEDOPT_FN void update_tile(Team& team, const Tile& tile, const typename Tile::Rule& rule,
                             T grad_scale) {
  // In words,
  constexpr int kWidth = Kind::kWidth, kThreadsOfBlock = kBlock / kWidth;
  const int whole = kWidth > 1 && tile.is_whole ? tile.count / kWidth : 0;
  FUSEDOPT_UNROLL(1)
  for (int start = 0; start < whole; start += kThreads) {
    team.together([&](int thread) {
      const int group = opaque(start + thread);
      if (group >= whole) return true;
      return update_group<kWidth>(team, thread, tile, rule, grad_scale,
                                  {group, group / kThreadsOfBlock}, true,
                                  group % kThreadsOfBlock == kThreadsOfBlock - 1);
    });
  }
  // and what is left one by one. Each block has as many threads, of which some may only join in.
  const int from = whole * kWidth, blocks = tile.blocks_from(from);
  FUSEDOPT_UNROLL(1)
  for (int start = 0; start < blocks; start += kThreads / kBlock) {
    team.together([&](int thread) {
      const int block = start + thread / static_cast<int>(kBlock);
      if (block >= blocks) return true;
      int begin, end;
      tile.find_block(block, from, &begin, &end);
      const int own = begin + thread % static_cast<int>(kBlock);
      const Spot at = {own < end ? own : end - 1, block};
      return update_group<1>(team, thread, tile, rule, grad_scale, at, own < end, own == end - 1);
    });
  }
}

// What a thread block does of all tiles: number `block` of `blocks`.
template <class Kind, class Rule, class Team>
FUSEDOPT_FN void update(Team& team, const Args<UpdateItem>& args, int64_t block, int64_t blocks) {
  using T = typename Kind::Compute;
  T factor = 1;
  if (args.decision) {
    if (args.decision->skipped) return;
    if constexpr (Kind::kDouble) {
      factor = args.decision->factor;
    } else {
      factor = args.decision->factor_f32;
    }
  }
  // The last ones first: of a norm, the cache still has their gradients.
  FUSEDOPT_UNROLL(1)
  for (int64_t unit = args.units - 1 - block; unit >= 0; unit -= blocks) {
    const UpdateItem& item = item_of(args.begin(), args.item_count, unit);
    const auto& folded = args.template scalars_at<Folded<T>>(item.folded);
    Rule rule;
    T* const scalars = reinterpret_cast<T*>(&rule);
    FUSEDOPT_UNROLL()
    for (int i = 0; i < static_cast<int>(sizeof(Rule) / sizeof(T)); ++i) {
      scalars[i] = folded.scalars[i];
    }
    const Tile<Kind, Rule> tile(item, args.parts_at(item.parts), unit - item.begin);
    update_tile<Kind>(team, tile, rule, folded.grad_scale * factor);
  }
}

// Counts the draw that item `i` has taken its random bits from.
FUSEDOPT_FN void advance(const Args<UpdateItem>& args, int64_t i) {
  if (i >= args.item_count || (args.decision && args.decision->skipped)) return;
  const Parts& parts = args.parts_at(args.begin()[i].parts);
  if (parts.rounding && !parts.draws_back) ++*parts.rounding;
}

// ---- kernels
// -------------------------------------------------------------------------------------

// Which rules have kernels of a kind that not all of them have.
template <class Rule>
struct Has {
  static constexpr bool kind(int kind) { return kind < kFirstOfSome; }
};
template <bool kCoupled>
struct Has<Adam<float, kCoupled, false>> {
  static constexpr bool kind(int) { return true; }
};
template <bool kDecay, bool kNesterov>
struct Has<SgdMomentum<float, kDecay, kNesterov>> {
  static constexpr bool kind(int kind) { return kind < kFirstOfAdam; }
};
template <>
struct Has<Lion<float>> : Has<SgdMomentum<float, false, false>> {};
template <bool kDecay>
struct Has<Sgd<float, kDecay>> {
  static constexpr bool kind(int kind) { return kind <= kBFloat16; }
};

// The kind of the kernel that takes a kind of streams.
template <class Rule>
constexpr int taken(int kind) {
  return kind >= kAnyNumbers || Has<Rule>::kind(kind) ? kind
         : kind < kFirstOfAdam                        ? kAnyNumbers
                                                      : kAnyCodecs;
}
