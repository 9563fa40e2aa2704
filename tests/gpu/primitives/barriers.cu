/* csrc/sm90/mbarrier.cuh: a ring between one copying thread and consumer warps that take different times, and the named barriers. */
#include "../../../torch_power/csrc/sm90/mbarrier.cuh"
#include "../../../torch_power/csrc/sm90/tma.cuh"
#include "check.cuh"

using namespace sm90;

constexpr int TILE = 1024, WARPS = 4; /* numbers a tile, consumer warps */

/* Warp WARPS fills the ring with `tiles` tiles; every other warp adds them all up, the higher ones later. sums [WARPS, TILE]. */
template <int STAGES>
__global__ void ring_sum(const int *from, int *sums, int tiles) {
  __shared__ __align__(128) int slots[STAGES][TILE];
  __shared__ uint64_t barriers[2 * STAGES];
  Ring<STAGES> ring{smem_address(barriers)};
  static_assert(Ring<STAGES>::BYTES == sizeof barriers);
  if (threadIdx.x == 0) ring.init(WARPS), mbarrier_init_fence();
  __syncthreads();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  RingPosition<STAGES> at;
  if (warp == WARPS) {
    for (int tile = 0; tile < tiles && lane == 0; tile++, at.advance()) {
      ring.acquire(at, TILE * 4);
      bulk_load(smem_address(slots[at.slot]), from + tile * TILE, TILE * 4, ring.full(at.slot));
    }
    return;
  }
  int sum[TILE / 32] = {};
  for (int tile = 0; tile < tiles; tile++, at.advance()) {
    ring.wait(at);
    __nanosleep(200 * ((warp + tile) % 3));
    for (int i = 0; i < TILE / 32; i++) sum[i] += slots[at.slot][i * 32 + lane];
    ring.release(at.slot);
  }
  for (int i = 0; i < TILE / 32; i++) sums[warp * TILE + i * 32 + lane] = sum[i];
}

template <int STAGES>
void test_ring(int tiles) {
  std::vector<int> from(size_t(tiles) * TILE), want(WARPS * TILE, 0);
  for (size_t i = 0; i < from.size(); i++) from[i] = int(i * 2654435761u >> 20);
  for (size_t i = 0; i < from.size(); i++)
    for (int warp = 0; warp < WARPS; warp++) want[warp * TILE + i % TILE] += from[i];
  Buffer<int> in(from), out(want.size());
  launch(ring_sum<STAGES>, 1, (WARPS + 1) * 32, 0, (const int *)in.data, out.data, tiles);
  expect(out.host() == want, "ring of stages", STAGES);
}

/* Warpgroup 0 writes, arrives and goes on; warpgroup 1 waits for it, reads and answers; and each syncs alone in between. */
__global__ void hand_over(int *to, int rounds) {
  __shared__ int box[128], own[2][128];
  int group = threadIdx.x / 128, me = threadIdx.x % 128, sum = 0;
  for (int round = 0; round < rounds; round++) {
    own[group][me] = round + me;
    named_barrier_sync(CONSUMER + group, 128);
    sum += own[group][127 - me];
    named_barrier_sync(CONSUMER + group, 128);
    if (group == 0) {
      if (me % 32 == round % 32) __nanosleep(500);
      box[me] = round * 1000 + me;
      named_barrier_arrive(ORDER, 256);
      named_barrier_sync(CONSUMERS, 256); /* until it has been read */
    } else {
      named_barrier_sync(ORDER, 256);
      sum += box[127 - me];
      named_barrier_sync(CONSUMERS, 256);
    }
  }
  to[threadIdx.x] = sum;
}

int main() {
  test_ring<1>(7), test_ring<2>(64), test_ring<3>(100), test_ring<4>(5), test_ring<4>(3);
  const int rounds = 50;
  Buffer<int> out(256);
  launch(hand_over, 1, 256, 0, out.data, rounds);
  std::vector<int> got = out.host();
  int wrong = 0;
  for (int i = 0; i < 256; i++) {
    int want = 0, other = 127 - i % 128;
    for (int round = 0; round < rounds; round++) want += round + other + (i / 128 ? round * 1000 + other : 0);
    wrong += got[i] != want;
  }
  expect(wrong == 0, "named barriers: wrong sums", wrong);
  return failures != 0;
}
