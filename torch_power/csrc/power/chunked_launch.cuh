/* Launches of the large kernels; included by the files of ../inst, each of which instantiates one, so that they build in parallel. */
#pragma once
#include "chunked_host.cuh"

namespace power {

template <class Kernel>
inline cudaError_t allow_smem(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <int PADDED_D, int PADDED_E>
cudaError_t UpdateLaunch<PADDED_D, PADDED_E>::update(const UpdateParams &p, cudaStream_t stream) {
  auto kernel = update_state_kernel<PADDED_D, PADDED_E>;
  constexpr int bytes = UpdateTiles<PADDED_D, PADDED_E>::SMEM_BYTES;
  if (cudaError_t error = allow_smem(kernel, bytes)) return error;
  kernel<<<UpdateTiles<PADDED_D, PADDED_E>::blocks(p.z.b * p.z.h_kv), UPDATE_THREADS, bytes, stream>>>(p);
  return cudaGetLastError();
}

template <typename In, int PADDED_D, int PADDED_E>
cudaError_t QueryLaunch<In, PADDED_D, PADDED_E>::query(const QueryParams &p, cudaStream_t stream) {
  auto kernel = query_kernel<In, PADDED_D, PADDED_E>;
  using T = QueryTiles<PADDED_D, PADDED_E>;
  if (cudaError_t error = allow_smem(kernel, T::SMEM_BYTES)) return error;
  kernel<<<RowBlock::count(p.z, p.z.b * p.z.h_q, T::ROWS, p.z.chunks), threads(T::GROUPS), T::SMEM_BYTES, stream>>>(p);
  return cudaGetLastError();
}

template <typename In, int PADDED_D, int PADDED_E>
cudaError_t GradientLaunch<In, PADDED_D, PADDED_E>::q(const GradientQParams &p, cudaStream_t stream) {
  auto kernel = gradient_q_kernel<In, PADDED_D, PADDED_E>;
  using T = GradientQTiles<PADDED_D, PADDED_E>;
  if (cudaError_t error = allow_smem(kernel, T::SMEM_BYTES)) return error;
  kernel<<<RowBlock::count(p.z, p.z.b * p.z.h_q, T::ROWS, p.z.chunks), threads(T::GROUPS), T::SMEM_BYTES, stream>>>(p);
  return cudaGetLastError();
}

template <typename In, int PADDED_D, int PADDED_E>
cudaError_t GradientLaunch<In, PADDED_D, PADDED_E>::kv(const GradientKVParams &p, cudaStream_t stream) {
  auto kernel = gradient_kv_kernel<In, PADDED_D, PADDED_E>;
  using T = GradientKVTiles<PADDED_D, PADDED_E>;
  if (cudaError_t error = allow_smem(kernel, T::SMEM_BYTES)) return error;
  kernel<<<RowBlock::count(p.z, p.z.b * p.z.h_kv, T::ROWS, p.chunks), threads(T::GROUPS), T::SMEM_BYTES, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace power
