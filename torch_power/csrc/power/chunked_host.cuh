/* Host side shared by the chunked entry points: workspaces, dispatch over dtype and padded head sizes. */
#pragma once
#include <cuda_runtime.h>
#include <initializer_list>
#include "chunked_backward.cuh"
#include "chunked_gradient_kv.cuh"
#include "chunked_gradient_q.cuh"
#include "chunked_query.cuh"
#include "chunked_stage.cuh"
#include "chunked_update.cuh"

namespace power {

/* Hands out 1024-byte aligned pieces of a workspace; from a null base it only counts. */
class Arena {
 public:
  explicit Arena(void *base) : base_(static_cast<char *>(base)) {}
  template <typename T>
  T *take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * int64_t(sizeof(T)) + 1023) / 1024 * 1024;
    return base_ == nullptr ? nullptr : reinterpret_cast<T *>(base_ + at);
  }
  int64_t used() const { return used_; }

 private:
  char *base_;
  int64_t used_ = 0;
};

inline Gates take_gates(Arena &arena, const Sizes &z) {
  const int64_t heads = int64_t(z.b) * z.h_kv, tokens = heads * z.tokens;
  Gates g;
  g.tile_prefix = arena.take<float>(tokens), g.tile_decay = arena.take<float>(heads * z.tiles * TILE_FACTORS);
  g.chunk_prefix = arena.take<float>(tokens), g.chunk_decay = arena.take<float>(tokens);
  g.chunk_sum = arena.take<float>(heads * z.chunks), g.chunk_weight = arena.take<float>(heads * z.chunks);
  return g;
}
/* Float16 counts of staged rows, states and moments. */
inline int64_t staged_count(const Sizes &z, int64_t heads, int padded) { return heads * z.tokens * padded; }
inline int64_t state_size(const Sizes &z) { return int64_t(z.pairs) * 64 * z.padded_e; }
inline int64_t states_count(const Sizes &z, int chunks) { return int64_t(chunks) * z.b * z.h_kv * state_size(z); }
inline int64_t moments_count(const Sizes &z) { return int64_t(z.chunks) * z.b * z.h_kv * z.padded_d * z.padded_d; }

/* What the forward pass finds out and the backward pass needs: handed over in `saved`, else worked out in each one's workspace. */
struct Saved {
  unsigned *maxima; /* of k, v, s0, z0 */
  Gates gates;
  __half *states, *moments;
  int *state_units, *moment_units;
  Saved(Arena &arena, const Sizes &z) {
    const int64_t heads = int64_t(z.b) * z.h_kv;
    maxima = arena.take<unsigned>(4 * heads);
    gates = take_gates(arena, z);
    states = arena.take<__half>(states_count(z, z.chunks)), moments = arena.take<__half>(moments_count(z));
    state_units = arena.take<int>(z.chunks * heads), moment_units = arena.take<int>(z.chunks * heads);
  }
  Maxima forward_maxima(int64_t heads) const { return Maxima{maxima, maxima + heads, nullptr, maxima + 2 * heads, maxima + 3 * heads}; }
};

inline View make_view(const PowerArray &a) { return View{static_cast<char *>(a.data), a.stride[0], a.stride[1], a.stride[2], a.stride[3]}; }

/* State gradients of the chunks from `first_lent` on, in dk and dv. */
inline StateStore lent_states(const Sizes &z, __half *states, int first_lent, const PowerArray &dk, const PowerArray &dv) {
  const auto fit = [&](int size) { return int64_t(first_lent) * z.chunk * z.h_kv * size / state_size(z); };
  return StateStore{states, first_lent, {static_cast<__half *>(dk.data), static_cast<__half *>(dv.data)}, {dk.stride[0], dv.stride[0]}, {fit(z.d), fit(z.e)}};
}
/* Chunk from which state gradients are kept in dk and dv of the chunks before, or z.chunks: as many as leave the workspace of the other states large enough for
 * staged k and v, which share it, where that saves LENT_BYTES (tiles.h). At the flagship 64 MiB of 1072. */
inline int first_lent_chunk(const Sizes &z) {
  const int64_t heads = int64_t(z.b) * z.h_kv, per_chunk = heads * state_size(z);
  int64_t first = (staged_count(z, heads, z.padded_d) + staged_count(z, heads, z.padded_e) + per_chunk - 1) / per_chunk;
  const auto fits = [&] {
    const StateStore x = lent_states(z, nullptr, int(first), {}, {});
    return (z.chunks - first) * z.h_kv <= x.fit[0] + x.fit[1];
  };
  while (first < z.chunks && !fits()) first++;
  return first < z.chunks && (z.chunks - first) * per_chunk * 2 >= LENT_BYTES ? int(first) : z.chunks;
}

