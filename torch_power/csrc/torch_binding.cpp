// The CPU kernels as PyTorch operators, on torch's stable ABI. Arguments were checked by their Python callers
// (torch_power/cpp); what is checked here is what would read or write out of bounds.
#include "torch_binding.h"

namespace power_torch {
namespace {

PowerAttentionShape power_shape(const Tensor &q, const Tensor &k, const Tensor &v, int64_t deg, double scale, bool causal, bool normalize,
                                int64_t form, int64_t chunk_size) {
  check_cpu("q", q, 4);
  check_cpu("k", k, 4);
  check_cpu("v", v, 4);
  PowerAttentionShape s = {};
  s.b = q.size(0), s.t = q.size(1), s.h_q = q.size(2), s.d = q.size(3);
  s.t_kv = k.size(1), s.h_kv = k.size(2), s.e = v.size(3);
  s.chunk_size = chunk_size, s.scale = scale, s.deg = int32_t(deg), s.form = int32_t(form), s.dtype = dtype_of(q);
  s.causal = causal, s.normalize = normalize;
  STD_TORCH_CHECK(k.size(0) == s.b && k.size(3) == s.d, "torch_power: k does not go with q");
  STD_TORCH_CHECK(v.size(0) == s.b && v.size(1) == s.t_kv && v.size(2) == s.h_kv, "torch_power: v does not go with k");
  return s;
}

int64_t state_rows(int64_t d, int64_t deg) {
  STD_TORCH_CHECK(deg >= 1 && deg <= 4, "torch_power: a state is defined for deg 1 to 4");
  const int64_t tile = deg <= 2 ? 8 : deg == 3 ? 4 : 2, tiles = d / tile;
  int64_t count = 1;
  for (int64_t m = 0; m < deg; ++m) count = count * (tiles + m) / (m + 1);
  for (int64_t m = 0; m < deg; ++m) count *= tile;
  return count;
}

void check_sizes(const char *name, const Maybe &x, std::initializer_list<int64_t> size) {
  if (!x) return;
  check_cpu(name, *x, int64_t(size.size()));
  int64_t axis = 0;
  for (int64_t n : size) {
    STD_TORCH_CHECK(x->size(axis) == n, "torch_power: axis ", axis, " of ", name, " is ", x->size(axis), ", expected ", n);
    ++axis;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> power_forward(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &log_g,
                                                         const Maybe &s0, const Maybe &z0, int64_t deg, double scale, bool causal,
                                                         bool normalize, int64_t form, int64_t chunk_size, bool return_state) {
  PowerAttentionShape s = power_shape(q, k, v, deg, scale, causal, normalize, form, chunk_size);
  int64_t rows = return_state || s0 || z0 ? state_rows(s.d, deg) : 0;
  check_sizes("log_g", log_g, {s.b, s.t_kv, s.h_kv});
  check_sizes("s0", s0, {s.b, s.h_kv, rows, s.e});
  check_sizes("z0", z0, {s.b, s.h_kv, rows});
  Tensor y = make(q, {s.b, s.t, s.h_q, s.e}, wide(q)), norm = make(q, {s.b, s.t, s.h_q}, wide(q));
  Tensor state = return_state ? make(q, {s.b, s.h_kv, rows, s.e}, wide(q)) : make(q, {0}, wide(q));
  Tensor state_norm = return_state ? make(q, {s.b, s.h_kv, rows}, wide(q)) : make(q, {0}, wide(q));
  PowerAttentionArrays a = {};
  a.q = array(q), a.k = array(k), a.v = array(v), a.log_g = array(log_g), a.s0 = array(s0), a.z0 = array(z0);
  a.y = array(y), a.norm = array(norm);
  if (return_state) a.s = array(state), a.z = array(state_norm);
  call_cpu(q, power_attention_forward_workspace_cpu, power_attention_forward_cpu, s, a);
  return {y, norm, state, state_norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> power_backward(
    const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &log_g, const Maybe &s0, const Maybe &z0, const Tensor &y,
    const Tensor &norm, const Tensor &dy, const Maybe &ds, const Maybe &dz, int64_t deg, double scale, bool causal, bool normalize,
    int64_t form, int64_t chunk_size) {
  PowerAttentionShape s = power_shape(q, k, v, deg, scale, causal, normalize, form, chunk_size);
  int64_t rows = s0 || z0 || ds || dz ? state_rows(s.d, deg) : 0;
  check_sizes("log_g", log_g, {s.b, s.t_kv, s.h_kv});
  check_sizes("s0", s0, {s.b, s.h_kv, rows, s.e});
  check_sizes("z0", z0, {s.b, s.h_kv, rows});
  check_sizes("y", y, {s.b, s.t, s.h_q, s.e});
  check_sizes("norm", norm, {s.b, s.t, s.h_q});
  check_sizes("dy", dy, {s.b, s.t, s.h_q, s.e});
  check_sizes("ds", ds, {s.b, s.h_kv, rows, s.e});
  check_sizes("dz", dz, {s.b, s.h_kv, rows});
  auto gradient = [&](const Maybe &x) { return x ? make_like(*x) : make(q, {0}, wide(q)); };
  Tensor dq = make_like(q), dk = make_like(k), dv = make_like(v), dlog_g = gradient(log_g), ds0 = gradient(s0), dz0 = gradient(z0);
  PowerAttentionArrays a = {};
  a.q = array(q), a.k = array(k), a.v = array(v), a.log_g = array(log_g), a.s0 = array(s0), a.z0 = array(z0);
  a.y = array(y), a.norm = array(norm), a.dy = array(dy), a.ds = array(ds), a.dz = array(dz);
  a.dq = array(dq), a.dk = array(dk), a.dv = array(dv);
  if (log_g) a.dlog_g = array(dlog_g);
  if (s0) a.ds0 = array(ds0);
  if (z0) a.dz0 = array(dz0);
  call_cpu(q, power_attention_backward_workspace_cpu, power_attention_backward_cpu, s, a);
  return {dq, dk, dv, dlog_g, ds0, dz0};
}

PowerSdpaShape sdpa_shape(const Tensor &q, const Tensor &k, const Tensor &v, bool causal, double scale, double dropout_p) {
  check_cpu("q", q, 4);
  check_cpu("k", k, 4);
  check_cpu("v", v, 4);
  PowerSdpaShape s = {};
  s.b = q.size(0), s.h_q = q.size(1), s.t_q = q.size(2), s.d = q.size(3);
  s.h_kv = k.size(1), s.t_kv = k.size(2), s.e = v.size(3);
  s.scale = scale, s.dropout_p = dropout_p, s.dtype = dtype_of(q), s.causal = causal;
  STD_TORCH_CHECK(k.size(0) == s.b && k.size(3) == s.d, "torch_power: k does not go with q");
  STD_TORCH_CHECK(v.size(0) == s.b && v.size(1) == s.h_kv && v.size(2) == s.t_kv, "torch_power: v does not go with k");
  return s;
}

// A bias or mask [b, h_q, t_q, t_kv], any axis of which may have size 1; `array` gives such an axis stride 0.
void check_broadcast(const char *name, const Maybe &x, const PowerSdpaShape &s) {
  if (!x) return;
  check_cpu(name, *x, 4);
  const int64_t full[] = {s.b, s.h_q, s.t_q, s.t_kv};
  for (int64_t axis = 0; axis < 4; ++axis)
    STD_TORCH_CHECK(x->size(axis) == full[axis] || x->size(axis) == 1, "torch_power: axis ", axis, " of ", name, " is ", x->size(axis),
                    ", expected ", full[axis], " or 1");
}

std::tuple<Tensor, Tensor> sdpa_forward(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &bias, const Maybe &mask,
                                        const Maybe &seed, bool causal, double scale, double dropout_p) {
  PowerSdpaShape s = sdpa_shape(q, k, v, causal, scale, dropout_p);
  check_broadcast("bias", bias, s);
  check_broadcast("mask", mask, s);
  check_sizes("seed", seed, {s.b});
  Tensor rows = make(q, {s.b, s.t_q, s.h_q, s.e}, wide(q));  // stored with heads inside, as models go on to use it
  Tensor out = torch::stable::transpose(rows, 1, 2), lse = make(q, {s.b, s.h_q, s.t_q}, wide(q));
  PowerSdpaArrays a = {};
  a.q = array(q), a.k = array(k), a.v = array(v), a.bias = array(bias), a.mask = array(mask), a.seed = array(seed);
  a.out = array(out), a.lse = array(lse);
  call_cpu(q, power_sdpa_forward_workspace_cpu, power_sdpa_forward_cpu, s, a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sdpa_backward(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &bias,
                                                         const Maybe &mask, const Maybe &seed, const Tensor &out, const Tensor &lse,
                                                         const Tensor &dout, bool causal, double scale, double dropout_p, bool bias_grad) {
  PowerSdpaShape s = sdpa_shape(q, k, v, causal, scale, dropout_p);
  check_broadcast("bias", bias, s);
  check_broadcast("mask", mask, s);
  check_sizes("seed", seed, {s.b});
  check_sizes("out", out, {s.b, s.h_q, s.t_q, s.e});
  check_sizes("dout", dout, {s.b, s.h_q, s.t_q, s.e});
  check_sizes("lse", lse, {s.b, s.h_q, s.t_q});
  STD_TORCH_CHECK(!bias_grad || bias, "torch_power: bias_grad without a bias");
  Tensor dq = make_like(q), dk = make_like(k), dv = make_like(v), dbias = bias_grad ? make_like(*bias) : make(q, {0}, wide(q));
  PowerSdpaArrays a = {};
  a.q = array(q), a.k = array(k), a.v = array(v), a.bias = array(bias), a.mask = array(mask), a.seed = array(seed);
  a.out = array(out), a.lse = array(lse), a.dout = array(dout);
  a.dq = array(dq), a.dk = array(dk), a.dv = array(dv);
  if (bias_grad) a.dbias = array(dbias);
  call_cpu(q, power_sdpa_backward_workspace_cpu, power_sdpa_backward_cpu, s, a);
  return {dq, dk, dv, dbias};
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_power, m) {
  m.def(
      "power_forward_cpp(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor? s0, Tensor? z0, int deg, float scale, bool causal, "
      "bool normalize, int form, int chunk_size, bool return_state) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "power_backward_cpp(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor? s0, Tensor? z0, Tensor y, Tensor norm, Tensor dy, "
      "Tensor? ds, Tensor? dz, int deg, float scale, bool causal, bool normalize, int form, int chunk_size) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sdpa_forward_cpp(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? seed, bool causal, float scale, "
      "float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "sdpa_backward_cpp(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? seed, Tensor out, Tensor lse, Tensor dout, "
      "bool causal, float scale, float dropout_p, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_power, CPU, m) {
  m.impl("power_forward_cpp", TORCH_BOX(&power_forward));
  m.impl("power_backward_cpp", TORCH_BOX(&power_backward));
  m.impl("sdpa_forward_cpp", TORCH_BOX(&sdpa_forward));
  m.impl("sdpa_backward_cpp", TORCH_BOX(&sdpa_backward));
}

}  // namespace
}  // namespace power_torch
