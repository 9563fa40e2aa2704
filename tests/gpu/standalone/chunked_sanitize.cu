/* Both passes of the chunked form on one shape, with nothing else on the GPU: for compute-sanitizer, which takes a minute to start a framework.
 *
 *   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o sanitize chunked_sanitize.cu torch_power/csrc/inst/chunked_*.cu   (-DPOWER_RACECHECK for racecheck)
 *   compute-sanitizer --tool memcheck|initcheck|racecheck ./sanitize D T QUERY_HEADS KEY_VALUE_HEADS [state] [unsaved] [sum] [ungated]
 *
 * Prints the sum of each result's magnitudes: of two tools, or of two runs, the same.
 */
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>
#include "../../../torch_power/csrc/power/abi_chunked.h"

extern "C" const char *power_last_error(void) { return ""; }
extern "C" int32_t power_fail(int32_t status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  return status;
}

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) printf("%s\n", cudaGetErrorString(error)), exit(1);
}
float uniform() { return float(rand()) / RAND_MAX * 2.f - 1.f; }

template <typename T>
PowerArray make(const int64_t (&size)[4], int dtype, bool filled, float largest = 1.f) {
  const int64_t count = size[0] * size[1] * size[2] * size[3];
  PowerArray a = {nullptr, {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1}, dtype};
  check(cudaMalloc(&a.data, count * sizeof(T)));
  if (!filled) return a;
  std::vector<T> host(count);
  for (T &x : host) x = T(largest * uniform());
  check(cudaMemcpy(a.data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice));
  return a;
}

template <typename T>
void report(const char *name, const PowerArray &a, int64_t count) {
  if (a.data == nullptr) return;
  std::vector<T> host(count);
  check(cudaMemcpy(host.data(), a.data, count * sizeof(T), cudaMemcpyDeviceToHost));
  double sum = 0.;
  for (const T &x : host) sum += fabs(double(float(x)));
  printf("%s %.9g  ", name, sum);
}

}  // namespace

int main(int count, char **words) {
  const auto has = [&](const char *word) {
    for (int i = 5; i < count; i++)
      if (strcmp(words[i], word) == 0) return true;
    return false;
  };
  using Half = __nv_bfloat16;
  const int64_t d = atoi(words[1]), t = atoi(words[2]), h_q = atoi(words[3]), h_kv = atoi(words[4]), rows = d / 8 * (d / 8 + 1) / 2 * 64;
  const bool state = has("state"), saved = !has("unsaved");
  PowerAttentionShape s = {1, t, t, h_q, h_kv, d, d, 1, 1. / sqrt(double(d)), 2, POWER_CHUNKED, POWER_BFLOAT16, 1, !has("sum"), saved};
  PowerAttentionArrays a = {};
  const auto array = [&](int64_t heads, bool filled) { return make<Half>({1, t, heads, d}, POWER_BFLOAT16, filled); };
  const auto floats = [&](int64_t x, int64_t y, int64_t z, bool filled) { return make<float>({1, x, y, z}, POWER_FLOAT32, filled, 1e-3f); }; /* normalisers stay positive */
  a.q = array(h_q, true), a.k = array(h_kv, true), a.v = array(h_kv, true), a.dy = array(h_q, true);
  a.y = array(h_q, false), a.dq = array(h_q, false), a.dk = array(h_kv, false), a.dv = array(h_kv, false);
  a.norm = make<float>({1, 1, t, h_q}, POWER_FLOAT32, false);
  if (!has("ungated")) {
    std::vector<float> gates(t * h_kv);
    for (float &x : gates) x = -0.1f * fabsf(uniform());
    a.log_g = {nullptr, {t * h_kv, h_kv, 1, 1}, POWER_FLOAT32}, a.dlog_g = a.log_g;
    check(cudaMalloc(&a.log_g.data, gates.size() * 4));
    check(cudaMalloc(&a.dlog_g.data, gates.size() * 4));
    check(cudaMemcpy(a.log_g.data, gates.data(), gates.size() * 4, cudaMemcpyHostToDevice));
  }
  if (state) {
    a.s0 = floats(h_kv, rows, d, true), a.ds = floats(h_kv, rows, d, true), a.s = floats(h_kv, rows, d, false), a.ds0 = floats(h_kv, rows, d, false);
    a.z0 = floats(1, h_kv, rows, true), a.dz = floats(1, h_kv, rows, true), a.z = floats(1, h_kv, rows, false), a.dz0 = floats(1, h_kv, rows, false);
  }
  if (saved) check(cudaMalloc(&a.saved.data, power_chunked_saved_sm90(&s, nullptr)));
  const auto run = [&](auto size, auto launch) {
    const int64_t bytes = size(&s, nullptr);
    void *workspace;
    check(cudaMalloc(&workspace, bytes));
    if (launch(&s, &a, workspace, bytes, nullptr) != POWER_OK) exit(1);
    check(cudaDeviceSynchronize());
    check(cudaFree(workspace));
  };
  run(power_chunked_forward_workspace_sm90, power_chunked_forward_sm90);
  run(power_chunked_backward_workspace_sm90, power_chunked_backward_sm90);
  report<Half>("y", a.y, t * h_q * d), report<Half>("dq", a.dq, t * h_q * d), report<Half>("dk", a.dk, t * h_kv * d);
  report<Half>("dv", a.dv, t * h_kv * d), report<float>("dlog_g", a.dlog_g, t * h_kv), report<float>("norm", a.norm, t * h_q);
  report<float>("s", a.s, h_kv * rows * d), report<float>("z", a.z, h_kv * rows), report<float>("ds0", a.ds0, h_kv * rows * d), report<float>("dz0", a.dz0, h_kv * rows);
  printf("\n");
}
