/* Entry points of the chunked backward pass: the forward's states, saved or worked out again, and dq from them; then the state gradient, dk and
 * dv from it; then the gates. */
#include <algorithm>
#include "../power/abi_chunked.h"
#include "../power/chunked_gate_gradient.cuh"
#include "../power/chunked_host.cuh"

using namespace power;

namespace {

struct BackwardWorkspace {
  Arena arena, saved_arena;
  Saved saved;
  unsigned *maxima; /* of dy, ds, dz */
  RowFactors rows;
  __half *q, *dy, *k, *v, *moment_weights, *k_moment_weights; /* the last without `saved` */
  int first_lent; /* state gradients of the chunks from here on are in memory lent by dk and dv */
  __half *gradient_states, *gradient_moments;
  int *state_units, *moment_units;
  float2 *column;
  AnchorStates before; /* the states that the gates' anchors need, and where they are copied to if the state gradient takes their place */
  __half *kept_states, *kept_moments;
  int *kept_state_units, *kept_moment_units;
  double *anchors;
  GateSums *gate_sums;
  BackwardWorkspace(void *base, void *saved_base, const PowerAttentionShape &shape, const Sizes &z)
      : arena(base), saved_arena(saved_base), saved(shape.saved ? saved_arena : arena, z) {
    const int64_t heads = int64_t(z.b) * z.h_kv, q_heads = int64_t(z.b) * z.h_q, tokens = q_heads * z.tokens;
    maxima = arena.take<unsigned>(3 * heads);
    rows.q_scale = arena.take<float>(tokens), rows.dy_scale = arena.take<float>(tokens), rows.h = arena.take<float>(tokens);
    rows.h_decayed = arena.take<float>(tokens), rows.delta = arena.take<float>(tokens), rows.state_weight = arena.take<float>(tokens);
    rows.row_part = shape.normalize ? nullptr : arena.take<float>(tokens);
    rows.state_part = arena.take<float>(tokens), rows.tile_weight = arena.take<float>(q_heads * z.tiles);
    q = arena.take<__half>(staged_count(z, q_heads, z.padded_d)), dy = arena.take<__half>(staged_count(z, q_heads, z.padded_e));
    moment_weights = arena.take<__half>(tokens), k_moment_weights = shape.saved ? nullptr : arena.take<__half>(heads * z.tokens);
    const int64_t k_count = staged_count(z, heads, z.padded_d), v_count = staged_count(z, heads, z.padded_e);
    first_lent = z.chunks;
    if (shape.saved) { /* staged keys and values have been read when the state gradient is written */
      first_lent = first_lent_chunk(z);
      gradient_states = arena.take<__half>(std::max(states_count(z, first_lent), k_count + v_count)), k = gradient_states, v = k == nullptr ? k : k + k_count;
      gradient_moments = arena.take<__half>(moments_count(z));
      state_units = arena.take<int>(z.chunks * heads), moment_units = arena.take<int>(z.chunks * heads);
    } else { /* so have the states, which have to be worked out from them */
      k = arena.take<__half>(k_count), v = arena.take<__half>(v_count);
      gradient_states = saved.states, gradient_moments = saved.moments, state_units = saved.state_units, moment_units = saved.moment_units;
    }
    column = arena.take<float2>(heads * z.tokens);
    const int64_t count = anchor_count(z), kept = shape.saved ? 0 : count * heads;
    kept_states = arena.take<__half>(kept * state_size(z)), kept_moments = arena.take<__half>(kept * z.padded_d * z.padded_d);
    kept_state_units = arena.take<int>(kept), kept_moment_units = arena.take<int>(kept);
    before = shape.saved ? AnchorStates{saved.states, saved.moments, saved.state_units, saved.moment_units, anchor_chunks(z), anchor_chunks(z)}
                         : AnchorStates{kept_states, kept_moments, kept_state_units, kept_moment_units, 0, 1};
    anchors = arena.take<double>(count * heads * anchor_parts(z));
    gate_sums = arena.take<GateSums>(heads * z.chunks);
  }
};

/* Whether a gradient of k or v is one piece of memory that bulk copies can read. */
bool whole(const PowerArray &x, int64_t heads, int64_t size) {
  return x.stride[3] == 1 && (heads == 1 || x.stride[2] == size) && x.stride[1] == heads * size && (reinterpret_cast<uintptr_t>(x.data) & 15) == 0;
}

/* Of an array [chunk][`count`] what belongs to the anchors' chunks, one behind another. */
template <typename T>
cudaError_t keep_for_anchors(const Sizes &z, T *kept, const T *array, int64_t count, cudaStream_t stream) {
  const int stride = anchor_chunks(z);
  const size_t bytes = count * sizeof(T);
  return cudaMemcpy2DAsync(kept, bytes, array + stride * count, stride * bytes, bytes, anchor_count(z), cudaMemcpyDeviceToDevice, stream);
}

template <typename In>
cudaError_t run(const PowerAttentionShape &shape, const PowerAttentionArrays &a, const Sizes &z, const BackwardWorkspace &w, cudaStream_t stream) {
  const int64_t heads = int64_t(z.b) * z.h_kv, q_heads = int64_t(z.b) * z.h_q;
  const Saved &x = w.saved;
  const auto floats = [](const PowerArray &x) { return static_cast<float *>(x.data); };
  const Maxima maxima{x.maxima, x.maxima + heads, w.maxima, w.maxima + heads, w.maxima + 2 * heads};
  const float *s0 = floats(a.s0), *z0 = floats(a.z0);
  const int normalize = shape.normalize;
  const bool anchored = a.dlog_g.data != nullptr && anchor_count(z) > 0;

  if (cudaError_t error = cudaMemsetAsync(w.maxima, 0, 3 * heads * sizeof(unsigned), stream)) return error;
  if (!shape.saved)
    if (cudaError_t error = measure<In>(shape, a, z, x, stream)) return error;
  const PrepareBackwardParams prepare{z, make_view(a.q), make_view(a.y), make_view(a.dy), floats(a.norm), x.gates, w.rows, w.q, w.moment_weights, maxima, normalize,
                                      s0 != nullptr, score_exponent(z.padded_d), float(shape.scale * shape.scale)};
  if (cudaError_t error = dispatch_sizes(z, [&](auto d, auto e) {
        prepare_backward_kernel<In, d.value, e.value><<<z.tiles * q_heads, PREPARE_THREADS, 0, stream>>>(prepare);
        return cudaGetLastError();
      }))
    return error;
  const StageArray k{make_view(a.k), z.h_kv, z.d, z.padded_d, maxima.k, K_RANGE, w.k, nullptr, shape.saved ? nullptr : x.gates.chunk_decay,
                     w.k_moment_weights};
  const StageArray v{make_view(a.v), z.h_kv, z.e, z.padded_e, maxima.v, V_RANGE, w.v, nullptr, nullptr, nullptr};
  const StageArray dy{make_view(a.dy), z.h_q, z.e, z.padded_e, maxima.dy, DY_RANGE, w.dy, w.rows.dy_scale, nullptr, nullptr};
  if (cudaError_t error = stage<In>(z, {k, v, dy}, stream)) return error;
  if (!shape.saved && (z.chunks > 1 || s0 != nullptr))
    if (cudaError_t error = update_state(forward_update(z, x, w.k, w.v, w.k_moment_weights, s0, z0, nullptr, nullptr), stream)) return error;
  const GradientQParams gradient_q{z, make_view(a.dq), w.q, w.dy, w.k, w.v, x.states, x.moments, x.state_units, x.moment_units, x.gates, w.rows,
                                   w.moment_weights, maxima, s0 != nullptr, normalize};
  if (cudaError_t error = dispatch_sizes(z, [&](auto d, auto e) { return GradientLaunch<In, d.value, e.value>::q(gradient_q, stream); })) return error;

  if (anchored && !shape.saved) {
    if (cudaError_t error = keep_for_anchors(z, w.kept_states, x.states, heads * state_size(z), stream)) return error;
    if (cudaError_t error = keep_for_anchors(z, w.kept_moments, x.moments, heads * z.padded_d * z.padded_d, stream)) return error;
    if (cudaError_t error = keep_for_anchors(z, w.kept_state_units, x.state_units, heads, stream)) return error;
    if (cudaError_t error = keep_for_anchors(z, w.kept_moment_units, x.moment_units, heads, stream)) return error;
  }
  const float *ds = floats(a.ds), *dz = floats(a.dz);
  const StateStore states = w.first_lent < z.chunks ? lent_states(z, w.gradient_states, w.first_lent, a.dk, a.dv) : StateStore{w.gradient_states};
  const int64_t state_rows = int64_t(z.pairs) * 64;
  if (ds != nullptr) {
    measure_state_kernel<<<dim3(64, unsigned(heads)), MEASURE_THREADS, 0, stream>>>(ds, dz, state_rows, z.e, maxima);
    if (cudaError_t error = cudaGetLastError()) return error;
  }
  if (z.chunks > 1 || ds != nullptr || a.ds0.data != nullptr) {
    const UpdateParams update{z, w.q, w.dy, w.rows.state_weight, w.moment_weights, z.group, 1, z.chunks - (a.ds0.data == nullptr), x.gates.chunk_sum, w.rows.tile_weight, z.chunk_tiles,
                              states, w.gradient_moments, w.state_units, w.moment_units, ds, dz, floats(a.ds0), floats(a.dz0), maxima,
                              2 * Q_RANGE + DY_RANGE + 1, 2 * Q_RANGE + 7, STATE_GRADIENT_SHIFT};
    if (cudaError_t error = update_state(update, stream)) return error;
  }
  if (anchored) { /* before dk and dv take the memory they lent */
    const AnchorParams anchor{z, w.before, states, w.gradient_moments, w.state_units, w.moment_units, maxima, w.anchors};
    anchor_kernel<<<dim3(anchor_parts(z), anchor_count(z), unsigned(heads)), GATE_THREADS, 0, stream>>>(anchor);
    if (cudaError_t error = cudaGetLastError()) return error;
  }
  const auto gradient_kv = [&](int first, int chunks) {
    const GradientKVParams p{z, make_view(a.k), make_view(a.v), make_view(a.dk), make_view(a.dv), w.q, w.dy, w.gradient_moments, states, w.state_units,
                             w.moment_units, x.gates, w.rows, maxima, w.column, first, chunks, ds != nullptr};
    return dispatch_sizes(z, [&](auto d, auto e) { return GradientLaunch<In, d.value, e.value>::kv(p, stream); });
  };
  if (w.first_lent < z.chunks) /* before the gradients of the chunks that lend them memory */
    if (cudaError_t error = gradient_kv(w.first_lent, z.chunks - w.first_lent)) return error;
  if (cudaError_t error = gradient_kv(0, w.first_lent)) return error;
  if (a.dlog_g.data != nullptr) {
    const GateGradientParams gate{z, make_view(a.log_g), w.column, w.rows.row_part, w.rows.state_part, normalize, s0, z0,
                                  floats(a.ds0), floats(a.dz0), w.gate_sums, w.anchors, ds == nullptr, floats(a.dlog_g),
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
  return BackwardWorkspace(nullptr, nullptr, *shape, make_sizes(*shape)).arena.used();
}

int32_t power_chunked_backward_sm90(const PowerAttentionShape *shape, const PowerAttentionArrays *arrays, void *workspace, int64_t workspace_bytes,
                                    void *stream) {
  if (const char *why = unsupported(*shape)) return power_fail(POWER_UNSUPPORTED, "%s", why);
  const Sizes z = make_sizes(*shape);
  if (const char *why = invalid(*shape, *arrays)) return power_fail(POWER_INVALID, "%s", why);
  if (!whole(arrays->dk, z.h_kv, z.d) || !whole(arrays->dv, z.h_kv, z.e))
    return power_fail(POWER_INVALID, "dk, dv: they lend their memory, and have to be contiguous and aligned to 16");
  const BackwardWorkspace w(workspace, arrays->saved.data, *shape, z);
  if (workspace_bytes < w.arena.used() || (reinterpret_cast<uintptr_t>(workspace) & 255))
    return power_fail(POWER_WORKSPACE, "workspace: %lld bytes, %lld needed, aligned to 256", (long long)workspace_bytes, (long long)w.arena.used());
  const cudaError_t error =
      dispatch_dtype(shape->dtype, [&](auto in) { return run<decltype(in)>(*shape, *arrays, z, w, static_cast<cudaStream_t>(stream)); });
  return error == cudaSuccess ? POWER_OK : power_fail(POWER_DEVICE, "chunked backward: %s", cudaGetErrorString(error));
}
