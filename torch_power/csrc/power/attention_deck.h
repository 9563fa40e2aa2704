/* The order in which persistent blocks work off the items of a launch, and in which those of the one-pass backward add up dq. Plain integers,
 * on host and device alike, so that tests/test_attention_deck.py can prove what is said here.
 */
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define POWER_ANYWHERE __host__ __device__ __forceinline__
#else
#define POWER_ANYWHERE inline
#endif

namespace power::attention {

constexpr int kTilesOfBlock = 2;  // tiles of 64 queries beside the 128 keys of a block

/* Division of 0 ≤ n < 2^31 by a number that the host knows: a product instead of the twenty instructions of a division. */
struct Divisor {
  uint32_t divisor, factor, shift;
  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d), shift(0) {
    while ((uint64_t(1) << shift) < d) ++shift;
    factor = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d)) / d + 1);
  }
  POWER_ANYWHERE int divide(int n) const { return int((uint32_t((uint64_t(uint32_t(n)) * factor) >> 32) + uint32_t(n)) >> shift); }
};

/* The tile of 64·groups rows that a persistent block works on; tile < 0: there are no more. */
struct Item {
  int head, batch, tile;
};

/* The items of a launch: `tiles` of each of heads × batches heads, dealt group by group of `together` heads whose keys and values
 * fit the L2 cache together, within a group longest first (unless blocks wait for each other: attention_backward_all.cuh). */
struct Deck {
  int items, tiles, together, last_group;
  int last_first;    // 1: a head's tiles are dealt from the last to the first
  int *dealt;        // items dealt so far, beside the first one of every block; 0 at the start
  Divisor by_group, by_together, by_rest, by_heads;
  Deck() = default;
  Deck(int tiles, int heads, int batches, int together, bool last_first, int *dealt)
      : items(tiles * heads * batches), tiles(tiles), together(together), last_group(heads * batches / together),
        last_first(last_first), dealt(dealt), by_group(std::max(tiles * together, 1)), by_together(together),
        by_rest(std::max(heads * batches % together, 1)), by_heads(std::max(heads, 1)) {}
  POWER_ANYWHERE Item item(int index) const {
    const int group = by_group.divide(index), rest = index - group * int(by_group.divisor);
    const Divisor &by_size = group == last_group ? by_rest : by_together;
    const int row = by_size.divide(rest), flat = group * together + rest - row * int(by_size.divisor);
    const int batch = by_heads.divide(flat), tile = last_first ? tiles - 1 - row : row;
    return {flat - batch * int(by_heads.divisor), batch, index >= items ? -1 : tile};
  }
};

/* The deal of the backward pass in one pass. An item is a block of 128 keys; it meets tiles of 64 queries, and dq of a tile is added up
 * block by block, in an order that is that of visits in time, so that no block has to wait long:
 *
 *   early heads: blocks dealt from the last to the first; each visits tiles from its diagonal up. Block j + 1 is two tiles ahead of block j
 *                if both started together, more if j started later: it adds before j.
 *   late heads:  blocks dealt from the first to the last, so that a launch ends with short items; each visits tiles from the last one down to its
 *                diagonal. Blocks start one after another by then, and j − 1, which started before, adds before j.
 *
 * Either way a block waits for blocks alone that were dealt before it, so there is no deadlock, however few blocks are resident. */
struct BackwardDeal {
  Deck early, late;
  int early_heads;  // of batches · heads
  Divisor by_heads;
  BackwardDeal() = default;
  BackwardDeal(int blocks, int heads, int batches, int together, int late_heads, int *dealt)
      : early(blocks, heads * batches - late_heads, 1, std::max(std::min(together, heads * batches - late_heads), 1), true, dealt),
        late(blocks, late_heads, 1, std::max(late_heads, 1), false, dealt), early_heads(heads * batches - late_heads), by_heads(heads) {}
  POWER_ANYWHERE Item item(int index) const {
    const bool is_late = index >= early.items;
    const Item x = is_late ? late.item(index - early.items) : early.item(index);
    const int flat = is_late ? early_heads + x.head : x.head, batch = by_heads.divide(flat);
    return {flat - batch * int(by_heads.divisor), batch, x.tile};
  }
  POWER_ANYWHERE bool is_late(const Item &x) const { return x.batch * int(by_heads.divisor) + x.head >= early_heads; }
  /* The tile of `row_tiles` that block x visits at a step, counted from 0. */
  POWER_ANYWHERE int visit(const Item &x, int step, int row_tiles) const {
    return is_late(x) ? row_tiles - 1 - step : x.tile * kTilesOfBlock + step;
  }
  POWER_ANYWHERE int visits(const Item &x, int row_tiles) const { return row_tiles - x.tile * kTilesOfBlock; }
  /* How many blocks add to tile m before x does, and how many there are but one. */
  POWER_ANYWHERE int turn(const Item &x, int m) const { return is_late(x) ? x.tile : last_turn(m) - x.tile; }
  POWER_ANYWHERE int last_turn(int m) const { return m / kTilesOfBlock; }
};

}  // namespace power::attention
