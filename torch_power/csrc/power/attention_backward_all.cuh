/* Backward of the attention form in one pass: dk, dv and dq from five products, without gates.
 *
 *     dv_j = Σ_i w_ij / n_i dy_i,    dk_j = p Σ_i dS_ij q_i,    dq_i = p Σ_j dS_ij k_j,    dS_ij = u_ij^(p−1) α_i (dp_ij − δ_i)
 *
 * with u_ij = α_i s_ij and w_ij / n_i = u_ij^p, as in the second of the two kernels that this one replaces.
 *
 * A persistent block of 128 keys of one key-value head, one warpgroup for every 64; tiles of 64 queries of all the query heads
 * that read it stream past: Sᵀ = K Qᵀ and dPᵀ = V dYᵀ, then wᵀ and dSᵀ in registers, dV += wᵀ dY and dK += dSᵀ Q. dSᵀ also goes
 * to shared memory, from which each warpgroup makes half of the columns of dQ = dS K for all 128 keys. dq is a sum over the
 * blocks of a head: a block puts its part into shared memory while the next tile's S is computed, and from there the copy engine
 * adds it, in float32, to device memory, block after block (attention_deck.h, sm90/schedule.cuh), so that the result has one
 * order of additions. `round_sums_kernel` makes dq of the sums; α and δ come from `prepare_queries_kernel`. Of the last warpgroup
 * one thread draws items and loads, and two add, each every second tile, and store dk and dv.
 *
 * Shared memory, all of it at d = 128: k_smem and v_smem; q_smem, dy_smem and the queries' records in two stages; dSᵀ twice;
 * parts of dq twice (dk and dv leave through these).
 *
 * A tile's products take 2560 cycles, what is read and written in shared memory 2944; measured 2.2 µs, some 3700 (NOTES).
 */
#pragma once

#include "../sm90/schedule.cuh"
#include "attention_backward_kv.cuh"

