/* Backward of scaled dot-product attention in one pass over the tiles of scores, for calls without masks.
 *
 *     P = exp(S − lse),  dP = dY Vᵀ,  dS = P ∘ (dP − δ):      dv = Pᵀ dY,   dk = scale · dSᵀ Q,   dq = scale · dS K
 *
 * A block of 128 keys of one key-value head; the tiles of 64 queries that see them come past in the order of schedule.cuh. Two
 * warpgroups of 64 keys make Sᵀ and dPᵀ, and feed Pᵀ and dSᵀ from registers into dV and dK, which stay in registers. dSᵀ also goes to
 * shared memory, where a third warpgroup makes dQ of it: so nothing that the first two do waits for each other or for dQ. Five products
 * a tile, the least there can be.
 *
 * dQ is summed in device memory in float32 by the copy engine. Two threads take a tile each in turns: they wait until it is the block's
 * turn (schedule.cuh), add, and pass the turn on when the sum is there. So every element has one order of additions, and two runs give
 * equal bits. Sums lie in the order of the threads' registers. The last to visit a tile has its sum brought back instead, adds in
 * registers, and what leaves is dq, scaled and rounded.
 *
 * Shared memory: k_smem and v_smem, q_smem, dy_smem and the queries' records in a ring of stages, two tiles of dSᵀ, pieces of dQ of 64
 * columns.
 */
#pragma once

#include "common.cuh"
#include "schedule.cuh"

