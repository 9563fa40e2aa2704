/* Backward of the attention form in one pass for heads of 65 to 128.
 *
 * One warpgroup for every 64 keys: Sᵀ = K Qᵀ and dPᵀ = V dYᵀ, then wᵀ and dSᵀ in registers, dV += wᵀ dY and dK += dSᵀ Q. dSᵀ also goes to
 * shared memory, from which each warpgroup makes half of the columns of dQ = dS K for all 128 keys while the next tile's S is computed: dK and
 * dV are 128 registers, which leaves none for a third warpgroup that would make dQ (sdpa/backward.cuh has one, and computes S and dP one
 * after the other for it). Of the last warpgroup one thread loads, two add, each every second tile, and store dk and dv, and a warp rounds dq.
 *
 * Shared memory, all of it at d = 128: k_smem and v_smem; q_smem, dy_smem and the queries' records in two stages; dSᵀ twice;
 * parts of dq twice (dk and dv leave through these).
 *
 * A tile's products take 2560 cycles, what is read and written in shared memory 2944; measured 2.2 µs, some 3700 (NOTES).
 */
#pragma once

#include "attention_one_pass.cuh"

namespace power::attention {

static_assert(sdpa::kKeyBlock == kBackwardGroups * kRows);
constexpr int kHalfTile = kRows * kRows;  // numbers in a warpgroup's part of a tile of dq: 64 rows, 64 columns

template <typename T, int kD>
struct WideSmem {
  static_assert(kD == kBackwardGroups * kRows, "a warpgroup makes 64 columns of dq");
  T k[kBackwardGroups][kRows * kD];
  T v[kBackwardGroups][kRows * kD];
  T q[2][kRows * kD];
  T dy[2][kRows * kD];
  T dscore[2][sdpa::kKeyBlock * kRows];
  float sums[2][kBackwardGroups][kHalfTile];
  QueryRecord records[2];
  int tile[2];        // of queries
  int first, visits;  // of the present block: its first key, and tiles of queries; visits < 0: there are no more
  Barrier kv_full, kv_empty, q_full[2], q_empty[2], dscore_full[2];
  Barrier sums_full[2][kBackwardGroups], sums_empty[2];
};

/* The loading thread. */
template <typename T, int kD>
__device__ __forceinline__ void wide_load(WideSmem<T, kD> &smem, const CUtensorMap *q_map, const CUtensorMap *k_map,
                                          const CUtensorMap *v_map, const CUtensorMap *dy_map, const OnePassProblem &p) {
  RingPosition<2> ring;
  RingPosition<1> block;
  for (sdpa::Visitor visit(p.table, blockIdx.x); visit.next(); block.advance()) {
    const int batch = visit.head / p.h_kv, head_kv = visit.head % p.h_kv, heads = head_kv * p.table.sharing;
    smem.kv_empty.wait(block.parity ^ 1);
    smem.first = visit.key_block * sdpa::kKeyBlock, smem.visits = visit.left;
    smem.kv_full.expect(2 * sdpa::kKeyBlock * kD * sizeof(T));
#pragma unroll 1
    for (int g = 0; g < kBackwardGroups; ++g) {
      load_tile<kD>(smem.k[g], k_map, kRows, visit.key_block * sdpa::kKeyBlock + g * kRows, head_kv, batch, smem.kv_full);
      load_tile<kD>(smem.v[g], v_map, kRows, visit.key_block * sdpa::kKeyBlock + g * kRows, head_kv, batch, smem.kv_full);
    }
#pragma unroll 1
    for (; visit.left > 0; visit.step(), ring.advance()) {
      Barrier &full = smem.q_full[ring.slot];
      const int head = heads + visit.group;
      smem.q_empty[ring.slot].wait(ring.parity ^ 1);
      smem.tile[ring.slot] = visit.tile;
      full.expect(2 * kRows * kD * sizeof(T) + sizeof(QueryRecord));
      load_tile<kD>(smem.q[ring.slot], q_map, kRows, visit.tile * kRows, head, batch, full);
      load_tile<kD>(smem.dy[ring.slot], dy_map, kRows, visit.tile * kRows, head, batch, full);
      const sdpa::QueryRecord *records = p.records + (batch * p.h_q + head) * p.table.tiles;
      bulk_load(smem_address(&smem.records[ring.slot]), records + visit.tile, sizeof(QueryRecord), full.address());
    }
  }
  smem.kv_empty.wait(block.parity ^ 1);
  smem.visits = -1;
  smem.kv_full.arrive();
}

/* One of the two adding threads: every second tile of sums, and of a block's dk and dv one. */
template <typename T, int kD>
__device__ __forceinline__ void wide_add(WideSmem<T, kD> &smem, const CUtensorMap *dk_map, const CUtensorMap *dv_map,
                                         const OnePassProblem &p, int mine) {
  RingPosition<2> slot;
  for (sdpa::Visitor visit(p.table, blockIdx.x); visit.next();) {
#pragma unroll 1
    for (; visit.left > 0; visit.step(), slot.advance()) {
      if (slot.slot != mine) continue;
      const int tile = (visit.head * p.table.sharing + visit.group) * p.table.tiles + visit.tile, turn = visit.turn();
      float *sums = p.sums + int64_t(tile) * kBackwardGroups * kHalfTile;
      if (turn > 0) {
        while (sdpa::load_acquire(p.turns + tile) != turn) __nanosleep(20);
        sdpa::fence_proxy_async_global();
      }
#pragma unroll 1
      for (int g = 0; g < kBackwardGroups; ++g) {
        const uint32_t part = smem_address(smem.sums[mine][g]);
        smem.sums_full[mine][g].wait(slot.parity);
        if (turn == 0) bulk_store(sums + g * kHalfTile, part, kHalfTile * sizeof(float));
        else bulk_add(sums + g * kHalfTile, part, kHalfTile * sizeof(float));
      }
      bulk_commit();
      bulk_wait_read<0>();
      smem.sums_empty[mine].arrive();
      bulk_wait<0>();
      sdpa::fence_proxy_async_global();
      sdpa::store_release(p.turns + tile, turn + 1);
    }
#pragma unroll 1
    for (int gradient = 0; gradient < 2; ++gradient, slot.advance())
      if (slot.slot == mine) {
#pragma unroll 1
        for (int g = 0; g < kBackwardGroups; ++g) {
          smem.sums_full[mine][g].wait(slot.parity);
          const int first = visit.key_block * sdpa::kKeyBlock + g * kRows;
          if (first < p.t_kv)
            store_tile_to_global<kD>(gradient ? dv_map : dk_map, smem.sums[mine][g], first, visit.head % p.h_kv, visit.head / p.h_kv);
        }
        bulk_commit();
        bulk_wait_read<0>();
        smem.sums_empty[mine].arrive();
      }
  }
  bulk_wait<0>();
}

/* Hands this warpgroup's half of a tile of dq to the adding threads. */
template <typename T, int kD>
__device__ __forceinline__ void put_sums(WideSmem<T, kD> &smem, RingPosition<2> &slot, const float (&dq)[kRows / 2],
                                         const Fragment &at, int group) {
  smem.sums_empty[slot.slot].wait(slot.parity ^ 1);
  const uint32_t part = smem_address(smem.sums[slot.slot][group]) + at.thread * 16;
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j)
    store_shared_128(part + j * kWarpgroup * 16, make_uint4(__float_as_uint(dq[4 * j]), __float_as_uint(dq[4 * j + 1]),
                                                            __float_as_uint(dq[4 * j + 2]), __float_as_uint(dq[4 * j + 3])));
  fence_proxy_async();
  smem.sums_full[slot.slot][group].release();
  slot.advance();
}