namespace power::attention {

constexpr int kAllKeys = kBackwardGroups * kRows;
static_assert(kAllKeys == kTilesOfBlock * kRows);
constexpr int kHalfTile = kRows * kRows;  // numbers in a warpgroup's part of a tile of dq: 64 rows, 64 columns

struct BackwardAllProblem : BackwardKvProblem {
  BackwardDeal deal;
  float *sums;  // [b, h_q, tiles of 64 rows, halves of the columns, kHalfTile in the order of accumulators]
  int *turns;   // [b, h_q, tiles of 64 rows]: additions made
};

template <typename T, int kD>
struct BackwardAllSmem {
  static_assert(kD == kBackwardGroups * kRows, "a warpgroup makes 64 columns of dq");
  T k[kBackwardGroups][kRows * kD];
  T v[kBackwardGroups][kRows * kD];
  T q[2][kRows * kD];
  T dy[2][kRows * kD];
  T dscore[2][kAllKeys * kRows];
  float sums[2][kBackwardGroups][kHalfTile];
  QueryRecord records[2];
  Item item[2];
  Barrier item_full[2], item_empty[2], kv_full, kv_empty, q_full[2], q_empty[2], dscore_full[2];
  Barrier sums_full[2][kBackwardGroups], sums_empty[2];
  __device__ Item receive(const RingPosition<2> &seat) const {
    item_full[seat.slot].wait(seat.parity);
    const volatile Item &x = item[seat.slot];
    return {x.head, x.batch, x.tile};
  }
};

/* Calls f(head, m) for the tiles of queries that meet a block of keys, in the order in which they are visited. */
template <typename F>
__device__ __forceinline__ void for_each_tile(const BackwardAllProblem &p, const Item &item, F f) {
  const int heads = p.h_q / p.h_kv, row_tiles = (p.t_q + kRows - 1) / kRows, visits = p.deal.visits(item, row_tiles);
#pragma unroll 1
  for (int head = item.head * heads; head < (item.head + 1) * heads; ++head)
#pragma unroll 1
    for (int step = 0; step < visits; ++step) f(head, p.deal.visit(item, step, row_tiles));
}

/* The loading thread. It draws an item when all of the last one is on its way: drawn earlier, an item that others wait for would lie
 * behind the rest of that one. */
template <typename T, int kD>
__device__ __forceinline__ void backward_all_load(BackwardAllSmem<T, kD> &smem, const CUtensorMap *q_map, const CUtensorMap *k_map,
                                                  const CUtensorMap *v_map, const CUtensorMap *dy_map, const BackwardAllProblem &p) {
  const int row_tiles = (p.t_q + kRows - 1) / kRows;
  RingPosition<2> seat, ring;
  RingPosition<1> block;
  for (int index = blockIdx.x;; seat.advance(), block.advance()) {
    const Item item = p.deal.item(index);
    smem.item_empty[seat.slot].wait(seat.parity ^ 1);
    smem.item[seat.slot] = item;
    smem.item_full[seat.slot].arrive();
    if (item.tile < 0) return;
    smem.kv_empty.wait(block.parity ^ 1);
    smem.kv_full.expect(2 * kAllKeys * kD * sizeof(T));
#pragma unroll 1
    for (int g = 0; g < kBackwardGroups; ++g) {
      load_tile<kD>(smem.k[g], k_map, kRows, item.tile * kAllKeys + g * kRows, item.head, item.batch, smem.kv_full);
      load_tile<kD>(smem.v[g], v_map, kRows, item.tile * kAllKeys + g * kRows, item.head, item.batch, smem.kv_full);
    }
    for_each_tile(p, item, [&](int head, int m) {
      Barrier &full = smem.q_full[ring.slot];
      smem.q_empty[ring.slot].wait(ring.parity ^ 1);
      full.expect(2 * kRows * kD * sizeof(T) + sizeof(QueryRecord));
      load_tile<kD>(smem.q[ring.slot], q_map, kRows, m * kRows, head, item.batch, full);
      load_tile<kD>(smem.dy[ring.slot], dy_map, kRows, m * kRows, head, item.batch, full);
      const auto *records = static_cast<const QueryRecord *>(p.records) + int64_t(item.batch * p.h_q + head) * row_tiles;
      bulk_load(smem_address(&smem.records[ring.slot]), records + m, sizeof(QueryRecord), full.address());
      ring.advance();
    });
    index = gridDim.x + atomicAdd(p.deal.early.dealt, 1);
  }
}

/* One of the two adding threads: every second tile of sums, and of an item's dk and dv one. */
template <typename T, int kD>
__device__ __forceinline__ void backward_all_add(BackwardAllSmem<T, kD> &smem, const CUtensorMap *dk_map, const CUtensorMap *dv_map,
                                                 const BackwardAllProblem &p, int mine) {
  const int row_tiles = (p.t_q + kRows - 1) / kRows;
  RingPosition<2> seat, slot;
  for (Item item; (item = smem.receive(seat)).tile >= 0; seat.advance()) {
    for_each_tile(p, item, [&](int head, int m) {
      if (slot.slot == mine) {
        const int64_t tile = int64_t(item.batch * p.h_q + head) * row_tiles + m;
        const int turn = p.deal.turn(item, m);
        float *sums = p.sums + tile * kBackwardGroups * kHalfTile;
        if (turn > 0) turn_wait(p.turns + tile, turn);
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
        if (turn < p.deal.last_turn(m)) {
          bulk_wait<0>();
          turn_pass(p.turns + tile, turn + 1);
        }
      }
      slot.advance();
    });
#pragma unroll 1
    for (int gradient = 0; gradient < 2; ++gradient, slot.advance())
      if (slot.slot == mine) {
#pragma unroll 1
        for (int g = 0; g < kBackwardGroups; ++g) {
          smem.sums_full[mine][g].wait(slot.parity);
          const int first = item.tile * kAllKeys + g * kRows;
          if (first < p.t_kv) store_tile_to_global<kD>(gradient ? dv_map : dk_map, smem.sums[mine][g], first, item.head, item.batch);
        }
        bulk_commit();
        bulk_wait_read<0>();
        smem.sums_empty[mine].arrive();
      }
    smem.item_empty[seat.slot].arrive();
  }
  bulk_wait<0>();
}

/* Hands this warpgroup's half of a tile of dq to the adding threads. */
template <typename T, int kD>
__device__ __forceinline__ void put_sums(BackwardAllSmem<T, kD> &smem, RingPosition<2> &slot, const float (&dq)[kRows / 2],
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
__device__ __forceinline__ void put_gradient(BackwardAllSmem<T, kD> &smem, RingPosition<2> &slot, const float (&gradient)[kD / 2],
                                             const Fragment &at, int group, float factor) {
  smem.sums_empty[slot.slot].wait(slot.parity ^ 1);
  store_tile<T, kD>(smem_address(smem.sums[slot.slot][group]), gradient, at, {factor, factor});
  fence_proxy_async();
  smem.sums_full[slot.slot][group].release();
  slot.advance();
}

/* Σ_j w_ij (dp_ij − δ_i) / n_i should be 0, and is the error that δ has from the rounding of y. Queries that see few keys feel it: for the
 * first 64, whose keys are all here, it is taken off dp. `scratch`: 4 × 64 floats. */
template <int kDeg>
__device__ __forceinline__ void correct_first_rows(const float (&score)[kRows / 2], float (&dweight)[kRows / 2], const QueryRecord &record,
                                                   const Fragment &at, float *scratch, int group) {
  const int lane = at.thread & 31, warp = at.thread >> 5;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float4 query = record.alpha_delta[4 * n + at.quad];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 8 * n + 2 * at.quad + c;
      const float alpha = c ? query.y : query.x, delta = c ? query.w : query.z;
      float sum = 0.f;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float w = power_of<kDeg>(alpha * score[4 * n + 2 * r + c]);
        if (column >= at.row + 8 * r) sum += w * (alpha * dweight[4 * n + 2 * r + c] - delta);
      }
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (lane < 4) scratch[warp * kRows + column] = sum;
    }
  }
  warpgroup_sync(group);
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float4 query = record.alpha_delta[4 * n + at.quad];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 8 * n + 2 * at.quad + c;
      const float alpha = c ? query.y : query.x;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarpgroup / 32; ++w) sum += scratch[w * kRows + column];
      const float shift = alpha == 0.f ? 0.f : sum / alpha;
      dweight[4 * n + c] -= shift, dweight[4 * n + 2 + c] -= shift;
    }
  }
  warpgroup_sync(group);
}

