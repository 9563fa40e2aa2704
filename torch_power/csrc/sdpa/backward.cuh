/* Backward of scaled dot-product attention in one pass over the tiles of scores, for calls without masks.
 *
 *     P = exp(S − lse),  dP = dY Vᵀ,  dS = P ∘ (dP − δ):      dv = Pᵀ dY,   dk = scale · dSᵀ Q,   dq = scale · dS K
 *
 * A persistent block of 128 keys of one key-value head, two consumer warpgroups of 64 keys; tiles of 64 queries of all the query heads
 * that read it stream past. Sᵀ and dPᵀ, then Pᵀ and dSᵀ in registers feed dV and dK, which stay in registers. dSᵀ also goes to shared
 * memory, where both warpgroups' 128 keys of it make dQ, half of the columns each. Five products a tile, the least there can be.
 *
 * dQ is summed in device memory in float32, every element in the order of key tiles, so that two runs give equal bits: a warpgroup's
 * piece is added (by the copy engine) once the block of the key tile before says that it has added its own. That block took its item earlier,
 * so the chain of waiting ends at a block that waits for nobody. Pieces lie in the order of the threads' registers; `finish_kernel`
 * scales and rounds them into dq.
 *
 * Shared memory: k_smem and v_smem (dk and dv leave through them), q_smem, dy_smem and the queries' records in a ring of stages,
 * two tiles of dSᵀ, two pieces of dQ for each warpgroup.
 */
#pragma once

#include "common.cuh"