/* The same of a warpgroup's 64 rows of dk or dv, which leave the same way. */
template <typename T, int kD>
__device__ __forceinline__ void put_gradient(WideSmem<T, kD> &smem, RingPosition<2> &slot, const float (&gradient)[kD / 2],
                                             const Fragment &at, int group, float factor) {
  smem.sums_empty[slot.slot].wait(slot.parity ^ 1);
  store_tile<T, kD>(smem_address(smem.sums[slot.slot][group]), gradient, at, {factor, factor});
  fence_proxy_async();
  smem.sums_full[slot.slot][group].release();
  slot.advance();
}

__device__ __forceinline__ int load_volatile(const volatile int &x) { return x; }

/* A warpgroup with 64 of the keys. */
template <typename T, int kD, int kDeg>
__device__ __forceinline__ void wide_sum(WideSmem<T, kD> &smem, const OnePassProblem &p, int group) {
  const Fragment at(threadIdx.x % kWarpgroup);
  const uint32_t k_smem = smem_address(smem.k[group]), v_smem = smem_address(smem.v[group]);
  RingPosition<2> ring, slot;
  RingPosition<1> block;
  for (;; block.advance()) {
    smem.kv_full.wait(block.parity);
    int left = load_volatile(smem.visits);
    if (left < 0) return;
    const int first = load_volatile(smem.first) + group * kRows;
    float dk[kD / 2], dv[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) dk[i] = dv[i] = 0.f;
    // dQ of the tile before the present one is made while its dV and dK go on: by then the other warpgroup has written its dS.
    RingPosition<2> before;
    bool pending = false;
    const auto multiply_before = [&](float(&dq)[kRows / 2]) {
      if (pending) smem.dscore_full[before.slot].wait(before.parity);
      const uint64_t a = matrix_descriptor(smem_address(smem.dscore[before.slot]));
      const uint64_t b = matrix_descriptor(smem_address(smem.k[0]) + group * kRows * 128);
      claim(dq);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < sdpa::kKeyBlock / 16; ++k)
        Wgmma<kRows, T>::template ss<MN_MAJOR, MN_MAJOR>(dq, advance(a, k * 16 * 128),
                                                         advance(b, (k >> 2) * kRows * kD * sizeof(T) + (k & 3) * 16 * 128), k != 0);
      wgmma_commit();
    };
#pragma unroll 1
    for (; left > 0; --left) {
      float score[kRows / 2], dweight[kRows / 2];
      uint32_t weight[kRows / 16][4], dscore[kRows / 16][4];
      float dq[kRows / 2];
      multiply_before(dq);  // of the first tile, from whatever is there, to no purpose: a branch would serialise the products
      wgmma_wait<1>();  // ends dV and dK of the tile before
      pin(dk);
      pin(dv);
      if (pending) smem.q_empty[before.slot].release();
      const uint32_t q_smem = smem_address(smem.q[ring.slot]), dy_smem = smem_address(smem.dy[ring.slot]);
      const QueryRecord &record = smem.records[ring.slot];
      smem.q_full[ring.slot].wait(ring.parity);
      const int m = smem.tile[ring.slot];
      claim(score);
      wgmma_fence();
      multiply_rows<T, kD, kRows>(score, k_smem, q_smem);
      wgmma_commit();
      wgmma_wait<1>();  // ends dQ
      pin(dq);
      if (pending) put_sums(smem, slot, dq, at, group);
      pending = true;
      claim(dweight);
      wgmma_fence();
      multiply_rows<T, kD, kRows>(dweight, v_smem, dy_smem);
      wgmma_commit();
      wgmma_wait<0>();
      pin(score);
      pin(dweight);
      // The tile of dS two before this one is free: the other warpgroup has ended its product with it before it wrote the last one.
      const uint32_t dscore_smem = smem_address(smem.dscore[ring.slot]) + group * kRows * kRows * sizeof(T);
      if (m * kRows < first + kRows) {
        scale_columns<true>(score, record, at, first + at.row - m * kRows);
        if (m == 0 && group == 0 && p.normalize)
          correct_first_rows<kDeg>(score, dweight, record, at, reinterpret_cast<float *>(smem.dscore[ring.slot]), group);
      } else {
        scale_columns<false>(score, record, at, 0);
      }
      differentiate_tile<T, kDeg, 4>(score, dweight, dscore, dscore_smem, record, at);
      fence_proxy_async();
      smem.dscore_full[ring.slot].release();
      pack_weights<T, kDeg>(score, weight);
      pin(weight);
      pin(dscore);
      pin(dk);
      pin(dv);
      wgmma_fence();
      accumulate<T, kD, kRows>(dv, weight, dy_smem);
      accumulate<T, kD, kRows>(dk, dscore, q_smem);
      wgmma_commit();
      before = ring;
      ring.advance();
    }
    wgmma_wait<0>();  // products in flight where a loop ends would be serialised
    pin(dk);
    pin(dv);
    float dq[kRows / 2];
    multiply_before(dq);
    wgmma_wait<0>();
    pin(dq);
    smem.q_empty[before.slot].release();
    smem.kv_empty.release();
    put_sums(smem, slot, dq, at, group);
    put_gradient<T, kD>(smem, slot, dk, at, group, kDeg * p.plain);
    put_gradient<T, kD>(smem, slot, dv, at, group, p.plain);
  }
}

