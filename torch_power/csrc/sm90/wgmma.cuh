/* Hopper's asynchronous matrix instruction, m64nNk16, 16-bit operands and float32 accumulators.
 *
 *   Wgmma<N, T>::rs<b_major>(acc, a_reg, b_desc, accumulate)            A in registers, B in shared memory
 *   Wgmma<N, T>::ss<a_major, b_major>(acc, a_desc, b_desc, accumulate)  both in shared memory
 *
 * T is __half or __nv_bfloat16; N one of 8, 16, 32, 64, 96, 128, 192, 256. A warpgroup (128 threads) issues it together.
 * Thread (warp w, g = lane / 4, c = lane % 4) holds
 *   acc[4n], acc[4n+1]   : row 16w + g,     columns 8n + 2c, 8n + 2c + 1
 *   acc[4n+2], acc[4n+3] : row 16w + g + 8, the same columns
 *   a_reg[0], a_reg[1]   : rows 16w + g and 16w + g + 8, k = 2c, 2c + 1 (a pair of 16-bit values)
 *   a_reg[2], a_reg[3]   : the same rows, k = 8 + 2c, 8 + 2c + 1
 * so a product's accumulators, rounded in pairs, are the A fragments of a next product: columns 16s … 16s+15 make step s.
 *
 * Between writing registers that wgmma reads (or accumulators) and issuing it: `pin`, then `wgmma_fence`.
 */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace sm90 {

enum Major : int { K_MAJOR = 0, MN_MAJOR = 1 };
enum Swizzle : uint64_t { SWIZZLE_NONE = 0, SWIZZLE_128B = 1, SWIZZLE_64B = 2, SWIZZLE_32B = 3 };

/* Descriptor of an operand in shared memory.
 * K-major (k contiguous): rows of one swizzle width (128, 64 or 32 bytes), 8 rows make an atom, atoms follow each other along
 * M or N every `stride` bytes (1024 for dense 128-byte rows); step along k by adding bytes to the address. `lead` is unused.
 * MN-major (m or n contiguous): one row per k holds a swizzle width of m or n, 8 rows make an atom, atoms follow each other along k every
 * `stride` bytes, and along M or N every `lead` bytes (needed when N exceeds the swizzle width).
 * Atoms are aligned to 8 rows (1024, 512, 256 bytes). Without swizzle an atom is 8 rows of 16 bytes, 128 contiguous bytes. */
template <Swizzle S = SWIZZLE_128B>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t smem, uint32_t stride = 1024, uint32_t lead = 16) {
  return uint64_t((smem & 0x3FFFF) >> 4) | (uint64_t(lead >> 4) << 16) | (uint64_t(stride >> 4) << 32) | (uint64_t(S) << 62);
}
/* What to add to a descriptor to move its start by `bytes`. */
__device__ __forceinline__ constexpr uint64_t descriptor_offset(uint32_t bytes) { return bytes >> 4; }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* Keeps the compiler from moving or copying registers that an asynchronous product reads or writes: without it accumulators
 * are moved between wgmmas, which then serialise (ptxas warning C7510 and its kin). */
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}
template <int M, int N>
__device__ __forceinline__ void pin(uint32_t (&x)[M][N]) {
#pragma unroll
  for (int i = 0; i < M; i++) pin(x[i]);
}

/* For accumulators that a product is about to start anew: what they held is not kept in registers for it, as `pin` would. */
template <int N>
__device__ __forceinline__ void claim(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "=f"(x[i])::"memory");
}

template <int N, typename T>
struct Wgmma;

/* Operand lists as text: accumulators are %0 … %(N/2 − 1); TEN(t) is %t0 … %t9. */
#define SM90_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define SM90_SIX(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5"
#define SM90_0_59 SM90_TEN() ", " SM90_TEN(1) ", " SM90_TEN(2) ", " SM90_TEN(3) ", " SM90_TEN(4) ", " SM90_TEN(5)
#define SM90_LIST_8 "%0, %1, %2, %3"
#define SM90_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SM90_LIST_32 SM90_TEN() ", " SM90_SIX(1)
#define SM90_LIST_64 SM90_TEN() ", " SM90_TEN(1) ", " SM90_TEN(2) ", %30, %31"
#define SM90_LIST_96 SM90_TEN() ", " SM90_TEN(1) ", " SM90_TEN(2) ", " SM90_TEN(3) ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SM90_LIST_128 SM90_0_59 ", %60, %61, %62, %63"
#define SM90_LIST_192 SM90_0_59 ", " SM90_TEN(6) ", " SM90_TEN(7) ", " SM90_TEN(8) ", " SM90_SIX(9)
#define SM90_LIST_256                                                                                                   \
  SM90_0_59 ", " SM90_TEN(6) ", " SM90_TEN(7) ", " SM90_TEN(8) ", " SM90_TEN(9) ", " SM90_TEN(10) ", " SM90_TEN(11)       \
            ", %120, %121, %122, %123, %124, %125, %126, %127"

#define SM90_ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SM90_ACC8(i) SM90_ACC4(i), SM90_ACC4(i + 4)
#define SM90_ACC16(i) SM90_ACC8(i), SM90_ACC8(i + 8)
#define SM90_ACC32(i) SM90_ACC16(i), SM90_ACC16(i + 16)
#define SM90_OUT_8 SM90_ACC4(0)
#define SM90_OUT_16 SM90_ACC8(0)
#define SM90_OUT_32 SM90_ACC16(0)
#define SM90_OUT_64 SM90_ACC32(0)
#define SM90_OUT_96 SM90_ACC32(0), SM90_ACC16(32)
#define SM90_OUT_128 SM90_ACC32(0), SM90_ACC32(32)
#define SM90_OUT_192 SM90_OUT_128, SM90_ACC32(64)
#define SM90_OUT_256 SM90_OUT_192, SM90_ACC32(96)

/* R0 … R6: the operands after the accumulators, as text ("%32", …). */
#define SM90_WGMMA(N, T, NAME, R0, R1, R2, R3, R4, R5, R6)                                                              \
  template <>                                                                                                           \
  struct Wgmma<N, T> {                                                                                                  \
    template <Major B>                                                                                                  \
    static __device__ __forceinline__ void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R5 ", 0;\n"                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" SM90_LIST_##N "}, {" R0 ", " R1 \
                   ", " R2 ", " R3 "}, " R4 ", p, 1, 1, " R6 ";\n}\n"                                                   \
                   : SM90_OUT_##N                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(B)));                 \
    }                                                                                                                   \
    template <Major A, Major B>                                                                                         \
    static __device__ __forceinline__ void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R2 ", 0;\n"                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" SM90_LIST_##N "}, " R0 ", " R1  \
                   ", p, 1, 1, " R3 ", " R4 ";\n}\n"                                                                    \
                   : SM90_OUT_##N                                                                                       \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(int(A)), "n"(int(B)));                                        \
    }                                                                                                                   \
  };
#define SM90_WGMMA_BOTH(N, ...)                       \
  SM90_WGMMA(N, __half, "f16", __VA_ARGS__)           \
  SM90_WGMMA(N, __nv_bfloat16, "bf16", __VA_ARGS__)

SM90_WGMMA_BOTH(8, "%4", "%5", "%6", "%7", "%8", "%9", "%10")
SM90_WGMMA_BOTH(16, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
SM90_WGMMA_BOTH(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
SM90_WGMMA_BOTH(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
SM90_WGMMA_BOTH(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
SM90_WGMMA_BOTH(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
SM90_WGMMA_BOTH(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
SM90_WGMMA_BOTH(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

}  // namespace sm90