namespace power::sdpa {

/* d: slots stages  why
 *  64: 2     4       K and V stay in registers as A operands too: products of 64 columns are bound by shared memory otherwise
 * 128: 1     2       64 KiB of K and V, 64 of stages, 32 of dS, 64 of dQ; the next item's K and V wait for dk and dv to leave */
template <int kD>
struct BackwardTiles {
  static constexpr int kSlots = kD == 64 ? 2 : 1, kStages = kD == 64 ? 4 : 2;
  static constexpr bool kFragments = kD == 64;
  static constexpr int kProducerRegisters = kD == 64 ? 40 : 24, kConsumerRegisters = kD == 64 ? 232 : 240;
  static constexpr int kColumns = kD / 2;             // of a piece of dQ
  static constexpr int kPiece = kRows * kColumns;     // its elements
};
constexpr int kBackwardGroups = 2, kBackwardKeys = kBackwardGroups * kRows;

template <typename T, int kD>
struct BackwardSmem {
  using Tiles = BackwardTiles<kD>;
  T k[Tiles::kSlots][kBackwardGroups][kRows * kD];
  T v[Tiles::kSlots][kBackwardGroups][kRows * kD];
  T q[Tiles::kStages][kRows * kD];
  T dy[Tiles::kStages][kRows * kD];
  T dscore[2][kBackwardGroups][kRows * kRows];
  float piece[2][kBackwardGroups][Tiles::kPiece];
  QueryRecord records[Tiles::kStages];
  Dealer dealer;
  Barrier kv_full[2][kBackwardGroups], gradient_full[2][kBackwardGroups], kv_empty[2][kBackwardGroups];
  Barrier q_full[Tiles::kStages], q_empty[Tiles::kStages];
  Barrier piece_full[2][kBackwardGroups], piece_empty[2][kBackwardGroups];
};

template <typename T, int kD>
__device__ __forceinline__ void backward_produce(BackwardSmem<T, kD> &smem, const CUtensorMap *q_map, const CUtensorMap *k_map,
                                                 const CUtensorMap *v_map, const CUtensorMap *dy_map, const BackwardProblem &p) {
  using Tiles = BackwardTiles<kD>;
  const int row_tiles = (p.t_q + kRows - 1) / kRows, heads = p.h_q / p.h_kv;
  RingPosition<2> seat, before;
  RingPosition<Tiles::kStages> ring;
  bool any_before = false;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int first = item.tile * kBackwardKeys;
#pragma unroll 1
    for (int g = 0; g < kBackwardGroups; ++g) {
      if (Tiles::kSlots == 1 && any_before) smem.kv_empty[before.slot][g].wait(before.parity);
      Barrier &full = smem.kv_full[seat.slot][g];
      const int slot = seat.slot % Tiles::kSlots;
      full.expect(2 * kRows * kD * sizeof(T));  // past the end of the keys these are zeros
      load_tile<kD>(smem.k[slot][g], k_map, kRows, first + g * kRows, item.head, item.batch, full);
      load_tile<kD>(smem.v[slot][g], v_map, kRows, first + g * kRows, item.head, item.batch, full);
    }
    if (any_before) before.advance();
    any_before = true;
    const Range seen = queries_seeing(p, first, kBackwardKeys);
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

/* The adding thread of a warpgroup: its pieces go to the sums, each after that of the key tile before. A piece is reported as added when
 * the next one is on its way, or before this thread has to wait. */
template <typename T, int kD>
__device__ __forceinline__ void backward_add(BackwardSmem<T, kD> &smem, const BackwardProblem &p, int group) {
  constexpr int kPiece = BackwardTiles<kD>::kPiece;
  RingPosition<2> seat, buffer;
  int unreported = -1;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    smem.kv_empty[seat.slot][group].arrive();  // as far as the item's description goes
    const auto report = [&](int slot) {
      store_release(p.added + unreported, item.tile + 1);
      unreported = -1;
      smem.piece_empty[slot][group].arrive();
    };
    const auto report_all = [&] {
      if (unreported < 0) return;
      bulk_wait<0>();
      report(buffer.slot ^ 1);
    };
    const Range seen = queries_seeing(p, item.tile * kBackwardKeys, kBackwardKeys);
    const int row_tiles = (p.t_q + kRows - 1) / kRows, heads = p.h_q / p.h_kv;
    int index = ((item.batch * p.h_q + item.head * heads) * row_tiles + seen.begin) * 2 + group;
#pragma unroll 1
    for (int head = 0; head < heads; ++head, index += 2 * (row_tiles - (seen.end - seen.begin)))
#pragma unroll 1
      for (int m = seen.begin; m < seen.end; ++m, index += 2, buffer.advance()) {
        if (!has_ended(smem.piece_full[buffer.slot][group], buffer.parity)) report_all();
        smem.piece_full[buffer.slot][group].wait(buffer.parity);
        if (item.tile > 0 && load_acquire(p.added + index) != item.tile) {
          report_all();
          while (load_acquire(p.added + index) != item.tile) __nanosleep(32);
        }
        const uint32_t piece = smem_address(smem.piece[buffer.slot][group]);
        float *sum = p.sums + int64_t(index) * kPiece;
        if (item.tile > 0) bulk_add(sum, piece, kPiece * sizeof(float));
        else bulk_store(sum, piece, kPiece * sizeof(float));
        bulk_commit();
        if (unreported >= 0) {
          bulk_wait<1>();
          report(buffer.slot ^ 1);
        }
        unreported = index;
      }
    report_all();
  }
}

/* The storing thread: dk and dv leave through the slots of k and v. Between items it deals out the next, to an adding thread too, which
 * may still be at the item before. */
template <typename T, int kD>
__device__ __forceinline__ void backward_store(BackwardSmem<T, kD> &smem, const CUtensorMap *dk_map, const CUtensorMap *dv_map,
                                               const Problem &p) {
  RingPosition<2> seat, next;
  int index = blockIdx.x;
  const auto deal = [&] {
    smem.dealer.item[next.slot] = item_of(p.deck, index);
    smem.dealer.dealt[next.slot].arrive();
    next.advance();
    if (index < p.deck.items) index = gridDim.x + atomicAdd(p.deck.dealt, 1);
  };
  deal();
  deal();
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
#pragma unroll 1
    for (int g = 0; g < kBackwardGroups; ++g) {
      const int first = item.tile * kBackwardKeys + g * kRows, slot = seat.slot % BackwardTiles<kD>::kSlots;
      smem.gradient_full[seat.slot][g].wait(seat.parity);
      if (first < p.t_kv) {
        store_tile_to_global<kD>(dk_map, smem.k[slot][g], first, item.head, item.batch);
        store_tile_to_global<kD>(dv_map, smem.v[slot][g], first, item.head, item.batch);
        bulk_commit();
        bulk_wait_read<0>();
      }
      smem.kv_empty[seat.slot][g].arrive();
    }
    smem.kv_empty[seat.slot][0].wait(seat.parity);
    smem.kv_empty[seat.slot][1].wait(seat.parity);
    deal();
  }
  bulk_wait<0>();
}

/* P from S, in place. kEdge: queries before a key (columns < first_column + 8r) do not see it, and keys past the end (8r ≥ keys) are seen
 * by nobody. */
template <bool kEdge>
__device__ __forceinline__ void weigh_columns(float (&score)[kRows / 2], const QueryRecord &record, float scale, const Fragment &at,
                                              int first_column, int keys) {
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float2 lse = *reinterpret_cast<const float2 *>(&record.lse_delta[4 * n + at.quad].x);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float &x = score[4 * n + 2 * r + c];
        x = exp2_fast(fmaf(x, scale, -(c ? lse.y : lse.x)));
        if (kEdge && (8 * n + 2 * at.quad + c < first_column + 8 * r || 8 * r >= keys)) x = 0.f;
      }
  }
}

