/* Forward of scaled dot-product attention: y_i = Σ_j P_ij v_j / Σ_j P_ij and lse_i (online softmax: Milakov & Gimelshein 2018; the
 * overlap of a tile's softmax with the next tile's products: Shah et al., "FlashAttention-3", 2024).
 *
 * A persistent block of 64·kGroups query rows of one head; each consumer warpgroup owns 64 of them. Tiles of keys stream past from
 * the last to the first, so that the one tile that needs a mask comes first, outside the loop. In the loop a warpgroup starts
 * S = Q Kᵀ of the next tile and O += P V of the present one, and works on S while O is still being summed. Of the last warpgroup
 * one thread loads, one stores and one deals out the items.
 *
 * Exponents refer to the maximum of a row's first tile until its weights outgrow kLargest: relative precision does not depend on the
 * reference, so a tile costs no maximum and O no rescaling. A warp in which a row does outgrow it makes its part of S again, this time
 * with the maximum (general kernels follow the maximum in every tile).
 *
 * Shared memory: q_smem, two slots a warpgroup (the next item's q arrives under this one's products; y leaves through the
 * same slot), k_smem and v_smem in a ring of stages each.
 */
#pragma once

#include "general.cuh"

namespace power::sdpa {

/* A reference that follows the maximum does so when that has grown by 2^kSlack. */
constexpr float kSlack = 8.f;
/* Sum of a thread's weights of one row and tile from which the reference moves: below float16's largest number, and low enough in bfloat16
 * that weights times values stay far from infinity. */
template <typename T>
constexpr float kLargest = is_half<T> ? 0x1p14f : 0x1p20f;

/* d: groups  keys stages  why
 *  64: 3     128  4       S, P, O are 64 + 32 + 32 registers of 160
 * 128: 2     128  2       S, P, O are 64 + 32 + 64 registers of 240; 2 stages of 64 KiB is what fits
256: 2     64   1       O is 128 registers; one stage beside the two slots for q is all of shared memory
 * General kernels have two warpgroups and tiles of 64 keys throughout: what their masks need are registers.
 * kOrdered: the warpgroups take turns at starting products. */
template <int kD, bool kGeneral>
struct ForwardTiles {
  static constexpr int kGroups = kD == 64 && !kGeneral ? 3 : 2, kKeys = kD == 256 || kGeneral ? 64 : 128;
  static constexpr int kStages = kD == 64 ? 4 : kD == 128 ? (kGeneral ? 3 : 2) : 1;
  static constexpr bool kOrdered = true;
};

template <typename T, int kD, typename Tiles>
struct ForwardSmem {
  static constexpr int kGroups = Tiles::kGroups, kStages = Tiles::kStages;
  T q[2][kGroups][kRows * kD];
  T k[kStages][Tiles::kKeys * kD];
  T v[kStages][Tiles::kKeys * kD];
  Dealer<2> dealer;
  Barrier q_full[2][kGroups], y_full[2][kGroups], q_empty[2][kGroups];
  Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

template <typename T, int kD, typename Tiles>
__device__ __forceinline__ void forward_produce(ForwardSmem<T, kD, Tiles> &smem, const CUtensorMap *q_map, const CUtensorMap *k_map,
                                                const CUtensorMap *v_map, const Problem &p) {
  constexpr int kGroups = Tiles::kGroups, kStages = Tiles::kStages, kKeys = Tiles::kKeys, kBlockRows = kGroups * kRows;
  constexpr uint32_t kTileBytes = kKeys * kD * sizeof(T);
  RingPosition<2> seat;
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
    const Range seen = keys_seen(p, first, kBlockRows, kKeys);
#pragma unroll 1
    for (int n = seen.end - 1; n >= seen.begin; --n, ring.advance()) {
      const int s = ring.slot;
      smem.k_empty[s].wait(ring.parity ^ 1);
      smem.k_full[s].expect(kTileBytes);
      load_tile<kD>(smem.k[s], k_map, kKeys, n * kKeys, head_kv, item.batch, smem.k_full[s]);
      smem.v_empty[s].wait(ring.parity ^ 1);
      smem.v_full[s].expect(kTileBytes);
      load_tile<kD>(smem.v[s], v_map, kKeys, n * kKeys, head_kv, item.batch, smem.v_full[s]);
    }
  }
}

/* The storing thread: results leave through the slots of the tiles they replace, which are free again once they have been read. */
template <typename T, int kD, typename Tiles>
__device__ __forceinline__ void forward_store(ForwardSmem<T, kD, Tiles> &smem, const CUtensorMap *y_map, const Problem &p) {
  RingPosition<2> seat;
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance())
#pragma unroll 1
    for (int g = 0; g < Tiles::kGroups; ++g) {
      const int first = (item.tile * Tiles::kGroups + g) * kRows;
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

/* The running softmax of this thread's two rows: the maximum that exponents refer to, and this thread's part of the sum. */
struct Softmax {
  float top[2], sum[2];
};

/* Largest entry of this thread's row `r` of S. */
template <int kKeys>
__device__ __forceinline__ float row_maximum(const float (&score)[kKeys / 2], int r) {
  float top[4] = {score[2 * r], score[2 * r + 1], score[4 + 2 * r], score[5 + 2 * r]};
#pragma unroll
  for (int n = 2; n < kKeys / 8; ++n) {
    top[(n & 1) * 2] = fmaxf(top[(n & 1) * 2], score[4 * n + 2 * r]);
    top[(n & 1) * 2 + 1] = fmaxf(top[(n & 1) * 2 + 1], score[4 * n + 2 * r + 1]);
  }
  return max_of_quad(fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3])));
}

