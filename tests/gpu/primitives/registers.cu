/* csrc/sm90/registers.cuh: registers moved between warpgroups, matrix loads, swizzled pieces and pairs of 16-bit numbers. */
#include "../../../torch_power/csrc/sm90/mbarrier.cuh"
#include "../../../torch_power/csrc/sm90/registers.cuh"
#include "check.cuh"

#include <math.h>

using namespace sm90;

/* Three warpgroups start with 168 registers each; one gives up all but 40 and two take 232 and use more than they started with. */
constexpr int LIVE = 190;
__global__ void __launch_bounds__(384, 1) share_out(const float *from, float *to) {
  int group = threadIdx.x / 128;
  if (group == 0) {
    registers_lower<40>();
    to[threadIdx.x] = from[threadIdx.x] + 1;
  } else {
    registers_raise<232>();
    float x[LIVE], sum = 0;
#pragma unroll
    for (int i = 0; i < LIVE; i++) x[i] = from[threadIdx.x + i];
#pragma unroll
    for (int i = 0; i < LIVE; i++) asm volatile("" : "+f"(x[i]));
    for (int round = 0; round < 3; round++) { /* all of x is needed in every round */
#pragma unroll
      for (int i = 0; i < LIVE; i++) x[i] = x[i] * 0.5f + x[(i + 1) % LIVE];
    }
#pragma unroll
    for (int i = 0; i < LIVE; i++) sum += x[i];
    to[threadIdx.x] = sum;
  }
}

/* Matrices of a tile of 64 rows × 64 columns, 128-byte swizzle: pairs to [transposed][lane][4]. */
__global__ void matrices(const uint16_t *from, uint32_t *to) {
  __shared__ __align__(1024) unsigned char tile[64 * 128];
  uint32_t smem = smem_address(tile);
  for (int i = threadIdx.x; i < 64 * 8; i += 32)
    store_shared_128(smem + swizzled(i / 8, i % 8), *reinterpret_cast<const uint4 *>(from + i * 8));
  __syncwarp();
  int lane = threadIdx.x, matrix = lane / 8; /* matrices 0 … 3: rows 16 and 24 of pieces 2 and 3 */
  uint32_t address = smem + swizzled(16 + matrix % 2 * 8 + lane % 8, 2 + matrix / 2), plain[4], transposed[4];
  load_matrices(plain, address);
  load_matrices_transposed(transposed, address);
  for (int i = 0; i < 4; i++) to[lane * 4 + i] = plain[i], to[128 + lane * 4 + i] = transposed[i];
  uint4 four = load_shared_128(smem + swizzled(lane, 5));
  uint2 two = load_shared_64(smem + swizzled(lane, 5));
  bool same = four.x == two.x && four.y == two.y && four.x == load_shared_32(smem + swizzled(lane, 5));
  to[256 + lane] = same ? four.w : 0xffffffff;
}

template <typename T>
__global__ void pairs(const float *from, float *to) {
  uint32_t a = Pair<T>::pack(from[0], from[1]), b = Pair<T>::pack(from[2], from[3]);
  float2 product = Pair<T>::unpack(Pair<T>::multiply(a, b)), low = Pair<T>::unpack(twice_low(a)), high = Pair<T>::unpack(twice_high(a));
  float2 limited = Pair<__half>::unpack(saturate(Pair<__half>::pack(INFINITY, -INFINITY)));
  float results[] = {product.x, product.y, low.x, low.y, high.x, high.y, limited.x, limited.y, exp2_fast(from[4])};
  for (int i = 0; i < 9; i++) to[i] = results[i];
}

int main() {
  std::vector<float> numbers(1024);
  for (int i = 0; i < 1024; i++) numbers[i] = float(i % 37);
  Buffer<float> in(numbers), out(384);
  launch(share_out, 1, 384, 0, (const float *)in.data, out.data);
  std::vector<float> got = out.host();
  int wrong = 0;
  for (int thread = 0; thread < 384; thread++) {
    std::vector<float> x(numbers.begin() + thread, numbers.begin() + thread + LIVE);
    float sum = thread < 128 ? x[0] + 1 : 0;
    for (int round = 0; round < 3 && thread >= 128; round++)
      for (int i = 0; i < LIVE; i++) x[i] = x[i] * 0.5f + x[(i + 1) % LIVE];
    for (int i = 0; i < LIVE && thread >= 128; i++) sum += x[i];
    wrong += !(fabsf(got[thread] - sum) <= 1e-4f * fabsf(sum));
  }
  expect(wrong == 0, "setmaxnreg: wrong sums", wrong);

  std::vector<uint16_t> tile(64 * 64);
  for (int i = 0; i < 64 * 64; i++) tile[i] = uint16_t(i);
  Buffer<uint16_t> tile_gmem(tile);
  Buffer<uint32_t> found(288);
  launch(matrices, 1, 32, 0, (const uint16_t *)tile_gmem.data, found.data);
  std::vector<uint32_t> words = found.host();
  wrong = 0;
  auto at = [&](int row, int column) { return uint32_t(tile[row * 64 + column]); };
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 4; i++) {
      int row = 16 + i % 2 * 8, column = 16 + i / 2 * 8, g = lane / 4, c = lane % 4 * 2;
      wrong += words[lane * 4 + i] != (at(row + g, column + c) | at(row + g, column + c + 1) << 16);
      wrong += words[128 + lane * 4 + i] != (at(row + c, column + g) | at(row + c + 1, column + g) << 16);
    }
    wrong += words[256 + lane] != (at(lane, 46) | at(lane, 47) << 16);
  }
  expect(wrong == 0, "shared-memory loads and ldmatrix: wrong words", wrong);

  std::vector<float> five = {1.5f, -2.0f, 4.0f, 0.25f, 3.0f}, want = {6.0f, -0.5f, 1.5f, 1.5f, -2.0f, -2.0f, 65504.0f, -65504.0f, 8.0f};
  Buffer<float> five_gmem(five), halves(9), bfloats(9);
  launch(pairs<__half>, 1, 1, 0, (const float *)five_gmem.data, halves.data);
  launch(pairs<__nv_bfloat16>, 1, 1, 0, (const float *)five_gmem.data, bfloats.data);
  expect(halves.host() == want && bfloats.host() == want, "pairs of float16 and bfloat16");
  return failures != 0;
}
