/* Backward of the attention form, first kernel: dq, and what the second kernel needs of every query.
 *
 *     dq_i = f_i · Σ_j (dp_ij − δ_i) s_ij^(p−1) exp(G_i − G_j) k_j,   dp = dY Vᵀ,   δ_i = dy_i·y_i,   f_i = p c_i / n_i
 *     A_ij = w_ij (dp_ij − δ_i) / n_i summed over j < i (the diagonal carries no gate), for dlog_g
 *
 * A persistent block of 64·kGroups query rows of one head, one warpgroup for every 64; tiles of keys and values stream past:
 * S = Q Kᵀ and dP = dY Vᵀ from shared memory, dS in registers, dQ += dS K with K read down its columns. No sum leaves its
 * warpgroup, so the result has one order of additions. Of the last warpgroup one thread loads, one
 * stores and one deals out the items.
 *
 * Shared memory: q_smem and dy_smem, two slots a warpgroup (dq leaves through q's), k_smem and v_smem in a ring of stages.
 */
#pragma once

#include "attention_forward.cuh"

namespace power::attention {

/* d: keys  stages  why
 *  64: 128   4       S, dP, dQ, dS are 64 + 64 + 32 + 32 registers: fits 240; wider products load less from shared memory
 *  64: 64    8       with gates, whose factors need the registers
 * 128: 64    3       dQ is 64 registers already; 3 stages beside the two slots are all of shared memory. Q and dY stay in registers
 *                    as A operands (kFragments): products of 64 columns with both operands in shared memory are bound by it
 * 256: 64    1       dQ is 128 registers; Q and dY have one slot. A stage is free once its product has ended: correct first, not tuned */
template <int kD, bool kGates>
struct BackwardQTiles {
  static constexpr int kKeys = kD == 64 && !kGates ? 128 : 64, kStages = kD == 64 ? (kGates ? 8 : 4) : kD == 128 ? 3 : 1;
  static constexpr int kSeats = kD == 256 ? 1 : 2;  // slots of q and dy
  static constexpr bool kFragments = kD == 128 && !kGates;
};
constexpr int kBackwardGroups = 2;
constexpr int kBackwardProducerRegisters = 24, kBackwardConsumerRegisters = 240;

struct BackwardQProblem : Problem {
  const void *y;
  int64_t y_stride[3];
  int e;
  void *records;  // QueryRecord or GatedQueryRecord [b, h_q, tiles of 64 rows]
  float *row_sum;  // [b, h_q, t_q], with gates: Σ_{j<i} A_ij
};

template <typename T, int kD, bool kGates>
struct BackwardQSmem {
  static constexpr int kKeys = BackwardQTiles<kD, kGates>::kKeys, kStages = BackwardQTiles<kD, kGates>::kStages;
  static constexpr int kSeats = BackwardQTiles<kD, kGates>::kSeats;
  T q[kSeats][kBackwardGroups][kRows * kD];
  T dy[kSeats][kBackwardGroups][kRows * kD];
  T k[kStages][kKeys * kD];
  T v[kStages][kKeys * kD];
  GateRecord gates[kGates ? kStages : 1][kKeys / kRows];
  Dealer<kSeats> dealer;
  Barrier q_full[kSeats][kBackwardGroups], dq_full[kSeats][kBackwardGroups], q_empty[kSeats][kBackwardGroups];
  Barrier kv_full[kStages], kv_empty[kStages];
};

template <typename T, int kD, bool kGates>
__device__ __forceinline__ void backward_q_produce(BackwardQSmem<T, kD, kGates> &smem, const CUtensorMap *q_map, const CUtensorMap *k_map,
                                                   const CUtensorMap *v_map, const CUtensorMap *dy_map, const Problem &p) {
  constexpr int kKeys = BackwardQTiles<kD, kGates>::kKeys, kStages = BackwardQTiles<kD, kGates>::kStages;
  constexpr int kBlockRows = kBackwardGroups * kRows;
  constexpr uint32_t kTileBytes = 2 * kKeys * kD * sizeof(T), kGateBytes = sizeof(smem.gates[0]);
  RingPosition<BackwardQTiles<kD, kGates>::kSeats> seat;
  RingPosition<kStages> ring;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int head_kv = item.head / (p.h_q / p.h_kv), first = item.tile * kBlockRows;
#pragma unroll 1
    for (int g = 0; g < kBackwardGroups; ++g) {
      Barrier &full = smem.q_full[seat.slot][g];
      if (first + g * kRows < p.t_q) {
        full.expect(2 * kRows * kD * sizeof(T));
        load_tile<kD>(smem.q[seat.slot][g], q_map, kRows, first + g * kRows, item.head, item.batch, full);
        load_tile<kD>(smem.dy[seat.slot][g], dy_map, kRows, first + g * kRows, item.head, item.batch, full);
      } else {
        full.arrive();  // no rows; the barriers of all warpgroups stay in the same phase
      }
    }
    const int seen = tiles_seen(p, first, min(kBlockRows, p.t_q - first), kKeys);
    const GateRecord *gates = p.gates_of(item.batch, head_kv);
#pragma unroll 1
    for (int n = 0; n < seen; ++n, ring.advance()) {
      Barrier &full = smem.kv_full[ring.slot];
      smem.kv_empty[ring.slot].wait(ring.parity ^ 1);
      full.expect(kTileBytes + (kGates ? kGateBytes : 0));
      load_tile<kD>(smem.k[ring.slot], k_map, kKeys, n * kKeys, head_kv, item.batch, full);
      load_tile<kD>(smem.v[ring.slot], v_map, kKeys, n * kKeys, head_kv, item.batch, full);
      if constexpr (kGates) bulk_load(smem_address(smem.gates[ring.slot]), gates + n * (kKeys / kRows), kGateBytes, full.address());
    }
  }
}

