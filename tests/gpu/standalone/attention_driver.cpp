/* One call of the attention form, both passes, against a float64 sum on the CPU: for compute-sanitizer, under which Python with PyTorch takes
 * minutes to start. Outputs and workspace hold NaN before; exits 1 if an error is over its bound or a second run gives other bits.
 *
 *     nvcc -std=c++17 -o attention_driver tests/gpu/standalone/attention_driver.cpp -ldl
 *     ./attention_driver LIBRARY t d [h_q h_kv [gates]]
 *
 * LIBRARY exports abi_attention.h: torch_power/lib/libpower_kernels.so, or for racecheck csrc/inst/attention*.cu built with -DPOWER_RACECHECK. The
 * backward in one pass starts at thousands of tokens (csrc/inst/attention.cu), too many for a sanitizer: give it a library that starts at one.
 * t is 2 or more: of one token the exact dq is 0. `gates`: about −0.07 a token.
 */
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../../torch_power/csrc/abi.h"

namespace {

using Size = int64_t (*)(const PowerAttentionShape *, const void *);
using Run = int32_t (*)(const PowerAttentionShape *, const PowerAttentionArrays *, void *, int64_t, void *);

void check(bool ok, const char *what) {
  if (ok) return;
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(cudaGetLastError()));
  std::exit(1);
}

/* [1, t, h, x] in bfloat16 or float32, contiguous. */
struct Tensor {
  int64_t t, h, x;
  bool wide;
  void *device = nullptr;
  int64_t bytes() const { return t * h * x * (wide ? 4 : 2); }
  PowerArray array() const {
    return {device, {t * h * x, h * x, x, 1}, wide ? POWER_FLOAT32 : POWER_BFLOAT16};
  }
  void allocate(const std::vector<double> *values, std::vector<double> *rounded = nullptr) {
    check(cudaMalloc(&device, bytes()) == cudaSuccess, "allocation");
    check(cudaMemset(device, 0xFF, bytes()) == cudaSuccess, "poison");
    if (!values) return;
    std::vector<uint16_t> bits(values->size());
    for (size_t i = 0; i < bits.size(); ++i) {
      const float value = float((*values)[i]);
      uint32_t word;
      std::memcpy(&word, &value, 4);
      bits[i] = uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16);
      const uint32_t back = uint32_t(bits[i]) << 16;
      float f;
      std::memcpy(&f, &back, 4);
      (*rounded)[i] = f;
    }
    check(cudaMemcpy(device, bits.data(), bytes(), cudaMemcpyHostToDevice) == cudaSuccess, "copy");
  }
  std::vector<uint16_t> read() const {
    std::vector<uint16_t> bits(bytes() / 2);
    check(cudaMemcpy(bits.data(), device, bytes(), cudaMemcpyDeviceToHost) == cudaSuccess, "copy");
    return bits;
  }
};

double error(const std::vector<uint16_t> &got, const std::vector<double> &want, bool wide) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const uint32_t word = wide ? got[2 * i] | uint32_t(got[2 * i + 1]) << 16 : uint32_t(got[i]) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    difference += (x - want[i]) * (x - want[i]), size += want[i] * want[i];
  }
  return std::sqrt(difference / size);
}

}  // namespace

