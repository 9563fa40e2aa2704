/* Forward of the attention form: y_i = Σ_j w_ij v_j / Σ_j w_ij, w_ij = s_ij^p · exp(G_i − G_j), s = c_i q_i·k_j.
 *
 * A persistent block of 64·kGroups query rows of one head; each consumer warpgroup owns 64 of them and shares the stream of
 * 128-key tiles: S = Q Kᵀ (both from shared memory), S → w in registers, O += w V (w from registers, V as stored). There is no
 * running maximum and nothing is rescaled, so a tile costs 2–3 instructions a score beside its two products, and three (d = 64)
 * or two (d = 128) warpgroups in turn keep the matrix units busy. The last tile, on the diagonal, is computed 64 keys wide. Of the
 * last warpgroup one thread loads, one stores and one deals out the items.
 *
 * Shared memory: q_smem, two slots a warpgroup (the next item's q arrives under this one's products; y leaves through the
 * same slot), k_smem and v_smem in a ring of stages, gates of the keys beside k.
 */
#pragma once

#include "attention_common.cuh"

namespace power::attention {

/* d: groups  stages  why
 *  64: 3     4       3 warpgroups beat 2 by 5–10 % (695 TFLOP/s at t = 16384); 160 registers hold S (64), O (32), w (32)
 *      2     4       with gates or float16, whose factors need the registers, and for degree 1, whose weights share none with S
 * 128: 2     2       O is 64 registers, so 232 a thread; 2 stages of 64 KiB is what fits
 * 256: 2     1       O is 128 registers; K and V take 64 KiB each, Q as much, and so has one slot: correct first, not tuned */
template <typename T, int kD, int kDeg, bool kGates>
struct ForwardTiles {
  static constexpr int kGroups = kD == 64 && kDeg > 1 && !kGates && !is_half<T> ? 3 : 2, kStages = kD == 64 ? 4 : kD == 128 ? 2 : 1;
  static constexpr int kSeats = kD == 256 ? 1 : 2;  // slots of q
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 40, kConsumerRegisters = kGroups == 3 ? 160 : 232;
};
constexpr int kForwardKeys = 128;

template <typename T, int kD, int kDeg, bool kGates>
struct ForwardSmem {
  static constexpr int kGroups = ForwardTiles<T, kD, kDeg, kGates>::kGroups, kStages = ForwardTiles<T, kD, kDeg, kGates>::kStages;
  static constexpr int kSeats = ForwardTiles<T, kD, kDeg, kGates>::kSeats;
  T q[kSeats][kGroups][kRows * kD];
  T k[kStages][kForwardKeys * kD];
  T v[kStages][kForwardKeys * kD];
  GateRecord gates[kGates ? kStages : 1][kForwardKeys / kRows];
  float row_scale[kGroups][kRows];
  Dealer<kSeats> dealer;
  Barrier q_full[kSeats][kGroups], y_full[kSeats][kGroups], q_empty[kSeats][kGroups];
  Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

/* Key tiles that rows first … first + rows − 1 see. */
__device__ __forceinline__ int tiles_seen(const Problem &p, int first, int rows, int keys) {
  const int all = (p.t_kv + keys - 1) / keys;
  return p.causal ? min(all, (first + rows - 1) / keys + 1) : all;
}

template <typename T, int kD, int kDeg, bool kGates>
__device__ __forceinline__ void forward_produce(ForwardSmem<T, kD, kDeg, kGates> &smem, const CUtensorMap *q_map, const CUtensorMap *k_map,
                                                const CUtensorMap *v_map, const Problem &p) {
  using Tiles = ForwardTiles<T, kD, kDeg, kGates>;
  constexpr int kGroups = Tiles::kGroups, kStages = Tiles::kStages, kBlockRows = kGroups * kRows;
  constexpr uint32_t kTileBytes = kForwardKeys * kD * sizeof(T), kGateBytes = sizeof(smem.gates[0]);
  RingPosition<Tiles::kSeats> seat;
  RingPosition<kStages> ring;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int head_kv = item.head / (p.h_q / p.h_kv), first = item.tile * kBlockRows;
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      Barrier &full = smem.q_full[seat.slot][g];
      if (first + g * kRows < p.t_q) {
        full.expect(kRows * kD * sizeof(T));
        load_tile<kD>(smem.q[seat.slot][g], q_map, kRows, first + g * kRows, item.head, item.batch, full);
      } else {
        full.arrive();  // no rows; the barriers of all warpgroups stay in the same phase
      }
    }
    const int seen = tiles_seen(p, first, min(kBlockRows, p.t_q - first), kForwardKeys);
    const GateRecord *gates = p.gates_of(item.batch, head_kv);
#pragma unroll 1
    for (int n = 0; n < seen; ++n, ring.advance()) {
      const int s = ring.slot;
      smem.k_empty[s].wait(ring.parity ^ 1);
      smem.k_full[s].expect(kTileBytes + (kGates ? kGateBytes : 0));
      load_tile<kD>(smem.k[s], k_map, kForwardKeys, n * kForwardKeys, head_kv, item.batch, smem.k_full[s]);
      if constexpr (kGates)
        bulk_load(smem_address(smem.gates[s]), gates + n * (kForwardKeys / kRows), kGateBytes, smem.k_full[s].address());
      smem.v_empty[s].wait(ring.parity ^ 1);
      smem.v_full[s].expect(kTileBytes);
      load_tile<kD>(smem.v[s], v_map, kForwardKeys, n * kForwardKeys, head_kv, item.batch, smem.v_full[s]);
    }
  }
}

