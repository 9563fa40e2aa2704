// The kernels for Hopper as PyTorch operators, on torch's stable ABI; compiled where nvcc is. Arguments were checked by their
// Python callers; what is checked here is what would read or write out of bounds.
//
// power_forward_cuda, sdpa_forward_cuda, … are the kernels behind the interface that every implementation has
// (torch_power/cuda). power_attention_cuda, sdpa_cuda, … are the raw operators of torch_power/ops.py and ops_sdpa.py once more,
// with the same schemas, for the implementation "cuda" alone: with no Python between autograd and the kernels.
//
// Nothing here synchronises: outputs and workspaces come from torch's caching allocator and the work goes to the current
// stream, so calls can be captured in a CUDA graph.
#include "power/abi_attention.h"
#include "power/abi_chunked.h"
#include "sdpa/abi_sdpa.h"
#include "torch_binding.h"

#include <string>

// In torch's CUDA builds only: others load this file, and have no tensors that it could be called with.
#pragma weak aoti_torch_get_current_cuda_stream

namespace power_torch {
namespace {

void check_cuda(const Tensor &q) { STD_TORCH_CHECK(q.is_cuda(), "torch_power: q is not on a GPU"); }

// A tensor as it is, also along axes of size 1 (`array` gives those stride 0): kernels look at strides to see how rows lie.
PowerArray strided(const Tensor &x) {
  PowerArray a = array(x);
  for (int64_t i = 0; i < x.dim(); ++i) a.stride[i] = x.stride(i);
  return a;
}
PowerArray strided(const Maybe &x) { return x ? strided(*x) : PowerArray{}; }

bool aligned(const Tensor &x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

// x, or a copy if the copy engine cannot address it: it asks for a contiguous last axis, other strides that are positive
// multiples of 16 bytes, and an address that is one.
Tensor tileable(const Tensor &x) {
  if (x.numel() == 0) return x;
  const int64_t last = x.dim() - 1;
  bool usable = x.stride(last) == 1;
  for (int64_t i = 0; i < last; ++i) usable &= x.size(i) == 1 || (x.stride(i) > 0 && x.stride(i) % 8 == 0);
  if (usable && aligned(x)) return x;
  Tensor copy = torch::stable::contiguous(x);
  return aligned(copy) ? copy : torch::stable::clone(copy);  // a contiguous tensor that begins off a multiple
}
Maybe tileable(const Maybe &x) { return x ? Maybe(tileable(*x)) : x; }

// Calls a pair of GPU entry points of abi.h on the current stream: asks for the workspace, allocates it, launches.
template <class Shape, class Arrays>
void call_cuda(const Tensor &q, int64_t (*workspace_size)(const Shape *, const void *),
               int32_t (*launch)(const Shape *, const Arrays *, void *, int64_t, void *), const Shape &shape, const Arrays &arrays) {
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  void *stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  const int64_t bytes = workspace_size(&shape, stream);
  STD_TORCH_CHECK(bytes >= 0, "torch_power: ", power_last_error());
  Tensor workspace = make(q, {std::max<int64_t>(bytes, 1)}, ScalarType::Byte);
  const int32_t status = launch(&shape, &arrays, workspace.mutable_data_ptr(), bytes, stream);
  STD_TORCH_CHECK(status == POWER_OK, "torch_power: ", power_last_error());
}

// ---- Power attention: form 0 is the attention form, any other the chunked one -----------------------------------------------

void *address(const Maybe &x) { return x ? x->mutable_data_ptr() : nullptr; }

void check_saved(const Maybe &saved, const PowerAttentionShape &s) {
  if (!saved) return;
  STD_TORCH_CHECK(s.form != POWER_ATTENTION && saved->numel() >= power_chunked_saved_sm90(&s, nullptr), "torch_power: saved is too small");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> power_forward(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &log_g,
                                                         const Maybe &s0, const Maybe &z0, const Maybe &saved, int64_t deg, double scale,
                                                         bool causal, bool normalize, int64_t form, int64_t chunk_size, bool return_state) {
  check_cuda(q);
  PowerAttentionShape s = power_shape(q, k, v, deg, scale, causal, normalize, form, chunk_size);
  const bool attention = s.form == POWER_ATTENTION;
  const int64_t rows = return_state || s0 || z0 ? state_rows(s.d, deg) : 0;
  STD_TORCH_CHECK(!(attention && rows), "torch_power: the attention form has no state");
  check_sizes("log_g", log_g, q, {s.b, s.t_kv, s.h_kv});
  check_sizes("s0", s0, q, {s.b, s.h_kv, rows, s.e});
  check_sizes("z0", z0, q, {s.b, s.h_kv, rows});
  check_saved(saved, s);
  s.saved = saved.has_value(), s.gates = log_g.has_value();
  Tensor y = make(q, {s.b, s.t, s.h_q, s.e}, v.scalar_type()), norm = make(q, {s.b, s.t, s.h_q}, ScalarType::Float);
  Tensor state = return_state ? make(q, {s.b, s.h_kv, rows, s.e}, ScalarType::Float) : make(q, {0}, ScalarType::Float);
  Tensor state_norm = return_state ? make(q, {s.b, s.h_kv, rows}, ScalarType::Float) : make(q, {0}, ScalarType::Float);
  const Tensor q_used = attention ? tileable(q) : q, k_used = attention ? tileable(k) : k, v_used = attention ? tileable(v) : v;
  PowerAttentionArrays a = {};
  a.q = strided(q_used), a.k = strided(k_used), a.v = strided(v_used), a.log_g = strided(log_g);
  a.s0 = strided(s0), a.z0 = strided(z0), a.y = strided(y), a.norm = strided(norm), a.saved.data = address(saved);
  if (return_state) a.s = strided(state), a.z = strided(state_norm);
  if (attention)
    call_cuda(q, power_attention_quadratic_forward_workspace_sm90, power_attention_quadratic_forward_sm90, s, a);
  else
    call_cuda(q, power_chunked_forward_workspace_sm90, power_chunked_forward_sm90, s, a);
  return {y, norm, state, state_norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> power_backward(
    const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &log_g, const Maybe &s0, const Maybe &z0, const Tensor &y,
    const Tensor &norm, const Maybe &saved, const Tensor &dy, const Maybe &ds, const Maybe &dz, int64_t deg, double scale, bool causal,
    bool normalize, int64_t form, int64_t chunk_size) {
  check_cuda(q);
  PowerAttentionShape s = power_shape(q, k, v, deg, scale, causal, normalize, form, chunk_size);
  const bool attention = s.form == POWER_ATTENTION;
  const int64_t rows = s0 || z0 || ds || dz ? state_rows(s.d, deg) : 0;
  STD_TORCH_CHECK(!(attention && rows), "torch_power: the attention form has no state");
  check_sizes("log_g", log_g, q, {s.b, s.t_kv, s.h_kv});
  check_sizes("s0", s0, q, {s.b, s.h_kv, rows, s.e});
  check_sizes("z0", z0, q, {s.b, s.h_kv, rows});
  check_sizes("y", y, q, {s.b, s.t, s.h_q, s.e});
  check_sizes("norm", norm, q, {s.b, s.t, s.h_q});
  check_sizes("dy", dy, q, {s.b, s.t, s.h_q, s.e});
  check_sizes("ds", ds, q, {s.b, s.h_kv, rows, s.e});
  check_sizes("dz", dz, q, {s.b, s.h_kv, rows});
  check_saved(saved, s);
  s.saved = saved.has_value(), s.gates = log_g.has_value();
  auto gradient = [&](const Maybe &x) { return x ? make_like(*x) : make(q, {0}, ScalarType::Float); };
  Tensor dq = make_like(q), dk = make_like(k), dv = make_like(v), dlog_g = gradient(log_g), ds0 = gradient(s0), dz0 = gradient(z0);
  const Tensor q_used = attention ? tileable(q) : q, k_used = attention ? tileable(k) : k, v_used = attention ? tileable(v) : v;
  const Tensor y_used = attention ? tileable(y) : y, dy_used = attention ? tileable(dy) : dy;
  PowerAttentionArrays a = {};
  a.q = strided(q_used), a.k = strided(k_used), a.v = strided(v_used), a.log_g = strided(log_g);
  a.s0 = strided(s0), a.z0 = strided(z0), a.y = strided(y_used), a.norm = strided(norm), a.saved.data = address(saved);
  a.dy = strided(dy_used), a.ds = strided(ds), a.dz = strided(dz);
  a.dq = strided(dq), a.dk = strided(dk), a.dv = strided(dv);
  if (log_g) a.dlog_g = strided(dlog_g);
  if (s0) a.ds0 = strided(ds0);
  if (z0) a.dz0 = strided(dz0);
  if (attention)
    call_cuda(q, power_attention_quadratic_backward_workspace_sm90, power_attention_quadratic_backward_sm90, s, a);
  else
    call_cuda(q, power_chunked_backward_workspace_sm90, power_chunked_backward_sm90, s, a);
  return {dq, dk, dv, dlog_g, ds0, dz0};
}

// ---- The raw operators of power attention -----------------------------------------------------------------------------------

bool chunked(const std::string &form, const Maybe &s0, bool return_state) { return form != "attention" || s0 || return_state; }
bool empty(const Tensor &q, const Tensor &v) { return q.numel() == 0 || v.size(3) == 0; }
Maybe contiguous(const Maybe &x) { return x ? Maybe(torch::stable::contiguous(*x)) : x; }

Tensor zeros(const Tensor &like, const std::vector<int64_t> &size, ScalarType dtype) {
  Tensor x = make(like, size, dtype);
  return torch::stable::zero_(x);
}
Tensor zeros_like(const Tensor &x) {
  Tensor y = make_like(x);
  return torch::stable::zero_(y);
}
// A new tensor of x's size: a copy of `source`, or zeros without one.
Tensor copy_or_zeros(const Maybe &source, const Tensor &x) {
  Tensor y = make_like(x);
  return source ? torch::stable::copy_(y, *source) : torch::stable::zero_(y);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> power_attention(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &log_g,
                                                                   const Maybe &s0, const Maybe &z0, int64_t deg, double scale,
                                                                   bool causal, bool normalize, std::string form, int64_t chunk_size,
                                                                   bool return_state, std::string, bool save) {
  const bool states = chunked(form, s0, return_state);
  const PowerAttentionShape s = power_shape(q, k, v, deg, scale, causal, normalize, states, chunk_size);
  Tensor nothing = make(q, {0}, ScalarType::Byte);
  if (states && empty(q, v)) {
    const int64_t rows = return_state ? state_rows(s.d, deg) : 0;
    Tensor y = zeros(q, {s.b, s.t, s.h_q, s.e}, v.scalar_type()), norm = zeros(q, {s.b, s.t, s.h_q}, ScalarType::Float);
    if (!return_state) return {y, norm, nothing, make(q, {0}, ScalarType::Float), make(q, {0}, ScalarType::Float)};
    Tensor state = make(q, {s.b, s.h_kv, rows, s.e}, ScalarType::Float), state_norm = make(q, {s.b, s.h_kv, rows}, ScalarType::Float);
    return {y, norm, nothing, copy_or_zeros(s0, state), copy_or_zeros(z0, state_norm)};
  }
  const bool keep = save && states;
  const Tensor saved = keep ? make(q, {power_chunked_saved_sm90(&s, nullptr)}, ScalarType::Byte) : nothing;
  // A normalised row would not notice that the scale is 0.
  const Tensor q_used = states && scale == 0 ? zeros_like(q) : q;
  auto [y, norm, state, state_norm] = power_forward(q_used, k, v, log_g, contiguous(s0), contiguous(z0), keep ? Maybe(saved) : Maybe(), deg,
                                                    scale, causal, normalize, states, chunk_size, return_state);
  return {y, norm, saved, state, state_norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> power_attention_gradient(
    const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &log_g, const Maybe &s0, const Maybe &z0, const Tensor &y,
    const Tensor &norm, const Tensor &saved, const Tensor &dy, const Maybe &ds, const Maybe &dz, int64_t deg, double scale, bool causal,
    bool normalize, std::string form, int64_t chunk_size, bool return_state, std::string, bool) {
  const bool states = chunked(form, s0, return_state);
  if (states && empty(q, v)) {
    auto gradient = [&](const Maybe &source, const Maybe &x) { return x ? copy_or_zeros(source, *x) : make(q, {0}, ScalarType::Float); };
    return {zeros_like(q), zeros_like(k), zeros_like(v), gradient({}, log_g), gradient(ds, s0), gradient(dz, z0)};
  }
  const Tensor q_used = states && scale == 0 ? zeros_like(q) : q;
  return power_backward(q_used, k, v, log_g, contiguous(s0), contiguous(z0), y, torch::stable::contiguous(norm),
                        saved.numel() ? Maybe(saved) : Maybe(), dy, contiguous(ds), contiguous(dz), deg, scale, causal, normalize, states,
                        chunk_size);
}

// ---- Scaled dot-product attention: causal is a PowerCausal, window is [left, right] or nothing ---------------------------------

typedef std::optional<std::vector<int64_t>> Window;

PowerSdpaShape windowed(PowerSdpaShape s, const Window &window) {
  if (!window) return s;
  STD_TORCH_CHECK(window->size() == 2, "torch_power: window is not two numbers");
  s.window = 1, s.window_left = (*window)[0], s.window_right = (*window)[1];
  return s;
}

std::tuple<Tensor, Tensor, Tensor> sdpa_forward(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &bias, const Maybe &mask,
                                                const Maybe &seed, int64_t causal, Window window, double scale, double dropout_p,
                                                bool residual) {
  check_cuda(q);
  const PowerSdpaShape s = windowed(sdpa_shape(q, k, v, causal, scale, dropout_p), window);
  check_broadcast("bias", bias, q, s);
  check_broadcast("mask", mask, q, s);
  check_sizes("seed", seed, q, {s.b});
  Tensor out = make_rows(q, s, s.e, v.scalar_type()), lse = make(q, {s.b, s.h_q, s.t_q}, ScalarType::Float);
  Tensor rest = residual ? make_rows(q, s, s.e, ScalarType::Byte) : make(q, {0}, ScalarType::Byte);
  const Tensor q_used = tileable(q), k_used = tileable(k), v_used = tileable(v);
  PowerSdpaArrays a = {};
  a.q = strided(q_used), a.k = strided(k_used), a.v = strided(v_used), a.bias = array(bias), a.mask = array(mask), a.seed = array(seed);
  a.out = strided(out), a.lse = strided(lse);
  if (residual) a.residual = strided(rest);
  call_cuda(q, power_sdpa_forward_workspace_sm90, power_sdpa_forward_sm90, s, a);
  return {out, lse, rest};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sdpa_backward(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &bias,
                                                         const Maybe &mask, const Maybe &seed, const Tensor &out, const Tensor &lse,
                                                         const Maybe &residual, const Tensor &dout, int64_t causal, Window window,
                                                         double scale, double dropout_p, bool bias_grad) {
  check_cuda(q);
  const PowerSdpaShape s = windowed(sdpa_shape(q, k, v, causal, scale, dropout_p), window);
  check_broadcast("bias", bias, q, s);
  check_broadcast("mask", mask, q, s);
  check_sizes("seed", seed, q, {s.b});
  check_sizes("out", out, q, {s.b, s.h_q, s.t_q, s.e});
  check_sizes("residual", residual, q, {s.b, s.h_q, s.t_q, s.e});
  check_sizes("dout", dout, q, {s.b, s.h_q, s.t_q, s.e});
  check_sizes("lse", lse, q, {s.b, s.h_q, s.t_q});
  STD_TORCH_CHECK(!bias_grad || bias, "torch_power: bias_grad without a bias");
  Tensor dq = make_like(q), dk = make_like(k), dv = make_like(v), dbias = bias_grad ? make_like(*bias) : make(q, {0}, ScalarType::Float);
  const Tensor q_used = tileable(q), k_used = tileable(k), v_used = tileable(v), out_used = tileable(out), dout_used = tileable(dout);
  const Maybe residual_used = tileable(residual);
  PowerSdpaArrays a = {};
  a.q = strided(q_used), a.k = strided(k_used), a.v = strided(v_used), a.bias = array(bias), a.mask = array(mask), a.seed = array(seed);
  a.out = strided(out_used), a.lse = strided(lse), a.residual = strided(residual_used), a.dout = strided(dout_used);
  a.dq = strided(dq), a.dk = strided(dk), a.dv = strided(dv);
  if (bias_grad) a.dbias = array(torch::stable::zero_(dbias));
  call_cuda(q, power_sdpa_backward_workspace_sm90, power_sdpa_backward_sm90, s, a);
  return {dq, dk, dv, dbias};
}

// ---- The raw operators of scaled dot-product attention ---------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> sdpa(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &bias, const Maybe &mask,
                                        const Maybe &seed, bool causal, Window window, double scale, double dropout_p, std::string,
                                        bool residual) {
  return sdpa_forward(q, k, v, bias, mask, seed, causal, window, scale, dropout_p, residual);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sdpa_gradient(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &bias,
                                                         const Maybe &mask, const Maybe &seed, const Tensor &out, const Tensor &lse,
                                                         const Tensor &residual, const Tensor &dout, bool causal, Window window,
                                                         double scale, double dropout_p, bool bias_grad, std::string) {
  const Maybe rest = residual.dim() == 1 ? Maybe() : Maybe(residual);
  return sdpa_backward(q, k, v, bias, mask, seed, out, lse, rest, dout, causal, window, scale, dropout_p, bias_grad);
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_power, m) {
  m.def(
      "power_forward_cuda(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor? s0, Tensor? z0, Tensor(a!)? saved, int deg, float scale, "
      "bool causal, bool normalize, int form, int chunk_size, bool return_state) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "power_backward_cuda(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor? s0, Tensor? z0, Tensor y, Tensor norm, Tensor? saved, "
      "Tensor dy, Tensor? ds, Tensor? dz, int deg, float scale, bool causal, bool normalize, int form, int chunk_size) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sdpa_forward_cuda(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? seed, int causal, int[]? window, float scale, "
      "float dropout_p, bool residual) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sdpa_backward_cuda(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? seed, Tensor out, Tensor lse, "
      "Tensor? residual, Tensor dout, int causal, int[]? window, float scale, float dropout_p, bool bias_grad) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "power_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor? s0, Tensor? z0, int deg, float scale, bool causal, "
      "bool normalize, str form, int chunk_size, bool return_state, str implementation, bool save) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "power_attention_gradient_cuda(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor? s0, Tensor? z0, Tensor y, Tensor norm, "
      "Tensor saved, Tensor dy, Tensor? ds, Tensor? dz, int deg, float scale, bool causal, bool normalize, str form, int chunk_size, "
      "bool return_state, str implementation, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sdpa_cuda(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? seed, bool causal, int[]? window, float scale, "
      "float dropout_p, str implementation, bool residual) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sdpa_gradient_cuda(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? seed, Tensor out, Tensor lse, "
      "Tensor residual, Tensor dout, bool causal, int[]? window, float scale, float dropout_p, bool bias_grad, "
      "str implementation) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_power, CUDA, m) {
  m.impl("power_forward_cuda", TORCH_BOX(&power_forward));
  m.impl("power_backward_cuda", TORCH_BOX(&power_backward));
  m.impl("sdpa_forward_cuda", TORCH_BOX(&sdpa_forward));
  m.impl("sdpa_backward_cuda", TORCH_BOX(&sdpa_backward));
  m.impl("power_attention_cuda", TORCH_BOX(&power_attention));
  m.impl("power_attention_gradient_cuda", TORCH_BOX(&power_attention_gradient));
  m.impl("sdpa_cuda", TORCH_BOX(&sdpa));
  m.impl("sdpa_gradient_cuda", TORCH_BOX(&sdpa_gradient));
}

}  // namespace
}  // namespace power_torch
