/* Backward of the attention form, second kernel: dk and dv.
 *
 *     dv_j = Σ_i w_ij / n_i dy_i,    dk_j = p Σ_i (dp_ij − δ_i) u_ij^(p−1) a_ij q_i,    u_ij = a_ij s_ij,    w_ij / n_i = u_ij^p
 *
 * with a_ij = alpha_i (and the p-th root of the gates), alpha and δ from the first kernel. Also Σ_{i>j} A_ij, for dlog_g.
 *
 * A persistent block of 128 keys of one key-value head, one warpgroup for every 64; tiles of 64 queries of all the query heads
 * that read it stream past: Sᵀ = K Qᵀ and dPᵀ = V dYᵀ, then wᵀ and dSᵀ in registers, dV += wᵀ dY and dK += dSᵀ Q
 * with dY and Q read down their columns. Nothing but q and dy crosses warpgroups, and heads are not repeated. The last warpgroup
 * is that of the other kernels.
 *
 * Shared memory: k_smem and v_smem, two slots a warpgroup (dk and dv leave through them), q_smem, dy_smem and the queries'
 * records in a ring of stages.
 */
#pragma once

#include "attention_backward_q.cuh"

namespace power::attention {

/* d: stages  why
 *  64: 6     K and V stay in registers as A operands (kFragments), which halves what S and dP read from shared memory; with both
 *            operands there, that was the limit (57 % of the matrix units' time, and no better with 3 warpgroups)
 * 128: 3     dK and dV are 128 registers, so K and V cannot; 3 stages beside the two slots are all of shared memory
 * 256: 2     dK and dV of 64 keys are twice that: both warpgroups take the same 64 keys (kShared), each computes S and dP and sums
 *            up half of the columns. K and V have one slot: correct first, not tuned */
template <int kD>
struct KvTiles {
  static constexpr int kStages = kD == 64 ? 6 : kD == 128 ? 3 : 2;
  static constexpr bool kShared = kD == 256;
  static constexpr int kSeats = kShared ? 1 : 2, kTiles = kShared ? 1 : kBackwardGroups;  // slots of K and V; tiles of 64 keys in each
  static constexpr int kKeys = kTiles * kRows, kColumns = kShared ? kD / kBackwardGroups : kD;  // of a block; of a warpgroup's sums
  static constexpr bool kFragments = kD == 64;
};

struct BackwardKvProblem : Problem {
  const void *records;  // QueryRecord or GatedQueryRecord [b, h_q, tiles of 64 rows]
  float *column_sum;    // [b, h_kv, t_kv], with gates: Σ_{i>j} A_ij
};

template <typename T, int kD, bool kGates>
struct BackwardKvSmem {
  using Record = std::conditional_t<kGates, GatedQueryRecord, QueryRecord>;
  static constexpr int kStages = KvTiles<kD>::kStages;
  static constexpr int kSeats = KvTiles<kD>::kSeats, kTiles = KvTiles<kD>::kTiles;
  T k[kSeats][kTiles][kRows * kD];
  T v[kSeats][kTiles][kRows * kD];
  T q[kStages][kRows * kD];
  T dy[kStages][kRows * kD];
  Record records[kStages];
  Dealer<kSeats> dealer;
  Barrier kv_full[kSeats][kTiles], gradient_full[kSeats][kBackwardGroups], kv_empty[kSeats][kBackwardGroups];
  Barrier q_full[kStages], q_empty[kStages];
};

template <typename T, int kD, bool kGates>
__device__ __forceinline__ void backward_kv_produce(BackwardKvSmem<T, kD, kGates> &smem, const CUtensorMap *q_map, const CUtensorMap *k_map,
                                                    const CUtensorMap *v_map, const CUtensorMap *dy_map, const BackwardKvProblem &p) {
  using Record = typename BackwardKvSmem<T, kD, kGates>::Record;
  constexpr int kStages = KvTiles<kD>::kStages, kBlockRows = KvTiles<kD>::kKeys;
  const int row_tiles = (p.t_q + kRows - 1) / kRows;
  const int heads = p.h_q / p.h_kv;
  RingPosition<KvTiles<kD>::kSeats> seat;
  RingPosition<kStages> ring;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int first = item.tile * kBlockRows;
#pragma unroll 1
    for (int g = 0; g < KvTiles<kD>::kTiles; ++g) {
      Barrier &full = smem.kv_full[seat.slot][g];
      if (first + g * kRows < p.t_kv) {
        full.expect(2 * kRows * kD * sizeof(T));
        load_tile<kD>(smem.k[seat.slot][g], k_map, kRows, first + g * kRows, item.head, item.batch, full);
        load_tile<kD>(smem.v[seat.slot][g], v_map, kRows, first + g * kRows, item.head, item.batch, full);
      } else {
        full.arrive();  // no rows; the barriers of all warpgroups stay in the same phase
      }
    }
#pragma unroll 1
    for (int head = item.head * heads; head < (item.head + 1) * heads; ++head) {
      const Record *records = static_cast<const Record *>(p.records) + int64_t(item.batch * p.h_q + head) * row_tiles;
#pragma unroll 1
      for (int m = p.causal ? first / kRows : 0; m < row_tiles; ++m, ring.advance()) {
        Barrier &full = smem.q_full[ring.slot];
        smem.q_empty[ring.slot].wait(ring.parity ^ 1);
        full.expect(2 * kRows * kD * sizeof(T) + sizeof(Record));
        load_tile<kD>(smem.q[ring.slot], q_map, kRows, m * kRows, head, item.batch, full);
        load_tile<kD>(smem.dy[ring.slot], dy_map, kRows, m * kRows, head, item.batch, full);
        bulk_load(smem_address(&smem.records[ring.slot]), records + m, sizeof(Record), full.address());
      }
    }
  }
}

