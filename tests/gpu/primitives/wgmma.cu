/* csrc/sm90/wgmma.cuh: every shape, operand source and layout that the kernels use, against sums on the host.
 * The numbers are small integers, so that products and sums are exact in 16-bit operands and float32. */
#include "../../../torch_power/csrc/sm90/mbarrier.cuh"
#include "../../../torch_power/csrc/sm90/registers.cuh"
#include "../../../torch_power/csrc/sm90/tma.cuh"
#include "../../../torch_power/csrc/sm90/wgmma.cuh"
#include "check.cuh"

using namespace sm90;

constexpr int M = 64, K = 64;

/* Byte offset of element (row, k) of an operand with `rows` along M or N and K = 64, 128-byte swizzle. */
template <Major MAJOR>
__device__ uint32_t place(int row, int k) {
  if (MAJOR == K_MAJOR) return swizzled(row, k / 8) + k % 8 * 2;
  return row / 64 * (K * 128) + swizzled(k, row % 64 / 8) + row % 8 * 2;
}
/* Descriptor of the 16 values of k from 16·step on. */
template <Major MAJOR>
__device__ uint64_t operand(uint32_t smem, int step) {
  return MAJOR == K_MAJOR ? matrix_descriptor(smem + 32 * step) : matrix_descriptor(smem + 2048 * step, 1024, K * 128);
}

/* c [64, N] = a [64, 64] · b [N, 64]ᵀ, added to itself if `twice`. */
template <int N, typename T, bool A_IN_REGISTERS, Major A, Major B>
__global__ void __launch_bounds__(128) product(const T *a, const T *b, float *c, int twice) {
  extern __shared__ __align__(1024) unsigned char smem[];
  uint32_t a_smem = smem_address(smem), b_smem = a_smem + M * K * 2;
  for (int i = threadIdx.x; i < M * K; i += 128)
    *reinterpret_cast<T *>(smem + place<A>(i / K, i % K)) = a[i];
  for (int i = threadIdx.x; i < N * K; i += 128)
    *reinterpret_cast<T *>(smem + M * K * 2 + place<B>(i / K, i % K)) = b[i];
  fence_proxy_async();
  __syncthreads();
  int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  float acc[N / 2];
  uint32_t fragment[K / 16][4];
  for (int step = 0; step < K / 16; step++)
    for (int i = 0; i < 4; i++)
      fragment[step][i] = *reinterpret_cast<const uint32_t *>(a + (row + i % 2 * 8) * K + step * 16 + i / 2 * 8 + column);
  for (int round = 0; round <= twice; round++) {
    pin(acc);
    pin(fragment);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K / 16; step++) {
      if constexpr (A_IN_REGISTERS)
        Wgmma<N, T>::template rs<B>(acc, fragment[step], operand<B>(b_smem, step), round > 0 || step > 0);
      else
        Wgmma<N, T>::template ss<A, B>(acc, operand<A>(a_smem, step), operand<B>(b_smem, step), round > 0 || step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(acc);
  }
#pragma unroll
  for (int i = 0; i < N / 2; i++) c[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2] = acc[i];
}

template <int N, typename T, bool A_IN_REGISTERS, Major A, Major B>
void test(const char *what) {
  std::vector<T> a(M * K), b(N * K);
  for (int i = 0; i < M * K; i++) a[i] = T(float(i * 7 % 13 - 6));
  for (int i = 0; i < N * K; i++) b[i] = T(float(i * 5 % 11 - 5));
  Buffer<T> a_gmem(a), b_gmem(b);
  for (int twice = 0; twice < 2; twice++) {
    Buffer<float> c(M * N);
    launch(product<N, T, A_IN_REGISTERS, A, B>, 1, 128, (M + (N + 63) / 64 * 64) * K * 2, (const T *)a_gmem.data, (const T *)b_gmem.data,
           c.data, twice);
    std::vector<float> got = c.host();
    int wrong = 0;
    for (int i = 0; i < M; i++)
      for (int j = 0; j < N; j++) {
        float sum = 0;
        for (int k = 0; k < K; k++) sum += float(a[i * K + k]) * float(b[j * K + k]);
        wrong += !(got[i * N + j] == sum * (1 + twice));
      }
    expect(wrong == 0, what, N);
  }
}

template <int N, typename T>
void test_shape() {
  test<N, T, true, K_MAJOR, K_MAJOR>("A in registers, B k-major, N =");
  test<N, T, false, K_MAJOR, K_MAJOR>("A k-major, B k-major, N =");
  if constexpr (N % 64 == 0) { /* the widths in which the kernels read B, or both, transposed */
    test<N, T, true, K_MAJOR, MN_MAJOR>("A in registers, B n-major, N =");
    test<N, T, false, K_MAJOR, MN_MAJOR>("A k-major, B n-major, N =");
    test<N, T, false, MN_MAJOR, MN_MAJOR>("A m-major, B n-major, N =");
  }
}

int main() {
  test_shape<8, __half>(), test_shape<16, __half>(), test_shape<32, __half>(), test_shape<64, __half>();
  test_shape<96, __half>(), test_shape<128, __half>(), test_shape<192, __half>(), test_shape<256, __half>();
  test_shape<64, __nv_bfloat16>(), test_shape<96, __nv_bfloat16>(), test_shape<128, __nv_bfloat16>();
  return failures != 0;
}
