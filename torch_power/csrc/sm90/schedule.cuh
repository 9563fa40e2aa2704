/* Sums in device memory that several blocks add to, always in the same order: a counter for each sum counts the additions made.
 *
 * The copy engine adds (`bulk_add`), and this passes the turn on. Turn, copy, completion and next turn take about 3 µs: a block
 * that adds more often takes several threads for it, or it waits for itself.
 */
#pragma once
#include "tma.cuh"

namespace sm90 {

/* Waits until `turn` additions have been completed; what this thread's copy engine adds afterwards is added to their result. */
__device__ __forceinline__ void turn_wait(const int *counter, int turn) {
  int done;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(counter) : "memory");
  while (done < turn);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
/* After `bulk_wait<0>`: this thread's additions are complete, and `turn` of them have been made in all. */
__device__ __forceinline__ void turn_pass(int *counter, int turn) {
  asm volatile("fence.proxy.async.global;\nst.release.gpu.global.s32 [%0], %1;" ::"l"(counter), "r"(turn) : "memory");
}

}  // namespace sm90