/* The storing thread: results leave through the slots of the tiles they replace, which are free again once they have been read. */
template <typename T, int kD, bool kGates>
__device__ __forceinline__ void backward_kv_store(BackwardKvSmem<T, kD, kGates> &smem, const CUtensorMap *dk_map,
                                                  const CUtensorMap *dv_map, const Problem &p) {
  constexpr int kColumns = KvTiles<kD>::kColumns;
  RingPosition<KvTiles<kD>::kSeats> seat;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance())
#pragma unroll 1
    for (int g = 0; g < kBackwardGroups; ++g) {
      const int tile = KvTiles<kD>::kShared ? 0 : g, column = KvTiles<kD>::kShared ? g * kColumns : 0;
      const int first = item.tile * KvTiles<kD>::kKeys + tile * kRows;
      smem.gradient_full[seat.slot][g].wait(seat.parity);
      if (first < p.t_kv) {
        store_tile_to_global<kColumns>(dk_map, smem.k[seat.slot][tile] + column * kRows, first, item.head, item.batch, column);
        store_tile_to_global<kColumns>(dv_map, smem.v[seat.slot][tile] + column * kRows, first, item.head, item.batch, column);
        bulk_commit();
        bulk_wait_read<0>();
      }
      smem.kv_empty[seat.slot][g].arrive();
    }
  bulk_wait<0>();
}

/* The gates of this thread's two keys: g_j, exp(rest_j)^(1/p), and H at the end of their block. Loaded anew for every tile (from the
 * first-level cache): kept, they would be the registers that d = 128 lacks. */
struct KeyGates {
  float sum[2], rest[2], end[2];
  __device__ __forceinline__ KeyGates(const GateRecord *record, const Fragment &at) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      sum[r] = load(&record->sum[at.row + 8 * r]), rest[r] = load(&record->rest[at.row + 8 * r]), end[r] = load(&record->end[r]);
  }
  /* A load that the compiler does not move out of the loop. */
  static __device__ __forceinline__ float load(const float *address) {
    float x;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(address));
    return x;
  }
};