/* Launches that depend on the template arguments: defined in chunked_launch.cuh, each instantiated in one file of ../inst. */
template <int PADDED_D, int PADDED_E>
struct UpdateLaunch {
  static cudaError_t update(const UpdateParams &, cudaStream_t);
};
extern template struct UpdateLaunch<64, 64>; /* not wherever update_state below is seen */
extern template struct UpdateLaunch<64, 128>;
extern template struct UpdateLaunch<128, 64>;
extern template struct UpdateLaunch<128, 128>;
template <typename In, int PADDED_D, int PADDED_E>
struct QueryLaunch {
  static cudaError_t query(const QueryParams &, cudaStream_t);
};
template <typename In, int PADDED_D, int PADDED_E>
struct GradientLaunch {
  static cudaError_t q(const GradientQParams &, cudaStream_t);
  static cudaError_t kv(const GradientKVParams &, cudaStream_t);
};

/* Calls `f(std::integral_constant<int, padded d>, <padded e>)`. */
template <class F>
cudaError_t dispatch_sizes(const Sizes &z, F f) {
  using Small = std::integral_constant<int, 64>;
  using Large = std::integral_constant<int, 128>;
  if (z.padded_d == 64) return z.padded_e == 64 ? f(Small{}, Small{}) : f(Small{}, Large{});
  return z.padded_e == 64 ? f(Large{}, Small{}) : f(Large{}, Large{});
}
/* Calls `f(In{})` with the element type of the call. */
template <class F>
cudaError_t dispatch_dtype(int dtype, F f) {
  return dtype == POWER_BFLOAT16 ? f(__nv_bfloat16{}) : f(__half{});
}

/* Stages up to STAGE_ARRAYS arrays in one launch. */
template <typename In>
cudaError_t stage(const Sizes &z, std::initializer_list<StageArray> arrays, cudaStream_t stream) {
  StageParams p{z, {}, {}};
  int blocks = 0, number = 0;
  for (const StageArray &a : arrays) {
    blocks += z.tiles * (TILE * a.padded / 8 / STAGE_PIECES) * z.b * a.heads;
    p.arrays[number] = a, p.blocks[number++] = blocks;
  }
  stage_kernel<In><<<blocks, STAGE_THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

/* Gate sums of the forward pass and ranges of k, v and the first state. */
template <typename In>
cudaError_t measure(const PowerAttentionShape &shape, const PowerAttentionArrays &a, const Sizes &z, const Saved &x, cudaStream_t stream) {
  const int64_t heads = shape.b * shape.h_kv;
  if (cudaError_t error = cudaMemsetAsync(x.maxima, 0, 4 * heads * sizeof(unsigned), stream)) return error;
  const MeasureParams params{z, make_view(a.k), make_view(a.v), make_view(a.log_g), static_cast<float *>(a.s0.data),
                             static_cast<float *>(a.z0.data), x.gates, x.forward_maxima(heads)};
  measure_kernel<In><<<z.chunks * (z.chunk / z.measure_rows) * heads, MEASURE_THREADS, 0, stream>>>(params);
  return cudaGetLastError();
}

inline cudaError_t update_state(const UpdateParams &p, cudaStream_t stream) {
  return dispatch_sizes(p.z, [&](auto d, auto e) { return UpdateLaunch<d.value, e.value>::update(p, stream); });
}
/* The states before every chunk, from staged keys and values. */
inline UpdateParams forward_update(const Sizes &z, const Saved &x, const __half *k, const __half *v, const __half *moment_weights, const float *s0,
                                   const float *z0, float *s, float *z_last) {
  return UpdateParams{z, k, v, x.gates.chunk_decay, moment_weights, 1, 0, z.chunks - (s == nullptr), x.gates.chunk_sum, x.gates.chunk_weight, 1, StateStore{x.states}, x.moments, x.state_units,
                      x.moment_units, s0, z0, s, z_last, x.forward_maxima(int64_t(z.b) * z.h_kv), 2 * K_RANGE + V_RANGE + 1, 2 * K_RANGE, 0};
}

/* Why the chunked kernels cannot serve a shape, or null. */
inline const char *unsupported(const PowerAttentionShape &s) {
  if (s.deg != 2) return "deg: the chunked sm90 kernels are for deg = 2";
  if (s.dtype != POWER_BFLOAT16 && s.dtype != POWER_FLOAT16) return "dtype: the sm90 kernels take bfloat16 and float16";
  if (!s.causal) return "causal: the chunked sm90 kernels are causal; form 'attention' serves causal=False";
  if (s.d % 8 || s.e % 8 || s.d < 8 || s.e < 8 || s.d > 128 || s.e > 128) return "d, e: the chunked sm90 kernels take multiples of 8 up to 128";
  if (s.t != s.t_kv || s.h_kv < 1 || s.h_q % s.h_kv) return "t_kv, h_q: contradict t, h_kv";
  if (s.b * s.h_q > 65535) return "b, h_q: at most 65535 batch × query heads";
  return nullptr;
}
/* What contradicts the shape in a call's arrays, or null. */
inline const char *invalid(const PowerAttentionShape &s, const PowerAttentionArrays &a) {
  if (s.b == 0 || s.t == 0 || s.h_q == 0) return "b, t, h_q: an empty call has nothing to launch";
  if (s.saved && (a.saved.data == nullptr || (reinterpret_cast<uintptr_t>(a.saved.data) & 127))) return "saved: absent, or not aligned to 128";
  return nullptr;
}

}  // namespace power
