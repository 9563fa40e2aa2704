/* Backward of scaled dot-product attention in two kernels, for what the one-pass kernel (backward.cuh) does not serve: masks, biases,
 * dropout, windows, head sizes above 128. First kernel: dq, and what the second kernel needs of every query.
 *
 *     dq_i = scale · Σ_j dS_ij k_j,   dS = P ∘ (dP − δ),   P_ij = exp(S_ij − lse_i),   dP = dY Vᵀ,   δ_i = dy_i·y_i
 *
 * (with dropout dP times its gains). A persistent block of 64·kGroups query rows of one head, one warpgroup for every 64; tiles of
 * keys and values stream past: S = Q Kᵀ and dP from shared memory, dS in registers, dQ += dS K with K read down its columns. No sum
 * leaves its warpgroup, so the result has one order of additions. Of the last warpgroup one thread loads, one stores and one deals out
 * the items.
 *
 * Shared memory: q_smem and dy_smem, two slots a warpgroup (dq leaves through q's), k_smem and v_smem in a ring of stages.
 */
#pragma once

#include "general.cuh"

namespace power::sdpa {

/* d: groups stages of 64 keys  why
 *  64: 2     8       all of shared memory that the slots leave
 * 128: 2     3       the same
 * 256: 1     1       dQ is 128 registers, and the two slots of one warpgroup are 128 KiB */
template <int kD>
struct BackwardQTiles {
  static constexpr int kGroups = kD == 256 ? 1 : 2, kKeys = 64, kStages = kD == 64 ? 8 : kD == 128 ? 3 : 1;
};
constexpr int kBackwardProducerRegisters = 24, kBackwardConsumerRegisters = 240;

struct BackwardProblem : Problem {
  float scale;
  const void *y;
  int64_t y_stride[3];
  QueryRecord *records;  // [b, h_q, tiles of 64 rows]
};

template <typename T, int kD, bool kGeneral>
struct BackwardQSmem {
  using Tiles = BackwardQTiles<kD>;
  static constexpr int kGroups = Tiles::kGroups;
  T q[2][kGroups][kRows * kD];
  T dy[2][kGroups][kRows * kD];
  T k[Tiles::kStages][Tiles::kKeys * kD];
  T v[Tiles::kStages][Tiles::kKeys * kD];
  Dealer<2> dealer;
  Barrier q_full[2][kGroups], dq_full[2][kGroups], q_empty[2][kGroups];
  Barrier kv_full[Tiles::kStages], kv_empty[Tiles::kStages];
};

template <typename T, int kD, bool kGeneral>
__device__ __forceinline__ void backward_q_produce(BackwardQSmem<T, kD, kGeneral> &smem, const CUtensorMap *q_map, const CUtensorMap *k_map,
                                                   const CUtensorMap *v_map, const CUtensorMap *dy_map, const Problem &p) {
  using Tiles = BackwardQTiles<kD>;
  constexpr int kKeys = Tiles::kKeys, kGroups = Tiles::kGroups, kBlockRows = kGroups * kRows;
  RingPosition<2> seat;
  RingPosition<Tiles::kStages> ring;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int head_kv = item.head / (p.h_q / p.h_kv), first = item.tile * kBlockRows;
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      Barrier &full = smem.q_full[seat.slot][g];
      if (first + g * kRows < p.t_q) {
        full.expect(2 * kRows * kD * sizeof(T));
        load_tile<kD>(smem.q[seat.slot][g], q_map, kRows, first + g * kRows, item.head, item.batch, full);
        load_tile<kD>(smem.dy[seat.slot][g], dy_map, kRows, first + g * kRows, item.head, item.batch, full);
      } else {
        full.arrive();  // no rows; the barriers of all warpgroups stay in the same phase
      }
    }
    const Range seen = keys_seen(p, first, kBlockRows, kKeys);
#pragma unroll 1
    for (int n = seen.begin; n < seen.end; ++n, ring.advance()) {
      Barrier &full = smem.kv_full[ring.slot];
      smem.kv_empty[ring.slot].wait(ring.parity ^ 1);
      full.expect(2 * kKeys * kD * sizeof(T));
      load_tile<kD>(smem.k[ring.slot], k_map, kKeys, n * kKeys, head_kv, item.batch, full);
      load_tile<kD>(smem.v[ring.slot], v_map, kKeys, n * kKeys, head_kv, item.batch, full);
    }
  }
}