/* float16: powers of two that w / n and dS are multiplied by before they are rounded. */
struct Packing {
  float weight = 1.f, dscore = 1.f;
};

template <typename T, int kD, int kDeg>
__device__ __forceinline__ Packing choose_packing(const Problem &p, int batch, int head_kv) {
  Packing packing;
  if constexpr (is_half<T>) {
    const int heads = p.h_q / p.h_kv;
    float q = 0.f, dy = 0.f;
    for (int h = 0; h < heads; ++h) {
      q = fmaxf(q, p.q_max[batch * p.h_q + head_kv * heads + h]);
      dy = fmaxf(dy, p.dy_max[batch * p.h_q + head_kv * heads + h]);
    }
    const float score = q * p.k_max[batch * p.h_kv + head_kv], dweight = dy * p.v_max[batch * p.h_kv + head_kv];
    if (!(score > 0.f && dweight > 0.f)) return packing;
    // Normalised: w / n ≤ 1, and dS is about dweight / (i · score / √d), 2^10 of it on the first rows; what outgrows 2^16
    // there (a row that sees only keys nearly orthogonal to it) is clamped. Otherwise both have plain bounds.
    const int above = exponent_above(score);
    packing.weight = power_of_two(p.normalize ? 10 : 14 - kDeg * above);
    packing.dscore = power_of_two(p.normalize ? 10 + above - (kD == 64 ? 3 : 4) - exponent_above(2.f * dweight)
                                              : 14 - (kDeg - 1) * above - exponent_above(dweight));
  }
  return packing;
}

/* wᵀ / n and dSᵀ of one tile of 64 queries as A operands; adds Σ_{i>j} A_ij to column_sum. kEdge: some queries come before some
 * keys (columns < key are dropped), or share their block of gates. */
template <typename T, int kDeg, bool kGates, bool kEdge, typename Record>
__device__ __forceinline__ void differentiate_columns(const float (&score)[kRows / 2], const float (&dweight)[kRows / 2],
                                                      uint32_t (&weight)[kRows / 16][4], uint32_t (&dscore)[kRows / 16][4],
                                                      float (&column_sum)[2], const Record &record, const GateRecord *key_record,
                                                      const Fragment &at, int first_key, const Packing &packing) {
  float decay[2] = {1.f, 1.f}, key_sum[2] = {0.f, 0.f};
  if constexpr (kGates) {
    const KeyGates gates(key_record, at);
    key_sum[0] = gates.sum[0], key_sum[1] = gates.sum[1];
    const float between = exp2_fast((record.start[0] - gates.end[0]) + (record.start[1] - gates.end[1]));
    decay[0] = gates.rest[0] * between, decay[1] = gates.rest[1] * between;
  }
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float4 query = record.alpha_delta[4 * n + at.quad];
    float alpha[2] = {query.x, query.y}, sum[2] = {0.f, 0.f};
    const float delta[2] = {query.z, query.w};
    if constexpr (kGates) {
      const float2 g = record.sum[4 * n + at.quad];
      sum[0] = g.x, sum[1] = g.y;
      if constexpr (!kEdge) alpha[0] *= exp2_fast(g.x), alpha[1] *= exp2_fast(g.y);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float w[2], ds[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * n + 2 * at.quad + c;
        float a = alpha[c];
        if constexpr (kGates) a *= kEdge ? exp2_fast(sum[c] - key_sum[r]) : decay[r];
        const float u = a * score[4 * n + 2 * r + c], lower = lower_power_of<kDeg>(u), dw = dweight[4 * n + 2 * r + c];
        w[c] = lower * u;
        ds[c] = lower * (kGates ? a * (dw - delta[c]) : a * dw - delta[c]);
        if (kEdge && column < first_key + 8 * r) w[c] = 0.f, ds[c] = 0.f;
        if (kGates && !(kEdge && column <= first_key + 8 * r)) column_sum[r] += w[c] * (dw - delta[c]);
        if constexpr (is_half<T>) w[c] *= packing.weight, ds[c] *= packing.dscore;
      }
      weight[n >> 1][2 * (n & 1) + r] = pack<T>(w[0], w[1]);
      dscore[n >> 1][2 * (n & 1) + r] = pack<T>(ds[0], ds[1]);
    }
  }
}