/* Pᵀ and dSᵀ as A operands; dSᵀ also into its tile [keys][queries] of shared memory. */
template <typename T>
__device__ __forceinline__ void differentiate(const float (&weight)[kRows / 2], const float (&dweight)[kRows / 2],
                                              uint32_t (&packed)[kRows / 16][4], uint32_t (&dscore)[kRows / 16][4], uint32_t dscore_tile,
                                              const QueryRecord &record, const Fragment &at) {
  const uint32_t start = chunk_address(dscore_tile, kRows, at.row, 0) + at.quad * 4;  // chunk n is at ^ 16n
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float2 delta = *reinterpret_cast<const float2 *>(&record.lse_delta[4 * n + at.quad].z);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = 4 * n + 2 * r;
      const uint32_t pair = pack<T>(weight[i] * (dweight[i] - delta.x), weight[i + 1] * (dweight[i + 1] - delta.y));
      dscore[n >> 1][2 * (n & 1) + r] = pair;
      packed[n >> 1][2 * (n & 1) + r] = pack<T>(weight[i] * kWeightScale<T>, weight[i + 1] * kWeightScale<T>);
      store_shared_32((start + r * 1024) ^ (n * 16), pair);
    }
  }
}

/* A piece of dQ: dS [64 queries, 128 keys] from dSᵀ in shared memory times kColumns columns of K, which start at `k` in each of the two
 * tiles. */
template <typename T, int kD, int kColumns>
__device__ __forceinline__ void multiply_piece(float (&out)[kColumns / 2], uint32_t dscore, uint32_t k) {
  const uint64_t a = matrix_descriptor(dscore), b = matrix_descriptor(k);
#pragma unroll
  for (int step = 0; step < kBackwardKeys / 16; ++step)
    Wgmma<kColumns, T>::template ss<MN_MAJOR, MN_MAJOR>(
        out, attention::advance(a, step * 16 * 128),
        attention::advance(b, (step >> 2) * kRows * kD * sizeof(T) + (step & 3) * 16 * 128), step != 0);
}

