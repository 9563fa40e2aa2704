/* Host side that the kernels of both operations share: maps of arrays for the copy engine, and persistent launches. `Call` is one operation's
 * checked call, of which the stream and the number of multiprocessors are used. */
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "abi.h"

namespace power {

/* The map of an array for tiles of `rows` tokens × 64 columns of one head, 128 bytes a row: coordinates (column, head, token, batch).
 * `stride` are elements from one head, token and batch element to the next; an axis of one element may have any. Returns false if the driver
 * refuses it. */
inline bool make_tile_map(CUtensorMap *map, void *data, const int64_t (&size)[4], const int64_t (&stride)[3], int rows, bool half) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void *f = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<Encode>(f);
  }();
  if (!encode) return false;
  cuuint64_t sizes[4], bytes[3];
  for (int i = 0; i < 4; ++i) sizes[i] = cuuint64_t(size[i]);
  for (int i = 0; i < 3; ++i) bytes[i] = size[i + 1] == 1 ? 16 : cuuint64_t(stride[i]) * 2;
  const cuuint32_t box[4] = {64, 1, cuuint32_t(rows), 1}, step[4] = {1, 1, 1, 1};
  return encode(map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, data, sizes, bytes, box, step,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

inline int32_t after_launch(const char *what) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? POWER_OK : power_fail(POWER_DEVICE, "%s: %s", what, cudaGetErrorString(error));
}

/* Launches a persistent kernel: one block a multiprocessor, or fewer if there are fewer items. */
template <typename Smem, typename Call, typename... Parameters, typename... Arguments>
int32_t launch_persistent(const Call &call, const char *what, void (*kernel)(Parameters...), int items, int threads,
                          const Arguments &...arguments) {
  static_assert(sizeof(Smem) <= 232448, "shared memory of a multiprocessor");
  if (items == 0) return POWER_OK;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Smem)) == cudaSuccess)
    kernel<<<unsigned(std::min(items, call.multiprocessors)), threads, sizeof(Smem), call.stream>>>(arguments...);
  return after_launch(what);
}

/* Launches a kernel whose blocks, at most one a multiprocessor, wait for each other: all run at the same time, or the launch fails. */
template <typename Smem, typename Call, typename... Parameters, typename... Arguments>
int32_t launch_together(const Call &call, const char *what, void (*kernel)(Parameters...), int blocks, int threads,
                        const Arguments &...arguments) {
  static_assert(sizeof(Smem) <= 232448, "shared memory of a multiprocessor");
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = sizeof(Smem), config.stream = call.stream;
  config.attrs = &together, config.numAttrs = 1;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Smem)) == cudaSuccess)
    cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return after_launch(what);
}

}  // namespace power