namespace power::sdpa {

/* d: slots stages  why
 *  64: 2     4       K and V stay in registers as A operands too (kFragments): products of 64 columns are bound by shared memory otherwise
 * 128: 1     3       64 KiB of K and V, 96 of stages, 32 of dS, 32 of dQ are all of shared memory. dK, dV, S and dP do not fit 208 registers
 *                    together, so S ends before dP begins (kOneByOne): P waits as pairs of float16, and dK takes dS from shared memory.
 * Registers: dQ takes 64, two adding threads' counters 32, and the three kinds of warpgroups have 512 to share. */
template <int kD>
struct BackwardTiles {
  static constexpr int kSlots = kD == 64 ? 2 : 1, kStages = kD == 64 ? 4 : 3;
  static constexpr bool kFragments = kD == 64, kOneByOne = kD == 128;
  static constexpr int kParts = kD / kSlabColumns;  // pieces of a tile of dQ
  static constexpr int kSumRegisters = 208, kQueryRegisters = 64, kProducerRegisters = 32;
};

struct OnePassProblem : Problem {
  Timetable table;
  float scale;
  int d;
  QueryRecord *records;  // [b, h_q, tiles of 64 queries]: lse · log2 e − kLogWeight and δ / kWeight
  float *sums;           // [b, h_q, tiles of 64 queries, pieces]: dq before scaling, less what the last visit adds
  int *turns;            // [b, h_q, tiles of 64 queries]: additions made
  void *dk, *dv;
  int64_t dk_stride[3], dv_stride[3];
};
constexpr int kBackwardGroups = 2;
/* What P comes multiplied by, as its exponents are less by kLogWeight: it is 1/t on average, which float16's small numbers have few digits
 * for. dS comes without it. */
constexpr float kWeight = 4096.f, kLogWeight = 12.f;
constexpr int kPiece = kRows * kSlabColumns;  // of dQ, elements
constexpr int kPieces = 2;
/* What becomes of a tile of dQ: it is added to the sum; or it is the last one, and the sum so far is in its pieces; or the only one. */
enum Fate : int { ADD, LAST, ONLY };
constexpr int kBackwardThreads = (kBackwardGroups + 2) * kWarpgroup;

/* What the loading thread says of a key block; visits < 0: there are no more. */
struct KeyBlock {
  int batch, head, first, visits;
};

template <typename T, int kD>
struct BackwardSmem {
  using Tiles = BackwardTiles<kD>;
  T k[Tiles::kSlots][kBackwardGroups][kRows * kD];
  T v[Tiles::kSlots][kBackwardGroups][kRows * kD];
  T q[Tiles::kStages][kRows * kD];
  T dy[Tiles::kStages][kRows * kD];
  T dscore[2][kBackwardGroups][kRows * kRows];
  float piece[kPieces][kPiece];
  QueryRecord records[Tiles::kStages];
  int tile[Tiles::kStages];  // of queries
  KeyBlock block[Tiles::kSlots];
  int fate[2];  // of each adding thread's next tile
  Barrier k_full[Tiles::kSlots], k_empty[Tiles::kSlots], v_full[Tiles::kSlots], v_empty[Tiles::kSlots];
  Barrier q_full[Tiles::kStages], q_empty[Tiles::kStages];
  Barrier dscore_full[2], dscore_empty[2];
  Barrier fate_known[2], piece_full[2][Tiles::kParts], piece_empty[2][Tiles::kParts];  // of each adding thread's tiles
};

/* Two loading threads, so that the queries of the next key block come while its keys wait for room. */
template <typename T, int kD>
__device__ __forceinline__ void backward_load_queries(BackwardSmem<T, kD> &smem, const CUtensorMap *q_map, const CUtensorMap *dy_map,
                                                      const OnePassProblem &p) {
  RingPosition<BackwardTiles<kD>::kStages> ring;
  for (Visitor visit(p.table, blockIdx.x); visit.next();) {
    const int batch = visit.head / p.h_kv, heads = (visit.head % p.h_kv) * p.table.sharing;
#pragma unroll 1
    for (; visit.left > 0; visit.step(), ring.advance()) {
      Barrier &full = smem.q_full[ring.slot];
      const int head = heads + visit.group;
      smem.q_empty[ring.slot].wait(ring.parity ^ 1);
      smem.tile[ring.slot] = visit.tile;
      full.expect(2 * kRows * kD * sizeof(T) + sizeof(QueryRecord));
      load_tile<kD>(smem.q[ring.slot], q_map, kRows, visit.tile * kRows, head, batch, full);
      load_tile<kD>(smem.dy[ring.slot], dy_map, kRows, visit.tile * kRows, head, batch, full);
      bulk_load(smem_address(&smem.records[ring.slot]), p.records + (batch * p.h_q + head) * p.table.tiles + visit.tile, sizeof(QueryRecord),
                full.address());
    }
  }
}
template <typename T, int kD>
__device__ __forceinline__ void backward_load_keys(BackwardSmem<T, kD> &smem, const CUtensorMap *k_map, const CUtensorMap *v_map,
                                                   const OnePassProblem &p) {
  RingPosition<BackwardTiles<kD>::kSlots> seat;
  Visitor visit(p.table, blockIdx.x);
  for (; visit.next(); seat.advance()) {
    const int batch = visit.head / p.h_kv, head = visit.head % p.h_kv;
    const auto load = [&](T(&tile)[kBackwardGroups][kRows * kD], const CUtensorMap *map, Barrier &full) {
      full.expect(kBackwardGroups * kRows * kD * sizeof(T));  // past the end of the keys these are zeros
#pragma unroll 1
      for (int g = 0; g < kBackwardGroups; ++g)
        load_tile<kD>(tile[g], map, kRows, visit.key_block * kKeyBlock + g * kRows, head, batch, full);
    };
    smem.v_empty[seat.slot].wait(seat.parity ^ 1);
    load(smem.v[seat.slot], v_map, smem.v_full[seat.slot]);
    smem.k_empty[seat.slot].wait(seat.parity ^ 1);
    smem.block[seat.slot] = {batch, head, visit.key_block * kKeyBlock, visit.left};
    load(smem.k[seat.slot], k_map, smem.k_full[seat.slot]);
  }
  smem.k_empty[seat.slot].wait(seat.parity ^ 1);
  smem.block[seat.slot].visits = -1;
  smem.k_full[seat.slot].arrive();
}

/* One of two adding threads: takes every second tile of dQ to its sum, or the last one to dq. Each has barriers of its own: one that
 * sees only every second phase of a barrier cannot tell which. */
template <typename T, int kD>
__device__ __forceinline__ void backward_add(BackwardSmem<T, kD> &smem, const CUtensorMap *dq_map, const OnePassProblem &p, int which) {
  using Tiles = BackwardTiles<kD>;
  constexpr bool kShared = 2 * Tiles::kParts != kPieces;  // both threads' tiles go through the same pieces
  constexpr uint32_t kBytes = kPiece * sizeof(float);
  const auto piece = [&](int part) { return smem_address(smem.piece[(which * Tiles::kParts + part) % kPieces]); };
  const auto sum_of = [&](int tile, int part) { return p.sums + (int64_t(tile) * Tiles::kParts + part) * kPiece; };
  uint32_t parity = 0;
  Visitor visit(p.table, blockIdx.x);
  bool last = false;
  const auto go = [&](int count) {  // to the next tile; of a last visit more is to be said when its turn has come
    visit.skip(count);
    last = visit.left > 0 && visit.turn() == p.table.visits(visit.tile) - 1;
    if (visit.left == 0 || last) return;
    smem.fate[which] = ADD;
    smem.fate_known[which].arrive();
  };
  for (go(which); visit.left > 0; parity ^= 1) {
    const int head = visit.head * p.table.sharing + visit.group;  // (batch · h_kv + head) · sharing = batch · h_q + head · sharing
    const int index = head * p.table.tiles + visit.tile;
    int turn = visit.turn();
    if (turn > 0) {
      while (load_acquire(p.turns + index) != turn) __nanosleep(20);
      fence_proxy_async_global();
    }
    if (last) {
      smem.fate[which] = turn > 0 ? LAST : ONLY;
      if (turn > 0) {
        smem.fate_known[which].expect(Tiles::kParts * kBytes);
#pragma unroll 1
        for (int part = 0; part < Tiles::kParts; ++part) {
          if constexpr (kShared) smem.piece_empty[which ^ 1][part].wait(parity ^ 1 ^ which);  // of the tile before
          bulk_load(piece(part), sum_of(index, part), kBytes, smem.fate_known[which].address());
        }
      } else {
        smem.fate_known[which].arrive();
      }
#pragma unroll 1
      for (int part = 0; part < Tiles::kParts; ++part) {
        smem.piece_full[which][part].wait(parity);
        tma_store_4d(dq_map, part * kSlabColumns, head % p.h_q, visit.tile * kRows, head / p.h_q, piece(part));
        bulk_commit();
        bulk_wait_read<0>();
        smem.piece_empty[which][part].arrive();
      }
      turn = -1;
    } else {
#pragma unroll
      for (int part = 0; part < Tiles::kParts; ++part) {
        smem.piece_full[which][part].wait(parity);
        if (turn > 0) bulk_add(sum_of(index, part), piece(part), kBytes);
        else bulk_store(sum_of(index, part), piece(part), kBytes);
        bulk_commit();
        bulk_wait_read<0>();
        smem.piece_empty[which][part].arrive();
      }
    }
    go(2);
    if (turn < 0) continue;
    bulk_wait<0>();
    fence_proxy_async_global();
    store_release(p.turns + index, turn + 1);
  }
  bulk_wait<0>();
}

/* kWeight · P from S, in place. kEdge: queries before a key (columns < first_column + 8r) do not see it, and keys past the end (8r ≥ keys)
 * are seen by nobody. */
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

/* A 64 × 64 accumulator, rounded in pairs, as A operands. */
template <typename T>
__device__ __forceinline__ void pack_tile(const float (&acc)[kRows / 2], uint32_t (&packed)[kRows / 16][4]) {
#pragma unroll
  for (int i = 0; i < kRows / 2; i += 2) packed[i / 8][i / 2 % 4] = pack<T>(acc[i], acc[i + 1]);
}

/* dSᵀ as A operand, and into its tile [keys][queries] of shared memory. weight(i): numbers i and i + 1 of kWeight · P. */
template <typename T, typename Weight>
__device__ __forceinline__ void differentiate(const Weight &weight, const float (&dweight)[kRows / 2], uint32_t (&dscore)[kRows / 16][4],
                                              uint32_t dscore_tile, const QueryRecord &record, const Fragment &at) {
  const uint32_t start = chunk_address(dscore_tile, kRows, at.row, 0) + at.quad * 4;  // chunk n is at ^ 16n
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float2 delta = *reinterpret_cast<const float2 *>(&record.lse_delta[4 * n + at.quad].z);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = 4 * n + 2 * r;
      const float2 w = weight(i);
      const uint32_t pair =
          pack<T>(w.x * fmaf(dweight[i], 1.f / kWeight, -delta.x), w.y * fmaf(dweight[i + 1], 1.f / kWeight, -delta.y));
      dscore[n >> 1][2 * (n & 1) + r] = pair;
      store_shared_32((start + r * 1024) ^ (n * 16), pair);
    }
  }
}