template <typename T, int kD, int kDeg>
__device__ __forceinline__ void backward_all_consume(BackwardAllSmem<T, kD> &smem, const BackwardAllProblem &p, int group) {
  const Fragment at(threadIdx.x % kWarpgroup);
  const uint32_t k_smem = smem_address(smem.k[group]), v_smem = smem_address(smem.v[group]);
  RingPosition<2> seat, ring, slot;
  RingPosition<1> block;
  for (Item item; (item = smem.receive(seat)).tile >= 0; seat.advance(), block.advance()) {
    const int first = item.tile * kAllKeys + group * kRows;
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
      for (int k = 0; k < kAllKeys / 16; ++k)
        Wgmma<kRows, T>::template ss<MN_MAJOR, MN_MAJOR>(dq, advance(a, k * 16 * 128),
                                                         advance(b, (k >> 2) * kRows * kD * sizeof(T) + (k & 3) * 16 * 128), k != 0);
      wgmma_commit();
    };
    smem.kv_full.wait(block.parity);
    for_each_tile(p, item, [&](int, int m) {
      float score[kRows / 2], dweight[kRows / 2];
      uint32_t weight[kRows / 16][4], dscore[kRows / 16][4];
      float dq[kRows / 2];
      multiply_before(dq);  // of the first tile, from whatever is there, to no purpose: a branch would serialise the products
      wgmma_wait<1>();    // ends dV and dK of the tile before
      pin(dk);
      pin(dv);
      if (pending) smem.q_empty[before.slot].release();
      const uint32_t q_smem = smem_address(smem.q[ring.slot]), dy_smem = smem_address(smem.dy[ring.slot]);
      const QueryRecord &record = smem.records[ring.slot];
      smem.q_full[ring.slot].wait(ring.parity);
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
      float column_sum[2] = {0.f, 0.f};  // of gates, which there are none
      if (m * kRows < first + kRows) {
        if (m == 0 && group == 0 && p.normalize)
          correct_first_rows<kDeg>(score, dweight, record, at, reinterpret_cast<float *>(smem.dscore[ring.slot]), group);
        differentiate_columns<T, kDeg, false, true>(score, dweight, weight, dscore, column_sum, record, nullptr, at,
                                                    first - m * kRows + at.row, Packing());
      } else {
        differentiate_columns<T, kDeg, false, false>(score, dweight, weight, dscore, column_sum, record, nullptr, at, 0, Packing());
      }
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          store_shared_32(chunk_address(dscore_smem, kRows, at.row + 8 * r, n) + at.quad * 4, dscore[n >> 1][2 * (n & 1) + r]);
      fence_proxy_async();
      smem.dscore_full[ring.slot].release();
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
    });
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
    const float plain = p.normalize ? 1.f : p.scale_p;
    put_gradient<T, kD>(smem, slot, dk, at, group, kDeg * plain);
    put_gradient<T, kD>(smem, slot, dv, at, group, plain);
  }
}