/* The storing thread: results leave through the slots of the tiles they replace, which are free again once they have been read. */
template <typename T, int kD, int kDeg, bool kGates>
__device__ __forceinline__ void forward_store(ForwardSmem<T, kD, kDeg, kGates> &smem, const CUtensorMap *y_map, const Problem &p) {
  RingPosition<ForwardTiles<T, kD, kDeg, kGates>::kSeats> seat;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance())
#pragma unroll 1
    for (int g = 0; g < ForwardTiles<T, kD, kDeg, kGates>::kGroups; ++g) {
      const int first = (item.tile * ForwardTiles<T, kD, kDeg, kGates>::kGroups + g) * kRows;
      smem.y_full[seat.slot][g].wait(seat.parity);
      if (first < p.t_q) {
        store_tile_to_global<kD>(y_map, smem.q[seat.slot][g], first, item.head, item.batch);
        bulk_commit();
        bulk_wait_read<0>();
      }
      smem.q_empty[seat.slot][g].arrive();
    }
  bulk_wait<0>();
}

/* The gates of this thread's two query rows: g_i, exp(g_i)^(1/p), and H at the start of their block. */
struct QueryGates {
  float sum[2], growth[2], start[2];
  __device__ __forceinline__ void load(const GateRecord &record, const Fragment &at) {
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = record.sum[at.row + 8 * r], growth[r] = exp2_fast(sum[r]), start[r] = record.start[r];
  }
  /* exp(H_i − H_j)^(1/p) · exp(g_i)^(1/p) for the keys of `record`'s block, one that ended before this one started. */
  __device__ float decay(const GateRecord &record, int r) const {
    return growth[r] * exp2_fast((start[0] - record.end[0]) + (start[1] - record.end[1]));
  }
};

/* The factor of score (i, j) from its gates and, in float16, from the scale of the head. kSame: both are in one block of 128. */
template <typename T, bool kGates, bool kSame>
__device__ __forceinline__ float score_factor(const GateRecord *records, const QueryGates *gates, const float (&decay)[2], float scale,
                                              int column, int r) {
  if constexpr (!kGates) return scale;
  const GateRecord &record = records[column >> 6];
  const float factor = kSame ? exp2_fast(gates->sum[r] - record.sum[column & 63]) : record.rest[column & 63] * decay[r];
  return is_half<T> ? factor * scale : factor;
}

/* w = s^p · gates for a tile of keys, as the A operand of the next product; adds the row sums. kLast: the last tile of these rows,
 * in which columns > last_column are dropped, and the gates of keys and rows have one block. There, `rounding` also
 * gets what the sum changes by rounding w: y = Σ ŵ v / Σ ŵ with the same ŵ is an exact mean, and just v for a row that sees one
 * key. (The gradient's dy·(v − y) needs that; with many keys, and so in all other tiles, the roundings cancel by themselves.) */
