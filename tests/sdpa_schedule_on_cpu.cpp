/* Runs the timetable of the one-pass backward kernel (csrc/sdpa/schedule.cuh) as the blocks of the GPU would, a visit a step. */
#include <vector>

#include "../torch_power/csrc/sdpa/schedule.cuh"

using namespace power::sdpa;

/* Whether two threads that skip to every second visit of a lane see them all, in the lane's order. */
static bool skips_agree(const Timetable &table, int block) {
  Visitor odd_even[2] = {{table, block}, {table, block}};
  odd_even[0].skip(0), odd_even[1].skip(1);
  int count = 0;
  for (Visitor visitor(table, block); visitor.next();)
    for (; visitor.left > 0; visitor.step(), ++count) {
      Visitor &other = odd_even[count & 1];
      if (other.head != visitor.head || other.key_block != visitor.key_block || other.group != visitor.group || other.tile != visitor.tile ||
          other.left != visitor.left || other.turn() != visitor.turn())
        return false;
      other.skip(2);
    }
  return odd_even[0].left == 0 && odd_even[1].left == 0;
}

/* numbers: lanes, teams, heads, sharing, key_blocks, tiles, rounds, spacing, causal. Returns the steps it took, or a negative number:
 * −1 all blocks wait, −2 a key block comes twice, −3 a pair of key block and tile comes twice, −4 some pair is missing or
 * `visits` miscounts, −5 `skip` goes another way than `next` and `step`. `waits`: steps that
 * blocks spent waiting. A sum that was added to in a step is ready for the next addition one step later. */
extern "C" int run_timetable(const int *numbers, int *waits) {
  const int *n = numbers;
  const Timetable table = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8]};
  const int blocks = table.lanes * table.teams, sums = table.heads * table.sharing * table.tiles;
  std::vector<Visitor> visitors;
  std::vector<char> ended(blocks, 0), taken(table.heads * table.key_blocks, 0), met(sums * table.key_blocks, 0);
  std::vector<int> turns(sums, 0);
  int running = blocks, steps = 0;
  const auto settle = [&](int block) {  // on to a key block with visits to come
    Visitor &visitor = visitors[block];
    while (visitor.left == 0) {
      if (!visitor.next()) {
        ended[block] = 1, --running;
        return true;
      }
      if (taken[visitor.head * table.key_blocks + visitor.key_block]++) return false;
    }
    return true;
  };
  for (int block = 0; block < blocks; ++block) {
    if (!skips_agree(table, block)) return -5;
    visitors.emplace_back(table, block);
    visitors[block].left = 0;
    if (!settle(block)) return -2;
  }
  for (*waits = 0; running > 0; ++steps) {
    std::vector<int> adding;
    for (int block = 0; block < blocks; ++block) {
      if (ended[block]) continue;
      const Visitor &visitor = visitors[block];
      const int sum = (visitor.head * table.sharing + visitor.group) * table.tiles + visitor.tile;
      if (turns[sum] == visitor.turn()) adding.push_back(block);
      else ++*waits;
    }
    if (adding.empty()) return -1;
    for (int block : adding) {
      Visitor &visitor = visitors[block];
      const int sum = (visitor.head * table.sharing + visitor.group) * table.tiles + visitor.tile;
      if (met[sum * table.key_blocks + visitor.key_block]++) return -3;
      ++turns[sum];
      visitor.step();
      if (!settle(block)) return -2;
    }
  }
  for (int head = 0; head < table.heads * table.sharing; ++head)
    for (int tile = 0; tile < table.tiles; ++tile) {
      const int last = tile / kSpacing + 1, want = table.causal && last < table.key_blocks ? last : table.key_blocks;
      if (turns[head * table.tiles + tile] != want || table.visits(tile) != want) return -4;
    }
  for (char x : taken)
    if (!x) return -4;
  return steps;
}

/* The timetable that the kernels choose, as `numbers` of the above. */
extern "C" void choose_timetable(int heads, int sharing, int t, bool causal, int multiprocessors, int *numbers) {
  const Timetable x = make_timetable(heads, sharing, t, t, causal, multiprocessors);
  const int found[] = {x.lanes, x.teams, x.heads, x.sharing, x.key_blocks, x.tiles, x.rounds, x.spacing, x.causal};
  for (int i = 0; i < 9; ++i) numbers[i] = found[i];
}