/* The storing thread: results leave through the slots of the tiles they replace, which are free again once they have been read. */
template <typename T, int kD, bool kGates>
__device__ __forceinline__ void backward_q_store(BackwardQSmem<T, kD, kGates> &smem, const CUtensorMap *dq_map, const Problem &p) {
  RingPosition<BackwardQTiles<kD, kGates>::kSeats> seat;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance())
#pragma unroll 1
    for (int g = 0; g < kBackwardGroups; ++g) {
      const int first = (item.tile * kBackwardGroups + g) * kRows;
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

/* This thread's half of one row of y (two threads share a row, as in `normalize_rows`), zeros past the end. */
template <typename T, int kD>
struct HalfRow {
  uint4 chunk[kD / 16];
  __device__ HalfRow(const BackwardQProblem &p, const Item &item, int row, int thread) {
    const T *y = static_cast<const T *>(p.y) + item.batch * p.y_stride[0] + row * p.y_stride[1] + item.head * p.y_stride[2];
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      const int column = ((thread & 1) * (kD / 16) + i) * 8;
      chunk[i] = p.normalize && row < p.t_q && column < p.e ? *reinterpret_cast<const uint4 *>(y + column) : make_uint4(0, 0, 0, 0);
    }
  }
  /* (dy·y, dy·dy) of the whole row, dy in shared memory. */
  __device__ float2 dot(uint32_t dy_tile, int thread) const {
    float2 sum = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      const uint4 x = load_shared_128(chunk_address(dy_tile, kRows, thread >> 1, (thread & 1) * (kD / 16) + i));
      const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {chunk[i].x, chunk[i].y, chunk[i].z, chunk[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 u = Pair<T>::unpack(a[j]), w = Pair<T>::unpack(b[j]);
        sum.x += u.x * w.x + u.y * w.y;
        if constexpr (is_half<T>) sum.y += u.x * u.x + u.y * u.y;
      }
    }
    sum.x += __shfl_xor_sync(~0u, sum.x, 1);
    if constexpr (is_half<T>) sum.y += __shfl_xor_sync(~0u, sum.y, 1);
    return sum;
  }
};

/* What a row's Σ_j w_ij (dp_ij − δ_i) is summed from: the keys before the token itself, and the token itself. */
struct RowSum {
  float before[2] = {0.f, 0.f}, itself[2] = {0.f, 0.f}, own_weight[2] = {0.f, 0.f};
};