/* S → P = 2^(S − top); sum[r] is this thread's part of its row's sum. kMayBeEmpty: top may be −∞, and all of S with it; P is then 0. */
template <int kKeys, bool kMayBeEmpty>
__device__ __forceinline__ void exponentiate(float (&score)[kKeys / 2], float (&sum)[2], const Softmax &softmax, float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float offset = kMayBeEmpty && softmax.top[r] == kNegativeInfinity ? 0.f : -softmax.top[r] * scale;
    float part[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float &x = score[4 * n + 2 * r + c];
        x = exp2_fast(fmaf(x, scale, offset));
        part[c] += x;
      }
    sum[r] = part[0] + part[1];
  }
}

/* Moves the reference to `top` where that is larger; shrink: what earlier weights are to be multiplied by. */
__device__ __forceinline__ void follow_maximum(float (&shrink)[2], Softmax &softmax, const float (&top)[2], float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float higher = fmaxf(softmax.top[r], top[r]);
    shrink[r] = higher == kNegativeInfinity ? 1.f : exp2_fast((softmax.top[r] - higher) * scale);
    softmax.top[r] = higher;
    softmax.sum[r] *= shrink[r];
  }
}

/* S of this warp's 16 rows once more, by the warp alone. */
template <typename T, int kD, int kKeys>
__device__ __forceinline__ void multiply_again(float (&score)[kKeys / 2], uint32_t q, uint32_t k, const Fragment &at) {
  int thread = at.thread;
  asm volatile("" : "+r"(thread));  // or addresses would be made before the loop over tiles, and take its registers
  const int lane = thread & 31;
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) score[i] = 0.f;
#pragma unroll 1
  for (int step = 0; step < kD / 16; ++step) {
    uint32_t a[4], b[4], rows = chunk_address(k, kKeys, (lane & 7) + (lane >> 4) * 8, 2 * step + ((lane >> 3) & 1));
    load_matrices(a, chunk_address(q, kRows, (thread >> 5) * 16 + (lane & 15), 2 * step + (lane >> 4)));
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      load_matrices(b, rows);
      rows += 16 * 128;
      asm volatile("" : "+r"(rows));
      multiply_by_warp<T>(*reinterpret_cast<float(*)[4]>(&score[8 * n]), a, b[0], b[1]);
      multiply_by_warp<T>(*reinterpret_cast<float(*)[4]>(&score[8 * n + 4]), a, b[2], b[3]);
    }
  }
}