/* The storing thread: results leave through the slots of the tiles they replace, which are free again once they have been read. */
template <typename T, int kD, bool kGeneral>
__device__ __forceinline__ void backward_q_store(BackwardQSmem<T, kD, kGeneral> &smem, const CUtensorMap *dq_map, const Problem &p) {
  constexpr int kGroups = BackwardQTiles<kD>::kGroups;
  RingPosition<2> seat;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance())
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      const int first = (item.tile * kGroups + g) * kRows;
      smem.dq_full[seat.slot][g].wait(seat.parity);
      if (first < p.t_q) {
        store_tile_to_global<kD>(dq_map, smem.q[seat.slot][g], first, item.head, item.batch);
        bulk_commit();
        bulk_wait_read<0>();
      }
      smem.q_empty[seat.slot][g].arrive();
    }
  bulk_wait<0>();
}

/* δ = dy·y of one row, of which this thread and its neighbour take half each. */
template <typename T, int kD>
__device__ __forceinline__ float row_delta(const BackwardProblem &p, const Item &item, int row, uint32_t dy_tile, int thread) {
  float sum = 0.f;
  if (row < p.t_q) {
    const T *y = static_cast<const T *>(p.y) + row_offset(p.y_stride, item.batch, item.head, row);
    const uint8_t *residual = p.residual;
    if (residual) residual += row_offset(p.residual_stride, item.batch, item.head, row);
#pragma unroll 4
    for (int i = 0; i < kD / 16; ++i) {
      const int chunk = (thread & 1) * (kD / 16) + i;
      if (8 * chunk >= p.e) continue;
      const uint4 dy = load_shared_128(chunk_address(dy_tile, kRows, thread >> 1, chunk));
      sum += multiply_chunk<T>(dy, y + 8 * chunk, residual ? residual + 8 * chunk : nullptr);
    }
  }
  return sum + __shfl_xor_sync(~0u, sum, 1);
}

/* dS of one tile as the A operand of dQ += dS K. kEdge: columns > last_column[r] are hidden. Masked scores come scaled. */
template <typename T, int kKeys, bool kEdge>
__device__ __forceinline__ void differentiate_rows(const float (&score)[kKeys / 2], const float (&dweight)[kKeys / 2],
                                                   uint32_t (&dscore)[kKeys / 16][4], const float (&lse)[2], const float (&delta)[2],
                                                   float scale, const Fragment &at, const int (&last_column)[2]) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float ds[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = 4 * n + 2 * r + c;
        ds[c] = exp2_fast(fmaf(score[i], scale, -lse[r])) * (dweight[i] - delta[r]);
        if (kEdge && 8 * n + 2 * at.quad + c > last_column[r]) ds[c] = 0.f;
      }
      dscore[n >> 1][2 * (n & 1) + r] = pack<T>(ds[0], ds[1]);
    }
}

