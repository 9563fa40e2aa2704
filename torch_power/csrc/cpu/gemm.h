// The one matrix product everything here is made of:  C[n][m] = beta·C[n][m] + Σ_k A[k][m]·B(k, n).
//
// m is the contiguous axis of A and of C and runs along the vector lanes; B is read one number at a time and broadcast, so it
// may have any strides. A tile of 2 vectors × kTileN columns of C stays in registers over the whole of k: 12 accumulators of 16
// registers (24 of 32 with AVX-512), enough independent sums to hide the latency of a multiply-add. Nothing is packed: callers
// lay A out with m contiguous, which for features is how they are built anyway.
#pragma once

#include "vec.h"

namespace power_cpu {
namespace POWER_ISA {

constexpr int64_t kTileN = POWER_VECTOR_BYTES == 64 ? 12 : 6;
template <class T> constexpr int64_t kTileM = 2 * kLanes<T>;

template <class T> struct Operand {
  const T *p;
  int64_t k, n;     // element strides of the two axes
  int64_t tile;     // from one tile of kTileN columns to the next
};
template <class T> POWER_INLINE Operand<T> strided(const T *p, int64_t k, int64_t n) { return {p, k, n, kTileN * n}; }

// What pack_tiles made: each tile of kTileN columns contiguous, so that the innermost loop reads B in order.
template <class T> POWER_INLINE Operand<T> packed(const T *p, int64_t k_count) { return {p, kTileN, 1, kTileN * k_count}; }
POWER_INLINE int64_t packed_size(int64_t k_count, int64_t n) { return round_up(n, kTileN) * k_count; }

// out = tiles of  scale_k · rows[k·ld + n]
template <class T> inline void pack_tiles(const T *rows, int64_t ld, int64_t k_count, int64_t n, const T *scale, T *out) {
  for (int64_t n0 = 0; n0 < n; n0 += kTileN)
    for (int64_t k = 0; k < k_count; ++k) {
      T a = scale ? scale[k] : T(1);
      for (int64_t j = 0; j < kTileN; ++j) *out++ = n0 + j < n ? a * rows[k * ld + n0 + j] : T(0);
    }
}

template <class T, int M, int N>
POWER_INLINE void register_tile(int64_t k_count, const T *a, int64_t lda, const T *b, int64_t bk, int64_t bn, T beta, T *c,
                                int64_t ldc) {
  Vec<T> sum[N][M];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int m = 0; m < M; ++m) sum[n][m] = Vec<T>{};
  for (int64_t k = 0; k < k_count; ++k) {
    Vec<T> x[M];
#pragma GCC unroll 2
    for (int m = 0; m < M; ++m) x[m] = load(a + m * kLanes<T>);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      T y = b[n * bn];
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) sum[n][m] += x[m] * y;
    }
    a += lda;
    b += bk;
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int m = 0; m < M; ++m) {
      T *at = c + n * ldc + m * kLanes<T>;
      store(at, beta == T(0) ? sum[n][m] : sum[n][m] + load(at) * beta);
    }
}

template <class T, int M, int N>
void tile(int64_t k_count, const T *a, int64_t lda, const T *b, int64_t bk, int64_t bn, T beta, T *c, int64_t ldc) {
  if (bn == 1)  // the compiler then addresses B from one register
    register_tile<T, M, N>(k_count, a, lda, b, bk, 1, beta, c, ldc);
  else
    register_tile<T, M, N>(k_count, a, lda, b, bk, bn, beta, c, ldc);
}

template <class T, int M>
POWER_INLINE void tile_n(int64_t n, int64_t k_count, const T *a, int64_t lda, const T *b, int64_t bk, int64_t bn, T beta, T *c,
                         int64_t ldc) {
  switch (n) {
#define POWER_CASE(N) \
  case N: return tile<T, M, N>(k_count, a, lda, b, bk, bn, beta, c, ldc);
    POWER_CASE(1) POWER_CASE(2) POWER_CASE(3) POWER_CASE(4) POWER_CASE(5) POWER_CASE(6)
#if POWER_VECTOR_BYTES == 64
    POWER_CASE(7) POWER_CASE(8) POWER_CASE(9) POWER_CASE(10) POWER_CASE(11) POWER_CASE(12)
#endif
#undef POWER_CASE
  }
}

// m must be a multiple of the vector length: callers pad with zeros.
template <class T>
inline void gemm(int64_t m, int64_t n, int64_t k_count, const T *a, int64_t lda, Operand<T> b, T beta, T *c, int64_t ldc) {
  for (int64_t m0 = 0; m0 < m; m0 += kTileM<T>)
    for (int64_t n0 = 0; n0 < n; n0 += kTileN) {
      int64_t width = min64(n - n0, kTileN);
      const T *bt = b.p + n0 / kTileN * b.tile;
      T *ct = c + n0 * ldc + m0;
      if (m - m0 >= kTileM<T>)
        tile_n<T, 2>(width, k_count, a + m0, lda, bt, b.k, b.n, beta, ct, ldc);
      else
        tile_n<T, 1>(width, k_count, a + m0, lda, bt, b.k, b.n, beta, ct, ldc);
    }
}

}  // namespace POWER_ISA
}  // namespace power_cpu
