/* The order in which persistent blocks work off the items of a launch. Plain integers, on host and device alike, so that
 * tests/test_attention_deck.py can prove what is said here.
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
 * fit the L2 cache together, within a group longest first. */
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

}  // namespace power::attention