/* Rows of dk or dv that a thread holds, as T, to device memory. */
template <typename T, int kD>
__device__ __forceinline__ void store_rows(T *row, int64_t stride, const float (&acc)[kD / 2], float factor, int columns, int rows,
                                           const Fragment &at) {
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (8 * r < rows)
#pragma unroll
      for (int n = 0; n < kD / 8; ++n)
        if (8 * n < columns)
          *reinterpret_cast<uint32_t *>(row + 8 * r * stride + 8 * n + 2 * at.quad) =
              pack<T>(acc[4 * n + 2 * r] * factor, acc[4 * n + 2 * r + 1] * factor);
}

__device__ __forceinline__ int visits_of(const volatile KeyBlock &block) { return block.visits; }

/* dK += dSᵀ Q, dSᵀ from shared memory. */
template <typename T, int kD>
__device__ __forceinline__ void multiply_dscores(float (&dk)[kD / 2], uint32_t dscore, uint32_t q) {
  const uint64_t a = matrix_descriptor(dscore), b = matrix_descriptor(q, 1024, kRows * 128);
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step)
    Wgmma<kD, T>::template ss<K_MAJOR, MN_MAJOR>(dk, attention::advance(a, step * 32), attention::advance(b, step * 16 * 128), 1);
}

/* A warpgroup with 64 of the keys. */
template <typename T, int kD>
__device__ __forceinline__ void backward_sum(BackwardSmem<T, kD> &smem, const OnePassProblem &p, int group) {
  using Tiles = BackwardTiles<kD>;
  const Fragment at(threadIdx.x % kWarpgroup);
  RingPosition<Tiles::kSlots> seat;
  RingPosition<2> buffer;
  RingPosition<Tiles::kStages> ring;
  for (;; seat.advance()) {
    smem.k_full[seat.slot].wait(seat.parity);
    int left = visits_of(smem.block[seat.slot]);
    if (left < 0) return;
    const int first = smem.block[seat.slot].first + group * kRows;
    const uint32_t k_smem = smem_address(smem.k[seat.slot][group]), v_smem = smem_address(smem.v[seat.slot][group]);
    smem.v_full[seat.slot].wait(seat.parity);
    if (p.negative) negate_rows<kD>(k_smem, at.thread, group);
    uint32_t k_fragments[kD / 16][4], v_fragments[kD / 16][4];
    if constexpr (Tiles::kFragments) load_fragments<kD>(k_fragments, k_smem, at), load_fragments<kD>(v_fragments, v_smem, at);
    float dk[kD / 2], dv[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) dk[i] = dv[i] = 0.f;
    int previous = -1;  // stage of the tile before
    const auto weigh = [&](float(&score)[kRows / 2]) {
      const QueryRecord &record = smem.records[ring.slot];
      const int row = smem.tile[ring.slot] * kRows;
      if (row < first - p.right + kRows || first + kRows > p.t_kv)
        weigh_columns<true>(score, record, p.scale_log2, at, first + at.row - p.right - row, p.t_kv - first - at.row);
      else
        weigh_columns<false>(score, record, p.scale_log2, at, 0, 0);
    };
    if constexpr (Tiles::kOneByOne) {
      int previous_buffer = 0;
      float score[kRows / 2];
      uint32_t weight[kRows / 16][4], dscore[kRows / 16][4];
      // S of the next tile starts before dV and dK of this one, which run while S is weighed: t = 4096 full 2.85 ms, 3.26 with S behind them.
      // After the last tile its S is made once more and not used: a product that a condition leaves out costs ptxas the registers.
      if (left > 0)
#pragma unroll 1
        for (;; --left) {
          if (left > 0) smem.q_full[ring.slot].wait(ring.parity);
          pin(weight);
          pin(dv);
          pin(dk);
          claim(score);
          wgmma_fence();
          multiply_rows<T, kD, kRows>(score, k_smem, smem_address(smem.q[left > 0 ? ring.slot : previous]));
          wgmma_commit();
          if (previous >= 0) {
            wgmma_fence();
            accumulate<T, kD, kRows>(dv, weight, smem_address(smem.dy[previous]));
            multiply_dscores<T, kD>(dk, smem_address(smem.dscore[previous_buffer][group]), smem_address(smem.q[previous]));
          }
          wgmma_commit();
          wgmma_wait<1>();
          pin(score);
          if (left == 0) break;
          weigh(score);
          wgmma_wait<0>();
          pin(dk);
          pin(dv);
          pin(score);
          if (previous >= 0) release(smem.q_empty[previous]);
          pack_tile<__half>(score, weight);
          pin(weight);
          float dweight[kRows / 2];
          claim(dweight);
          wgmma_fence();
          multiply_rows<T, kD, kRows>(dweight, v_smem, smem_address(smem.dy[ring.slot]));
          wgmma_commit();
          smem.dscore_empty[buffer.slot].wait(buffer.parity ^ 1);
          wgmma_wait<0>();
          pin(dweight);
          differentiate<T>([&](int i) { return Pair<__half>::unpack(weight[i / 8][i / 2 % 4]); }, dweight, dscore,
                           smem_address(smem.dscore[buffer.slot][group]), smem.records[ring.slot], at);
          if constexpr (!is_half<T>) {
#pragma unroll
            for (int i = 0; i < kRows / 4; ++i) {
              const float2 w = Pair<__half>::unpack(weight[i / 4][i % 4]);
              weight[i / 4][i % 4] = pack<T>(w.x, w.y);
            }
          }
          fence_proxy_async();
          release(smem.dscore_full[buffer.slot]);
          warpgroup_sync(group);  // all of its dS is there
          previous = ring.slot, previous_buffer = buffer.slot;
          ring.advance(), buffer.advance();
        }
    } else {
#pragma unroll 1
      for (; left > 0; --left, ring.advance(), buffer.advance()) {
        uint32_t weight[kRows / 16][4], dscore[kRows / 16][4];
        float score[kRows / 2], dweight[kRows / 2];
        const uint32_t q_smem = smem_address(smem.q[ring.slot]), dy_smem = smem_address(smem.dy[ring.slot]);
        smem.q_full[ring.slot].wait(ring.parity);
        claim(score);
        wgmma_fence();
        multiply_fragments<T, kD, kRows>(score, k_fragments, q_smem);
        wgmma_commit();
        wgmma_wait<1>();
        pin(dk);
        pin(dv);
        if (previous >= 0) release(smem.q_empty[previous]);
        claim(dweight);
        wgmma_fence();
        multiply_fragments<T, kD, kRows>(dweight, v_fragments, dy_smem);
        wgmma_commit();
        wgmma_wait<1>();
        pin(score);
        weigh(score);
        smem.dscore_empty[buffer.slot].wait(buffer.parity ^ 1);
        wgmma_wait<0>();
        pin(dweight);
        differentiate<T>([&](int i) { return make_float2(score[i], score[i + 1]); }, dweight, dscore,
                         smem_address(smem.dscore[buffer.slot][group]), smem.records[ring.slot], at);
        pack_tile<T>(score, weight);
        fence_proxy_async();
        release(smem.dscore_full[buffer.slot]);
        pin(weight);
        pin(dscore);
        pin(dv);
        pin(dk);
        wgmma_fence();
        accumulate<T, kD, kRows>(dv, weight, dy_smem);
        accumulate<T, kD, kRows>(dk, dscore, q_smem);
        wgmma_commit();
        previous = ring.slot;
      }
    }
    wgmma_wait<0>();
    pin(dk);
    pin(dv);
    if (previous >= 0) release(smem.q_empty[previous]);
    const int batch = smem.block[seat.slot].batch, head = smem.block[seat.slot].head, row = first + at.row;
    release(smem.v_empty[seat.slot]);
    release(smem.k_empty[seat.slot]);
    store_rows<T, kD>(static_cast<T *>(p.dk) + row_offset(p.dk_stride, batch, head, row), p.dk_stride[2], dk, p.scale, p.d, p.t_kv - row, at);
    store_rows<T, kD>(static_cast<T *>(p.dv) + row_offset(p.dv_stride, batch, head, row), p.dv_stride[2], dv, 1.f / kWeight, p.e,
                      p.t_kv - row, at);
  }
}