/* dq from its sums: each block rounds the tiles of queries on the diagonals of its own keys, once all blocks that see them have added. */
template <typename T, int kD>
struct Rounding {
  Rows<T> dq;
  const float *sums;
  const int *turns;
  int t, h_q;
  float factor;

  /* By whole warps, this one being `warp` of `warps`. */
  __device__ __forceinline__ void round(const sdpa::Timetable &table, int head_kv, int key_block, int warp, int warps) const {
    const int lane = threadIdx.x & 31, first = key_block * sdpa::kSpacing;
#pragma unroll 1
    for (int group = 0; group < table.sharing; ++group)
#pragma unroll 1
      for (int tile = first; tile < sdpa::smaller(first + sdpa::kSpacing, table.tiles); ++tile) {
        const int flat = head_kv * table.sharing + group, index = flat * table.tiles + tile;
        while (sdpa::load_acquire(turns + index) <= key_block) __nanosleep(100);
#pragma unroll 1
        for (int step = warp; step < kD / 4; step += warps) {
          // Where `Fragment` has row 16w + r and columns 8n … 8n + 7: threads 32w + 4(r mod 8) … + 3, numbers 4n + 2(r / 8) and the next.
          const int r = lane & 15, row = tile * kRows + 16 * (step & 3) + r, column = 16 * (step >> 2) + 8 * (lane >> 4);
          const float *from = sums + int64_t(index) * kRows * kD + column * kRows + (32 * (step & 3) + 4 * (r & 7)) * 4 + 2 * (r >> 3);
          uint32_t pair[4];
#pragma unroll
          for (int quad = 0; quad < 4; ++quad) {
            const float2 x = *reinterpret_cast<const float2 *>(from + 4 * quad);
            pair[quad] = pack<T>(x.x * factor, x.y * factor);
          }
          if (row < t && column < dq.size)
            *reinterpret_cast<uint4 *>(dq.data + (flat / h_q) * dq.stride[0] + row * dq.stride[1] + (flat % h_q) * dq.stride[2] + column) =
                make_uint4(pair[0], pair[1], pair[2], pair[3]);
        }
      }
  }
  /* All key blocks but the last, by one warp beside the others' work. */
  __device__ __forceinline__ void round_early(const sdpa::Timetable &table) const {
    sdpa::Visitor visit(table, blockIdx.x);
    visit.next();
    for (int head = visit.head, key_block = visit.key_block; visit.next(); head = visit.head, key_block = visit.key_block)
      round(table, head, key_block, 0, 1);
  }
  /* The last one, by the warpgroups with keys, which have nothing else to do by then. */
  __device__ __forceinline__ void round_last(const sdpa::Timetable &table) const {
    sdpa::Visitor visit(table, blockIdx.x);
    int head = 0, key_block = 0;
    while (visit.next()) head = visit.head, key_block = visit.key_block;
    round(table, head, key_block, threadIdx.x / 32, kBackwardGroups * kWarpgroup / 32);
  }
};