template <typename T, int kD, int kDeg>
__global__ void __launch_bounds__((kBackwardGroups + 1) * kWarpgroup, 1)
    backward_all_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                        const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dy_map,
                        const __grid_constant__ CUtensorMap dk_map, const __grid_constant__ CUtensorMap dv_map,
                        const __grid_constant__ BackwardAllProblem p) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto &smem = *reinterpret_cast<BackwardAllSmem<T, kD> *>(smem_bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      smem.item_full[s].init(1), smem.item_empty[s].init(2);
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
    registers_lower<kBackwardProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) backward_all_load<T, kD>(smem, &q_map, &k_map, &v_map, &dy_map, p);
    else if (threadIdx.x % kWarpgroup == 32 || threadIdx.x % kWarpgroup == 64)
      backward_all_add<T, kD>(smem, &dk_map, &dv_map, p, threadIdx.x % kWarpgroup / 32 - 1);
  } else {
    registers_raise<kBackwardConsumerRegisters>();
    backward_all_consume<T, kD, kDeg>(smem, p, group);
  }
}

/* An array [b, t, h, x] whose last axis is contiguous. */
template <typename T>
struct Rows {
  T *data;
  int64_t stride[3];
  int size;
  /* Columns 8·piece … 8·piece + 7 of a row; zeros past the end of it. */
  __device__ __forceinline__ uint4 load(int batch, int row, int head, int piece) const {
    if (8 * piece >= size) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4 *>(data + batch * stride[0] + row * stride[1] + head * stride[2] + 8 * piece);
  }
};