/* P rounded to T, as the A operand of the next product. */
template <typename T, int kKeys>
__device__ __forceinline__ void pack_weights(const float (&score)[kKeys / 2], uint32_t (&weight)[kKeys / 16][4]) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) weight[n >> 1][2 * (n & 1) + r] = pack<T>(score[4 * n + 2 * r], score[4 * n + 2 * r + 1]);
}

/* The warpgroups' turns at starting products: one works on its softmax while the next one's products run. */
template <typename Tiles>
struct Turns {
  int group;
  __device__ __forceinline__ explicit Turns(int group) : group(group) {
    if (Tiles::kOrdered && group == Tiles::kGroups - 1) named_barrier_arrive(ORDER, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void begin() const {
    if constexpr (Tiles::kOrdered) named_barrier_sync(ORDER + group, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void end() const {
    if constexpr (Tiles::kOrdered) named_barrier_arrive(ORDER + (group + 1 == Tiles::kGroups ? 0 : group + 1), 2 * kWarpgroup);
  }
};

/* The digits of y that rounding to T drops, a byte a number. The four threads of a row exchange pairs, so that each has the bytes of
 * eight columns of 32. */
template <typename T, int kD>
__device__ __forceinline__ void store_residual(const Problem &p, const float (&out)[kD / 2], const Fragment &at, const float (&factor)[2],
                                               const Item &item, int first) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + at.row + 8 * r;
    uint8_t *const residual = p.residual + row_offset(p.residual_stride, item.batch, item.head, row);
#pragma unroll
    for (int part = 0; part < kD / 32; ++part) {
      uint32_t pair[4];  // of columns 8n and 8n + 1 beyond 32 · part + 2 · quad
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float low = out[16 * part + 4 * n + 2 * r] * factor[r], high = out[16 * part + 4 * n + 2 * r + 1] * factor[r];
        const float2 rounded = Pair<T>::unpack(pack<T>(low, high));
        pair[n] = digits_after<T>(low, rounded.x) | digits_after<T>(high, rounded.y) << 8;
      }
      // Columns 0 … 15 to threads 0 and 1, the others to 2 and 3; then 0 … 7 and 16 … 23 to threads 0 and 2.
      const bool upper = at.quad & 2, odd = at.quad & 1;
      const uint32_t left = pair[0] | pair[1] << 16, right = pair[2] | pair[3] << 16;
      const uint32_t kept = upper ? right : left, got = __shfl_xor_sync(~0u, upper ? left : right, 2);
      const uint32_t a = upper ? got : kept, b = upper ? kept : got;  // of quads 0 or 1, and 2 or 3
      const uint32_t even_block = __byte_perm(a, b, 0x5410), odd_block = __byte_perm(a, b, 0x7632);
      const uint32_t own = odd ? odd_block : even_block, other = __shfl_xor_sync(~0u, odd ? even_block : odd_block, 1);
      const uint32_t even = odd ? other : own, uneven = odd ? own : other;  // of quads 0 and 2, and 1 and 3
      const int column = 32 * part + 8 * at.quad;
      if (row < p.t_q && column < p.e)
        *reinterpret_cast<uint2 *>(residual + column) = make_uint2(__byte_perm(even, uneven, 0x5410), __byte_perm(even, uneven, 0x7632));
    }
  }
}

/* kGeneral: masks, bias, bands and dropout as `general` says, checked in every tile. */
template <typename T, int kD, typename Tiles, bool kGeneral>
__device__ __forceinline__ void forward_consume(ForwardSmem<T, kD, Tiles> &smem, const Problem &p, const General &general, int group) {
  constexpr int kGroups = Tiles::kGroups, kStages = Tiles::kStages, kKeys = Tiles::kKeys, kBlockRows = kGroups * kRows;
  const Fragment at(threadIdx.x % kWarpgroup);
  const Turns<Tiles> turns(group);
  RingPosition<2> seat;
  RingPosition<kStages> ring;
  const auto skip = [&] {  // a tile that only other rows of the block see
    turns.begin();
    turns.end();
    smem.k_full[ring.slot].wait(ring.parity);
    release(smem.k_empty[ring.slot]);
    smem.v_full[ring.slot].wait(ring.parity);
    release(smem.v_empty[ring.slot]);
    ring.advance();
  };
  for (Item item; (item = smem.dealer.receive(seat)).tile >= 0; seat.advance()) {
    const int first = item.tile * kBlockRows + group * kRows;
    const Range seen = keys_seen(p, item.tile * kBlockRows, kBlockRows, kKeys), mine = keys_seen(p, first, kRows, kKeys);
    const uint32_t q_smem = smem_address(smem.q[seat.slot][group]);
    int n = seen.end - 1;
#pragma unroll 1
    for (; n >= max(mine.end, seen.begin); --n) skip();
    smem.q_full[seat.slot][group].wait(seat.parity);
    if (p.negative && first < p.t_q) negate_rows<kD>(q_smem, at.thread, group);

    const HeadMasks masks(general, item.batch, item.head);  // without kGeneral, never looked at
    const float scale = kGeneral ? 1.f : p.scale_log2;      // masked scores are scaled ones
    Softmax softmax = {{kNegativeInfinity, kNegativeInfinity}, {0.f, 0.f}};
    float out[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] = 0.f;
    if (mine.begin < mine.end) {
      float score[kKeys / 2];
      uint32_t weight[kKeys / 16][4];
      smem.k_full[ring.slot].wait(ring.parity);
      turns.begin();
      pin(score);
      wgmma_fence();
      multiply_rows<T, kD, kKeys>(score, q_smem, smem_address(smem.k[ring.slot]));
      wgmma_commit();
      turns.end();
      wgmma_wait<0>();
      pin(score);
      release(smem.k_empty[ring.slot]);
      // The last tile: keys past the end, or past the diagonal, are hidden. Every row sees one at least.
      if constexpr (kGeneral) mask_rows<kKeys>(score, p, masks, at, first, n * kKeys);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int last_column = kGeneral ? kKeys : min(p.t_kv - 1, first + at.row + 8 * r + p.right) - n * kKeys - 2 * at.quad;
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (!kGeneral && 8 * i + c > last_column) score[4 * i + 2 * r + c] = kNegativeInfinity;
        softmax.top[r] = row_maximum<kKeys>(score, r);
      }
      exponentiate<kKeys, kGeneral>(score, softmax.sum, softmax, scale);
      if (kGeneral && general.seed) drop_rows<kKeys>(score, masks, at, first, n * kKeys);
      pack_weights<T, kKeys>(score, weight);
      --n;

#pragma unroll 1
      for (; n >= mine.begin; --n) {
        const int previous = ring.slot;
        const uint32_t previous_parity = ring.parity;
        ring.advance();
        smem.k_full[ring.slot].wait(ring.parity);
        smem.v_full[previous].wait(previous_parity);
        turns.begin();
        pin(score);
        pin(weight);
        pin(out);
        wgmma_fence();
        multiply_rows<T, kD, kKeys>(score, q_smem, smem_address(smem.k[ring.slot]));
        wgmma_commit();
        accumulate<T, kD, kKeys>(out, weight, smem_address(smem.v[previous]));
        wgmma_commit();
        turns.end();
        wgmma_wait<1>();
        pin(score);
        float shrink[2], sum[2];
        bool rescale;
        if constexpr (kGeneral) mask_rows<kKeys>(score, p, masks, at, first, n * kKeys);
        if constexpr (kGeneral) {
          const float top[2] = {row_maximum<kKeys>(score, 0), row_maximum<kKeys>(score, 1)};
          rescale = __any_sync(~0u, fmaxf(top[0] - softmax.top[0], top[1] - softmax.top[1]) * scale > kSlack);
          if (rescale) follow_maximum(shrink, softmax, top, scale);
          exponentiate<kKeys, kGeneral>(score, sum, softmax, scale);
        } else {
          exponentiate<kKeys, false>(score, sum, softmax, scale);
          rescale = __any_sync(~0u, !(sum[0] < kLargest<T> && sum[1] < kLargest<T>));
          if (rescale) {
            multiply_again<T, kD, kKeys>(score, q_smem, smem_address(smem.k[ring.slot]), at);
            follow_maximum(shrink, softmax, {row_maximum<kKeys>(score, 0), row_maximum<kKeys>(score, 1)}, scale);
            exponentiate<kKeys, false>(score, sum, softmax, scale);
          }
        }
        release(smem.k_empty[ring.slot]);
        softmax.sum[0] += sum[0], softmax.sum[1] += sum[1];
        if (kGeneral && general.seed) drop_rows<kKeys>(score, masks, at, first, n * kKeys);
        wgmma_wait<0>();
        pin(out);
        pin(score);  // what is packed now must not land in the operand's registers before
        release(smem.v_empty[previous]);
        pack_weights<T, kKeys>(score, weight);
        if (rescale) {
#pragma unroll
          for (int i = 0; i < kD / 2; ++i) out[i] *= shrink[(i >> 1) & 1];
        }
      }
      smem.v_full[ring.slot].wait(ring.parity);
      turns.begin();
      pin(weight);
      pin(out);
      wgmma_fence();
      accumulate<T, kD, kKeys>(out, weight, smem_address(smem.v[ring.slot]));
      wgmma_commit();
      turns.end();
      wgmma_wait<0>();
      pin(out);
      release(smem.v_empty[ring.slot]);
      ring.advance();
    } else {
      turns.begin();
      turns.end();
    }
#pragma unroll 1
    for (; n >= seen.begin; --n) skip();

    if (first < p.t_q) {
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first + at.row + 8 * r;
        const float sum = sum_of_quad(softmax.sum[r]);
        factor[r] = sum > 0.f ? 1.f / sum : 0.f;
        if (at.quad == 0 && row < p.t_q)
          p.lse[item.batch * p.lse_stride[0] + item.head * p.lse_stride[1] + row * p.lse_stride[2]] =
              sum > 0.f ? (softmax.top[r] * scale + log2f(sum)) * kLn2 : kNegativeInfinity;
      }
      if (p.residual) store_residual<T, kD>(p, out, at, factor, item, first);
      warpgroup_sync(group);  // no warp still multiplies with the q that y replaces
      store_tile<T, kD>(q_smem, out, at, factor);
      fence_proxy_async();
    }
    release(smem.y_full[seat.slot][group]);
  }
}