template <typename T, int kDeg, bool kGates, bool kLast, int kKeys>
__device__ __forceinline__ void weigh(float (&score)[kKeys / 2], uint32_t (&weight)[kKeys / 16][4], float (&sum)[2],
                                      float (&rounding)[2], const Fragment &at, int last_column, const GateRecord *records,
                                      const QueryGates *gates, float scale) {
  float decay[2] = {scale, scale};
  if constexpr (kGates && !kLast) decay[0] = gates->decay(*records, 0), decay[1] = gates->decay(*records, 1);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    const int column = 8 * n + 2 * at.quad;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float w[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float s = score[4 * n + 2 * r + c];
        if constexpr (kGates || is_half<T>) s *= score_factor<T, kGates, kLast>(records, gates, decay, scale, column + c, r);
        w[c] = power_of<kDeg>(s);
        if (kLast && column + c > last_column + 8 * r) w[c] = 0.f;
        sum[r] += w[c];
      }
      const uint32_t pair = weight[n >> 1][2 * (n & 1) + r] = pack<T>(w[0], w[1]);
      if constexpr (kLast) {
        const float2 rounded = Pair<T>::unpack(pair);
        rounding[r] += (rounded.x - w[0]) + (rounded.y - w[1]);
      }
    }
  }
}

template <typename T, int kD, int kDeg, bool kGates>
__device__ __forceinline__ void forward_consume(ForwardSmem<T, kD, kDeg, kGates> &smem, const Problem &p, int group) {
  using Tiles = ForwardTiles<T, kD, kDeg, kGates>;
  constexpr int kGroups = Tiles::kGroups, kStages = Tiles::kStages, kBlockRows = kGroups * kRows;
  const Fragment at(threadIdx.x % kWarpgroup);
  RingPosition<Tiles::kSeats> seat;
  RingPosition<kStages> ring;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int head_kv = item.head / (p.h_q / p.h_kv), first = item.tile * kBlockRows + group * kRows;
    const int seen = tiles_seen(p, item.tile * kBlockRows, min(kBlockRows, p.t_q - item.tile * kBlockRows), kForwardKeys);
    const int mine = first < p.t_q ? tiles_seen(p, first, kRows, kForwardKeys) : 0;
    if (first < p.t_q) {
      const uint32_t q_smem = smem_address(smem.q[seat.slot][group]);
      const float head_factor = head_scale<T, kDeg>(p, item.batch, head_kv);
      const GateRecord *records = p.gates_of(item.batch, head_kv);
      QueryGates gates;
      if constexpr (kGates) gates.load(records[first / kRows], at);

      smem.q_full[seat.slot][group].wait(seat.parity);
      const float row_scale = normalize_rows<T, kD>(q_smem, at.thread, group);
      if (!(at.thread & 1)) smem.row_scale[group][at.thread >> 1] = row_scale;  // for the row's own warp, after a barrier

      float sum[2] = {0.f, 0.f}, rounding[2] = {0.f, 0.f}, out[kD / 2];
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) out[i] = 0.f;
      // O += w V for kKeys keys of the present stage, from key `from` on. Those that come after all rows are left out.
      const auto attend = [&](auto keys, auto last, int from, int last_column, bool after_another) {
        constexpr int kKeys = decltype(keys)::value;
        float score[kKeys / 2];
        uint32_t weight[kKeys / 16][4];
        pin(score);
        wgmma_fence();
        multiply_rows<T, kD, kKeys, kForwardKeys>(score, q_smem, smem_address(smem.k[ring.slot]) + from * 128);
        wgmma_commit();
        wgmma_wait<0>();  // also ends O += w V of the keys before
        pin(score);
        pin(out);
        if (after_another) smem.v_empty[ring.slot ? ring.slot - 1 : kStages - 1].release();
        if constexpr (!kGates && !decltype(last)::value && kKeys == kForwardKeys) smem.k_empty[ring.slot].release();
        weigh<T, kDeg, kGates, decltype(last)::value, kKeys>(score, weight, sum, rounding, at, last_column,
                                                             smem.gates[kGates ? ring.slot : 0] + from / kRows, &gates, head_factor);
        smem.v_full[ring.slot].wait(ring.parity);
        pin(weight);
        pin(out);
        wgmma_fence();
        accumulate<T, kD, kKeys, kForwardKeys>(out, weight, smem_address(smem.v[ring.slot]) + from * 128);
        wgmma_commit();
      };
      const std::integral_constant<int, kForwardKeys> whole;
      const std::integral_constant<int, kRows> half;
#pragma unroll 1
      for (int n = 0; n < mine - 1; ++n, ring.advance()) {
        smem.k_full[ring.slot].wait(ring.parity);
        if constexpr (kD == 256) {  // O leaves registers for 64 keys at a time
          attend(half, std::false_type(), 0, 0, n > 0);
          attend(half, std::false_type(), kRows, 0, false);
        } else {
          attend(whole, std::false_type(), 0, 0, n > 0);
        }
        if constexpr (kGates) smem.k_empty[ring.slot].release();  // the gates lie in the same stage
      }
      wgmma_wait<0>();
      pin(out);
      if (mine > 1) smem.v_empty[ring.slot ? ring.slot - 1 : kStages - 1].release();
      if (mine > 0) {
        smem.k_full[ring.slot].wait(ring.parity);
        const auto finish = [&](auto keys, auto last, int from, int last_column) {  // no product is pending where branches join
          attend(keys, last, from, last_column, false);
          wgmma_wait<0>();
          pin(out);
        };
        const int from = first % kForwardKeys;
        if (!p.causal) {
          if constexpr (kD == 256) finish(half, std::true_type(), 0, p.t_kv), finish(half, std::true_type(), kRows, p.t_kv);
          else finish(whole, std::true_type(), 0, p.t_kv);
        } else {
          if (from) finish(half, std::bool_constant<kGates>(), 0, kForwardKeys);
          finish(half, std::true_type(), from, at.row);
        }
        smem.k_empty[ring.slot].release();
        smem.v_empty[ring.slot].release();
        ring.advance();
      }

      warpgroup_sync(group);  // no warp still multiplies with the q that y replaces
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first + at.row + 8 * r;
        const float norm = sum_of_quad(sum[r]), rounded = norm + sum_of_quad(rounding[r]), c = smem.row_scale[group][at.row + 8 * r] * head_factor;
        factor[r] = p.normalize ? (rounded == 0.f || p.zero ? 0.f : 1.f / rounded) : p.scale_p / power_of<kDeg>(c);
        if (at.quad == 0 && row < p.t_q)
          p.norm[item.batch * p.norm_stride[0] + row * p.norm_stride[1] + item.head * p.norm_stride[2]] = norm;
      }
      store_tile<T, kD>(q_smem, out, at, factor);
      fence_proxy_async();
      smem.y_full[seat.slot][group].release();
    } else {
      smem.y_full[seat.slot][group].release();
    }
    for (int n = mine; n < seen; ++n, ring.advance()) {  // tiles that only later rows of the block see
      smem.k_full[ring.slot].wait(ring.parity);
      smem.k_empty[ring.slot].release();
      smem.v_full[ring.slot].wait(ring.parity);
      smem.v_empty[ring.slot].release();
    }
  }
}

