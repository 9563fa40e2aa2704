/* Backward of scaled dot-product attention, second kernel: dk and dv.
 *
 *     dv_j = Σ_i P_ij dy_i,    dk_j = scale · Σ_i dS_ij q_i,    with lse and δ of every query from the first kernel
 *
 * (with dropout P times its gains in dv). A persistent block of 64·kGroups keys of one key-value head, one warpgroup for every 64;
 * tiles of 64 queries of all the query heads that read it stream past: Sᵀ = K Qᵀ and dPᵀ = V dYᵀ, then Pᵀ and dSᵀ in registers,
 * dV += Pᵀ dY and dK += dSᵀ Q with dY and Q read down their columns. Nothing but q and dy crosses warpgroups, and heads are not
 * repeated. The last warpgroup is that of the other kernels.
 *
 * Shared memory: k_smem and v_smem, two slots a warpgroup (dk and dv leave through them), q_smem, dy_smem and the queries' records in
 * a ring of stages.
 */
#pragma once

#include "backward_q.cuh"

namespace power::sdpa {

/* d: groups stages  why
 *  64: 2     6       all of shared memory that the slots leave, but for what more stages would not hide
 * 128: 2     3       3 stages beside the two slots are all of shared memory
 * 256: 1     1       dK and dV would be 256 registers: a launch for each of them */
template <int kD>
struct BackwardKvTiles {
  static constexpr int kGroups = kD == 256 ? 1 : 2, kStages = kD == 64 ? 6 : kD == 128 ? 3 : 1;
};

/* Which gradients a launch computes. */
enum Part : int { BOTH = 0, ONLY_DV = 1, ONLY_DK = 2 };

template <typename T, int kD, bool kGeneral>
struct BackwardKvSmem {
  using Tiles = BackwardKvTiles<kD>;
  static constexpr int kGroups = Tiles::kGroups, kStages = Tiles::kStages;
  T k[2][kGroups][kRows * kD];
  T v[2][kGroups][kRows * kD];
  T q[kStages][kRows * kD];
  T dy[kStages][kRows * kD];
  QueryRecord records[kStages];
  Dealer<2> dealer;
  Barrier kv_full[2][kGroups], gradient_full[2][kGroups], kv_empty[2][kGroups];
  Barrier q_full[kStages], q_empty[kStages];
};

template <typename T, int kD, bool kGeneral>
__device__ __forceinline__ void backward_kv_produce(BackwardKvSmem<T, kD, kGeneral> &smem, const CUtensorMap *q_map,
                                                    const CUtensorMap *k_map, const CUtensorMap *v_map, const CUtensorMap *dy_map,
                                                    const BackwardProblem &p) {
  using Tiles = BackwardKvTiles<kD>;
  constexpr int kGroups = Tiles::kGroups, kBlockRows = kGroups * kRows;
  const int row_tiles = (p.t_q + kRows - 1) / kRows, heads = p.h_q / p.h_kv;
  RingPosition<2> seat;
  RingPosition<Tiles::kStages> ring;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int first = item.tile * kBlockRows;
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      Barrier &full = smem.kv_full[seat.slot][g];
      if (first + g * kRows < p.t_kv) {
        full.expect(2 * kRows * kD * sizeof(T));
        load_tile<kD>(smem.k[seat.slot][g], k_map, kRows, first + g * kRows, item.head, item.batch, full);
        load_tile<kD>(smem.v[seat.slot][g], v_map, kRows, first + g * kRows, item.head, item.batch, full);
      } else {
        full.arrive();  // no rows; the barriers of all warpgroups stay in the same phase
      }
    }
    const Range seen = queries_seeing(p, first, kBlockRows);
#pragma unroll 1
    for (int head = item.head * heads; head < (item.head + 1) * heads; ++head) {
      const QueryRecord *records = p.records + int64_t(item.batch * p.h_q + head) * row_tiles;
#pragma unroll 1
      for (int m = seen.begin; m < seen.end; ++m, ring.advance()) {
        Barrier &full = smem.q_full[ring.slot];
        smem.q_empty[ring.slot].wait(ring.parity ^ 1);
        full.expect(2 * kRows * kD * sizeof(T) + sizeof(QueryRecord));
        load_tile<kD>(smem.q[ring.slot], q_map, kRows, m * kRows, head, item.batch, full);
        load_tile<kD>(smem.dy[ring.slot], dy_map, kRows, m * kRows, head, item.batch, full);
        bulk_load(smem_address(&smem.records[ring.slot]), records + m, sizeof(QueryRecord), full.address());
      }
    }
  }
}

