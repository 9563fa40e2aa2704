/* Backward of the attention form in one pass for heads of up to 64. Who does what, and with what shared memory, is sdpa/backward.cuh: softmax
 * attention differs from this in what the two warpgroups with keys make of a tile's scores, and in nothing else. t = 16384, b·h = 32: 5.08 ms
 * for 4128 steps of 1280 cycles of products and 1540 of shared memory. */
#pragma once

#include "attention_one_pass.cuh"

namespace power::attention {

/* A warpgroup with 64 of the keys. */
template <typename T, int kD, int kDeg>
__device__ __forceinline__ void narrow_sum(sdpa::BackwardSmem<T, kD> &smem, const OnePassProblem &p, int group) {
  using Tiles = sdpa::BackwardTiles<kD>;
  static_assert(Tiles::kFragments && !Tiles::kOneByOne);
  const Fragment at(threadIdx.x % kWarpgroup);
  RingPosition<Tiles::kSlots> seat;
  RingPosition<2> buffer;
  RingPosition<Tiles::kStages> ring;
  for (;; seat.advance()) {
    smem.k_full[seat.slot].wait(seat.parity);
    int left = sdpa::visits_of(smem.block[seat.slot]);
    if (left < 0) return;
    const int first = smem.block[seat.slot].first + group * kRows;
    smem.v_full[seat.slot].wait(seat.parity);
    uint32_t k_fragments[kD / 16][4], v_fragments[kD / 16][4];
    load_fragments<kD>(k_fragments, smem_address(smem.k[seat.slot][group]), at);
    load_fragments<kD>(v_fragments, smem_address(smem.v[seat.slot][group]), at);
    float dk[kD / 2], dv[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) dk[i] = dv[i] = 0.f;
    int previous = -1;
#pragma unroll 1
    for (; left > 0; --left, ring.advance(), buffer.advance()) {
      uint32_t weight[kRows / 16][4], dscore[kRows / 16][4];
      float score[kRows / 2], dweight[kRows / 2];
      const uint32_t q_smem = smem_address(smem.q[ring.slot]), dy_smem = smem_address(smem.dy[ring.slot]);
      const QueryRecord &record = reinterpret_cast<const QueryRecord &>(smem.records[ring.slot]);
      smem.q_full[ring.slot].wait(ring.parity);
      claim(score);
      wgmma_fence();
      multiply_fragments<T, kD, kRows>(score, k_fragments, q_smem);
      wgmma_commit();
      wgmma_wait<1>();  // ends the sums of the tile before
      pin(dk);
      pin(dv);
      if (previous >= 0) smem.q_empty[previous].release();
      claim(dweight);
      wgmma_fence();
      multiply_fragments<T, kD, kRows>(dweight, v_fragments, dy_smem);
      wgmma_commit();
      wgmma_wait<1>();
      pin(score);
      const int row = smem.tile[ring.slot] * kRows;
      if (row < first + kRows) scale_columns<true>(score, record, at, first + at.row - row);
      else scale_columns<false>(score, record, at, 0);
      smem.dscore_empty[buffer.slot].wait(buffer.parity ^ 1);
      wgmma_wait<0>();
      pin(dweight);
      if (row == 0 && first == 0 && p.normalize)
        correct_first_rows<kDeg>(score, dweight, record, at, reinterpret_cast<float *>(smem.dscore[buffer.slot][group]), group);
      differentiate_tile<T, kDeg, 8>(score, dweight, dscore, smem_address(smem.dscore[buffer.slot][group]), record, at);
      fence_proxy_async();
      smem.dscore_full[buffer.slot].release();
      pack_weights<T, kDeg>(score, weight);
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
    wgmma_wait<0>();
    pin(dk);
    pin(dv);
    if (previous >= 0) smem.q_empty[previous].release();
    const int batch = smem.block[seat.slot].batch, head = smem.block[seat.slot].head, row = first + at.row;
    smem.v_empty[seat.slot].release();
    smem.k_empty[seat.slot].release();
    sdpa::store_rows<T, kD>(static_cast<T *>(p.dk) + sdpa::row_offset(p.dk_stride, batch, head, row), p.dk_stride[2], dk, p.scale, p.d,
                            p.t_kv - row, at);
    sdpa::store_rows<T, kD>(static_cast<T *>(p.dv) + sdpa::row_offset(p.dv_stride, batch, head, row), p.dv_stride[2], dv, p.plain, p.e,
                            p.t_kv - row, at);
  }
}

template <int kDeg>
struct Narrow {
  using Problem = OnePassProblem;
  template <typename T, int kD>
  static __device__ __forceinline__ void sum(sdpa::BackwardSmem<T, kD> &smem, const Problem &p, int group) {
    narrow_sum<T, kD, kDeg>(smem, p, group);
  }
};

}  // namespace power::attention