template <typename T, int kD, bool kGeneral>
__device__ __forceinline__ void backward_q_consume(BackwardQSmem<T, kD, kGeneral> &smem, const BackwardProblem &p, const General &general,
                                                   int group) {
  using Tiles = BackwardQTiles<kD>;
  constexpr int kKeys = Tiles::kKeys, kBlockRows = Tiles::kGroups * kRows;
  const Fragment at(threadIdx.x % kWarpgroup);
  const int row_tiles = (p.t_q + kRows - 1) / kRows;
  RingPosition<2> seat;
  RingPosition<Tiles::kStages> ring;
  const auto skip = [&] {  // a tile that only other rows of the block see
    smem.kv_full[ring.slot].wait(ring.parity);
    release(smem.kv_empty[ring.slot]);
    ring.advance();
  };
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int first = item.tile * kBlockRows + group * kRows;
    const Range seen = keys_seen(p, item.tile * kBlockRows, kBlockRows, kKeys), mine = keys_seen(p, first, kRows, kKeys);
    int n = seen.begin;
    if (first < p.t_q) {
      const int row = first + (at.thread >> 1);  // of the half row this thread prepares
      float row_lse = kNegativeInfinity;
      if (row < p.t_q) row_lse = p.lse[item.batch * p.lse_stride[0] + item.head * p.lse_stride[1] + row * p.lse_stride[2]] * kLog2E;
      if (row_lse == kNegativeInfinity) row_lse = -kNegativeInfinity;
      const uint32_t q_smem = smem_address(smem.q[seat.slot][group]), dy_smem = smem_address(smem.dy[seat.slot][group]);
      smem.q_full[seat.slot][group].wait(seat.parity);
      const float row_dot = row_delta<T, kD>(p, item, row, dy_smem, at.thread);
      QueryRecord &record = p.records[int64_t(item.batch * p.h_q + item.head) * row_tiles + first / kRows];
      float *pair = &record.lse_delta[at.thread >> 2].x + ((at.thread >> 1) & 1);
      if (!(at.thread & 1)) pair[0] = row_lse, pair[2] = row_dot;
      float lse[2], delta[2], dq[kD / 2];
#pragma unroll
      for (int r = 0; r < 2; ++r) lse[r] = at.of_row(row_lse, r), delta[r] = at.of_row(row_dot, r);
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) dq[i] = 0.f;
      if (p.negative) negate_rows<kD>(q_smem, at.thread, group);
      const HeadMasks masks(general, item.batch, item.head);  // without kGeneral, never looked at

#pragma unroll 1
      for (; n < mine.begin; ++n) skip();
      int previous = -1;
#pragma unroll 1
      for (; n < mine.end; ++n, ring.advance()) {
        float score[kKeys / 2], dweight[kKeys / 2];
        uint32_t dscore[kKeys / 16][4];
        const uint32_t k_smem = smem_address(smem.k[ring.slot]), v_smem = smem_address(smem.v[ring.slot]);
        // With one stage, the sum that reads this stage's last content has ended before it was filled again.
        smem.kv_full[ring.slot].wait(ring.parity);
        pin(score);
        pin(dweight);
        wgmma_fence();
        multiply_rows<T, kD, kKeys>(score, q_smem, k_smem);
        multiply_rows<T, kD, kKeys>(dweight, dy_smem, v_smem);
        wgmma_commit();
        wgmma_wait<0>();  // also ends dQ += dS K of the tile before
        pin(score);
        pin(dweight);
        pin(dq);
        if (Tiles::kStages > 1 && previous >= 0) release(smem.kv_empty[previous]);
        if constexpr (kGeneral) {
          mask_rows<kKeys>(score, p, masks, at, first, n * kKeys);
          if (general.seed) drop_rows<kKeys>(dweight, masks, at, first, n * kKeys);
          differentiate_rows<T, kKeys, false>(score, dweight, dscore, lse, delta, 1.f, at, {0, 0});
        } else {
          const int row = first + at.row + p.right, keys = p.t_kv - 1, from = n * kKeys;
          if (from + kKeys > min(p.t_kv, first + p.right + 1))
            differentiate_rows<T, kKeys, true>(score, dweight, dscore, lse, delta, p.scale_log2, at,
                                               {min(keys, row) - from, min(keys, row + 8) - from});
          else
            differentiate_rows<T, kKeys, false>(score, dweight, dscore, lse, delta, p.scale_log2, at, {0, 0});
        }
        pin(dscore);
        pin(dq);
        wgmma_fence();
        accumulate<T, kD, kKeys>(dq, dscore, k_smem);
        wgmma_commit();
        if constexpr (Tiles::kStages == 1) {
          wgmma_wait<0>();
          pin(dq);
          release(smem.kv_empty[ring.slot]);
        }
        previous = ring.slot;
      }
      wgmma_wait<0>();
      pin(dq);
      if (Tiles::kStages > 1 && previous >= 0) release(smem.kv_empty[previous]);

      warpgroup_sync(group);  // no warp still multiplies with the q that dq replaces
      store_tile<T, kD>(q_smem, dq, at, {p.scale, p.scale});
      fence_proxy_async();
    }
    release(smem.dq_full[seat.slot][group]);
#pragma unroll 1
    for (; n < seen.end; ++n) skip();
  }
}

template <typename T, int kD, bool kGeneral>
__global__ void __launch_bounds__((BackwardQTiles<kD>::kGroups + 1) * kWarpgroup, 1)
    backward_q_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dy_map,
                      const __grid_constant__ CUtensorMap dq_map, const __grid_constant__ BackwardProblem p,
                      const __grid_constant__ General general) {
  using Tiles = BackwardQTiles<kD>;
  constexpr int kGroups = Tiles::kGroups;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto &smem = *reinterpret_cast<BackwardQSmem<T, kD, kGeneral> *>(smem_bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2 * kGroups; ++s)
      (&smem.q_full[0][0])[s].init(1), (&smem.q_empty[0][0])[s].init(1), (&smem.dq_full[0][0])[s].init(kArrivals);
    for (int s = 0; s < Tiles::kStages; ++s) smem.kv_full[s].init(1), smem.kv_empty[s].init(kArrivals * kGroups);
    smem.dealer.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  if (group == kGroups) {
    registers_lower<kBackwardProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) backward_q_produce<T, kD, kGeneral>(smem, &q_map, &k_map, &v_map, &dy_map, p);
    else if (threadIdx.x % kWarpgroup == 32) backward_q_store<T, kD, kGeneral>(smem, &dq_map, p);
    else if (threadIdx.x % kWarpgroup == 64) smem.dealer.deal(smem.q_empty, p.deck);
  } else {
    registers_raise<kBackwardConsumerRegisters>();
    backward_q_consume<T, kD, kGeneral>(smem, p, general, group);
  }
}

}  // namespace power::sdpa