/* The storing thread: results leave through the slots of the tiles they replace, which are free again once they have been read. */
template <typename T, int kD, bool kGeneral, Part kPart>
__device__ __forceinline__ void backward_kv_store(BackwardKvSmem<T, kD, kGeneral> &smem, const CUtensorMap *dk_map,
                                                  const CUtensorMap *dv_map, const Problem &p) {
  constexpr int kGroups = BackwardKvTiles<kD>::kGroups;
  RingPosition<2> seat;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance())
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      const int first = (item.tile * kGroups + g) * kRows;
      smem.gradient_full[seat.slot][g].wait(seat.parity);
      if (first < p.t_kv) {
        if (kPart != ONLY_DV) store_tile_to_global<kD>(dk_map, smem.k[seat.slot][g], first, item.head, item.batch);
        if (kPart != ONLY_DK) store_tile_to_global<kD>(dv_map, smem.v[seat.slot][g], first, item.head, item.batch);
        bulk_commit();
        bulk_wait_read<0>();
      }
      smem.kv_empty[seat.slot][g].arrive();
    }
  bulk_wait<0>();
}

/* Pᵀ and dSᵀ of one tile of 64 queries as A operands. kEdge: queries before a key, columns < first_column + 8r, do not see it.
 * gains: `ColumnGains` with dropout, or `NoGains`. */
template <typename T, bool kEdge, typename Gains>
__device__ __forceinline__ void differentiate_columns(const float (&score)[kRows / 2], const float (&dweight)[kRows / 2],
                                                      uint32_t (&weight)[kRows / 16][4], uint32_t (&dscore)[kRows / 16][4],
                                                      const QueryRecord &record, float scale, const Fragment &at, int first_column,
                                                      const Gains &gains) {
  constexpr bool kDropout = !std::is_same_v<Gains, NoGains>;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float4 query = record.lse_delta[4 * n + at.quad];
    const float lse[2] = {query.x, query.y}, delta[2] = {query.z, query.w};
    float gain[4];
    if constexpr (kDropout) gains.get(n, gain);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float w[2], ds[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = 4 * n + 2 * r + c;
        w[c] = exp2_fast(fmaf(score[i], scale, -lse[c]));
        if (kEdge && 8 * n + 2 * at.quad + c < first_column + 8 * r) w[c] = 0.f;
        if constexpr (kDropout) ds[c] = w[c] * fmaf(dweight[i], gain[2 * r + c], -delta[c]), w[c] *= gain[2 * r + c];
        else ds[c] = w[c] * (dweight[i] - delta[c]);
        if constexpr (is_half<T>) w[c] *= kWeightScale<T>;
      }
      weight[n >> 1][2 * (n & 1) + r] = pack<T>(w[0], w[1]);
      dscore[n >> 1][2 * (n & 1) + r] = pack<T>(ds[0], ds[1]);
    }
  }
}