template <typename T, int kD, int kDeg, bool kGates>
__device__ __forceinline__ void backward_kv_consume(BackwardKvSmem<T, kD, kGates> &smem, const BackwardKvProblem &p, int group) {
  constexpr int kStages = KvTiles<kD>::kStages, kBlockRows = KvTiles<kD>::kKeys, kColumns = KvTiles<kD>::kColumns;
  const Fragment at(threadIdx.x % kWarpgroup);
  const int row_tiles = (p.t_q + kRows - 1) / kRows;
  const int heads = p.h_q / p.h_kv;
  RingPosition<KvTiles<kD>::kSeats> seat;
  RingPosition<kStages> ring;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int tile = KvTiles<kD>::kShared ? 0 : group, first = item.tile * kBlockRows + tile * kRows;
    const bool real = first < p.t_kv;
    const int from = p.causal ? item.tile * kBlockRows / kRows : 0;
    const uint32_t k_smem = smem_address(smem.k[seat.slot][tile]), v_smem = smem_address(smem.v[seat.slot][tile]);
    const uint32_t half = (group - tile) * kColumns * kRows * sizeof(T);  // where this warpgroup's columns begin in a tile
    const GateRecord *records = p.gates_of(item.batch, item.head);
    const GateRecord *key_record = records + first / kRows;
    const Packing packing = choose_packing<T, kD, kDeg>(p, item.batch, item.head);
    if (real) smem.kv_full[seat.slot][tile].wait(seat.parity);

    uint32_t k_fragments[kD / 16][4], v_fragments[kD / 16][4];
    if constexpr (KvTiles<kD>::kFragments) load_fragments<kD>(k_fragments, k_smem, at), load_fragments<kD>(v_fragments, v_smem, at);
    float dk[kColumns / 2], dv[kColumns / 2], column_sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) dk[i] = dv[i] = 0.f;
    int previous = -1;