__device__ __forceinline__ int fate_of(const volatile int &fate) { return fate; }

/* The warpgroup that makes dQ: dS [64 queries, 128 keys] from dSᵀ in shared memory times K, 64 columns at a time. For a negative scale
 * the keys in shared memory are −k. */
template <typename T, int kD>
__device__ __forceinline__ void backward_query(BackwardSmem<T, kD> &smem, const OnePassProblem &p) {
  using Tiles = BackwardTiles<kD>;
  const uint32_t thread = threadIdx.x % kWarpgroup;
  const float scale = fabsf(p.scale);
  RingPosition<Tiles::kSlots> seat;
  RingPosition<2> buffer;
  RingPosition<2> adder;  // the thread that takes the tile to its sum
  for (;; seat.advance()) {
    smem.k_full[seat.slot].wait(seat.parity);
    int left = visits_of(smem.block[seat.slot]);
    if (left < 0) return;
    const uint32_t k_smem = smem_address(smem.k[seat.slot][0]);
#pragma unroll 1
    for (; left > 0; --left, buffer.advance(), adder.advance()) {
      const uint64_t a = matrix_descriptor(smem_address(smem.dscore[buffer.slot][0]));
      smem.dscore_full[buffer.slot].wait(buffer.parity);
#pragma unroll
      for (int part = 0; part < Tiles::kParts; ++part) {
        const uint64_t b = matrix_descriptor(k_smem + part * kRows * 128);
        float piece[kSlabColumns / 2];
        claim(piece);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kKeyBlock / 16; ++step)
          Wgmma<kSlabColumns, T>::template ss<MN_MAJOR, MN_MAJOR>(
              piece, attention::advance(a, step * 16 * 128),
              attention::advance(b, (step >> 2) * kRows * kD * sizeof(T) + (step & 3) * 16 * 128), step != 0);
        wgmma_commit();
        wgmma_wait<0>();
        pin(piece);
        if (part == Tiles::kParts - 1) release(smem.dscore_empty[buffer.slot]);
        if constexpr (2 * Tiles::kParts == kPieces) smem.piece_empty[adder.slot][part].wait(adder.parity ^ 1);
        else smem.piece_empty[adder.slot ^ 1][part].wait(adder.parity ^ 1 ^ adder.slot);  // of the tile before
        smem.fate_known[adder.slot].wait(adder.parity);
        const uint32_t out = smem_address(smem.piece[(adder.slot * Tiles::kParts + part) % kPieces]), own = out + thread * 16;
        const int fate = fate_of(smem.fate[adder.slot]);
        if (fate == ADD) {
#pragma unroll
          for (int n = 0; n < kSlabColumns / 8; ++n)
            store_shared_128(own + n * kWarpgroup * 16, make_uint4(__float_as_uint(piece[4 * n]), __float_as_uint(piece[4 * n + 1]),
                                                                   __float_as_uint(piece[4 * n + 2]), __float_as_uint(piece[4 * n + 3])));
        } else {
          if (fate == LAST) {
#pragma unroll
            for (int n = 0; n < kSlabColumns / 8; ++n) {
              const uint4 sum = load_shared_128(own + n * kWarpgroup * 16);
              piece[4 * n] += __uint_as_float(sum.x), piece[4 * n + 1] += __uint_as_float(sum.y);
              piece[4 * n + 2] += __uint_as_float(sum.z), piece[4 * n + 3] += __uint_as_float(sum.w);
            }
          }
          warpgroup_sync(kBackwardGroups);  // dq takes the place of sums that all threads have read
          int row = Fragment(thread).row;
          asm volatile("" : "+r"(row));  // or addresses would be made before the loop over tiles, and take its registers
          const uint32_t start = chunk_address(out, kRows, row, 0) + thread % 4 * 4;  // chunk n is at ^ 16n
#pragma unroll
          for (int n = 0; n < kSlabColumns / 8; ++n)
#pragma unroll
            for (int r = 0; r < 2; ++r)
              store_shared_32((start + r * 1024) ^ (n * 16), pack<T>(piece[4 * n + 2 * r] * scale, piece[4 * n + 2 * r + 1] * scale));
        }
        fence_proxy_async();
        release(smem.piece_full[adder.slot][part]);
      }
    }
    release(smem.k_empty[seat.slot]);
  }
}

