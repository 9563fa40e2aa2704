// What the PyTorch bindings share: tensors as PowerArray, torch's threads as PowerExecutor, workspaces, errors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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
    case ScalarType::Long: return -1;  // seeds: abi.h reads no dtype there
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

inline Tensor make(const Tensor &like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>(size), dtype);
}
inline Tensor make_like(const Tensor &x) {
  std::vector<int64_t> size;
  for (int64_t i = 0; i < x.dim(); ++i) size.push_back(x.size(i));
  return torch::stable::new_empty(x, size, x.scalar_type());
}

inline void check_cpu(const char *name, const Tensor &x, int64_t dim) {
  STD_TORCH_CHECK(x.is_cpu(), "torch_power: ", name, " is not on the CPU");
  STD_TORCH_CHECK(x.dim() == dim, "torch_power: ", name, " has ", x.dim(), " axes, expected ", dim);
}

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

}  // namespace power_torch
