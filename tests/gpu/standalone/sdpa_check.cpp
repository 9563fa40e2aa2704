/* Scaled dot-product attention on a GPU without a framework, for compute-sanitizer (whose start-up multiplies that of Python and torch):
 *
 *     nvcc -std=c++17 -O1 -o sdpa_check tests/gpu/standalone/sdpa_check.cpp -lcuda -ldl && ./sdpa_check torch_power/lib/libpower_kernels.so
 *
 * Forward and backward of small calls that between them run the one-pass backward kernel's every branch, against sums in double on the
 * host. Results begin as NaN, so that one that is not written is wrong; initcheck does not see all that the copy engine writes and would name
 * them. Workspaces are as cudaMalloc gives them: a word that is read before it is written is initcheck's to find. racecheck wants a library
 * whose kernels were compiled with -DPOWER_RACECHECK (csrc/sm90/mbarrier.cuh).
 */
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../../torch_power/csrc/sdpa/abi_sdpa.h"

namespace {

struct Case {
  const char *name;
  int b, h_q, h_kv, t_q, t_kv, d, e, causal;
};
constexpr Case kCases[] = {
    {"d64 causal gqa", 1, 4, 2, 300, 300, 64, 64, 1}, {"d64 full", 1, 2, 2, 200, 330, 64, 64, 0},
    {"d128 causal gqa", 1, 4, 2, 300, 300, 128, 128, 1}, {"d128 full", 1, 2, 2, 200, 330, 128, 128, 0},
    {"d96 e72 causal, short keys", 2, 2, 1, 130, 70, 96, 72, 1},
};

void must(cudaError_t error) {
  if (error != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(error)), std::exit(2);
}

/* [b, h, t, x] in bfloat16, on the host as the numbers that were rounded. */
struct Tensor {
  int b, h, t, x;
  std::vector<float> host;
  __nv_bfloat16 *device = nullptr;
  Tensor(int b, int h, int t, int x) : b(b), h(h), t(t), x(x), host(size_t(b) * h * t * x) {
    must(cudaMalloc(&device, host.size() * 2));
    must(cudaMemset(device, 0xff, host.size() * 2));
  }
  ~Tensor() { cudaFree(device); }
  float &at(int i, int j, int k, int l) { return host[((size_t(i) * h + j) * t + k) * x + l]; }
  void fill(std::mt19937 &random) {
    std::normal_distribution<float> normal;
    std::vector<__nv_bfloat16> rounded;
    for (float &value : host) rounded.push_back(__float2bfloat16(normal(random))), value = __bfloat162float(rounded.back());
    must(cudaMemcpy(device, rounded.data(), host.size() * 2, cudaMemcpyHostToDevice));
  }
  void fetch() {
    std::vector<__nv_bfloat16> rounded(host.size());
    must(cudaMemcpy(rounded.data(), device, host.size() * 2, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < host.size(); ++i) host[i] = __bfloat162float(rounded[i]);
  }
  PowerArray array() const { return {device, {int64_t(h) * t * x, int64_t(t) * x, x, 1}, POWER_BFLOAT16}; }
};

double error(const Tensor &got, const std::vector<double> &want) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) difference += std::pow(got.host[i] - want[i], 2), size += want[i] * want[i];
  return std::sqrt(difference / size);
}

struct Library {
  decltype(&power_sdpa_forward_workspace_sm90) forward_workspace, backward_workspace;
  decltype(&power_sdpa_forward_sm90) forward, backward;
  decltype(&power_last_error) last_error;
};

void run(const Library &library, bool backward, const PowerSdpaShape &shape, const PowerSdpaArrays &arrays) {
  const int64_t bytes = (backward ? library.backward_workspace : library.forward_workspace)(&shape, nullptr);
  void *workspace = nullptr;
  must(cudaMalloc(&workspace, bytes > 0 ? bytes : 1));
  if ((backward ? library.backward : library.forward)(&shape, &arrays, workspace, bytes, nullptr))
    std::fprintf(stderr, "%s\n", library.last_error()), std::exit(2);
  must(cudaDeviceSynchronize());
  cudaFree(workspace);
}