template <typename T, int kD, typename Tiles, bool kGeneral>
__global__ void __launch_bounds__((Tiles::kGroups + 1) * kWarpgroup, 1)
    forward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap y_map, const __grid_constant__ Problem p,
                   const __grid_constant__ General general) {
  constexpr int kGroups = Tiles::kGroups;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto &smem = *reinterpret_cast<ForwardSmem<T, kD, Tiles> *>(smem_bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2 * kGroups; ++s)
      (&smem.q_full[0][0])[s].init(1), (&smem.q_empty[0][0])[s].init(1), (&smem.y_full[0][0])[s].init(kArrivals);
    for (int s = 0; s < Tiles::kStages; ++s) {
      smem.k_full[s].init(1), smem.k_empty[s].init(kArrivals * kGroups);
      smem.v_full[s].init(1), smem.v_empty[s].init(kArrivals * kGroups);
    }
    smem.dealer.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  if (group == kGroups) {
    registers_lower<kGroups == 3 ? 32 : 24>();
    if (threadIdx.x % kWarpgroup == 0) forward_produce<T, kD, Tiles>(smem, &q_map, &k_map, &v_map, p);
    else if (threadIdx.x % kWarpgroup == 32) forward_store<T, kD, Tiles>(smem, &y_map, p);
    else if (threadIdx.x % kWarpgroup == 64) smem.dealer.deal(smem.q_empty, p.deck);
  } else {
    registers_raise<kGroups == 3 ? 160 : 240>();
    forward_consume<T, kD, Tiles, kGeneral>(smem, p, general, group);
  }
}

}  // namespace power::sdpa