/* Adds a tile's w (dp − δ) to `sum`. kEdge as in `differentiate_rows`. */
template <typename T, int kDeg, bool kGates, bool kEdge, int kKeys>
__device__ __forceinline__ void sum_rows(const float (&score)[kKeys / 2], const float (&dweight)[kKeys / 2], RowSum &sum,
                                         const float (&delta)[2], const Fragment &at, int last_column, const GateRecord *records,
                                         const QueryGates *gates, float scale) {
  float decay[2] = {scale, scale};
  if constexpr (kGates && !kEdge) decay[0] = gates->decay(*records, 0), decay[1] = gates->decay(*records, 1);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * n + 2 * at.quad + c, i = 4 * n + 2 * r + c;
        float s = score[i];
        if constexpr (kGates || is_half<T>) s *= score_factor<T, kGates, kEdge>(records, gates, decay, scale, column, r);
        const float w = power_of<kDeg>(s), product = w * (dweight[i] - delta[r]);
        if (!kEdge || column < last_column + 8 * r) sum.before[r] += product;
        else if (column == last_column + 8 * r) sum.itself[r] = product, sum.own_weight[r] = w;
      }
}

/* dS of one tile of keys as the A operand of dQ += dS K. kEdge: columns > last_column are dropped, and the gates of keys and rows
 * have one block. */
template <typename T, int kDeg, bool kGates, bool kEdge, int kKeys>
__device__ __forceinline__ void differentiate_rows(const float (&score)[kKeys / 2], const float (&dweight)[kKeys / 2],
                                                   uint32_t (&dscore)[kKeys / 16][4], const float (&delta)[2],
                                                   const float (&packing)[2], const Fragment &at, int last_column,
                                                   const GateRecord *records, const QueryGates *gates, float scale) {
  float decay[2] = {scale, scale};
  if constexpr (kGates && !kEdge) decay[0] = gates->decay(*records, 0), decay[1] = gates->decay(*records, 1);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float ds[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * n + 2 * at.quad + c;
        float factor = 1.f, s = score[4 * n + 2 * r + c];
        if constexpr (kGates || is_half<T>) factor = score_factor<T, kGates, kEdge>(records, gates, decay, scale, column, r), s *= factor;
        ds[c] = lower_power_of<kDeg>(s) * (dweight[4 * n + 2 * r + c] - delta[r]);
        // s carries the gates' p-th root, so s^(p−1) lacks one more of it; the scale of the head belongs to c_i instead.
        if constexpr (kGates) ds[c] *= is_half<T> ? factor / scale : factor;
        if (kEdge && column > last_column + 8 * r) ds[c] = 0.f;
        if constexpr (is_half<T>) ds[c] *= packing[r];
      }
      dscore[n >> 1][2 * (n & 1) + r] = pack<T>(ds[0], ds[1]);
    }
}