/* The largest relative error of y, dq, dk and dv. */
double check(const Library &library, const Case &c) {
  std::mt19937 random(1);
  Tensor q(c.b, c.h_q, c.t_q, c.d), k(c.b, c.h_kv, c.t_kv, c.d), v(c.b, c.h_kv, c.t_kv, c.e), dy(c.b, c.h_q, c.t_q, c.e);
  for (Tensor *x : {&q, &k, &v, &dy}) x->fill(random);
  Tensor y(c.b, c.h_q, c.t_q, c.e), rest(c.b, c.h_q, c.t_q, c.e), dq(c.b, c.h_q, c.t_q, c.d), dk(c.b, c.h_kv, c.t_kv, c.d),
      dv(c.b, c.h_kv, c.t_kv, c.e);
  float *lse = nullptr;
  must(cudaMalloc(&lse, size_t(c.b) * c.h_q * c.t_q * 4));
  must(cudaMemset(lse, 0xff, size_t(c.b) * c.h_q * c.t_q * 4));
  PowerSdpaShape shape = {c.b, c.h_q, c.h_kv, c.t_q, c.t_kv, c.d, c.e, 1 / std::sqrt(double(c.d)), 0, POWER_BFLOAT16, c.causal, 0, 0, 0, 0};
  PowerSdpaArrays arrays = {};
  arrays.q = q.array(), arrays.k = k.array(), arrays.v = v.array(), arrays.out = y.array(), arrays.residual = rest.array();  // twice the bytes it needs
  arrays.lse = {lse, {int64_t(c.h_q) * c.t_q, c.t_q, 1, 0}, POWER_FLOAT32};
  run(library, false, shape, arrays);
  arrays.dout = dy.array(), arrays.dq = dq.array(), arrays.dk = dk.array(), arrays.dv = dv.array();
  run(library, true, shape, arrays);
  for (Tensor *x : {&y, &dq, &dk, &dv}) x->fetch();
  cudaFree(lse);

  std::vector<double> y_exact(y.host.size()), dq_exact(dq.host.size()), dk_exact(dk.host.size()), dv_exact(dv.host.size());
  std::vector<double> p(c.t_kv);
  for (int i = 0; i < c.b; ++i)
    for (int h = 0; h < c.h_q; ++h)
      for (int m = 0; m < c.t_q; ++m) {
        const int group = h / (c.h_q / c.h_kv), seen = c.causal ? std::min(m + 1, c.t_kv) : c.t_kv;
        double sum = 0, delta = 0;
        for (int n = 0; n < seen; ++n) {
          double score = 0;
          for (int x = 0; x < c.d; ++x) score += double(q.at(i, h, m, x)) * k.at(i, group, n, x);
          sum += p[n] = std::exp(score * shape.scale);
        }
        double *row = &y_exact[((size_t(i) * c.h_q + h) * c.t_q + m) * c.e];
        for (int n = 0; n < seen; ++n)
          for (int x = 0; x < c.e; ++x) row[x] += p[n] / sum * v.at(i, group, n, x);
        for (int x = 0; x < c.e; ++x) delta += row[x] * dy.at(i, h, m, x);
        for (int n = 0; n < seen; ++n) {
          const size_t key = (size_t(i) * c.h_kv + group) * c.t_kv + n;
          double dp = 0;
          for (int x = 0; x < c.e; ++x) dp += double(dy.at(i, h, m, x)) * v.at(i, group, n, x);
          const double ds = p[n] / sum * (dp - delta) * shape.scale;
          for (int x = 0; x < c.e; ++x) dv_exact[key * c.e + x] += p[n] / sum * dy.at(i, h, m, x);
          for (int x = 0; x < c.d; ++x) {
            dk_exact[key * c.d + x] += ds * q.at(i, h, m, x);
            dq_exact[((size_t(i) * c.h_q + h) * c.t_q + m) * c.d + x] += ds * k.at(i, group, n, x);
          }
        }
      }
  const double errors[4] = {error(y, y_exact), error(dq, dq_exact), error(dk, dk_exact), error(dv, dv_exact)};
  double worst = 0;
  for (double x : errors) worst = x <= worst ? worst : x;  // NaN stays
  std::printf("%-28s y %.1e  dq %.1e  dk %.1e  dv %.1e\n", c.name, errors[0], errors[1], errors[2], errors[3]);
  std::fflush(stdout);
  return worst;
}

}  // namespace

int main(int argc, char **argv) {
  void *file = argc > 1 ? dlopen(argv[1], RTLD_LAZY) : nullptr;
  if (!file) return std::fprintf(stderr, "%s\n", argc > 1 ? dlerror() : "usage: sdpa_check LIBRARY [case number]"), 2;
  const auto find = [file](auto &function, const char *name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(file, name));
    if (!function) std::fprintf(stderr, "%s\n", dlerror()), std::exit(2);
  };
  Library library;
  find(library.forward_workspace, "power_sdpa_forward_workspace_sm90"), find(library.forward, "power_sdpa_forward_sm90");
  find(library.backward_workspace, "power_sdpa_backward_workspace_sm90"), find(library.backward, "power_sdpa_backward_sm90");
  find(library.last_error, "power_last_error");
  int wrong = 0, number = 0;
  for (const Case &c : kCases) {
    const bool asked = argc < 3 || std::atoi(argv[2]) == number;
    ++number;
    if (asked && !(check(library, c) <= 3.7e-3)) ++wrong;  // the contract's bound of a bfloat16 gradient
  }
  return wrong != 0;
}