template <typename T, int kD>
__device__ __forceinline__ void backward_consume(BackwardSmem<T, kD> &smem, const BackwardProblem &p, int group) {
  using Tiles = BackwardTiles<kD>;
  const Fragment at(threadIdx.x % kWarpgroup);
  const int heads = p.h_q / p.h_kv;
  RingPosition<2> seat, buffer;  // of items; of dS and pieces
  RingPosition<Tiles::kStages> ring;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int first = item.tile * kBackwardKeys + group * kRows, slot = seat.slot % Tiles::kSlots;
    const Range seen = queries_seeing(p, item.tile * kBackwardKeys, kBackwardKeys);
    const uint32_t k_smem = smem_address(smem.k[slot][group]), v_smem = smem_address(smem.v[slot][group]);
    const uint32_t k_columns = smem_address(smem.k[slot][0]) + group * (kD == 128 ? kRows * 128 : 64);  // this warpgroup's half
    // Both tiles, as dQ reads both.
    smem.kv_full[seat.slot][0].wait(seat.parity);
    smem.kv_full[seat.slot][1].wait(seat.parity);
    if (p.negative) negate_rows<kD>(k_smem, at.thread, group);
    uint32_t k_fragments[kD / 16][4], v_fragments[kD / 16][4];
    if constexpr (Tiles::kFragments) load_fragments<kD>(k_fragments, k_smem, at), load_fragments<kD>(v_fragments, v_smem, at);
    float dk[kD / 2], dv[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) dk[i] = dv[i] = 0.f;
    int m = seen.begin, previous = -1;
#pragma unroll 1
    for (int left = (seen.end - seen.begin) * heads; left > 0; --left, ring.advance(), buffer.advance()) {
      float score[kRows / 2], dweight[kRows / 2], piece[Tiles::kColumns / 2];
      uint32_t weight[kRows / 16][4], dscore[kRows / 16][4];
      const uint32_t q_smem = smem_address(smem.q[ring.slot]), dy_smem = smem_address(smem.dy[ring.slot]);
      const uint32_t dscore_smem = smem_address(smem.dscore[buffer.slot][0]);
      const QueryRecord &record = smem.records[ring.slot];
      smem.q_full[ring.slot].wait(ring.parity);
      pin(score);
      wgmma_fence();
      if constexpr (Tiles::kFragments) multiply_fragments<T, kD, kRows>(score, k_fragments, q_smem);
      else multiply_rows<T, kD, kRows>(score, k_smem, q_smem);
      wgmma_commit();
      wgmma_wait<1>();  // ends dK of the tile before, whose operand's registers dPᵀ needs
      pin(dk);
      if (previous >= 0) release(smem.q_empty[previous]);
      pin(dweight);
      wgmma_fence();
      if constexpr (Tiles::kFragments) multiply_fragments<T, kD, kRows>(dweight, v_fragments, dy_smem);
      else multiply_rows<T, kD, kRows>(dweight, v_smem, dy_smem);
      wgmma_commit();
      wgmma_wait<1>();
      pin(score);
      if (m * kRows < first - p.right + kRows || first + kRows > p.t_kv)
        weigh_columns<true>(score, record, p.scale_log2, at, first + at.row - p.right - m * kRows, p.t_kv - first - at.row);
      else
        weigh_columns<false>(score, record, p.scale_log2, at, 0, 0);
      wgmma_wait<0>();
      pin(dweight);
      differentiate<T>(score, dweight, weight, dscore, dscore_smem + group * kRows * kRows * sizeof(T), record, at);
      fence_proxy_async();
      pin(weight);
      pin(dscore);
      pin(dv);
      wgmma_fence();
      accumulate<T, kD, kRows>(dv, weight, dy_smem);
      wgmma_commit();
      // dS of all 128 keys is there, and everybody has read the dS before the last.
      named_barrier_sync(CONSUMERS, kBackwardGroups * kWarpgroup);
      pin(piece);
      pin(dk);
      wgmma_fence();
      multiply_piece<T, kD, Tiles::kColumns>(piece, dscore_smem, k_columns);
      wgmma_commit();
      accumulate<T, kD, kRows>(dk, dscore, q_smem);
      wgmma_commit();
      smem.piece_empty[buffer.slot][group].wait(buffer.parity ^ 1);
      wgmma_wait<1>();
      pin(dv);
      pin(piece);
      const uint32_t out = smem_address(smem.piece[buffer.slot][group]) + at.thread * 16;
#pragma unroll
      for (int n = 0; n < Tiles::kColumns / 8; ++n)
        store_shared_128(out + n * kWarpgroup * 16, make_uint4(__float_as_uint(piece[4 * n]), __float_as_uint(piece[4 * n + 1]),
                                                               __float_as_uint(piece[4 * n + 2]), __float_as_uint(piece[4 * n + 3])));
      fence_proxy_async();
      release(smem.piece_full[buffer.slot][group]);
      previous = ring.slot;
      if (++m == seen.end) m = seen.begin;
    }
    wgmma_wait<0>();
    pin(dk);
    if (previous >= 0) release(smem.q_empty[previous]);
    constexpr float kFactor = 1.f / kWeightScale<T>;
    // No warp of either warpgroup still multiplies with the k and v that their gradients replace.
    named_barrier_sync(CONSUMERS, kBackwardGroups * kWarpgroup);
    store_tile<T, kD>(k_smem, dk, at, {p.scale, p.scale});
    store_tile<T, kD>(v_smem, dv, at, {kFactor, kFactor});
    fence_proxy_async();
    release(smem.gradient_full[seat.slot][group]);
  }
}

template <typename T, int kD>
__global__ void __launch_bounds__((kBackwardGroups + 1) * kWarpgroup, 1)
    backward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dy_map,
                    const __grid_constant__ CUtensorMap dk_map, const __grid_constant__ CUtensorMap dv_map,
                    const __grid_constant__ BackwardProblem p) {
  using Tiles = BackwardTiles<kD>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto &smem = *reinterpret_cast<BackwardSmem<T, kD> *>(smem_bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2 * kBackwardGroups; ++s)
      (&smem.kv_full[0][0])[s].init(1), (&smem.kv_empty[0][0])[s].init(2), (&smem.gradient_full[0][0])[s].init(kArrivals);
    for (int s = 0; s < Tiles::kStages; ++s) smem.q_full[s].init(1), smem.q_empty[s].init(kArrivals * kBackwardGroups);
    for (int s = 0; s < 2 * kBackwardGroups; ++s) (&smem.piece_full[0][0])[s].init(kArrivals), (&smem.piece_empty[0][0])[s].init(1);
    smem.dealer.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  if (group == kBackwardGroups) {
    registers_lower<Tiles::kProducerRegisters>();
    const int warp = threadIdx.x % kWarpgroup / 32;
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) {
        backward_produce<T, kD>(smem, &q_map, &k_map, &v_map, &dy_map, p);
      } else if (warp == 1) {
        backward_add<T, kD>(smem, p, 0);
      } else if (warp == 2) {
        backward_add<T, kD>(smem, p, 1);
      } else {
        backward_store<T, kD>(smem, &dk_map, &dv_map, p);
      }
    }
  } else {
    registers_raise<Tiles::kConsumerRegisters>();
    backward_consume<T, kD>(smem, p, group);
  }
}

}  // namespace power::sdpa