template <typename T, int kD, int kDeg, bool kGates>
__device__ __forceinline__ void backward_q_consume(BackwardQSmem<T, kD, kGates> &smem, const BackwardQProblem &p, int group) {
  constexpr int kKeys = BackwardQTiles<kD, kGates>::kKeys, kStages = BackwardQTiles<kD, kGates>::kStages;
  constexpr int kBlockRows = kBackwardGroups * kRows;
  using Record = std::conditional_t<kGates, GatedQueryRecord, QueryRecord>;
  const Fragment at(threadIdx.x % kWarpgroup);
  const int row_tiles = (p.t_q + kRows - 1) / kRows;
  RingPosition<BackwardQTiles<kD, kGates>::kSeats> seat;
  RingPosition<kStages> ring;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int head_kv = item.head / (p.h_q / p.h_kv), first = item.tile * kBlockRows + group * kRows;
    const int seen = tiles_seen(p, item.tile * kBlockRows, min(kBlockRows, p.t_q - item.tile * kBlockRows), kKeys);
    const int mine = first < p.t_q ? tiles_seen(p, first, kRows, kKeys) : 0;
    if (first < p.t_q) {
      const int row = first + (at.thread >> 1);  // of the half row this thread prepares
      const HalfRow<T, kD> y(p, item, row, at.thread);
      const float norm = row < p.t_q ? p.norm[item.batch * p.norm_stride[0] + row * p.norm_stride[1] + item.head * p.norm_stride[2]] : 0.f;
      const float head_factor = head_scale<T, kDeg>(p, item.batch, head_kv);
      const GateRecord *records = p.gates_of(item.batch, head_kv);
      QueryGates gates;
      if constexpr (kGates) gates.load(records[first / kRows], at);

      const uint32_t q_smem = smem_address(smem.q[seat.slot][group]), dy_smem = smem_address(smem.dy[seat.slot][group]);
      smem.q_full[seat.slot][group].wait(seat.parity);
      const float2 dots = y.dot(dy_smem, at.thread);
      const float row_scale = normalize_rows<T, kD>(q_smem, at.thread, group) * head_factor;

      constexpr bool kFragments = BackwardQTiles<kD, kGates>::kFragments;
      uint32_t q_fragments[kD / 16][4], dy_fragments[kD / 16][4];
      if constexpr (kFragments) load_fragments<kD>(q_fragments, q_smem, at), load_fragments<kD>(dy_fragments, dy_smem, at);

      // What the second kernel needs: w / n = (alpha s)^p in terms of the unscaled s.
      const bool real = row < p.t_q && !p.zero;
      Record &record = static_cast<Record *>(p.records)[int64_t(item.batch * p.h_q + item.head) * row_tiles + first / kRows];
      float *pair = &record.alpha_delta[at.thread >> 2].x + ((at.thread >> 1) & 1);
      const float alpha = !real ? 0.f : p.normalize ? row_scale * inverse_root<kDeg>(norm) : 1.f;
      if (!(at.thread & 1)) pair[0] = alpha;
      if constexpr (kGates) {
        if (at.thread < kRows / 2) record.sum[at.thread] = *reinterpret_cast<const float2 *>(&records[first / kRows].sum[2 * at.thread]);
        if (at.thread < 2) record.start[at.thread] = records[first / kRows].start[at.thread];
      }
      const float weight_factor = !real ? 0.f : p.normalize ? (norm == 0.f ? 0.f : 1.f / norm) : p.scale_p / power_of<kDeg>(row_scale);
      float delta[2], packing[2] = {1.f, 1.f}, inverse_norm[2], factor[2], delta_factor[2], dq[kD / 2];
      if constexpr (is_half<T>) {  // bounds |dp − δ| s^(p−1) by 2^15, row by row
        const float largest = 2.f * sqrtf(dots.y) * p.v_max[item.batch * p.h_kv + head_kv];
        const int exponent = largest > 0.f ? 15 - score_bits<kDeg> * (kDeg - 1) - exponent_above(largest) : 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) packing[r] = at.of_row(power_of_two(exponent), r);
      }
      RowSum sum;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        delta[r] = at.of_row(dots.x, r), inverse_norm[r] = at.of_row(weight_factor, r);
        factor[r] = kDeg * at.of_row(row_scale, r) * inverse_norm[r] / packing[r];
        delta_factor[r] = kGates ? 1.f : at.of_row(alpha, r);
      }
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) dq[i] = 0.f;
      int previous = 0;
#pragma unroll 1
      for (int n = 0; n < mine; ++n, ring.advance()) {
        float score[kKeys / 2], dweight[kKeys / 2];
        uint32_t dscore[kKeys / 16][4];
        const uint32_t k_smem = smem_address(smem.k[ring.slot]);
        smem.kv_full[ring.slot].wait(ring.parity);
        const uint32_t v_smem = smem_address(smem.v[ring.slot]);
        pin(score);
        if constexpr (kFragments) {
          wgmma_fence();
          multiply_fragments<T, kD, kKeys>(score, q_fragments, k_smem);
          wgmma_commit();
          wgmma_wait<1>();  // ends dQ += dS K of the tile before, whose operand's registers dP needs
          pin(dweight);
          wgmma_fence();
          multiply_fragments<T, kD, kKeys>(dweight, dy_fragments, v_smem);
        } else {
          pin(dweight);
          wgmma_fence();
          multiply_rows<T, kD, kKeys>(score, q_smem, k_smem);
          multiply_rows<T, kD, kKeys>(dweight, dy_smem, v_smem);
        }
        wgmma_commit();
        wgmma_wait<0>();  // also ends dQ += dS K of the tile before
        pin(score);
        pin(dweight);
        pin(dq);
        if (kStages > 1 && n) smem.kv_empty[previous].release();
        const GateRecord *key_gates = smem.gates[kGates ? ring.slot : 0];
        const int last_column = p.causal ? first - n * kKeys + at.row : p.t_kv;
        const bool edge = p.causal && (n + 1) * kKeys > (kGates ? first / kGateBlock * kGateBlock : first);
        if (kGates || (mine == 1 && p.normalize)) {
          if (edge)
            sum_rows<T, kDeg, kGates, true, kKeys>(score, dweight, sum, delta, at, last_column, key_gates, &gates, head_factor);
          else
            sum_rows<T, kDeg, kGates, false, kKeys>(score, dweight, sum, delta, at, 0, key_gates, &gates, head_factor);
          // Σ_j w_ij (dp_ij − δ_i) should be 0, and is the error that δ has from the rounding of y. Rows that see few keys feel
          // it: without gates those of the first tile; with gates any, but then what they see is mostly in their last tile.
          if (n == mine - 1 && p.normalize) {
#pragma unroll
            for (int r = 0; r < 2; ++r) delta[r] += sum_of_quad(sum.before[r] + sum.itself[r]) * inverse_norm[r];
          }
        }
        if (edge)
          differentiate_rows<T, kDeg, kGates, true, kKeys>(score, dweight, dscore, delta, packing, at, last_column, key_gates, &gates,
                                                           head_factor);
        else
          differentiate_rows<T, kDeg, kGates, false, kKeys>(score, dweight, dscore, delta, packing, at, 0, key_gates, &gates, head_factor);
        pin(dscore);
        pin(dq);
        wgmma_fence();
        accumulate<T, kD, kKeys>(dq, dscore, k_smem);
        wgmma_commit();
        if constexpr (kStages == 1) {
          wgmma_wait<0>();
          pin(dq);
          smem.kv_empty[0].release();
        }
        previous = ring.slot;
      }
      wgmma_wait<0>();
      pin(dq);
      if (kStages > 1 && mine) smem.kv_empty[previous].release();