template <typename T, int kD, int kDeg, bool kGates>
__global__ void __launch_bounds__((ForwardTiles<T, kD, kDeg, kGates>::kGroups + 1) * kWarpgroup, 1)
    forward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap y_map, const __grid_constant__ Problem p) {
  using Tiles = ForwardTiles<T, kD, kDeg, kGates>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto &smem = *reinterpret_cast<ForwardSmem<T, kD, kDeg, kGates> *>(smem_bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tiles::kSeats * Tiles::kGroups; ++s) (&smem.q_full[0][0])[s].init(1), (&smem.q_empty[0][0])[s].init(1), (&smem.y_full[0][0])[s].init_released(4);
    for (int s = 0; s < Tiles::kStages; ++s) {
      smem.k_full[s].init(1), smem.k_empty[s].init_released(4 * Tiles::kGroups);
      smem.v_full[s].init(1), smem.v_empty[s].init_released(4 * Tiles::kGroups);
    }
    smem.dealer.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  if (group == Tiles::kGroups) {
    registers_lower<Tiles::kProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) forward_produce<T, kD, kDeg, kGates>(smem, &q_map, &k_map, &v_map, p);
    else if (threadIdx.x % kWarpgroup == 32) forward_store<T, kD, kDeg, kGates>(smem, &y_map, p);
    else if (threadIdx.x % kWarpgroup == 64) smem.dealer.deal(smem.q_empty, p.deck);
  } else {
    registers_raise<Tiles::kConsumerRegisters>();
    forward_consume<T, kD, kDeg, kGates>(smem, p, group);
  }
}

}  // namespace power::attention