/* α and δ of 64 queries of one head, whose sums have had no additions yet. Sixteen threads a row; q's factors are those of `normalize_rows`. */
template <typename T, int kDeg>
__global__ void __launch_bounds__(256, 2) prepare_queries_kernel(const Rows<const T> q, const Rows<const T> y, const Rows<const T> dy,
                                                              const BackwardAllProblem p, QueryRecord *records) {
  constexpr int kRound = 16, kRounds = kRows / kRound;
  const int row_tiles = (p.t_q + kRows - 1) / kRows, head_and_batch = blockIdx.x / row_tiles, tile = blockIdx.x % row_tiles;
  const int batch = head_and_batch / p.h_q, head = head_and_batch % p.h_q, piece = threadIdx.x & 15;
  uint4 x[kRounds][3];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int row = tile * kRows + i * kRound + (threadIdx.x >> 4);
    x[i][0] = x[i][1] = x[i][2] = make_uint4(0, 0, 0, 0);
    if (row < p.t_q) x[i][0] = q.load(batch, row, head, piece), x[i][2] = dy.load(batch, row, head, piece);
    if (row < p.t_q && p.normalize) x[i][1] = y.load(batch, row, head, piece);
  }
  float size[kRounds], delta[kRounds];
  bool rescaled = false;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const uint32_t a[4] = {x[i][0].x, x[i][0].y, x[i][0].z, x[i][0].w}, b[4] = {x[i][1].x, x[i][1].y, x[i][1].z, x[i][1].w};
    const uint32_t c[4] = {x[i][2].x, x[i][2].y, x[i][2].z, x[i][2].w};
    size[i] = delta[i] = 0.f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 f = Pair<T>::unpack(a[j]), u = Pair<T>::unpack(b[j]), w = Pair<T>::unpack(c[j]);
      size[i] = fmaxf(size[i], fmaxf(fabsf(f.x), fabsf(f.y)));
      delta[i] += u.x * w.x + u.y * w.y;
    }
#pragma unroll
    for (int offset = 8; offset; offset /= 2) {
      size[i] = fmaxf(size[i], __shfl_xor_sync(~0u, size[i], offset));
      delta[i] += __shfl_xor_sync(~0u, delta[i], offset);
    }
    rescaled = rescaled || (size[i] > 0.f && !(size[i] >= kSmallRow && size[i] < kLargeRow));
  }
  rescaled = __syncthreads_or(rescaled);
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int in_tile = i * kRound + (threadIdx.x >> 4), row = tile * kRows + in_tile;
    float alpha = 0.f;
    if (row < p.t_q && !p.zero) {
      const float norm = p.normalize ? p.norm[batch * p.norm_stride[0] + row * p.norm_stride[1] + head * p.norm_stride[2]] : 1.f;
      alpha = p.normalize ? (rescaled ? row_factor<T>(size[i]) : 1.f) * inverse_root<kDeg>(norm) : 1.f;
    }
    float *pair = &records[blockIdx.x].alpha_delta[in_tile >> 1].x + (in_tile & 1);
    if (piece == 0) pair[0] = alpha, pair[2] = alpha * delta[i];
  }
  if (threadIdx.x == 0) p.turns[blockIdx.x] = 0;
}

/* dq of 64 queries of one head from their sums; sixteen threads a row. */
template <typename T>
__global__ void __launch_bounds__(256) round_sums_kernel(const Rows<T> dq, const float *sums, int t, int heads, float factor) {
  const int row_tiles = (t + kRows - 1) / kRows, head_and_batch = blockIdx.x / row_tiles, tile = blockIdx.x % row_tiles;
  const int piece = threadIdx.x & 15;
  sums += (int64_t(blockIdx.x) * kBackwardGroups + (piece >> 3)) * kHalfTile;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
    // Where `Fragment` has row 16i + r and columns 8n … 8n + 7: threads 32i + 4(r mod 8) … + 3, numbers 4n + 2(r / 8) and the next.
    const int r = threadIdx.x >> 4, row = tile * kRows + 16 * i + r;
    if (row >= t || 8 * piece >= dq.size) continue;
    uint32_t word[4];
#pragma unroll
    for (int quad = 0; quad < 4; ++quad) {
      const int thread = 32 * i + 4 * (r & 7) + quad;
      const float2 x = *reinterpret_cast<const float2 *>(sums + ((piece & 7) * kWarpgroup + thread) * 4 + 2 * (r >> 3));
      word[quad] = pack<T>(x.x * factor, x.y * factor);
    }
    T *to = dq.data + (head_and_batch / heads) * dq.stride[0] + row * dq.stride[1] + (head_and_batch % heads) * dq.stride[2] + 8 * piece;
    *reinterpret_cast<uint4 *>(to) = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

}  // namespace power::attention