template <typename T, int kD, int kDeg>
__global__ void __launch_bounds__((kBackwardGroups + 1) * kWarpgroup, 1)
    backward_wide_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                         const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dy_map,
                         const __grid_constant__ CUtensorMap dk_map, const __grid_constant__ CUtensorMap dv_map,
                         const __grid_constant__ OnePassProblem p, const __grid_constant__ Rounding<T, kD> rounding) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto &smem = *reinterpret_cast<WideSmem<T, kD> *>(smem_bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      smem.q_full[s].init(1), smem.q_empty[s].init_released(4 * kBackwardGroups), smem.dscore_full[s].init_released(4 * kBackwardGroups);
      for (int g = 0; g < kBackwardGroups; ++g) smem.sums_full[s][g].init_released(4);
      smem.sums_empty[s].init(1);
    }
    smem.kv_full.init(1), smem.kv_empty.init_released(4 * kBackwardGroups);
    mbarrier_init_fence();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  if (group == kBackwardGroups) {
    registers_lower<40>();
    if (threadIdx.x % kWarpgroup == 0) wide_load<T, kD>(smem, &q_map, &k_map, &v_map, &dy_map, p);
    else if (threadIdx.x % kWarpgroup == 32 || threadIdx.x % kWarpgroup == 64)
      wide_add<T, kD>(smem, &dk_map, &dv_map, p, threadIdx.x % kWarpgroup / 32 - 1);
    else if (threadIdx.x % kWarpgroup >= 96) rounding.round_early(p.table);
  } else {
    registers_raise<232>();
    wide_sum<T, kD, kDeg>(smem, p, group);
    rounding.round_last(p.table);
  }
}

}  // namespace power::attention
