/* Entry points of the chunked backward pass: the forward's states again, dq from them; then the state gradient in their place, dk and dv
 * from it; then the gates. */
#include "../power/abi_chunked.h"
#include "../power/chunked_host.cuh"

using namespace power;

namespace {

struct BackwardWorkspace {
  unsigned *maxima;
  Gates gates;
  RowFactors rows;
  __half *k, *v, *q, *dy, *transposed, *row_values, *states, *moments; /* transposed: of k, then of q; states: of S, then of dS */
  int *state_units, *moment_units;
  float2 *column;
  GateSums *gate_sums;
  int64_t bytes;
  BackwardWorkspace(void *base, const Sizes &z) {
    Arena arena(base);
    const int64_t heads = int64_t(z.b) * z.h_kv, q_heads = int64_t(z.b) * z.h_q, tokens = q_heads * z.tokens;
    maxima = arena.take<unsigned>(MAXIMA * heads);
    gates = take_gates(arena, z);
    rows.q_scale = arena.take<float>(tokens), rows.dy_scale = arena.take<float>(tokens), rows.h = arena.take<float>(tokens);
    rows.h_decayed = arena.take<float>(tokens), rows.delta = arena.take<float>(tokens), rows.state_weight = arena.take<float>(tokens);
    rows.state_part = arena.take<float>(tokens), rows.tile_weight = arena.take<float>(q_heads * z.tiles);
    k = arena.take<__half>(staged_count(z, heads, z.padded_d)), v = arena.take<__half>(staged_count(z, heads, z.padded_e));
    q = arena.take<__half>(staged_count(z, q_heads, z.padded_d)), dy = arena.take<__half>(staged_count(z, q_heads, z.padded_e));
    transposed = arena.take<__half>(staged_count(z, q_heads, z.padded_d));
    row_values = arena.take<__half>(tokens);
    states = arena.take<__half>(states_count(z)), moments = arena.take<__half>(moments_count(z));
    state_units = arena.take<int>(z.chunks * heads), moment_units = arena.take<int>(z.chunks * heads);
    column = arena.take<float2>(heads * z.tokens);
    gate_sums = arena.take<GateSums>(heads * z.chunks);
    bytes = arena.used();
  }
};

template <typename In>
cudaError_t run(const PowerAttentionShape &shape, const PowerAttentionArrays &a, const Sizes &z, const BackwardWorkspace &w, cudaStream_t stream) {
  const int64_t heads = int64_t(z.b) * z.h_kv, q_heads = int64_t(z.b) * z.h_q;
  const Maxima maxima = take_maxima(w.maxima, heads);
  const auto floats = [](const PowerArray &x) { return static_cast<float *>(x.data); };
  const float *s0 = floats(a.s0), *z0 = floats(a.z0);
  const int normalize = shape.normalize, exponent = score_exponent(z.padded_d);
  const auto update_state = [&](const UpdateParams &update) {
    return dispatch_sizes(z, [&](auto d, auto e) { return UpdateLaunch<d.value, e.value>::update(update, stream); });
  };

  if (cudaError_t error = cudaMemsetAsync(w.maxima, 0, MAXIMA * heads * sizeof(unsigned), stream)) return error;
  const MeasureParams measure{z, make_view(a.k), make_view(a.v), make_view(a.log_g), s0, z0, w.gates, maxima};
  measure_kernel<In><<<dim3(z.chunks, unsigned(heads)), MEASURE_THREADS, 0, stream>>>(measure);
  if (cudaError_t error = cudaGetLastError()) return error;
  const PrepareBackwardParams prepare{z, make_view(a.q), make_view(a.y), make_view(a.dy), floats(a.norm), w.gates, w.rows, maxima, normalize,
                                      s0 != nullptr, exponent, float(shape.scale * shape.scale)};
  prepare_backward_kernel<In><<<dim3(z.tiles, unsigned(q_heads)), PREPARE_THREADS, 0, stream>>>(prepare);
  if (cudaError_t error = cudaGetLastError()) return error;
  const StageParams stage_k{z,   make_view(a.k), z.h_kv, z.d, maxima.k, K_RANGE, w.k, w.transposed, w.gates.chunk_decay, nullptr, nullptr,
                            nullptr, nullptr};
  const StageParams stage_v{z, make_view(a.v), z.h_kv, z.e, maxima.v, V_RANGE, w.v, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  const StageParams stage_dy{z,       make_view(a.dy), z.h_q, z.e, maxima.dy, DY_RANGE, w.dy, nullptr, nullptr, w.rows.dy_scale,
                             normalize ? w.rows.delta : nullptr, w.row_values, maxima.v};
  if (cudaError_t error = stage<In>(stage_k, z.padded_d, Scaling::HEAD, stream)) return error;
  if (cudaError_t error = stage<In>(stage_v, z.padded_e, Scaling::HEAD, stream)) return error;
  if (cudaError_t error = stage<In>(stage_dy, z.padded_e, Scaling::HEAD, stream)) return error;
  if (z.chunks > 1 || s0 != nullptr) {
    const UpdateParams update{z, w.k, w.transposed, w.v, nullptr, 1, 0, w.gates.chunk_sum, w.gates.chunk_weight, 1, w.states, w.moments, w.state_units,
                              w.moment_units, s0, z0, nullptr, nullptr, maxima, 2 * K_RANGE + V_RANGE + 1, 2 * K_RANGE, 0};
    if (cudaError_t error = update_state(update)) return error;
  }
  /* k's transposed tiles have been read: q's take their place. */
  const StageParams stage_q{z,   make_view(a.q), z.h_q, z.d, nullptr, Q_RANGE, w.q, w.transposed, w.rows.state_weight, w.rows.q_scale, nullptr,
                            nullptr, nullptr};
  if (cudaError_t error = stage<In>(stage_q, z.padded_d, Scaling::ROW, stream)) return error;
  const GradientQParams gradient_q{z, make_view(a.dq), w.q, w.dy, w.k, w.v, w.states, w.moments, w.state_units, w.moment_units, w.gates, w.rows,
                                   w.row_values, maxima, s0 != nullptr, normalize};
  if (cudaError_t error = dispatch_sizes(z, [&](auto d, auto e) { return GradientLaunch<In, d.value, e.value>::q(gradient_q, stream); })) return error;

  const float *ds = floats(a.ds), *dz = floats(a.dz);
  const int64_t state_rows = int64_t(z.pairs) * 64;
  if (ds != nullptr) {
    measure_state_kernel<<<dim3(64, unsigned(heads)), MEASURE_THREADS, 0, stream>>>(ds, dz, state_rows, z.e, maxima);
    if (cudaError_t error = cudaGetLastError()) return error;
  }
  if (z.chunks > 1 || ds != nullptr || a.ds0.data != nullptr) {
    const UpdateParams update{z, w.q, w.transposed, w.dy, w.row_values, z.group, 1, w.gates.chunk_sum, w.rows.tile_weight, z.chunk_tiles, w.states, w.moments,
                              w.state_units, w.moment_units, ds, dz, floats(a.ds0), floats(a.dz0), maxima, 2 * Q_RANGE + DY_RANGE + 1,
                              2 * Q_RANGE + 7, STATE_GRADIENT_SHIFT};
    if (cudaError_t error = update_state(update)) return error;
  }
  const GradientKVParams gradient_kv{z, make_view(a.dk), make_view(a.dv), w.q, w.dy, w.k, w.v, w.states, w.moments, w.state_units, w.moment_units,
                                     w.gates, w.rows, maxima, w.column, ds != nullptr, normalize};
  if (cudaError_t error = dispatch_sizes(z, [&](auto d, auto e) { return GradientLaunch<In, d.value, e.value>::kv(gradient_kv, stream); })) return error;
  if (a.dlog_g.data != nullptr) {
    const GateGradientParams gate{z, make_view(a.log_g), w.column, w.rows.delta, w.rows.state_part, normalize, s0, z0,
                                  floats(a.ds0), floats(a.dz0), w.gate_sums, ds == nullptr, floats(a.dlog_g),
                                  a.dlog_g.stride[0], a.dlog_g.stride[1], a.dlog_g.stride[2]};
    const dim3 grid(z.chunks, unsigned(heads));
    gate_sums_kernel<<<grid, GATE_THREADS, 0, stream>>>(gate);
    gate_gradient_kernel<<<grid, GATE_THREADS, 0, stream>>>(gate);
  }
  return cudaGetLastError();
}

}  // namespace

int64_t power_chunked_backward_workspace_sm90(const PowerAttentionShape *shape, const void *) {
  if (const char *why = unsupported(*shape)) return power_fail(POWER_UNSUPPORTED, "%s", why), -1;
  return BackwardWorkspace(nullptr, make_sizes(*shape)).bytes;
}

int32_t power_chunked_backward_sm90(const PowerAttentionShape *shape, const PowerAttentionArrays *arrays, void *workspace, int64_t workspace_bytes,
                                    void *stream) {
  if (const char *why = unsupported(*shape)) return power_fail(POWER_UNSUPPORTED, "%s", why);
  const Sizes z = make_sizes(*shape);
  if (z.b == 0 || z.t == 0 || z.h_q == 0) return power_fail(POWER_INVALID, "b, t, h_q: an empty call has nothing to launch");
  const BackwardWorkspace w(workspace, z);
  if (workspace_bytes < w.bytes || (reinterpret_cast<uintptr_t>(workspace) & 255))
    return power_fail(POWER_WORKSPACE, "workspace: %lld bytes, %lld needed, aligned to 256", (long long)workspace_bytes, (long long)w.bytes);
  const cudaError_t error =
      dispatch_dtype(shape->dtype, [&](auto in) { return run<decltype(in)>(*shape, *arrays, z, w, static_cast<cudaStream_t>(stream)); });
  return error == cudaSuccess ? POWER_OK : power_fail(POWER_DEVICE, "chunked backward: %s", cudaGetErrorString(error));
}