template <typename T, int kD, bool kGeneral, Part kPart>
__device__ __forceinline__ void backward_kv_consume(BackwardKvSmem<T, kD, kGeneral> &smem, const BackwardProblem &p, const General &general,
                                                    int group) {
  using Tiles = BackwardKvTiles<kD>;
  constexpr int kBlockRows = Tiles::kGroups * kRows;
  const Fragment at(threadIdx.x % kWarpgroup);
  const int heads = p.h_q / p.h_kv;
  RingPosition<2> seat;
  RingPosition<Tiles::kStages> ring;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int first = item.tile * kBlockRows + group * kRows;
    const bool real = first < p.t_kv;
    const Range seen = queries_seeing(p, item.tile * kBlockRows, kBlockRows), mine = queries_seeing(p, first, kRows);
    const uint32_t k_smem = smem_address(smem.k[seat.slot][group]), v_smem = smem_address(smem.v[seat.slot][group]);
    if (real) {
      smem.kv_full[seat.slot][group].wait(seat.parity);
      if (p.negative) negate_rows<kD>(k_smem, at.thread, group);
    }
    float dk[kD / 2], dv[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) dk[i] = dv[i] = 0.f;
    int previous = -1;
#pragma unroll 1
    for (int head = item.head * heads; head < (item.head + 1) * heads; ++head) {
      const HeadMasks masks(general, item.batch, head);  // without kGeneral, never looked at
#pragma unroll 1
      for (int m = seen.begin; m < seen.end; ++m, ring.advance()) {
        smem.q_full[ring.slot].wait(ring.parity);
        if (m < mine.begin || m >= mine.end) {  // a tile that only other keys of the block meet
          release(smem.q_empty[ring.slot]);
          continue;
        }
        float score[kRows / 2], dweight[kRows / 2];
        uint32_t weight[kRows / 16][4], dscore[kRows / 16][4];
        const uint32_t q_smem = smem_address(smem.q[ring.slot]), dy_smem = smem_address(smem.dy[ring.slot]);
        pin(score);
        wgmma_fence();
        multiply_rows<T, kD, kRows>(score, k_smem, q_smem);
        wgmma_commit();
        wgmma_wait<1>();  // ends the sums of the tile before, whose operands' registers dPᵀ needs
        if constexpr (kPart != ONLY_DV) pin(dk);
        if constexpr (kPart != ONLY_DK) pin(dv);
        if (Tiles::kStages > 1 && previous >= 0) release(smem.q_empty[previous]);
        if constexpr (kPart != ONLY_DV) {
          pin(dweight);
          wgmma_fence();
          multiply_rows<T, kD, kRows>(dweight, v_smem, dy_smem);
          wgmma_commit();
        } else {
#pragma unroll
          for (int i = 0; i < kRows / 2; ++i) dweight[i] = 0.f;
        }
        wgmma_wait<0>();
        pin(score);
        if constexpr (kPart != ONLY_DV) pin(dweight);
        const QueryRecord &record = smem.records[ring.slot];
        if constexpr (kGeneral) {
          mask_columns(score, p, masks, at, first, m * kRows);
          if (general.seed)
            differentiate_columns<T, false>(score, dweight, weight, dscore, record, 1.f, at, 0, ColumnGains(masks, at, first, m * kRows));
          else
            differentiate_columns<T, false>(score, dweight, weight, dscore, record, 1.f, at, 0, NoGains());
        } else {
          const int first_column = first + at.row - p.right - m * kRows;
          if (m * kRows < first - p.right + kRows)
            differentiate_columns<T, true>(score, dweight, weight, dscore, record, p.scale_log2, at, first_column, NoGains());
          else
            differentiate_columns<T, false>(score, dweight, weight, dscore, record, p.scale_log2, at, 0, NoGains());
        }
        if constexpr (kPart != ONLY_DK) pin(weight), pin(dv);
        if constexpr (kPart != ONLY_DV) pin(dscore), pin(dk);
        wgmma_fence();
        if constexpr (kPart != ONLY_DK) accumulate<T, kD, kRows>(dv, weight, dy_smem);
        if constexpr (kPart != ONLY_DV) accumulate<T, kD, kRows>(dk, dscore, q_smem);
        wgmma_commit();
        if constexpr (Tiles::kStages == 1) {
          wgmma_wait<0>();
          if constexpr (kPart != ONLY_DV) pin(dk);
          if constexpr (kPart != ONLY_DK) pin(dv);
          release(smem.q_empty[ring.slot]);
        }
        previous = ring.slot;
      }
    }
    wgmma_wait<0>();
    if constexpr (kPart != ONLY_DV) pin(dk);
    if constexpr (kPart != ONLY_DK) pin(dv);
    if (Tiles::kStages > 1 && previous >= 0) release(smem.q_empty[previous]);
    if (real) {
      constexpr float kFactor = 1.f / kWeightScale<T>;
      warpgroup_sync(group);  // no warp still multiplies with the k and v that their gradients replace
      if constexpr (kPart != ONLY_DV) store_tile<T, kD>(k_smem, dk, at, {p.scale, p.scale});
      if constexpr (kPart != ONLY_DK) store_tile<T, kD>(v_smem, dv, at, {kFactor, kFactor});
      fence_proxy_async();
    }
    release(smem.gradient_full[seat.slot][group]);
  }
}

template <typename T, int kD, bool kGeneral, Part kPart>
__global__ void __launch_bounds__((BackwardKvTiles<kD>::kGroups + 1) * kWarpgroup, 1)
    backward_kv_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                       const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dy_map,
                       const __grid_constant__ CUtensorMap dk_map, const __grid_constant__ CUtensorMap dv_map,
                       const __grid_constant__ BackwardProblem p, const __grid_constant__ General general) {
  using Tiles = BackwardKvTiles<kD>;
  constexpr int kGroups = Tiles::kGroups;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto &smem = *reinterpret_cast<BackwardKvSmem<T, kD, kGeneral> *>(smem_bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2 * kGroups; ++s)
      (&smem.kv_full[0][0])[s].init(1), (&smem.kv_empty[0][0])[s].init(1), (&smem.gradient_full[0][0])[s].init(kArrivals);
    for (int s = 0; s < Tiles::kStages; ++s) smem.q_full[s].init(1), smem.q_empty[s].init(kArrivals * kGroups);
    smem.dealer.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  if (group == kGroups) {
    registers_lower<kBackwardProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) backward_kv_produce<T, kD, kGeneral>(smem, &q_map, &k_map, &v_map, &dy_map, p);
    else if (threadIdx.x % kWarpgroup == 32) backward_kv_store<T, kD, kGeneral, kPart>(smem, &dk_map, &dv_map, p);
    else if (threadIdx.x % kWarpgroup == 64) smem.dealer.deal(smem.kv_empty, p.deck);
  } else {
    registers_raise<kBackwardConsumerRegisters>();
    backward_kv_consume<T, kD, kGeneral, kPart>(smem, p, general, group);
  }
}

}  // namespace power::sdpa
