/* Barriers in shared memory that count arrivals and bytes, rings of them, and the sixteen named barriers. */
#pragma once
#include <stdint.h>

namespace sm90 {

__device__ __forceinline__ uint32_t smem_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
/* After the inits, before a __syncthreads: makes them visible to the copy engine. */
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/* One arrival that also announces `bytes` which the copy engine will deliver before the phase can end. */
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/* Waits until the phase of the given parity has ended. A fresh barrier is in phase 0: waiting for parity 1 returns at once. */
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, 0x989680;\n@p bra DONE;\nbra WAIT;\n"
      "DONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/* Position in a ring of STAGES slots: `slot`, and the parity of the phase that fills it. */
template <int STAGES>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
};

/* Arrivals by which a warp hands a slot back. One lane speaks for all after a __syncwarp; compute-sanitizer's racecheck does not follow that
 * order and reports the other lanes' reads, so a build for it (-DPOWER_RACECHECK) has every lane arrive. */
#ifdef POWER_RACECHECK
constexpr int ARRIVALS_A_WARP = 32;
#else
constexpr int ARRIVALS_A_WARP = 1;
#endif

/* A ring of slots that one producer thread fills through the copy engine and consumers drain.
 * full: one arrival (the producer's expect) plus bytes; empty: one release from each of `consumers` warps. */
template <int STAGES>
struct Ring {
  uint32_t barriers;
  static constexpr int BYTES = 2 * STAGES * 8;
  __device__ __forceinline__ uint32_t full(int slot) const { return barriers + slot * 8; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return barriers + (STAGES + slot) * 8; }
  __device__ __forceinline__ void init(int consumers) const {
    for (int slot = 0; slot < STAGES; slot++) mbarrier_init(full(slot), 1), mbarrier_init(empty(slot), consumers * ARRIVALS_A_WARP);
  }
  /* Producer: waits for the slot to be drained, then announces `bytes`; copies into it signal full(slot). */
  __device__ __forceinline__ void acquire(const RingPosition<STAGES> &at, uint32_t bytes) const {
    mbarrier_wait(empty(at.slot), at.parity ^ 1);
    mbarrier_expect(full(at.slot), bytes);
  }
  /* Consumer: waits for the slot's bytes. */
  __device__ __forceinline__ void wait(const RingPosition<STAGES> &at) const { mbarrier_wait(full(at.slot), at.parity); }
  /* Consumer: every warp says that it has done with the slot; one thread for a whole warpgroup would let the producer
   * overwrite what another of its warps still reads. */
  __device__ __forceinline__ void release(int slot) const {
    __syncwarp();
    if (ARRIVALS_A_WARP == 32 || (threadIdx.x & 31) == 0) mbarrier_arrive(empty(slot));
  }
};

/* Named barriers in use; 0 is __syncthreads. `CONSUMER + w` belongs to consumer warpgroup w alone. */
enum NamedBarrier : int { ALL_THREADS = 0, CONSUMERS = 1, PRODUCERS = 2, ORDER = 3, CONSUMER = 8 };

__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace sm90
