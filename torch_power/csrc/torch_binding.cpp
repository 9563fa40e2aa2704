// The CPU kernels as PyTorch operators, on torch's stable ABI. Arguments were checked by their Python callers
// (torch_power/cpp); what is checked here is what would read or write out of bounds.
#include "torch_binding.h"

namespace power_torch {
namespace {

void check_cpu(const Tensor &q) { STD_TORCH_CHECK(q.is_cpu(), "torch_power: q is not on the CPU"); }

// Runs kernels on the threads of torch's own parallel loops, so that torch.set_num_threads holds and nothing is oversubscribed.
struct TorchExecutor {
  PowerExecutor executor;
  TorchExecutor() : executor{int32_t(torch::stable::get_num_threads()), nullptr, &run} {}

  static void run(void *, int64_t n, void (*body)(void *, int64_t), void *context) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(context, i);
    });
  }
};

// Calls a pair of CPU entry points of abi.h: asks for the workspace, allocates it, runs.
template <class Shape, class Arrays>
void call_cpu(const Tensor &like, int64_t (*workspace_size)(const Shape *, const void *),
              int32_t (*run)(const Shape *, const Arrays *, void *, int64_t, void *), const Shape &shape, const Arrays &arrays) {
  TorchExecutor torch;
  int64_t bytes = workspace_size(&shape, &torch.executor);
  STD_TORCH_CHECK(bytes >= 0, "torch_power: ", power_last_error());
  constexpr int64_t kAlign = 256;
  Tensor workspace = make(like, {bytes + kAlign}, ScalarType::Byte);
  uintptr_t base = (reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr()) + kAlign - 1) / kAlign * kAlign;
  int32_t status = run(&shape, &arrays, reinterpret_cast<void *>(base), bytes, &torch.executor);
  STD_TORCH_CHECK(status == POWER_OK, "torch_power: ", power_last_error());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> power_forward(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &log_g,
                                                         const Maybe &s0, const Maybe &z0, int64_t deg, double scale, bool causal,
                                                         bool normalize, int64_t form, int64_t chunk_size, bool return_state) {
  check_cpu(q);
  PowerAttentionShape s = power_shape(q, k, v, deg, scale, causal, normalize, form, chunk_size);
  int64_t rows = return_state || s0 || z0 ? state_rows(s.d, deg) : 0;
  check_sizes("log_g", log_g, q, {s.b, s.t_kv, s.h_kv});
  check_sizes("s0", s0, q, {s.b, s.h_kv, rows, s.e});
  check_sizes("z0", z0, q, {s.b, s.h_kv, rows});
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
  check_cpu(q);
  PowerAttentionShape s = power_shape(q, k, v, deg, scale, causal, normalize, form, chunk_size);
  int64_t rows = s0 || z0 || ds || dz ? state_rows(s.d, deg) : 0;
  check_sizes("log_g", log_g, q, {s.b, s.t_kv, s.h_kv});
  check_sizes("s0", s0, q, {s.b, s.h_kv, rows, s.e});
  check_sizes("z0", z0, q, {s.b, s.h_kv, rows});
  check_sizes("y", y, q, {s.b, s.t, s.h_q, s.e});
  check_sizes("norm", norm, q, {s.b, s.t, s.h_q});
  check_sizes("dy", dy, q, {s.b, s.t, s.h_q, s.e});
  check_sizes("ds", ds, q, {s.b, s.h_kv, rows, s.e});
  check_sizes("dz", dz, q, {s.b, s.h_kv, rows});
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

std::tuple<Tensor, Tensor> sdpa_forward(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &bias, const Maybe &mask,
                                        const Maybe &seed, bool causal, double scale, double dropout_p) {
  check_cpu(q);
  PowerSdpaShape s = sdpa_shape(q, k, v, causal, scale, dropout_p);
  check_broadcast("bias", bias, q, s);
  check_broadcast("mask", mask, q, s);
  check_sizes("seed", seed, q, {s.b});
  Tensor out = make_rows(q, s, s.e, wide(q)), lse = make(q, {s.b, s.h_q, s.t_q}, wide(q));
  PowerSdpaArrays a = {};
  a.q = array(q), a.k = array(k), a.v = array(v), a.bias = array(bias), a.mask = array(mask), a.seed = array(seed);
  a.out = array(out), a.lse = array(lse);
  call_cpu(q, power_sdpa_forward_workspace_cpu, power_sdpa_forward_cpu, s, a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sdpa_backward(const Tensor &q, const Tensor &k, const Tensor &v, const Maybe &bias,
                                                         const Maybe &mask, const Maybe &seed, const Tensor &out, const Tensor &lse,
                                                         const Tensor &dout, bool causal, double scale, double dropout_p, bool bias_grad) {
  check_cpu(q);
  PowerSdpaShape s = sdpa_shape(q, k, v, causal, scale, dropout_p);
  check_broadcast("bias", bias, q, s);
  check_broadcast("mask", mask, q, s);
  check_sizes("seed", seed, q, {s.b});
  check_sizes("out", out, q, {s.b, s.h_q, s.t_q, s.e});
  check_sizes("dout", dout, q, {s.b, s.h_q, s.t_q, s.e});
  check_sizes("lse", lse, q, {s.b, s.h_q, s.t_q});
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