#pragma unroll 1
    for (int head = 0; head < heads; ++head) {
#pragma unroll 1
      for (int m = from; m < row_tiles; ++m, ring.advance()) {
        smem.q_full[ring.slot].wait(ring.parity);
        if (!real || (p.causal && (m + 1) * kRows <= first)) {  // a tile that only earlier keys of the block meet
          smem.q_empty[ring.slot].release();
          continue;
        }
        float score[kRows / 2], dweight[kRows / 2];
        uint32_t weight[kRows / 16][4], dscore[kRows / 16][4];
        const uint32_t q_smem = smem_address(smem.q[ring.slot]), dy_smem = smem_address(smem.dy[ring.slot]);
        pin(score);
        wgmma_fence();
        if constexpr (KvTiles<kD>::kFragments) multiply_fragments<T, kD, kRows>(score, k_fragments, q_smem);
        else multiply_rows<T, kD, kRows>(score, k_smem, q_smem);
        wgmma_commit();
        wgmma_wait<1>();  // ends the sums of the tile before, whose operands' registers dPᵀ needs
        pin(dk);
        pin(dv);
        if (previous >= 0) smem.q_empty[previous].release();
        pin(dweight);
        wgmma_fence();
        if constexpr (KvTiles<kD>::kFragments) multiply_fragments<T, kD, kRows>(dweight, v_fragments, dy_smem);
        else multiply_rows<T, kD, kRows>(dweight, v_smem, dy_smem);
        wgmma_commit();
        wgmma_wait<0>();
        pin(score);
        pin(dweight);
        const auto &record = smem.records[ring.slot];
        if (p.causal && (kGates ? m * kRows < first / kGateBlock * kGateBlock + kGateBlock : m * kRows < first + kRows))
          differentiate_columns<T, kDeg, kGates, true>(score, dweight, weight, dscore, column_sum, record, key_record, at,
                                                       first - m * kRows + at.row, packing);
        else
          differentiate_columns<T, kDeg, kGates, false>(score, dweight, weight, dscore, column_sum, record, key_record, at, 0,
                                                        packing);
        pin(weight);
        pin(dscore);
        pin(dk);
        pin(dv);
        wgmma_fence();
        accumulate<T, kColumns, kRows>(dv, weight, dy_smem + half);
        accumulate<T, kColumns, kRows>(dk, dscore, q_smem + half);
        wgmma_commit();
        previous = ring.slot;
      }
    }
    wgmma_wait<0>();
    pin(dk);
    pin(dv);
    if (previous >= 0) smem.q_empty[previous].release();
    if (!real) {
      smem.gradient_full[seat.slot][group].release();
      continue;
    }

    const float plain = p.normalize ? 1.f : p.scale_p, dk_factor = kDeg * plain / packing.dscore, dv_factor = plain / packing.weight;
    if constexpr (kGates) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = first + at.row + 8 * r;
        const float sum = sum_of_quad(column_sum[r]) * plain;
        if (at.quad == 0 && group == tile && key < p.t_kv) p.column_sum[int64_t(item.batch * p.h_kv + item.head) * p.t_kv + key] = sum;
      }
    }
    // No warp still multiplies with the k and v that their gradients replace.
    if constexpr (KvTiles<kD>::kShared) named_barrier_sync(CONSUMERS, kBackwardGroups * kWarpgroup);
    else warpgroup_sync(group);
    store_tile<T, kColumns>(k_smem + half, dk, at, {dk_factor, dk_factor});
    store_tile<T, kColumns>(v_smem + half, dv, at, {dv_factor, dv_factor});
    fence_proxy_async();
    smem.gradient_full[seat.slot][group].release();
  }
}

template <typename T, int kD, int kDeg, bool kGates>
__global__ void __launch_bounds__((kBackwardGroups + 1) * kWarpgroup, 1)
    backward_kv_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                       const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dy_map,
                       const __grid_constant__ CUtensorMap dk_map, const __grid_constant__ CUtensorMap dv_map,
                       const __grid_constant__ BackwardKvProblem p) {
  using Tiles = KvTiles<kD>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto &smem = *reinterpret_cast<BackwardKvSmem<T, kD, kGates> *>(smem_bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tiles::kSeats * Tiles::kTiles; ++s) (&smem.kv_full[0][0])[s].init(1);
    for (int s = 0; s < Tiles::kSeats * kBackwardGroups; ++s)
      (&smem.kv_empty[0][0])[s].init(1), (&smem.gradient_full[0][0])[s].init_released(4);
    for (int s = 0; s < Tiles::kStages; ++s)
      smem.q_full[s].init(1), smem.q_empty[s].init_released(4 * kBackwardGroups);
    smem.dealer.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  if (group == kBackwardGroups) {
    registers_lower<kBackwardProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) backward_kv_produce<T, kD, kGates>(smem, &q_map, &k_map, &v_map, &dy_map, p);
    else if (threadIdx.x % kWarpgroup == 32) backward_kv_store<T, kD, kGates>(smem, &dk_map, &dv_map, p);
    else if (threadIdx.x % kWarpgroup == 64) smem.dealer.deal(smem.kv_empty, p.deck);
  } else {
    registers_raise<kBackwardConsumerRegisters>();
    backward_kv_consume<T, kD, kDeg, kGates>(smem, p, group);
  }
}

}  // namespace power::attention
