/* The copy engine: plain bulk copies (contiguous, multiples of 16 bytes) and tensor-map tiles. */
#pragma once
#include <cuda.h>
#include <stdint.h>

namespace sm90 {

/* Device memory → shared memory; its bytes count towards `barrier`'s phase. */
__device__ __forceinline__ void bulk_load(uint32_t smem, const void *gmem, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem), "l"(gmem),
               "r"(bytes), "r"(barrier)
               : "memory");
}
/* Shared memory → device memory; joins the thread's open bulk group. Writers fence first (`fence_proxy_async`). */
__device__ __forceinline__ void bulk_store(void *gmem, uint32_t smem, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(gmem), "r"(smem), "r"(bytes) : "memory");
}
/* The same, added to the float32 numbers that are there. */
__device__ __forceinline__ void bulk_add(float *gmem, uint32_t smem, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(gmem), "r"(smem), "r"(bytes) : "memory");
}
__device__ __forceinline__ void tma_load_2d(uint32_t smem, const CUtensorMap *map, int x, int y, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                   smem),
               "l"(map), "r"(x), "r"(y), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void tma_load_4d(uint32_t smem, const CUtensorMap *map, int x, int y, int z, int w, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          smem),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void tma_store_2d(const CUtensorMap *map, int x, int y, uint32_t smem) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x), "r"(y), "r"(smem)
               : "memory");
}
__device__ __forceinline__ void tma_store_4d(const CUtensorMap *map, int x, int y, int z, int w, uint32_t smem) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map), "r"(x), "r"(y),
               "r"(z), "r"(w), "r"(smem)
               : "memory");
}
__device__ __forceinline__ void tma_prefetch_descriptor(const CUtensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/* Close this thread's bulk group; wait until all but PENDING groups have been read from shared memory (it may be overwritten)
 * or have been written to device memory. */
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
template <int PENDING>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}
/* Orders this thread's ordinary stores to shared memory before later reads by the copy engine and wgmma. A barrier between
 * the writers and whoever starts the copy or the product follows it. */
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace sm90
