/* csrc/sm90/tma.cuh: bulk copies and tensor-map tiles, there and back, with the edges that a tensor map cuts off. */
#include "../../../torch_power/csrc/sm90/mbarrier.cuh"
#include "../../../torch_power/csrc/sm90/registers.cuh"
#include "../../../torch_power/csrc/sm90/tma.cuh"
#include "check.cuh"

#include <cuda_fp16.h>

using namespace sm90;

constexpr int COUNT = 4096; /* 16-bit numbers a block copies */

__global__ void bulk(const uint16_t *from, uint16_t *to) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ uint64_t barrier;
  uint32_t bar = smem_address(&barrier), tile = smem_address(smem);
  if (threadIdx.x == 0) mbarrier_init(bar, 1), mbarrier_init_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_expect(bar, COUNT * 2);
    bulk_load(tile, from + blockIdx.x * COUNT, COUNT, bar); /* two halves, one phase */
    bulk_load(tile + COUNT, from + blockIdx.x * COUNT + COUNT / 2, COUNT, bar);
  }
  mbarrier_wait(bar, 0);
  for (int i = threadIdx.x; i < COUNT; i += blockDim.x) reinterpret_cast<uint16_t *>(smem)[i] += 1;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(to + blockIdx.x * COUNT, tile, COUNT * 2);
    bulk_commit();
    bulk_wait_read<0>();
    bulk_wait<0>();
  }
}

/* A tile of 64 rows × 64 columns, 128-byte swizzle: read back through `swizzled`, changed, stored through the other map. */
constexpr int SIDE = 64;
template <int AXES>
__global__ void tiles(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap out, uint16_t *seen, int x, int y) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ uint64_t barrier;
  uint32_t bar = smem_address(&barrier), tile = smem_address(smem);
  if (threadIdx.x == 0) {
    tma_prefetch_descriptor(&in);
    mbarrier_init(bar, 1), mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_expect(bar, SIDE * SIDE * 2); /* what a map cuts off arrives as zeros and counts */
    if (AXES == 2)
      tma_load_2d(tile, &in, x, y, bar);
    else
      tma_load_4d(tile, &in, x, 1, y, 1, bar);
  }
  mbarrier_wait(bar, 0);
  for (int i = threadIdx.x; i < SIDE * SIDE; i += blockDim.x) {
    uint16_t *at = reinterpret_cast<uint16_t *>(smem + swizzled(i / SIDE, i % SIDE / 8)) + i % 8;
    seen[i] = *at;
    *at += 1;
  }
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (AXES == 2)
      tma_store_2d(&out, x, y, tile);
    else
      tma_store_4d(&out, x, 1, y, 1, tile);
    bulk_commit();
    bulk_wait<0>();
  }
}

/* [b = 2, t, h = 3, d] with tokens as rows of a tile, as the kernels see their arguments; or [t, d] alone. */
constexpr int T = 100, H = 3, D = 96;
CUtensorMap map_of(uint16_t *data, int axes) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void *f = nullptr;
  cudaDriverEntryPointQueryResult found;
  CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found));
  CUtensorMap map;
  cuuint64_t size4[] = {D, H, T, 2}, stride4[] = {D * 2, H * D * 2, T * H * D * 2}, size2[] = {D, T}, stride2[] = {D * 2};
  cuuint32_t box4[] = {SIDE, 1, SIDE, 1}, box2[] = {SIDE, SIDE}, step[] = {1, 1, 1, 1};
  CUresult status = reinterpret_cast<Encode>(f)(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, axes, data, axes == 2 ? size2 : size4, axes == 2 ? stride2 : stride4,
      axes == 2 ? box2 : box4, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) check(cudaErrorInvalidValue, "cuTensorMapEncodeTiled");
  return map;
}

template <int AXES>
void test_tiles(int x, int y) {
  size_t size = AXES == 2 ? T * D : 2 * T * H * D;
  std::vector<uint16_t> from(size);
  for (size_t i = 0; i < size; i++) from[i] = uint16_t(i % 30000 + 1);
  Buffer<uint16_t> in(from), out(size), seen(SIDE * SIDE);
  launch(tiles<AXES>, 1, 128, SIDE * SIDE * 2, map_of(in.data, AXES), map_of(out.data, AXES), seen.data, x, y);
  std::vector<uint16_t> got = seen.host(), stored = out.host(), want(size, 0xffff);
  int wrong = 0;
  for (int i = 0; i < SIDE; i++)
    for (int j = 0; j < SIDE; j++) {
      bool inside = y + i < T && x + j < D;
      size_t at = AXES == 2 ? size_t(y + i) * D + x + j : ((size_t(1) * T + y + i) * H + 1) * D + x + j;
      wrong += got[i * SIDE + j] != (inside ? from[at] : 0);
      if (inside) want[at] = from[at] + 1;
    }
  expect(wrong == 0, AXES == 2 ? "tensor map, 2 axes: load" : "tensor map, 4 axes: load", x);
  expect(stored == want, AXES == 2 ? "tensor map, 2 axes: store" : "tensor map, 4 axes: store", y);
}

int main() {
  std::vector<uint16_t> from(3 * COUNT);
  for (size_t i = 0; i < from.size(); i++) from[i] = uint16_t(i * 31);
  Buffer<uint16_t> in(from), out(from.size());
  launch(bulk, 3, 128, COUNT * 2, (const uint16_t *)in.data, out.data);
  std::vector<uint16_t> got = out.host();
  int wrong = 0;
  for (size_t i = 0; i < from.size(); i++) wrong += got[i] != uint16_t(from[i] + 1);
  expect(wrong == 0, "bulk copies: wrong numbers", wrong);
  test_tiles<2>(0, 0), test_tiles<2>(64, 64);
  test_tiles<4>(0, 0), test_tiles<4>(64, 64);
  return failures != 0;
}
