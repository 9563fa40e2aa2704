/* Register-level helpers: sharing out the register file, shared-memory loads by address, fragments, 16-bit pairs. */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace sm90 {

/* Moves registers between warpgroups; the pool is launch registers × threads, and asking for more than is free hangs.
 * The caller's role must be one branch of a single if/else, and the kernel launched with __launch_bounds__(threads, 1). */
template <int COUNT>
__device__ __forceinline__ void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

__device__ __forceinline__ uint4 load_shared_128(uint32_t smem) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(smem));
  return v;
}
__device__ __forceinline__ uint2 load_shared_64(uint32_t smem) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(smem));
  return v;
}
__device__ __forceinline__ uint32_t load_shared_32(uint32_t smem) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(smem));
  return v;
}
__device__ __forceinline__ void store_shared_128(uint32_t smem, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_shared_32(uint32_t smem, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(smem), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared_64(uint32_t smem, uint2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(smem), "r"(v.x), "r"(v.y) : "memory");
}

/* Four 8 × 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes). Thread (g, c) gets
 * from each the pair [g][2c, 2c+1], or with `transposed` the pair [2c, 2c+1][g]. */
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

/* Byte offset of 16-byte piece `piece` (0 … 7) of row `row` in a tile of 128-byte rows, 128-byte swizzle. */
__device__ __forceinline__ uint32_t swizzled(int row, int piece) { return uint32_t(row) * 128 + (uint32_t(piece ^ (row & 7)) << 4); }

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static __device__ __forceinline__ float2 unpack(uint32_t a) { return __half22float2(*reinterpret_cast<__half2 *>(&a)); }
};
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static __device__ __forceinline__ float2 unpack(uint32_t a) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&a)); }
};
/* Float16 infinities brought to ±65504. */
__device__ __forceinline__ uint32_t saturate(uint32_t a) {
  uint32_t r;
  asm("{\n.reg .b32 t;\nmin.f16x2 t, %1, %2;\nmax.f16x2 %0, t, %3;\n}" : "=r"(r) : "r"(a), "r"(0x7bff7bffu), "r"(0xfbfffbffu));
  return r;
}
/* Both halves of a pair set to its low, or its high value. */
__device__ __forceinline__ uint32_t twice_low(uint32_t a) {
  uint32_t r;
  asm("{\n.reg .b16 x, y;\nmov.b32 {x, y}, %1;\nmov.b32 %0, {x, x};\n}" : "=r"(r) : "r"(a));
  return r;
}
__device__ __forceinline__ uint32_t twice_high(uint32_t a) {
  uint32_t r;
  asm("{\n.reg .b16 x, y;\nmov.b32 {x, y}, %1;\nmov.b32 %0, {y, y};\n}" : "=r"(r) : "r"(a));
  return r;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

}  // namespace sm90