#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row_in_tile = at.row + 8 * r;
        if (at.quad == 0) (&record.alpha_delta[row_in_tile >> 1].z)[row_in_tile & 1] = delta[r] * delta_factor[r];
        if constexpr (kGates) {
          // Normalised, the sum over all j is 0, so that over j < i is what the token itself contributes, negated.
          const float before = sum_of_quad(sum.before[r]), itself = sum_of_quad(sum.itself[r]), own = sum_of_quad(sum.own_weight[r]);
          const float moved = (before + itself) * inverse_norm[r];
          const float row_sum = (p.normalize ? own * moved - itself : before) * inverse_norm[r];
          if (at.quad == 0 && first + row_in_tile < p.t_q)
            p.row_sum[int64_t(item.batch * p.h_q + item.head) * p.t_q + first + row_in_tile] = row_sum;
        }
      }
      warpgroup_sync(group);  // no warp still multiplies with the q that dq replaces
      store_tile<T, kD>(q_smem, dq, at, factor);
      fence_proxy_async();
      smem.dq_full[seat.slot][group].release();
    } else {
      smem.dq_full[seat.slot][group].release();
    }
    for (int n = mine; n < seen; ++n, ring.advance()) {  // tiles that only later rows of the block see
      smem.kv_full[ring.slot].wait(ring.parity);
      smem.kv_empty[ring.slot].release();
    }
  }
}

template <typename T, int kD, int kDeg, bool kGates>
__global__ void __launch_bounds__((kBackwardGroups + 1) * kWarpgroup, 1)
    backward_q_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dy_map,
                      const __grid_constant__ CUtensorMap dq_map, const __grid_constant__ BackwardQProblem p) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto &smem = *reinterpret_cast<BackwardQSmem<T, kD, kGates> *>(smem_bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < BackwardQTiles<kD, kGates>::kSeats * kBackwardGroups; ++s) {
      (&smem.q_full[0][0])[s].init(1), (&smem.q_empty[0][0])[s].init(1);
      (&smem.dq_full[0][0])[s].init_released(4);
    }
    for (int s = 0; s < BackwardQTiles<kD, kGates>::kStages; ++s)
      smem.kv_full[s].init(1), smem.kv_empty[s].init_released(4 * kBackwardGroups);
    smem.dealer.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  if (group == kBackwardGroups) {
    registers_lower<kBackwardProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) backward_q_produce<T, kD, kGates>(smem, &q_map, &k_map, &v_map, &dy_map, p);
    else if (threadIdx.x % kWarpgroup == 32) backward_q_store<T, kD, kGates>(smem, &dq_map, p);
    else if (threadIdx.x % kWarpgroup == 64) smem.dealer.deal(smem.q_empty, p.deck);
  } else {
    registers_raise<kBackwardConsumerRegisters>();
    backward_q_consume<T, kD, kDeg, kGates>(smem, p, group);
  }
}

}  // namespace power::attention
