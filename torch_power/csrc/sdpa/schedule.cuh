/* Who computes what, and when, in the one-pass backward kernel: a fixed timetable, so that additions to dq have a fixed order and
 * hardly anyone waits for his turn.
 *
 * A team of `lanes` blocks works on one key-value head at a time, a key block each and round by round; a lane walks through the tiles
 * of 64 queries that see its key block. With every lane one step a tile, lanes are never at the same tile, and those that follow each
 * other through a tile are kSpacing steps apart:
 *
 *   full     lane i starts kSpacing · i tiles from the beginning and goes round; lane i passes a tile after lane i + 1.
 *   causal   RISING: lane i has key block lanes − 1 − i of the round and goes from its diagonal (two tiles of queries a key block) to
 *            the last tile, so that the lane with the next key block has just passed. Lanes end kSpacing steps one after another, the
 *            first with the last key block. FALLING, for another head: lane i has key block i of the round, and goes from the last
 *            tile back to its diagonal. All lanes end at the same step, so the lanes do equal work and the next pair starts like this one.
 *
 * A head without a partner has rounds that rise and fall in turns; its lanes wait for each other where it turns.
 * A tile's additions are numbered in the order of this timetable (`turn`). Every lane meets its visits in that order too, so nobody
 * waits for ever, provided that all blocks run at the same time. (tests/test_sdpa_schedule.py proves both on small cases.)
 */
#pragma once

#ifdef __CUDACC__
#define POWER_ANYWHERE __host__ __device__ __forceinline__
#else  // the tests, which need no GPU
#define POWER_ANYWHERE inline
#endif

namespace power::sdpa {

constexpr int kKeyBlock = 128;              // keys of a block
constexpr int kSpacing = kKeyBlock / 64;  // tiles of queries

POWER_ANYWHERE int smaller(int a, int b) { return a < b ? a : b; }

enum Walk : int { ROUND = 0, RISING = 1, FALLING = 2 };

struct Timetable {
  int lanes, teams;
  int heads;              // key-value heads in all batches
  int sharing;            // query heads of a key-value head
  int key_blocks, tiles;  // tiles of queries
  int rounds;             // key blocks of a lane and head
  int spacing;            // full: kSpacing, or less if the lanes would overtake each other
  int causal;

  /* How many visits a tile of queries gets. */
  POWER_ANYWHERE int visits(int tile) const { return causal ? smaller(key_blocks, tile / kSpacing + 1) : key_blocks; }
};

/* The visits of one lane. */
struct Visitor {
  const Timetable &table;
  const int lane;
  int head, round;   // of key-value heads
  int paired, fall;  // whether the head has a partner, `teams` heads on; whether this is the second of the two
  int key_block, first, walk;
  int left, group, tile;  // visits still to come; query head and tile of the next one

  POWER_ANYWHERE Visitor(const Timetable &table, int block)
      : table(table), lane(block % table.lanes), head(block / table.lanes), round(-1), paired(0), fall(1), left(0) {}

  /* On to the next key block; false if there is none. */
  POWER_ANYWHERE bool next() {
    do {
      if (paired && !fall) {
        fall = 1, head += table.teams;
      } else {
        if (paired && round >= 0) head -= table.teams;
        if (++round == table.rounds) round = 0, head += (1 + paired) * table.teams;
        if (head >= table.heads) return false;
        paired = table.causal && head + table.teams < table.heads;
        fall = 0;
      }
      walk = !table.causal ? ROUND : fall || (!paired && (round & 1)) ? FALLING : RISING;
      key_block = round * table.lanes + (walk == RISING ? table.lanes - 1 - lane : lane);
    } while (key_block >= table.key_blocks);
    first = table.causal ? smaller(key_block * kSpacing, table.tiles) : 0;
    left = (table.tiles - first) * table.sharing;
    group = 0, tile = first;
    if (walk == ROUND) {
      const int start = lane * table.spacing;
      group = start / table.tiles, tile = start % table.tiles;
    } else if (walk == FALLING) {
      group = table.sharing - 1, tile = table.tiles - 1;
    }
    return true;
  }

  /* On to the next tile of this key block. */
  POWER_ANYWHERE void step() {
    --left;
    if (walk == FALLING) {
      if (--tile < first) tile = table.tiles - 1, --group;
    } else if (++tile == table.tiles) {
      tile = first;
      if (++group == table.sharing) group = 0;
    }
  }

  /* `count` visits on, over key blocks, from the lane's first visit at the start; left = 0 if there are not so many. */
  POWER_ANYWHERE void skip(int count) {
    while (left <= count) {
      count -= left, left = 0;
      if (!next()) return;
    }
    for (; count > 0; --count) step();
  }

  /* How many visits of this tile come before this one. */
  POWER_ANYWHERE int turn() const {
    if (walk == FALLING) return key_block;
    const int before = round * table.lanes, last = smaller(table.key_blocks, before + table.lanes) - 1;
    if (walk == RISING) return before + smaller(last, tile / kSpacing) - key_block;
    const int passed = table.spacing ? (group * table.tiles + tile) / table.spacing : last - before;  // the last lane to start at or before it
    const int top = smaller(last - before, passed);
    return before + (lane <= passed ? top - lane : top + 1 + last - before - lane);
  }
};

}  // namespace power::sdpa