int main(int count, char **arguments) {
  check(count >= 4, "usage: attention_driver LIBRARY t d [h_q h_kv [gates]]");
  const int64_t t = std::atoll(arguments[2]), d = std::atoll(arguments[3]);
  const int64_t h = count > 5 ? std::atoll(arguments[4]) : 2, h_kv = count > 5 ? std::atoll(arguments[5]) : 2, group = h / h_kv;
  const bool gates = count > 6;
  void *library = dlopen(arguments[1], RTLD_LAZY);
  if (!library) std::printf("%s\n", dlerror());
  check(library, "library");
  const auto find = [&](const char *name) {
    void *symbol = dlsym(library, (std::string("power_attention_quadratic_") + name + "_sm90").c_str());
    check(symbol, name);
    return symbol;
  };

  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  Tensor q{t, h, d}, k{t, h_kv, d}, v{t, h_kv, d}, dy{t, h, d}, y{t, h, d}, norm{t, 1, h, true}, dq{t, h, d}, dk{t, h_kv, d}, dv{t, h_kv, d};
  Tensor log_g{t, 1, h_kv, true}, dlog_g{t, 1, h_kv, true};
  std::vector<double> values[4];
  Tensor *inputs[4] = {&q, &k, &v, &dy};
  for (int i = 0; i < 4; ++i) {
    std::vector<double> x(inputs[i]->bytes() / 2);
    for (double &number : x) number = normal(random);
    values[i].resize(x.size());
    inputs[i]->allocate(&x, &values[i]);
  }
  std::vector<double> decay(t * h_kv);  // Σ log_g up to a token
  if (gates) {
    std::vector<float> gate(t * h_kv);
    for (int64_t i = 0; i < t * h_kv; ++i) {
      gate[i] = float(-std::log1p(std::exp(-3 - normal(random))));
      decay[i] = gate[i] + (i >= h_kv ? decay[i - h_kv] : 0);
    }
    log_g.allocate(nullptr);
    check(cudaMemcpy(log_g.device, gate.data(), log_g.bytes(), cudaMemcpyHostToDevice) == cudaSuccess, "copy");
  }
  std::vector<Tensor *> outputs = {&y, &norm, &dq, &dk, &dv};
  if (gates) outputs.push_back(&dlog_g);
  for (Tensor *x : outputs) x->allocate(nullptr);

  const PowerAttentionShape shape = {1, t, t, h, h_kv, d, d, 1, 1 / std::sqrt(double(d)), 2, POWER_ATTENTION, POWER_BFLOAT16, 1, 1, 0, gates};
  PowerAttentionArrays arrays = {};
  arrays.q = q.array(), arrays.k = k.array(), arrays.v = v.array(), arrays.dy = dy.array(), arrays.y = y.array(), arrays.norm = norm.array();
  arrays.dq = dq.array(), arrays.dk = dk.array(), arrays.dv = dv.array();
  if (gates) arrays.log_g = log_g.array(), arrays.dlog_g = dlog_g.array();
  for (PowerArray *a : {&arrays.norm, &arrays.log_g, &arrays.dlog_g}) a->stride[2] = 1;  // [1, t, h] of [1, t, 1, h]
  const auto run = [&](const char *name) {
    const int64_t bytes = reinterpret_cast<Size>(find((std::string(name) + "_workspace").c_str()))(&shape, nullptr);
    void *workspace;
    check(cudaMalloc(&workspace, bytes) == cudaSuccess && cudaMemset(workspace, 0xFF, bytes) == cudaSuccess, "workspace");
    const int32_t status = reinterpret_cast<Run>(find(name))(&shape, &arrays, workspace, bytes, nullptr);
    check(status == POWER_OK && cudaDeviceSynchronize() == cudaSuccess, name);
    cudaFree(workspace);
  };
  run("forward");
  run("backward");
  std::vector<Tensor *> results = {&y, &dq, &dk, &dv};
  if (gates) results.push_back(&dlog_g);
  std::vector<std::vector<uint16_t>> first;
  for (const Tensor *x : results) first.push_back(x->read());

  std::vector<double> want[5];
  for (size_t i = 0; i < results.size(); ++i) want[i].resize(results[i]->t * results[i]->h * results[i]->x);
  for (int64_t head = 0; head < h; ++head)
    for (int64_t i = 0; i < t; ++i) {
      const auto row = [&](int tensor, int64_t j) { return values[tensor].data() + (tensor % 3 ? (j * h_kv + head / group) * d : (j * h + head) * d); };
      const auto dot = [&](const double *a, const double *b) {
        double sum = 0;
        for (int64_t x = 0; x < d; ++x) sum += a[x] * b[x];
        return sum;
      };
      std::vector<double> score(i + 1), grown(i + 1);
      double total = 0, delta = 0, *out = &want[0][(i * h + head) * d], *out_q = &want[1][(i * h + head) * d];
      for (int64_t j = 0; j <= i; ++j) {
        score[j] = dot(row(0, i), row(1, j));
        grown[j] = score[j] * std::exp(decay[i * h_kv + head / group] - decay[j * h_kv + head / group]);
        total += score[j] * grown[j];
      }
      for (int64_t j = 0; j <= i; ++j)
        for (int64_t x = 0; x < d; ++x) out[x] += score[j] * grown[j] / total * row(2, j)[x];
      delta = dot(out, row(3, i));
      for (int64_t j = 0; j <= i; ++j) {
        const double weight = score[j] * grown[j] / total, change = dot(row(3, i), row(2, j)) - delta, slope = 2 * grown[j] / total * change;
        double *out_k = &want[2][(j * h_kv + head / group) * d], *out_v = &want[3][(j * h_kv + head / group) * d];
        for (int64_t x = 0; x < d; ++x)
          out_q[x] += slope * row(1, j)[x], out_k[x] += slope * row(0, i)[x], out_v[x] += weight * row(3, i)[x];
        if (gates) want[4][j * h_kv + head / group] -= weight * change;  // a row's Σ_j weight · change is 0
      }
    }
  for (int64_t i = int64_t(want[4].size()) - 1 - h_kv; i >= 0; --i) want[4][i] += want[4][i + h_kv];
  bool ok = true;
  const char *names[5] = {"y", "dq", "dk", "dv", "dlog_g"};
  for (size_t i = 0; i < results.size(); ++i) {
    const double found = error(first[i], want[i], results[i]->wide);
    ok = ok && found <= 5e-3;
    std::printf("%s %.2e  ", names[i], found);
  }
  for (Tensor *x : outputs) check(cudaMemset(x->device, 0xFF, x->bytes()) == cudaSuccess, "poison");
  run("forward");
  run("backward");
  for (size_t i = 0; i < results.size(); ++i) ok = ok && first[i] == results[i]->read();
  std::printf("%s\n", ok ? "ok, two runs bit-equal" : "FAIL");
  return !ok;
}
