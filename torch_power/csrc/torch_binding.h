// What the PyTorch bindings share: tensors as PowerArray, new tensors, and the shapes of calls, checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "abi.h"

namespace power_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::optional<Tensor> Maybe;

inline int32_t dtype_of(const Tensor &x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return POWER_FLOAT32;
    case ScalarType::Double: return POWER_FLOAT64;
    case ScalarType::BFloat16: return POWER_BFLOAT16;
    case ScalarType::Half: return POWER_FLOAT16;
    case ScalarType::Bool: return POWER_BOOL;
    case ScalarType::Long: case ScalarType::Byte: return -1;  // seeds and residuals: abi.h reads no dtype there
    default: STD_TORCH_CHECK(false, "torch_power: a dtype the kernels do not know");
  }
  return -1;
}

// The dtype of gates, states, normalisers and whatever else stays as precise as the arithmetic.
inline ScalarType wide(const Tensor &x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline PowerArray array(const Tensor &x) {
  PowerArray a = {};
  STD_TORCH_CHECK(x.dim() <= 4, "torch_power: at most 4 axes");
  a.data = x.numel() ? const_cast<void *>(x.const_data_ptr()) : nullptr;
  for (int64_t i = 0; i < x.dim(); ++i) a.stride[i] = x.size(i) == 1 ? 0 : x.stride(i);
  a.dtype = dtype_of(x);
  return a;
}
inline PowerArray array(const Maybe &x) { return x ? array(*x) : PowerArray{}; }

// An uninitialised tensor on the device of `like`.
inline Tensor make_strided(const Tensor &like, const std::vector<int64_t> &size, const std::vector<int64_t> &stride, ScalarType dtype) {
  const int32_t number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device = 0;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(size.size()), size.data(), stride.data(), number, device, like.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor make(const Tensor &like, const std::vector<int64_t> &size, ScalarType dtype) {
  std::vector<int64_t> stride(size.size());
  int64_t step = 1;
  for (size_t i = size.size(); i-- > 0; step *= std::max<int64_t>(size[i], 1)) stride[i] = step;
  return make_strided(like, size, stride, dtype);
}
inline Tensor make_like(const Tensor &x) {
  std::vector<int64_t> size;
  for (int64_t i = 0; i < x.dim(); ++i) size.push_back(x.size(i));
  return make(x, size, x.scalar_type());
}

// Raises unless x has `dim` axes and is where q is.
inline void check(const char *name, const Tensor &x, const Tensor &q, int64_t dim) {
  STD_TORCH_CHECK(x.is_cuda() == q.is_cuda() && x.get_device_index() == q.get_device_index(), "torch_power: ", name,
                  " is not on the device of q");
  STD_TORCH_CHECK(x.dim() == dim, "torch_power: ", name, " has ", x.dim(), " axes, expected ", dim);
}

inline void check_sizes(const char *name, const Maybe &x, const Tensor &q, std::initializer_list<int64_t> size) {
  if (!x) return;
  check(name, *x, q, int64_t(size.size()));
  int64_t axis = 0;
  for (int64_t n : size) {
    STD_TORCH_CHECK(x->size(axis) == n, "torch_power: axis ", axis, " of ", name, " is ", x->size(axis), ", expected ", n);
    ++axis;
  }
}

inline PowerAttentionShape power_shape(const Tensor &q, const Tensor &k, const Tensor &v, int64_t deg, double scale, bool causal,
                                       bool normalize, int64_t form, int64_t chunk_size) {
  check("q", q, q, 4);
  check("k", k, q, 4);
  check("v", v, q, 4);
  PowerAttentionShape s = {};
  s.b = q.size(0), s.t = q.size(1), s.h_q = q.size(2), s.d = q.size(3);
  s.t_kv = k.size(1), s.h_kv = k.size(2), s.e = v.size(3);
  s.chunk_size = chunk_size, s.scale = scale, s.deg = int32_t(deg), s.form = int32_t(form), s.dtype = dtype_of(q);
  s.causal = causal, s.normalize = normalize;
  STD_TORCH_CHECK(k.size(0) == s.b && k.size(3) == s.d && dtype_of(k) == s.dtype, "torch_power: k does not go with q");
  STD_TORCH_CHECK(v.size(0) == s.b && v.size(1) == s.t_kv && v.size(2) == s.h_kv && dtype_of(v) == s.dtype,
                  "torch_power: v does not go with k");
  return s;
}

inline int64_t state_rows(int64_t d, int64_t deg) {
  STD_TORCH_CHECK(deg >= 1 && deg <= 4, "torch_power: a state is defined for deg 1 to 4");
  const int64_t tile = deg <= 2 ? 8 : deg == 3 ? 4 : 2, tiles = d / tile;
  int64_t count = 1;
  for (int64_t m = 0; m < deg; ++m) count = count * (tiles + m) / (m + 1);
  for (int64_t m = 0; m < deg; ++m) count *= tile;
  return count;
}

inline PowerSdpaShape sdpa_shape(const Tensor &q, const Tensor &k, const Tensor &v, int64_t causal, double scale, double dropout_p) {
  check("q", q, q, 4);
  check("k", k, q, 4);
  check("v", v, q, 4);
  PowerSdpaShape s = {};
  s.b = q.size(0), s.h_q = q.size(1), s.t_q = q.size(2), s.d = q.size(3);
  s.h_kv = k.size(1), s.t_kv = k.size(2), s.e = v.size(3);
  s.scale = scale, s.dropout_p = dropout_p, s.dtype = dtype_of(q), s.causal = int32_t(causal);
  STD_TORCH_CHECK(k.size(0) == s.b && k.size(3) == s.d && dtype_of(k) == s.dtype, "torch_power: k does not go with q");
  STD_TORCH_CHECK(v.size(0) == s.b && v.size(1) == s.h_kv && v.size(2) == s.t_kv && dtype_of(v) == s.dtype,
                  "torch_power: v does not go with k");
  return s;
}

// A bias or mask [b, h_q, t_q, t_kv], any axis of which may have size 1; `array` gives such an axis stride 0.
inline void check_broadcast(const char *name, const Maybe &x, const Tensor &q, const PowerSdpaShape &s) {
  if (!x) return;
  check(name, *x, q, 4);
  const int64_t full[] = {s.b, s.h_q, s.t_q, s.t_kv};
  for (int64_t axis = 0; axis < 4; ++axis)
    STD_TORCH_CHECK(x->size(axis) == full[axis] || x->size(axis) == 1, "torch_power: axis ", axis, " of ", name, " is ", x->size(axis),
                    ", expected ", full[axis], " or 1");
}

// [b, h_q, t_q, size] for a result that is stored as q is: time before heads, or heads before time.
inline Tensor make_rows(const Tensor &q, const PowerSdpaShape &s, int64_t size, ScalarType dtype) {
  const bool heads_last = q.stride(1) < q.stride(2);
  const int64_t head = heads_last ? size : s.t_q * size, token = heads_last ? s.h_q * size : size;
  return make_strided(q, {s.b, s.h_q, s.t_q, size}, {s.h_q * s.t_q * size, head, token, 1}, dtype);
}

}  // namespace power_torch
