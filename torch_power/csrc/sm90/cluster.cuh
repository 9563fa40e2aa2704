/* Two blocks on neighbouring multiprocessors that share what they load: a copy arrives in both, at the same place, and both have to be done with a slot
 * before either fills it again. */
#pragma once
#include "mbarrier.cuh"
#include "tma.cuh"

namespace sm90 {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/* All threads of both blocks: at the start, barriers are ready for the other block; at the end, nothing is on its way to a block that is gone. */
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
/* Where block `rank` has what is at `smem` here, as an address in the cluster. */
__device__ __forceinline__ uint32_t cluster_address(uint32_t smem, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(smem), "r"(rank));
  return there;
}
/* Default semantics: explicit ones cost 2.4 times the kernel (PROBE). */
__device__ __forceinline__ void mbarrier_arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/* Device memory → the shared memory of both blocks; the bytes count towards each one's `barrier`. */
__device__ __forceinline__ void bulk_load_to_both(uint32_t smem, const void *gmem, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(smem),
               "l"(gmem), "r"(bytes), "r"(barrier), "h"(uint16_t(3))
               : "memory");
}

/* A ring whose slots the producers of both blocks fill together. Each producer announces all the bytes of a slot to its own block. */
template <int STAGES>
struct PairRing : Ring<STAGES> {
  uint32_t there; /* the other block's barriers */
  __device__ __forceinline__ explicit PairRing(uint32_t barriers) : Ring<STAGES>{barriers}, there(cluster_address(barriers, cluster_rank() ^ 1)) {}
  __device__ __forceinline__ void init(int consumers) const { Ring<STAGES>::init(2 * consumers); }
  __device__ __forceinline__ void release(int slot) const {
    Ring<STAGES>::release(slot);
    if (ARRIVALS_A_WARP == 32 || (threadIdx.x & 31) == 0) mbarrier_arrive_in_cluster(there + (STAGES + slot) * 8);
  }
};

}  // namespace sm90