/* What the warpgroups with keys do; power attention has its own (power/attention_one_pass_narrow.cuh). */
struct Softmax {
  using Problem = OnePassProblem;
  template <typename T, int kD>
  static __device__ __forceinline__ void sum(BackwardSmem<T, kD> &smem, const Problem &p, int group) {
    backward_sum<T, kD>(smem, p, group);
  }
};

template <typename T, int kD, typename Weights = Softmax>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dy_map,
                    const __grid_constant__ CUtensorMap dq_map, const __grid_constant__ typename Weights::Problem p) {
  using Tiles = BackwardTiles<kD>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto &smem = *reinterpret_cast<BackwardSmem<T, kD> *>(smem_bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tiles::kSlots; ++s) {
      smem.k_full[s].init(1), smem.k_empty[s].init(kArrivals * (kBackwardGroups + 1));
      smem.v_full[s].init(1), smem.v_empty[s].init(kArrivals * kBackwardGroups);
    }
    for (int s = 0; s < Tiles::kStages; ++s) smem.q_full[s].init(1), smem.q_empty[s].init(kArrivals * kBackwardGroups);
    for (int s = 0; s < 2; ++s) {
      smem.dscore_full[s].init(kArrivals * kBackwardGroups), smem.dscore_empty[s].init(kArrivals);
      smem.fate_known[s].init(1);
    }
    for (int s = 0; s < 2 * Tiles::kParts; ++s)
      (&smem.piece_full[0][0])[s].init(kArrivals), (&smem.piece_empty[0][0])[s].init(1);
    mbarrier_init_fence();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  if (group == kBackwardGroups + 1) {
    registers_lower<Tiles::kProducerRegisters>();
    const int warp = threadIdx.x % kWarpgroup / 32;
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) backward_load_queries<T, kD>(smem, &q_map, &dy_map, p);
      else if (warp == 1) backward_load_keys<T, kD>(smem, &k_map, &v_map, p);
      else backward_add<T, kD>(smem, &dq_map, p, warp - 2);
    }
  } else if (group == kBackwardGroups) {
    registers_lower<Tiles::kQueryRegisters>();
    backward_query<T, kD>(smem, p);
  } else {
    registers_raise<Tiles::kSumRegisters>();
    Weights::template sum<T, kD>(smem, p, group);
  }
}

}  // namespace power::sdpa
